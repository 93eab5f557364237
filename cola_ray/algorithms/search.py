"""Statistics of a search over latent actions, and of the samples that it is compared with.

    score(child) = value(child)  +  c P sqrt(N) / (1 + n)          PUCT (Rosin 2011; Silver et al. 2017)

N and n count visits of parent and child, P is the policy's probability of the action that leads to the child. The value
is the mean over its visits, on a scale where the least value seen in the tree is 0 and the greatest 1 (MuZero,
Schrittwieser et al. 2020, eq. 5), so that neither the size nor the zero of rewards matters. A visit under way counts
with the least value (virtual loss), so that concurrent searchers of a tree take different leaves.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Value = TypeVar("Value", bound=Hashable)
_ROUNDING = 2.0**-22  # of float32 rewards, with two bits to spare


@dataclass
class ValueRange:
    """The least and the greatest value seen in one tree."""

    low: float = math.inf
    high: float = -math.inf

    def add(self, value: float) -> None:
        """Values that are not finite do not count."""
        if math.isfinite(value):
            self.low, self.high = min(self.low, value), max(self.high, value)

    def scaled(self, total: float, count: int) -> float:
        """The sum of ``count`` values as a sum of values in 0..1; each is 1/2 where all that were seen are equal.

        Differences no larger than the rounding of float32 rewards count as equal.

        Example: low -3, high 1, total -2 of 2 values -> (-2 + 6) / 4 = 1.
        """
        spread = self.high - self.low
        if not count or spread <= _ROUNDING * max(abs(self.low), abs(self.high)):
            return 0.5 * count
        return (total - count * self.low) / spread


def puct(total: float, visits: int, prior: float, parent_visits: int, c: float) -> float:
    """A child's priority; if it was never visited, the mean counts as 0.

    Args:
        total: sum of values in 0..1; a visit under way adds to ``visits``, not to the total.

    Example: total 1.5, 2 visits, prior 0.5, 9 parent visits, c 0.7 -> 0.75 + 0.7 * 0.5 * 3 / 3 = 1.1.
    """
    mean = total / visits if visits else 0.0
    return mean + c * prior * math.sqrt(parent_visits) / (1 + visits)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that at least one of k samples is right, unbiased from n >= k: ``1 - C(n-c, k) / C(n, k)``.

    Chen et al. 2021, eq. 1, as a product, since the binomials overflow.

    Raises:
        ValueError: k or the number of right samples is out of range.

    Example: 4 samples, 1 right, k 2 -> 1 - 3/6 = 0.5.
    """
    if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
        raise ValueError(f"pass@{k} of {num_samples} samples, {num_right} right: needs 1 <= k <= samples >= right")
    if num_samples - num_right < k:
        return 1.0
    wrong = np.arange(num_samples - num_right + 1, num_samples + 1)
    return float(1.0 - np.prod(1.0 - k / wrong))


def majority(answers: Sequence[Value | None], weights: Sequence[float] | None = None) -> Value | None:
    """The answer with the most votes, or the greatest weight; of equals, the first.

    Self-consistency (Wang et al. 2023, section 2), where the answers are those of sampled responses.

    Args:
        answers: equal if they have the same value; None if no answer could be read, which never wins.

    Example: ["4", "7", None, None, None, "7"] -> "7"; of none at all -> None.
    """
    votes: dict[Value, float] = {}
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    return max(votes, key=lambda answer: votes[answer], default=None)


def vote_weights(values: Sequence[float]) -> list[float]:
    """Votes from values of any sign and size: 0 for the least of them to 1 for the greatest, whatever their unit.

    What is not finite has no vote. Example: [-1, 3, 1] -> [0, 1, 0.5].
    """
    span = ValueRange()
    for value in values:
        span.add(value)
    return [span.scaled(value, 1) if math.isfinite(value) else 0.0 for value in values]
