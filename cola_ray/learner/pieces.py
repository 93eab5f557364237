"""Rows that are as wide as a vocabulary, a piece at a time.

In float32, 16 384 rows of 128 256 tokens take 8.4 GB, and a loss makes several such tensors. What a row comes to is one
number or a few, so the rows are reduced piece by piece, and a piece is computed once more for its gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

AT_ONCE = 1 << 25
"""Numbers in a piece: 261 rows of 128 256. Fewer in all are one piece, which keeps what its gradient needs."""


def reduced(function: Callable[..., tuple[Tensor, ...]], wide: Tensor, *columns: Tensor | None) -> tuple[Tensor, ...]:
    """``function(wide, *columns)``, from rows to a few numbers of each: (N, K), (N, ...) -> (N,), ...

    Args:
        function: works row by row.
        wide: (N, K).
        columns: (N, ...) each, or None, which stays None.
    """
    if wide.numel() <= AT_ONCE:
        return function(wide, *columns)
    size = max(1, AT_ONCE // wide.shape[-1])
    starts = range(0, len(wide), size)
    cut = [[None] * len(starts) if column is None else column.split(size) for column in (wide, *columns)]
    made = [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in zip(*cut, strict=True)]  # fmt: skip
    return tuple(torch.cat(column) for column in zip(*made, strict=True))


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of ``-log softmax(logits)[target]`` in float32: (N, V), (N,) -> scalar."""
    if logits.numel() <= AT_ONCE:
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")

    def of_rows(some: Tensor, of: Tensor) -> tuple[Tensor, ...]:
        return (torch.nn.functional.cross_entropy(some.float(), of, reduction="none"),)

    return reduced(of_rows, logits, targets)[0].sum()
