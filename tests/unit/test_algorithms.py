"""Advantages and losses against brute force, hand-worked numbers and finite differences.

Literals marked with a source are facts asserted by that project's tests (all Apache-2.0).
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ray.algorithms.advantages import discounted_sum_to_go, group_normalised, leave_one_out
from cola_ray.algorithms.policy_loss import (
    clipped_policy_gradient,
    entropy,
    exact_kl,
    kl_estimate,
    truncated_importance_weights,
)


def test_group_advantages_by_hand():
    torch.testing.assert_close(group_normalised(torch.tensor([[1.0, 0.0]])), torch.tensor([[0.5, -0.5]]) / 0.5**0.5)
    # SkyRL, test_ppo_utils.py: GRPO without std; RLOO
    rewards = torch.tensor([[6.0, 3.0], [9.0, 12.0]])
    assert group_normalised(rewards, normalise_std=False).tolist() == [[1.5, -1.5], [-1.5, 1.5]]
    assert leave_one_out(rewards).tolist() == [[3.0, -3.0], [-3.0, 3.0]]
    assert group_normalised(torch.ones(2, 4)).abs().max() == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8))
def test_leave_one_out_is_reward_minus_the_others_mean(rewards):
    expected = [r - np.mean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    found = leave_one_out(torch.tensor([rewards], dtype=torch.float64))[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5])
def test_sum_to_go_by_brute_force_skips_observations(decay):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 9, generator=generator) > 0.4
    found = discounted_sum_to_go(values, mask, decay)
    for row in range(4):
        acting = mask[row].nonzero()[:, 0].tolist()
        for order, t in enumerate(acting):
            expected = sum(decay**k * float(values[row, s]) for k, s in enumerate(acting[order:]))
            assert float(found[row, t]) == pytest.approx(expected, abs=1e-12)
    # what stands at observations must not matter at all
    assert torch.equal(found, discounted_sum_to_go(values.masked_fill(~mask, 999.0), mask, decay))


def test_clipped_loss_by_hand():
    # NeMo-RL, test_loss_functions.py: ratios .5, 1, 1.5 with advantages 1, -1, 2 have mean loss -.6333
    ratio, advantages = torch.tensor([[0.5, 1.0, 1.5]]), torch.tensor([[1.0, -1.0, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, clipped = clipped_policy_gradient(ratio.log(), torch.zeros(1, 3), advantages, mask, 0.2, 0.2)
    assert float(loss) / 3 == pytest.approx(-0.6333, abs=1e-4)
    assert int(clipped) == 1
    wider, _ = clipped_policy_gradient(ratio.log(), torch.zeros(1, 3), advantages, mask, 0.2, 0.4)
    assert float(wider) == pytest.approx(-(0.5 - 1.0 + 2.8))


def test_clipped_loss_gradient_and_mask():
    generator = torch.Generator().manual_seed(0)
    log_probs = (0.3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    old, advantages = (
        torch.zeros(3, 5, dtype=torch.float64),
        torch.randn(3, 5, generator=generator, dtype=torch.float64),
    )
    mask = torch.rand(3, 5, generator=generator) > 0.3

    def loss(x):
        return clipped_policy_gradient(x, old, advantages, mask, 0.2, 0.2)[0]

    assert torch.autograd.gradcheck(loss, (log_probs,))
    (gradient,) = torch.autograd.grad(loss(log_probs), log_probs)
    assert gradient[~mask].abs().max() == 0
    # garbage where nothing acted must not reach the loss
    dirty = log_probs.detach().masked_fill(~mask, float("inf"))
    assert torch.isfinite(loss(dirty))


def test_kl_estimators_by_hand():
    # NeMo-RL, test_loss_functions.py
    log_probs, ref = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([0.0, -15.0, -30.0])
    assert kl_estimate(log_probs, ref, "k1").tolist() == [-1.0, 14.0, 29.0]
    assert kl_estimate(log_probs, ref, "k2").tolist() == [0.5, 98.0, 420.5]
    torch.testing.assert_close(kl_estimate(log_probs, ref, "k3"), torch.tensor([0.7183, 13.0, 28.0]), atol=1e-4, rtol=0)


def test_exact_kl_and_entropy_agree_with_float64_sums_and_with_estimators():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(64, generator=generator).double().log_softmax(0) for _ in range(2))
    kl = float(exact_kl(p, q))
    assert kl == pytest.approx(float(np.sum(np.exp(p.numpy()) * (p - q).numpy())))
    assert float(entropy(p)) == pytest.approx(float(-np.sum(np.exp(p.numpy()) * p.numpy())))
    for estimator in ("k1", "k3"):  # both are unbiased: their exact expectation under p is the KL
        assert float((p.exp() * kl_estimate(p, q, estimator)).sum()) == pytest.approx(kl)
    truncated = torch.where(torch.arange(64) < 3, p, torch.tensor(-torch.inf, dtype=torch.float64)).log_softmax(0)
    assert torch.isfinite(exact_kl(truncated, q))
    assert float(entropy(truncated)) < np.log(3)


def test_truncated_importance_weights():
    # SkyRL, test_off_policy_correction.py
    weights = truncated_importance_weights(torch.tensor([0.5, -0.5, 3.0]), torch.zeros(3), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.6487, 0.6065, 2.0]), atol=1e-4, rtol=0)
