"""Soft values of utterances against enumeration: every utterance of a small decision process, in float64."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import on_ranks
from micro_batches import micro_batch

from cola_ray.algorithms import archer, archer_soft, etpo
from cola_ray.batch import collate
from cola_ray.experience import Trajectory
from cola_ray.learner.micro_batch import Distributions, Encoded
from cola_ray.learner.path_q import DuelingHead, PathQLearner, in_order
from cola_ray.learner.soft_q import SoftQLearner
from cola_ray.packing import pack
from cola_ray.replay.critic import Critic, CriticBatch

K, LONGEST, STATES, GAMMA = 3, 3, 2, 0.875  # exact in float32, too
STOP = 0


class Game:
    """Two states; an utterance is of up to three actions out of three, of which action 0 is the last.

    One that ends so, or is cut off, earns a reward and leads to an end or to the other state.
    """

    def __init__(self, seed):
        draw = np.random.default_rng(seed)
        self.utterances = [
            u for n in range(1, LONGEST + 1) for u in itertools.product(range(K), repeat=n)
            if STOP not in u[:-1] and (u[-1] == STOP or n == LONGEST)
        ]  # fmt: skip
        self.prefixes = sorted({u[:n] for u in self.utterances for n in range(len(u))})
        self.reward = draw.normal(size=(STATES, len(self.utterances)))
        self.goes_on = draw.random((STATES, len(self.utterances))) < 0.6
        shape = (STATES, len(self.prefixes), K)
        self.ref = torch.from_numpy(draw.normal(size=shape)).log_softmax(-1)
        self.said = draw.dirichlet(np.ones(len(self.utterances)), STATES)  # how often replay holds each

    def paths(self, table):
        """Of each utterance what the table (states, prefixes, actions) has along it: (states, utterances, LONGEST)."""
        found = torch.zeros(STATES, len(self.utterances), LONGEST, dtype=torch.float64)
        for number, u in enumerate(self.utterances):
            for j, action in enumerate(u):
                found[:, number, j] = table[:, self.prefixes.index(u[:j]), action]
        return found

    @property
    def mask(self):
        lengths = torch.tensor([len(u) for u in self.utterances])
        return (torch.arange(LONGEST) < lengths[:, None]).expand(STATES, -1, -1)

    def whole_utterances(self, beta):
        """Soft value iteration with an utterance as one action, all of them enumerated: V, Q and log pi*(u | s)."""
        ref, values = self.paths(self.ref).sum(-1).numpy(), np.zeros(STATES)
        for _ in range(600):
            q = self.reward + GAMMA * self.goes_on * values[::-1, None]
            values = np.array([
                beta * math.log(sum(math.exp(r + value / beta) for r, value in zip(*pair, strict=True)))
                for pair in zip(ref, q, strict=True)
            ])  # fmt: skip
        return values, q, ref + (q - values[:, None]) / beta


def swept(game, beta, sweeps=500):
    """The algorithm on tables, each fitted to the mean of its targets over replay; V to one utterance at a time."""
    draw, weights = np.random.default_rng(0), torch.from_numpy(game.said)
    v, q_in = torch.zeros(STATES, dtype=torch.float64), torch.zeros_like(game.ref)
    rewards, terminated = torch.from_numpy(game.reward), torch.from_numpy(~game.goes_on)
    mask, last = game.mask, game.mask & ~torch.cat([game.mask, torch.zeros_like(game.mask[..., :1])], -1)[..., 1:]
    flat = (STATES * len(game.utterances), LONGEST)
    for _ in range(sweeps):
        after = v.flip(0)[:, None].expand_as(rewards)
        q = archer.q_targets(rewards, terminated, after, GAMMA)
        for _ in range(LONGEST):  # from the last action back to the first
            taken = game.paths(archer_soft.soft_advantages(q_in, game.ref, beta))
            goals = archer_soft.path_targets(
                ((q - v[:, None])[..., None] * last).view(flat), (mask & ~last).double().view(flat), taken.view(flat),
                mask.reshape(flat),
            ).view_as(taken)  # fmt: skip
            for place, prefix in enumerate(game.prefixes):
                for action in range(K):
                    through = [n for n, u in enumerate(game.utterances) if u[: len(prefix) + 1] == (*prefix, action)]
                    of_each = weights[:, through] * goals[:, through, len(prefix)]
                    q_in[:, place, action] = of_each.sum(1) / weights[:, through].sum(1)
        one = [draw.choice(len(game.utterances), p=game.said[s]) for s in range(STATES)]
        along = game.paths(archer_soft.soft_advantages(q_in, game.ref, beta)).sum(-1)
        v = archer_soft.soft_value_targets(q[None], along)[0][range(STATES), one]
    return v, q, q_in


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_soft_values_of_actions_are_those_of_all_utterances(seed, beta):
    """V from whichever utterance replay gives, and the policy, against the sum over all utterances."""
    game = Game(seed)
    assert len(game.utterances) == 1 + 2 + 4 * 3
    values, of_utterances, policy = game.whole_utterances(beta)
    v, q, q_in = swept(game, beta)
    np.testing.assert_allclose(v, values, atol=1e-8)
    np.testing.assert_allclose(q, of_utterances, atol=1e-8)
    best = game.paths(etpo.best_log_probs(q_in, game.ref, beta)).sum(-1)
    np.testing.assert_allclose(best, policy, atol=1e-7)
    soft = game.paths(archer_soft.soft_advantages(q_in, game.ref, beta)).sum(-1)
    np.testing.assert_allclose(q - soft, np.broadcast_to(values[:, None], q.shape), atol=1e-7)


def test_one_drawn_utterance_would_be_another_value_each_time():
    """What the exact value replaces: Q of single utterances, whose spread in a state is as large as what they earn."""
    game = Game(0)
    _, q, _ = game.whole_utterances(0.5)
    assert q.std(1).min() > 0.5


def test_soft_advantages_make_a_policy_whatever_q_is():
    draw = torch.Generator().manual_seed(0)
    q, ref = torch.randn(2, 5, 7, generator=draw, dtype=torch.float64)
    ref = ref.log_softmax(-1)
    w = archer_soft.soft_advantages(q, ref, 0.3)
    torch.testing.assert_close((ref.exp() * (w / 0.3).exp()).sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(archer_soft.soft_advantages(q + 5, ref, 0.3), w, msg="whatever the state is worth")
    assert archer_soft.soft_advantages(torch.full((4,), 2.5), torch.full((4,), 0.25).log(), 0.3).tolist() == [0] * 4


def test_targets_by_hand():
    """Two utterances of three actions and of one, beside padding."""
    rewards = torch.tensor([[0.0, 0.0, 5.0], [4.0, 9.0, 9.0]])
    discounts = torch.tensor([[1.0, 1.0, 0.0], [0.0, 9.0, 9.0]])
    taken = torch.tensor([[1.0, 2.0, 3.0], [7.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = archer_soft.path_targets(rewards, discounts, taken, mask)
    assert found.tolist() == [[5 - 2 - 3, 5 - 3, 5], [4, 0, 0]]
    goals = archer_soft.soft_value_targets(torch.tensor([[3.0, 1.0], [2.0, 5.0]]), torch.tensor([1.0, -1.0]))
    assert goals.tolist() == [[2, 2], [1, 6]]


# --- the critic -------------------------------------------------------------------------------------------------------


class Tables(torch.nn.Module):
    """The heads' interface over one-hot features."""

    def __init__(self, utterances):
        super().__init__()
        self.q = torch.nn.Parameter(torch.zeros(2, STATES, utterances))
        self.v = torch.nn.Parameter(torch.zeros(2, STATES))

    def q_values(self, states, utterances):
        return torch.einsum("ksu,bs,bu->kb", self.q, states, utterances)

    def values(self, states):
        return torch.einsum("ks,bs->kb", self.v, states)


def test_a_critic_that_is_told_soft_advantages_has_soft_values():
    """Q of all utterances out of replay, V of one a state in each step: both twins are exact."""
    game, beta = Game(0), 0.5
    values, q, _ = game.whole_utterances(beta)
    soft, count = torch.from_numpy(q - values[:, None]), len(game.utterances)
    critic = Critic(Tables(count), gamma=GAMMA, tau=0.1, lr=1.0, grad_clip=1e9)
    critic.optimizer = torch.optim.SGD(critic.online.parameters(), lr=1.0)
    pairs = list(itertools.product(range(STATES), range(count)))
    eye, said = torch.eye(STATES), torch.eye(count)
    draw = np.random.default_rng(0)
    for _ in range(3000):
        one = [int(draw.choice(count, p=game.said[s])) for s in range(STATES)]
        critic.step(CriticBatch(
            states=eye[[s for s, _ in pairs]], utterances=said[[u for _, u in pairs]],
            next_states=eye[[1 - s for s, _ in pairs]],
            rewards=torch.tensor([game.reward[pair] for pair in pairs]).float(),
            terminated=torch.tensor([not game.goes_on[pair] for pair in pairs]),
            fresh_states=eye, fresh_utterances=said[one],
            soft_advantages=soft[range(STATES), one].float(),
        ))  # fmt: skip
    for twin in range(2):
        np.testing.assert_allclose(critic.online.v[twin].detach(), values, atol=1e-3)
        np.testing.assert_allclose(critic.online.q[twin].detach(), q, atol=1e-3)


# --- the learner's Q --------------------------------------------------------------------------------------------------


def learner_of(width, num_actions, **changes):
    fixed = {"lr": 1e-2, "tau": 0.05, "grad_clip": 10.0, "steps": 1, "seed": 0}
    return PathQLearner(width, num_actions, torch.device("cpu"), **fixed | changes)


def games_batch(game, q):
    """All utterances of all states, each prefix a one-hot state of its own; rewards are their Qs."""
    places = list(itertools.product(range(STATES), game.prefixes))
    e, eye = torch.zeros(STATES * len(game.utterances), LONGEST + 1, len(places)), torch.eye(len(places))
    actions, rewards = torch.zeros(e.shape[:2], dtype=torch.long), torch.zeros(e.shape[:2])
    discounts, mask = torch.zeros(e.shape[:2]), torch.zeros(e.shape[:2], dtype=torch.bool)
    reference = torch.full((*e.shape[:2], K), -math.log(K))
    for row, (s, (number, u)) in enumerate(itertools.product(range(STATES), enumerate(game.utterances))):
        for j, action in enumerate(u):
            e[row, j], actions[row, j] = eye[places.index((s, u[:j]))], action
            reference[row, j] = game.ref[s, game.prefixes.index(u[:j])].float()
        mask[row, : len(u)], discounts[row, : len(u) - 1] = True, 1.0
        rewards[row, len(u) - 1] = float(q[s, number])
    batch = micro_batch(actions=actions, action_mask=mask, rewards=rewards, discounts=discounts)
    return Encoded(batch, e, rewards), Distributions(reference[mask], reference[mask])


def test_the_fitted_head_finds_the_exact_soft_advantages(alone):
    """Of what utterances earn, up from any level of their state: the network against enumeration."""
    game, beta = Game(0), 0.5
    ref = game.paths(game.ref).sum(-1).numpy()
    values = beta * np.log(np.exp(ref + game.reward / beta).sum(1))
    encoded, of = games_batch(game, torch.from_numpy(game.reward) + torch.tensor([[3.0], [-2.0]]))
    learner, count = learner_of(encoded.hidden_states.shape[-1], K), int(encoded.batch.action_mask.sum())
    learner.start([encoded], count)
    for _ in range(1500):
        metrics = learner.fit([encoded], [of], count, beta)
    assert float(metrics["q/error"]) / count < 1e-4
    exact = (game.reward - values[:, None]).ravel()
    np.testing.assert_allclose(learner.of_utterances.numpy(), exact, atol=0.03)


def of_one_state(taken, rewards, width=5):
    """Utterances of one action each, in the same state."""
    shape = (len(taken), 2)
    batch = micro_batch(
        actions=torch.tensor(taken)[:, None].repeat(1, 2),
        action_mask=torch.tensor([[True, False]]).repeat(len(taken), 1),
        rewards=torch.tensor(rewards)[:, None] * torch.tensor([1.0, 0.0]),
    )  # fmt: skip
    reference = torch.full((len(taken), 4), 0.25).log()
    e = torch.linspace(-1, 1, width).expand(*shape, width)
    return Encoded(batch, e, batch.rewards), Distributions(reference, reference)


def test_equal_advantages_move_nothing(alone):
    encoded, of = of_one_state([0, 1, 1, 3], [0.2] * 4)
    learner = learner_of(5, 4, steps=4)
    for _ in range(5):
        learner.start([encoded], 4)
        learner.fit([encoded], [of], 4, 0.1)
    assert torch.equal(learner.q(encoded), torch.full((4, 4), 0.2))


@pytest.mark.parametrize(("kind", "shared"), [(PathQLearner, True), (SoftQLearner, False)])
def test_what_a_state_is_worth_is_learnt_of_actions_that_nobody_took(kind, shared, alone):
    """All of three actions end badly. A Q without a value of its own leaves the fourth where it was, as the best."""
    learner = kind(5, 4, torch.device("cpu"), lr=1e-2, tau=0.05, grad_clip=10.0, steps=1, seed=0)
    learner.start([of_one_state([0, 1, 2], [0.0, 0.0, 0.0])[0]], 3)
    encoded, of = of_one_state([0, 1, 2], [-1.0, -1.0, -1.0])
    for _ in range(300):
        learner.fit([encoded], [of], 3, 0.1)
    q = learner.q(encoded)[0]
    torch.testing.assert_close(q[:3], torch.full((3,), -1.0), atol=0.02, rtol=0)
    assert (float(q[3]) < -0.3) == shared


def test_a_learner_goes_on_from_its_state(alone):
    encoded, of = of_one_state([0, 1, 2], [0.5, -0.5, 1.0])
    learner, again = learner_of(5, 4), learner_of(5, 4, seed=1)
    learner.fit([encoded], [of], 3, 0.1)
    again.load_state_dict(copy.deepcopy(learner.state_dict()))  # Adam keeps the tensors that it is given
    for one in (learner, again):
        one.fit([encoded], [of], 3, 0.1)
    assert torch.equal(learner.of_utterances, again.of_utterances)
    assert torch.equal(learner.q(encoded), again.q(encoded))


def test_the_dueling_heads_start_says_the_same_of_all_actions():
    torch.manual_seed(0)
    head = DuelingHead(6, 5)
    assert head(torch.randn(3, 6)).abs().max() == 0
    head.start_at(-2.0)
    assert torch.equal(head(torch.randn(3, 6)), torch.full((3, 5), -2.0))


# --- over ranks -------------------------------------------------------------------------------------------------------


def sequences():
    """Seven of mixed length, so that a rank has a row more than it has sequences; each with its number as advantage."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(7):
        length = int(draw.integers(1, 6))
        ids = draw.integers(1, 9, length)
        made.append(Trajectory(np.array([1, 2]), ids, ids % 3, -np.ones(length, np.float32), ids * 0, 0.0, False, ""))
    return made


def rank(number, out):
    batch = collate(pack(sequences()), [float(i) for i in range(7)], 2, 0, 0, 10**6, keep_places=True)[number]
    of_rows = torch.zeros(batch.num_rows)
    of_rows[: len(batch.advantages)] = torch.from_numpy(batch.advantages) + 0.5
    torch.save(torch.from_numpy(in_order(batch, of_rows)), f"{out}/{number}")


def test_what_ranks_found_comes_back_in_order(tmp_path):
    on_ranks(rank, 2, tmp_path)
    for number in range(2):
        assert torch.load(tmp_path / str(number)).tolist() == [i + 0.5 for i in range(7)]
