"""What a user sees while a job runs: the current phase, how long it has taken, and how far it has come.

    @shown()                                     opens the process's one display, unless it is open already
    def job(...):
        current().doing("starting Ray")          a phase lasts until the next one begins; its time is printed then
        current().update("base", 10, 300, note)  a phase of countable steps

In a terminal the phase is a live line. Elsewhere each phase prints a line when it begins and one when it ends, steps
print a line now and then, and a phase without news prints every few seconds that it is still running. This module is
light to import, because jobs open the display before their slow imports.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cola_ray.runs.redaction import redacted

QUIET_S = 5.0
"""Seconds without output after which a plain log repeats the current phase; also the time between lines of steps."""


class _Console(Console):
    """A console that survives the loss of its output, be it a pipe, a terminal or a full disk."""

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit, OSError):  # rich would exit the process
            super().on_broken_pipe()


class Display:
    """The phases of a job, one after the other.

    Args:
        console: to print to; by default standard output.
        clock: returns seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or _Console(highlight=False, soft_wrap=True)
        self.clock = clock
        self.started = self.last_line = self.phase_began = clock()
        self.phase, self.place, self.unprinted = "", "", False
        self.seconds: dict[str, float] = {}  # by phase, for those that have ended
        self.live: Progress | None = None
        self.lock = threading.RLock()  # the heartbeat runs in a thread of its own
        self.closed = threading.Event()

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(),
                       TimeElapsedColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
            self.live = Progress(*columns, console=self.console, transient=True)
            self.live.start()
        else:
            threading.Thread(target=self._heartbeats, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.doing("")
        if self.live is not None:
            self.live.stop()

    def doing(self, phase: str) -> None:
        """End the current phase and begin this one; "" only ends it."""
        with self.lock:
            if phase == self.phase:
                return
            if self.phase:
                spent = self.clock() - self.phase_began
                self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + spent
                self.say(f"{self.phase}: {_duration(spent)}" + (f"  {self.place}" if self.unprinted else ""))
            self.phase, self.place, self.unprinted, self.phase_began = phase, "", False, self.clock()
            if self.live is not None:
                for task in self.live.task_ids:
                    self.live.remove_task(task)
                if phase:
                    self.live.add_task(phase, total=None, note="")
            elif phase:
                self.say(f"{phase} ...")

    def update(self, phase: str, step: int, total: int, note: str = "", milestone: bool = False) -> None:
        """Show how far a phase of countable steps has come.

        Args:
            phase: begins if it is not the current one.
            step: how many steps are done.
            total: how many steps there are.
            note: shown after the count.
            milestone: print this step even in a plain log.
        """
        with self.lock:
            self.doing(phase)
            self.place, self.unprinted = f"{step}/{total}  {note}".rstrip(), True
            if self.live is not None:
                self.live.update(self.live.task_ids[0], completed=step, total=total, note=note)
            elif milestone or step == total or self.clock() - self.last_line >= QUIET_S:
                self._say_place()

    def say(self, line: str) -> None:
        """Print a line that stays, with the time since the job began."""
        with self.lock:
            minutes, seconds = divmod(int(self.clock() - self.started), 60)
            self.console.print(f"{minutes}:{seconds:02d}  {redacted(line)}", markup=False)
            self.last_line = self.clock()

    def show(self, make: Callable[[], RenderableType]) -> None:
        """Print what ``make`` returns, but only in a terminal, not in a plain log."""
        with self.lock:
            if self.live is not None:
                self.console.print(make(), soft_wrap=False)

    def beat(self) -> None:
        """Repeat the current phase if nothing was printed for :data:`QUIET_S` seconds."""
        with self.lock:
            if self.phase and self.clock() - self.last_line >= QUIET_S:
                self._say_place()

    def _say_place(self) -> None:
        self.say(f"{self.phase} {self.place or '...'}  ({_duration(self.clock() - self.phase_began)})")
        self.unprinted = False

    def _heartbeats(self) -> None:
        while not self.closed.wait(1.0):
            self.beat()


_OPEN: list[Display] = []


def current() -> Display:
    """Return this process's display; if none is open, one that prints lines and sends no heartbeat."""
    return _OPEN[0] if _OPEN else Display()


@contextlib.contextmanager
def shown() -> Iterator[Display]:
    """Open this process's display for a block or, as a decorator, for a function."""
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
    """Return a console for tables: as wide as the terminal, or ``log_width`` columns in a log."""
    console = _Console(highlight=False)  # also works with a stream that is not a file, such as Ray Tune's
    return console if console.is_terminal else _Console(highlight=False, width=log_width)


def print_line(line: str) -> None:
    """Print a line without wrapping or cutting it."""
    _Console(highlight=False, soft_wrap=True).print(redacted(line), markup=False)


def plain(text: str) -> str:
    """Return the text as one line without control characters, so that untrusted text cannot control the terminal."""
    return "".join(letter if letter.isprintable() else "⏎" if letter == "\n" else " " for letter in text)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
