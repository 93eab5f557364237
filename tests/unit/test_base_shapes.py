"""Families of bases over drawn shapes: grouped heads, their sizes, ties, biases, windows, scaled rotary embeddings.

Engines: parity/test_bases.py.
"""

import tempfile

import pytest
import torch
from conftest import NUM_ACTIONS, VOCAB_SIZE, assert_near, drawn_shape, random_base, scramble
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from cola_ray import CoLAForCausalLM, registry

FAMILIES = pytest.mark.parametrize("kind", registry.BUILT_IN["base"])
some = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
SIZES = {"num_actions": NUM_ACTIONS, "num_idm_layers": 1, "num_world_model_layers": 1, "num_policy_layers": 2}


def attached(base):
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        return CoLAForCausalLM.attach(folder, **SIZES).eval()


def ids_of(*shape):
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(4))


@FAMILIES
@some
@given(draw=st.randoms(use_true_random=False))
@torch.no_grad()
def test_attach_is_the_base_bit_for_bit(kind, draw):
    base = random_base(kind, drawn_shape(kind, draw))
    model, ids = attached(base), ids_of(2, 24)
    wanted = base(ids).logits
    assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model(ids, actions=ids % NUM_ACTIONS).logits, wanted)


@FAMILIES
@some
@given(draw=st.randoms(use_true_random=False))
@torch.no_grad()
def test_a_cache_changes_nothing(kind, draw):
    """Of base and policy, token by token behind a padded beginning; and what ``generate`` makes of it."""
    model = scramble(attached(random_base(kind, drawn_shape(kind, draw))))
    ids, mask = ids_of(2, 24), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :5] = 0
    e = model.encode(ids, mask)
    wanted = model.policy_logits(e, mask)
    cache, width = DynamicCache(config=model.config), ids.shape[1]
    for start, end in [(0, 10), *((at, at + 1) for at in range(10, width))]:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:end]
        piece = model.encode(ids[:, start:end], mask[:, :end], positions, cache)
        found = model.policy_logits(piece, mask[:, :end], positions, cache)
        there = mask[:, start:end].bool()
        assert_near(piece[there], e[:, start:end][there], terms=256)
        assert_near(found[there], wanted[:, start:end][there], terms=1024)
    made = [
        model.generate(
            ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, output_logits=True, eos_token_id=None,
            return_dict_in_generate=True,
        ) for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert torch.equal(made[0].actions, made[1].actions)
    for with_cache, without in zip(made[0].logits, made[1].logits, strict=True):
        assert_near(with_cache, without, terms=1024)


@FAMILIES
@some
@given(draw=st.randoms(use_true_random=False))
@torch.no_grad()
def test_what_is_saved_is_what_is_opened(kind, draw, tmp_path_factory):
    base = random_base(kind, drawn_shape(kind, draw))
    model, ids, folder = scramble(attached(base)), ids_of(2, 24), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    again = CoLAForCausalLM.from_pretrained(folder)
    tensors = again.state_dict()
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == base.config.tie_word_embeddings
    found, wanted = again(ids), model(ids)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.action_logits, wanted.action_logits)
