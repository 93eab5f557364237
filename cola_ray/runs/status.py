"""``cola_ray status RUN ...``: what runs are doing, read from their folders; for a sweep's folder, all of its runs.
``cola_ray send RUN ...``: send MLflow the events that it missed of runs that have ended.

    RUN/config.json    the settings
    RUN/log.jsonl      start, steps, messages and end, a line each, with the run's id and the policy's version
    RUN/summary.json   once it has ended

``status`` only reads files: it works during a run, after it, and on another machine that can access the folder.
"""

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table

from cola_ray.runs import event_log
from cola_ray.runs.display import wide_console
from cola_ray.runs.redaction import redacted
from cola_ray.settings.config import ConfigError, RunFailedError

_BARS = "▁▂▃▄▅▆▇█"
_SILENT_S = 120.0  # a run counts as silent after this many seconds, or five steps, without an event


@dataclass(frozen=True)
class Status:
    """One run, as its folder shows it."""

    folder: Path
    config: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The step events in order; the last one counts if a learner repeated a step after a loss."""
        found = {event["version"]: event for event in self.events if event["event"] == "step" and event["version"] > 0}
        return [found[version] for version in sorted(found)]

    @property
    def state(self) -> str:
        """starting, running, ended, stopped, failed, or silent: no event for long, perhaps killed."""
        last = self.events[-1] if self.events else {"event": "start"}
        if last["event"] in ("end", "stop", "fail"):
            return {"end": "ended", "stop": "stopped", "fail": "failed"}[last["event"]]
        quiet = time.time() - (self.folder / "log.jsonl").stat().st_mtime if self.events else 0.0
        if quiet > max(_SILENT_S, 5 * self.seconds_per_step):
            return f"silent for {timedelta(seconds=int(quiet))}"
        return "running" if self.steps else "starting"

    @property
    def seconds_per_step(self) -> float:
        """The mean of the last ten intervals between steps, without pauses before a resume and repeated steps."""
        seconds, made = list[float](), list[int]()
        for before, after in itertools.pairwise(event for event in self.events if event["event"] in ("step", "resume")):
            if before["event"] == after["event"] == "step" and after["version"] > before["version"]:
                times = (datetime.fromisoformat(event["time"]).timestamp() for event in (before, after))
                seconds.append(-next(times) + next(times))
                made.append(after["version"] - before["version"])
        return sum(seconds[-10:]) / sum(made[-10:]) if made else 0.0

    def latest(self, *names: str) -> float | None:
        """Return the last value of the first of these metrics that was logged."""
        for name in names:
            for event in reversed(self.events):
                if name in event:
                    return float(event[name])
        return None


def read(folder: Path) -> Status:
    """Read a run's folder.

    Raises:
        FileNotFoundError: no run has written there.
    """
    config = json.loads((folder / "config.json").read_text())
    return Status(folder, config, event_log.read(folder))


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run's settings, rather than some other config.json."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("rl"), dict) and "max_steps" in config["rl"]


def runs_of(folder: Path) -> list[Path]:
    """Return the folder itself and, if it is a sweep's, the folders of its runs."""
    return [folder, *sorted(path.parent for path in folder.glob("runs/*/config.json"))]


def overview(runs: list[Status]) -> Group:
    """Return a table of all runs, and below it the last messages of each."""
    table = Table()
    for heading in ("run", "state", "step", "reward", "", "held out", "KL", "s a step", "left"):
        table.add_column(heading, justify="left" if heading in ("run", "state", "") else "right", no_wrap=True)
    messages = []
    for run in runs:
        steps, total = run.steps, run.config["rl"]["max_steps"]
        done = steps[-1]["version"] if steps else 0
        rewards = [step["reward/mean"] for step in steps if "reward/mean" in step]
        left = (total - done) * run.seconds_per_step
        table.add_row(
            run.folder.name,
            run.state,
            f"{done}/{total}" if rewards else "",
            _number(rewards[-1] if rewards else None),
            _sparkline(rewards),
            _number(run.latest("eval/accuracy", "eval/return", "eval/reward")),
            _number(run.latest("policy/kl")),
            _number(run.seconds_per_step or None),
            str(timedelta(seconds=int(left))) if run.state == "running" and rewards and left > 0 else "",
        )
        texts = [event.get("text") or event.get("reason") for event in run.events if {"text", "reason"} & set(event)]
        messages += [f"{run.folder.name}: {text}" for text in texts[-3:]]
    return Group(table, *messages)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _sparkline(values: list[float], width: int = 24) -> str:
    """Draw the means of ``width`` equal stretches as bars, scaled from the lowest to the highest."""
    if not values:
        return ""
    count = min(width, len(values))
    cuts = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, span = min(means), max(means) - min(means) or 1.0
    return "".join(_BARS[int((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def status(argv: Sequence[str]) -> int:
    """Run ``cola_ray status RUN ... [--follow]``; return the exit code."""
    parser = _parser("status", "what runs are doing")
    parser.add_argument("--follow", action="store_true", help="show it again every two seconds")
    arguments = parser.parse_args(argv)
    folders = [run for given in arguments.run for run in runs_of(given)]
    for folder in folders:
        if not is_run(folder):
            print(f"{folder}: no run there; give a run's --output-dir, e.g. outputs/demo", file=sys.stderr)
            return 2
    console = wide_console(log_width=200)
    if not arguments.follow:
        console.print(overview([read(folder) for folder in folders]))
        return 0
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(overview([read(folder) for folder in folders]), refresh=True)
            time.sleep(2)
    return 0


def send(argv: Sequence[str]) -> int:
    """Run ``cola_ray send RUN ... [--tracking-uri URI]``; return the exit code."""
    parser = _parser("send", "send MLflow the events that it missed")
    parser.add_argument("--tracking-uri", default="", help="instead of the run's own, whose password is not stored")
    arguments = parser.parse_args(argv)
    from cola_ray.runs import mirror

    for folder in (run for given in arguments.run for run in runs_of(given)):
        try:
            print(mirror.send(folder, arguments.tracking_uri))
        except ConfigError as error:
            print(redacted(str(error)), file=sys.stderr)
            return 2
        except RunFailedError as error:
            print(f"not sent: {error}", file=sys.stderr)
            return 1
    return 0


def _parser(command: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"cola_ray {command}", description=about)
    parser.add_argument("run", nargs="+", type=Path, help="a run's folder, e.g. outputs/demo")
    return parser
