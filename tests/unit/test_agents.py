"""The loop over plain Python agents, with the real replay shards and the real critic."""

import asyncio
import copy
import functools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from cola_ray.experience import Answer, Episode, Trajectory, Turn
from cola_ray.loop.controller import Controller
from cola_ray.loop.episodes import Episodes
from cola_ray.replay.critic_service import CriticReplicas, CriticService, ReplicaLostError
from cola_ray.replay.service import ReplayShard, Shards
from cola_ray.replay.transitions import read_features
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

WIDTH, STEPS, EPISODES = 4, 4, 6


class Worker:
    """A game of one to three turns: saying action 1 is right and pays, anything else costs."""

    def __init__(self):
        self.version, self.spoken = 0, []

    def episode(self, ticket):
        draw = np.random.default_rng(ticket.position)
        turns, ids = [], np.arange(2)
        for _ in range(1 + ticket.problem % 3):
            features = np.full(WIDTH, float(ticket.problem % 3), np.float32)
            said = np.arange(2)
            turns.append(Turn(ids, said, said, -np.ones(2, np.float32), said * 0 + self.version,
                              float(draw.integers(-1, 1)), np.array([7]), features, features + 1))  # fmt: skip
            ids = np.concatenate([ids, said, [7]])
        ended = ticket.position % 2 == 0
        final = None if ended else np.zeros(WIDTH, np.float32)
        failure = "raised ValueError: bad board" if ticket.position in FAILING else ""
        return Episode(ticket.position, tuple(turns), ended, "", final, failure)

    def speak(self, states, draw):
        self.spoken.append(draw)
        one = np.ones(2, np.int64)
        return [
            (Trajectory(np.asarray(ids), one, one, -np.ones(2, np.float32), one * self.version, 0.0, False, ""),
             np.random.default_rng(place).normal(size=WIDTH).astype(np.float32))
            for place, ids in states
        ]  # fmt: skip


FAILING: set[int] = set()


class Pool:
    def __init__(self):
        self.workers, self.judges = [], []

    def spawn(self):
        self.workers.append(Worker())
        return self.workers[-1]

    def kill(self, worker): ...

    async def call(self, worker, method, *args):
        await asyncio.sleep(0)
        if method == "update_weights":
            worker.version = args[0]
            return worker.version
        if method == "play_episodes":
            self.judges += args[1:]
            return [worker.episode(ticket) for ticket in args[0]]
        if method == "speak":
            return worker.speak(*args)
        if method == "evaluate":
            return [Answer(float(-index)) for index in args[0]]
        return {"num_train": 1000, "num_heldout": 1000, "pad_token_id": 0, "feature_width": WIDTH}


def run(tmp_path, algorithm, **changes):
    fixed = {"rl.algorithm": algorithm, "rl.max_steps": STEPS, "rl.prompts_per_step": EPISODES, "rl.group_size": 1,
             "rl.eval_every": 0, "rl.eval_problems": 3, "rollout.num_workers": 2, "cluster.learner_ranks": 1,
             "critic.steps": 5, "critic.batch_size": 8, "critic.fresh_states": 10, "critic.warmup_iterations": 2,
             "critic.actor_states": "replayed", "critic.td_share": 0.0, "critic.chooses": False,
             "rl.updates_per_batch": 1,
             "task.max_failed_rewards": 0.5}  # fmt: skip
    config = override(preset("tiny", agents=True), fixed | changes)
    shard = ReplayShard(1000, 1 << 24, str(tmp_path / "replay"), 0)

    async def ask(_, method, *args):
        return getattr(shard, method)(*args)

    pool, shards = Pool(), Shards(1, ask, seed=0)
    service = CriticService(config.critic, WIDTH, "", shards, str(tmp_path / "critic"), seed=0)
    critic = replicas_over(service)

    async def whole():
        controller = Controller(config, pool, functools.partial(Episodes, shards=shards, critic=critic))
        await controller.start(resumed=False)
        await controller.begin(0, [])
        batches, version = [], 0
        while (batch := await controller.next_batch(0, version)) is not None:
            batches.append(batch)
            version += 1
            if algorithm == "archer_soft":
                await controller.learnt(version, soft_advantages(batch))
            await controller.publish(version, [], {"time/learn": 0.0})
        return controller, batches

    controller, batches = asyncio.run(asyncio.wait_for(whole(), 60))
    return controller, batches, shard, service, pool


def soft_advantages(batch):
    """As a learner of one rank tells them: here a half of each advantage, in the order that the loop gave."""
    return 0.5 * batch.advantages[np.argsort(batch.places)]


def replicas_over(*services):
    async def ask(number, method, *args):
        return await getattr(services[number], method)(*args)

    return CriticReplicas(len(services), ask)


def metrics_of(controller):
    return {event["step"]: event["metrics"] for event in controller.supervisor.events if "step" in event}


def test_archer_fills_replay_fits_the_critic_and_weighs_fresh_utterances(tmp_path):
    controller, batches, shard, critic, pool = run(tmp_path, "archer")
    assert len(batches) == STEPS
    turns = STEPS * sum(1 + i % 3 for i in range(EPISODES))
    assert shard.size()[0] == turns
    assert critic.critic.steps == STEPS * 5
    for batch in batches[:2]:
        assert not batch.trains, "while the critic warms up the actor stays"
    for batch in batches[2:]:
        assert batch.trains
        assert batch.num_rows == 10
        assert batch.padded().advantages.any()
        assert batch.num_actions_global == 20
    assert {draw for worker in pool.workers for draw in worker.spoken} == set(range(STEPS))
    metrics = metrics_of(controller)
    assert metrics[0]["eval/return"] == -1.0, "the mean of 0, -1, -2"
    assert metrics[STEPS]["eval/return"] == -1.0
    assert metrics[3]["replay/rows"] == 3 * turns / STEPS
    assert {"critic/td_error", "critic/advantage_std", "agent/episodes", "time/fresh"} <= metrics[2].keys()
    assert "critic/foresight" not in metrics[1], "nothing was fitted before the first step"
    assert np.isfinite(metrics[2]["critic/foresight"])
    assert -1 <= metrics[2]["critic/foresight_correlation"] <= 1


def test_archer_learns_from_the_turns_just_played(tmp_path):
    _, batches, _, critic, _ = run(tmp_path, "archer", **{"critic.actor_states": "played"})
    assert batches[-1].trains
    last, turns = batches[-1].padded(), 0
    for mask, advantages, discounts in zip(last.action_mask, last.advantages, last.discounts, strict=True):
        acting = np.flatnonzero(mask)
        of_turns = advantages[acting].reshape(-1, 2)  # each utterance has two actions
        assert np.array_equal(of_turns[:, 0], of_turns[:, 1]), "one advantage a turn"
        assert discounts[acting].reshape(-1, 2).tolist() == [[1.0, 0.0]] * len(of_turns), "each turn by itself"
        turns += len(of_turns)
    assert turns == sum(1 + i % 3 for i in range(EPISODES))
    total = np.concatenate([row[mask] for row, mask in zip(last.advantages, last.action_mask, strict=True)])
    assert total.sum() == pytest.approx(0, abs=1e-4), "centred over turns"
    assert critic.critic.steps == STEPS * 5


def test_archer_soft_learns_from_replay_alone_and_tells_the_critic(tmp_path, monkeypatch):
    fitted, real = [], CriticService.fit

    async def fit(self, fresh):
        fitted.append((fresh, copy.deepcopy(self.critic.online) if hasattr(self, "critic") else None))
        return await real(self, fresh)

    monkeypatch.setattr(CriticService, "fit", fit)
    controller, batches, _, critic, pool = run(tmp_path, "archer_soft", **{"rl.kl_coef": 0.1})
    assert not [draw for worker in pool.workers for draw in worker.spoken], "nothing is generated for the critic"
    assert [batch.trains for batch in batches] == [False, False, True, True]
    assert len(fitted) == STEPS
    assert not fitted[0][0]["soft_advantage"].to_numpy().any(), "nothing is told before the first step"
    for step, batch in enumerate(batches):
        assert batch.num_rows == 10, "Q learns while the critic warms up"
        padded, order = batch.padded(), np.argsort(batch.places)
        ends = [np.flatnonzero(mask)[-1] for mask in padded.action_mask]
        assert padded.rewards.sum(1) == pytest.approx(padded.rewards[range(10), ends]), "all of it at the last action"
        assert (padded.discounts.sum(1) == padded.action_mask.sum(1) - 1).all(), "utterances by themselves"
        if step + 1 < STEPS:
            rows, heads = fitted[step + 1]  # which the step was made with, and what the critic was then
            assert rows["soft_advantage"].to_numpy() == pytest.approx(0.5 * batch.advantages[order])
            states = rows["state_ids"].to_pylist()
            assert [batch.sequences.prompts[i].tolist() for i in order] == states
            with torch.no_grad():
                states, said = read_features(rows, "state"), read_features(rows, "utterance")
                expected = heads.q_values(states, said).min(0).values - heads.values(states).min(0).values
            assert batch.advantages[order] == pytest.approx(expected.numpy(), abs=1e-5)
    metrics = metrics_of(controller)
    assert metrics[1]["critic/soft_advantage_std"] == 0
    for step in range(1, STEPS):
        mean, std = (metrics[step][f"critic/advantage_{of}"] for of in ("mean", "std"))
        told = [metrics[step + 1][f"critic/soft_advantage_{of}"] for of in ("mean", "std")]
        assert told == pytest.approx([0.5 * mean, 0.5 * std], abs=1e-6)
    assert 0 <= metrics[STEPS]["replay/age"] <= STEPS - 1
    assert critic.critic.steps == STEPS * 5
    assert not controller.source.asked, "all that was asked has been answered"


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_what_followed_takes_its_share_of_an_advantage_and_episodes_serve_again(tmp_path, share):
    changes = {"critic.actor_states": "played", "critic.td_share": share, "critic.reuse": 2}
    controller, batches, _, service, _ = run(tmp_path, "archer", **changes)
    heads, gamma = service.critic.online, service.critic.gamma
    by_hand = []
    for ticket in controller.source.tickets(STEPS - 2) + controller.source.tickets(STEPS - 1):
        episode = Worker().episode(ticket)
        states = [np.append(turn.state_features, number) for number, turn in enumerate(episode.turns)]
        ends = np.append(np.zeros(WIDTH), len(states))
        for number, turn in enumerate(episode.turns):
            last = number + 1 == len(states)
            with torch.no_grad():
                # Each state begins with what is said in it.
                said = torch.tensor(np.append(turn.utterance_features, True))[None].float()
                now = torch.tensor(states[number])[None].float()
                then = torch.tensor(ends if last else states[number + 1])[None].float()
                v, after = heads.values(now), heads.values(then).mean() * (not (last and episode.terminated))
                expected = heads.q_values(now, said).min() - v.min()
            drawn = turn.reward + gamma * after - v.mean()
            by_hand.append(float((1 - share) * expected + share * drawn))
    last = batches[-1].padded()
    rows = zip(last.advantages, last.action_mask, strict=True)
    learnt = np.concatenate([row[mask][::2] for row, mask in rows])  # two actions a turn
    assert sorted(learnt) == pytest.approx(sorted(np.array(by_hand) - np.mean(by_hand)), abs=1e-4)


@pytest.mark.parametrize(("algorithm", "fix"), [("archer", "lower critic.lr"), ("archer_soft", "raise rl.kl_coef")])
def test_values_beyond_any_return_are_told_once(tmp_path, monkeypatch, algorithm, fix):
    pay(monkeypatch, lambda turns: -2.0)
    fit, values = CriticReplicas.fit, iter([-7.9, 8.1, 90.0, 900.0, 1e4, 1e5])

    async def fitted(self, fresh):
        return await fit(self, fresh) | {"critic/v": next(values)}

    monkeypatch.setattr(CriticReplicas, "fit", fitted)
    controller, *_ = run(tmp_path, algorithm, **{"critic.gamma": 0.75, "rl.kl_coef": 0.5})
    told = [event["say"] for event in controller.supervisor.events if "critic/v" in event.get("say", "")]
    impossible = "critic/v = 8.1: no return of rewards up to 2 is beyond 8, so the critic diverges"
    assert told == [f"{impossible}; stop the run, and {fix}"]


def test_archer_learns_from_what_its_critic_chose(tmp_path):
    changes = {"critic.actor_states": "played", "critic.chooses": True}
    _, batches, _, _, pool = run(tmp_path, "archer", **changes)
    assert len(pool.judges) == 2 * (STEPS - 1), "both workers, in every iteration but the first"
    assert batches[-1].trains
    last = batches[-1].padded()
    learnt = np.concatenate([row[mask] for row, mask in zip(last.advantages, last.action_mask, strict=True)])
    assert abs(learnt.mean()) > 0.1 * learnt.std(), "what was chosen may be better than the policy's mean"


def test_chai_leaves_the_policy_and_hands_the_critic_to_the_players(tmp_path):
    _, batches, _, critic, pool = run(tmp_path, "chai")
    assert not any(batch.trains for batch in batches)
    assert len(pool.judges) == 2 * (STEPS - 1), "both workers, in every iteration but the first"
    assert pool.judges[0].keys() == critic.critic.target.state_dict().keys()


def test_filtered_bc_clones_the_best_episodes_and_nothing_else(tmp_path):
    _, batches, shard, *_ = run(tmp_path, "filtered_bc", **{"replay.kept_share": 0.25})
    totals = shard.episode_returns()
    assert len(totals) == STEPS * EPISODES
    table, _ = shard.buffer.take(np.arange(shard.size()[0]))
    final_cutoff = np.quantile(totals, 0.75)
    best = {
        tuple(row["state_ids"] + row["utterance_ids"])
        for row in table.to_pylist()
        if row["total_reward"] >= final_cutoff
    }
    last = batches[-1].padded()
    rows = [tuple(ids[: int(mask.sum())]) for ids, mask in zip(last.input_ids, last.attention_mask, strict=True)]
    assert set(rows) <= best
    assert (last.advantages[last.action_mask] == 1).all()


def test_grpo_compares_episodes_of_one_seed(tmp_path):
    _, batches, shard, *_ = run(tmp_path, "grpo", **{"rl.group_size": 3, "rl.prompts_per_step": 2})
    assert shard.size()[0] == 0, "on-policy: nothing is kept"
    assert [batch.num_rows for batch in batches] == [6] * STEPS
    for batch in batches:
        # Summed over a group, an advantage is zero; every action of an episode has the same one.
        firsts = [row[mask][0] for row, mask in zip(batch.padded().advantages, batch.padded().action_mask, strict=True)]
        assert sum(firsts) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("algorithm", "gamma"), [("grpo", 1.0), ("rloo", 1.0), ("reinforce", 1.0), ("ppo", 0.8)])
def test_what_compares_whole_returns_charges_divergences_as_far_away_as_near(tmp_path, algorithm, gamma):
    grouped = {"rl.group_size": 3, "rl.prompts_per_step": 2} if gamma == 1.0 else {"critic.gamma": gamma}
    _, batches, *_ = run(tmp_path, algorithm, **grouped)
    for batch in batches:
        padded = batch.padded()
        assert {*padded.discounts[padded.action_mask].tolist()} <= {0.0, 1.0, float(np.float32(gamma))}
        assert gamma in padded.discounts[padded.action_mask].round(6)


def pay(monkeypatch, of_turn):
    """Every turn pays what ``of_turn`` says of its episode's number of turns."""
    made = Worker.episode

    def episode(worker, ticket):
        one = made(worker, ticket)
        return replace(one, turns=tuple(replace(turn, reward=of_turn(len(one.turns))) for turn in one.turns))

    monkeypatch.setattr(Worker, "episode", episode)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "reinforce", "filtered_bc"])
def test_where_all_episodes_return_the_same_nothing_is_learnt(tmp_path, monkeypatch, algorithm):
    """0.3 at once, in halves or in thirds, whose sums differ in the last bit."""
    pay(monkeypatch, lambda turns: 0.3 / turns)
    settings = {} if algorithm == "filtered_bc" else {"rl.group_size": 3, "rl.prompts_per_step": 4}
    _, batches, *_ = run(tmp_path, algorithm, **settings)
    for batch in batches:
        if algorithm == "filtered_bc":
            assert not batch.trains, "none is best"
            assert batch.num_rows == 1, "measured on as little as can be"
        else:
            assert batch.trains
            assert not batch.padded().advantages.any()


@pytest.mark.parametrize("states", ["replayed", "played"])
def test_a_critic_that_has_seen_no_reward_has_no_advantages(tmp_path, monkeypatch, states):
    pay(monkeypatch, lambda turns: 0.0)
    controller, batches, _, critic, _ = run(tmp_path, "archer", **{"critic.actor_states": states})
    assert critic.critic.steps == STEPS * 5
    assert batches[-1].trains
    assert not any(batch.padded().advantages.any() for batch in batches)
    last = metrics_of(controller)[STEPS]
    assert last["critic/foresight"] == last["critic/foresight_correlation"] == 0.0


def test_foresight_by_hand():
    """Advantages [1, 3], errors [0, 4]: slope 2, correlation 1; of advantages that differ by rounding, nothing."""

    class Service:
        async def join(self, *_): ...

        async def saved_state(self): ...

        async def address(self):
            return "here", 1

        async def advantages_and_td_errors(self, rows):
            return np.array([self.advantages, [0.0, 4.0]], np.float32)

    def assessed(advantages):
        Service.advantages = advantages
        return asyncio.run(replicas_over(Service()).assess(pa.table({"row": [1, 2]})))

    assert assessed([1.0, 3.0]) == pytest.approx({"critic/foresight": 2.0, "critic/foresight_correlation": 1.0})
    assert assessed([3.0, 1.0])["critic/foresight_correlation"] == pytest.approx(-1.0)
    assert set(assessed([7.0, 7.00001]).values()) == {0.0}


def test_failing_environments_cost_their_own_episodes_until_they_are_too_many(tmp_path):
    FAILING.update({1, 7})
    try:
        controller, batches, shard, *_ = run(tmp_path, "archer")
        assert controller.workers.totals.failed_rewards == 2
        assert len(batches) == STEPS
        assert 1 not in shard.buffer.column("position")
        with pytest.raises(RuntimeError, match=r"17% of a step's episodes failed, .*raised ValueError: bad board"):
            run(tmp_path / "strict", "archer", **{"task.max_failed_rewards": 0.1})
    finally:
        FAILING.clear()


def test_the_critic_goes_on_from_its_file(tmp_path):
    *_, critic, _ = run(tmp_path, "archer")
    again = CriticService(critic.config, WIDTH, "", critic.shards, str(tmp_path / "critic"), seed=5)
    asyncio.run(replicas_over(again)._join())
    states, utterances = torch.randn(7, WIDTH + 1), torch.randn(7, WIDTH + 1)
    assert again.critic.steps == critic.critic.steps
    assert np.array_equal(again.critic.advantages(states, utterances), critic.critic.advantages(states, utterances))


def test_replicas_step_together_and_after_a_loss_from_the_last_save(tmp_path):
    _, _, shard, single, _ = run(tmp_path, "archer")
    services = [
        CriticService(single.config, WIDTH, "", single.shards, str(tmp_path / "replicas"), seed=0) for _ in range(2)
    ]
    lost = []

    async def ask(number, method, *args):
        if method == "fit" and lost:
            lost.pop()
            raise ReplicaLostError("the process is gone")
        return await getattr(services[number], method)(*args)

    replicas, rows = CriticReplicas(2, ask), shard.buffer.take(np.arange(12))[0]

    async def play():
        first = await replicas.fit(rows)
        lost.extend([0, 1])  # neither steps, as if one had died and the other had noticed
        return first, await replicas.fit(rows), await replicas.advantages(rows)

    first, second, advantages = asyncio.run(play())
    assert 0 < first["critic/loss"] < float("inf"), "a mean over both"
    assert (first["critic/steps"], first["critic/restarts"]) == (5, 0)
    assert (second["critic/steps"], second["critic/restarts"]) == (10, 1)
    for one, other in zip(*(service.critic.online.parameters() for service in services), strict=True):
        assert torch.equal(one, other), "averaged gradients, so the same step on both"
    np.testing.assert_allclose(advantages, asyncio.run(services[0].advantages(rows)), rtol=1e-5)


def test_etpo_without_an_actor_replays_whole_episodes(tmp_path):
    """What comes out of replay is what went in: actions at the agent's own positions, rewards at each turn's end."""
    controller, batches, shard, *_ = run(tmp_path, "etpo", **{"rl.actor_free": True, "rl.kl_coef": 0.5})
    assert len(shard.buffer) == EPISODES * STEPS
    for batch in batches:
        padded = batch.padded()
        for mask, rewards, discounts in zip(padded.action_mask, padded.rewards, padded.discounts, strict=True):
            said = np.flatnonzero(mask)
            turn_ends, inside = said[1::2], said[::2]  # two actions a turn
            assert set(rewards[inside]) <= {0.0}
            assert set(rewards[turn_ends]) <= {-1.0, 0.0}
            assert (discounts[inside] == 1.0).all()
            gamma = np.float32(controller.config.critic.gamma)
            assert (discounts[turn_ends[:-1]] == gamma).all()
            assert discounts[turn_ends[-1]] in (0.0, gamma)
    assert [event for event in controller.supervisor.events if "step" in event][-1]["metrics"]["replay/age"] > 0
