"""The soft Q of archer_soft: fitted to advantages of whole utterances; the critic's V learns from its advantages.

    A(s, u), one per sequence ─> what is still to come of it, at each action ─> squared error of Q(h, action taken)
    Q(h, all actions) ─> the policy's update
                     └─> sum_j w(h_j, a_j) of each utterance ── in_order ──> the loop, for the critic's next steps

Equations: ``algorithms/archer_soft.py``. Legend: B sequences, N scored positions, K actions, H hidden size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cola_ray.algorithms.archer_soft import path_targets, soft_advantages
from cola_ray.batch import Batch
from cola_ray.learner.micro_batch import Distributions, Encoded
from cola_ray.learner.soft_q import SoftQLearner
from cola_ray.learner.value import ValueHead
from cola_ray.model.modeling_cola import QHead

Array = np.ndarray


class DuelingHead(nn.Module):
    """``Q(e, a) = V(e) + D(e, a)`` (Wang et al. 2016, eq. 7): (..., H) -> (..., K), float32.

    What is learnt about a state from the actions taken there is learnt for all actions. Otherwise actions that were
    never taken would keep their initial values, and look best in a state that turns out to be bad. The mean of D is not
    subtracted, unlike in eq. 9: its gradient would move the other actions the opposite way, and with Adam just as far.
    """

    def __init__(self, width: int, num_actions: int) -> None:
        super().__init__()
        self.value, self.differences = ValueHead(width), QHead(width, num_actions)
        self.start_at(0.0)

    def start_at(self, level: float) -> None:
        """Set the value of every action in every state to ``level``."""
        nn.init.zeros_(self.value.layers[-1].get_parameter("weight"))
        nn.init.constant_(self.value.layers[-1].get_parameter("bias"), level)

    def forward(self, e: Tensor) -> Tensor:
        found: Tensor = self.value(e)[..., None] + self.differences(e)
        return found


class PathQLearner(SoftQLearner):
    """Online head, target head and Adam, as for ETPO's Q; the rewards are utterances' advantages."""

    of_utterances: Tensor | None = None
    """(rows of the rank's batch,): soft advantages of the batch fitted last, summed over each utterance."""

    def _head(self, width: int, num_actions: int) -> nn.Module:
        return DuelingHead(width, num_actions)

    def _start_at(self, head: DuelingHead, level: float) -> None:
        head.start_at(level)

    def _goals(self, encoded: Encoded, of: Distributions, beta: float) -> Tensor:
        taken = self._taken(self.target, encoded, of, beta)
        return path_targets(encoded.rewards, encoded.batch.discounts, taken, encoded.batch.action_mask)

    def fit(
        self, batches: Sequence[Encoded], distributions: Sequence[Distributions], num_actions: int, beta: float
    ) -> dict[str, Tensor]:
        """As for ETPO's Q; afterwards ``of_utterances`` belongs to these batches."""
        sums = super().fit(batches, distributions, num_actions, beta)
        with torch.no_grad():
            taken = (self._taken(self.online, *pair, beta) for pair in zip(batches, distributions, strict=True))
            self.of_utterances = torch.cat([of_each.sum(1) for of_each in taken])
        return sums

    @staticmethod
    def _taken(head: DuelingHead, encoded: Encoded, of: Distributions, beta: float) -> Tensor:
        """Soft advantages of the actions taken, (B, T)."""
        batch = encoded.batch
        every = soft_advantages(head(encoded.hidden_states[batch.scored_mask]), of.reference, beta)
        return batch.place(batch.taken(every)).masked_fill(~batch.action_mask, 0.0)


@torch.no_grad()
def in_order(batch: Batch, of_rows: Tensor) -> Array:
    """Gather the numbers of all ranks' sequences, in the order in which the sequences were collated; all ranks call.

    Args:
        batch: this rank's.
        of_rows: (rows,), including rows without a sequence.
    """
    assert batch.places is not None, "whoever tells of sequences has their places kept"
    mine = torch.full((2, batch.num_rows), -1.0, dtype=torch.float64, device=of_rows.device)
    mine[0, : len(batch.places)] = torch.from_numpy(batch.places).to(mine)
    mine[1] = of_rows
    ranks = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(ranks, mine)
    places, numbers = torch.cat(ranks, 1).cpu().numpy()
    found = np.zeros(int((places >= 0).sum()), np.float32)
    found[places[places >= 0].astype(int)] = numbers[places >= 0]
    return found
