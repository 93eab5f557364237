"""GSPO: PPO's clip on the ratio of whole sequences (Zheng et al. 2025, arXiv 2507.18071).

    s_i  = exp(1/L_i sum_t (log pi_it - log old_it))                    eq. 7
    loss = -min(s_i A_it, clip(s_i, 1 - low, 1 + high) A_it)            eq. 5, with the gradient of eq. 13 and 14

A sequence is kept or clipped as one. Its ratio is a geometric mean, so clips are far narrower than PPO's, 3e-4 and 4e-4
in the paper. The paper's objective is the mean over sequences, ``rl.loss_agg_mode`` seq-mean-token-mean.
"""

from torch import Tensor

from cola_ray.algorithms.policy_loss import LARGEST_LOG_RATIO, Clip, clipped


def sequence_policy_gradient(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: Clip
) -> tuple[Tensor, Tensor]:
    """Arguments and results as of :func:`~cola_ray.algorithms.policy_loss.clipped_policy_gradient`.

    A row is a sequence. Each action has its sequence's ratio as value and its own probability's gradient: if a sequence
    has one advantage, this adds up to the gradient of ``s_i``; if actions have their own, each gradient has its own
    advantage.
    """
    log_ratio = (log_probs - old_log_probs).detach().masked_fill(~mask, 0.0)
    of_sequence = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    own = log_probs - log_probs.detach()  # 0, with a gradient
    ratio = (of_sequence + own).masked_fill(~mask, 0.0).clamp(max=LARGEST_LOG_RATIO).exp()
    return clipped(ratio, advantages, mask, clip)
