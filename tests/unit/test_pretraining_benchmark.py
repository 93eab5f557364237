"""The benchmark of pre-training at a toy size: its variants do the same work, and its floor is that of the plan."""

import sys

import pytest
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import pretraining


@pytest.mark.parametrize("stage", pretraining.STAGES)
def test_all_variants_take_the_same_steps(stage, tmp_path, one_rank):
    losses = {}
    for variant in ("bare", "ours", "states", "states"):  # one writes, and one reads
        step = pretraining.stepper(variant, stage, "toy", tmp_path)
        losses.setdefault(variant, []).append([step(number) for number in pretraining.STEPS])
    (bare,), (ours,) = losses["bare"], losses["ours"]
    assert ours == pytest.approx(bare, rel=1e-5)
    assert losses["states"] == [ours, ours]
    assert ours[-1] != ours[0]


def test_a_token_costs_what_its_products_do(tmp_path):
    """By hand: SmolLM2's 106 M parameters of layers twice, attention over 256 positions, and the head both ways."""
    config = pretraining.settings("smollm2", tmp_path)
    layer, attention = 3_538_944.0, 256 * 576.0
    base = 30 * (2 * layer + 4 * attention)
    idm = 2 * (6 * layer + 14 * attention) + 2 * 64 * 576 * 3 - 2 * 576 * (576 + 2 * 192)
    world, head = 2 * 6 * 5 * 576 * 1536, 4 * 576 * 49_152
    found = pretraining.flops_of("actions", "smollm2", config, scored=1.0)
    assert found["head"] == head
    assert found["spared"] == base
    assert found["all"] == pytest.approx(base + idm + world + head, rel=0.02)
    assert found["spared"] > 0.4 * found["all"]
    (flops, _), (of_head, _) = pretraining.products("smollm2", 256).values()
    assert flops == 2 * 256 * layer
    assert of_head == 2 * 256 * 576 * 49_152
