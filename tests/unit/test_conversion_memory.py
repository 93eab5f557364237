"""Attaching and opening build nothing twice: the peak is the model itself, and weights are those of before."""

import weakref

import pytest
import torch
from conftest import small_llama
from safetensors.torch import load_file, save_file
from test_model import released_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from cola_ray import CoLAConfig, CoLAForCausalLM
from cola_ray.model import conversion

SIZES = {"num_actions": 12, "num_idm_layers": 1, "num_world_model_layers": 2, "num_policy_layers": 2}


class Memory(TorchDispatchMode):
    """Bytes of all tensors that operators have made and that are alive, but for mappings of files, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage.filename is None and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return made


def size_of(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def test_what_is_counted():
    with Memory() as memory:
        kept = torch.zeros(1000)
        del kept
        other = torch.ones(500) + 1.0
    assert memory.peak == 4000
    assert sum(memory.alive.values()) == other.nbytes == 2000


def big_llama(folder, dtype=torch.bfloat16):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, eos_token_id=2,
    )).to(dtype).save_pretrained(folder, max_shard_size="500KB")  # fmt: skip


def test_attaching_holds_the_model_and_one_tensor(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, where it is counted
    monkeypatch.setattr(conversion.DiscardedDraws, "PIECE", 1 << 10)
    big_llama(tmp_path)
    with Memory() as memory:
        model = conversion.attach(tmp_path, **SIZES)
    assert model.dtype is torch.bfloat16
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert size_of(model) <= memory.peak <= size_of(model) + 2 * largest
    assert memory.peak < 1.3 * size_of(model), "before it was more than three times the model"


def test_opening_the_released_form_holds_the_model_and_one_tensor(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    tensors = released_checkpoint(tmp_path)
    small = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(small, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Memory() as memory:
        model = CoLAForCausalLM.from_pretrained(tmp_path)
    assert model.dtype is torch.bfloat16
    assert size_of(model) <= memory.peak <= 1.3 * size_of(model)
    assert torch.equal(model.codebook.weight, load_file(tmp_path / "model.safetensors")[
        "model.action_code_book.weight"].T)  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_modules_are_drawn_as_if_the_whole_model_had_been(tied, dtype, tmp_path, monkeypatch):
    """Against a model that is drawn whole in float32, converted, and given the base's weights."""
    monkeypatch.setattr(conversion.DiscardedDraws, "PIECE", 1 << 8)
    small_llama(tied).save_pretrained(tmp_path)
    found = conversion.attach(tmp_path, seed=4, dtype=dtype, **SIZES)
    known = AutoConfig.from_pretrained(tmp_path).to_dict()
    torch.manual_seed(4)
    whole = CoLAForCausalLM(CoLAConfig(**{**known, **SIZES, "model_type": "cola"})).to(dtype)
    conversion.reset_latent_modules(whole)
    base = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(found.state_dict()[name], base.get(name, tensor)), name
    for name, buffer in CoLAForCausalLM(found.config).named_buffers():
        assert torch.equal(found.get_buffer(name), buffer), f"{name} is as precise as in any other model"
