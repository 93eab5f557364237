"""ETPO: soft Q-learning over the actions inside an utterance (Wen et al. 2024), with the sums over actions exact.

    V(y)   = sum_a pi(a|y) Qbar(y, a) - beta KL(pi(.|y) || rho(.|y))          soft value of a state, eq. 8
    Q(y,a) -> r + g V(y')         g = 1 inside an utterance, gamma at its end, 0 where the episode ends; eqs. 10, 11
    pi     minimises sum_a pi(a|y) [beta log(pi(a|y) / rho(a|y)) - Q(y, a)]   eq. 12; its optimum is
    pi*    = rho exp(Q / beta) / Z,    V* = beta log sum_a rho(a|y) exp(Q(y, a) / beta)

rho is the reference policy, beta the weight of staying near it. Backing values up action by action gives the same best
policy as weighting whole utterances (section 4.2), but an utterance of n actions has n K of them to explore, not K^n.
Over K latent actions all four sums are exact, where a vocabulary needs truncation. Choose beta by the reward's scale: a
choice is decided at a difference of about 4 beta. Legend: B sequences, T positions, K actions.
"""

import torch
from torch import Tensor

from cola_ray.algorithms.policy_loss import following


def soft_values(q: Tensor, log_probs: Tensor, ref_log_probs: Tensor, beta: float) -> Tensor:
    """V of a policy, (..., K) each -> (...).

    Example: equal pi and rho: the mean of q under pi, whatever beta is.
    """
    probs = log_probs.exp()
    return (probs * (q - beta * (log_probs - ref_log_probs)).masked_fill(probs == 0, 0.0)).sum(-1)


def best_soft_values(q: Tensor, ref_log_probs: Tensor, beta: float) -> Tensor:
    """V of the best policy, ``beta log sum_a rho exp(q / beta)``: (..., K) -> (...); never below any policy's."""
    return beta * torch.logsumexp(ref_log_probs + q / beta, -1)


def best_log_probs(q: Tensor, ref_log_probs: Tensor, beta: float) -> Tensor:
    """The best policy, ``log(rho exp(q / beta) / Z)``, (..., K). Where q is 0, rho itself."""
    return (ref_log_probs + q / beta).log_softmax(-1)


def soft_targets(rewards: Tensor, discounts: Tensor, values: Tensor, final_values: Tensor, mask: Tensor) -> Tensor:
    """``r_t + g_t V(next)`` over masked-in positions, 0 elsewhere; "next" is the next one in the row. (B, T).

    Args:
        rewards, discounts: (B, T), of each action.
        values: (B, T), soft value of the state before each action.
        final_values: (B,), of the state after the last one; it counts where a limit cut the episode.

    Example: rewards [0, 1], discounts [1, 0], values [5, 3] -> [3, 1].
    """
    return (rewards + discounts * following(values, mask, final_values)).masked_fill(~mask, 0.0)


def actor_loss(log_probs: Tensor, ref_log_probs: Tensor, q: Tensor, beta: float) -> Tensor:
    """``sum_a pi(a) [beta log(pi(a) / rho(a)) - q(a)]``, (..., K) -> (...): the negative of V.

    An expectation under pi; a mean over actions instead would have a gradient that does not depend on q.
    """
    return -soft_values(q.detach(), log_probs, ref_log_probs, beta)
