"""The choices of a GRPO-like loss against the formulas of their papers and of TRL, in float64.

TRL's formulas are those of ``trl/trainer/grpo_trainer.py`` at f2cd577 (Apache-2.0), written down by hand.
"""

from typing import get_args

import numpy as np
import pytest
import torch

from cola_ray.algorithms import grpo
from cola_ray.algorithms.advantages import Outcomes
from cola_ray.algorithms.aggregation import LossAggMode, loss_weights
from cola_ray.algorithms.importance import ImportanceMode, effective_sample_size, importance_weights
from cola_ray.algorithms.policy_loss import Clip
from cola_ray.batch import collate
from cola_ray.experience import Trajectory
from cola_ray.learner.rl import PolicyUpdate, _with_sample_size
from cola_ray.loop.batches import BatchMaker
from cola_ray.packing import pack
from cola_ray.registry import BUILT_IN, find
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

K, VOCABULARY, LONGEST = 5, 11, 9
IMPORTANCE_MODES = get_args(ImportanceMode)
LENGTHS = (3, 9, 1, 4, 6, 2, 7)
AGG_MODES = get_args(LossAggMode)


class Table:
    """Logits by the token in front, in the place of a policy; adds up the shares of a loss that it is given."""

    device = torch.device("cpu")

    def __init__(self, logits, reference):
        self.engine, self.logits, self.reference, self.loss = self, logits, reference, 0.0

    def __call__(self, input_ids, attention_mask, scored_mask, *_, **__):
        return self.logits[input_ids[scored_mask]], None, self.reference[input_ids[scored_mask]], None

    def backward(self, loss, last):
        self.loss = self.loss + loss

    def step(self, lr):
        return 0.0


class Run:
    """Completions of LENGTHS actions of a policy, and what is needed to work the loss by hand; (B, T) float64."""

    def __init__(self, seed=0):
        draw = np.random.default_rng(seed)
        self.logits = torch.from_numpy(draw.normal(size=(VOCABULARY, K))).requires_grad_()
        self.reference = torch.from_numpy(draw.normal(size=(VOCABULARY, K)))
        self.advantages = torch.from_numpy(draw.normal(size=len(LENGTHS)).astype(np.float32)).double()
        self.ids = [draw.integers(0, VOCABULARY, 2 + length) for length in LENGTHS]
        self.actions = [draw.integers(0, K, length) for length in LENGTHS]
        self.rollout = [
            self.of(self.logits, row).detach().numpy() + 0.4 * draw.normal(size=length)
            for row, length in enumerate(LENGTHS)
        ]
        self.mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]

    def of(self, logits, row):
        """Log-probabilities of a row's actions, (L,)."""
        states = torch.from_numpy(self.ids[row][1:-1])
        return logits[states].log_softmax(-1)[torch.arange(len(states)), torch.from_numpy(self.actions[row])]

    def whole(self, of_row):
        """(B, T) of what is known of each row; 0 elsewhere."""
        return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(of_row(row)) for row in range(len(LENGTHS))], True)

    def batches(self, ranks, micro_batch_tokens):
        made = [
            Trajectory(ids[:2], ids[2:], actions, rollout.astype(np.float32), actions * 0, 0.0, False, "")
            for ids, actions, rollout in zip(self.ids, self.actions, self.rollout, strict=True)
        ]
        return collate(pack(made), self.advantages.tolist(), ranks, 0, 0, micro_batch_tokens)

    def loss(self, changes, ranks=1, micro_batch_tokens=1000, kl_coef=0.0):
        """What all ranks' learners go downhill on, and the sums of their metrics."""
        config = override(preset("tiny"), {"rollout.max_new_tokens": LONGEST, "rl.importance_cap": 0.0} | changes)
        loss, sums = 0.0, {}
        for batch in self.batches(ranks, micro_batch_tokens):
            table = Table(self.logits, self.reference)
            found, _ = PolicyUpdate(config, table, None, None).improve(batch, 0.0, kl_coef)
            loss += table.loss
            sums = {name: value + sums.get(name, 0.0) for name, value in found.items()}
        return loss, sums

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0]


def trl_aggregated(per_token_loss, mask, mode):
    """``_compute_loss`` of TRL, its last part: loss_type dapo, grpo and dr_grpo; and verl's seq-mean-token-sum."""
    if mode == "token-mean":
        return (per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)
    if mode == "seq-mean-token-mean":
        return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if mode == "seq-mean-token-sum":
        return (per_token_loss * mask).sum(-1).mean()
    return (per_token_loss * mask).sum() / (per_token_loss.size(0) * LONGEST)


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize(("ranks", "micro_batch_tokens"), [(1, 1000), (1, 12), (2, 20), (3, 12), (9, 1)])
def test_losses_are_added_up_as_in_trl_however_the_batch_is_cut(mode, ranks, micro_batch_tokens):
    run = Run()
    found, sums = run.loss(
        {"rl.loss_agg_mode": mode, "rl.kl_in": "loss", "rl.kl_estimator": "k3", "rl.entropy_coef": 0.1},
        ranks, micro_batch_tokens, kl_coef=0.3,
    )  # fmt: skip
    log_probs, reference = (run.whole(lambda row, of=of: run.of(of, row)) for of in (run.logits, run.reference))
    states = run.logits.log_softmax(-1)
    entropies = run.whole(lambda row: -(states.exp() * states).sum(-1)[torch.from_numpy(run.ids[row][1:-1])])
    d = reference - log_probs
    per_token = -(log_probs - log_probs.detach()).exp() * run.advantages[:, None] + 0.3 * (d.exp() - d - 1)
    wanted = trl_aggregated(per_token - 0.1 * entropies, run.mask, mode)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(run.gradient(found), run.gradient(wanted), rtol=1e-6, atol=1e-9)
    assert float(sums["policy/loss"]) / sum(LENGTHS) == pytest.approx(wanted.item(), rel=1e-6), "as it is shown"


def test_loss_weights_by_hand():
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    assert loss_weights(mask, "token-mean", 4, 2, 8) is None
    assert loss_weights(mask, "seq-mean-token-mean", 4, 2, 8)[:2, 0].tolist() == [2.0, 2 / 3]
    assert loss_weights(mask, "seq-mean-token-sum", 4, 2, 8)[:2, 0].tolist() == [2.0, 2.0]
    assert loss_weights(mask, "seq-mean-token-sum-norm", 4, 2, 8)[:2, 0].tolist() == [0.25, 0.25]
    for mode in AGG_MODES[1:]:
        assert loss_weights(mask, mode, 4, 2, 8).isfinite().all(), "of a row that pads a rank, too"


@pytest.mark.parametrize("ranks", [1, 2, 9])
def test_sequences_with_actions_are_counted_over_all_ranks(ranks):
    assert {batch.num_sequences_global for batch in Run().batches(ranks, 20)} == {len(LENGTHS)}


# --- surrogates -------------------------------------------------------------------------------------------------------


def trl_per_token_loss(log_probs, old, advantages, mask, *, level="token", loss_type="grpo", low, high, delta=None):
    """``_compute_loss`` of TRL, its middle part. Args: advantages: (B,)."""
    advantages = advantages.unsqueeze(1)
    log_ratio = log_probs - old
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    if loss_type == "cispo":
        return -torch.clamp(coef_1, max=high).detach() * advantages * log_probs
    coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
    if delta is not None:
        coef_1 = torch.clamp(coef_1, max=delta)
    return (-torch.min(coef_1 * advantages, coef_2 * advantages)).expand_as(mask)


def verl_dual_clip(log_probs, old, advantages, clip):
    """``compute_policy_loss_vanilla`` of verl, b178a3c (Apache-2.0)."""
    ratio, advantages = torch.exp(log_probs - old), advantages.unsqueeze(1)
    losses = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip.low, 1 + clip.high))
    return torch.where(advantages < 0, torch.min(-advantages * clip.c, losses), losses)


class Pair:
    """A policy and the one before, (B, T) of rows of unlike lengths, with an advantage a row."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.mask = torch.arange(6) < torch.tensor([6, 2, 5, 1, 3, 4])[:, None]
        self.log_probs, self.old = (
            (-torch.rand(6, 6, generator=generator, dtype=torch.float64) * 1.6).requires_grad_() for _ in range(2)
        )
        self.old = self.old.detach()
        self.advantages = torch.randn(6, generator=generator, dtype=torch.float64)

    def given(self, advantages=None):
        wide = self.advantages[:, None].expand(6, 6) if advantages is None else advantages
        return self.log_probs, self.old, wide.masked_fill(~self.mask, 0.0), self.mask

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.log_probs, retain_graph=True)[0]


SURROGATES = {name: find("loss", name) for name in BUILT_IN["loss"]}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "clip", "trl"),
    [
        ("ppo", Clip(0.2, 0.28), {"low": 0.2, "high": 0.28}),
        ("ppo", Clip(0.2, 0.28, 1.4), {"low": 0.2, "high": 0.28, "delta": 1.4}),
        ("gspo", Clip(0.1, 0.15), {"low": 0.1, "high": 0.15, "level": "sequence"}),
        ("gspo", Clip(0.1, 0.15, 1.2), {"low": 0.1, "high": 0.15, "level": "sequence", "delta": 1.2}),
        ("cispo", Clip(1.0, 0.3), {"low": 0.0, "high": 1.3, "loss_type": "cispo"}),
    ],
)
@pytest.mark.parametrize("mode", AGG_MODES)
def test_surrogates_have_trls_loss_and_gradient(name, clip, trl, mode, seed):
    pair = Pair(seed)
    of_each, active = SURROGATES[name](*pair.given(), clip)
    assert not of_each[~pair.mask].any()
    assert active.any(), "else nothing would be seen of the clip"
    assert not active[~pair.mask].any()
    wanted = trl_per_token_loss(pair.log_probs, pair.old, pair.advantages, pair.mask, **trl)
    found, wanted = (trl_aggregated(one, pair.mask, mode) for one in (of_each, wanted))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(pair.gradient(found), pair.gradient(wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_dual_clip_has_verls_loss_and_gradient(seed):
    pair, clip = Pair(seed), Clip(0.2, 0.2, 1.5)
    of_each, active = SURROGATES["ppo"](*pair.given(), clip)
    wanted = verl_dual_clip(pair.log_probs, pair.old, pair.advantages, clip)
    torch.testing.assert_close(of_each, wanted * pair.mask)
    torch.testing.assert_close(pair.gradient(of_each.sum()), pair.gradient((wanted * pair.mask).sum()))
    beyond = ((pair.log_probs - pair.old).exp() > 1.5) & (pair.advantages < 0)[:, None] & pair.mask
    assert active[beyond].all()
    assert not pair.gradient(of_each.sum())[beyond].any()


def test_gspo_is_the_papers_sum_over_sequences():
    """Eq. 5 with eq. 7, a loop over sequences; its gradient by automatic differentiation of the ratio itself."""
    pair, low, high = Pair(5), 0.1, 0.15
    found = trl_aggregated(SURROGATES["gspo"](*pair.given(), Clip(low, high))[0], pair.mask, "seq-mean-token-mean")
    gained = 0.0
    for row, length in enumerate(pair.mask.sum(1).tolist()):
        own, before = (one[row, :length].sum() for one in (pair.log_probs, pair.old))
        ratio, advantage = (own.exp() / before.exp()) ** (1 / length), pair.advantages[row]
        gained += torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    assert found.item() == pytest.approx(-gained.item() / 6, rel=1e-12)
    torch.testing.assert_close(pair.gradient(found), pair.gradient(-gained / 6))


def test_with_advantages_of_actions_gspo_charges_each_with_its_own():
    """GSPO-token, eq. 13 and 14: ``min(s_it A_it, clip(s_it) A_it)``, ``s_it = sg(s_i) pi_it / sg(pi_it)``."""
    pair, clip = Pair(6), Clip(0.1, 0.15)
    advantages = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, active = SURROGATES["gspo"](*pair.given(advantages), clip)
    for row, length in enumerate(pair.mask.sum(1).tolist()):
        ratio = (pair.log_probs - pair.old)[row, :length].mean().exp().item()
        for t in range(length):
            advantage = advantages[row, t].item()
            outside = (ratio > 1.15 and advantage > 0) or (ratio < 0.9 and advantage < 0)
            limited = np.clip(ratio, 0.9, 1.15)
            assert found[row, t].item() == pytest.approx(-(limited if outside else ratio) * advantage)
            assert bool(active[row, t]) == outside
            gradient = pair.gradient(found.sum())[row, t].item()
            assert gradient == pytest.approx(0.0 if outside else -ratio * advantage)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (1.0, 4.0)])
def test_cispo_keeps_every_actions_gradient_with_a_clipped_weight(low, high):
    pair = Pair(7)
    found, active = SURROGATES["cispo"](*pair.given(), Clip(low, high))
    ratio = (pair.log_probs - pair.old).exp().detach()
    weight = ratio.clamp(1 - low, 1 + high)
    torch.testing.assert_close(pair.gradient(found.sum()), -weight * pair.advantages[:, None] * pair.mask)
    assert torch.equal(active, ((ratio < 1 - low) | (ratio > 1 + high)) & pair.mask)


@pytest.mark.parametrize("name", SURROGATES)
def test_where_the_policy_is_the_one_before_all_surrogates_have_one_gradient(name):
    pair = Pair(8)
    pair.old = pair.log_probs.detach()
    found, active = SURROGATES[name](*pair.given(), Clip(3e-4, 4e-4))
    assert not active.any()
    torch.testing.assert_close(pair.gradient(found.sum()), -pair.advantages[:, None] * pair.mask)


@pytest.mark.parametrize("name", SURROGATES)
def test_what_is_masked_or_has_no_advantage_makes_no_nan(name):
    """exp(900) is infinite in float64, too; where nothing acted there may stand anything."""
    log_probs = torch.tensor([[0.0, -1.0, torch.inf], [-1.0, -1.0, -torch.inf]], dtype=torch.float64).requires_grad_()
    old = torch.tensor([[-900.0, -1.0, 0.0], [-1.0, -1.0, 0.0]], dtype=torch.float64)
    advantages = torch.tensor([[0.0, 0.0, 5.0], [1.0, -1.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]] * 2)
    loss, _ = SURROGATES[name](log_probs, old, advantages, mask, Clip(0.2, 0.2, 3.0))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_probs.grad.tolist() == [[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]


@pytest.mark.parametrize(("name", "ratios"), [("ppo", "token"), ("gspo", "sequence"), ("cispo", "token")])
def test_the_learner_takes_the_surrogate_of_the_setting(name, ratios):
    """Two updates on a batch: the second from a policy that has moved."""
    run = Run(1)
    changes = {"rl.loss": name, "rl.loss_agg_mode": "seq-mean-token-mean", "rl.updates_per_batch": 2,
               "rl.clip_low": 0.05, "rl.clip_high": 0.07}  # fmt: skip
    before = run.logits.detach()
    after = before + 0.3 * torch.from_numpy(np.random.default_rng(2).normal(size=before.shape))

    class Moves(Table):
        def step(self, lr):
            if self.logits is not run.logits:
                self.logits, self.loss = run.logits, 0.0
            return 0.0

    run.logits = after.requires_grad_()
    config = override(preset("tiny"), changes | {"rl.importance_cap": 0.0})
    table = Moves(before.clone().requires_grad_(), run.reference)
    (batch,) = run.batches(1, 1000)
    _, _ = PolicyUpdate(config, table, None, None).improve(batch, 0.0, 0.0)
    log_probs, old = (run.whole(lambda row, of=of: run.of(of, row)) for of in (after, before))
    if name == "cispo":
        weight = (log_probs - old).exp().detach().clamp(0.95, 1.07)
        wanted = -weight * run.advantages[:, None] * log_probs
    else:
        wanted = trl_per_token_loss(log_probs, old, run.advantages, run.mask, level=ratios, low=0.05, high=0.07)
    wanted = trl_aggregated(wanted, run.mask, "seq-mean-token-mean")
    assert table.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(run.gradient(table.loss), run.gradient(wanted), rtol=1e-6, atol=1e-9)


# --- rollout correction -----------------------------------------------------------------------------------------------


def trl_importance_ratio(old, sampling, mask, mode, clip_max):
    """``_generate_and_score_completions`` of TRL, with ``vllm_importance_sampling_clip_min`` None."""
    per_token_logps_diff = (old - sampling) * mask
    if mode in ("sequence_mask", "sequence_truncate"):
        per_token_logps_diff = per_token_logps_diff.sum(dim=-1, keepdim=True)
    ratio = torch.exp(per_token_logps_diff)
    if mode in ("sequence_truncate", "token_truncate"):
        return torch.clamp(ratio, max=clip_max)
    return ratio.masked_fill(ratio > clip_max, value=0.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights_are_trls(mode, seed):
    pair = Pair(seed)
    weights, beyond = importance_weights(pair.log_probs, pair.old, pair.mask, 1.3, mode)
    wanted = trl_importance_ratio(pair.log_probs, pair.old, pair.mask, mode, 1.3) * pair.mask
    torch.testing.assert_close(weights, wanted)
    untouched = trl_importance_ratio(pair.log_probs, pair.old, pair.mask, mode, np.inf) * pair.mask
    assert torch.equal(beyond, (untouched > 1.3) & pair.mask)
    assert beyond.any(), "else nothing would be seen of the cap"
    assert not beyond[pair.mask].all()


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_geometric_weights_by_brute_force(kind):
    """verl's ``seq_mean_k1``: a sequence is kept where the mean of its log-ratios is between -log cap and log cap."""
    pair, cap = Pair(3), 1.15
    weights, beyond = importance_weights(pair.log_probs, pair.old, pair.mask, cap, f"geometric_{kind}")
    kept = 0
    for row, length in enumerate(pair.mask.sum(1).tolist()):
        ratio = np.prod((pair.log_probs - pair.old)[row, :length].exp().tolist()) ** (1 / length)
        wanted = min(ratio, cap) if kind == "truncate" else ratio * (1 / cap <= ratio <= cap)
        assert weights[row, :length].tolist() == pytest.approx([wanted] * length)
        assert not weights[row, length:].any()
        outside = ratio > cap or (kind == "mask" and ratio < 1 / cap)
        assert beyond[row, :length].tolist() == [outside] * length
        kept += not outside
    assert 0 < kept < 6


def test_weights_by_hand():
    """A long sequence whose product overflows float32 is truncated, or left out."""
    d = torch.tensor([[1.0, -0.5, 9.0]])
    mask, zero = torch.tensor([[True, True, False]]), torch.zeros(1, 3)
    found = {mode: importance_weights(d, zero, mask, 2.0, mode)[0][0].tolist() for mode in IMPORTANCE_MODES}
    assert found["token_truncate"] == pytest.approx([2.0, np.exp(-0.5), 0.0])
    assert found["token_mask"] == pytest.approx([0.0, np.exp(-0.5), 0.0])
    assert found["sequence_truncate"] == found["sequence_mask"] == pytest.approx([np.exp(0.5)] * 2 + [0.0])
    assert found["geometric_truncate"] == found["geometric_mask"] == pytest.approx([np.exp(0.25)] * 2 + [0.0])
    # SkyRL, test_off_policy_correction.py
    d, three = torch.tensor([[0.5, -0.5, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    truncated = importance_weights(d, zero, three, 2.0, "token_truncate")[0]
    torch.testing.assert_close(truncated, torch.tensor([[1.6487, 0.6065, 2.0]]), atol=1e-4, rtol=0)
    far, all_ = torch.full((1, 300), 1.0), torch.ones(1, 300, dtype=torch.bool)
    assert importance_weights(far, 0 * far, all_, 2.0, "sequence_truncate")[0].unique().tolist() == [2.0]
    assert importance_weights(far, 0 * far, all_, 2.0, "sequence_mask")[0].unique().tolist() == [0.0]


@pytest.mark.parametrize("mode", IMPORTANCE_MODES)
def test_the_weighted_objective_is_trls_and_its_sample_size_verls(mode):
    """``per_token_loss * importance_sampling_ratio``; the size as verl's ``rollout_is_eff_sample_size``, of actions."""
    run = Run(3)
    cap = 1.05 if mode.startswith("geometric") else 1.4
    found, sums = run.loss({"rl.importance_cap": cap, "rl.importance_mode": mode}, ranks=2, micro_batch_tokens=12)
    log_probs, rollout = run.whole(lambda row: run.of(run.logits, row)), run.whole(lambda row: run.rollout[row])
    if mode.startswith("geometric"):
        ratio, _ = importance_weights(log_probs.detach(), rollout, run.mask, cap, mode)  # which a test above works
    else:
        ratio = trl_importance_ratio(log_probs.detach(), rollout, run.mask, mode, cap)
    ratio = ratio.expand_as(run.mask)
    per_token = trl_per_token_loss(log_probs, log_probs.detach(), run.advantages, run.mask, low=0.2, high=0.2) * ratio
    wanted = trl_aggregated(per_token, run.mask, "token-mean")
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(run.gradient(found), run.gradient(wanted), rtol=1e-5, atol=1e-7)
    weights, count = ratio[run.mask], sum(LENGTHS)
    metrics = _with_sample_size({name: float(value) / count for name, value in sums.items()})
    normalised = weights / weights.mean()
    assert metrics["policy/effective_sample_size"] == pytest.approx(1 / normalised.square().mean().item(), rel=1e-5)
    assert metrics["policy/importance_weight"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert "policy/importance_weight_squared" not in metrics
    assert 0 < metrics["policy/importance_capped"] < 1


def test_effective_sample_sizes_by_hand():
    assert effective_sample_size(1.0, 1.0) == 1.0
    assert effective_sample_size(0.25, 0.25) == 0.25, "one of four has all the weight: w = 0, 0, 0, 1"
    assert effective_sample_size(0.0, 0.0) == 0.0


# --- advantages -------------------------------------------------------------------------------------------------------


def trl_advantages(rewards, scale_rewards):
    """Of rewards (P, G): ``_generate_and_score_completions`` of TRL, where every completion has a reward."""
    flat, num_generations = rewards.flatten(), rewards.shape[1]
    advantages = flat - rewards.mean(1).repeat_interleave(num_generations)
    if scale_rewards == "none":
        return advantages
    std = rewards.std(1).repeat_interleave(num_generations) if scale_rewards == "group" else flat.std().expand_as(flat)
    return advantages / (std + 1e-4)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_are_divided_as_in_trl(scale_rewards):
    """But for the 1e-4 that TRL adds to the spread; here what is rounding alone is 0 instead."""
    rewards = torch.from_numpy(np.random.default_rng(0).normal(2.0, 30.0, (6, 4)))
    found = torch.cat(grpo.advantages([Outcomes(row) for row in rewards], scale_rewards))
    torch.testing.assert_close(found, trl_advantages(rewards, scale_rewards), rtol=1e-4, atol=0)


def test_prompts_of_any_size_are_divided_by_the_spread_of_all():
    groups = ([1.0, 0.0], [3.0], [2.0, 2.0, 2.0], [5.0, -1.0, 2.0])
    spread = np.std(np.concatenate(groups), ddof=1)
    found = grpo.advantages([Outcomes(torch.tensor(one, dtype=torch.float64)) for one in groups], "batch")
    wanted = [[0.5 / spread, -0.5 / spread], [0.0], [0.0] * 3, [3 / spread, -3 / spread, 0.0]]
    assert [one.tolist() for one in found] == [pytest.approx(one) for one in wanted]


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_what_is_rounding_alone_is_no_advantage(scale_rewards):
    noise = [0.3 + 1e-7 * torch.arange(4.0), torch.full((3,), 0.3), torch.tensor([0.3])]
    for one in grpo.advantages([Outcomes(rewards) for rewards in noise], scale_rewards):
        assert not one.any()


@pytest.mark.parametrize(("changes", "spread"), [({}, 0.5**0.5), ({"rl.scale_rewards": "none"}, 1.0)])
def test_the_loop_divides_as_the_setting_says(changes, spread):
    maker = BatchMaker(override(preset("tiny"), changes), None, None)
    found = maker.advantages([Outcomes(torch.tensor([1.0, 0.0], dtype=torch.float64))])
    assert found == [pytest.approx([0.5 / spread, -0.5 / spread])]
