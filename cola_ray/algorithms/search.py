"""Statistics of a search over latent actions, and of the samples it is compared with.

    score(child) = total / n  +  c P sqrt(N) / (1 + n)          PUCT (Rosin 2011; Silver et al. 2017)

N and n count visits of parent and child, P is the policy's probability of the action that leads to the child. A visit
under way counts as one without value (virtual loss), so that searchers at the same tree take different leaves.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


def puct(total: float, visits: int, prior: float, parent_visits: int, c: float) -> float:
    """What a child is worth trying; of one never visited, the mean counts as 0.

    Example: total 1.5, 2 visits, prior 0.5, 9 parent visits, c 0.7 -> 0.75 + 0.7 * 0.5 * 3 / 3 = 1.1.
    """
    mean = total / visits if visits else 0.0
    return mean + c * prior * math.sqrt(parent_visits) / (1 + visits)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that of k samples one at least is right, unbiased from n >= k: ``1 - C(n-c, k) / C(n, k)``.

    Chen et al. 2021, eq. 1, as a product, since the binomials overflow.

    Example: 4 samples, 1 right, k 2 -> 1 - 3/6 = 0.5.
    """
    if num_samples - num_right < k:
        return 1.0
    wrong = np.arange(num_samples - num_right + 1, num_samples + 1)
    return float(1.0 - np.prod(1.0 - k / wrong))


def mean_interval(values: Sequence[float], draw: np.random.Generator, resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of a mean: (low, high)."""
    means = draw.choice(np.asarray(values), (resamples, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def majority(answers: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """The answer with the most votes, or the greatest weight; of equals, the one that came first. "" of none.

    Example: ["4", "7", "7"] -> "7".
    """
    votes: Counter[str] = Counter()
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        votes[answer] += weight  # type: ignore[assignment]  # weights are floats
    return max(votes, key=lambda answer: votes[answer], default="")
