"""The runs that benchmarks/chaos.py disturbs, and their processes."""

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from record import ROOT

sys.path.insert(0, str(ROOT / "tests" / "system"))
from runs import Run

PATIENCE = ["--cluster.answer-timeout-s", "30", "--cluster.stall-timeout-s", "200", "--task.reward-timeout-s", "10",
            "--cluster.max-failures", "1000", "--rollout.max-restarts", "1000"]  # fmt: skip
RUNS: list[Run] = []  # started by this process


@dataclass(frozen=True)
class Setting:
    """A job whose settings keep certain kinds of processes alive."""

    job: str
    kinds: tuple[str, ...]
    start: tuple[str, ...]
    """Settings for pre-training the start model."""
    run: tuple[str, ...]
    steps: int

    @property
    def args(self) -> list[str]:
        return [*self.run, *PATIENCE, "--rl.max-steps", str(self.steps), "--rl.eval-every", "0", "--rl.save-every", "2"]


ALWAYS = ("worker", "rank", "controller", "train controller", "driver", "raylet", "GCS")
SETTINGS = {
    "arithmetic": Setting(
        "rl_math",
        ("reward process", *ALWAYS),
        ("--pretrain.steps.base", "120", "--pretrain.steps.actions", "40", "--pretrain.steps.policy", "40"),
        ("--rl.prompts-per-step", "32", "--rl.eval-problems", "64"),
        80,
    ),
    "twenty_questions": Setting(
        "rl_agent",
        ("environment process", *ALWAYS, "replay shard", "critic replica"),
        ("--task.name", "twenty_questions", "--task.num-problems", "300", "--pretrain.steps.base", "60",
         "--pretrain.steps.actions", "20", "--pretrain.steps.policy", "20"),
        ("--rl.prompts-per-step", "8", "--rl.eval-problems", "8", "--critic.steps", "10", "--critic.batch-size", "64",
         "--critic.fresh-states", "64", "--replay.snapshot-every-s", "1"),
        24,
    ),
    "data_science": Setting(
        "rl_agent",
        ("sandbox server",),
        ("--task.name", "data_science", "--task.num-problems", "100", "--pretrain.steps.base", "60",
         "--pretrain.steps.actions", "20", "--pretrain.steps.policy", "20"),
        ("--task.name", "data_science", "--rl.algorithm", "grpo", "--rl.prompts-per-step", "2", "--rl.group-size", "4",
         "--rl.eval-problems", "2", "--task.max-failed-rewards", "0.2"),
        20,
    ),
}  # fmt: skip
KINDS = tuple(dict.fromkeys(kind for setting in SETTINGS.values() for kind in setting.kinds))
LOSSY = ("replay shard", "critic replica")
"""These return to their last save, so the run's curve is a different one afterwards."""

_TITLES = {
    "controller": ("ray::Controller",),
    "worker": ("ray::RolloutWorker", "ray::AgentWorker"),
    "rank": ("ray::RayTrainWorker",),
    "train controller": ("ray::TrainController",),
    "replay shard": ("ray::ReplayShard",),
    "critic replica": ("ray::CriticService",),
}


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    title: str
    state: str
    megabytes: float


def processes() -> list[Process]:
    """All descendants of this process, including those whose parents have died (see :func:`adopt_orphans`)."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                _reap(process.pid)
                continue
            title = " ".join(process.cmdline()) or process.name()
            found.append(
                Process(process.pid, process.ppid(), title, process.status(), process.memory_info().rss / 2**20)
            )
        except psutil.NoSuchProcess:
            continue
    return found


def of_kind(kind: str, among: Sequence[Process], driver: int) -> list[Process]:
    """The processes of one kind that belong to the run with this driver."""
    below = {one.pid: one for one in among}
    match kind:
        case "driver":
            return [one for one in among if one.pid == driver]
        case "GCS":
            return [one for one in among if "gcs_server" in one.title.split(" ")[0]]
        case "raylet":
            return [one for one in among if one.title.split(" ")[0].endswith("/raylet")]
        case "reward process" | "environment process":
            return [one for one in among if _forks(one) and _forks(below.get(one.parent))]
        case "sandbox server":
            servers = {one.pid for one in among if "sandbox/server.py" in one.title}
            return [one for one in among if one.pid in servers and one.parent not in servers]
    return [one for one in among if one.title.startswith(_TITLES[kind])]


def _forks(process: Process | None) -> bool:
    return process is not None and "multiprocessing.forkserver" in process.title


def adopt_orphans() -> None:
    """Become the parent of processes whose own parents die (instead of init), so that they can still be found."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _reap(pid: int) -> None:
    """Reap a child that has ended, unless subprocess waits for it."""
    if pid not in {run.process.pid for run in RUNS}:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def left_files(files: Sequence[Path], failed: bool = False) -> list[str]:
    """Remove the files that still exist and return a line naming them; after a failure Ray's logs may remain."""
    there = [path for path in files if path.exists()]
    left = [str(path) for path in there if not (_is_cache(path) or (failed and _is_logs(path)))]
    for path in there:
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    return [f"left below /tmp: {', '.join(sorted(left)[:4])}"] if left else []


def _is_cache(path: Path) -> bool:
    return path.name.startswith("torchinductor_")


def _is_logs(path: Path) -> bool:
    """Whether a folder contains only logs."""
    files = [file for file in path.rglob("*") if not file.is_dir()]
    return path.is_dir() and all("logs" in file.parts for file in files)
