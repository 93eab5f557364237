"""Actions that last several tokens: which tokens of packed documents share an action, and the label of such a span.

    position t of a document     0   1   2   3   4   5   6         the action at t gives token t + 1
    its token                    p   p   p   x   x   x   x
    step of the response        -2  -1   0   1   2   3   4         n = 2
    begins a span                *       *       *       *         as does a document, or a run of learnt tokens

    u_{t+1} (N, K) ──mean over a span──> pooled (S, K) ──argmax, or straight-through Gumbel──> one action for its tokens

A span holds at most n tokens, fewer at the end of a response. In generation actions are chosen at the same steps, 0, n,
2n, ..., so that the world model is trained on the inputs that it will get. The idea of lasting latent actions is that
of arXiv 2512.20605, where a learnt switch ends them; here n is fixed.

Actions with learnt ends (``model.learnt_ends``) have no spans: each position has its own action, which may be that of
the position before.

Legend: B rows, T positions, N of them masked in, S spans, K actions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def starts_of(mask: Tensor, position_ids: Tensor, steps: Tensor, every: int) -> Tensor:
    """Where an action is chosen, (B, T) bool; with ``every`` 1 the mask itself.

    Args:
        mask: (B, T) bool, positions that are learnt from.
        position_ids: (B, T), 0 where a document begins.
        steps: (B, T), which step of its response is taken there, from 0; negative in a prompt before it.
        every: n.

    Example: mask all true, position_ids and steps 0 1 2 3 4, n = 2 -> 1 0 1 0 1.
    """
    if every == 1:
        return mask
    return mask & (~_follows(mask, position_ids, steps) | (steps.remainder(every) == 0))


def _follows(mask: Tensor, position_ids: Tensor, steps: Tensor) -> Tensor:
    """Whether the position before is masked in, and no document or response begins between the two; (B, T) bool."""
    return torch.nn.functional.pad(mask[:, :-1], (1, 0)) & (position_ids != 0) & (steps != 0)


@dataclass(frozen=True)
class Spans:
    """The spans of N masked-in positions, in the order of rows."""

    starts: Tensor  # (B, T) bool
    owner: Tensor  # (N,) int64, the span of each masked-in position
    place: Tensor  # (N,) int64, the position's index within its span
    follows: Tensor  # (N,) bool, whether the action of the position before, the row before in N, may go on here
    every: int

    @classmethod
    def of(cls, mask: Tensor, position_ids: Tensor, steps: Tensor, every: int) -> "Spans":
        """Args: as for :func:`starts_of`."""
        starts, follows = starts_of(mask, position_ids, steps, every), _follows(mask, position_ids, steps)[mask]
        if every == 1:
            owner = torch.arange(int(mask.sum()), device=mask.device)
            return cls(starts, owner, torch.zeros_like(owner), follows, every)
        begins = starts[mask]
        numbers = torch.arange(len(begins), device=mask.device)
        owner = begins.long().cumsum(0) - 1
        return cls(starts, owner, numbers - numbers[begins][owner], follows, every)

    def pooled(self, rows: Tensor) -> Tensor:
        """``1 / |s| sum of a span's rows``: (N, K) -> (S, K). Sums do not depend on a device's order of addition."""
        if self.every == 1:
            return rows
        apart = rows.new_zeros(int(self.starts.sum()), self.every, rows.shape[-1])
        apart = apart.index_put((self.owner, self.place), rows)
        lengths = torch.bincount(self.owner, minlength=len(apart))
        return apart.sum(1) / lengths[:, None].to(rows.dtype)

    def spread(self, of_spans: Tensor) -> Tensor:
        """The span's value for each of its positions: (S, ...) -> (N, ...)."""
        return of_spans if self.every == 1 else of_spans[self.owner]

    def held(self, actions: Tensor) -> Tensor:
        """The action of the position before, (N,) from (N,); -1 where none may go on.

        Example: follows 0 1 0 1, actions 7 8 9 9 -> -1 7 -1 9.
        """
        return actions.roll(1).masked_fill(~self.follows, -1)

    def persistence(self, relaxed: Tensor, mean: Tensor) -> Tensor:
        """``sum_t (p_t - m) . (p_{t-1} - m)`` where an action may go on: how often actions go on, beyond chance.

        The probability that an action goes on is ``p_t . p_{t-1}``. It would be 1 if a single action were used; this
        covariance is then 0.

        Args:
            relaxed: (N, K), p.
            mean: (K,), m, the mean of p over the batch; held fixed.
        """
        apart = relaxed - mean.detach()
        return (apart[1:] * apart[:-1]).sum(-1)[self.follows[1:]].sum()
