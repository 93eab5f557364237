"""How different texts are: against brute force over pairs, and by hand."""

import itertools

import numpy as np
import pytest

from cola_ray.settings.config import override
from cola_ray.settings.presets import preset
from cola_ray.studies.diversity import distinct_n, mean_cosine, measure
from cola_ray.studies.study import text_prefixes


def test_mean_cosine_is_the_mean_over_pairs():
    vectors = np.random.default_rng(0).normal(size=(7, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [float(a @ b) for a, b in itertools.combinations(vectors, 2)]
    assert mean_cosine(vectors) == pytest.approx(np.mean(pairs))


def test_distinct_n_by_hand():
    assert distinct_n(["a b", "a c"], 1) == 3 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n(["", "a"], 2) == 0


def test_groups_are_measured_apart():
    pytest.importorskip("sacrebleu", reason="make evals installs it")
    corners = {"one": [1.0, 0.0], "two": [0.0, 1.0]}
    groups = [["one", "one", "one"], ["one", "two", "two"]]
    found = measure(groups, lambda texts: np.array([corners[text] for text in texts]), seed=0)
    assert found["similarity"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["diversity"] == pytest.approx(1 / found["similarity"])
    assert found["distinct_1"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert found["self_bleu"] == pytest.approx((100 + (0 + 100 + 100) / 3) / 2)
    assert found["similarity_low"] <= found["similarity"] <= found["similarity_high"] == 1.0
    assert found["diversity_low"] == 1.0


def test_beginnings_are_as_long_as_the_settings_say():
    text = (list(range(20)), [False] * 20)
    answered = (list(range(30, 50)), [False] * 3 + [True] * 17)
    config = override(preset("tiny"), {"diversity.prefix_tokens": 5, "diversity.prefixes": 2})
    assert text_prefixes(config, [text, answered, text]) == [[0, 1, 2, 3, 4], [30, 31, 32]]
    longer = override(config, {"diversity.prefix_tokens": 32})
    assert text_prefixes(longer, [text]) == [list(range(10))], "at most half of a text"
