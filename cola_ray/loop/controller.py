"""The distributed loop: generate, score, compute advantages, train, publish.

             slot()             collect()                 to_batches()                     put()
step v ─────────────> tickets ───────────> scored rollouts ────────────> one batch per rank ──> BatchQueue
   ^   at most max_staleness            by the workers       advantages, collation                  │ next_batch(v)
   │   + 1 steps at once                                                                            v
   └── free step v's slot <── report, evaluate when due <── workers hold v+1 <── publish(v+1): the learner's step
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cola_ray.batch import Batch
from cola_ray.loop.batch_queue import BatchQueue
from cola_ray.loop.batches import Source
from cola_ray.loop.checkpoints import Checkpoints
from cola_ray.loop.supervisor import Event, Supervisor
from cola_ray.loop.weight_sync import WeightSync
from cola_ray.loop.workers import WorkerGroup, WorkerPool
from cola_ray.settings.config import Config
from cola_ray.weights import Bucket, Channel, Manifest


class Controller:
    """A run's loop, in plain asyncio; a failure anywhere is raised in the learner's next call.

    Args:
        make_source: (config, workers, supervisor) -> the source of batches, see problems.py and episodes.py.
    """

    def __init__(self, config: Config, pool: WorkerPool, make_source: Callable[..., Source]) -> None:
        self.config, self.supervisor = config, Supervisor(config.cluster.stall_timeout_s)
        self.workers = WorkerGroup(config.rollout, pool, self.supervisor)
        self.source = make_source(config, self.workers, self.supervisor)
        self.weights = WeightSync(config, self.workers, self.supervisor)
        self.batches = BatchQueue(config.rl.max_steps, self.supervisor)
        self.checkpoints = Checkpoints(config, self.source, self.workers, self.supervisor)
        self.producer: asyncio.Task | None = None

    async def start(self, resumed: bool) -> dict[str, Any]:
        """Wait for the workers; unless resumed, evaluate the start policy. Returns facts about the task."""
        async with self.supervisor.opening(f"starting {self.workers}, and the learner's ranks"):
            await self.workers.start()
            self.source.check()
            if not resumed:
                await self.source.held_out.before_training()
            self.supervisor.doing("starting the learner's ranks")
        return self.workers.facts

    async def drain(self, read: int) -> tuple[list[Event], str | None]:
        return self.supervisor.drain(read)

    async def fail(self, reason: str) -> None:
        await self.supervisor.fail(reason)

    async def stop(self) -> int:
        return await self.batches.stop()

    async def rollout_workers(self) -> list[Any]:
        return [worker.actor for worker in self.workers.workers]

    async def begin(self, version: int, buckets: Sequence[Bucket], state: Mapping[str, Any] | None = None) -> None:
        """Go on from ``version``, which the learner holds: after a first start, a resume, or a learner's restart."""
        await self.supervisor.opened()
        if self.producer is not None:
            self.supervisor.say(f"the learner was started again and goes on from version {version}")
        self.supervisor.doing("the first rollouts")
        await self.supervisor.cancel(self.producer)
        self.supervisor.goes_on_from(version)
        await self.weights.stop()
        self.batches.start(version)
        await self.checkpoints.restore(state)
        await self.weights.start(version, buckets)
        self.producer = self.supervisor.spawn(self._produce(version))

    async def _produce(self, first: int) -> None:
        async with asyncio.TaskGroup() as steps:
            for step in range(first, self.config.rl.max_steps):
                await self.weights.slots.acquire()  # released when all workers hold the version that a step made
                if step >= self.batches.last_version:
                    return
                steps.create_task(self._produce_step(step))

    async def _produce_step(self, step: int) -> None:
        await self.checkpoints.before_step(step)
        rollouts = await self.source.collect(step)
        batches, metrics = await self.source.to_batches(rollouts, step)
        await self.batches.put(step, batches, metrics)

    async def next_batch(self, rank: int, version: int) -> Batch | None:
        """This rank's batch, as references, for training ``version``; None when the run is over."""
        batch = await self.batches.get(rank, version)
        if batch is None:
            await self.weights.settled(version)
            self.batches.over(rank)
        return batch

    async def offer(self, version: int, manifest: Manifest, host: str, port: int) -> Channel:
        self.batches.trained(version - 1)
        return await self.weights.offer(version, manifest, host, port)

    async def learnt(self, version: int, of_sequences: np.ndarray) -> None:
        """Receive what the step that made ``version`` computed for its sequences; comes before its weights."""
        self.source.learnt(version - 1, of_sequences)

    async def publish(self, version: int, buckets: Sequence[Bucket], metrics: dict[str, float]) -> None:
        """Take over new weights and the metrics of the step that made them; returns before workers hold the weights."""
        self.batches.trained(version - 1)
        await self.weights.publish(version, buckets, lambda seconds: self._report(version, metrics, seconds))
        self.batches.published()

    async def _report(self, version: int, metrics: dict[str, float], seconds: dict[str, float]) -> None:
        """Called when all workers hold ``version``; the slot of the step that made it is freed afterwards."""
        metrics = {**self.batches.remove(version - 1), **metrics, **seconds}
        metrics |= await self.source.held_out.when_due(version)
        self.supervisor.step(version, metrics)

    async def checkpoint(self, rank: int, version: int) -> dict[str, Any] | None:
        """What ``version``'s checkpoint holds besides the learner's state, for the first rank; all ranks wait until the
        workers hold ``version``.
        """
        await self.weights.settled(version)
        return None if rank else await self.checkpoints.of_version(version)
