"""The plan's formulas against the modules themselves, without weights, at shapes small enough for a test."""

import sys

import pytest
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import full_shapes

from cola_ray.learner import pieces
from cola_ray.studies import planned_work

SMALL = {
    "vocab_size": 16_384, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 3, "head_dim": 64,
    "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [*((mode, "bfloat16") for mode in full_shapes.MODES), ("latent", "float32"), ("token", "float32"),
     ("actions", "float32"), ("fta_idm", "float32")],
)  # fmt: skip
def test_memory_and_flops_are_those_of_the_modules(monkeypatch, mode, dtype):
    for module in (pieces, planned_work):  # 64 rows of the vocabulary in a piece
        monkeypatch.setattr(module, "AT_ONCE", 1 << 20)
    found = full_shapes.compare(mode, SMALL, 4, 512, dtype)
    assert found["FLOPs, plan / measured"] == pytest.approx(1, abs=0.02)
    assert found["static, plan / measured"] == pytest.approx(1, abs=0.02)
    if mode != "generate":
        assert found["activations, plan / measured"] == pytest.approx(1, abs=0.1)


def test_a_vocabulary_in_one_piece_keeps_more_and_the_plan_knows(monkeypatch):
    at_once = full_shapes.compare("token", SMALL, 4, 512)
    assert at_once["activations, plan / measured"] == pytest.approx(1, abs=0.1)
    for module in (pieces, planned_work):
        monkeypatch.setattr(module, "AT_ONCE", 1 << 20)
    assert full_shapes.compare("token", SMALL, 4, 512)["activations GB"] < 0.6 * at_once["activations GB"]
