"""Policy-gradient losses over actions. Tensors and numbers in, sums out.

Every loss is a *sum* over masked-in actions; the caller divides by the number of actions in the global
batch, which travels with it. So the gradient does not depend on micro-batches, padding or rank count.
Legend: B sequences, T positions, K actions.
"""

from typing import Literal

import torch
from torch import Tensor


def clipped_policy_gradient(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated.

    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = exp(log_probs - old_log_probs)``.

    Args:
        log_probs, old_log_probs, advantages: (B, T).
        mask: (B, T) bool, true where an action was taken by the policy.

    Returns:
        loss sum (scalar) and the number of actions where the clipped branch is the active one.
    """
    ratio = (log_probs - old_log_probs).masked_fill(~mask, 0.0).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = -torch.minimum(plain, clipped).masked_fill(~mask, 0.0)
    return loss.sum(), ((clipped < plain) & mask).sum()


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-action estimates of KL(pi || ref) from samples of pi (Schulman, "Approximating KL divergence", 2020).

    ``k1 = d``, ``k2 = d^2 / 2``, ``k3 = exp(-d) - 1 + d`` with ``d = log pi - log ref``; shape of the inputs.
    Example: log pi -1, log ref -15 -> 14, 98, 13.0000008.
    """
    difference = log_probs - ref_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.expm1(-difference) + difference


def exact_kl(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """``sum_k pi_k (log pi_k - log ref_k)`` over all actions: (..., K) -> (...).

    With 64 actions the exact value costs nothing and has no sampling variance.
    """
    # Truncated actions have pi = 0 and log pi = -inf; they contribute 0, not NaN.
    probs = log_probs.exp()
    terms = probs * (log_probs - ref_log_probs)
    return torch.where(probs > 0, terms, torch.zeros_like(terms)).sum(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """``-sum_k pi_k log pi_k``: (..., K) -> (...)."""
    probs = log_probs.exp()
    return -torch.where(probs > 0, probs * log_probs, torch.zeros_like(probs)).sum(-1)


def truncated_importance_weights(old_log_probs: Tensor, rollout_log_probs: Tensor, cap: float) -> Tensor:
    """``min(exp(old - rollout), cap)``: corrects for rollouts drawn by another engine or version, (B, T)."""
    return (old_log_probs - rollout_log_probs).exp().clamp(max=cap)
