"""Proportional prioritised sampling (Schaul et al. 2016, "Prioritized Experience Replay", section 3.3).

Rows are identified by numbers that only grow. At most ``capacity`` of them exist at a time, so the weight of a row is
kept in slot ``number % capacity``. Sums over blocks of slots make a draw and an update cheap without a tree.
"""

import numpy as np

Array = np.ndarray
_BLOCK = 128  # slots summed together
_LEAST = 1e-6  # lowest priority of a row, so that a row without TD error is sampled again


class Priorities:
    """Weights ``priority**alpha`` of the rows in a replay buffer, and draws in proportion to them.

    Args:
        capacity: the most rows that exist at a time.
        alpha: exponent of the priorities (eq. 1 of the paper); 0 samples uniformly.
    """

    def __init__(self, capacity: int, alpha: float) -> None:
        blocks = -(-capacity // _BLOCK)
        self.alpha = alpha
        self.weights = np.zeros(blocks * _BLOCK)
        self.block_sums = np.zeros(blocks)
        self.highest = 1.0  # priority that new rows get: the highest so far

    @property
    def total(self) -> float:
        """Sum of the weights of all rows."""
        return float(self.block_sums.sum())

    def of(self, numbers: Array) -> Array:
        """The weights of these rows."""
        return self.weights[numbers % len(self.weights)]

    def add(self, numbers: Array) -> None:
        """Give new rows the highest priority so far, so that each is likely to be sampled once."""
        self.set_weights(numbers, np.full(len(numbers), self.highest**self.alpha))

    def update(self, numbers: Array, priorities: Array) -> None:
        """Set the priorities of rows that are still in the buffer."""
        self.set_weights(numbers, np.maximum(priorities, _LEAST) ** self.alpha)

    def remove(self, numbers: Array, end: int) -> None:
        """Give evicted rows weight 0; ``end`` is the number of the next row to be added."""
        own_slot = numbers + len(self.weights) >= end  # other slots belong to new rows already
        self.set_weights(numbers[own_slot], np.zeros(int(own_slot.sum())))

    def set_weights(self, numbers: Array, weights: Array) -> None:
        """Set weights as such, e.g. those of a checkpoint; priorities go through :meth:`update`."""
        slots = numbers % len(self.weights)
        self.weights[slots] = weights
        touched = np.unique(slots // _BLOCK)
        self.block_sums[touched] = self.weights.reshape(-1, _BLOCK)[touched].sum(1)

    def draw(self, count: int, rng: np.random.Generator, end: int) -> Array:
        """Draw ``count`` row numbers, with replacement, in proportion to their weights; not sorted.

        Args:
            end: number of the next row to be added.
        """
        sums = self.block_sums.cumsum()
        drawn = rng.random(count) * sums[-1]
        # Sums are rounded, so a draw can land after the last row (of all rows or of its block); it then means that row.
        blocks = np.minimum(np.searchsorted(sums, drawn, side="right"), np.flatnonzero(self.block_sums)[-1])
        weights = self.weights.reshape(-1, _BLOCK)[blocks]
        rest = drawn - (sums[blocks] - self.block_sums[blocks])
        last = _BLOCK - 1 - (weights[:, ::-1] > 0).argmax(1)
        slots = blocks * _BLOCK + np.minimum((weights.cumsum(1) <= rest[:, None]).sum(1), last)
        size = len(self.weights)
        numbers = slots + (end // size) * size
        return np.where(numbers >= end, numbers - size, numbers)


def importance_weights(shares: Array, rows: int, beta: float) -> Array:
    """``(N p)^-beta``, divided by its maximum: corrects the bias of prioritised sampling (section 3.4 of the paper).

    Args:
        shares: (n,) probabilities ``p`` with which the sampled rows were drawn.
        rows: N, the number of rows in the buffer.
        beta: 1 corrects fully, 0 not at all.
    """
    weights = (rows * shares) ** -beta
    return weights / weights.max()
