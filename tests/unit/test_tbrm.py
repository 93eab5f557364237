"""TBRM against Bellman residuals added up one by one, its minimum against dynamic programming, and its learner."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NUM_ACTIONS, VOCAB_SIZE, small_llama
from micro_batches import micro_batch

from cola_ray import CoLAForCausalLM, registry
from cola_ray.algorithms import tbrm
from cola_ray.checks.refusals import check
from cola_ray.experience import Trajectory
from cola_ray.learner.micro_batch import Frozen, Rewards
from cola_ray.learner.objective import policy_objective
from cola_ray.learner.policies import LatentPolicy, TokenPolicy
from cola_ray.learner.rl import PolicyUpdate
from cola_ray.loop.batches import BatchMaker
from cola_ray.packing import pack
from cola_ray.settings.algorithms import Algorithm
from cola_ray.settings.config import ConfigError, RLConfig, override
from cola_ray.settings.presets import preset

K, BETA, HEAT = 4, 0.3, 0.75
# Two utterances with an observation between them, an answer that ends before the padding, and a row without actions.
MASK = np.array([[0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]], bool)
ATTENDED = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
SCORED = MASK | (np.arange(7) == ATTENDED.sum(1)[:, None] - 1)
WEIGHTS = np.array([1.5, 0.7, 2.0])


class Drawn:
    """A micro-batch of random numbers; the first row was cut by a limit, the second one ended."""

    def __init__(self, seed):
        draw = np.random.default_rng(seed)
        self.logits, self.ref_logits = (2 * draw.normal(size=(*MASK.shape, K)) for _ in range(2))
        self.actions = draw.integers(0, K, MASK.shape) * MASK
        self.rewards = draw.normal(size=MASK.shape) * MASK
        self.discounts = np.where(MASK, 1.0, 7.0)  # elsewhere they have no meaning
        self.discounts[0, [2, 5]], self.discounts[1, 2] = 0.9, 0.0

    def batch(self):
        return micro_batch(
            actions=torch.from_numpy(self.actions), action_mask=torch.from_numpy(MASK),
            scored_mask=torch.from_numpy(SCORED), attention_mask=torch.from_numpy(ATTENDED),
            rewards=torch.from_numpy(self.rewards), discounts=torch.from_numpy(self.discounts),
        )  # fmt: skip


def by_hand(of, logits, level=0.0):
    """Residuals of single steps, by the definitions of Q and V, discounted and added up."""
    total = 0.0
    for row, weight in enumerate(WEIGHTS):
        places = np.flatnonzero(MASK[row])
        if not len(places):
            continue
        ref = np.exp(of.ref_logits[row] / HEAT)
        ref /= ref.sum(-1, keepdims=True)
        q = BETA * (logits[row] - of.ref_logits[row]) / HEAT
        v = level + BETA * np.log((ref * np.exp(q / BETA)).sum(-1))
        q = level + q
        residual, passed_on = 0.0, 1.0
        for t, then in itertools.pairwise([*places, ATTENDED[row].sum() - 1]):
            step = q[t, of.actions[row, t]] - of.rewards[row, t] - of.discounts[row, t] * v[then]
            residual += passed_on * step
            passed_on *= of.discounts[row, t]
        total += weight * residual**2
    return total


def objective(of, logits, level=0.0, **given):
    batch = of.batch()
    reference = torch.from_numpy(of.ref_logits[SCORED])
    return policy_objective(
        logits, batch, Frozen(None, reference), Rewards(batch.rewards, batch.discounts, level), None,
        **{"rl": RLConfig(algorithm="tbrm"), "kl_coef": BETA, "temperature": HEAT, "top_k": 0,
           "loss_weights": torch.from_numpy(WEIGHTS)[:, None]} | given,
    )  # fmt: skip


@pytest.mark.parametrize("level", [0.0, -3.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_square_of_what_single_steps_residuals_add_up_to(seed, level):
    of = Drawn(seed)
    loss, metrics = objective(of, torch.from_numpy(of.logits[SCORED]), level)
    assert float(loss) == pytest.approx(by_hand(of, of.logits, level), rel=1e-9)
    assert metrics["policy/loss"] == loss


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_the_sum_by_hand(seed):
    """By central differences of it, in every logit, those of the first and last states and of actions not taken too."""
    of, step = Drawn(seed), 1e-5
    logits = torch.from_numpy(of.logits[SCORED]).requires_grad_()
    objective(of, logits)[0].backward()
    wanted = np.zeros_like(of.logits)
    for place in np.argwhere(np.broadcast_to(SCORED[..., None], of.logits.shape)):
        ends = []
        for sign in (1, -1):
            moved = of.logits.copy()
            moved[tuple(place)] += sign * step
            ends.append(by_hand(of, moved))
        wanted[tuple(place)] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(logits.grad.numpy(), wanted[SCORED], atol=1e-7, rtol=1e-6)
    at_the_limit, at_the_end = np.abs(wanted[0, 6]).max(), np.abs(wanted[1, 3]).max()
    assert at_the_limit > 1e-3, "the value there stands for what would have followed"
    assert at_the_end == 0, "nothing follows"


def test_it_is_the_papers_loss_but_for_a_constant_of_the_first_state():
    """Q = logit, V = log-sum-exp: (V(s_1) + sum log(pi / rho) - R / beta)^2, in beta^2 and from the reference's V."""
    of = Drawn(0)
    of.discounts[:] = np.where(MASK, 1.0, 7.0)
    of.discounts[[0, 1], [5, 2]] = 0.0  # one outcome, and then the end
    total = 0.0
    for row, weight in enumerate(WEIGHTS[:2]):
        places, (logits, ref) = np.flatnonzero(MASK[row]), (of.logits[row] / HEAT, of.ref_logits[row] / HEAT)
        sums, ref_sums = (np.log(np.exp(one).sum(-1)) for one in (logits, ref))
        ratios = [logits[t, a] - sums[t] - ref[t, a] + ref_sums[t]
                  for t, a in zip(places, of.actions[row, places], strict=True)]  # fmt: skip
        paper = sums[places[0]] + sum(ratios) - of.rewards[row].sum() / BETA
        total += weight * (BETA * (paper - ref_sums[places[0]])) ** 2
    loss, _ = objective(of, torch.from_numpy(of.logits[SCORED]))
    assert float(loss) == pytest.approx(total, rel=1e-9)


def test_at_the_reference_values_are_0_and_residuals_the_returns():
    of = Drawn(0)
    of.logits = of.ref_logits
    of.discounts[1, 2] = 0.0
    loss, metrics = objective(of, torch.from_numpy(of.logits[SCORED]))
    first, second = of.rewards[0, [1, 2]].sum() + 0.9 * of.rewards[0, [4, 5]].sum(), of.rewards[1].sum()
    assert metrics["tbrm/value"] == 0
    assert float(metrics["tbrm/residual"]) == pytest.approx(-(WEIGHTS[0] * first + WEIGHTS[1] * second))
    assert float(loss) == pytest.approx(WEIGHTS[0] * first**2 + WEIGHTS[1] * second**2)


def test_residuals_of_rounding_teach_nothing():
    """Adam's steps are as long for gradients of 1e-8 as for any."""
    of = Drawn(0)
    of.rewards[:] = 0.0
    for size, learns in ((1e-7, False), (1e-3, True)):
        moved = of.ref_logits + size * np.random.default_rng(1).normal(size=of.logits.shape)
        logits = torch.from_numpy(moved[SCORED]).requires_grad_()
        loss, _ = objective(of, logits)
        loss.backward()
        assert bool(logits.grad.any()) == learns
        assert bool(loss.detach() > 0) == learns


# --- the minimum ------------------------------------------------------------------------------------------------------


class Tree:
    """All sequences of up to three of three actions; some end early. Rewards and discounts on every edge."""

    def __init__(self, seed, gamma):
        draw = np.random.default_rng(seed)
        ends = {(0,), (1, 2), (2, 0)}
        self.nodes, self.leaves, grown = [], [], [()]
        while grown:
            node = grown.pop(0)
            if len(node) == 3 or node in ends:
                self.leaves.append(node)
            else:
                self.nodes.append(node)
                grown += [(*node, action) for action in range(3)]
        self.index = {node: number for number, node in enumerate(self.nodes)}
        edges = [(*node, action) for node in self.nodes for action in range(3)]
        self.reward = {edge: draw.normal() for edge in edges}
        self.passed_on = {edge: 0.0 if edge in self.leaves else draw.choice([1.0, gamma]) for edge in edges}
        self.ref = 2 * draw.normal(size=(len(self.nodes), 3))
        self.often = 0.05 + draw.random(len(self.leaves))  # how often a trajectory is drawn, by nobody's policy

    def best(self, beta):
        """Soft value iteration from the leaves: log pi* at each node, (N, 3), and V* at the root."""
        found, values = np.zeros_like(self.ref), {leaf: 0.0 for leaf in self.leaves}
        for node in reversed(self.nodes):
            row = self.ref[self.index[node]]
            ref = row - np.log(np.exp(row).sum())
            edges = [(*node, action) for action in range(3)]
            q = np.array([self.reward[edge] + self.passed_on[edge] * values[edge] for edge in edges])
            values[node] = beta * np.log(np.exp(ref + q / beta).sum())
            found[self.index[node]] = ref + (q - values[node]) / beta
        return found, values[()]

    def rows(self):
        """Trajectories as (B, T) tensors: node, action, reward, discount, mask."""
        shape = (len(self.leaves), 3)
        node, action, mask = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape, bool)
        reward, discount = np.zeros(shape), np.zeros(shape)
        for row, leaf in enumerate(self.leaves):
            for t, taken in enumerate(leaf):
                edge = leaf[: t + 1]
                node[row, t], action[row, t], mask[row, t] = self.index[leaf[:t]], taken, True
                reward[row, t], discount[row, t] = self.reward[edge], self.passed_on[edge]
        return [torch.from_numpy(one) for one in (node, action, reward, discount, mask)]


def minimised(table, loss):
    """``table`` at the minimum of ``loss(table)``."""
    optimizer = torch.optim.LBFGS(
        [table], max_iter=5000, max_eval=20_000, tolerance_grad=1e-13, tolerance_change=1e-16, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach()


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (0.3, 1.0), (1.0, 0.8)])
@pytest.mark.parametrize("seed", range(2))
def test_the_minimum_over_all_trajectories_is_the_best_policy_whoever_drew_them(seed, beta, gamma):
    tree = Tree(seed, gamma)
    nodes, actions, rewards, discounts, mask = tree.rows()
    ref, often = torch.from_numpy(tree.ref), torch.from_numpy(tree.often)

    def loss(logits):
        ratios = (logits.log_softmax(-1) - ref.log_softmax(-1))[nodes, actions]
        values = tbrm.logit_values(logits[nodes[:, 0]], ref[nodes[:, 0]], beta)
        found, _ = tbrm.residuals(ratios, rewards, discounts, mask, values, torch.zeros_like(values), beta)
        return (often * found.square()).sum()

    start = torch.randn(ref.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = minimised(start.requires_grad_(), loss)
    wanted, value = tree.best(beta)
    np.testing.assert_allclose(logits.log_softmax(-1).exp().numpy(), np.exp(wanted), atol=1e-6)
    assert float(tbrm.logit_values(logits[0], ref[0], beta)) == pytest.approx(value, abs=1e-6)


def test_where_answers_are_drawn_by_chance_the_minimum_is_not_the_best_policy():
    """A coin decides whether one of two things said after a gamble is worth 2, or none; not to play is worth 0."""
    rewards = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)  # heads, tails

    def loss(table):
        """Root (sure, gamble), after heads, after tails; each way as often as the reference and the coin draw it."""
        ratios = table.log_softmax(-1) - np.log(0.5)
        start = tbrm.logit_values(table[0], torch.zeros_like(table[0]), 1.0)
        gambles = start + ratios[0, 1] + ratios[1:] - rewards
        return (start + ratios[0, 0]).square() / 2 + gambles.square().sum() / 8

    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = minimised(start.requires_grad_(), loss)
    gamble = np.log((np.exp(rewards.numpy()) / 2).sum(-1)).mean()  # the mean of both states' values
    best = np.exp(gamble) / (1 + np.exp(gamble))
    assert float(loss(table)) > 0.1, "the variance of what the coin brings, which no policy takes out"
    assert abs(float(table[0].softmax(0)[1]) - best) > 0.01


# --- the learner ------------------------------------------------------------------------------------------------------


class Stepped:
    """What a learner needs of ZeRO-3, on one process."""

    device = torch.device("cpu")

    def __init__(self, policy):
        self.engine = policy
        trained = [one for name, one in policy.named_parameters() if name.startswith(policy.trained)]
        self.optimizer = torch.optim.Adam(trained, lr=5e-3)

    def backward(self, loss, last):
        loss.backward()

    def step(self, lr):
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 1.0


@pytest.mark.parametrize(("space", "parts"), [("latent", 1), ("latent", 2), ("token", 1), ("adapters", 2)])
def test_repeated_updates_make_the_policy_account_for_anyones_trajectories(space, parts, cola_dir, one_rank):
    """Of random actions, with log-probabilities that no policy had: their rewards become what the logits say."""
    own = {} if space == "latent" else {"rl.action_space": "token", "rl.lora_rank": 4 * (space == "adapters")}
    config = override(preset("tiny"), {
        "rl.algorithm": "tbrm", "rl.kl_coef": 0.2, "rl.updates_per_batch": 50, "rl.num_minibatches": parts,
        "rl.micro_batch_tokens": 30, "cluster.learner_ranks": 1, "model.num_actions": NUM_ACTIONS,
        "model.dtype": "float32", **own,
    })  # fmt: skip
    torch.manual_seed(0)
    if space == "latent":
        policy = LatentPolicy(CoLAForCausalLM.from_pretrained(cola_dir))
    else:
        policy = TokenPolicy(small_llama(), lora_rank=config.rl.lora_rank, with_reference=True)
    draw, made, rewards = np.random.default_rng(5), [], [1.0, 0.0, 0.0, 1.0, 0.5, 0.0]
    for length in (3, 5, 1, 4, 2, 6):
        ids = draw.integers(3, VOCAB_SIZE, 3 + length)
        chosen = draw.integers(0, NUM_ACTIONS, length) if space == "latent" else ids[3:]
        log_probs = np.full(length, -30.0, np.float32)
        made.append(Trajectory(ids[:3], ids[3:], chosen, log_probs, chosen * 0, 0.0, False, ""))
    (batch,) = BatchMaker(config, SimpleNamespace(facts={"pad_token_id": 0}), None).collate(pack(made), rewards, 0)
    update = PolicyUpdate(config, Stepped(policy), None, None)

    def measured():
        found = update.measure(batch, config.rl.kl_coef)
        return {name: float(value) / batch.num_actions_global for name, value in found.items()}

    before = measured()
    update.improve(batch, 0.0, config.rl.kl_coef)
    after = measured()
    assert before["tbrm/value"] == pytest.approx(0, abs=1e-6)
    assert before["tbrm/residual"] == pytest.approx(-np.mean(rewards), abs=1e-5)
    assert before["policy/loss"] == pytest.approx(np.mean(np.square(rewards)), abs=1e-5)
    assert after["policy/loss"] < 0.1 * before["policy/loss"]


@pytest.mark.parametrize("level", [0.0, -20.0])
def test_it_learns_from_its_own_rollouts_what_is_rewarded(cola_dir, one_rank, level):
    """Two actions a completion, of 16, and a reward for two equal ones: from about 1 in 10 to nearly all.
    What all completions get alike makes no difference.

    The policy reads actions as tokens. Rollouts are of the step before, as with ``rl.max_staleness`` 1.
    """
    config = override(preset("tiny"), {
        "rl.algorithm": "tbrm", "rl.kl_coef": 0.1, "rl.updates_per_batch": 4, "cluster.learner_ranks": 1,
        "model.num_actions": NUM_ACTIONS, "model.dtype": "float32", "rl.micro_batch_tokens": 10_000,
    })  # fmt: skip
    torch.manual_seed(0)
    policy = LatentPolicy(CoLAForCausalLM.from_pretrained(cola_dir))
    update = PolicyUpdate(config, Stepped(policy), None, None)
    maker, prompt = BatchMaker(config, SimpleNamespace(facts={"pad_token_id": 0}), None), [5, 7, 9]

    def says(rows):
        """Distributions after each row of tokens."""
        ids = torch.tensor(rows)
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True
        with torch.no_grad():
            return policy(ids, torch.ones_like(ids), last)[0].softmax(-1)

    def chance():
        """Of two equal actions, exact."""
        first = says([prompt])[0]
        return float((first * says([[*prompt, 20 + a] for a in range(NUM_ACTIONS)]).diagonal()).sum())

    def rollouts():
        first = says([prompt])[0].multinomial(128, replacement=True)
        second = says([[*prompt, 20 + a] for a in first.tolist()]).multinomial(1)[:, 0]
        return torch.stack([first, second], 1).numpy()

    start, behind = chance(), rollouts()
    for _ in range(5):
        drawn, behind = behind, rollouts()
        made = [Trajectory(np.array(prompt), 20 + pair, pair, np.zeros(2, np.float32), pair * 0, 0.0, False, "")
                for pair in drawn]  # fmt: skip
        (batch,) = maker.collate(pack(made), (level + (drawn[:, 0] == drawn[:, 1])).tolist(), 0)
        update.improve(batch, 0.0, config.rl.kl_coef)
    assert start < 0.15
    assert chance() > 0.8


def test_a_residual_is_a_sequences_however_the_batch_is_cut_and_padded(cola_dir):
    """The loss of long and short sequences is their mean, by micro-batches of any size and with empty rows."""
    losses = []
    for tokens in (10_000, 12):
        config = override(preset("tiny"), {
            "rl.algorithm": "tbrm", "rl.kl_coef": 0.2, "rl.micro_batch_tokens": tokens, "cluster.learner_ranks": 2,
            "model.num_actions": NUM_ACTIONS, "model.dtype": "float32",
        })  # fmt: skip
        policy = LatentPolicy(CoLAForCausalLM.from_pretrained(cola_dir))
        draw, made = np.random.default_rng(3), []
        with torch.no_grad():
            for one in policy.cola.policy.parameters():
                one += 0.1 * torch.from_numpy(draw.normal(size=one.shape)).float()
        for length in (7, 1, 3, 2, 4):
            ids = draw.integers(3, VOCAB_SIZE, 2 + length)
            chosen = draw.integers(0, NUM_ACTIONS, length)
            made.append(Trajectory(ids[:2], ids[2:], chosen, -np.ones(length, np.float32), chosen * 0, 0.0, False, ""))
        maker = BatchMaker(config, SimpleNamespace(facts={"pad_token_id": 0}), None)
        batches = maker.collate(pack(made), [1.0, 0.0, 0.3, 0.7, -1.0], 0)
        update = PolicyUpdate(config, Stepped(policy), None, None)
        whole = [update.measure(batch, 0.2)["policy/loss"] for batch in batches]
        losses.append(float(sum(whole)) / batches[0].num_actions_global)
        alone = []
        for one, reward in zip(made, [1.0, 0.0, 0.3, 0.7, -1.0], strict=True):
            (single, _) = maker.collate(pack([one]), [reward], 0)
            alone.append(float(update.measure(single, 0.2)["policy/loss"]) / single.num_actions_global)
        assert losses[-1] == pytest.approx(np.mean(alone), rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_algorithm_of_ones_own_cannot_ask_for_it(monkeypatch):
    """Since what goes with it is known by the algorithm's name."""
    monkeypatch.setitem(registry._REGISTERED, ("algorithm", "mine"), Algorithm(bellman_residual=True))
    with pytest.raises(ConfigError, match="'mine': soft_q, bellman_residual, replays, critic and turns are needs of"):
        check(override(preset("tiny"), {"rl.algorithm": "mine"}))
