"""What a run's parts report and wait for: a failure ends the run, a stall is named, and no call waits for the dead.

spawn(work) ────────> a task; an exception in it becomes the run's failure ──┐
waiting_for(what) ──> pending ──> too long? a failure that names it ─────────┤
until(condition) ───> waits for a change, and raises when the run fails <────┘
say, doing, step, samples ──> events ──> drain() ──> the driver's screen, tracker and files
                                             └── unread(version): what a killed driver may have missed ──> checkpoint
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from cola_ray.runs import explanations
from cola_ray.runs.samples import Sample

T = TypeVar("T")
Event = dict[str, Any]


class Supervisor:
    """One run's failure, its events, its tasks, and the list of what is waited for. Lives in one event loop.

    Args:
        stall_timeout_s: seconds that anything may be pending; ``cluster.stall_timeout_s``.
    """

    def __init__(self, stall_timeout_s: float) -> None:
        self.stall_timeout_s = stall_timeout_s
        self.failure: str | None = None
        self.events: list[Event] = []  # for the driver, in order
        self.told: list[Event] = []  # handed to the driver, not yet known to be read
        self.num_read = 0  # events that the driver has read
        self.tasks: set[asyncio.Task] = set()
        self.pending: dict[str, float] = {}  # what is being waited for -> since when
        self.is_open = False
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def opening(self, doing: str) -> AsyncIterator[None]:
        """The run's start: stalls are watched from here on; at the end the run is open, or has failed."""
        self.spawn(self._watch_for_stalls())
        self.doing(doing)
        try:
            yield
        except Exception as error:
            await self.fail(explanations.one_line(error))
            raise
        self.is_open = True
        await self.notify()

    async def opened(self) -> None:
        """Wait until the run is open. Raises RuntimeError with the reason if it fails first."""
        with self.waiting_for("engines to start"):
            await self.until(lambda: self.is_open)

    # --- failure and change ---------------------------------------------------------------------------------------

    async def fail(self, reason: str) -> None:
        """End the run as failed. Only the first reason counts."""
        self.failure = self.failure or reason
        await self.notify()

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise RuntimeError(self.failure)

    async def notify(self) -> None:
        """Signal a change that others may be waiting for."""
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a change that makes ``condition`` true. Raises RuntimeError with the reason if the run fails."""
        async with self._changed:
            await self._changed.wait_for(lambda: condition() or self.failure is not None)
        self.raise_failure()

    # --- tasks ------------------------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task; if it fails, the run fails."""

        async def guarded() -> T:
            try:
                return await work
            except Exception as error:
                await self.fail(explanations.one_line(error))
                raise

        task = asyncio.get_running_loop().create_task(guarded())
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            task.exception()  # already the run's failure; this keeps asyncio from warning that nobody retrieved it

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` returns or raises. Raises RuntimeError with the reason if the run fails first."""
        working = asyncio.create_task(work)
        failing = asyncio.create_task(self.until(lambda: False))
        try:
            await asyncio.wait({working, failing}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                await failing
            return await working
        finally:
            await self.cancel(working, failing)

    @staticmethod
    async def cancel(*tasks: asyncio.Task | None) -> None:
        """Cancel these tasks (None is skipped) and wait until they have ended."""
        for task in tasks:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    # --- what is waited for -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        since = self.pending[what] = time.monotonic()
        try:
            yield
        finally:
            if self.pending.get(what) == since:
                del self.pending[what]

    def expect(self, what: str) -> None:
        """Pending from now on, until :meth:`arrived`: a call that another process has to make."""
        self.pending[what] = time.monotonic()

    def arrived(self, what: str) -> None:
        self.pending.pop(what, None)

    async def _watch_for_stalls(self) -> None:
        limit = self.stall_timeout_s
        while True:
            await asyncio.sleep(min(limit / 4, 5.0))
            now = time.monotonic()
            if any(now - since > limit for since in self.pending.values()):
                # List everything: what has waited longest is often waiting for something that began a moment later.
                pending = ", ".join(f"{what} ({now - since:.0f} s)" for what, since in self.pending.items())
                raise RuntimeError(f"no progress for cluster.stall_timeout_s = {limit:g} s; waiting for: {pending}")

    # --- what the driver reads --------------------------------------------------------------------------------------

    def step(self, version: int, metrics: Mapping[str, float]) -> None:
        """Report metrics of the step that made ``version``; version 0 is the start policy."""
        self.events.append({"step": version, "metrics": metrics})

    def say(self, line: str) -> None:
        """A line for the screen and the log."""
        self.events.append({"say": line})

    def doing(self, what: str) -> None:
        """Report what takes a while now."""
        self.events.append({"doing": what})

    def samples(self, samples: Sequence[Sample]) -> None:
        """Send completions of one step and kind, to be kept."""
        if samples:
            self.events.append({"samples": samples})

    def goes_on_from(self, version: int) -> None:
        """Drop events of later versions: their steps are made again, or never."""
        self.told = [event if _version(event) <= version else {} for event in self.told]  # {} is still counted
        self.events = [event for event in self.events if _version(event) <= version]
        self.events.append({"goes on from": version})

    def drain(self, read: int = 0) -> tuple[list[Event], str | None]:
        """Events since the last call, and the failure, if any.

        ``{"step": version, "metrics": {...}}``, ``{"say": line}``, ``{"doing": what takes a while now}``,
        ``{"samples": [...]}`` or ``{"goes on from": version}``.

        Args:
            read: how many events the driver has read since the run began; these are in its files.
        """
        read = max(read, self.num_read)
        del self.told[: read - self.num_read]
        self.num_read = read
        events, self.events = self.events, []
        self.told += events
        return events, self.failure

    def unread(self, version: int) -> list[Event]:
        """Steps up to ``version`` and their samples, unless they are known to be in the driver's files."""
        return [event for event in [*self.told, *self.events] if 0 <= _version(event) <= version]

    def tell_again(self, events: Sequence[Event]) -> None:
        """Send again what :meth:`unread` gave to a checkpoint."""
        self.events += events


def _version(event: Event) -> int:
    """The version that a step's or samples' event belongs to; -1 for other events."""
    return event["samples"][0].step if "samples" in event else event.get("step", -1)
