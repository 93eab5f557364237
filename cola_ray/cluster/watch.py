"""Ends processes that hang, so that they count as lost: no other code has to tell a stopped process from a dead one.

    begin(actor, seconds)       watch an actor: a thread of the process that depends on it checks that it answers
    end()                       stop watching before Ray is shut down, since Ray must not be called afterwards
    Unreachable(kind, seconds)  watch the process of an actor on this machine to which there is no handle

The check is a call that Ray itself answers beside an actor's methods, so an actor busy with threads or coroutines
answers it.
"""

import contextlib
import threading
import time
from typing import Any

import psutil
import ray
from ray._private import state

_LOOK_S = 0.5  # seconds between two checks for an answer, or for the end of watching


class _OverError(Exception):
    """Watching has ended, since Ray is about to be shut down."""


class _Watch(threading.Thread):
    def __init__(self, actor: Any, seconds: float, restarts: bool) -> None:
        super().__init__(daemon=True)
        self.actor, self.seconds, self.restarts = actor, seconds, restarts
        self.over = threading.Event()

    def run(self) -> None:
        again = self.actor.__ray_ready__.options(max_task_retries=-1 if self.restarts else 0)
        while True:
            try:
                self._answered(again.remote(), None)  # wait until it has started, however long that takes
                self._ask_until_silent()
            except ray.exceptions.RayActorError:
                if not self.restarts or self.over.wait(min(1.0, self.seconds / 4)):
                    return
            except Exception:  # the run is over, and Ray with it
                return

    def _ask_until_silent(self) -> None:
        """Kill the actor after four unanswered calls in a row; after one, this process itself may have been stopped."""
        once, silent = self.actor.__ray_ready__.options(max_task_retries=0), 0
        while silent < 4:
            silent = 0 if self._answered(once.remote(), self.seconds / 4) else silent + 1
            if not silent and self.over.wait(min(5.0, self.seconds / 4)):
                raise _OverError
        with contextlib.suppress(Exception):
            ray.kill(self.actor, no_restart=False)

    def _answered(self, question: Any, most: float | None) -> bool:
        """Whether an answer came within ``most`` seconds. Raises the answer's exception, or _OverError."""
        until = None if most is None else time.monotonic() + most
        while until is None or time.monotonic() < until:
            if ray.wait([question], timeout=_LOOK_S)[0]:
                ray.get(question)
                return True
            if self.over.is_set():
                raise _OverError
        return False


_WATCHES: list[_Watch] = []


def begin(actor: Any, seconds: float, restarts: bool = False) -> None:
    """End an actor that does not answer for this many seconds, counted after its first answer.

    Args:
        restarts: whether Ray restarts it whenever it has ended.
    """
    _WATCHES[:] = [one for one in _WATCHES if one.is_alive()]
    _WATCHES.append(_Watch(actor, seconds, restarts))
    _WATCHES[-1].start()


def end() -> None:
    """Stop watching; afterwards no thread of this module calls Ray."""
    for one in _WATCHES:
        one.over.set()
    for one in _WATCHES:
        one.join()
    _WATCHES.clear()


class Unreachable:
    """Ends an actor of this job once its process has been stopped (SIGSTOP) for too long.

    Ray Train does not expose the handle of its controller, and places it on the machine of the process that called it.

    Args:
        kind: name of the actor's class.
        seconds: how long it may be stopped.
    """

    def __init__(self, kind: str, seconds: float) -> None:
        self.kind, self.seconds = kind, seconds
        self.process: psutil.Process | None = None
        self.stopped_s, self.looked = 0.0, time.monotonic()

    def look(self) -> None:
        """Check the process; to be called about every second."""
        now = time.monotonic()
        passed, self.looked = min(now - self.looked, 2.0), now  # beyond that, this process was stopped itself
        try:
            self.process = self.process or self._find()
            is_stopped = self.process is not None and self.process.status() == psutil.STATUS_STOPPED
            self.stopped_s = self.stopped_s + passed if is_stopped else 0.0
            if self.process is not None and self.stopped_s > self.seconds:
                self.process.kill()
        except psutil.Error:
            self.process = None

    def _find(self) -> psutil.Process | None:
        with contextlib.suppress(ray.exceptions.RayError, OSError, RuntimeError):
            here = ray.get_runtime_context()
            for actor in state.actors(job_id=ray.JobID.from_hex(here.get_job_id())).values():
                is_here = actor["State"] == "ALIVE" and actor["Address"]["NodeID"] == here.get_node_id()
                if is_here and actor["ActorClassName"] == self.kind:
                    return psutil.Process(actor["Pid"])
        return None
