"""Advantages and losses against brute force, hand-worked numbers and finite differences.

Literals marked with a source are facts asserted by that project's tests (all Apache-2.0).
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ray.algorithms import ADVANTAGES, remax
from cola_ray.algorithms.advantages import Outcomes, discounted_sum_to_go, following, overlong_penalty
from cola_ray.algorithms.grpo import group_normalised
from cola_ray.algorithms.policy_loss import (
    adapted_kl_coef,
    clipped_policy_gradient,
    entropy,
    exact_kl,
    kl_estimate,
    truncated_importance_weights,
)
from cola_ray.algorithms.rloo import leave_one_out
from cola_ray.config import OF_OUTCOMES, RLConfig
from cola_ray.learner.rl import policy_objective


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


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.0])
def test_sum_to_go_by_brute_force_skips_observations(decay):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 9, generator=generator) > 0.4
    discounts = torch.where(torch.rand(4, 9, generator=generator) > 0.3, 1.0, decay).double()
    found = discounted_sum_to_go(values, mask, discounts)
    for row in range(4):
        acting = mask[row].nonzero()[:, 0].tolist()
        for order, t in enumerate(acting):
            expected, passed = 0.0, 1.0
            for s in acting[order:]:
                expected += passed * float(values[row, s])
                passed *= float(discounts[row, s])
            assert float(found[row, t]) == pytest.approx(expected, abs=1e-12)
    # what stands at observations must not matter at all
    assert torch.equal(found, discounted_sum_to_go(values.masked_fill(~mask, 999.0), mask, discounts))


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


# --- outcomes ---------------------------------------------------------------------------------------------------------


def step_of(*groups, greedy=float("nan")):
    return [Outcomes(torch.tensor(group, dtype=torch.float64), greedy) for group in groups]


def test_each_algorithms_advantages_by_hand():
    groups = ([1.0, 0.0], [3.0])
    found = {name: [one.tolist() for one in of(step_of(*groups, greedy=1.0))] for name, of in ADVANTAGES.items()}
    assert tuple(found) == OF_OUTCOMES
    assert found["grpo"] == [[pytest.approx(0.5**0.5), pytest.approx(-(0.5**0.5))], [0.0]], "alone there is no signal"
    assert found["rloo"] == [[1.0, -1.0], [0.0]]
    assert found["remax"] == [[0.0, -1.0], [2.0]]
    spread = np.std([1, 0, 3], ddof=1)
    wanted = [[(1 - 4 / 3) / spread, (-4 / 3) / spread], [(3 - 4 / 3) / spread]]
    assert found["reinforce"] == [pytest.approx(one) for one in wanted]
    assert remax.advantages(step_of([5.0]))[0].tolist() == [0.0], "without a greedy reward a prompt teaches nothing"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6), min_size=1, max_size=5), st.floats(-3, 3))
def test_advantages_do_not_change_when_all_rewards_shift(groups, shift):
    """All four compare: what is added to every reward, and to the greedy one, cancels."""
    shifted = [[reward + shift for reward in group] for group in groups]
    for name, of in ADVANTAGES.items():
        if name in ("grpo", "reinforce") and min(np.ptp(group) for group in groups) < 1e-2:
            continue  # divided by a spread that is rounding alone
        before, after = of(step_of(*groups, greedy=0.5)), of(step_of(*shifted, greedy=0.5 + shift))
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["rloo", "remax"])
def test_baselines_leave_the_expected_gradient_as_it_is(name):
    """Over all pairs of draws from a softmax over three outcomes: E[A grad log pi] = grad E[r]."""
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    (wanted,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    probs, scores = logits.softmax(0).detach(), torch.eye(3, dtype=torch.float64) - logits.softmax(0).detach()
    found = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        (advantages,) = ADVANTAGES[name](step_of(rewards[list(pair)].tolist(), greedy=float(rewards[0])))
        weight = probs[list(pair)].prod()
        found += weight * sum(a * scores[i] for a, i in zip(advantages, pair, strict=True)) / 2
    torch.testing.assert_close(found, wanted)


def test_overlong_completions_pay_in_proportion():
    paid = [overlong_penalty(length, 100, 20) for length in (0, 80, 90, 100, 130)]
    assert paid == [0, 0, 0.5, 1, 1]
    assert overlong_penalty(100, 100, 0) == 0


# --- KL ---------------------------------------------------------------------------------------------------------------


def two_steps(estimator, kl_in, kl_coef):
    """Every (action, action) of a policy of two steps and three actions, with the gradient that the loss gives each.

    The second state depends on the first action. Returns the draws' probabilities, their gradients, and the gradient
    of the exact objective, ``-kl_coef E[KL(s_0) + KL(s_1)]``, all with respect to the table of logits (4, 3).
    """
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(4, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    policy = table.log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum(-1)
    objective = -kl_coef * (divergence[0] + (policy[0].exp() * divergence[1:]).sum())
    (wanted,) = torch.autograd.grad(objective, table, retain_graph=True)
    chances, gradients = [], []
    mask = torch.ones(1, 2, dtype=torch.bool)
    rl = RLConfig(kl_in=kl_in, kl_estimator=estimator, importance_cap=0.0)
    for first, second in itertools.product(range(3), repeat=2):
        rows, actions = [0, 1 + first], torch.tensor([[first, second]])
        batch = {
            "actions": actions, "action_mask": mask, "advantages": torch.zeros(1, 2, dtype=torch.float64),
            "reference_logits": reference[rows],
            "discounts": torch.ones(1, 1), "rollout_log_probs": torch.zeros(1, 2), "scored_mask": mask,
        }  # fmt: skip
        loss, _ = policy_objective(table[rows], batch, None, rl=rl, kl_coef=kl_coef, temperature=1.0, top_k=0)
        gradients.append(-torch.autograd.grad(loss, table)[0])
        chances.append(float((policy[0, first] + policy[1 + first, second]).exp().detach()))
    return torch.tensor(chances, dtype=torch.float64), torch.stack(gradients), wanted


@pytest.mark.parametrize("estimator", ["exact", "k1"])
def test_kl_in_the_reward_has_the_objectives_gradient(estimator):
    """The whole of it: that of each state, and that of choosing which state comes next."""
    chances, gradients, wanted = two_steps(estimator, "reward", 0.7)
    torch.testing.assert_close((chances[:, None, None] * gradients).sum(0), wanted, atol=1e-6, rtol=1e-5)


def test_the_exact_divergence_has_less_variance_than_an_estimate():
    def variance(estimator):
        chances, gradients, wanted = two_steps(estimator, "reward", 0.7)
        return float((chances[:, None, None] * (gradients - wanted).square()).sum())

    assert variance("exact") < 0.5 * variance("k1")


@pytest.mark.parametrize("estimator", ["exact", "k2"])
def test_kl_in_the_loss_has_each_states_own_gradient(estimator):
    """Without what the first action does to the second state. Of the estimates only k2's is unbiased for it."""
    chances, gradients, _ = two_steps(estimator, "loss", 0.7)
    _, exact, _ = two_steps("exact", "loss", 0.7)
    mean = (chances[:, None, None] * gradients).sum(0)
    torch.testing.assert_close(mean, (chances[:, None, None] * exact).sum(0), atol=1e-6, rtol=1e-5)
    for biased in ("k1", "k3"):
        _, other, _ = two_steps(biased, "loss", 0.7)
        assert ((chances[:, None, None] * other).sum(0) - mean).abs().max() > 1e-3


def test_truncated_actions_give_no_nan_gradients():
    logits = torch.randn(1, 4, dtype=torch.float64).requires_grad_()
    kept = logits.masked_fill(torch.tensor([[False, False, True, True]]), -torch.inf).log_softmax(-1)
    for of in (entropy(kept), exact_kl(kept, torch.zeros(1, 4, dtype=torch.float64).log_softmax(-1))):
        (gradient,) = torch.autograd.grad(of.sum(), logits, retain_graph=True)
        assert torch.isfinite(gradient).all()
        assert gradient[0, 2:].abs().max() == 0


def test_following_skips_observations():
    values, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[True, False, True, True]])
    assert following(values, mask, torch.zeros(1)).tolist() == [[3.0, 0.0, 4.0, 0.0]]
    assert following(values, mask, torch.tensor([9.0])).tolist() == [[3.0, 0.0, 4.0, 9.0]]


def test_the_coefficient_follows_the_divergence():
    # Ziegler et al. 2019: by at most 2 % a step, in proportion near the target
    assert adapted_kl_coef(0.5, 0.3, 0.1) == pytest.approx(0.51)
    assert adapted_kl_coef(0.5, 0.0, 0.1) == pytest.approx(0.49)
    assert adapted_kl_coef(0.5, 0.101, 0.1) == pytest.approx(0.5 * 1.001)


def test_the_entropy_bonus_spreads_the_policy():
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    batch = {"actions": torch.zeros(1, 1, dtype=torch.long), "action_mask": mask, "advantages": zero,
             "scored_mask": mask, "discounts": torch.ones(1, 1),
             "rollout_log_probs": zero, "reference_logits": torch.zeros(1, 3)}  # fmt: skip

    def loss(x):
        return policy_objective(
            x, batch, None, rl=RLConfig(entropy_coef=0.3), kl_coef=0.0, temperature=1.0, top_k=0
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(lambda x: -0.3 * entropy(x.log_softmax(-1)).sum(), (logits,))
    (found,) = torch.autograd.grad(loss(logits), logits)
    (wanted,) = torch.autograd.grad(-0.3 * entropy(logits.log_softmax(-1)).sum(), logits)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def noisy_choice(control):
    """One choice of three actions with values 1, 4, -2 and a fair coin's noise: each draw's gradient and its chance."""
    logits = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    values, mask = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    probs = logits.softmax(-1)[0]
    (wanted,) = torch.autograd.grad((probs * values).sum(), logits)
    chances, gradients = [], []
    for action, noise in itertools.product(range(3), (-1.0, 1.0)):
        batch = {
            "actions": torch.tensor([[action]]), "action_mask": mask,
            "discounts": torch.ones(1, 1), "rollout_log_probs": torch.zeros(1, 1),
            "advantages": (values[action] + noise).reshape(1, 1), "reference_logits": torch.zeros(1, 3),
            "scored_mask": mask,
        } | ({} if control is None else {"control": control[None]})  # fmt: skip
        rl = RLConfig(importance_cap=0.0)
        loss, _ = policy_objective(logits, batch, None, rl=rl, kl_coef=0.0, temperature=1.0, top_k=0)
        gradients.append(-torch.autograd.grad(loss, logits)[0])
        chances.append(0.5 * float(logits.softmax(-1)[0, action].detach()))
    chances, gradients = torch.tensor(chances, dtype=torch.float64)[:, None, None], torch.stack(gradients)
    mean = (chances * gradients).sum(0)
    return mean, float((chances * (gradients - mean).square()).sum()), wanted


def test_a_control_over_all_actions_keeps_the_gradient_and_takes_variance_out():
    probs = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64).softmax(0)
    values = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    mean, plain, wanted = noisy_choice(None)
    torch.testing.assert_close(mean, wanted, atol=1e-6, rtol=1e-5)
    right, wrong = values - probs @ values, torch.tensor([5.0, -3.0, 1.0], dtype=torch.float64)
    for control in (right, wrong):
        mean, _, _ = noisy_choice(control)
        torch.testing.assert_close(mean, wanted, atol=1e-6, rtol=1e-5)
    _, controlled, _ = noisy_choice(right)
    assert controlled < 0.5 * plain


def aliased_choice(marginal):
    """One choice of four actions that say two tokens, worth 2 and -1: each action's gradient and its chance."""
    logits = torch.tensor([[0.3, -0.2, 0.1, 0.4]], dtype=torch.float64, requires_grad=True)
    token_of, worth = torch.tensor([0, 0, 1, 1]), torch.tensor([2.0, -1.0], dtype=torch.float64)
    probs, mask = logits.softmax(-1)[0], torch.ones(1, 1, dtype=torch.bool)
    (wanted,) = torch.autograd.grad((probs * worth[token_of]).sum(), logits, retain_graph=True)
    gradients = []
    for action, token in enumerate(token_of):
        batch = {
            "actions": torch.tensor([[action]]), "action_mask": mask, "scored_mask": mask,
            "advantages": worth[token].reshape(1, 1), "reference_logits": None,
            "discounts": torch.ones(1, 1), "rollout_log_probs": torch.zeros(1, 1),
        } | ({"aliases": (token_of == token)[None]} if marginal else {})  # fmt: skip
        rl = RLConfig(importance_cap=0.0)
        loss, _ = policy_objective(logits, batch, None, rl=rl, kl_coef=0.0, temperature=1.0, top_k=0)
        gradients.append(-torch.autograd.grad(loss, logits)[0])
    chances, gradients = probs.detach()[:, None, None], torch.stack(gradients)
    mean = (chances * gradients).sum(0)
    return mean, float((chances * (gradients - mean).square()).sum()), wanted


def test_marginalising_aliases_keeps_the_gradient_and_takes_variance_out():
    mean, plain, wanted = aliased_choice(marginal=False)
    torch.testing.assert_close(mean, wanted)
    mean, marginal, _ = aliased_choice(marginal=True)
    torch.testing.assert_close(mean, wanted)
    assert marginal < 0.5 * plain


# --- the whole objective ----------------------------------------------------------------------------------------------

OBJECTIVES = {
    "clipped": {"kl_estimator": "exact", "kl_in": "reward"},
    "estimated": {"kl_estimator": "k3", "kl_in": "loss"},
    "entropy": {"kl_estimator": "exact", "kl_in": "loss", "entropy_coef": 0.1},
    "etpo": {"algorithm": "etpo"},
    "controlled": {"kl_estimator": "k1", "kl_in": "reward", "control_variate": True},
    "marginal": {"marginal_aliases": True},
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("top_k", [0, 3])
def test_the_objectives_gradient_is_that_of_its_values(name, top_k):
    """Against finite differences, on the second update of a batch: what the first one found is given."""
    draw = torch.Generator().manual_seed(3)
    rl = RLConfig(**OBJECTIVES[name])
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    count, shape = int(mask.sum()), mask.shape

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    logits = random(count, 5).requires_grad_()
    actions = torch.zeros(shape, dtype=torch.long)
    actions[mask] = logits.detach().topk(3).indices[torch.arange(count), torch.randint(3, (count,), generator=draw)]
    batch = {
        "actions": actions, "action_mask": mask, "scored_mask": mask, "advantages": random(*shape),
        "discounts": torch.ones(1, 1), "rollout_log_probs": random(*shape) - 2.0, "reference_logits": random(count, 5),
        "kl_penalties": random(*shape) * mask,
    }  # fmt: skip
    if rl.control_variate:
        batch["control"] = random(count, 5)
    if rl.marginal_aliases:
        batch |= {"aliases": random(count, 5) > 0, "old_marginals": (random(*shape) - 1.0) * mask}
    old = (random(*shape) - 1.5) * mask  # ratios on both sides of the clips
    q = random(count, 5) if rl.algorithm == "etpo" else None

    def loss(x):
        return policy_objective(x, batch, old, rl=rl, kl_coef=0.3, temperature=0.7, top_k=top_k, q=q)[0]

    assert torch.autograd.gradcheck(loss, (logits,))


def test_without_a_reference_nothing_is_charged_or_measured():
    mask = torch.ones(1, 2, dtype=torch.bool)
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = {
        "actions": torch.tensor([[1, 2]]), "action_mask": mask, "scored_mask": mask, "advantages": torch.ones(1, 2),
        "discounts": torch.ones(1, 1), "rollout_log_probs": torch.zeros(1, 2), "reference_logits": None,
    }  # fmt: skip
    rl = RLConfig(importance_cap=0.0)
    loss, metrics = policy_objective(logits, batch, None, rl=rl, kl_coef=0.0, temperature=1.0, top_k=0)
    (found,) = torch.autograd.grad(loss, logits)
    wanted = logits.softmax(-1).detach() - torch.nn.functional.one_hot(torch.tensor([1, 2]), 4)
    torch.testing.assert_close(found, wanted)
    assert "policy/kl" not in metrics
