"""Policy-gradient losses over actions: from tensors and numbers to a loss for each action.

The caller weights them by ``rl.loss_agg_mode`` (aggregation.py), sums them, and divides by the number of actions in the
global batch, which travels with the batch. So the gradient does not depend on micro-batches, padding or rank count.
Legend: B sequences, T positions, K actions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["exact", "k1", "k2", "k3"]


@dataclass(frozen=True)
class Clip:
    """How far ratios may be from 1."""

    low: float
    high: float
    c: float = 0.0  # bound on a ratio's weight where the advantage is negative; 0: no bound


LARGEST_LOG_RATIO = 20.0
"""Ratios are at most e^20: one that overflows has no gradient, and 0 * inf is not a number."""


def clipped_policy_gradient(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: Clip
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated, of ``exp(log_probs - old_log_probs)``.

    Args:
        log_probs, old_log_probs, advantages: (B, T).
        mask: (B, T) bool, true where an action was taken by the policy.

    Returns:
        the loss of each action, and where the clipped branch is the active one (bool); (B, T), 0 where masked.
    """
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0.0)
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    return clipped(ratio, advantages, mask, clip)


def clipped(ratio: Tensor, advantages: Tensor, mask: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)``, results as of :func:`clipped_policy_gradient`.

    With c, the objective is no less than ``c A`` where A is negative: dual clip (Ye et al. 2019, "Mastering Complex
    Control in MOBA Games with Deep Reinforcement Learning", arXiv 1912.09729). Without it, the loss of a bad action
    that has become probable has no bound.
    """
    plain = ratio * advantages
    limited = ratio.clamp(1.0 - clip.low, 1.0 + clip.high) * advantages
    gained, active = torch.minimum(plain, limited), limited < plain
    if clip.c:
        bound = clip.c * advantages
        beyond = (advantages < 0) & (bound > gained)
        gained, active = torch.where(beyond, bound, gained), active | beyond
    return -gained.masked_fill(~mask, 0.0), active & mask


def kl_penalties(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    divergences: Tensor,
    mask: Tensor,
    discounts: Tensor,
    estimator: Estimator,
) -> Tensor:
    """Each action's KL penalty, before the coefficient, to be charged like a reward; (B, T).

    The objective is ``V_t = E[r_t + g_t V_t+1] - beta D_t``, with D_t the divergence of the state in which action t is
    taken. Its gradient with respect to the policy there: ``E[grad log pi(a_t) (r_t + g_t V_t+1)] - beta grad D_t``.

    - exact: D_t is differentiated in the loss, and action t is charged ``g_t D_t+1``, of the state that it leads to.
    - k1: D_t is the expectation of ``log pi(a_t) - log ref(a_t)``, which is charged to action t itself; since
      ``E[grad log pi] = 0``, ``E[k1_t grad log pi(a_t)] = grad D_t``.

    Both have the same expected gradient; exact has none of the sampling variance.

    Args:
        log_probs, ref_log_probs: (B, T), of the actions taken.
        divergences: (B, T), exact, of the states that they were taken in.
        mask: (B, T).
        discounts: (B, T), g.

    Example: exact, divergences [1, 10, 100, 1000], discounts [1, 0.5, 1, 0] -> [10, 50, 1000, 0], which sum up to
    [560, 550, 1000, 0] along those discounts.
    """
    if estimator == "exact":
        return discounts * following(divergences, mask, torch.zeros_like(divergences[:, 0]))
    return kl_estimate(log_probs, ref_log_probs, estimator)


def discounted_sum_to_go(values: Tensor, mask: Tensor, discounts: Tensor) -> Tensor:
    """``y_t = values_t + discounts_t y_next`` over masked-in positions only, (B, T); "next" is the next one in the row.

    Positions outside the mask (observations, padding) are skipped. Used to spread per-step KL penalties backwards, and
    for returns-to-go of turns.

    Example: values [1, 2, 3], mask [1, 0, 1], discounts 0.5 -> [2.5, 0, 3].
    """
    followed = (mask.flip(1).cumsum(1).flip(1) - mask.long()) > 0
    if not bool((mask & followed & (discounts != 1.0)).any()):
        return (values * mask).flip(1).cumsum(1).flip(1) * mask
    out = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        here = mask[:, t].bool()
        running = torch.where(here, values[:, t] + discounts[:, t] * running, running)
        out[:, t] = torch.where(here, running, torch.zeros_like(running))
    return out


def following(values: Tensor, mask: Tensor, final_values: Tensor) -> Tensor:
    """For every masked-in position the value of the next one in its row, ``final_values`` (B,) for the last; (B, T).

    Example: values [1, 2, 3], mask [1, 0, 1], final 9 -> [3, 0, 9].
    """
    width = values.shape[1]
    places = torch.arange(width, device=values.device).where(mask, width)
    here_or_later = places.flip(1).cummin(1).values.flip(1)
    later = torch.nn.functional.pad(here_or_later[:, 1:], (0, 1), value=width)
    return torch.cat([values, final_values[:, None]], 1).gather(1, later).masked_fill(~mask, 0.0)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, gain: float = 0.1) -> float:
    """A coefficient that steers the divergence towards ``target`` (Ziegler et al. 2019, section 2.2).

    ``e = clip((kl - target) / target, -0.2, 0.2)``, ``kl_coef (1 + gain e)``.

    Example: kl 0.3, target 0.1, coefficient 0.5 -> 0.51.
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return kl_coef * (1.0 + gain * error)


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
    # Truncated actions have pi = 0 and log pi = -inf; they contribute 0 to value and gradient, not NaN.
    probs = log_probs.exp()
    return (probs * (log_probs - ref_log_probs).masked_fill(probs == 0, 0.0)).sum(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """``-sum_k pi_k log pi_k``: (..., K) -> (...)."""
    probs = log_probs.exp()
    return -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1)


def marginal_log_probs(log_probs: Tensor, aliases: Tensor, actions: Tensor, possible: Tensor) -> Tensor:
    """Log-probabilities of the tokens said, each summed over all actions that give it: ``log sum_z pi(z)``, (N,).

    What follows depends only on the token, so ``E[A grad log sum_z pi(z)]`` is the same gradient as
    ``E[A grad log pi(a)]``, without the variance of which of these actions was drawn.

    Args:
        log_probs: (N, K).
        aliases: (N, K) bool, which actions give the token that was said.
        actions: (N,), those taken.
        possible: (N,) bool, whether the action taken has a probability; elsewhere the result is meaningless, but has
            no gradient that is not finite.
    """
    # The action taken did give the token, whatever this engine's rounding finds.
    saying = aliases.scatter(-1, actions[:, None], True)
    summed = log_probs.masked_fill(~saying, float("-inf"))
    # A row without any such action would have the gradient of log 0, which no later mask removes.
    return summed.masked_fill(~possible[:, None], 0.0).logsumexp(-1)


def mean_under(log_probs: Tensor, values: Tensor) -> Tensor:
    """``sum_k pi_k c_k``: (N, K) each -> (N,); what a control variate c adds to the objective.

    An advantage loses ``c(a)`` and the objective gains the mean of c, exactly: the expected gradient is the same, since
    ``E[c(a) grad log pi(a)] = grad E[c(a)]``, and its variance is that of ``A - c(a)`` (Gu et al. 2017, "Q-Prop").
    """
    return (log_probs.exp() * values).sum(-1)
