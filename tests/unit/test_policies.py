"""What trains in either action space: logits at the positions asked for, references that stay, weights that go out."""

import copy
import json

import pytest
import torch
from conftest import NUM_ACTIONS, VOCAB_SIZE, assert_near, scramble, small_llama
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from cola_ray import CoLAForCausalLM
from cola_ray.learner import policies
from cola_ray.learner.policies import LatentPolicy, Steered, TokenPolicy, export
from cola_ray.model.conversion import plain_base, with_mlp_biases


@pytest.fixture
def inputs():
    """ids (2, 7), the second row padded; five positions are scored."""
    ids = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(2))
    mask, scored = torch.ones(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = 0
    scored[0, 3:6] = scored[1, 2:4] = True
    return ids, mask, scored


@pytest.fixture
def llama():
    return scramble(small_llama()).eval()


def test_latent_logits_at_the_scored_positions(cola, inputs):
    ids, mask, scored = inputs
    policy = LatentPolicy(copy.deepcopy(cola))
    logits, e, reference, aliases = policy(*inputs)
    assert aliases is None
    assert_near(e[mask.bool()], cola.encode(ids, mask)[mask.bool()])
    assert_near(logits, cola.policy_logits(cola.encode(ids, mask), mask)[scored])
    assert torch.equal(logits, reference)
    assert policy.num_actions == logits.shape[-1] == NUM_ACTIONS


def test_aliases_are_the_actions_that_say_the_next_token(cola, inputs, monkeypatch):
    monkeypatch.setattr(policies, "_TRIED_AT_ONCE", 2)
    ids, mask, scored = inputs
    e = cola.encode(ids, mask)
    for row, place in scored.nonzero().tolist():  # a text that some action says, at least
        action = torch.tensor(row + place)
        ids[row, place + 1] = cola.world_model_logits(cola.encode(ids, mask)[row, place], action).argmax()
    e = cola.encode(ids, mask)
    _, _, _, aliases = LatentPolicy(copy.deepcopy(cola), with_aliases=True)(ids, mask, scored)
    for (row, place), found in zip(scored.nonzero().tolist(), aliases, strict=True):
        tried = [cola.world_model_logits(e[row, place], torch.tensor(a)).argmax() for a in range(NUM_ACTIONS)]
        assert found.tolist() == [token == ids[row, place + 1] for token in tried]
        assert found[row + place]


TRAINED = {
    "all weights": {},
    "adapters": {"lora_rank": 4},
    "a vector a layer": {"steering": "all"},
    "one vector": {"steering": "last"},
}
trained_part = pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)


@trained_part
def test_token_logits_and_a_reference_that_stays(llama, inputs, trained):
    ids, mask, scored = inputs
    wanted = llama(ids, attention_mask=mask).logits[scored].detach()
    policy = TokenPolicy(copy.deepcopy(llama), **trained)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name.startswith(policy.trained))
    logits, e, reference, _ = policy(*inputs)
    assert_near(logits, wanted)
    assert_near(reference, wanted)
    states = llama.model(ids, attention_mask=mask).last_hidden_state
    assert_near(e[mask.bool()], states[mask.bool()])
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first moves adapters alone that begin at 0
        loss = policy(*inputs)[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits, _, reference, _ = policy(*inputs)
    assert (logits - wanted).abs().max() > 1e-3
    assert_near(reference, wanted)


@trained_part
def test_what_goes_out_is_the_policy_as_a_plain_llama(llama, inputs, trained, tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    for one in (llama, words):
        one.save_pretrained(tmp_path / "start")
    start = tmp_path / "start"
    if "steering" in trained:
        start = with_mlp_biases(start, tmp_path / "biased")
        llama = LlamaForCausalLM.from_pretrained(start)
    policy = TokenPolicy(copy.deepcopy(llama), **trained)
    for number, (name, parameter) in enumerate(policy.named_parameters()):
        if name.startswith(policy.trained):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    tensors = {one.name: one.merged(*(p.detach() for p in one.parameters)) for one in policy.published()}
    export(str(start), tensors, tmp_path / "end")
    ids, mask, scored = inputs
    found = LlamaForCausalLM.from_pretrained(tmp_path / "end")(ids, attention_mask=mask).logits[scored]
    assert_near(found, policy(*inputs)[0])
    count = sum(p.numel() for name, p in policy.named_parameters() if name.startswith(policy.trained))
    whole, layers = sum(p.numel() for p in llama.parameters()), llama.config.num_hidden_layers
    match trained:
        case {"lora_rank": _}:
            assert count < 0.2 * whole
        case {"steering": which}:
            assert count == llama.config.hidden_size * (layers if which == "all" else 1)
        case _:
            assert count == whole


def test_a_vector_is_added_to_what_its_layer_gives(llama, inputs):
    """Against transformers' hidden states: the stream behind each layer is shifted, and later layers read that."""
    ids, mask, _ = inputs
    policy = TokenPolicy(copy.deepcopy(llama), steering="all")
    vectors = [module.vector for module in policy.modules() if isinstance(module, Steered)]
    assert len(vectors) == llama.config.num_hidden_layers
    for number, vector in enumerate(vectors):
        vector.data.normal_(generator=torch.Generator().manual_seed(number))
    stream = llama.model.embed_tokens(ids)
    places = mask.cumsum(1) - 1
    rotary, causal = llama.model.rotary_emb(stream, places), torch.full((7, 7), -torch.inf).triu(1)
    for layer, vector in zip(llama.model.layers, vectors, strict=True):
        stream = layer(stream, attention_mask=causal[None, None], position_embeddings=rotary) + vector
    wanted = llama.lm_head(llama.model.norm(stream))
    found = policy(ids, mask, mask.bool())[0]
    assert_near(found, wanted[mask.bool()])


def test_a_base_with_biases_for_vectors_is_the_base(llama, inputs, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path / "base")
    made = with_mlp_biases(tmp_path / "base", tmp_path / "biased")
    again = LlamaForCausalLM.from_pretrained(made)
    assert again.config.mlp_bias
    assert torch.equal(again(inputs[0]).logits, llama(inputs[0]).logits)
    before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    with_mlp_biases(tmp_path / "base", tmp_path / "biased")
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == before, "made once"


def test_nobody_pays_for_a_reference_that_nobody_asks_for(llama, inputs):
    policy = TokenPolicy(llama, with_reference=False)
    assert sum(p.numel() for p in policy.parameters()) == sum(p.numel() for p in llama.parameters())
    _, e, reference, _ = policy(*inputs)
    assert e is None
    assert reference is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", ["10GB", "60KB"])
def test_the_base_of_a_checkpoint_is_a_plain_llama(tmp_path, inputs, tied, shards):
    scramble(small_llama(tied)).save_pretrained(tmp_path / "llama")
    cola = CoLAForCausalLM.attach(tmp_path / "llama", num_actions=4, num_idm_layers=1, num_policy_layers=1)
    cola.save_pretrained(tmp_path / "cola", max_shard_size=shards)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path / "cola")
    path = plain_base(tmp_path / "cola", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(path)
    assert type(base) is LlamaForCausalLM
    assert not json.loads((path / "config.json").read_text()).keys() & {"num_actions", "num_code", "world_model_form"}
    ids = inputs[0]
    assert_near(base(ids).logits, cola.lm_head(cola.encode(ids)))
    assert plain_base(path, tmp_path / "other") == path, "a plain Llama is its own base"
