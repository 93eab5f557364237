"""ETPO's theory, solved exactly: fixed point, consistency of action-wise and utterance-wise backups, gradients."""

import itertools

import numpy as np
import pytest
import torch
from conftest import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_batches import micro_batch

from cola_ray.algorithms import etpo
from cola_ray.learner.micro_batch import Distributions, Encoded, last_positions
from cola_ray.learner.soft_q import SoftQLearner, one_step_targets
from cola_ray.model.modeling_cola import QHead

K, LENGTH, GAMMA = 3, 2, 0.9


class TokenMDP:
    """Two observations; an utterance of two actions out of three leads from each to a reward and an end or the other.

    The reference is a table over (observation, actions so far), as any autoregressive model's distribution is.
    """

    def __init__(self, seed):
        draw = np.random.default_rng(seed)
        self.utterances = list(itertools.product(range(K), repeat=LENGTH))
        self.prefixes = [p for n in range(LENGTH) for p in itertools.product(range(K), repeat=n)]
        self.reward = {(o, u): draw.normal() for o in range(2) for u in self.utterances}
        self.goes_on = {(o, u): draw.random() < 0.6 for o in range(2) for u in self.utterances}
        self.ref = {(o, p): torch.tensor(draw.normal(size=K)).log_softmax(0) for o in range(2) for p in self.prefixes}

    def whole_utterances(self, beta):
        """Soft value iteration with an utterance as one action, K^n of them: V (2) and log pi(u | o)."""
        values = np.zeros(2)
        ref = {(o, u): sum(float(self.ref[o, u[:i]][u[i]]) for i in range(LENGTH)) for o, u in self.reward}
        for _ in range(500):
            q = {(o, u): r + GAMMA * self.goes_on[o, u] * values[1 - o] for (o, u), r in self.reward.items()}
            values = np.array([
                beta * np.log(sum(np.exp(ref[o, u] + q[o, u] / beta) for u in self.utterances)) for o in range(2)
            ])  # fmt: skip
        return values, {key: ref[key] + q[key] / beta - values[key[0]] / beta for key in q}

    def action_by_action(self, beta, sweeps=500):
        """The same with this package's functions on one action at a time: Q (o, prefix) -> (K,)."""
        q = {key: torch.zeros(K, dtype=torch.float64) for key in self.ref}
        for _ in range(sweeps):
            value = {key: float(etpo.best_soft_values(q[key], self.ref[key], beta)) for key in q}
            for (o, prefix), row in q.items():
                for a in range(K):
                    u = (*prefix, a)
                    inside = len(u) < LENGTH
                    row[a] = (
                        value[o, u] if inside else self.reward[o, u] + GAMMA * self.goes_on[o, u] * value[1 - o, ()]
                    )
        return q


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_action_wise_backups_give_the_utterance_wise_best_policy(beta):
    mdp = TokenMDP(0)
    values, wanted = mdp.whole_utterances(beta)
    q = mdp.action_by_action(beta)
    for o in range(2):
        assert float(etpo.best_soft_values(q[o, ()], mdp.ref[o, ()], beta)) == pytest.approx(values[o], abs=1e-9)
        for u in mdp.utterances:
            chosen = [etpo.best_log_probs(q[o, u[:i]], mdp.ref[o, u[:i]], beta)[u[i]] for i in range(LENGTH)]
            assert float(sum(chosen)) == pytest.approx(wanted[o, u], abs=1e-8)


def test_the_actors_optimum_is_the_closed_form():
    """Minimised by gradient descent from anywhere, the actor loss ends at rho exp(q / beta) / Z, its value at -V*."""
    q = torch.tensor([0.3, -1.0, 0.8, 0.0], dtype=torch.float64)
    ref = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    logits = torch.tensor([2.0, -1.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        out = etpo.actor_loss(logits.log_softmax(0), ref, q, 0.4)
        out.backward()
        return out

    optimizer.step(loss)
    torch.testing.assert_close(logits.log_softmax(0), etpo.best_log_probs(q, ref, 0.4), atol=1e-5, rtol=0)
    assert float(loss().detach()) == pytest.approx(-float(etpo.best_soft_values(q, ref, 0.4)))


def test_the_actors_gradient_depends_on_q_and_agrees_with_differences():
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    gradients = []
    for scale in (0.0, 1.0):
        q = scale * torch.arange(5.0, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x, q=q: etpo.actor_loss(x.log_softmax(0), ref, q, 0.3), (logits,))
        gradients.append(torch.autograd.grad(etpo.actor_loss(logits.log_softmax(0), ref, q, 0.3), logits)[0])
    assert (gradients[0] - gradients[1]).abs().max() > 0.1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 5.0))
def test_no_policy_is_worth_more_than_the_best(seed, beta):
    draw = torch.Generator().manual_seed(seed)
    q, ref, policy = (torch.randn(3, 7, generator=draw, dtype=torch.float64) for _ in range(3))
    ref, policy = ref.log_softmax(-1), policy.log_softmax(-1)
    best = etpo.best_soft_values(q, ref, beta)
    assert (etpo.soft_values(q, policy, ref, beta) <= best + 1e-9).all()
    attained = etpo.soft_values(q, etpo.best_log_probs(q, ref, beta), ref, beta)
    torch.testing.assert_close(attained, best, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("beta", "expected"), [(1e-3, 3.0), (1e6, 1.75)])
def test_a_soft_value_lies_between_mean_and_maximum(beta, expected):
    prior = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    q = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
    assert etpo.best_soft_values(q, prior.log(), beta).item() == pytest.approx(expected, abs=1e-2)
    by_hand = 0.7 * np.log((prior * (q / 0.7).exp()).sum().item())
    assert etpo.best_soft_values(q, prior.log(), 0.7).item() == pytest.approx(by_hand)


def test_where_q_is_zero_the_policy_is_the_reference():
    head = QHead(4, 6)
    e, ref = torch.randn(2, 3, 4), torch.randn(2, 3, 6).log_softmax(-1)
    assert head(e).abs().max() == 0
    torch.testing.assert_close(etpo.best_log_probs(head(e), ref, 0.1), ref)


def test_targets_by_hand_skip_observations_and_end_where_the_episode_does():
    rewards = torch.tensor([[0.0, 1.0, 9.0, 0.0, 2.0]])
    discounts = torch.tensor([[1.0, 0.5, 9.0, 1.0, 0.5]])
    values = torch.tensor([[1.0, 2.0, 99.0, 4.0, 5.0]])
    mask = torch.tensor([[True, True, False, True, True]])
    found = etpo.soft_targets(rewards, discounts, values, torch.tensor([6.0]), mask)
    assert found.tolist() == [[2.0, 1.0 + 0.5 * 4.0, 0.0, 5.0, 2.0 + 0.5 * 6.0]]
    ended = etpo.soft_targets(rewards, discounts * torch.tensor([1, 1, 1, 1, 0]), values, torch.tensor([6.0]), mask)
    assert float(ended[0, -1]) == 2.0


def test_equal_outcomes_move_no_action(alone):
    """Q of actions that were taken and of those that were not stays the same, exactly: there is nothing to prefer."""
    draw = torch.Generator().manual_seed(0)
    log_probs = torch.randn(32, 4, generator=draw).log_softmax(-1)
    e, actions = torch.randn(8, 4, 5, generator=draw), torch.randint(4, (8, 4), generator=draw)
    batch = micro_batch(
        actions=actions, action_mask=torch.tensor([[True, True, True, False]]).repeat(8, 1),
        scored_mask=torch.ones(8, 4, dtype=torch.bool), rewards=torch.tensor([[0.0, 0.0, 0.2, 0.0]]).repeat(8, 1),
        discounts=torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(8, 1),
    )  # fmt: skip
    encoded = Encoded(batch, e, batch.rewards)
    learner = SoftQLearner(5, 4, torch.device("cpu"), lr=1e-2, tau=0.05, grad_clip=1.0, steps=4, seed=0)
    for _ in range(5):
        learner.start([encoded], 24)
        learner.fit([encoded], [Distributions(log_probs, log_probs)], 24, beta=0.1)
    assert torch.equal(learner.q(encoded), torch.full((32, 4), 0.2))


def test_the_fitted_head_finds_the_exact_soft_values(alone):
    """A chain of two actions with one-hot states: the head, trained on draws from rho, against the recursion."""
    beta, reward = 0.5, torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, 0.5], [-1.0, 0.0, 1.0]])  # (first, second)
    states = torch.eye(4)  # before anything, and after each first action
    ref = torch.full((4, 3), 1 / 3).log()
    exact_second = reward
    exact_first = torch.stack([(ref[0].exp() * reward[a]).sum() for a in range(3)])  # pi = rho: no KL to pay
    learner = SoftQLearner(4, 3, torch.device("cpu"), lr=1e-2, tau=0.05, grad_clip=10.0, steps=1, seed=0)
    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))
    batch = micro_batch(
        actions=torch.cat([pairs, torch.zeros(9, 1, dtype=torch.long)], 1),
        action_mask=torch.tensor([[True, True, False]]).repeat(9, 1),
        rewards=torch.stack([torch.tensor([0.0, float(reward[a, b]), 0.0]) for a, b in pairs]),
        discounts=torch.tensor([[1.0, 0.0, 0.0]]).repeat(9, 1), scored_mask=torch.ones(9, 3, dtype=torch.bool),
    )  # fmt: skip
    e = torch.stack([torch.stack([states[0], states[1 + a], states[0]]) for a, _ in pairs])
    uniform = Distributions(ref[:1].expand(27, 3), ref[:1].expand(27, 3))
    for _ in range(1500):
        metrics = learner.fit([Encoded(batch, e, batch.rewards)], [uniform], 18, beta)
    assert float(metrics["q/error"]) / 18 < 1e-4
    everywhere = micro_batch(action_mask=torch.ones(1, 4, dtype=torch.bool))
    q = learner.q(Encoded(everywhere, states[None], everywhere.rewards))
    torch.testing.assert_close(q[0], exact_first, atol=0.02, rtol=0)
    torch.testing.assert_close(q[1:], exact_second, atol=0.02, rtol=0)
    other = SoftQLearner(4, 3, torch.device("cpu"), lr=1e-2, tau=0.05, grad_clip=10.0, steps=1, seed=1)
    other.load_state_dict(learner.state_dict())
    assert torch.equal(other.online(states), learner.online(states))


def test_without_an_actor_the_target_is_the_best_policys_value():
    """Off policy: the target at an action holds for whatever policy the action came from."""
    torch.manual_seed(0)
    target, beta = QHead(4, 6), 0.3
    torch.nn.init.normal_(target.layers[-1].weight)
    reference = torch.randn(3, 6, dtype=torch.float64).log_softmax(-1).float()
    batch = micro_batch(
        action_mask=torch.tensor([[True, True, False]]), scored_mask=torch.ones(1, 3, dtype=torch.bool),
        rewards=torch.tensor([[0.5, 2.0, 0.0]]), discounts=torch.tensor([[1.0, 0.9, 0.0]]),
    )  # fmt: skip
    encoded = Encoded(batch, torch.randn(1, 3, 4), batch.rewards)
    goals = one_step_targets(target, encoded, reference, beta)[0]
    q = target(encoded.hidden_states)[0].detach()
    z = [sum(float(reference[i, a].exp() * (q[i, a] / beta).exp()) for a in range(6)) for i in range(3)]
    by_hand = [0.5 + beta * np.log(z[1]), 2.0 + 0.9 * beta * np.log(z[2]), 0.0]
    np.testing.assert_allclose(goals.numpy(), by_hand, rtol=1e-5)
    best = etpo.best_log_probs(q, reference, beta)
    torch.testing.assert_close(one_step_targets(target, encoded, reference, beta, best)[0], goals)


def draws(rows):
    """A micro-batch of random episodes; for any rows the same ones."""
    draw = torch.Generator().manual_seed(0)
    shape = (6, 5)
    e = torch.randn(*shape, 4, generator=draw)
    fields = {
        "actions": torch.randint(3, shape, generator=draw),
        "action_mask": torch.rand(shape, generator=draw) > 0.3,
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "rewards": torch.randn(shape, generator=draw),
        "discounts": torch.rand(shape, generator=draw),
    }
    policy, reference = (torch.randn(*shape, 3, generator=draw).log_softmax(-1)[rows] for _ in range(2))
    some = {name: tensor[rows] for name, tensor in fields.items()}
    scored = some["action_mask"] | last_positions(some["attention_mask"])
    batch = micro_batch(**some, scored_mask=scored)
    return Encoded(batch, e[rows], batch.rewards), Distributions(policy[scored], reference[scored])


def rank(number, size, out):
    learner = SoftQLearner(4, 3, torch.device("cpu"), lr=1e-2, tau=0.1, grad_clip=1.0, steps=3, seed=0)
    count = int(draws(slice(0, 6))[0].batch.action_mask.sum())
    encoded, distributions = draws(slice(0, 6) if size == 1 else slice(3 * number, 3 * number + 3))
    for _ in range(5):
        learner.fit([encoded], [distributions], count, 0.3)
    torch.save(learner.state_dict()["target"], f"{out}/{size}-{number}")


def test_two_ranks_fit_the_same_q_as_one(tmp_path):
    for size in (1, 2):
        on_ranks(rank, size, size, tmp_path)
    alone, *both = [torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1")]
    for name, tensor in alone.items():
        torch.testing.assert_close(both[0][name], tensor, atol=1e-5, rtol=1e-5)
        assert torch.equal(both[0][name], both[1][name]), "every rank holds the same head"
