"""The loop over plain Python workers: staleness, every prompt once, lost workers, failures reported."""

import asyncio
import dataclasses
import functools
import time

import numpy as np
import pytest

from cola_ray.batch import as_groups
from cola_ray.experience import Answer, Trajectory
from cola_ray.loop.controller import Controller
from cola_ray.loop.problems import Problems
from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.workers import WorkerLostError, WorkerNeverRanError
from cola_ray.replay.service import ReplayShard, Shards
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

STEPS, PROMPTS, GROUP = 6, 4, 2


@dataclasses.dataclass
class Worker:
    """Answers at once, with the version it holds; dies or fails when told to."""

    version: int = 0
    dies_at: set = dataclasses.field(default_factory=set)  # positions
    failure: str = ""
    reward_failure: str = ""
    dead: bool = False
    hangs: bool = False
    tickets: list = dataclasses.field(default_factory=list)  # how many it was handed at a time


class Pool:
    def __init__(self, **first):
        self.workers, self.first, self.served = [], first, []
        self.offers, self.lost_at = [], set()
        self.settings = config()

    def spawn(self):
        self.workers.append(Worker(**self.first) if not self.workers else Worker())
        return self.workers[-1]

    def kill(self, worker):
        worker.dead = True

    async def call(self, worker, method, *args):
        await asyncio.sleep(0)
        if worker.dead:
            raise WorkerLostError("dead")
        if method == "generate_groups":
            return await self.generate(worker, *args)
        if method == "update_weights":
            worker.version = args[0]
            return worker.version
        if method == "receive_weights":
            (offer,) = args
            self.offers.append(offer)
            if offer.version in self.lost_at:
                raise WorkerLostError("killed")
            worker.version = offer.version
            return worker.version
        facts = {"num_train": 10, "num_heldout": 3, "pad_token_id": 0, "num_too_long": 0}
        return facts if method == "facts" else [Answer(1.0)] * len(args[0])

    async def generate(self, worker, tickets):
        version = worker.version
        worker.tickets.append(len(tickets))
        await asyncio.sleep(0.001)
        if worker.hangs:
            await asyncio.sleep(60)
        if worker.failure:
            raise ValueError(worker.failure)
        if worker.dies_at & {ticket.position for ticket in tickets}:
            worker.dead = True
            raise WorkerLostError("killed")
        self.served += [(ticket.position, ticket.problem) for ticket in tickets]
        made = [self.completions(worker, version, ticket) for ticket in tickets]
        groups = as_groups([(ticket.position, of, None) for ticket, of in zip(tickets, made, strict=True)])
        kept = [self.settings.samples.has(group.position, PROMPTS, STEPS) for group in groups]
        read = [tuple(of) if has else () for of, has in zip(made, kept, strict=True)]
        return [dataclasses.replace(group, read=of) for group, of in zip(groups, read, strict=True)]

    def completions(self, worker, version, ticket):
        return [self.trajectory(worker, version, i) for i in range(GROUP)]

    def trajectory(self, worker, version, sibling):
        one = np.ones(1, np.int64)
        failure = worker.reward_failure if sibling == 0 else ""
        return Trajectory(one, one, one, -np.ones(1, np.float32), one * version, float(sibling), False, "", failure)


def config(**changes):
    fixed = {"rl.max_steps": STEPS, "rl.prompts_per_step": PROMPTS, "rl.group_size": GROUP, "rl.eval_every": 0,
             "rollout.num_workers": 2, "cluster.learner_ranks": 1}  # fmt: skip
    return override(preset("tiny"), fixed | changes)


problems = functools.partial(Problems, shards=Shards(0, lambda *_: None, seed=0))


async def train(controller, first=0, until=STEPS):
    """What the learner does. Returns the batches."""
    await controller.begin(first, [])
    batches, version = [], first
    while version < until and (batch := await controller.next_batch(0, version)) is not None:
        batches.append(batch.fetched())
        version += 1
        if controller.config.cluster.weight_transport == "nccl":
            await controller.offer(version, (), "host", 1000 + version)
        await controller.publish(version, [], {"time/learn": 0.0})
    if until == STEPS:
        assert await controller.next_batch(0, version) is None
    return batches


def run(pool, changes=None, act=train, folder=""):
    """Args: folder: of a replay shard, for who asks one."""

    async def whole():
        shard = ReplayShard(1000, 1 << 20, str(folder), 0) if folder else None

        async def ask(_, method, *args):
            return getattr(shard, method)(*args)

        pool.settings = config(**(changes or {}))
        controller = Controller(
            pool.settings, pool, functools.partial(Problems, shards=Shards(int(bool(folder)), ask, seed=0))
        )
        await controller.start(resumed=False)
        return controller, await asyncio.wait_for(act(controller), 20)

    return asyncio.run(whole())


def metrics_of(controller):
    return [event["metrics"] for event in controller.supervisor.events if event.get("step")]


def test_a_learner_that_is_there_first_waits_for_the_engines_and_what_they_start_with():
    async def whole():
        controller = Controller(config(), pool := Pool(), problems)
        learner = asyncio.create_task(train(controller))
        await asyncio.sleep(0.01)
        assert not pool.served
        await controller.start(resumed=False)
        assert len(await asyncio.wait_for(learner, 20)) == STEPS
        told = [event for event in controller.supervisor.events if "say" not in event]
        first = next(i for i, event in enumerate(told) if event.get("step") == 1)
        assert any(event.get("step") == 0 and event["metrics"]["eval/accuracy"] == 1.0 for event in told[:first])
        doing = [event["doing"] for event in told if "doing" in event]
        assert doing[0].startswith("starting 2 engines")
        assert doing[-1] == "saving checkpoint and model"

    asyncio.run(whole())


def test_engines_that_do_not_start_are_the_waiting_learners_error():
    class Broken(Pool):
        async def call(self, worker, method, *args):
            raise ValueError("no memory")

    async def whole():
        controller = Controller(config(), Broken(), problems)
        learner = asyncio.create_task(controller.begin(0, []))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="no memory"):
            await controller.start(resumed=False)
        with pytest.raises(RuntimeError, match="no memory"):
            await asyncio.wait_for(learner, 20)

    asyncio.run(whole())


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_every_prompt_once_and_never_staler_than_allowed(max_staleness):
    pool = Pool()
    controller, batches = run(pool, {"rl.max_staleness": max_staleness})
    assert sorted(position for position, _ in pool.served) == list(range(STEPS * PROMPTS))
    assert [batch.policy_version for batch in batches] == list(range(STEPS))
    events = [event for event in controller.supervisor.events if event.get("step")]
    assert [event["step"] for event in events] == list(range(1, STEPS + 1))
    stalest = [event["metrics"]["staleness/max"] for event in events]
    assert max(stalest) <= max_staleness
    if max_staleness == 1:
        assert max(stalest) == 1, "the allowance is meant to be used"


def test_without_an_actor_batches_come_out_of_replay(tmp_path):
    changes = {"rl.algorithm": "etpo", "rl.actor_free": True, "rl.kl_coef": 0.05}
    controller, batches = run(Pool(), changes, folder=tmp_path)
    events = metrics_of(controller)
    assert [event["replay/rows"] for event in events] == [PROMPTS * GROUP * (step + 1) for step in range(STEPS)]
    assert events[0]["replay/age"] == 0 < events[-1]["replay/age"] < STEPS
    padded = [batch.padded() for batch in batches]
    for batch in padded:
        assert batch.action_mask.sum() == PROMPTS * GROUP, "as many completions as a step makes"
        assert set(batch.rewards[batch.action_mask]) <= {0.0, 1.0}, "the outcome is the last action's reward"
    assert {reward for batch in padded for reward in batch.rewards[batch.action_mask]} == {0.0, 1.0}


def equal_rewards(pool, problems):
    """Groups of these problems have rewards that are all equal."""
    made, wanted = pool.generate, set(problems)

    async def generate(worker, tickets):
        groups = await made(worker, tickets)
        return [
            dataclasses.replace(group, samples=tuple(dataclasses.replace(one, reward=1.0) for one in group.samples))
            if ticket.problem in wanted
            else group
            for ticket, group in zip(tickets, groups, strict=True)
        ]

    pool.generate = generate
    return pool


def wrong_and_long(pool):
    """All answers wrong, but for problem 0's; every second one three times as long."""
    made = pool.completions

    def completions(worker, version, ticket):
        return [
            dataclasses.replace(
                one, reward=one.reward * (ticket.problem == 0),
                **{field: getattr(one, field).repeat(1 + 2 * (sibling % 2))
                   for field in ("token_ids", "actions", "rollout_log_probs", "versions")},
            )
            for sibling, one in enumerate(made(worker, version, ticket))
        ]  # fmt: skip

    pool.completions = completions
    return pool


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_length_alone_teaches_no_prompt(algorithm):
    changes = {"rl.algorithm": algorithm, "rl.overlong_buffer": 4, "rollout.max_new_tokens": 6}
    _, batches = run(wrong_and_long(Pool()), changes)
    taught = [int(row.any()) for batch in batches for row in batch.padded().advantages]
    assert 0 < sum(taught) <= 3 * GROUP, "problem 0 is served twice or three times in 24 draws of 10"


def test_groups_of_wrong_answers_are_refilled_whatever_their_lengths():
    changes = {"rl.overlong_buffer": 4, "rollout.max_new_tokens": 6, "rl.dynamic_sampling": True}
    controller, _ = run(wrong_and_long(Pool()), changes)
    metrics = metrics_of(controller)
    assert all(one["rollout/refilled_groups"] > 0 for one in metrics)
    assert all(one["reward/zero_variance_groups"] >= 0.75 for one in metrics)


def truncated(pool, siblings):
    """Four completions a prompt, of 1 to 4 tokens and rewards 0 to 3, of which these are cut off."""
    made = pool.trajectory

    def trajectory(worker, version, sibling):
        one, length = made(worker, version, sibling), sibling + 1
        fields = ("token_ids", "actions", "rollout_log_probs", "versions")
        longer = {field: getattr(one, field).repeat(length) for field in fields}
        return dataclasses.replace(one, truncated=sibling in siblings, **longer)

    pool.completions = lambda worker, version, ticket: [trajectory(worker, version, i) for i in range(4)]
    return pool


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_what_was_cut_off_is_compared_with_and_not_in_the_loss(algorithm):
    """As in TRL: rewards 0 to 3 make the advantages, and the two in the middle are masked."""
    changes = {"rl.algorithm": algorithm, "rl.mask_truncated_completions": True, "rl.group_size": 4}
    controller, batches = run(truncated(Pool(), {1, 2}), changes)
    rewards = np.arange(4.0)
    every = (rewards - rewards.mean()) / rewards.std(ddof=1) if algorithm == "grpo" else rewards
    for batch in batches:
        padded = batch.padded()
        assert padded.action_mask.sum(1).tolist() == [4] * PROMPTS + [1] * PROMPTS
        found = padded.advantages[:, 0]  # prompts have one token
        np.testing.assert_allclose(found, [every[3]] * PROMPTS + [every[0]] * PROMPTS, rtol=1e-6)
        assert (batch.num_actions_global, batch.num_sequences_global) == (5 * PROMPTS, 2 * PROMPTS)
        assert batch.trains
    assert all(one["rollout/truncated"] == 0.5 for one in metrics_of(controller))
    shown = [sample for event in controller.supervisor.events for sample in event.get("samples", ())]
    known = {sample.sibling: sample.advantages for sample in shown}
    if algorithm == "grpo":
        assert [sibling for sibling, weights in known.items() if weights is None] == [1, 2]


def test_a_step_that_was_cut_off_whole_leaves_the_policy_as_it_is():
    _, batches = run(truncated(Pool(), range(4)), {"rl.mask_truncated_completions": True})
    assert [batch.trains for batch in batches] == [False] * STEPS
    _, batches = run(truncated(Pool(), range(4)))
    assert [batch.trains for batch in batches] == [True] * STEPS


def test_length_costs_where_rewards_differ():
    """Rewards 0 and 1, the right answer three tokens into a buffer of four: 1/4 is left, so 1 - 3/4 against 0."""
    source = Problems(config(**{"rl.overlong_buffer": 4, "rollout.max_new_tokens": 6}), None, None, None)
    wrong, right = (Pool().trajectory(Worker(), 0, sibling) for sibling in (0, 1))
    right = dataclasses.replace(right, token_ids=np.ones(5, np.int64))
    (group,) = as_groups([(0, (wrong, right), None)])
    outcomes = source.outcomes(group)
    assert outcomes.rewards.tolist() == [0.0, 0.25]
    (group,) = as_groups([(0, (right, dataclasses.replace(right, token_ids=np.ones(1, np.int64))), None)])
    alike = source.outcomes(group)
    assert alike.rewards.tolist() == [1.0, 1.0]


def test_prompts_without_signal_are_replaced_by_others():
    pool = equal_rewards(Pool(), range(5))  # half of all problems
    controller, batches = run(pool, {"rl.dynamic_sampling": True, "rl.refill_rounds": 8})
    positions = [position for position, _ in pool.served]
    assert len(positions) == len(set(positions)), "no draw is made twice"
    assert [int(batch.padded().action_mask.any(1).sum()) for batch in batches] == [PROMPTS * GROUP] * STEPS
    metrics = metrics_of(controller)
    assert sum(one["rollout/refilled_groups"] for one in metrics) == len(positions) - STEPS * PROMPTS > 0
    assert 0 < sum(one["reward/zero_variance_groups"] for one in metrics) < STEPS, "of the first draw alone"


def test_a_step_whose_prompts_all_lack_signal_still_ends():
    pool = equal_rewards(Pool(), range(10))
    controller, batches = run(pool, {"rl.dynamic_sampling": True, "rl.refill_rounds": 1})
    assert len(batches) == STEPS
    assert not any(batch.padded().advantages.any() for batch in batches)
    assert {
        event["metrics"]["reward/taught_groups"] for event in controller.supervisor.events if event.get("step")
    } == {0.0}


def test_an_epoch_serves_every_problem_before_any_again():
    pool = Pool()
    run(pool)
    problems = [problem for _, problem in sorted(pool.served)]
    assert sorted(problems[:10]) == sorted(problems[10:20]) == list(range(10))
    assert problems[:10] != problems[10:20]


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_lost_worker_costs_nothing_but_time(max_staleness):
    pool = Pool(dies_at={8, 9, 10, 11})
    controller, batches = run(pool, {"rl.max_staleness": max_staleness})
    assert sorted(position for position, _ in pool.served) == list(range(STEPS * PROMPTS))
    assert len(batches) == STEPS
    assert controller.workers.totals.worker_losses == 1
    assert controller.workers.totals.regenerated_groups > 0
    assert (
        len(
            [event for event in controller.supervisor.events if "was lost and is started again" in event.get("say", "")]
        )
        == 1
    )
    assert len(pool.workers) == 3
    assert all(worker.version == STEPS for worker in pool.workers if not worker.dead), "replacements follow updates"


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_after_a_loss_nothing_is_outstanding_and_both_workers_have_their_share(max_staleness):
    """The survivor takes the lost share over; the tokens of the lost worker are not counted against it."""
    pool = Pool(dies_at={8, 9, 10, 11})
    controller, _ = run(pool, {"rl.max_staleness": max_staleness})
    assert [worker.outstanding_tokens for worker in controller.workers.workers] == [0, 0]
    if not max_staleness:
        survivor, successor = (worker for worker in pool.workers if not worker.dead)
        assert survivor.tickets[-2:] == successor.tickets[-2:] == [PROMPTS // 2] * 2


def test_successors_that_never_ran_are_no_losses():
    class Outdated(Pool):
        """Does not know at once that the first worker's machine is gone."""

        def __init__(self):
            super().__init__(dies_at={8, 9, 10, 11})
            self.sent_there = []

        def spawn(self):
            successor = super().spawn()
            if len(self.workers) > 2 and len(self.sent_there) < 5:  # more than rollout.max_restarts
                self.sent_there.append(id(successor))
            return successor

        async def call(self, worker, method, *args):
            if id(worker) in self.sent_there:
                raise WorkerNeverRanError("its node has died")
            return await super().call(worker, method, *args)

    pool = Outdated()
    controller, batches = run(pool)
    assert len(batches) == STEPS
    assert controller.workers.totals.worker_losses == 1
    assert len(pool.sent_there) == 5


def test_a_worker_that_always_dies_ends_the_run():
    class Doomed(Pool):
        def spawn(self):
            self.workers.append(Worker(dies_at=set(range(100))))
            return self.workers[-1]

    with pytest.raises(RuntimeError, match=r"died 4 times without completing a share"):
        run(Doomed())


def test_a_workers_error_is_told_in_its_own_words():
    with pytest.raises(RuntimeError, match="no KV cache left"):
        run(Pool(failure="no KV cache left"))


def test_what_hangs_is_named():
    with pytest.raises(RuntimeError, match=r"waiting for: groups of step 0 .*worker 0: generate_groups"):
        run(Pool(hangs=True), {"cluster.stall_timeout_s": 2.0})


def test_what_began_after_the_rest_is_named_as_well():
    """What waits longest is over the limit; what it waits for may not be yet."""

    async def nested():
        supervisor, now = Supervisor(4.0), time.monotonic()
        supervisor.pending = {"groups of step 0": now - 61.0, "worker 0: generate_groups": now - 3.0}
        async with supervisor.opening("the run"):
            await supervisor.until(lambda: False)

    with pytest.raises(RuntimeError, match=r"groups of step 0 \(6[12] s\), worker 0: generate_groups \([34] s\)"):
        asyncio.run(nested())


def test_a_learner_that_hangs_between_two_steps_is_named():
    async def hangs(controller):
        await controller.begin(0, [])
        for rank in (0, 1):
            await controller.next_batch(rank, 0)
        await controller.publish(1, [], {})
        while controller.supervisor.failure is None:
            await asyncio.sleep(0.02)
        return controller.supervisor.failure

    _, failure = run(Pool(), {"cluster.stall_timeout_s": 2.0, "cluster.learner_ranks": 2}, hangs)
    assert "waiting for: the learner, which saves or goes on" in failure


def test_failed_rewards_are_left_out_and_counted():
    pool = Pool(reward_failure="returned nan")
    controller, batches = run(pool, {"task.max_failed_rewards": 0.5})
    assert controller.workers.totals.failed_rewards > 0
    trained = sum(int(batch.padded().action_mask.sum()) for batch in batches)
    assert trained == STEPS * PROMPTS * GROUP - controller.workers.totals.failed_rewards


def test_failed_rewards_of_refilled_groups_and_of_baselines_count():
    pool = equal_rewards(Pool(reward_failure="returned nan"), range(10))
    changes = {"rl.dynamic_sampling": True, "rl.refill_rounds": 2, "rollout.num_workers": 1}
    controller, _ = run(pool, changes | {"task.max_failed_rewards": 0.5})
    drawn = len(pool.served)
    assert drawn == 3 * STEPS * PROMPTS, "a draw and two refills each step"
    assert controller.workers.totals.failed_rewards == drawn
    with pytest.raises(RuntimeError, match=r"50% of a step's rewards failed"):
        run(equal_rewards(Pool(reward_failure="nan"), range(10)), changes | {"task.max_failed_rewards": 0.4})
    (group,) = as_groups([(0, (pool.trajectory(Worker(), 0, 1),), pool.trajectory(Worker(), 0, 0))])
    assert len(group.asked) == 2


def test_a_first_draw_without_a_reward_has_no_mean():
    """Its metrics are those that can be counted, without NaN or a warning; the refilled groups are the batch."""
    pool = Pool()
    made = pool.trajectory

    def trajectory(worker, version, sibling):
        one = made(worker, version, sibling)
        return dataclasses.replace(one, failure="raised" if len(pool.served) <= PROMPTS else "")

    pool.trajectory = trajectory
    changes = {"rl.dynamic_sampling": True, "task.max_failed_rewards": 1.0, "rollout.num_workers": 1, "rl.max_steps": 1}
    controller, _ = run(pool, changes)
    (metrics,) = metrics_of(controller)
    assert "reward/mean" not in metrics
    assert metrics["reward/failed"] == PROMPTS * GROUP
    assert metrics["rollout/refilled_groups"] == PROMPTS
    assert all(np.isfinite(value) for value in metrics.values())


def evaluations(rewards, task="arithmetic", num_heldout=3):
    """What is told of the start, with these rewards of held-out problems."""

    class Evaluated(Pool):
        async def call(self, worker, method, *args):
            if method == "evaluate":
                return [Answer(rewards[index]) for index in args[0]]
            found = await super().call(worker, method, *args)
            return found | {"num_heldout": num_heldout} if method == "facts" else found

    async def act(controller):
        return [event for event in controller.supervisor.events if "doing" not in event]

    return run(Evaluated(), {"task.name": task}, act=act)[1]


class Shaped:
    """A task of one's own that does not say what is right."""


class Graded:
    right_from = 0.8


@pytest.mark.filterwarnings("error")
def test_an_evaluation_says_what_it_counts():
    nan = float("nan")
    told = evaluations([1.0, 0.4, 0.0])[0]["metrics"]
    assert told["eval/accuracy"] == told["eval/base_accuracy"] == pytest.approx(1 / 3)
    assert told["eval/reward"] == pytest.approx(1.4 / 3)
    shaped = evaluations([0.9, 0.4, 0.2], f"{__name__}:Shaped")[0]["metrics"]
    assert shaped == {"eval/reward": pytest.approx(0.5), "eval/base_reward": pytest.approx(0.5)}
    graded = evaluations([0.9, 0.4, 0.2], f"{__name__}:Graded")[0]["metrics"]
    assert graded["eval/accuracy"] == pytest.approx(1 / 3)
    events = evaluations([1.0, nan, 0.0])
    assert events[0]["say"].startswith("1 of 3 answers could not be scored")
    assert events[-1]["metrics"]["eval/accuracy"] == pytest.approx(1 / 3)
    assert events[-1]["metrics"]["eval/reward"] == pytest.approx(1 / 2)
    assert evaluations([nan] * 3)[-1]["metrics"] == {"eval/accuracy": 0.0, "eval/base_accuracy": 0.0}


@pytest.mark.filterwarnings("error")
def test_nothing_held_out_is_named_and_no_number():
    said, start = evaluations([], num_heldout=0)
    assert "nothing is evaluated" in said["say"]
    assert start["metrics"] == {}


def test_too_many_failed_rewards_end_the_run():
    with pytest.raises(RuntimeError, match=r"max_failed_rewards = 10%; the first one returned nan"):
        run(Pool(reward_failure="returned nan"))


def test_begin_goes_back_to_a_version():
    """A learner that died at version 3 and comes back with version 2 gets the same prompts again."""
    pool = Pool()

    async def act(controller):
        await train(controller, until=3)
        served = dict(pool.served)
        pool.served.clear()
        await train(controller, first=2)
        assert {position: served.get(position, problem) for position, problem in pool.served} == dict(pool.served)
        assert sorted(dict(pool.served)) == list(range(2 * PROMPTS, STEPS * PROMPTS))

    controller, _ = run(pool, act=act)
    assert {"say": "the learner was started again and goes on from version 2"} in controller.supervisor.events


def test_stop_ends_after_the_step_under_way():
    async def act(controller):
        await controller.begin(0, [])
        assert await controller.next_batch(0, 0) is not None
        assert await controller.stop() == 1
        await controller.publish(1, [], {"time/learn": 0.0})
        assert await controller.next_batch(0, 1) is None

    run(Pool(), act=act)


def test_broadcasts_keep_their_channel_until_a_worker_changes():
    pool = Pool(dies_at={8, 9, 10, 11})
    run(pool, {"cluster.weight_transport": "nccl"})
    assert sorted(position for position, _ in pool.served) == list(range(STEPS * PROMPTS))
    assert all(worker.version == STEPS for worker in pool.workers if not worker.dead)
    ports = {offer.version: offer.channel.port for offer in pool.offers}
    assert ports[1] == ports[2] == 1001, "the first channel"
    assert ports[STEPS] > 1001, "another one after the replacement"
    last = [offer for offer in pool.offers if offer.version == STEPS]
    assert [offer.rank for offer in last] == [1, 2]
    assert {offer.channel.world_size for offer in last} == {3}


def test_a_worker_lost_within_a_broadcast_ends_the_run():
    pool = Pool()
    pool.lost_at = {2}
    with pytest.raises(RuntimeError, match=r"lost while weights were broadcast .*--resume"):
        run(pool, {"cluster.weight_transport": "nccl"})
