"""Versions of the weights: which worker holds which, and how many steps may be generated ahead because of it.

Step v is the data that version v trains on, and training on it makes version v + 1. Generating a step needs a slot.
There are ``max_staleness + 1 - window`` slots; ``window`` is subtracted because groups may be trained on that many
steps later. The invariant:

    A slot is freed when *every* worker holds the weights that its step made, never earlier.

Hence, without a window, step v begins when all workers hold ``v - max_staleness`` or later, and no token that version
v trains on was chosen by an older version. If slots were freed at training already, the next step would begin with
weights one version older than that.

Example, max_staleness = 1, two slots:

    in slots   workers hold   learner
    0 1        0              waits for step 0; step 2 waits for a slot
    0 1        0              trained on step 0 and published version 1; step 2 still waits, as no worker holds 1
    1 2        1              trains on step 1. Slot 0 was freed when the last worker held 1, so step 2 is generated
                              by version 1, and will be trained on by version 2: one behind

With max_staleness = 0 this is strictly on-policy: step v + 1 begins when all workers hold v + 1.

    publish(v+1) ──> wait until v is with all workers ──> load into every ready one ──> report ──> free step v's slot
         ^                                                        ^
    offer(v+1): they receive it by broadcast beforehand           └── prepare: a new worker, before it is ready
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.workers import Worker, WorkerGroup, WorkerLostError
from cola_ray.settings.config import Config
from cola_ray.weights import Bucket, Channel, Manifest, Offer

Report = Callable[[dict[str, float]], Awaitable[None]]
"""Awaited when all workers hold a version, before its slot is freed. Gets ``time/sync``, the seconds that loading took,
and ``time/step``, the seconds since the previous version.
"""


class WeightSync:
    """Keeps a run's workers at the learner's version, and rollouts within the staleness bound.

    Args:
        workers: replacements of lost ones are given the current weights from now on.
    """

    def __init__(self, config: Config, workers: WorkerGroup, supervisor: Supervisor) -> None:
        self.config, self.workers, self.supervisor = config, workers, supervisor
        self.current: tuple[int, Sequence[Bucket]] | None = None  # what every ready worker holds, or is loading
        self.slots, self.reported_at = self._all_slots(), 0.0
        self.publishing: asyncio.Task | None = None
        self.receiving: asyncio.Task | None = None  # a broadcast that workers take part in
        self.channel: Channel | None = None
        self.members: list[Any] = []  # the actors in the channel
        workers.prepare = self._catch_up

    def _all_slots(self) -> asyncio.BoundedSemaphore:
        return asyncio.BoundedSemaphore(self.config.rl.max_staleness - self.config.rl.window + 1)

    async def stop(self) -> None:
        """Cancel what is under way; the learner's first rank may now be another process."""
        await self.supervisor.cancel(self.publishing, self.receiving)
        self.publishing = self.receiving = self.channel = None

    async def start(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Load ``version`` into every ready worker before returning, and free all slots."""
        self.slots, self.reported_at = self._all_slots(), time.perf_counter()
        await self._load(version, buckets)

    async def settled(self, version: int) -> None:
        """Wait until all workers hold ``version``, the last one published. Raises if the run has failed."""
        if self.publishing is not None:
            with self.supervisor.waiting_for(f"workers to hold version {version}"):
                await asyncio.gather(self.publishing, return_exceptions=True)
        self.supervisor.raise_failure()

    async def offer(self, version: int, manifest: Manifest, host: str, port: int) -> Channel:
        """Have every ready worker join a broadcast of ``version``; the caller then sends it, and publishes it.

        Args:
            host, port: the caller's address, if a new channel is needed.
        """
        await self.settled(version - 1)
        ready = self.workers.ready
        size = self.config.rollout.tensor_parallel_size
        if self.channel is None or self.members != [worker.actor for worker in ready]:
            self.members = [worker.actor for worker in ready]
            self.channel = Channel(host, port, 1 + size * len(ready))
        offers = [Offer(version, self.channel, 1 + size * index, manifest) for index in range(len(ready))]
        self.receiving = self.supervisor.spawn(self._receive(ready, offers))
        return self.channel

    async def publish(self, version: int, buckets: Sequence[Bucket], report: Report) -> None:
        """Take over new weights; returns once workers hold the previous version, but before they hold this one."""
        await self.settled(version - 1)
        self.publishing = self.supervisor.spawn(self._publish(version, buckets, report))

    async def _publish(self, version: int, buckets: Sequence[Bucket], report: Report) -> None:
        started = time.perf_counter()
        await self._load(version, buckets)
        loaded = time.perf_counter()
        await report({"time/sync": loaded - started, "time/step": loaded - self.reported_at})
        self.reported_at = time.perf_counter()
        self.slots.release()

    async def _load(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Load ``version`` into every ready worker before returning; a replacement loads it before it is ready."""
        self.current = (version, buckets)
        holders: list[Any] = []
        if self.receiving is not None:
            await asyncio.gather(self.receiving)
            self.receiving, holders = None, self.members
        await self.workers.ask_all("update_weights", version, *buckets, without=holders)

    async def _catch_up(self, actor: Any) -> None:
        """Load the current weights into a new worker, and load again if they change meanwhile."""
        given = None
        while given is not self.current:
            given = self.current
            if given is not None:
                await self.workers.pool.call(actor, "update_weights", given[0], *given[1])

    async def _receive(self, workers: Sequence[Worker], offers: Sequence[Offer]) -> None:
        asked = (
            self.workers.ask(worker, "receive_weights", offer)
            for worker, offer in zip(workers, offers, strict=True)
        )  # fmt: skip
        try:
            await asyncio.gather(*asked)
        except WorkerLostError as lost:  # the others wait for it in the broadcast and cannot be interrupted
            raise RuntimeError(
                f"a worker was lost while weights were broadcast ({lost}); --resume goes on from the last checkpoint"
            ) from lost
