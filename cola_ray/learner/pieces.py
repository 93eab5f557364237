"""Rows as wide as a vocabulary, processed in pieces.

In float32, 16 384 rows of 128 256 tokens take 8.4 GB, and a loss makes several such tensors. But each row is reduced to
one or a few numbers, so the rows are reduced piece by piece.

    reduced(function, wide, ...)    any function of existing rows; a piece is computed once more for its gradient
    cross_entropies(logits, ...)    the same for a loss of existing logits
    HeadLoss(weight)                a cross-entropy whose rows exist only for it; its gradient is made with it
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

AT_ONCE = 1 << 25
"""Numbers in a piece: 261 rows of 128 256. Fewer than that are a single piece, which keeps what its gradient needs."""


def reduced(function: Callable[..., tuple[Tensor, ...]], wide: Tensor, *columns: Tensor | None) -> tuple[Tensor, ...]:
    """``function(wide, *columns)``, which reduces each row to a few numbers: (N, K), (N, ...) -> (N,), ...

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
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")

    def of_rows(some: Tensor, of: Tensor) -> tuple[Tensor, ...]:
        return (nn.functional.cross_entropy(some.float(), of, reduction="none"),)

    return reduced(of_rows, logits, targets)[0].sum()


class HeadLoss(nn.Module):
    """``sum -log softmax(W s)[x]`` over rows: a language model's head as a loss, whose logits never exist as a whole.

    A piece's gradient follows directly from its logits, so it is taken in the forward pass and nothing is recomputed;
    what stays until the backward pass is as large as the states and, if the head trains, as the head, whose gradient
    is accumulated in float32.
    (The scheme of Liger Kernel, and of ``torch.nn.functional.linear_cross_entropy``, whose operations are visible
    neither to a meter of memory nor to a counter of FLOPs.)

    Args:
        weight: (V, H), the head's own parameter, which may also be the embeddings'. As a parameter of this module, it
            is gathered by ZeRO-3.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        """(N, H), (N,) int64 -> scalar, in float32 or wider."""
        learns = torch.is_grad_enabled()
        sum_of: Tensor = _HeadLoss.apply(states, self.weight, targets, learns)
        return sum_of


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, learns: bool) -> Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        to_states, to_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        of_states = torch.empty_like(states) if to_states else None
        of_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if to_weight else None
        total, size = states.new_zeros((), dtype=exact), max(1, AT_ONCE // len(weight))
        for start in range(0, len(states), size):
            some, of = states[start : start + size], targets[start : start + size, None]
            rows = nn.functional.linear(some, weight).to(exact).log_softmax(-1)
            total -= rows.gather(-1, of).sum()
            if of_states is None and of_weight is None:
                continue
            rows = rows.exp_().scatter_add_(-1, of, rows.new_full((), -1.0).expand(of.shape)).to(weight.dtype)
            if of_states is not None:
                torch.mm(rows, weight, out=of_states[start : start + size])
            if of_weight is not None and exact is weight.dtype:
                torch.addmm(of_weight, rows.t(), some, out=of_weight)
            elif of_weight is not None:
                of_weight += rows.t() @ some
            del rows  # or it would coexist with the next piece's
        ctx.gradients = of_states, None if of_weight is None else of_weight.to(weight.dtype)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_weight = (None if one is None else one.mul_(gradient) for one in ctx.gradients)
        del ctx.gradients  # scaled in place, so a second use would be wrong and finds nothing
        return of_states, of_weight, None, None
