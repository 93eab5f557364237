"""Families of bases: configurations, what is refused and why, and the presets' sizes. Engines: parity/test_bases.py."""

import pytest
import torch
from conftest import BASES, small_base, words
from transformers import AutoConfig

from cola_ray import CoLAConfig, CoLAForCausalLM, registry
from cola_ray.model import families
from cola_ray.model.conversion import plain_base, save
from cola_ray.model.modeling_cola import BY_LAYER
from cola_ray.settings.presets import preset
from cola_ray.studies.planned_work import sizes
from cola_ray.tasks.endings import end_token_ids

SIZES = {"num_actions": 8, "num_idm_layers": 3, "num_policy_layers": 2}


@pytest.fixture(params=[name for name, (kind, _) in BASES.items() if kind in registry.BUILT_IN["base"]])
def attached(request, tmp_path):
    base = small_base(request.param)
    base.save_pretrained(tmp_path)
    return base, CoLAForCausalLM.attach(tmp_path, **SIZES)


def test_new_layers_have_the_form_of_the_base_and_start_neutral(attached):
    base, model = attached
    old, new = dict(base.model.layers[0].named_parameters()), dict(model.policy.layers[0].named_parameters())
    assert {name: one.shape for name, one in new.items()} == {name: one.shape for name, one in old.items()}
    fresh = type(base.model.norm)(base.config.hidden_size).weight
    for stack in (model.policy, model.idm):
        for name, parameter in stack.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif parameter.dim() == 1:
                assert torch.equal(parameter, fresh[:1].expand_as(parameter)), f"{name}: a norm that changes nothing"


def test_a_configuration_is_read_as_it_was_written(attached, tmp_path):
    base, model = attached
    model.config.save_pretrained(tmp_path / "config")
    again = CoLAConfig.from_pretrained(tmp_path / "config")
    for name, value in base.config.to_dict().items():
        if name not in ("architectures", "model_type", "transformers_version", "_name_or_path", "dtype", *BY_LAYER):
            assert getattr(again, name) == value, name
    assert again.base_model_type == base.config.model_type
    if kinds := getattr(base.config, "layer_types", None):
        assert again.layer_types == model.config.layer_types == [*kinds, *["full_attention"] * 2]
    if rotated := getattr(base.config, "no_rope_layers", None):
        assert again.no_rope_layers == model.config.no_rope_layers == [*rotated, 1, 1]


def test_all_end_tokens_of_a_base_end_a_response(attached, tmp_path):
    base, _ = attached
    base.generation_config.eos_token_id = [2, 5]  # as Llama 3, Qwen3 and Gemma 3 have them
    base.save_pretrained(tmp_path / "base")
    tokenizer = words(additional_special_tokens=["w5", "w6"])
    model = CoLAForCausalLM.attach(tmp_path / "base", **SIZES)
    save(model, tokenizer, tmp_path / "cola")
    plain = plain_base(tmp_path / "cola", tmp_path / "plain")
    for path in (tmp_path / "base", tmp_path / "cola", plain):
        assert end_token_ids(tokenizer, path) == (2, 5), path
    assert model.generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize(("name", "window"), [("llama", False), ("mistral", True), ("qwen3", False), ("gemma3", False)])
def test_added_layers_see_a_window_where_all_of_the_base_do(name, window, tmp_path):
    small_base(name).save_pretrained(tmp_path)
    assert CoLAForCausalLM.attach(tmp_path, **SIZES).config.window == window


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_what_lies_outside_the_window_is_not_seen(name, tmp_path):
    """Of a base with windows in all layers, a policy's reach is finite; where it sees everything, it is not."""
    small_base(name).save_pretrained(tmp_path)
    model = CoLAForCausalLM.attach(tmp_path, **SIZES).eval()
    e = torch.randn(1, 40, 64)
    other = e.clone()
    other[:, 0] += 1.0
    reach = int((model.policy_logits(e) - model.policy_logits(other)).abs().amax(-1)[0].gt(1e-6).nonzero().max())
    assert reach == (2 * 7 if name == "mistral" else 39), "two layers with windows of 8 reach 14 back"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model_type": "mixtral"}, "whose layers are mixtures of experts"),
        ({"model_type": "qwen3_moe"}, "whose layers are mixtures of experts"),
        ({"model_type": "qwen2_5_vl"}, "whose prompts hold images"),
        ({"model_type": "olmo2"}, "whose layers vLLM serves through transformers only"),
        ({"model_type": "falcon_mamba"}, "whose layers keep a recurrent state"),
        ({"model_type": "gpt2"}, "a 'gpt2' model; CoLA attaches to llama, mistral"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "no windows; use a base without"),
        ({"model_type": "qwen3", "attention_bias": True}, "o_proj of this family has no bias"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "logits here have no cap"),
    ],
)
def test_refusals_say_why(settings, why):
    assert why in families.fault(settings)


@pytest.mark.parametrize("kind", registry.BUILT_IN["base"])
def test_usual_settings_of_every_family_are_taken(kind):
    assert families.fault(AutoConfig.for_model(kind).to_dict()) == ""


def test_a_family_given_by_its_path_is_a_family():
    assert "it is of type float; name an instance of BaseFamily" in families.fault({"model_type": "gpt2"}, "math:pi")


# Counted by hand: embeddings V H; a layer's matrices, biases and norms; the last norm.
_QWEN25 = 151_936 * 896 + 24 * (896 * (2 * 896 + 2 * 128 + 3 * 4864) + 896 + 2 * 128 + 2 * 896) + 896
_QWEN3 = 151_936 * 2048 + 28 * (2048 * (2 * 2048 + 2 * 1024 + 3 * 6144) + 2 * 128 + 2 * 2048) + 2048
_LLAMA = 128_256 * 2048 + 16 * (2048 * (2 * 2048 + 2 * 512 + 3 * 8192) + 2 * 2048) + 2048


@pytest.mark.parametrize(
    ("name", "base"), [("qwen2.5-0.5b", _QWEN25), ("qwen3-1.7b", _QWEN3), ("llama-3.2-1b", _LLAMA)]
)
def test_presets_know_their_bases(name, base):
    config = preset(name)
    found = sizes(config)
    assert (found.base, found.head) == (base, 0)
    assert abs(found.policy_layers / found.layers - 0.25) < 0.01
    assert found.policy > found.policy_layers * (found.base - found.width * found.vocabulary) / found.layers
