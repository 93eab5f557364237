"""A thread that copies a run's log to a tracker, without delaying the run or ending it.

wake() ──> _copy() ──> the tracker has all of the log        mirror.py: MLflow; followers.py: TensorBoard, W&B
             │ fails
             └──> reported once ──> _drop() ──> a pause ──> again
"""

import threading
import time
from abc import ABC, abstractmethod

from cola_ray.runs import explanations
from cola_ray.runs.display import current
from cola_ray.runs.redaction import redacted


class LogCopy(ABC):
    """Copies the log whenever :meth:`wake` says that there is more.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self.state = ""  # how the run has ended
        self.fault = ""  # what went wrong in the last attempt
        self.fault_shown = False
        self.failures = 0  # in a row
        self.woken, self.tried, self.done = threading.Event(), threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)

    def wake(self) -> None:
        """Tell the thread that there is more to copy."""
        self.woken.set()

    @abstractmethod
    def _copy(self, last: bool) -> None:
        """Copy what is missing, and close the copy if this is the last time. Raises any error that prevents it."""

    @abstractmethod
    def _drop(self) -> None:
        """Forget the connection, after an error."""

    @abstractmethod
    def _pause_s(self) -> float:
        """Seconds until the next attempt, given ``failures`` in a row."""

    @abstractmethod
    def _complaint(self) -> str:
        """The line that reports ``fault``."""

    def _work(self) -> None:
        while not self.done.is_set():
            self.woken.wait()
            self.woken.clear()
            last = bool(self.state)
            try:
                self._copy(last)
                self.fault, self.failures = "", 0
            except Exception as error:  # from the tracker's package, the disk or the network
                self._drop()
                self.fault, self.failures = redacted(explanations.explain(error)[0]), self.failures + 1
                if not self.fault_shown and not self.state:
                    self.fault_shown = True
                    current().say(self._complaint())
            self.tried.set()
            if last:
                self.done.set()
            elif self.fault:
                self._wait()
                self.woken.set()

    def _wait(self) -> None:
        """Pause between attempts; cut short when the run ends."""
        until = time.monotonic() + self._pause_s()
        while time.monotonic() < until and not self.state:
            time.sleep(0.05)
