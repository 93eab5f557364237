"""The surrogate of the advantages in the policy's loss: a built-in one, with its clips, or a user's function.

rl.loss, or the algorithm's ─┬─ ppo, gspo, cispo ─> with Clip(rl.clip_low, rl.clip_high, rl.clip_c) ─┬─> Surrogate
                             └─ file.py:name ─────> its shape checked, 0 where masked ───────────────┘
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cola_ray.algorithms.policy_loss import Clip, clipped_policy_gradient
from cola_ray.settings.algorithms import Algorithm
from cola_ray.settings.config import RLConfig

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(log_probs, old_log_probs, advantages, mask) -> loss of each action``, all (B, T)."""
Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""The same arguments -> the loss of each action, 0 where masked, and which are clipped; (B, T)."""


def surrogate(algorithm: Algorithm, rl: RLConfig) -> Surrogate:
    """The surrogate of a run's algorithm."""
    loss = algorithm.policy_loss()
    if algorithm.has_own_loss:
        return of_ones_own(loss)
    return functools.partial(loss, clip=_clip(rl))


def of_ppo(rl: RLConfig) -> Surrogate:
    return functools.partial(clipped_policy_gradient, clip=_clip(rl))


def _clip(rl: RLConfig) -> Clip:
    return Clip(rl.clip_low, rl.clip_high, rl.clip_c)


def of_ones_own(loss: PolicyLoss) -> Surrogate:
    """A user's function as a surrogate; it reports no clipped actions."""

    def checked(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        of_each = loss(log_probs, old_log_probs, advantages, mask)
        if of_each.shape != advantages.shape:
            shapes = f"{tuple(of_each.shape)}, and a loss for each action has {tuple(advantages.shape)}"
            raise ValueError(f"rl.loss returned a tensor of shape {shapes}")
        return of_each.masked_fill(~mask, 0.0), torch.zeros_like(mask)

    return checked
