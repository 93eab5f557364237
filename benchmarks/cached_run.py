"""Runs of jobs whose results are kept, so that a stopped benchmark continues.

KeptRun(folder / "grpo-0", "rl_math", {"preset": "tiny", "rl.algorithm": "grpo"})
say_time(runs, parallel)  ─>  run_kept(runs, parallel)  ─>  a summary each; finished runs are not repeated
"""

import functools
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import ROOT

from cola_ray.runs.run_folder import summary_of
from cola_ray.settings.combinations import refused
from cola_ray.settings.config import Config, is_environment, override
from cola_ray.settings.matrix import as_words
from cola_ray.settings.presets import expected_seconds, preset
from cola_ray.settings.relevance import unread


@dataclass(frozen=True)
class KeptRun:
    """One run: its folder, its job (``jobs/<job>.py``), and its settings by dotted field, including ``preset``."""

    where: Path
    job: str
    settings: Mapping[str, Any]

    @property
    def output(self) -> Path:
        return self.where / "outputs" / "run"

    @property
    def config(self) -> Config:
        """The complete settings."""
        changes = {"output_dir": str(self.output), **self.settings}
        return override(preset_of(self.job, changes), changes)

    @property
    def is_done(self) -> bool:
        return summary_of(self.output) is not None

    def faults(self) -> list[str]:
        """A line for each setting that the job would refuse, as far as this can be told from the settings alone."""
        return [*refused(self.config), *unread(self.config, self.job)]

    def summary(self) -> dict[str, Any]:
        """The run's summary; starts or resumes the run if it has not finished."""
        return run_once(self.where, self.job, *as_words(self.settings))


def preset_of(job: str, changes: Mapping[str, Any]) -> Config:
    """The preset that the settings change; its agent version if the job or the task is for agents."""
    task = str(changes.get("task.name", ""))
    return preset(changes["preset"], is_environment(task) if task else job == "rl_agent", task)


def say_time(runs: Sequence[KeptRun], parallel: int) -> str:
    """How many runs are left, and how long they will take: one line.

    The estimate comes from step times of the tiny preset on idle cores; for other presets and jobs it is only known
    once the first run has finished.
    """
    left = [run for run in runs if not run.is_done]
    said = f"{len(left)} of {len(runs)} runs to make, {parallel} at a time"
    seconds = [expected_seconds(run.config, run.job) for run in left]
    known = [one for one in seconds if one is not None]
    if not left:
        return f"all {len(runs)} runs have been made"
    if len(known) < len(left):
        said += "; how long they take is seen after the first"
        return said + (f", {_minutes(sum(known) / parallel)} for {len(known)} of them" if known else "")
    return f"{said}: {_minutes(sum(known) / parallel)}, by what the tiny preset's steps take on idle cores"


def run_kept(runs: Sequence[KeptRun], parallel: int) -> list[dict[str, Any]]:
    """Summaries in order, computed ``parallel`` at a time; checks all settings first, and prints progress.

    Raises:
        SystemExit: a run's settings would be refused; nothing has been started.
    """
    faults = [f"{run.where.name}: {line}" for run in runs if not run.is_done for line in run.faults()]
    if faults:
        raise SystemExit("\n".join(faults))
    print(say_time(runs, parallel), flush=True)
    return run_all([run.summary for run in runs], parallel)


def run_once(where: Path, job: str, *settings: str) -> dict[str, Any]:
    """Run ``jobs/<job>.py`` with these settings in ``where``, unless it finished there before; returns its summary.

    An interrupted run is resumed.
    """
    run = where / "outputs" / "run"
    if summary_of(run) is None:
        where.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *settings, "--output-dir", "outputs/run"]
        if run.exists():
            command.append("--resume")
        with (where / "log.txt").open("a") as log:
            subprocess.run(command, cwd=where, check=True, stdout=log, stderr=subprocess.STDOUT)
    return summary_of(run) or {}


def series(where: Path, metric: str) -> list[float]:
    """A run's values of a metric, sorted by step."""
    with sqlite3.connect(where / "outputs" / "mlflow.db") as database:
        query = "select value from metrics where key = ? order by step"
        return [value for (value,) in database.execute(query, [metric])]


def run_all(jobs: Iterable[Callable[[], Any]], parallel: int) -> list[Any]:
    """Results of all jobs in order, computed ``parallel`` at a time; prints progress and the remaining time."""
    waiting, seconds = list(jobs), list[float]()
    results = []
    with ThreadPoolExecutor(parallel) as pool:
        started = [pool.submit(functools.partial(_timed, job, seconds)) for job in waiting]
        for number, future in enumerate(started, 1):
            results.append(future.result())
            print(f"{number} of {len(waiting)} runs{_left(seconds, len(waiting), parallel)}", flush=True)
    return results


def _timed(job: Callable[[], Any], seconds: list[float]) -> Any:
    started = time.monotonic()
    found = job()
    seconds.append(time.monotonic() - started)
    return found


def _left(seconds: Sequence[float], total: int, parallel: int) -> str:
    """The remaining time, from the runs made so far; those that were kept from before took no time."""
    made = [one for one in seconds if one >= 1]
    left = total - len(seconds)
    return f", {_minutes(left * sum(made) / len(made) / parallel)} left" if made and left else ""


def _minutes(seconds: float) -> str:
    minutes = max(round(seconds / 60), 1)
    if minutes >= 120:
        return f"about {minutes / 60:.1f} hours"
    return f"about {minutes} minute{'s' * (minutes > 1)}"
