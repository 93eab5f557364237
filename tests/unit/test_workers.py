"""A group of workers without a learner: balance, order, losses, and what nobody waits for in vain."""

import asyncio
import random

import pytest

from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.workers import WorkerGroup, WorkerLostError
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset


class Pool:
    """Actors are numbers; ``double`` doubles each item of a share, unless its actor is to die."""

    def __init__(self, dies=(), hangs=()):
        self.actors, self.dies, self.hangs, self.shares = 0, set(dies), set(hangs), []

    def spawn(self):
        self.actors += 1
        return self.actors - 1

    def kill(self, actor): ...

    async def call(self, actor, method, share):
        self.shares.append((actor, list(share)))
        await asyncio.sleep(0.001)
        if actor in self.hangs:
            await asyncio.sleep(60)
        if actor in self.dies:
            raise WorkerLostError("killed")
        return [2 * item for item in share] if method == "double" else []


def group_of(pool, **changes):
    config = override(preset("tiny"), {"rollout.num_workers": 2, **changes})
    return WorkerGroup(config.rollout, pool, Supervisor(60.0))


def test_results_come_in_the_items_order_and_shares_are_even():
    async def run():
        pool = Pool()
        assert await group_of(pool).dispatch(range(5), "double") == [0, 2, 4, 6, 8]
        assert pool.shares == [(0, [0, 2, 4]), (1, [1, 3])]
        assert await group_of(pool).dispatch([], "double") == []

    asyncio.run(run())


def test_work_goes_to_whoever_has_the_least():
    """Three items of one completion are with the first worker: the second gets as many before it gets another."""

    async def run():
        group = group_of(pool := Pool())
        length = group.totals.response_length
        group.workers[0].outstanding_tokens = int(3 * length)
        await group.dispatch(range(5), "double")
        assert pool.shares == [(0, [3]), (1, [0, 1, 2, 4])]
        pool.shares.clear()
        await group.dispatch(range(5), "double", completions=3)
        assert pool.shares == [(0, [1, 3]), (1, [0, 2, 4])]
        assert [worker.outstanding_tokens for worker in group.workers] == [int(3 * length), 0]

    asyncio.run(run())


def test_items_are_dealt_as_one_after_the_other_would_be():
    """To the least loaded of all at each item, the first one of equals; also by 500 workers."""

    async def run():
        draw = random.Random(0)
        group = group_of(Pool(), **{"rollout.num_workers": 500})
        for worker in group.workers:
            worker.outstanding_tokens = draw.randrange(0, 60, 6)
        expected, load = {}, {worker.number: worker.outstanding_tokens for worker in group.workers}
        for item in range(3000):
            number = min(load, key=lambda number: (load[number], number))
            expected.setdefault(number, []).append(item)
            load[number] += 12
        dealt = await group._deal(3000, completions=2)
        assert {worker.number: places for worker, places in dealt} == expected

    asyncio.run(run())


def test_a_lost_share_goes_to_another_and_its_place_is_filled_again():
    async def run():
        group, lost = group_of(pool := Pool(dies={0})), []
        assert await group.dispatch(range(4), "double", on_loss=lost.append) == [0, 2, 4, 6]
        assert lost == [2]
        assert (group.totals.worker_losses, group.totals.regenerated_groups) == (1, 0)
        await group.supervisor.until(lambda: len(group.ready) == 2)
        assert [worker.actor for worker in group.workers] == [2, 1]
        pool.shares.clear()
        await group.dispatch(range(16), "double")
        assert [len(share) for _, share in pool.shares] == [8, 8]
        assert [worker.outstanding_tokens for worker in group.workers] == [0, 0]

    asyncio.run(run())


def test_nobody_waits_for_a_worker_that_will_not_come():
    """The only worker is lost more often than allowed while it loads: whoever waits for it hears of it."""

    async def run():
        group = group_of(Pool(dies={0}), **{"rollout.num_workers": 1, "rollout.max_restarts": 1})

        async def cannot(actor):
            raise WorkerLostError("out of memory")

        group.prepare = cannot
        with pytest.raises(RuntimeError, match=r"worker 0 died 2 times .*out of memory"):
            await asyncio.wait_for(group.dispatch([1], "double"), 5)

    asyncio.run(run())


def test_results_that_do_not_fit_their_items_are_refused():
    with pytest.raises(RuntimeError, match="worker 0: forget gave 0 results for 2 items"):
        asyncio.run(group_of(Pool(), **{"rollout.num_workers": 1}).dispatch([1, 2], "forget"))
