"""Shared by all optimizer steps: gradients must be finite, and their norm is bounded."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite; raised on every rank before the optimizer can act on it."""


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale all gradients down, in place, to a norm of at most ``limit``; 0 leaves them unchanged.

    Returns:
        their norm before, a scalar; if it is not finite, gradients are left unchanged.

    Example: gradients [3, 4], limit 1 -> [0.6, 0.8], and 5; limit 0 -> [3, 4], and 5.
    """
    owners = list(parameters)
    norm = nn.utils.get_total_norm([one.grad for one in owners if one.grad is not None])
    if limit and torch.isfinite(norm):
        nn.utils.clip_grads_with_norm_(owners, limit, norm)
    return norm
