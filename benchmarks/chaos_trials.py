"""Records of benchmarks/chaos.py: what a trial did and found, which trials are missing, and their table."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos_processes import KINDS, LOSSY, SETTINGS

OUTCOMES = ("went on", "went on with a loss", "ended and resumed", "fault")
SAME = ("policy/loss", "policy/grad_norm", "reward/mean", "rollout/response_length")
GROWTH = 1.25  # largest factor by which the memory of driver and controller may grow since the run's first trial
TOLERANCE = 1e-4  # a lost share is generated again in another batch, whose arithmetic differs in the last bit


@dataclass
class Trial:
    """What was done to a run, and what happened to it."""

    job: str
    setting: str
    kind: str
    signal: str
    number: int
    seed: int
    commit: str
    victim: str  # title of the process
    step: int  # last step before the signal
    pause_s: float  # from when all processes were alive until the signal
    outcome: str = ""  # one of OUTCOMES
    seconds: float = 0.0  # from the signal until the second step after it, or the end
    said: str = ""  # the run's message about it
    exit_code: int | None = None
    lost: str = ""  # documented losses: failed answers, or where replay and critic returned to their last save
    curve: str = ""  # compared with the undisturbed run: "exact", "within 1e-4", "other", or "" if no step followed
    megabytes: dict[str, float] = field(default_factory=dict)  # of the largest process of each kind, afterwards
    faults: list[str] = field(default_factory=list)


def missing(trials: Sequence[Mapping[str, Any]], settings: Sequence[str], kinds: Sequence[str], signals: Sequence[str],
            wanted: int) -> Iterator[tuple[str, str, str, int]]:  # fmt: skip
    """(setting, kind, signal, number) of missing trials; signals alternate, and each kind's first trial comes first."""
    made: dict[tuple[str, ...], int] = {}
    for trial in trials:
        key = (trial["setting"], trial["kind"], trial["signal"])
        made[key] = made.get(key, 0) + 1
    for number in range(wanted):
        name, of_signal = signals[number % len(signals)], number // len(signals)
        for setting in settings:
            for lossy in (False, True):
                for kind in SETTINGS[setting].kinds:
                    if kind in kinds and (kind in LOSSY) == lossy and made.get((setting, kind, name), 0) <= of_signal:
                        yield setting, kind, name, number


def compare(found: Mapping[int, Mapping[str, float]], expected: Mapping[int, Mapping[str, float]]) -> tuple[str, str]:
    """Compare two curves on their common steps: "exact", "within 1e-4", "other" or "", and the first difference."""
    verdict, where = "", ""
    for step in sorted(found.keys() & expected.keys() - {0}):
        for key in SAME:
            one, other = found[step].get(key), expected[step].get(key)
            if one == other:
                verdict = verdict or "exact"
            elif one is None or other is None or abs(one - other) > TOLERANCE * max(abs(other), 0.1):
                return "other", f"step {step}: {key} {one} for {other}"
            else:
                verdict = f"within {TOLERANCE:g}"
    return verdict, where


def gaps(steps: Mapping[int, Mapping[str, float]], prompts: int) -> list[str]:
    """Missing steps, and steps that did not end at the right prompt."""
    numbers = sorted(step for step in steps if step)
    wrong = [f"step {a + 1} is missing" for a, b in zip([0, *numbers], numbers, strict=False) if b != a + 1]
    for step in numbers:
        last = steps[step].get("rollout/last_position")
        if last is not None and last != step * prompts - 1:
            wrong.append(f"step {step} ended with prompt {last:.0f}")
    return wrong[:3]


def table(trials: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int | str]]:
    """A row for each combination of job, process kind and signal."""
    rows: dict[str, dict[str, int | str]] = {}
    order = {kind: index for index, kind in enumerate(KINDS)}
    for trial in sorted(trials, key=lambda one: (one["job"], order[one["kind"]], one["signal"])):
        name = f"{trial['job']}: {trial['kind']}, {trial['signal']}"
        row = rows.setdefault(name, {"tried": 0, **dict.fromkeys(OUTCOMES, 0), "seconds": 0})
        row["tried"] = int(row["tried"]) + 1
        row[trial["outcome"]] = int(row[trial["outcome"]]) + 1
        row["seconds"] = max(int(row["seconds"]), round(trial["seconds"]))
    return rows


def without_folders(trial: Any) -> Any:
    """Reduce paths to file names, because records are read on other machines."""
    if isinstance(trial, str):
        return re.sub(r"(/[\w.+@-]+)+/(?=[\w.+@-])", "", trial)
    if isinstance(trial, list):
        return [without_folders(one) for one in trial]
    return {k: without_folders(v) for k, v in trial.items()} if isinstance(trial, dict) else trial


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """One line for each process that no trial replaces and that has grown by more than ``GROWTH``."""
    both = [kind for kind in ("driver", "controller") if kind in before and kind in after]
    return [f"the {k} grew from {before[k]} MB to {after[k]}" for k in both if after[k] > GROWTH * before[k]]
