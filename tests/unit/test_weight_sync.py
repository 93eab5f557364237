"""Which version the workers hold, and what may be generated ahead because of it."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.weight_sync import WeightSync
from cola_ray.loop.workers import WorkerGroup, WorkerLostError
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset


class Pool:
    """Two workers that hold a version; ``slow`` is waited for before the second one loads."""

    def __init__(self, slow=None, lost_at=()):
        self.held, self.slow, self.lost_at = [], slow, set(lost_at)

    def spawn(self):
        self.held.append(-1)
        return len(self.held) - 1

    def kill(self, actor): ...

    async def call(self, actor, method, version, *_):
        assert method == "update_weights"
        if actor == 1 and self.slow is not None:
            await self.slow.wait()
        if (actor, version) in self.lost_at:
            raise WorkerLostError("killed")
        self.held[actor] = version


def sync_of(pool, max_staleness):
    config = override(preset("tiny"), {"rl.max_staleness": max_staleness, "rollout.num_workers": 2})
    supervisor = Supervisor(60.0)
    return WeightSync(config, WorkerGroup(config.rollout, pool, supervisor), supervisor)


async def nothing(seconds): ...


def test_a_slot_is_freed_when_the_last_worker_holds_what_its_step_made():
    """Not when the learner has trained on it, nor when the first worker holds it, nor before it is reported."""

    async def run():
        gate, reporting = asyncio.Event(), asyncio.Event()
        sync = sync_of(pool := Pool(), max_staleness=0)
        await sync.start(0, [])
        await sync.slots.acquire()
        second = asyncio.create_task(sync.slots.acquire())
        await asyncio.sleep(0.01)
        assert not second.done()
        pool.slow = gate

        async def report(seconds):
            assert pool.held == [1, 1]
            assert 0 <= seconds["time/sync"] <= seconds["time/step"]
            await reporting.wait()

        await sync.publish(1, [], report)
        await asyncio.sleep(0.01)
        assert (pool.held, second.done()) == ([1, 0], False)
        gate.set()
        await asyncio.sleep(0.01)
        assert not second.done()
        reporting.set()
        await asyncio.wait_for(second, 1)

    asyncio.run(run())


def test_the_docstrings_example():
    async def run():
        sync = sync_of(Pool(), max_staleness=1)
        await sync.start(0, [])
        await sync.slots.acquire()
        await sync.slots.acquire()
        third = asyncio.create_task(sync.slots.acquire())
        await asyncio.sleep(0.01)
        assert not third.done()
        await sync.publish(1, [], nothing)
        await asyncio.wait_for(third, 1)
        assert sync.slots.locked(), "steps 1 and 2"

    asyncio.run(run())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(1, 30))
def test_no_step_is_staler_than_allowed(max_staleness, steps):
    """Every step is begun under the workers' version; at training it may be max_staleness behind, never more."""

    async def run():
        sync, begun, worst = sync_of(pool := Pool(), max_staleness), [], 0
        await sync.start(0, [])
        for version in range(steps):
            while not sync.slots.locked():  # begin steps as early as ever possible
                await sync.slots.acquire()
                begun.append(min(pool.held))
            worst = max(worst, version - begun.pop(0))
            await sync.publish(version + 1, [], nothing)
            await sync.settled(version + 1)
        assert worst == min(max_staleness, steps - 1), "the allowance is used, and no more"

    asyncio.run(run())


def test_no_slot_is_freed_twice():
    async def run():
        sync = sync_of(Pool(), max_staleness=0)
        await sync.start(0, [])
        await sync.publish(1, [], nothing)
        with pytest.raises(RuntimeError, match="released too many times"):
            await sync.settled(1)

    asyncio.run(run())


def test_a_replacement_is_ready_when_it_holds_the_version_that_came_meanwhile():
    async def run():
        sync = sync_of(pool := Pool(lost_at={(0, 1)}), max_staleness=1)
        await sync.start(0, [])
        await sync.slots.acquire()
        await sync.slots.acquire()
        loading = asyncio.Event()
        load = pool.call

        async def slowly(actor, method, version, *rest):
            if actor == 2 and version == 1:
                await loading.wait()
            await load(actor, method, version, *rest)

        pool.call = slowly
        await sync.publish(1, [], nothing)
        await sync.publish(2, [], nothing)  # while the replacement loads version 1
        await sync.settled(2)
        assert [worker.is_ready for worker in sync.workers.workers] == [False, True]
        loading.set()
        await asyncio.wait_for(sync.supervisor.until(lambda: sync.workers.workers[0].is_ready), 1)
        assert pool.held[1:] == [2, 2]

    asyncio.run(run())
