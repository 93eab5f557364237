"""The policy's objective, put together from its losses, against one sum by the papers' formulas in float64."""

import itertools
from dataclasses import fields

import numpy as np
import pytest
import torch
from micro_batches import micro_batch

from cola_ray.batch import collate
from cola_ray.experience import Trajectory
from cola_ray.learner import objective, pieces
from cola_ray.learner.micro_batch import ActionValues, Advantages, Frozen, MicroBatch, Scored
from cola_ray.learner.objective import before_updates, policy_objective, score
from cola_ray.learner.surrogate import of_ones_own
from cola_ray.packing import pack
from cola_ray.settings.config import RLConfig

K, BETA, HEAT = 4, 0.3, 0.75
MASK = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], bool)
ROWS, PLACES = np.nonzero(MASK)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Drawn:
    """Random numbers for everything that an objective may ask for; by position, [row][place]."""

    def __init__(self, seed):
        draw = np.random.default_rng(seed)
        shape = (*MASK.shape, K)
        self.logits, self.ref_logits, self.q = (draw.normal(size=shape) for _ in range(3))
        self.earlier = self.logits + 0.5 * draw.normal(size=shape)  # the policy before the batch
        self.actions = draw.integers(0, K, MASK.shape)
        self.rollout = -0.2 - 2 * draw.random(MASK.shape)
        self.advantages = draw.normal(size=MASK.shape)
        self.discounts = draw.choice([1.0, 0.8], MASK.shape)
        self.aliases = draw.random(shape) < 0.4
        self.deviation = 1.7

    def batch(self):
        return micro_batch(
            actions=torch.from_numpy(self.actions * MASK), action_mask=torch.from_numpy(MASK),
            rollout_log_probs=torch.from_numpy(self.rollout * MASK), discounts=torch.from_numpy(self.discounts * MASK),
        )  # fmt: skip


def by_hand(of, rl, *, later, hold_kl, whitened):
    """Loops over rows and actions; every quantity by its definition."""
    pi, ref = log_softmax(of.logits / HEAT), log_softmax(of.ref_logits / HEAT)
    before = log_softmax(of.earlier / HEAT) if later else pi

    def said(policy, row, t):
        if not rl.marginal_aliases:
            return policy[row, t, of.actions[row, t]]
        same = of.aliases[row, t].copy()
        same[of.actions[row, t]] = True
        return np.log(np.exp(policy[row, t])[same].sum())

    def divergence(policy, row, t):
        return (np.exp(policy[row, t]) * (policy[row, t] - ref[row, t])).sum()

    def penalty(row, places, i):
        """What the i-th action of a row is charged."""
        t = places[i]
        d = before[row, t, of.actions[row, t]] - ref[row, t, of.actions[row, t]]
        if rl.kl_estimator == "exact":
            last = i + 1 == len(places)
            return 0.0 if last else of.discounts[row, t] * divergence(before, row, places[i + 1])
        return {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[rl.kl_estimator]

    total = 0.0
    for row in range(len(MASK)):
        places = np.flatnonzero(MASK[row])
        for i, t in enumerate(places):
            a, probs = of.actions[row, t], np.exp(pi[row, t])
            if rl.algorithm == "etpo":
                total += (probs * (BETA * (pi[row, t] - ref[row, t]) - of.q[row, t])).sum()
            else:
                advantage, passed = of.advantages[row, t], 1.0
                if rl.kl_in == "reward" and not hold_kl:
                    for j in range(i, len(places)):
                        advantage -= BETA * passed * penalty(row, places, j)
                        passed *= of.discounts[row, places[j]]
                if rl.control_variate:
                    advantage -= of.q[row, t, a]
                    total -= (probs * of.q[row, t]).sum()
                if rl.importance_cap:
                    advantage *= min(np.exp(before[row, t, a] - of.rollout[row, t]), rl.importance_cap)
                ratio = np.exp(said(pi, row, t) - said(before, row, t))
                gained = min(ratio * advantage, np.clip(ratio, 1 - rl.clip_low, 1 + rl.clip_high) * advantage)
                total -= max(gained, rl.clip_c * advantage) if rl.clip_c and advantage < 0 else gained
                d = pi[row, t, a] - ref[row, t, a]
                if rl.kl_estimator == "exact":
                    divided = of.deviation if whitened and rl.kl_in == "reward" else 1.0
                    total += BETA / divided * divergence(pi, row, t)
                elif rl.kl_in == "loss":
                    total += BETA * {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[rl.kl_estimator]
            total += rl.entropy_coef * (probs * pi[row, t]).sum()
    return total


def found(of, rl, *, later, hold_kl, whitened, policy_loss=None):
    batch, at = of.batch(), (ROWS, PLACES)
    logits, reference, q, earlier = (torch.from_numpy(x[at]) for x in (of.logits, of.ref_logits, of.q, of.earlier))
    aliases = torch.from_numpy(of.aliases[at]) if rl.marginal_aliases else None
    old = None
    if later:
        old = before_updates(score(earlier, reference, batch, HEAT, 0, every=True), batch, aliases, rl)
    follows = Advantages(
        torch.from_numpy(of.advantages * MASK), hold_kl=hold_kl, control=q if rl.control_variate else None,
        deviation=torch.tensor(of.deviation, dtype=torch.float64) if whitened else None,
    )  # fmt: skip
    if rl.algorithm == "etpo":
        follows = ActionValues(q)
    frozen = Frozen(None, reference, aliases)
    return policy_objective(
        logits, batch, frozen, follows, old, rl=rl, kl_coef=BETA, temperature=HEAT, top_k=0,
        surrogate=None if policy_loss is None else of_ones_own(policy_loss),
    )  # fmt: skip


KINDS = {
    **{f"{estimator} in the {where}": {"kl_estimator": estimator, "kl_in": where}
       for estimator, where in itertools.product(("exact", "k1", "k2", "k3"), ("reward", "loss"))},
    "no importance weight": {"importance_cap": 0.0, "entropy_coef": 0.2},
    "clips apart": {"clip_low": 0.05, "clip_high": 0.5},
    "dual clip": {"clip_c": 1.1},
    "control variate": {"control_variate": True, "entropy_coef": 0.1},
    "aliases": {"marginal_aliases": True},
    "etpo": {"algorithm": "etpo", "entropy_coef": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("later", [False, True])
def test_the_parts_add_up_to_the_sum_of_the_papers(kind, later):
    rl = RLConfig(**KINDS[kind])
    for seed, hold_kl, whitened in itertools.product(range(3), (False, True), (False, True)):
        given = {"later": later, "hold_kl": hold_kl, "whitened": whitened}
        loss, metrics = found(Drawn(seed), rl, **given)
        assert float(loss) == pytest.approx(by_hand(Drawn(seed), rl, **given), rel=1e-9)
        assert metrics["policy/loss"] == loss


def test_a_loss_of_ones_own_stands_in_the_clipped_surrogates_place():
    """The surrogate written anew; where there is no action its numbers are infinite, and must not count."""
    rl, given = RLConfig(entropy_coef=0.1, clip_high=0.3), {"later": True, "hold_kl": False, "whitened": True}

    def clipped(log_probs, old_log_probs, advantages, mask):
        ratio = torch.where(mask, log_probs - old_log_probs, torch.inf).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)

    for seed in range(3):
        usual, own = (found(Drawn(seed), rl, **given, policy_loss=loss)[0] for loss in (None, clipped))
        assert float(own) == pytest.approx(float(usual), rel=1e-12)
    with pytest.raises(ValueError, match="of shape"):
        found(Drawn(0), rl, **given, policy_loss=lambda log_probs, *_: log_probs.sum())


def test_what_is_kept_from_before_the_updates_has_no_gradient_and_is_the_first_updates_own():
    """A second update with the policy of the first has the loss of the first."""
    of, rl = Drawn(0), RLConfig(kl_estimator="k3", marginal_aliases=True)
    first, _ = found(of, rl, later=False, hold_kl=False, whitened=False)
    of.earlier = of.logits
    second, _ = found(of, rl, later=True, hold_kl=False, whitened=False)
    assert float(first) == pytest.approx(float(second), rel=1e-12)


@pytest.mark.parametrize("score_last", [False, True])
def test_a_micro_batch_is_what_was_collated_and_nothing_of_its_neighbours(score_last):
    def trajectory(prompt, length):
        ids, states = np.arange(length), np.full((prompt + length - 1, 2), length, np.int16)
        return Trajectory(ids[:1].repeat(prompt), ids, ids, -np.ones(length, np.float32), ids, 0.5, False, "",
                          hidden_states=states)  # fmt: skip

    (batch,) = collate(pack([trajectory(2, 5), trajectory(1, 3), trajectory(3, 2)]), [1.0, 2.0, 3.0], 1, 7, 0, 8)
    cuts = [MicroBatch.cut(batch, *cut, torch.device("cpu"), score_last) for cut in batch.micro_batches]
    assert sum(len(one.input_ids) for one in cuts) == 3
    for one, (start, stop, width) in zip(cuts, batch.micro_batches, strict=True):
        for field in fields(one):
            if field.name not in ("scored_mask", "hidden_states", "shared_prompts"):
                wanted = getattr(batch.padded(), field.name)[start:stop, :width]
                assert torch.equal(getattr(one, field.name), torch.from_numpy(wanted)), field.name
        assert one.hidden_states.dtype is torch.bfloat16, "which NumPy does not have"
        assert (one.scored_mask & ~one.action_mask).sum() == score_last * (stop - start)
        values = torch.arange(int(one.scored_mask.sum())).float() + 1
        assert torch.equal(one.place(values)[one.scored_mask], values)
        assert one.place(values)[~one.scored_mask].abs().sum() == 0
        table = torch.rand(len(values), 6)
        wanted = [table[i, a] for i, a in enumerate(one.actions[one.scored_mask])]
        assert torch.equal(one.taken(table), torch.stack(wanted))


@pytest.mark.parametrize("given", [{"entropy_coef": 0.2}, {"kl_estimator": "k3", "kl_in": "loss"}])
@pytest.mark.parametrize("with_reference", [True, False])
def test_a_vocabulary_in_pieces_has_the_loss_and_gradient_of_all_rows_at_once(monkeypatch, given, with_reference):
    of, rl, at = Drawn(0), RLConfig(**given), (ROWS, PLACES)
    reference = torch.from_numpy(of.ref_logits[at]) if with_reference else None

    def run():
        logits = torch.from_numpy(of.logits[at]).requires_grad_()
        follows = Advantages(torch.from_numpy(of.advantages * MASK))
        loss, metrics = policy_objective(
            logits, of.batch(), Frozen(None, reference), follows, None, rl=rl, kl_coef=BETA, temperature=HEAT, top_k=2
        )
        loss.backward()
        return loss.detach(), logits.grad, metrics

    whole = run()
    monkeypatch.setattr(pieces, "AT_ONCE", 2 * K)  # two of six rows
    made = []
    of_rows = objective._of_rows
    monkeypatch.setattr(objective, "_of_rows", lambda *args, **more: made.append(1) or of_rows(*args, **more))
    cut = run()
    assert len(made) == 6, "three pieces, each once more for its gradient"
    assert torch.equal(whole[0], cut[0])
    assert torch.equal(whole[1], cut[1])
    assert whole[2].keys() == cut[2].keys()
    assert all(torch.equal(whole[2][name], cut[2][name]) for name in whole[2])


def test_cross_entropies_in_pieces_are_those_of_all_rows(monkeypatch):
    logits, targets = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 5
    sums = []
    for at_once in (1 << 25, 10):
        monkeypatch.setattr(pieces, "AT_ONCE", at_once)
        given = logits.to(torch.bfloat16).requires_grad_()
        loss = pieces.cross_entropies(given, targets)
        loss.backward()
        sums.append((float(loss.detach()), given.grad))
    wanted = torch.nn.functional.cross_entropy(logits.to(torch.bfloat16).double(), targets, reduction="sum")
    assert sums[0][0] == pytest.approx(float(wanted), rel=1e-6)
    assert sums[1][0] == pytest.approx(sums[0][0], rel=1e-6)
    assert torch.equal(sums[0][1], sums[1][1])


def test_scored_actions_outside_the_truncation_are_kept_as_impossible():
    batch = micro_batch(actions=torch.tensor([[0, 2]]), action_mask=torch.ones(1, 2, dtype=torch.bool))
    scores = score(torch.tensor([[2.0, 1.0, 0.0]] * 2), None, batch, 1.0, 2)
    kept: Scored = before_updates(scores, batch, None, RLConfig(kl_estimator="k1"))
    assert kept.log_probs[0, 0].isfinite()
    assert kept.log_probs[0, 1] == -torch.inf
    assert kept.kl_penalties[0, 1] == 0
