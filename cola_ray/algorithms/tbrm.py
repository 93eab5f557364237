"""TBRM: the policy's own logits are values, and the loss is the square of a trajectory's Bellman residual.

Yuan et al. 2025, "Trajectory Bellman Residual Minimization" (arXiv 2505.15311), for steps that have one outcome each:

    pi     = softmax(logit),  Q = logit,  V(s) = log sum_a exp logit(s, a),  so that Q - V = log pi
    loss   = mean over trajectories of (V(s_1) + sum_t log(pi(a_t|s_t) / rho(a_t|s_t)) - R / beta)^2

The brackets hold the sum of the Bellman residuals ``Q(s_t, a_t) - r_t / beta - log rho(a_t|s_t) - V(s_t+1)``, whose
values cancel along a trajectory except for the first. There is no critic, no importance weight and no clip: at the
minimum the residual of each trajectory is 0, whichever policy drew it, and ``pi = rho exp(R / beta) / exp V(s_1)`` over
trajectories, the best policy under the divergence from rho. This needs a deterministic environment: if its answers are
drawn, the square also holds the variance of V(s_t+1).

Here the logits are counted from the reference's, and all is in units of the reward, beta^2 times the loss above:

    Q(s,a) = beta (logit(s, a) - logit_rho(s, a))         ETPO's Q: pi = rho exp(Q / beta) / Z
    V(s)   = c + beta log sum_a rho(a|s) exp(Q(s, a) / beta)
           = c + beta (log sum_a exp logit(s, a) - log sum_a exp logit_rho(s, a))
    D      = V(s_1) + sum_t d_t (beta log(pi(a_t|s_t) / rho(a_t|s_t)) - r_t) - d_T+1 V(s_T+1)
    d_t    = g_1 ... g_t-1         g = 1 inside an utterance, gamma at its end, 0 where the episode ends
    loss   = mean over trajectories of D^2

The paper's V(s_1) is greater by ``log sum_a exp logit_rho(s_1, a)``, a constant of each prompt on which no softmax
depends and which pre-training leaves arbitrary. The best policy is the same, since V(s_1) can take up any constant.
Here V starts at c, the level of the first batch's rewards, so that the first gradients are about differences between
them: from 0, all actions taken would become less probable where returns are negative, the good ones too. If a limit
cuts an episode, the value after it stands for what would have followed. Legend: B sequences, T positions, K actions.
"""

import torch
from torch import Tensor


def logit_values(logits: Tensor, ref_logits: Tensor, beta: float) -> Tensor:
    """V, (..., K) each -> (...).

    Example: the reference's own logits -> 0; all of them greater by 1 -> beta, for the same policy.
    """
    return beta * (logits.logsumexp(-1) - ref_logits.logsumexp(-1))


def residuals(
    log_ratios: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    mask: Tensor,
    values: Tensor,
    final_values: Tensor,
    beta: float,
    level: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """D of each sequence, 0 where it has no action; and its discounted return. (B,) each.

    Args:
        log_ratios: (B, T), ``log(pi / rho)`` of the actions taken.
        rewards, discounts: (B, T), of each action.
        mask: (B, T) bool, where an action was taken.
        values: (B,), of the state before the first action.
        final_values: (B,), of the state after the last one; it counts where a limit cut the episode.
        level: c, which is added to all values.

    Example: log ratios [1, 2], rewards [0, 3], discounts [1, 0], value 5, beta 0.5 -> 5 + 0.5 + 1 - 3 = 3.5, and 3.
    """
    passed_on = torch.where(mask, discounts, 1.0).cumprod(1)  # up to the end of each action
    weights = torch.nn.functional.pad(passed_on[:, :-1], (1, 0), value=1.0) * mask
    returns = (weights * rewards).sum(1)
    first, last = values + level, final_values + level
    found = first + beta * (weights * log_ratios).sum(1) - passed_on[:, -1] * last - returns
    return found.masked_fill(~mask.any(1), 0.0), returns
