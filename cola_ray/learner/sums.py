"""Metrics as sums over actions: over micro-batches, then over ranks. A name that ends in ``_max`` is a maximum."""

import torch
from torch import Tensor


def add(sums: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add a micro-batch's sums to those of the earlier ones."""
    for name, value in found.items():
        known = sums.get(name, torch.zeros_like(value))
        sums[name] = torch.maximum(known, value) if name.endswith("_max") else known + value.detach()


def means(sums: dict[str, Tensor], num_actions: int) -> dict[str, float]:
    """Means over all ranks' ``num_actions`` actions; maxima stay maxima. All ranks call."""
    out = {}
    for name, value in sums.items():
        is_max = name.endswith("_max")
        total = value.detach().clone().double()
        torch.distributed.all_reduce(
            total, torch.distributed.ReduceOp.MAX if is_max else torch.distributed.ReduceOp.SUM
        )
        out[name] = float(total) if is_max else float(total) / num_actions
    return out
