"""95 % intervals: Wilson's for shares, a bootstrap for means, Student's t for means over a few seeds.

A bootstrap says nothing where all values are equal; Wilson's interval of 0 right of 256 is 0 to 0.015.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

_RESAMPLES = 2000


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """(low, high) of a mean: percentiles of the means of resamples (Efron 1979).

    Args:
        seed: of the resamples; the same seed gives the same interval, whatever was computed before.

    Raises:
        ValueError: fewer than two values, which do not tell how far others would lie.
    """
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        raise ValueError(f"an interval of {len(sample)} values; needs two or more")
    draw = np.random.default_rng(seed)
    means = [sample[draw.integers(0, len(sample), len(sample))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def seed_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """(low, high) of a mean of one value per seed, by Student's t; None with one seed, which says nothing of others.

    It is wide with three seeds, 4.3 standard errors.

    Example: values 1, 2, 3 -> (-0.48, 4.48).
    """
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return None
    mean = float(sample.mean())
    half = float(stats.t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))
    return mean - half, mean + half


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's interval (1927) of the share ``count / total``.

    Example: 0 of 256 -> (0, 0.0148).
    """
    found = stats.binomtest(count, total).proportion_ci(0.95, "wilson")
    return float(found.low), float(found.high)


def with_intervals(samples: Mapping[str, Sequence[float]], seed: int, shares: bool = False) -> dict[str, float]:
    """Means of samples by name, and their intervals as ``<name>_low`` and ``<name>_high``.

    An empty sample has no mean, and a mean of one value no interval.

    Args:
        shares: values are 1 for what counts and 0 for what does not; or shares of their own, such as pass@k of one
            problem, which have the interval of a mean unless all are 0 or 1.
    """
    found: dict[str, float] = {}
    for name, values in samples.items():
        if not len(values):
            continue
        found[name] = float(np.mean(values))
        if shares and set(values) <= {0.0, 1.0}:
            low, high = share_interval(int(sum(values)), len(values))
        elif len(values) > 1:
            low, high = mean_interval(values, seed)
        else:
            continue
        found |= {f"{name}_low": low, f"{name}_high": high}
    return found
