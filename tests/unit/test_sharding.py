"""Models filled tensor by tensor are those that from_pretrained opens, in every mode, whole and divided."""

import copy
from pathlib import Path

import deepspeed
import pytest
import torch
from conftest import NUM_ACTIONS, VOCAB_SIZE, assert_near, scramble, small_llama
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cola_ray import CoLAForCausalLM
from cola_ray.learner import sharding
from cola_ray.learner.engine import ZeroEngine
from cola_ray.learner.policies import LatentPolicy, SoftQPolicy, TokenPolicy, make_policy
from cola_ray.learner.reward_model import PairedRewards
from cola_ray.learner.sharding import checkpoint_layers, fill
from cola_ray.learner.stage_module import TRAINED, StageModule
from cola_ray.model.tensors import Tensors, empty
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

MODES = {
    "latent": {},
    "aliases": {"rl.marginal_aliases": True},
    "without base": {"rl.cache_hidden_states": True},
    "actor_free": {"rl.algorithm": "etpo", "rl.actor_free": True},
    "token": {"rl.action_space": "token"},
    "adapters": {"rl.action_space": "token", "rl.lora_rank": 4},
    "steering": {"rl.action_space": "token", "rl.steering": "all"},
}


def settings(mode, dtype="float32"):
    return override(preset("tiny"), {"model.num_actions": NUM_ACTIONS, "model.dtype": dtype} | MODES[mode])


def opened_whole(mode, path, dtype):
    """The same policies from transformers' own loader."""
    config, kind = settings(mode), getattr(torch, dtype)
    if config.rl.action_space == "token":
        llama = LlamaForCausalLM.from_pretrained(path, dtype=kind)
        return TokenPolicy(llama, lora_rank=config.rl.lora_rank, steering=config.rl.steering)
    cola = CoLAForCausalLM.from_pretrained(path, dtype=kind)
    if config.rl.actor_free:
        torch.manual_seed(config.seed)
        return SoftQPolicy(cola, config.rl.kl_coef)
    return LatentPolicy(cola, config.rl.cache_hidden_states, config.rl.marginal_aliases)


def values(module):
    """Parameters by name, whole, wherever they are."""
    found = {}
    for name, parameter in module.named_parameters():
        whole = (
            parameter.ds_tensor[: parameter.ds_numel].view(parameter.ds_shape) if parameter.numel() == 0 else parameter
        )
        found[name] = whole.detach()
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", list(MODES))
def test_a_policy_is_what_from_pretrained_opens(mode, dtype, cola_dir, base_dir):
    path = str(cola_dir if settings(mode).rl.action_space == "latent" else base_dir)
    torch.manual_seed(3)  # of adapters
    wanted = opened_whole(mode, path, dtype)
    torch.manual_seed(3)
    found = make_policy(settings(mode, dtype), path)
    assert_same(dict(found.named_parameters()), dict(wanted.named_parameters()))
    assert_same(dict(found.named_buffers()), dict(wanted.named_buffers()))
    assert [module.training for module in found.modules()] == [module.training for module in wanted.modules()]


@pytest.mark.parametrize("mode", list(MODES))
def test_a_divided_policy_is_the_whole_one(mode, cola_dir, base_dir, one_rank):
    path = str(cola_dir if settings(mode).rl.action_space == "latent" else base_dir)
    torch.manual_seed(3)
    wanted = opened_whole(mode, path, "float32")
    torch.manual_seed(3)
    found = make_policy(settings(mode), path)
    divided = {name for name, parameter in found.named_parameters() if hasattr(parameter, "ds_id")}
    marks = ("q.", ".lora_", ".vector")
    small = {name for name, _ in found.named_parameters() if any(mark in name for mark in marks)}
    assert divided == {name for name, _ in found.named_parameters()} - small
    assert_same(values(found), dict(wanted.named_parameters()))


def mapped(folder):
    """Addresses at which this process maps files below a folder: (first, one after the last)."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [parts[0].split("-") for parts in lines if len(parts) == 6 and parts[5].startswith(str(folder))]
    return [(int(first, 16), int(last, 16)) for first, last in ranges]


@pytest.mark.parametrize("shards", ["10GB", "60KB"])
@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.float32), (False, torch.bfloat16)])
def test_no_two_whole_tensors_are_there_at_once(tied, dtype, shards, tmp_path, one_rank, monkeypatch):
    """Tensors are pages of the files; those that are converted share one buffer."""
    llama = scramble(small_llama(tied))
    llama.save_pretrained(tmp_path, max_shard_size=shards)
    in_files, places = [], []
    place = sharding.place

    def placed(module, name, tensor):
        address = tensor.untyped_storage().data_ptr()
        in_files.append(any(first <= address < last for first, last in mapped(tmp_path)))
        places.append(address)
        return place(module, name, tensor)

    monkeypatch.setattr(sharding, "place", placed)
    model = empty(LlamaForCausalLM, AutoConfig.from_pretrained(tmp_path), dtype)
    fill(model, Tensors(tmp_path))
    assert len(places) == len(list(model.parameters()))
    assert in_files == [dtype is torch.float32] * len(places)
    assert dtype is torch.float32 or len({*places}) == 1
    assert not mapped(tmp_path)
    assert_same(values(model), dict(llama.to(dtype).named_parameters()))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_parameters_that_no_file_has_are_drawn_or_refused(base_dir):
    def classifier():
        config = AutoConfig.from_pretrained(base_dir, num_labels=1)
        torch.manual_seed(5)
        return empty(AutoModelForSequenceClassification, config, torch.float32)

    with pytest.raises(ValueError, match=r"lacks \['score.weight'\]"):
        fill(classifier(), Tensors(base_dir))
    found = classifier()
    fill(found, Tensors(base_dir), initialise=found._init_weights)
    torch.manual_seed(5)
    wanted = AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=1, dtype=torch.float32)
    assert_same(dict(found.named_parameters()), dict(wanted.named_parameters()))


def test_tensors_of_other_shapes_are_refused(base_dir):
    config = copy.deepcopy(AutoConfig.from_pretrained(base_dir))
    config.intermediate_size *= 2
    with pytest.raises(ValueError, match=r"other shapes than those of .*mlp"):
        fill(empty(LlamaForCausalLM, config, torch.float32), Tensors(base_dir))


# --- where activations and shares are kept ----------------------------------------------------------------------------


def trained_by(mode, config, path):
    """A module of each kind that the learner trains, whole; the prefixes that train; and a loss of it."""
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(2))
    mask, scored = torch.ones_like(ids), torch.zeros(2, 9, dtype=torch.bool)
    scored[0, 3:6] = scored[1, 2:4] = True
    if mode in MODES:
        policy = make_policy(config, path)
        return policy, policy.trained, lambda of: of(ids, mask, scored)[0].logsumexp(-1).sum()
    if mode == "reward":
        torch.manual_seed(5)
        classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        if config.cluster.gradient_checkpointing:
            checkpoint_layers(classifier)
        return PairedRewards(classifier), ("classifier.",), lambda of: of(ids, mask).sum()
    kind = LlamaForCausalLM if mode == "base" else CoLAForCausalLM
    model = kind.from_pretrained(path, dtype=torch.float32)
    if config.cluster.gradient_checkpointing:
        checkpoint_layers(model)
    places, seeds = torch.arange(9).expand(2, -1), torch.tensor([1, 2])
    return StageModule(model, mode, config), TRAINED[mode], lambda of: of(ids, places, mask.bool(), seeds, False)[0]


KINDS = ["latent", "without base", "token", "adapters", "base", "actions", "policy", "fta_idm", "fta_policy", "reward"]


def settings_of(kind, **changes):
    return override(settings(kind if kind in MODES else "latent"), changes)


def path_of(kind, cola_dir, base_dir):
    return str(base_dir if kind in ("token", "adapters", "base", "reward") else cola_dir)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "without base"])
def test_checkpointed_layers_have_the_same_gradients(kind, cola_dir, base_dir, one_rank):
    path, found, computed = path_of(kind, cola_dir, base_dir), [], []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        config = settings_of(kind, **{"cluster.gradient_checkpointing": checkpointing})
        module, trained, loss = trained_by(kind, config, path)
        passes = []
        for name, layer in module.named_modules():
            if isinstance(layer, LlamaDecoderLayer) and "reference" not in name:
                layer.mlp.register_forward_pre_hook(lambda *_, passes=passes, name=name: passes.append(name))
        zero = ZeroEngine(module, trained, lr=1e-3, betas=(0.9, 0.95))
        zero.backward(loss(zero.engine), last=True)
        found.append({name: safe_get_full_grad(one).clone() for name, one in zero.trained})
        computed.append(len(passes))
        zero.close()
    assert computed[1] > computed[0], "layers that train are computed twice"
    for name, plain in found[0].items():
        assert_near(found[1][name], plain)


def test_without_a_base_the_policy_is_checkpointed_too(cola_dir):
    policy = make_policy(settings_of("without base", **{"cluster.gradient_checkpointing": True}), str(cola_dir))
    assert all(layer.gradient_checkpointing and layer.training for layer in policy.cola.policy.layers)
    assert not any(module.training for module in policy.reference.modules())


@pytest.mark.parametrize("kind", ["latent", "token", "adapters", "fta_idm"])
def test_offloaded_weights_and_optimizers_step_alike(kind, cola_dir, base_dir, one_rank, monkeypatch):
    """On a CPU all is in host memory: what shows is what DeepSpeed is asked for, and that steps are the same."""
    path, found, places = path_of(kind, cola_dir, base_dir), [], []
    init = deepspeed.zero.Init.__init__

    def watched(self, *given, **named):
        if "remote_device" in named:
            places.append(named["remote_device"])
        init(self, *given, **named)

    monkeypatch.setattr(deepspeed.zero.Init, "__init__", watched)
    for offloaded in (False, True):
        torch.manual_seed(3)
        places.clear()
        config = settings_of(kind, **{"cluster.offload_frozen": offloaded})
        module, trained, loss = trained_by(kind, config, path)
        zero = ZeroEngine(
            module, trained, lr=1e-3, betas=(0.9, 0.95), offload_optimizer=offloaded, offload_frozen=offloaded
        )
        assert zero.engine.zero_cpu_offload() == offloaded
        for _ in range(3):
            zero.backward(loss(zero.engine), last=True)
            zero.step()
        found.append({name: safe_get_full_fp32_param(one).clone() for name, one in zero.trained})
        assert ("cpu" in places) == offloaded
        assert not places or None in places, "what trains stays on the device"
        zero.close()
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "without base"])
def test_frozen_layers_are_gathered_whole(kind, cola_dir, base_dir, one_rank):
    """DeepSpeed has its hooks at each of them, and inside at none; where something trains, at every module."""
    config = settings_of(kind)
    module, trained, loss = trained_by(kind, config, path_of(kind, cola_dir, base_dir))
    zero = ZeroEngine(module, trained, lr=1e-3, betas=(0.9, 0.95))
    for layer in (layer for layer in module.modules() if isinstance(layer, LlamaDecoderLayer)):
        trains = any(parameter.requires_grad for parameter in layer.parameters())
        assert layer._forward_pre_hooks
        assert all(bool(inside._forward_pre_hooks) == trains for inside in layer.modules() if inside is not layer)
    for _ in range(3):
        zero.backward(loss(zero.engine), last=True)
        zero.step()
    zero.close()
