"""CISPO: the importance ratio is clipped, and no action loses its gradient (MiniMax 2025, arXiv 2506.13585).

    loss = -sg(clip(ratio, 1 - low, 1 + high)) A log pi                 section 3.1; sg: without gradient

PPO's clip removes the gradient of rare actions, whose ratio moves first. The paper clips only from above, which is
``rl.clip_low`` 1; TRL's ``epsilon_high`` is the bound itself, 1 + ``rl.clip_high``.
"""

from torch import Tensor

from cola_ray.algorithms.policy_loss import Clip


def clipped_weight_policy_gradient(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: Clip
) -> tuple[Tensor, Tensor]:
    """Arguments and results as of :func:`~cola_ray.algorithms.policy_loss.clipped_policy_gradient`."""
    ratio = (log_probs - old_log_probs).detach().masked_fill(~mask, 0.0).exp()
    weight = ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    loss = -(weight * advantages * log_probs).masked_fill(~mask, 0.0)
    return loss, (weight != ratio) & mask
