"""What the policy minimises on a micro-batch: the sum of the losses that the settings ask for.

    logits ─> log-probs of all actions, of those taken ─┬─> surrogate of the advantages                rl.loss
                                                        │   or ETPO's actor loss, or TBRM's squared residuals
                                                        ├─> - mean of the control variate    rl.control_variate
                                                        ├─> + KL to the reference            rl.kl_in, rl.kl_estimator
                                                        └─> - entropy                        rl.entropy_coef

Each loss is a function in ``algorithms/``; here losses are chosen, weighted and measured. All are sums over actions,
weighted by ``rl.loss_agg_mode``, which the learner divides by the number of actions in the global batch; TBRM's is
over sequences. Legend: B sequences, T positions, N of them scored, K actions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_ray.algorithms import etpo
from cola_ray.algorithms.importance import importance_weights
from cola_ray.algorithms.policy_loss import (
    discounted_sum_to_go,
    entropy,
    exact_kl,
    kl_estimate,
    kl_penalties,
    marginal_log_probs,
    mean_under,
)
from cola_ray.learner.micro_batch import (
    ActionValues,
    Advantages,
    Distributions,
    Frozen,
    MicroBatch,
    Rewards,
    Scored,
)
from cola_ray.learner.pieces import reduced
from cola_ray.learner.residual import trajectory_residuals
from cola_ray.learner.surrogate import Surrogate, of_ppo
from cola_ray.model.modeling_cola import action_log_probs
from cola_ray.settings.config import RLConfig


@dataclass(frozen=True)
class Scores:
    """Scores of the policy and the reference at the scored positions of a micro-batch; (B, T)."""

    log_probs: Tensor  # of the actions taken; -inf where top_k leaves one out
    ref_log_probs: Tensor
    kl: Tensor  # exact, in each state
    entropies: Tensor
    kept: Distributions | None

    @property
    def every(self) -> Distributions:
        """Log-probabilities of all actions."""
        assert self.kept is not None, "whoever reads them asks score() for every one"
        return self.kept


@dataclass(frozen=True)
class Taken:
    """Log-probabilities of the actions taken, (B, T); 0 where an action is not ``possible``."""

    possible: Tensor  # bool: taken, with a probability above 0 under the policy now and the one before the batch
    log_probs: Tensor
    ref_log_probs: Tensor
    old_log_probs: Tensor
    said: Tensor  # of the tokens said, if aliases are summed over; else like ``log_probs``
    old_said: Tensor


@dataclass(frozen=True)
class _Weights:
    """Importance weights, for rollouts of an older version or with another engine's arithmetic; (B, T)."""

    values: Tensor  # 0 where an action is not possible
    capped: Tensor  # bool

    @classmethod
    def of_one(cls, taken: Taken) -> "_Weights":
        return cls(taken.possible.to(taken.log_probs.dtype), torch.zeros_like(taken.possible))


def score(
    logits: Tensor,
    reference_logits: Tensor | None,
    batch: MicroBatch,
    temperature: float,
    top_k: int,
    top_p: float = 1.0,
    *,
    every: bool = False,
    entropy_trains: bool = False,
) -> Scores:
    """(N, K) logits -> log-probabilities of the actions taken, divergences and entropies.

    Args:
        reference_logits: (N, K); None uses the policy as the reference, at divergence 0.
        temperature, top_k, top_p: of the rollouts.
        every: also return log-probabilities of all actions; otherwise those of a vocabulary are never held at once.
        entropy_trains: the entropies get a gradient.
    """

    def scored(of: Tensor, limit: int, share: float) -> Tensor:
        of = of.to(torch.promote_types(of.dtype, torch.float32))
        # Each pass over a vocabulary's logits costs time: none is made that changes nothing.
        heat = None if temperature == 1 else torch.full(of.shape[:-1], temperature, device=of.device)
        kept = torch.full(of.shape[:-1], limit, device=of.device) if limit else None
        return action_log_probs(of, heat, kept, of.new_full(of.shape[:-1], share) if share < 1 else None)

    def of_all(logits: Tensor, reference_logits: Tensor | None) -> Distributions:
        policy = scored(logits, top_k, top_p)
        # Not truncated: the reference's support must cover the policy's.
        return Distributions(policy, policy.detach() if reference_logits is None else scored(reference_logits, 0, 1.0))

    def of_rows(logits: Tensor, reference_logits: Tensor | None, actions: Tensor) -> tuple[Tensor, ...]:
        return _of_rows(of_all(logits, reference_logits), actions, entropy_trains, refers=reference_logits is not None)

    actions, kept = batch.actions[batch.scored_mask], of_all(logits, reference_logits) if every else None
    columns = reduced(of_rows, logits, reference_logits, actions) if kept is None else _of_rows(
        kept, actions, entropy_trains, refers=reference_logits is not None
    )  # fmt: skip
    log_probs, ref_log_probs, kl, entropies = (batch.place(column) for column in columns)
    log_probs, ref_log_probs = (one.masked_fill(~batch.action_mask, 0.0) for one in (log_probs, ref_log_probs))
    return Scores(log_probs, ref_log_probs, kl, entropies, kept)


def _of_rows(every: Distributions, actions: Tensor, entropy_trains: bool, refers: bool) -> tuple[Tensor, ...]:
    """For n rows: log-probabilities of ``actions``, the reference's, divergence and entropy, (n,) each.

    Args:
        refers: whether the reference is not the policy itself.
    """
    taken, ref_taken = (one.gather(-1, actions[:, None])[:, 0] for one in (every.policy, every.reference))
    with torch.set_grad_enabled(entropy_trains and torch.is_grad_enabled()):
        entropies = entropy(every.policy)
    kl = exact_kl(every.policy, every.reference) if refers else torch.zeros_like(entropies)
    return taken, ref_taken, kl, entropies


def before_updates(scores: Scores, batch: MicroBatch, aliases: Tensor | None, rl: RLConfig) -> Scored:
    """What later updates on the same batch compare with."""
    possible = batch.action_mask & scores.log_probs.isfinite()
    penalties = kl_penalties(
        scores.log_probs.masked_fill(~possible, 0.0), scores.ref_log_probs.masked_fill(~possible, 0.0), scores.kl,
        batch.action_mask, batch.discounts, rl.kl_estimator,
    )  # fmt: skip
    marginals = None if aliases is None else _marginals(scores, batch, aliases, possible)
    return Scored(scores.log_probs, penalties, marginals)


def policy_objective(
    logits: Tensor,
    batch: MicroBatch,
    frozen: Frozen,
    follows: Advantages | ActionValues | Rewards,
    old: Scored | None,
    *,
    rl: RLConfig,
    kl_coef: float,
    temperature: float,
    top_k: int,
    top_p: float = 1.0,
    surrogate: Surrogate | None = None,
    loss_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a sum over the actions taken, and sums of metrics over them.

    An action that ``top_k`` or ``top_p`` leaves out now, or left out before the batch's first update, has no
    probability to compare: its weight is 0, and it is counted.

    Args:
        logits: (N, K), at ``batch.scored_mask``.
        follows: what the policy is trained on.
        old: None on the first update, where the policy before the batch is the current one.
        kl_coef: the current one; it may be adapted from step to step. It is ETPO's and TBRM's beta.
        temperature, top_k, top_p: of the rollouts.
        surrogate: of the advantages, which are already scaled by importance weights; None: PPO's.
        loss_weights: (B, 1), of each sequence's actions, see algorithms/aggregation.py; None: 1.
    """
    mask = batch.action_mask

    def weighed(of_each: Tensor) -> Tensor:
        return of_each if loss_weights is None else loss_weights.to(of_each.dtype) * of_each

    scores = score(
        logits, frozen.reference_logits, batch, temperature, top_k, top_p, entropy_trains=bool(rl.entropy_coef),
        every=isinstance(follows, ActionValues) or frozen.aliases is not None
        or (isinstance(follows, Advantages) and follows.control is not None),
    )  # fmt: skip
    taken, more = _taken(scores, old, batch, frozen.aliases), dict[str, Tensor]()
    if isinstance(follows, Rewards):
        assert frozen.reference_logits is not None, "rl.kl_coef is above 0"
        residuals, values = trajectory_residuals(
            logits, frozen.reference_logits, batch, follows, taken.log_probs - taken.ref_log_probs, kl_coef, temperature
        )
        losses, weights = [weighed(residuals.square()).sum()], _Weights.of_one(taken)
        clipped = torch.zeros((), device=logits.device)
        more = {"tbrm/value": weighed(values.detach()).sum(), "tbrm/residual": weighed(residuals.detach()).sum()}
    elif isinstance(follows, ActionValues):
        actor = etpo.actor_loss(scores.every.policy, scores.every.reference, follows.q, kl_coef)
        losses, weights = [weighed(batch.place(actor))[mask].sum()], _Weights.of_one(taken)
        clipped = torch.zeros((), device=logits.device)
    else:
        losses, weights, clipped = _policy_gradient(
            follows, scores, taken, old, batch, rl, kl_coef, surrogate or of_ppo(rl), weighed
        )
    if rl.entropy_coef:
        losses.append(-rl.entropy_coef * weighed(scores.entropies)[mask].sum())
    loss = sum(losses[1:], losses[0])
    measured = {
        "policy/loss": loss.detach(),
        "policy/clip_fraction": clipped.float(),
        "policy/entropy": scores.entropies.detach()[mask].sum(),
    }
    if frozen.reference_logits is not None:
        measured["policy/kl"] = scores.kl.detach()[mask].sum()
    return loss, measured | more | _rollout_metrics(taken, weights, batch)


def _policy_gradient(
    follows: Advantages,
    scores: Scores,
    taken: Taken,
    old: Scored | None,
    batch: MicroBatch,
    rl: RLConfig,
    kl_coef: float,
    surrogate: Surrogate,
    weighed: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], _Weights, Tensor]:
    """The surrogate of advantages, a control variate's mean, and the KL that is differentiated.

    Returns:
        loss sums, importance weights, and the number of clipped actions.
    """
    weights = _Weights.of_one(taken)
    if rl.importance_cap:
        weights = _Weights(*importance_weights(
            taken.old_log_probs, batch.rollout_log_probs, taken.possible, rl.importance_cap, rl.importance_mode
        ))  # fmt: skip
    advantages = follows.values
    if rl.kl_in == "reward" and not follows.hold_kl:  # an action is charged the penalties from it on
        penalties = old.kl_penalties if old is not None else kl_penalties(
            taken.log_probs.detach(), taken.ref_log_probs, scores.kl.detach(), batch.action_mask, batch.discounts,
            rl.kl_estimator,
        )  # fmt: skip
        advantages = advantages - kl_coef * discounted_sum_to_go(penalties, batch.action_mask, batch.discounts)
    if follows.control is not None:
        advantages = advantages - batch.place(batch.taken(follows.control))
    advantages = weights.values * advantages
    of_each, clipped = surrogate(taken.said, taken.old_said, advantages, taken.possible)
    losses = [weighed(of_each).sum()]
    if follows.control is not None:
        mean = batch.place(mean_under(scores.every.policy, follows.control))
        losses.append(-weighed(mean)[batch.action_mask].sum())
    if rl.kl_estimator == "exact":
        # With KL in the reward, the other half is in the advantages: their divisor applies here, too.
        whole = kl_coef if follows.deviation is None or rl.kl_in == "loss" else kl_coef / follows.deviation
        losses.append((whole * weighed(scores.kl)[batch.action_mask]).sum())
    elif rl.kl_in == "loss":
        estimates = kl_estimate(taken.log_probs, taken.ref_log_probs, rl.kl_estimator)
        losses.append(kl_coef * weighed(estimates)[taken.possible].sum())
    return losses, weights, clipped.sum()


def _taken(scores: Scores, old: Scored | None, batch: MicroBatch, aliases: Tensor | None) -> Taken:
    old_log_probs = scores.log_probs.detach() if old is None else old.log_probs
    possible = batch.action_mask & scores.log_probs.isfinite() & old_log_probs.isfinite()
    log_probs, ref_log_probs, old_log_probs = (
        one.masked_fill(~possible, 0.0) for one in (scores.log_probs, scores.ref_log_probs, old_log_probs)
    )
    said, old_said = log_probs, old_log_probs
    if aliases is not None:
        said = _marginals(scores, batch, aliases, possible)
        old_said = said.detach() if old is None or old.marginals is None else old.marginals
    return Taken(possible, log_probs, ref_log_probs, old_log_probs, said, old_said)


def _marginals(scores: Scores, batch: MicroBatch, aliases: Tensor, possible: Tensor) -> Tensor:
    """Log-probabilities of the generated tokens, (B, T); 0 where not ``possible`` (B, T)."""
    scored = batch.scored_mask
    summed = marginal_log_probs(scores.every.policy, aliases, batch.actions[scored], possible[scored])
    return batch.place(summed).masked_fill(~possible, 0.0)


@torch.no_grad()
def _rollout_metrics(taken: Taken, weights: _Weights, batch: MicroBatch) -> dict[str, Tensor]:
    """The distance between the rollouts' policy and the learner's: sums over actions, and a maximum."""
    mask = batch.action_mask
    mismatch = (taken.old_log_probs - batch.rollout_log_probs).abs().masked_fill(~taken.possible, 0.0)
    return {
        "policy/left_out": (mask & ~taken.possible).float().sum(),
        "policy/importance_weight": weights.values[mask].sum(),
        "policy/importance_weight_squared": weights.values[mask].square().sum(),
        "policy/importance_capped": weights.capped.float().sum(),
        "policy/rollout_mismatch": mismatch.sum(),
        "policy/rollout_mismatch_max": mismatch.max(),
    }
