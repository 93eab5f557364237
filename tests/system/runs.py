"""Runs of jobs as subprocesses, for tests that disturb them: start, watch, kill, compare."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cola_ray.runs import event_log

ROOT = Path(__file__).parents[2]
OF_THE_MACHINE = re.compile("time/|memory/|.*/tokens_per_second$")
# A base trained just long enough to be right sometimes, so that RL has something to learn from.
SHORT_PRETRAINING = [
    "--pretrain.steps.base", "120", "--pretrain.steps.actions", "40", "--pretrain.steps.policy", "40"
]  # fmt: skip
SHORT_RL = ["--rl.max-steps", "5", "--rl.prompts-per-step", "8", "--rl.group-size", "8", "--rl.eval-problems", "64",
            "--rl.eval-every", "0", "--rl.save-every", "2", "--samples.every", "2"]  # fmt: skip


class Run:
    """One job of a checkout in a folder of its own; its output goes to ``where/log``."""

    def __init__(self, job: str, where: Path, *args: str, code: Path = ROOT) -> None:
        where.mkdir(parents=True, exist_ok=True)
        self.job, self.where = job, where
        command = [sys.executable, str(code / "jobs" / f"{job}.py"), "--preset", "tiny", *args]
        environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{code}"}
        with (where / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=where, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def log(self) -> str:
        return (self.where / "log").read_text()

    @property
    def output(self) -> Path:
        return self.start.parent if self.job == "pretrain" else self.where / "outputs" / f"{self.job}-tiny-seed0"

    @property
    def start(self) -> Path:
        """The model that this job pre-trained; the name of its folder depends on the settings."""
        (found,) = (self.where / "outputs").glob("pretrain-tiny-*/model")
        return found

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "summary.json").read_text())
        return found

    def finish(self, code: int = 0, timeout: float = 1800) -> str:
        """Wait for the end; returns everything that the job printed."""
        try:
            self.process.wait(timeout)
        finally:
            self.end()
        assert self.process.returncode == code, self.log[-4000:]
        return self.log

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def wait_for_step(self, key: str, step: int, timeout: float = 600) -> None:
        """Wait until the metric ``key`` has reached ``step``."""
        self.wait_for(lambda: max(self.series(key), default=-1) >= step, timeout)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 600) -> None:
        """Wait until the condition holds, while the job runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.log[-4000:]
            assert time.monotonic() < deadline, self.log[-4000:]
            time.sleep(0.2)

    def series(self, key: str) -> dict[int, float]:
        """The metric's last value in each step."""
        with contextlib.suppress(sqlite3.OperationalError), self._database() as database:
            query = "select step, value from metrics where key = ? order by step, timestamp"
            return dict(database.execute(query, (key,)).fetchall())
        return {}

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.where / "outputs" / "mlflow.db", timeout=30)
        try:
            yield connection
        finally:
            connection.close()

    def actors(self, title: str) -> list[int]:
        """Processes below the job whose title starts like this, e.g. ray::RolloutWorker."""
        return [pid for pid, _, args in descendants(self.process.pid) if args.startswith(title)]

    def kill_actor(self, title: str) -> int:
        victim = self.actors(title)[-1]
        os.kill(victim, signal.SIGKILL)
        return victim


def kill(run: Run) -> None:
    """Kill the whole run at once, and wait until nothing is left."""
    doomed = [run.process.pid, *(pid for pid, _, _ in descendants(run.process.pid))]
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.end()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}/exe") for pid in doomed):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def metrics(output: Path) -> dict[int, dict[str, float]]:
    """Metrics by step that settings and seed determine: no times or other properties of the machine."""
    return {
        step: {name: value for name, value in of_step.items() if not OF_THE_MACHINE.match(name)}
        for step, of_step in event_log.history(event_log.read(output)).items()
    }


def descendants(root: int) -> list[tuple[int, int, str]]:
    """(pid, parent, command line) of every process below ``root``."""
    found = subprocess.run(["ps", "-wweo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    below = {root}
    while True:
        more = {int(pid) for pid, parent, _ in rows if int(parent) in below} - below
        if not more:
            return [(int(pid), int(parent), args) for pid, parent, args in rows if int(pid) in below - {root}]
        below |= more
