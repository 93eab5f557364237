"""``rl.reward_clip_range``: what is learnt from is clipped, and what people see is what the task gave."""

import dataclasses

import numpy as np
import pytest
import test_agents as agents
import test_controller as answers
from test_agents import EPISODES
from test_gigpo import brute_force

from cola_ray.algorithms.advantages import clipped_reward
from cola_ray.algorithms.gigpo import TurnRewards
from cola_ray.batch import as_groups
from cola_ray.loop.problems import Problems

REWARDS = [-7.0, -0.25, 0.5, 9.0]


def test_clipped_by_hand():
    assert [clipped_reward(reward, 0.5) for reward in REWARDS] == [-0.5, -0.25, 0.5, 0.5]
    assert [clipped_reward(reward, None) for reward in REWARDS] == REWARDS
    assert np.isnan(clipped_reward(float("nan"), 1.0)), "not hidden"


# --- answers ----------------------------------------------------------------------------------------------------------


def four_siblings(pool):
    made = pool.trajectory
    pool.completions = lambda worker, version, ticket: [
        dataclasses.replace(made(worker, version, sibling), reward=reward) for sibling, reward in enumerate(REWARDS)
    ]
    return pool


def played(limit, **changes):
    given = {"rl.group_size": 4} | changes | ({} if limit is None else {"rl.reward_clip_range": limit})
    return answers.run(four_siblings(answers.Pool()), given)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize("limit", [None, 0.5, 8.0, 100.0])
def test_advantages_of_answers_are_those_of_clipped_rewards(limit, algorithm):
    controller, batches = played(limit, **{"rl.algorithm": algorithm})
    rewards = np.array(REWARDS) if limit is None else np.array(REWARDS).clip(-limit, limit)
    wanted = {
        "grpo": (rewards - rewards.mean()) / rewards.std(ddof=1),
        "rloo": [rewards[i] - np.delete(rewards, i).mean() for i in range(4)],
        "ppo": rewards,  # for the value head
    }[algorithm]
    for batch in batches:
        padded = batch.padded()
        found = padded.advantages[padded.action_mask]
        np.testing.assert_allclose(np.sort(found), np.sort(np.tile(wanted, answers.PROMPTS)), rtol=1e-6)
        assert np.array_equal(padded.rewards, padded.advantages), "one token each"
    shares = {None: None, 0.5: 0.5, 8.0: 0.25, 100.0: 0.0}
    for metrics in answers.metrics_of(controller):
        assert metrics.get("reward/clipped") == shares[limit]
        assert metrics["reward/mean"] == np.mean(REWARDS)
        assert metrics["reward/std"] == pytest.approx(np.std(REWARDS))
    shown = [sample for event in controller.supervisor.events for sample in event.get("samples", ())]
    seen = [sample.reward for sample in shown if sample.kind == "train"]
    assert seen
    assert seen == REWARDS * (len(seen) // 4)


def test_length_is_charged_after_the_clip_and_a_greedy_baseline_is_clipped_too():
    """Rewards -7 and 9 to -1 and 1; the right answer is three tokens into a buffer of four: 1 - 3/4."""
    changes = {
        "rl.algorithm": "remax",
        "rl.overlong_buffer": 4,
        "rollout.max_new_tokens": 6,
        "rl.reward_clip_range": 1.0,
    }
    source = Problems(answers.config(**changes), None, None, None)
    wrong, right, greedy = (
        dataclasses.replace(answers.Pool().trajectory(answers.Worker(), 0, 1), reward=reward)
        for reward in (-7.0, 9.0, 3.0)
    )
    right = dataclasses.replace(right, token_ids=np.ones(5, np.int64))
    (group,) = as_groups([(0, (wrong, right), greedy)])
    outcomes = source.outcomes(group)
    assert outcomes.rewards.tolist() == [-1.0, 0.25]
    assert outcomes.greedy == 1.0


def test_a_group_that_the_clip_leaves_alike_is_without_signal():
    """5 and 9 are 1 and 1: counted, and replaced where other prompts may be asked."""

    def beyond(pool):
        made = pool.trajectory
        pool.completions = lambda worker, version, ticket: [
            dataclasses.replace(made(worker, version, sibling), reward=reward if ticket.problem < 5 else 0.1 * reward)
            for sibling, reward in enumerate((5.0, 9.0))
        ]
        return pool

    changes = {"rl.dynamic_sampling": True, "rl.refill_rounds": 8}
    controller, _ = answers.run(beyond(answers.Pool()), changes | {"rl.reward_clip_range": 1.0})
    clipped = answers.metrics_of(controller)
    assert 0 < sum(one["reward/zero_variance_groups"] for one in clipped) < answers.STEPS
    assert sum(one["rollout/refilled_groups"] for one in clipped) > 0
    controller, _ = answers.run(beyond(answers.Pool()), changes)
    for one in answers.metrics_of(controller):
        assert (one["reward/zero_variance_groups"], one["rollout/refilled_groups"]) == (0.0, 0.0)


# --- agents -----------------------------------------------------------------------------------------------------------


def scaled(monkeypatch):
    """Games whose turns bring four times as much as they do, and 1, 3 or 5 more."""
    made = agents.Worker.episode

    def episode(self, ticket):
        one = made(self, ticket)
        turns = tuple(
            dataclasses.replace(turn, reward=4.0 * turn.reward + 1.0 + 2.0 * place)
            for place, turn in enumerate(one.turns)
        )
        return dataclasses.replace(one, turns=turns)

    monkeypatch.setattr(agents.Worker, "episode", episode)


def of_step(controller, step):
    """A step's episodes, by position."""
    return {ticket.position: agents.Worker().episode(ticket) for ticket in controller.source.tickets(step)}


def raw_and_clipped(controller, step, limit):
    turns = [[turn.reward for turn in one.turns] for one in of_step(controller, step).values()]
    return turns, [[float(np.clip(reward, -limit, limit)) for reward in some] for some in turns]


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "gigpo"])
def test_every_turn_of_an_agent_is_clipped(tmp_path, monkeypatch, algorithm):
    scaled(monkeypatch)
    limit, changes = 1.5, {"samples.every": 1, "samples.prompts": EPISODES}
    if algorithm != "ppo":
        changes |= {"rl.group_size": 4, "rl.prompts_per_step": 3}
    if algorithm == "gigpo":
        changes["rl.scale_rewards"] = "none"
    controller, batches, *_ = agents.run(tmp_path, algorithm, **changes, **{"rl.reward_clip_range": limit})
    gamma = controller.config.critic.gamma
    metrics = agents.metrics_of(controller)
    shown = [sample for event in controller.supervisor.events for sample in event.get("samples", ())]
    for step, batch in enumerate(batches):
        raw, clipped = raw_and_clipped(controller, step, limit)
        padded, size = batch.padded(), controller.config.rl.group_size
        groups = [clipped[i : i + size] for i in range(0, len(clipped), size)]
        if algorithm == "ppo":  # a reward at each turn's end, of two actions
            found = [row[mask][1::2].tolist() for row, mask in zip(padded.rewards, padded.action_mask, strict=True)]
            wanted = clipped
        elif algorithm == "rloo":
            found = [row[mask][:1].tolist() for row, mask in zip(padded.advantages, padded.action_mask, strict=True)]
            returns = [[sum(one) for one in group] for group in groups]
            wanted = [[one[i] - np.delete(one, i).mean()] for one in returns for i in range(size)]
        else:
            found = [row[mask][::2].tolist() for row, mask in zip(padded.advantages, padded.action_mask, strict=True)]
            states = [[TurnRewards(one, [min(place, 1) for place in range(len(one))]) for one in group]
                      for group in groups]  # fmt: skip
            wanted = brute_force(states, gamma, 1.0, "none")
        for one, other in zip(sorted(found), sorted(map(list, wanted)), strict=True):
            assert one == pytest.approx(other, abs=1e-5)
        of_all = np.concatenate(raw)
        assert metrics[step + 1]["reward/clipped"] == pytest.approx((np.abs(of_all) > limit).mean())
        assert 0 < metrics[step + 1]["reward/clipped"] < 1
        assert metrics[step + 1]["reward/mean"] == pytest.approx(np.mean([sum(one) for one in raw]))
        seen = [sample.reward for sample in shown if sample.step == step + 1 and sample.kind == "train"]
        assert sorted(seen) == pytest.approx(sorted(sum(one) for one in raw)), "whole returns, as they were"


@pytest.mark.parametrize("algorithm", ["archer", "filtered_bc"])
def test_replay_holds_clipped_rewards(tmp_path, monkeypatch, algorithm):
    scaled(monkeypatch)
    controller, batches, shard, *_ = agents.run(tmp_path, algorithm, **{"rl.reward_clip_range": 1.5})
    clipped = [one for step in range(len(batches)) for one in raw_and_clipped(controller, step, 1.5)[1]]
    column = shard.buffer.column
    assert sorted(column("reward")) == pytest.approx(sorted(np.concatenate(clipped)))
    wanted = [sum(one) for one in clipped for _ in one]
    assert sorted(column("total_reward")) == pytest.approx(sorted(wanted))
    assert {abs(reward) for reward in column("reward")} & {1.5}
