"""Staleness as arithmetic: how many groups may exist between hand-out and training.

A slot is charged when a group's prompt is handed out. It is freed when the workers *hold* the weights trained on it,
never earlier: freed at training, the next group would still start on the old weights, one version further behind than
allowed.

    handed out ──> in flight ──> ready ──> taken ──> freed

Example, max_staleness 0 and 2 groups a step: capacity 2. Groups A, B are handed out; C waits. A and B become ready and
are taken; C still waits. The workers report version 1; both slots are free, C and D start on version 1.
"""

import asyncio


class WorkBuffer:
    """Slots of one run. Not thread-safe: lives in one event loop.

    Args:
        groups_per_step: groups that one learner step consumes.
        max_staleness: versions a group may be behind the learner that trains on it.
    """

    def __init__(self, groups_per_step: int, max_staleness: int) -> None:
        self.capacity = (max_staleness + 1) * groups_per_step
        self.in_flight = self.ready = self.taken = 0
        self._freed = asyncio.Condition()

    @property
    def used(self) -> int:
        return self.in_flight + self.ready + self.taken

    async def admit(self, count: int) -> None:
        """Wait until ``count`` slots are free, then charge them."""
        if count > self.capacity:
            raise ValueError(f"{count} groups asked for, capacity is {self.capacity}")
        async with self._freed:
            await self._freed.wait_for(lambda: self.used + count <= self.capacity)
            self.in_flight += count

    def finish(self, count: int) -> None:
        """``count`` groups in flight are complete."""
        self._move("in_flight", "ready", count)

    def take(self, count: int) -> None:
        """The learner was given ``count`` ready groups."""
        self._move("ready", "taken", count)

    async def release(self, count: int) -> None:
        """Every worker holds the weights trained on ``count`` of the groups that were taken."""
        async with self._freed:
            self._move("taken", None, count)
            self._freed.notify_all()

    def _move(self, source: str, target: str | None, count: int) -> None:
        left = getattr(self, source) - count
        if left < 0:
            raise ValueError(f"{count} groups are not {source}: only {left + count} are")
        setattr(self, source, left)
        if target:
            setattr(self, target, getattr(self, target) + count)
