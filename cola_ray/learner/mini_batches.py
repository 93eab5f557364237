"""Rows of a rank's batch, cut into a mini-batch's micro-batches, with the results from before the first update.

    Ready, as the whole batch is cut ──> rows ──> Ready, as a mini-batch is cut
           e, reference's logits, old log-probabilities, advantages: none of them is computed again

A row is as wide as the longest one beside it: its known values are cut, or padded with 0, at its end.
Legend: B sequences, T positions, N of them scored, K actions.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from cola_ray.learner.micro_batch import Ready

_PADDED = {"frozen": ["hidden_states"], "follows": ["values"], "old": ["log_probs", "kl_penalties", "marginals"]}
"""Fields with one row per sequence, (B, T, ...)."""
_SCORED = {"frozen": ["reference_logits", "aliases"], "follows": ["control"]}
"""Fields with one row per scored position, (N, K)."""


class Rows:
    """The rows of a batch for which everything is known.

    Args:
        ready: the batch's micro-batches, in order.
    """

    def __init__(self, ready: Sequence[Ready]) -> None:
        self.ready = ready
        self.places = [(index, row) for index, one in enumerate(ready) for row in range(len(one.batch.input_ids))]
        counts = [one.batch.scored_mask.sum(1).tolist() for one in ready]
        self.scored = [[*pairwise(accumulate(of_rows, initial=0))] for of_rows in counts]

    def known(self, rows: Sequence[int], one: Ready) -> Ready:
        """A mini-batch's micro-batch with everything that is known of its rows.

        Args:
            rows: the batch's rows that are the first ones of ``one``; the rows after them have no sequence.
            one: as it was collated.
        """
        places, scored_mask = [self.places[row] for row in rows], one.batch.scored_mask
        found: dict[str, dict[str, Tensor]] = {"frozen": {}, "follows": {}, "old": {}}
        for part, name, columns in self._columns(_PADDED):
            padded = columns[0].new_zeros(*scored_mask.shape, *columns[0].shape[2:])
            for at, (index, row) in enumerate(places):
                width = min(padded.shape[1], columns[index].shape[1])
                padded[at, :width] = columns[index][row, :width]
            found[part][name] = padded
        for part, name, columns in self._columns(_SCORED):
            chosen = [columns[index][slice(*self.scored[index][row])] for index, row in places]
            filled = columns[0].new_zeros(int(scored_mask[len(rows) :].sum()), columns[0].shape[1])
            found[part][name] = torch.cat([*chosen, filled])
        parts: dict[str, Any] = {part: replace(getattr(self.ready[0], part), **of) for part, of in found.items()}
        return replace(one, **parts)

    def _columns(self, names: dict[str, list[str]]) -> list[tuple[str, str, list[Tensor]]]:
        """Each field that is not None, with its values in all micro-batches."""
        fields = [(part, name) for part, of_part in names.items() for name in of_part]
        columns = [[getattr(getattr(one, part), name) for one in self.ready] for part, name in fields]
        return [(*field, column) for field, column in zip(fields, columns, strict=True) if column[0] is not None]
