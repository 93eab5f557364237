"""What hangs is ended, so that it counts as lost: nothing has to know a stopped process from a dead one.

    begin(actor, seconds)       an actor, asked now and then whether it answers, from a thread of whoever depends on it
    end()                       before Ray is left: nobody may call it afterwards
    Unreachable(kind, seconds)  an actor on this machine that nobody has a handle of: its process is looked at

Asked is what Ray itself answers beside an actor's methods; one that is busy, with threads or coroutines, answers.
"""

import contextlib
import threading
import time
from typing import Any

import psutil
import ray
from ray._private import state

_LOOK_S = 0.5  # between two looks at whether an answer has come, or the end


class _OverError(Exception):
    """Ray is about to be left."""


class _Watch(threading.Thread):
    def __init__(self, actor: Any, seconds: float, restarts: bool) -> None:
        super().__init__(daemon=True)
        self.actor, self.seconds, self.restarts = actor, seconds, restarts
        self.over = threading.Event()

    def run(self) -> None:
        again = self.actor.__ray_ready__.options(max_task_retries=-1 if self.restarts else 0)
        while True:
            try:
                self._answered(again.remote(), None)  # it is up, however long that has taken
                self._ask_until_silent()
            except ray.exceptions.RayActorError:
                if not self.restarts or self.over.wait(min(1.0, self.seconds / 4)):
                    return
            except Exception:  # the run is over, and Ray with it
                return

    def _ask_until_silent(self) -> None:
        """Four questions in a row without an answer, since a process that asks may have been held itself meanwhile."""
        once, silent = self.actor.__ray_ready__.options(max_task_retries=0), 0
        while silent < 4:
            silent = 0 if self._answered(once.remote(), self.seconds / 4) else silent + 1
            if not silent and self.over.wait(min(5.0, self.seconds / 4)):
                raise _OverError
        with contextlib.suppress(Exception):
            ray.kill(self.actor, no_restart=False)

    def _answered(self, question: Any, most: float | None) -> bool:
        """Whether it did within so many seconds. Raises what it answers, and _OverError."""
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
    """End an actor that has not answered for so long, from its first answer on.

    Args:
        restarts: Ray starts it again whenever it has ended.
    """
    _WATCHES[:] = [one for one in _WATCHES if one.is_alive()]
    _WATCHES.append(_Watch(actor, seconds, restarts))
    _WATCHES[-1].start()


def end() -> None:
    """Nothing is watched any more, and no thread in here calls Ray."""
    for one in _WATCHES:
        one.over.set()
    for one in _WATCHES:
        one.join()
    _WATCHES.clear()


class Unreachable:
    """Ends an actor of this job once its process has been stopped (SIGSTOP) for so long.

    Ray Train keeps the handle of its controller to itself, and places it on the machine of the process that called it.

    Args:
        kind: name of the actor's class.
        seconds: that it may be stopped.
    """

    def __init__(self, kind: str, seconds: float) -> None:
        self.kind, self.seconds = kind, seconds
        self.process: psutil.Process | None = None
        self.stopped_s, self.looked = 0.0, time.monotonic()

    def look(self) -> None:
        """To be called every second or so."""
        now = time.monotonic()
        passed, self.looked = min(now - self.looked, 2.0), now  # more is this process's own time, held by somebody
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
