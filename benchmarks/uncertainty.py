"""Whether differences between a few seeds, or between paired measurements, are more than chance.

over_seeds("end", [0.86, 0.88, 0.89])        # a mean, and its Student's t interval
median_interval([1.31, 1.28, 1.36, ...])     # an interval of the median, for any distribution
in_words((1.2, 1.4), 1.0, "time")            # "more time"; "within noise" where the interval holds 1
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from cola_ray.algorithms.intervals import seed_interval

CONFIDENCE = 0.99
"""Confidence of median intervals: in tables of about thirty options, one of three tables has a chance difference."""


def over_seeds(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """``name``, ``name_low`` and ``name_high``: the mean of one value per seed and its 95 % interval, by Student's t.

    The interval covers what differs between seeds, and between the problems that they are asked. None with one seed.

    Example: values 1, 2, 3 -> 2, -0.48, 4.48.
    """
    low, high = seed_interval(values) or (None, None)
    return {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Values between which the distribution's median lies with this confidence; None if there are too few values.

    By order statistics (Thompson 1936): the number of n independent values that lie below the median, or above it, is
    distributed like the heads in n coin tosses. Nothing else is assumed about the distribution.

    Example: 8 values, confidence 0.99 -> the smallest and the largest, which miss the median in 2 of 2^8 cases.
    """
    ordered, count = sorted(values), len(values)
    outside = (1.0 - confidence) / 2
    kept = [k for k in range(1, count // 2 + 1) if stats.binom.cdf(k - 1, count, 0.5) <= outside]
    return (ordered[kept[-1] - 1], ordered[-kept[-1]]) if kept else None


def in_words(interval: tuple[float, float] | None, same: float, noun: str, margin: float = 0.0) -> str:
    """What an interval says, given the value that means no difference.

    Args:
        margin: the measured difference between two identical things.

    Example: (1.2, 1.4), same 1, "time" -> "more time"; with a margin of 0.3 "within noise".
    """
    if interval is None:
        return "too few rounds"
    low, high = interval
    if low > same + margin:
        return f"more {noun}"
    return f"less {noun}" if high < same - margin else "within noise"
