"""Rewards as large as they may be, through everything that is computed from them: finite, and what float64 says."""

import itertools

import numpy as np
import pytest
import torch
from micro_batches import micro_batch

from cola_ray.algorithms import grpo, reinforce, remax, rloo
from cola_ray.algorithms.advantages import Outcomes, typical_value
from cola_ray.algorithms.archer import TwinHeads, q_targets, utterance_advantages
from cola_ray.algorithms.etpo import best_log_probs, soft_targets, soft_values
from cola_ray.algorithms.policy_loss import Clip, clipped_policy_gradient
from cola_ray.algorithms.ppo import generalised_advantages
from cola_ray.batch import collate
from cola_ray.experience import Episode, Turn
from cola_ray.learner.micro_batch import Encoded
from cola_ray.learner.value import ValueLearner
from cola_ray.packing import pack
from cola_ray.replay.critic import Critic, CriticBatch
from cola_ray.rollout.isolation import Reply
from cola_ray.rollout.reward_process import as_reward
from cola_ray.tasks.protocol import LARGEST_REWARD

MOST = LARGEST_REWARD
EXTREMES = [MOST, -MOST, MOST - 0.0625, 1.0, -1.0, 0.0, 5e-324, 1e-6]
TURNS = 1000
EPS = float(np.finfo(np.float32).eps)


def test_extremes_are_rewards():
    assert all(not as_reward(Reply(value)).failure for value in EXTREMES)


def by_hand(name, rewards):
    """In float64, from the papers' formulas; rewards (G,), the last one greedy for ReMax."""
    rewards = np.array(rewards)
    if name == "remax":
        return rewards[:-1] - rewards[-1]
    if name == "rloo":
        return np.array([r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)])
    spread = rewards.std(ddof=1)
    return (rewards - rewards.mean()) / (spread or 1.0)


def of(name, rewards, kind):
    values = torch.tensor(rewards, dtype=kind)
    if name == "remax":
        return remax.advantages([Outcomes(values[:-1], float(rewards[-1]))])[0]
    if name == "reinforce":
        return torch.cat(reinforce.advantages([Outcomes(one[None]) for one in values]))
    return {"grpo": grpo, "rloo": rloo}[name].advantages([Outcomes(values)])[0]


@pytest.mark.parametrize("name", ["grpo", "reinforce", "rloo", "remax"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_advantages_of_extremes_are_those_of_the_formulas(name, kind):
    for rewards in itertools.product(EXTREMES, repeat=3):
        found = of(name, rewards, kind).double().numpy()
        assert np.isfinite(found).all(), rewards
        exact = np.array(rewards, np.float32 if kind is torch.float32 else np.float64).astype(float)
        if exact.max() - exact.min() <= 1e-5 * max(1.0, np.abs(exact).max()):
            continue  # noise, and 0: tests/unit/test_no_signal.py
        wanted = by_hand(name, exact)
        # A single difference that is noise beside the largest is 0 for ReMax, which compares one by one.
        slack = 8 * EPS * np.abs(wanted).max() + (1e-5 * np.abs(exact).max() if name == "remax" else 0.0)
        np.testing.assert_allclose(found, wanted, atol=slack, rtol=0, err_msg=str(rewards))


def whole_episode(values):
    one = np.ones(1, np.int64)
    turns = tuple(
        Turn(np.ones(1 + 2 * i, np.int64), one, one, np.zeros(1, np.float32), one, value, one)
        for i, value in enumerate(values)
    )
    return Episode(0, turns, terminated=True, text="")


@pytest.mark.parametrize("value", [MOST, -MOST])
def test_returns_of_long_episodes_are_kept(value):
    episode = whole_episode([value] * 40)
    assert episode.total_reward == 40 * value
    (trajectory,) = episode.as_trajectories(gamma=0.99)
    (batch,) = collate(pack([trajectory]), [episode.total_reward], 1, 0, 0, 4096)
    assert np.isfinite(batch.padded().rewards).all()
    assert batch.padded().rewards.sum() == pytest.approx(40 * value, rel=40 * EPS)
    assert np.isfinite(batch.padded().advantages).all()


@pytest.mark.parametrize("values", [(MOST,), (-MOST,), (MOST, -MOST), (MOST, 0.0, -1.0)])
@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
def test_gae_over_a_thousand_turns(values, decay):
    """Undiscounted, the largest that returns can become: 10^9."""
    rewards = torch.tensor([[values[t % len(values)] for t in range(TURNS)]])
    everywhere = torch.ones(1, TURNS)
    kinds = (
        generalised_advantages(
            rewards.to(kind), everywhere.to(kind), -rewards.to(kind).cumsum(1), torch.zeros(1, dtype=kind),
            everywhere.bool(), decay,
        )
        for kind in (torch.float32, torch.float64)
    )  # fmt: skip
    found, wanted = (one.double() for one in kinds)
    assert torch.isfinite(found).all()
    # Sums of up to T terms, each of up to T times the largest reward, are rounded T times.
    torch.testing.assert_close(found, wanted, atol=TURNS * EPS * float(wanted.abs().max() + TURNS * MOST), rtol=0)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("rewards", [(MOST, -MOST), (MOST, MOST), (MOST, 0.0), (-MOST, 1e-6)])
def test_value_heads_learn_from_extremes(monkeypatch, rewards, whiten):
    """Whitened advantages, a fit, and the policy's gradient are finite, from a head that began anywhere."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    draw = torch.Generator().manual_seed(0)
    given = {"lr": 1e-2, "grad_clip": 1.0, "decay": 0.95, "whiten": whiten, "steps": 3, "seed": 0}
    learner = ValueLearner(5, torch.device("cpu"), **given)
    mask = torch.ones(4, 200, dtype=torch.bool)
    batch = micro_batch(action_mask=mask, rewards=torch.tensor(rewards).repeat(4, 100), discounts=mask.float())
    encoded = Encoded(batch, torch.randn(4, 200, 5, generator=draw) * 100, batch.rewards)
    for started in (False, True):
        if started:
            learner.start([encoded], 800)
        (found,), returns, sums = learner.advantages([encoded], 800)
        assert all(np.isfinite(float(value)) for value in sums.values())
        advantages = found.values
        assert torch.isfinite(advantages).all()
        if whiten and advantages.any():
            assert float(advantages.double().mean()) == pytest.approx(0.0, abs=1e-3)
            assert float(advantages.double().std(unbiased=False)) == pytest.approx(1.0, abs=1e-3)
        log_probs = torch.zeros(4, 200, requires_grad=True)
        clipped_policy_gradient(log_probs, torch.zeros(4, 200), advantages, mask, Clip(0.2, 0.2))[0].sum().backward()
        assert torch.isfinite(log_probs.grad).all()
        assert torch.isfinite(log_probs.grad.square().sum()), "as a gradient's norm has it"
        learner.fit([encoded], returns, 800)
        assert all(torch.isfinite(parameter).all() for parameter in learner.online.parameters())


@pytest.mark.parametrize("expectile", [0.0, 0.9])
def test_archers_critic_learns_from_extremes(expectile):
    draw = torch.Generator().manual_seed(0)
    heads = TwinHeads(4, 4)
    critic = Critic(heads, gamma=0.999, tau=0.1, lr=1e-2, grad_clip=1.0, expectile=expectile)
    features = [torch.randn(32, 4, generator=draw) * 100 for _ in range(5)]
    rewards = torch.tensor([MOST, -MOST, 1.0, 0.0]).repeat(8)
    batch = CriticBatch(*features[:3], rewards, torch.zeros(32), *features[3:], torch.full((32,), 10.0))
    critic.initialise(torch.full((32,), MOST), torch.zeros(32), features[0], features[1])
    assert float(typical_value(torch.full((2,), MOST), torch.full((2,), 0.999))) == pytest.approx(1e9, rel=1e-3)
    for _ in range(5):
        assert all(np.isfinite(value) for value in critic.step(batch).values())
    for found in (critic.advantages(*features[:2]), *critic.advantages_and_td_errors(batch), critic.td_errors(batch)):
        assert np.isfinite(found).all()


def test_targets_and_soft_values_of_extremes():
    rewards = torch.tensor(EXTREMES)
    after = torch.tensor([[1e9], [-1e9]]).expand(2, len(EXTREMES))
    targets = q_targets(rewards, torch.zeros(len(EXTREMES)), after, 1.0)
    wide = q_targets(rewards.double(), torch.zeros(len(EXTREMES)), after.double(), 1.0)
    torch.testing.assert_close(targets.double(), wide, atol=2 * EPS * 1e9, rtol=0)
    assert torch.isfinite(utterance_advantages(targets, after)).all()
    for beta in (1e-3, 1.0, 100.0):
        q, rho = rewards[None].expand(2, -1) * TURNS, torch.full((2, len(EXTREMES)), 1 / len(EXTREMES)).log()
        assert torch.isfinite(soft_values(q, rho, rho, beta)).all()
        assert not best_log_probs(q, rho, beta).isnan().any()
    everywhere = torch.ones(1, len(EXTREMES))
    goals = soft_targets(rewards[None], everywhere, after[:1], after[0, :1], everywhere.bool())
    assert torch.isfinite(goals).all()
