"""Intervals against closed forms, and how often they hold what they should."""

import numpy as np
import pytest
from scipy import stats

from cola_ray.algorithms.intervals import mean_interval, share_interval, with_intervals

Z = stats.norm.ppf(0.975)


@pytest.mark.parametrize(("count", "total"), [(0, 256), (256, 256), (1, 7), (40, 64), (500, 1319)])
def test_shares_have_wilsons_interval(count, total):
    """Its ends are the shares q at which the observed share lies z standard deviations off."""
    share = count / total
    for end in share_interval(count, total):
        assert abs(share - end) == pytest.approx(Z * np.sqrt(end * (1 - end) / total), abs=1e-7)


def test_nothing_right_of_256():
    assert share_interval(0, 256) == (0.0, pytest.approx(0.0148, abs=1e-4))


def test_means_have_an_interval_that_repeats_and_holds_the_mean():
    held = 0
    for trial in range(200):
        sample = np.random.default_rng(trial).exponential(size=40)
        low, high = mean_interval(sample, seed=trial)
        held += low <= 1.0 <= high
        if trial < 5:
            assert (low, high) == mean_interval(sample.tolist(), seed=trial)
    assert stats.binomtest(held, 200, 0.92).pvalue > 1e-3, "skewed samples of 40: a little below 95 %"


def test_by_name():
    found = with_intervals({"right": [0.0, 0.0], "half": [0.5, 0.5], "none": [], "one": [0.3]}, seed=0, shares=True)
    assert (found["right"], found["right_low"]) == (0.0, 0.0)
    assert found["right_high"] == pytest.approx(Z**2 / (2 + Z**2))
    assert (found["half_low"], found["half_high"]) == (0.5, 0.5)
    assert "none" not in found
    assert found["one"] == 0.3
    assert "one_low" not in found, "one value says nothing of others"
    assert with_intervals({"return": [1.0, 1.0]}, seed=0)["return_high"] == 1.0
    with pytest.raises(ValueError, match="two or more"):
        mean_interval([1.0])
