"""Groups that are trained on as they finish: every prompt once, none too late, and no waiting for the longest."""

import asyncio
import itertools

import numpy as np
import pytest
from test_controller import PROMPTS, STEPS, Pool, metrics_of, run, train

SETTINGS = {"rl.window": 1, "rl.max_staleness": 2, "rl.update_mode": "continue", "rl.importance_cap": 2.0}


class Uneven(Pool):
    """Some prompts take far longer than others; what was answered is noted with the version that it was asked of."""

    def __init__(self, slow=(), **first):
        super().__init__(**first)
        self.slow, self.asked, self.calls = slow, {}, 0

    async def generate(self, worker, tickets):
        self.calls += 1
        for ticket in tickets:
            self.asked.setdefault(ticket.position, worker.version)
        await asyncio.sleep(max(0.08 if ticket.position in self.slow else 0.001 for ticket in tickets))
        return await super().generate(worker, tickets)


def flat(taken):
    return [*itertools.chain(*taken)]


async def trained(controller, first=0, until=STEPS, state=None):
    """As the learner does; returns the positions of each step."""
    await controller.begin(first, [], state)
    taken = []
    collect = controller.source.collect

    async def noted(step):
        made = await collect(step)
        taken.append([group.position for group in made.groups])
        return made

    controller.source.collect = noted
    for version in range(first, until):
        assert await controller.next_batch(0, version) is not None
        await controller.publish(version + 1, [], {"time/learn": 0.0})
    if until == STEPS:
        assert await controller.next_batch(0, until) is None
    controller.source.collect = collect
    return taken[: until - first]


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_every_prompt_is_trained_on_once_and_none_too_late(window, seed):
    slow = set(np.random.default_rng(seed).choice(STEPS * PROMPTS, 7, replace=False).tolist())
    pool = Uneven(slow)
    changes = SETTINGS | {"rl.window": window, "rl.max_staleness": window + 1}
    controller, taken = run(pool, changes, trained)
    assert sorted(flat(taken)) == list(range(STEPS * PROMPTS))
    assert {len(groups) for groups in taken} == {PROMPTS}
    assert all(groups == sorted(groups) for groups in taken)
    for step, groups in enumerate(taken):
        for position in groups:
            assert step - window <= position // PROMPTS
            assert step - pool.asked[position] <= window + 1, "rl.max_staleness"
    left = [metrics["rollout/window_left"] for metrics in metrics_of(controller)]
    owed = [set(range((step + 1) * PROMPTS)) - set(flat(taken[: step + 1])) for step in range(STEPS)]
    assert left == [len(one) for one in owed]
    assert left[-1] == 0


def test_the_learner_does_not_wait_for_the_longest():
    """The slow prompt of step 1 comes in step 2, and one of step 2 in its place."""
    _, taken = run(Uneven(slow={5}), SETTINGS, trained)
    assert 5 in taken[2]
    assert len(set(taken[1]) & set(range(8, 12))) == 1


def test_what_is_equally_long_is_trained_on_in_whole_steps():
    pool = Uneven()
    _, taken = run(pool, SETTINGS, trained)
    assert taken == [list(range(step * PROMPTS, (step + 1) * PROMPTS)) for step in range(STEPS)]
    assert pool.calls == STEPS * PROMPTS, "a call for each prompt"


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_run_that_goes_on_trains_on_what_was_left_and_on_nothing_twice(at):
    saved = {}

    async def first(controller):
        taken = await trained(controller, until=at)
        saved["state"] = await controller.checkpoint(0, at)
        return taken

    slow = {1, 3, 6, 9, 10, 13, 18}
    _, before = run(Uneven(slow), SETTINGS, first)

    async def again(controller):
        return await trained(controller, at, state=saved["state"])

    _, after = run(Uneven(slow), SETTINGS, again)
    assert sorted(flat([*before, *after])) == list(range(STEPS * PROMPTS))
    assert {len(groups) for groups in after} == {PROMPTS}


def test_a_learner_that_comes_back_has_what_was_in_flight_made_again():
    async def act(controller):
        await train(controller, until=3)
        state = await controller.checkpoint(0, 3)
        before = set(controller.source.window.pending)
        taken = await trained(controller, 3, state=state)
        return before, state["window"], taken

    _, (_, left, taken) = run(Uneven(slow={7, 9, 15}), SETTINGS, act)
    owed = {*range(3 * PROMPTS, STEPS * PROMPTS), *left["owed"]} - set(left["early"])
    assert sorted(flat(taken)) == sorted(owed)


def test_a_lost_worker_costs_no_prompt():
    controller, taken = run(Uneven(slow={2, 5, 11}, dies_at={4, 6}), SETTINGS, trained)
    assert sorted(flat(taken)) == list(range(STEPS * PROMPTS))
    assert controller.workers.totals.worker_losses == 1


def test_a_group_that_fails_ends_the_run():
    with pytest.raises(RuntimeError, match="bad prompt"):
        run(Uneven(failure="bad prompt"), SETTINGS, trained)
