"""Advantages and losses against brute force, hand-worked numbers and finite differences.

Literals marked with a source are facts asserted by that project's tests (all Apache-2.0).
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_batches import micro_batch

from cola_ray.algorithms import remax
from cola_ray.algorithms.advantages import Outcomes, centred, overlong_penalty, standardised
from cola_ray.algorithms.gspo import sequence_policy_gradient
from cola_ray.algorithms.policy_loss import (
    Clip,
    adapted_kl_coef,
    clipped_policy_gradient,
    discounted_sum_to_go,
    entropy,
    exact_kl,
    following,
    kl_estimate,
    kl_penalties,
)
from cola_ray.algorithms.rloo import leave_one_out
from cola_ray.checks.refusals import check
from cola_ray.learner.micro_batch import ActionValues, Advantages, Encoded, Frozen, Scored
from cola_ray.learner.objective import policy_objective
from cola_ray.learner.value import ValueLearner
from cola_ray.registry import BUILT_IN, find
from cola_ray.settings.algorithms import OF_OUTCOMES
from cola_ray.settings.config import ConfigError, RLConfig, override
from cola_ray.settings.presets import preset

ADVANTAGES = {name: find("advantage", name) for name in BUILT_IN["advantage"]}


def test_group_advantages_by_hand():
    torch.testing.assert_close(standardised(torch.tensor([[1.0, 0.0]])), torch.tensor([[0.5, -0.5]]) / 0.5**0.5)
    # SkyRL, test_ppo_utils.py: GRPO without std; RLOO
    rewards = torch.tensor([[6.0, 3.0], [9.0, 12.0]])
    assert centred(rewards).tolist() == [[1.5, -1.5], [-1.5, 1.5]]
    assert leave_one_out(rewards).tolist() == [[3.0, -3.0], [-3.0, 3.0]]
    assert standardised(torch.ones(2, 4)).abs().max() == 0


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
    loss, clipped = clipped_policy_gradient(ratio.log(), torch.zeros(1, 3), advantages, mask, Clip(0.2, 0.2))
    assert float(loss.mean()) == pytest.approx(-0.6333, abs=1e-4)
    assert int(clipped.sum()) == 1
    wider, _ = clipped_policy_gradient(ratio.log(), torch.zeros(1, 3), advantages, mask, Clip(0.2, 0.4))
    assert float(wider.sum()) == pytest.approx(-(0.5 - 1.0 + 2.8))


def test_without_an_advantage_an_overflowing_ratio_is_no_nan():
    """exp(100) is infinite in float32."""
    log_probs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old, advantages = torch.tensor([[-100.0, -1.0]]), torch.tensor([[0.0, 1.0]])
    loss, clipped = clipped_policy_gradient(
        log_probs, old, advantages, torch.ones(1, 2, dtype=torch.bool), Clip(0.2, 0.2)
    )
    loss.sum().backward()
    assert (loss.sum().item(), int(clipped.sum())) == (-1.0, 0)
    assert log_probs.grad.tolist() == [[0.0, -1.0]]


@pytest.mark.parametrize("loss", [clipped_policy_gradient, sequence_policy_gradient])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_would_overflow_has_a_finite_gradient(advantage, loss):
    log_probs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old, advantages = torch.tensor([[-200.0, -1.0]]), torch.tensor([[advantage, 0.0]])
    of_each, _ = loss(log_probs, old, advantages, torch.ones(1, 2, dtype=torch.bool), Clip(0.2, 0.2, 3.0))
    of_each.sum().backward()
    assert of_each.isfinite().all()
    assert log_probs.grad.isfinite().all()


def test_clipped_loss_gradient_and_mask():
    generator = torch.Generator().manual_seed(0)
    log_probs = (0.3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    old, advantages = (
        torch.zeros(3, 5, dtype=torch.float64),
        torch.randn(3, 5, generator=generator, dtype=torch.float64),
    )
    mask = torch.rand(3, 5, generator=generator) > 0.3

    def loss(x):
        return clipped_policy_gradient(x, old, advantages, mask, Clip(0.2, 0.2))[0].sum()

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


def loss_of(logits, batch, follows, reference=None, old=None, *, rl, kl_coef=0.0, aliases=None, **rollout):
    """Of a policy that is sampled as it is, unless told otherwise."""
    frozen, rollout = Frozen(None, reference, aliases), {"temperature": 1.0, "top_k": 0} | rollout
    return policy_objective(logits, batch, frozen, follows, old, rl=rl, kl_coef=kl_coef, **rollout)


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
        batch = micro_batch(actions=actions, action_mask=mask, discounts=torch.ones(1, 1))
        follows = Advantages(torch.zeros(1, 2, dtype=torch.float64))
        loss, _ = loss_of(table[rows], batch, follows, reference[rows], rl=rl, kl_coef=kl_coef)
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


# --- the exact objective of a small decision process -----------------------------------------------------------------


DEPTH, CHOICES, DISCOUNTS, TURN_STARTS = 3, 3, (1.0, 0.5, 0.0), (True, False, True)


class Process:
    """Three actions of three, a state for every history; all sequences are enumerated, in float64.

    The objective of a state t deep is ``V(s) = E[r + g_t V(s')] - beta KL(s)``, by recursion.
    """

    def __init__(self, seed, reward_scale=1.0):
        draw = torch.Generator().manual_seed(seed)
        self.states = [history for t in range(DEPTH) for history in itertools.product(range(CHOICES), repeat=t)]
        count = len(self.states)
        self.table = torch.randn(count, CHOICES, generator=draw, dtype=torch.float64).requires_grad_()
        self.reference = torch.randn(count, CHOICES, generator=draw, dtype=torch.float64)
        self.rewards = reward_scale * torch.randn(count, CHOICES, generator=draw, dtype=torch.float64)
        self.sequences = list(itertools.product(range(CHOICES), repeat=DEPTH))
        self.rows = torch.tensor([[self.states.index(one[:t]) for t in range(DEPTH)] for one in self.sequences])
        self.actions = torch.tensor(self.sequences)

    @property
    def chances(self):
        return self.table.log_softmax(-1)[self.rows, self.actions].sum(1).exp().detach()

    def value(self, history, beta):
        policy, reference = self.table.log_softmax(-1), self.reference.log_softmax(-1)
        row, g = self.states.index(history), DISCOUNTS[len(history)]
        value = -beta * (policy[row].exp() * (policy[row] - reference[row])).sum()
        for action in range(CHOICES):
            after = self.value((*history, action), beta) if g else 0.0
            value = value + policy[row, action].exp() * (self.rewards[row, action] + g * after)
        return value

    def wanted(self, beta):
        """The objective's gradient; of a state t deep over the discount until there, which no algorithm multiplies."""
        (gradient,) = torch.autograd.grad(self.value((), beta), self.table)
        passed = torch.tensor([float(np.prod(DISCOUNTS[: len(history)])) for history in self.states])
        return gradient / passed[:, None]

    def batch(self, rows=slice(None)):
        shape = self.rows[rows].shape
        return micro_batch(
            actions=self.actions[rows], action_mask=torch.ones(shape, dtype=torch.bool),
            rewards=self.rewards[self.rows[rows], self.actions[rows]],
            discounts=torch.tensor(DISCOUNTS, dtype=torch.float64).expand(shape),
            rollout_log_probs=torch.zeros(shape, dtype=torch.float64),
            turn_starts=torch.tensor(TURN_STARTS).expand(shape),
        )  # fmt: skip

    def advantages(self):
        """Of all sequences: the discounted rewards to go."""
        batch = self.batch()
        return Advantages(discounted_sum_to_go(batch.rewards, batch.action_mask, batch.discounts))

    def found(self, advantages, kl_in, estimator, beta, **changes):
        """The expectation of what the loss teaches, over all sequences by their probabilities."""
        rl = RLConfig(kl_in=kl_in, kl_estimator=estimator, importance_cap=0.0, **changes)
        total = torch.zeros_like(self.table)
        for index, chance in enumerate(self.chances):
            one, rows = slice(index, index + 1), self.rows[index]
            follows = replace(advantages, values=advantages.values[one])
            loss, _ = loss_of(self.table[rows], self.batch(one), follows, self.reference[rows], rl=rl, kl_coef=beta)
            total -= chance * torch.autograd.grad(loss, self.table)[0]
        return total


def test_charges_by_hand():
    divergences = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    discounts, mask = torch.tensor([[1.0, 0.5, 1.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    nothing = torch.zeros(1, 4)
    charges = kl_penalties(nothing, nothing, divergences, mask, discounts, "exact")
    assert discounted_sum_to_go(charges, mask, discounts).tolist() == [[560.0, 550.0, 1000.0, 0.0]]
    # an environment's answer in between, whose place has a discount and a divergence that nobody asks for
    mask = torch.tensor([[True, False, True, True]])
    charges = kl_penalties(nothing, nothing, divergences, mask, torch.tensor([[0.5, 9.0, 1.0, 0.0]]), "exact")
    assert charges.tolist() == [[50.0, 0.0, 1000.0, 0.0]]


@pytest.mark.parametrize("estimator", ["exact", "k1"])
def test_discounted_kl_in_the_reward_has_the_exact_objectives_gradient(estimator):
    process = Process(seed=0)
    for beta in (0.0, 0.1, 3.0):
        found = process.found(process.advantages(), "reward", estimator, beta)
        torch.testing.assert_close(found, process.wanted(beta), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("gae_level", ["token", "turn"])
@pytest.mark.parametrize("estimator", ["exact", "k1"])
def test_whitened_advantages_scale_the_whole_gradient(estimator, gae_level, monkeypatch):
    """PPO at rewards x 0.1 and beta 0.1, where the divergence is as much as rewards: no direction changes.

    With a lambda of 1, also where an action's advantage is that of its turn: what came before it in the turn does not
    depend on it. All sequences appear in proportion to the policy, so that the batch is the expectation.
    """
    process = Process(seed=0, reward_scale=0.1)
    quarters = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    process.table = quarters.log().expand(len(process.states), CHOICES).clone().requires_grad_()
    times = (process.chances * 64).round().long()
    for name in ("rows", "actions"):
        setattr(process, name, getattr(process, name).repeat_interleave(times, 0))
    batch, beta = process.batch(), 0.1
    policy, reference = (of.detach().log_softmax(-1)[process.rows] for of in (process.table, process.reference))
    taken = (of.gather(-1, process.actions[..., None])[..., 0] for of in (policy, reference))
    charges = kl_penalties(*taken, exact_kl(policy, reference), batch.action_mask, batch.discounts, estimator)
    e = torch.randn(len(process.states), 4, generator=torch.Generator().manual_seed(1))[process.rows]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    learner = ValueLearner(
        4, torch.device("cpu"), lr=1e-3, grad_clip=1.0, decay=1.0, whiten=True, steps=1, seed=0, gae_level=gae_level
    )  # fmt: skip
    encoded = Encoded(batch, e, batch.rewards - beta * charges)
    (advantages,), _, _ = learner.advantages([encoded], batch.action_mask.numel())
    assert float(advantages.values.square().mean()) == pytest.approx(1.0, abs=1e-5)
    monkeypatch.setattr(Process, "chances", torch.full((len(process.rows),), 1 / len(process.rows)).double())
    found = process.found(replace(advantages, hold_kl=True), "reward", estimator, beta)
    wanted = process.wanted(beta)
    # An exact expectation loses any baseline: the head's values, and the mean. Advantages are in float32: 1e-6.
    torch.testing.assert_close(found * advantages.deviation, wanted, atol=1e-6, rtol=1e-4)
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), 0) == pytest.approx(1.0, abs=1e-6)


# --- which estimate belongs where ------------------------------------------------------------------------------------


def divergence_after(kl_in, estimator, steps=12):
    """KL from the reference before and after gradient descent on nothing but the penalty, in expectation."""
    process = Process(seed=2)
    process.rewards.zero_()
    before, after = 0.0, 0.0
    for step in range(steps + 1):
        with torch.no_grad():
            of_states = exact_kl(process.table.log_softmax(-1), process.reference.log_softmax(-1))
            after = float((process.chances[:, None] * of_states[process.rows]).sum())
        before = before if step else after
        process.table.data += process.found(process.advantages(), kl_in, estimator, beta=1.0)
    return before, after


@pytest.mark.parametrize(("kl_in", "estimator"), [*itertools.product(("reward", "loss"), ("exact", "k1", "k2", "k3"))])
def test_the_allowed_estimates_lead_to_the_reference_and_the_others_are_refused(kl_in, estimator):
    before, after = divergence_after(kl_in, estimator)
    changes = {"rl.kl_in": kl_in, "rl.kl_estimator": estimator}
    if (kl_in, estimator) in {("reward", "exact"), ("reward", "k1"), ("loss", "exact"), ("loss", "k2"), ("loss", "k3")}:
        assert after < 0.6 * before
        check(override(preset("tiny"), changes))
    else:
        assert after > 0.99 * before
        with pytest.raises(ConfigError, match=f"rl.kl_estimator = '{estimator}'"):
            check(override(preset("tiny"), changes))


# --- actions outside the truncation ----------------------------------------------------------------------------------


TRUNCATED = {
    "grpo": {},
    "no weight": {"importance_cap": 0.0},
    "k1 in the reward": {"kl_estimator": "k1"},
    "k2 in the loss": {"kl_estimator": "k2", "kl_in": "loss"},
    "k3 in the loss": {"kl_estimator": "k3", "kl_in": "loss"},
    "exact in the loss": {"kl_in": "loss"},
    "entropy": {"entropy_coef": 0.1},
    "etpo": {"algorithm": "etpo"},
    "controlled": {"control_variate": True},
    "marginal": {"marginal_aliases": True},
}


@pytest.mark.parametrize("name", TRUNCATED)
@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.8}])
@pytest.mark.parametrize("left_out", ["now", "then", "both", "from the start"])
def test_an_action_outside_the_truncation_weighs_nothing_and_is_counted(name, left_out, truncation):
    """Two of 5 are kept, and an action that was among them when it was drawn: by an older version, or otherwise."""
    rl, mask = RLConfig(**TRUNCATED[name]), torch.tensor([[True, True, True]])
    values = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]] * 3, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    old = torch.tensor([[-0.4, -0.7, -1.3]], dtype=torch.float64)
    if left_out in ("then", "both"):
        old[0, 1] = -torch.inf
    batch = micro_batch(
        actions=torch.tensor([[0, 1 if left_out == "then" else 4, 1]]), action_mask=mask, discounts=torch.ones(1, 1),
        rollout_log_probs=torch.full((1, 3), -0.5, dtype=torch.float64),
    )  # fmt: skip
    reference, other = (torch.randn(3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    aliases = torch.zeros(3, 5, dtype=torch.bool) if rl.marginal_aliases else None
    marginals = old.nan_to_num(neginf=0.0) if rl.marginal_aliases else None
    penalties = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64)

    def taught(advantage):
        logits = values.clone().requires_grad_()
        advantages = torch.tensor([[1.0, advantage, -1.0]], dtype=torch.float64)
        follows = Advantages(advantages, control=other if rl.control_variate else None)
        if rl.algorithm == "etpo":
            follows = ActionValues(other)
        given = None if left_out == "from the start" else Scored(old, penalties, marginals)
        loss, metrics = loss_of(
            logits, batch, follows, reference, given, rl=rl, kl_coef=0.1, aliases=aliases, **truncation
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss, gradient, metrics

    loss, gradient, metrics = taught(1e6)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert all(torch.isfinite(value) for value in metrics.values()), metrics
    assert metrics["policy/left_out"] == 1
    assert metrics["policy/importance_weight"] <= 2 * (rl.importance_cap or 1.0)
    other, same, _ = taught(-3.0)  # whatever it brought
    torch.testing.assert_close((other, same), (loss, gradient))


def test_what_the_top_k_keeps_is_taught_as_without_a_neighbour_that_it_leaves_out():
    """The gradient of the other actions is theirs alone, over the same number of actions."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    both = micro_batch(
        actions=torch.tensor([[1, 2]]), action_mask=torch.tensor([[True, True]]), discounts=torch.ones(1, 1),
        rollout_log_probs=torch.full((1, 2), -1.0, dtype=torch.float64),
    )  # fmt: skip
    gradients = []
    for batch in (both, replace(both, action_mask=torch.tensor([[True, False]]))):
        follows = Advantages(torch.ones(1, 2, dtype=torch.float64))
        loss, _ = loss_of(logits, batch, follows, rl=RLConfig(), top_k=2)
        gradients.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(*gradients)


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
    batch = micro_batch(action_mask=mask, discounts=torch.ones(1, 1), rollout_log_probs=zero)

    def loss(x):
        return loss_of(x, batch, Advantages(zero), torch.zeros(1, 3), rl=RLConfig(entropy_coef=0.3))[0]

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
        batch = micro_batch(actions=torch.tensor([[action]]), action_mask=mask, discounts=torch.ones(1, 1))
        advantage = (values[action] + noise).reshape(1, 1)
        follows = Advantages(advantage, control=None if control is None else control[None])
        loss, _ = loss_of(logits, batch, follows, torch.zeros(1, 3), rl=RLConfig(importance_cap=0.0))
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
        batch = micro_batch(actions=torch.tensor([[action]]), action_mask=mask, discounts=torch.ones(1, 1))
        aliases = (token_of == token)[None] if marginal else None
        follows = Advantages(worth[token].reshape(1, 1))
        loss, _ = loss_of(logits, batch, follows, rl=RLConfig(importance_cap=0.0), aliases=aliases)
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
@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_objectives_gradient_is_that_of_its_values(name, truncation):
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
    batch = micro_batch(
        actions=actions, action_mask=mask, discounts=torch.ones(1, 1), rollout_log_probs=random(*shape) - 2.0
    )  # fmt: skip
    reference, values = random(count, 5), random(count, 5)
    follows = Advantages(random(*shape), control=values if rl.control_variate else None)
    if rl.algorithm == "etpo":
        follows = ActionValues(values)
    aliases = random(count, 5) > 0 if rl.marginal_aliases else None
    marginals = (random(*shape) - 1.0) * mask if rl.marginal_aliases else None
    old = Scored((random(*shape) - 1.5) * mask, random(*shape) * mask, marginals)  # ratios on both sides of the clips

    def loss(x):
        given = {"rl": rl, "kl_coef": 0.3, "temperature": 0.7, "aliases": aliases} | truncation
        return loss_of(x, batch, follows, reference, old, **given)[0]

    assert torch.autograd.gradcheck(loss, (logits,))


def test_without_a_reference_nothing_is_charged_or_measured():
    mask = torch.ones(1, 2, dtype=torch.bool)
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = micro_batch(actions=torch.tensor([[1, 2]]), action_mask=mask, discounts=torch.ones(1, 1))
    loss, metrics = loss_of(logits, batch, Advantages(torch.ones(1, 2)), rl=RLConfig(importance_cap=0.0))
    (found,) = torch.autograd.grad(loss, logits)
    wanted = logits.softmax(-1).detach() - torch.nn.functional.one_hot(torch.tensor([1, 2]), 4)
    torch.testing.assert_close(found, wanted)
    assert "policy/kl" not in metrics
