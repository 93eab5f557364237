"""The atlas counts what its texts hold, and nothing where they hold nothing."""

import numpy as np
import pytest
import torch
from conftest import NUM_ACTIONS, VOCAB_SIZE

from cola_ray.studies.atlas import Atlas


@pytest.mark.filterwarnings("error")
def test_counts_are_of_the_positions_that_a_text_has(cola):
    ids = torch.from_numpy(np.random.default_rng(0).integers(8, VOCAB_SIZE, (2, 12)))
    places = torch.arange(12).expand(2, -1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 5:] = False
    found = Atlas(NUM_ACTIONS)
    found.add(cola, ids, places, torch.zeros_like(mask))
    assert found.summary()["tokens"] == 0
    assert set(found.summary().values()) == {0.0}, "of no text, and without a warning"
    found.add(cola, ids, places, mask)
    taken = cola.inverse_dynamics_actions(cola.encode(ids, position_ids=places), position_ids=places)[mask[:, :-1]]
    summary = found.summary()
    assert summary["tokens"] == len(taken) == 11 + 5
    assert summary["alive"] == len(set(taken.tolist()))
    share = np.bincount(taken, minlength=NUM_ACTIONS) / len(taken)
    assert summary["usage_entropy"] == pytest.approx(-sum(p * np.log(p) for p in share if p))
    assert found.expected.sum() == pytest.approx(16, rel=1e-5)
    assert len(found.reachable) == 16
    assert 1 <= summary["reachable_tokens"] <= NUM_ACTIONS
