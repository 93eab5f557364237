"""Rewards in a process of their own, each with a deadline: user code may raise, hang, or return nonsense.

    RewardProcess.score([(split, index, response), ...])  ─>  [Reward, ...]  in order, always complete

A reward that takes longer than ``timeout_s`` costs its own sample: the process is killed, a new one goes on with the
rest. ``signal.alarm`` would not do; it works in main threads only and does not stop C code.
"""

import math
import multiprocessing as mp
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cola_ray.tasks import Task
from cola_ray.tasks.protocol import Split


@dataclass(frozen=True)
class Reward:
    value: float  # 0 where there is none
    failure: str = ""  # why there is none: what the reward function raised, or its time limit


class RewardProcess:
    """Scores responses in a child process that makes the task for itself.

    Args:
        make: picklable, builds the task in the child.
        timeout_s: seconds a reward may take.
        start_timeout_s: seconds the child may take to build the task.
    """

    def __init__(self, make: Callable[[], Task], timeout_s: float, start_timeout_s: float = 300.0) -> None:
        self.make, self.timeout_s, self.start_timeout_s = make, timeout_s, start_timeout_s
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        context = mp.get_context("spawn")  # a fork would inherit the engine's threads and locks
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.make, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def score(self, items: Sequence[tuple[Split, int, str]]) -> list[Reward]:
        """One reward for every item, in order. Thread-safe; raises RuntimeError if the task cannot be built."""
        with self.lock:
            rewards: list[Reward] = []
            while len(rewards) < len(items):
                self._wait_until_ready()
                self.connection.send(items[len(rewards) :])
                rewards += self._receive(len(items) - len(rewards))
            return rewards

    def _receive(self, count: int) -> list[Reward]:
        """Replies until all are there, or one is overdue; then that one failed, and the process is a new one."""
        rewards: list[Reward] = []
        for _ in range(count):
            failure = f"took longer than {self.timeout_s:g} s"
            try:
                if self.connection.poll(self.timeout_s):
                    rewards.append(self.connection.recv())
                    continue
            except (EOFError, OSError):
                self.process.join()
                failure = f"ended its process with exit code {self.process.exitcode}"
            self.close()
            self.start()
            return [*rewards, Reward(0.0, failure)]
        return rewards

    def _wait_until_ready(self) -> None:
        if self.ready:
            return
        if not self.connection.poll(self.start_timeout_s):
            raise RuntimeError(f"the task was not built within {self.start_timeout_s:g} s")
        try:
            error = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the process that scores ended with exit code {self.process.exitcode}") from None
        if error:
            raise RuntimeError(f"the task could not be built: {error}")
        self.ready = True

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(make: Callable[[], Task], connection: multiprocessing.connection.Connection) -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        task = make()
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send("")
    while True:
        try:
            items = connection.recv()
        except EOFError:
            return
        for split, index, response in items:
            connection.send(_score(task, split, index, response))


def _end_with_parent(parent: int) -> None:
    """A worker that was killed cannot kill its child, which may hang in user code."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _score(task: Task, split: Split, index: int, response: str) -> Reward:
    try:
        value = float(task.score(split, index, response))
    except Exception as error:
        return Reward(0.0, f"raised {type(error).__name__}: {error}"[:300])
    return Reward(value) if math.isfinite(value) else Reward(0.0, f"returned {value}")
