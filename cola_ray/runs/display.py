"""What people see while a job runs: what it is doing, for how long, how far it is; never long without a sign of life.

    @shown()                                     opens the process's one display, unless it is open
    def job(...):
        current().doing("starting Ray")          a phase lasts until the next begins, and is then told with its time
        current().update("base", 10, 300, note)  a phase of countable steps

In a terminal the phase is a live line; elsewhere each phase is a line when it begins and one when it ends, steps are a
line now and then, and a phase that says nothing says at least that it goes on. Light: jobs open it before they import
what takes seconds to import.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cola_ray.runs.redaction import redacted

QUIET_S = 5.0
"""Seconds without a line after which a plain log is told that the phase goes on; also between two lines of steps."""


class _Console(Console):
    """One whose reader may go away, be it a pipe, a terminal or a full disk: the job goes on without it."""

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit, OSError):  # rich would end the process
            super().on_broken_pipe()


class Display:
    """Phases of a job, one after the other.

    Args:
        console: to write to; standard output.
        clock: seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or _Console(highlight=False, soft_wrap=True)
        self.clock = clock
        self.started = self.last_line = self.phase_began = clock()
        self.phase, self.place, self.untold = "", "", False
        self.seconds: dict[str, float] = {}  # of each phase that has ended
        self.live: Progress | None = None
        self.lock = threading.RLock()  # the heartbeat has a thread of its own
        self.closed = threading.Event()

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(),
                       TimeElapsedColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
            self.live = Progress(*columns, console=self.console, transient=True)
            self.live.start()
        else:
            threading.Thread(target=self._beats, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.doing("")
        if self.live is not None:
            self.live.stop()

    def doing(self, phase: str) -> None:
        """The phase before has ended, and this one begins."""
        with self.lock:
            if phase == self.phase:
                return
            if self.phase:
                spent = self.clock() - self.phase_began
                self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + spent
                self.say(f"{self.phase}: {_duration(spent)}" + (f"  {self.place}" if self.untold else ""))
            self.phase, self.place, self.untold, self.phase_began = phase, "", False, self.clock()
            if self.live is not None:
                for task in self.live.task_ids:
                    self.live.remove_task(task)
                if phase:
                    self.live.add_task(phase, total=None, note="")
            elif phase:
                self.say(f"{phase} ...")

    def update(self, phase: str, step: int, total: int, note: str = "", milestone: bool = False) -> None:
        """How far a phase of countable steps is.

        Args:
            milestone: worth a line of a plain log of its own.
        """
        with self.lock:
            self.doing(phase)
            self.place, self.untold = f"{step}/{total}  {note}".rstrip(), True
            if self.live is not None:
                self.live.update(self.live.task_ids[0], completed=step, total=total, note=note)
            elif milestone or step == total or self.clock() - self.last_line >= QUIET_S:
                self._say_place()

    def say(self, line: str) -> None:
        """A line that stays, with the time since the job began."""
        with self.lock:
            minutes, seconds = divmod(int(self.clock() - self.started), 60)
            self.console.print(f"{minutes}:{seconds:02d}  {redacted(line)}", markup=False)
            self.last_line = self.clock()

    def beat(self) -> None:
        """A sign of life, where there has been none for :data:`QUIET_S`."""
        with self.lock:
            if self.phase and self.clock() - self.last_line >= QUIET_S:
                self._say_place()

    def _say_place(self) -> None:
        self.say(f"{self.phase} {self.place or '...'}  ({_duration(self.clock() - self.phase_began)})")
        self.untold = False

    def _beats(self) -> None:
        while not self.closed.wait(1.0):
            self.beat()


_OPEN: list[Display] = []


def current() -> Display:
    """This process's display; where none is open, one without signs of life."""
    return _OPEN[0] if _OPEN else Display()


@contextlib.contextmanager
def shown() -> Iterator[Display]:
    """This process's display for the time of a block or, as a decorator, of a function."""
    if _OPEN:
        yield _OPEN[0]
        return
    with Display() as display:
        _OPEN.append(display)
        try:
            yield display
        finally:
            _OPEN.remove(display)


def wide_console(log_width: int) -> Console:
    """For tables: as wide as the terminal; in a log, where there is room for every figure, ``log_width``."""
    console = _Console(highlight=False)  # which also takes a stream that is no file, such as Ray Tune's
    return console if console.is_terminal else _Console(highlight=False, width=log_width)


def tell(line: str) -> None:
    """One that is not cut to the width of anything."""
    _Console(highlight=False, soft_wrap=True).print(redacted(line), markup=False)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
