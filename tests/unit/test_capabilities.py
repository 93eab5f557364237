"""Scores and intervals that are made of the evaluation harness's results."""

import math

import pytest

from cola_ray.algorithms.intervals import share_interval
from cola_ray.studies.capabilities import _scores


def test_scores_have_their_filters_and_intervals():
    right, count = 30, 40
    share = right / count
    error = math.sqrt(share * (1 - share) / (count - 1))
    results = {
        "arc": {"alias": "arc", "acc,none": share, "acc_stderr,none": error, "sample_len": 40},
        "none": {"acc,none": 0.0, "acc_stderr,none": 0.0},
        "gsm8k": {
            "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A",
            "exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": 0.1,
        },
        "wiki": {"word_perplexity,none": 20.0, "word_perplexity_stderr,none": 2.0},
    }  # fmt: skip
    counts = {"arc": {"effective": count}, "none": {"effective": 256}, "gsm8k": {"effective": 9}, "wiki": {}}
    found = _scores({"results": results, "n-samples": counts})
    assert (found["arc acc_low"], found["arc acc_high"]) == share_interval(right, count)
    assert (found["none acc_low"], found["none acc_high"]) == share_interval(0, 256)
    assert found["gsm8k exact_match (strict-match)"] == 0.25
    assert found["gsm8k exact_match (flexible-extract)"] == 0.5, "one filter does not write over the other"
    assert found["gsm8k exact_match (flexible-extract)_high"] == pytest.approx(0.5 + 0.196)
    assert "gsm8k exact_match (strict-match)_low" not in found
    assert (found["wiki word_perplexity_low"], found["wiki word_perplexity_high"]) == pytest.approx((16.08, 23.92))
    assert not any("stderr" in name for name in found)
