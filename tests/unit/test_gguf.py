"""GGUF files of every family that transformers reads: written here as llama.cpp writes them, and opened as a base.

What transformers would drop without a word is refused.
"""

import gguf
import numpy as np
import pytest
import torch
from conftest import random_base

from cola_ray import CoLAForCausalLM
from cola_ray.model.checkpoints import UnreadableError, faults, shape_of

SIZES = {"num_actions": 4, "num_idm_layers": 1, "num_policy_layers": 1}
# llama.cpp's architecture of a family, and what its checkpoints need for transformers to read them
WRITTEN = {
    "llama": ("llama", {"head_dim": 32}),
    "mistral": ("llama", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma3_text": ("gemma3", {"head_dim": 256, "num_attention_heads": 1, "sliding_window": 8}),
}
IDS = torch.arange(3, 27)[None]


def interleaved(weight, heads):
    """Rows of queries and keys as a Llama's file has them: the two halves of a head alternate."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(file, base, architecture, **more):
    """A file in float32 with this base.

    Args:
        more: strings of the header beside what every file has; a name with ``__`` for each dot.
    """
    config, names = base.config, gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        base.config.num_hidden_layers,
    )  # fmt: skip
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_rope_dimension_count(head)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    for name, said in more.items():
        writer.add_string(name.replace("__", "."), said)
    for name, parameter in base.named_parameters():
        module, _, kind = name.rpartition(".")
        tensor = parameter.detach().numpy()
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        if architecture == "gemma3" and module.endswith("norm"):
            tensor = tensor + 1
        writer.add_tensor(f"{names.get_name(module)}.{kind}", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind", WRITTEN)
@torch.no_grad()
def test_a_file_of_every_family_is_the_base(kind, tmp_path):
    architecture, settings = WRITTEN[kind]
    base = random_base(kind, settings)
    file = write(tmp_path / "base.gguf", base, architecture)
    shape = shape_of(file)
    opened = "llama" if kind == "mistral" else kind  # of one architecture, and without windows of one form
    assert (shape.kind, shape.head, faults(file)) == (opened, settings.get("head_dim", 32), [])
    model = CoLAForCausalLM.attach(file, **SIZES).eval()
    assert model.config.base_model_type == opened
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == base.config.tie_word_embeddings
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "settings", "more", "why"),
    [
        ("qwen2", {}, {"qwen2__rope__scaling__type": "yarn"}, "scaled rotary embeddings"),
        ("gemma3_text", WRITTEN["gemma3_text"][1], {"gemma3__rope__scaling__type": "linear"}, "scaled rotary"),
        ("qwen3", {"head_dim": 64}, {}, "the size of a qwen3 model's heads, 64,"),
    ],
)
def test_what_transformers_would_drop_is_refused(kind, settings, more, why, tmp_path):
    file = write(tmp_path / "base.gguf", random_base(kind, settings), WRITTEN[kind][0], **more)
    (said,) = faults(file)
    assert why in said
    assert said.endswith("from a GGUF file; give its safetensors files")
    with pytest.raises(UnreadableError, match=why):
        shape_of(file)
    with pytest.raises(ValueError, match=r"^model.base = .*transformers does not read"):
        CoLAForCausalLM.attach(file, **SIZES)


@pytest.mark.parametrize(("architecture", "tensor"), [("llama", "rope_freqs.weight"), ("smollm3", "token_embd.weight")])
def test_llama_3s_frequencies_and_a_family_without_files_are_refused(architecture, tensor, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", architecture)
    writer.add_tensor(tensor, np.ones(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (said,) = faults(tmp_path / "base.gguf")
    assert ("scaled rotary" if architecture == "llama" else "a smollm3 model") in said
