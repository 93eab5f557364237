"""Four ranks load a model: each holds a quarter of every parameter, and together they hold the checkpoint."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from conftest import NUM_ACTIONS, free_port
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from cola_ray import CoLAForCausalLM
from cola_ray.learner.engine import ZeroEngine, join_group
from cola_ray.learner.policies import make_policy
from cola_ray.learner.reward_model import open_classifier
from cola_ray.learner.sharding import fill
from cola_ray.model.conversion import opened
from cola_ray.model.tensors import empty
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

RANKS = 4
PADS = SimpleNamespace(pad_token_id=0, eos_token_id=0)


def settings(**changes):
    return override(preset("tiny"), {"model.num_actions": NUM_ACTIONS, **changes})


def divided(module, whole=()):
    """Check this rank's shares; returns what all ranks hold together, by name."""
    together = {}
    for name, parameter in module.named_parameters():
        if name.startswith(tuple(whole)) or ".lora_" in name:
            continue
        share = -(-parameter.ds_numel // RANKS)
        assert parameter.numel() == 0, f"{name} is whole"
        assert parameter.ds_tensor.numel() <= share, name
        shares = [torch.empty_like(parameter.ds_tensor) for _ in range(RANKS)]
        torch.distributed.all_gather(shares, parameter.ds_tensor)
        together[name] = torch.cat(shares)[: parameter.ds_numel].view(parameter.ds_shape)
    return together


def assert_same(found, wanted):
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


def rank_of(rank, port, cola_dir, base_dir):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    torch.set_num_threads(1)
    join_group("gloo")
    cola = CoLAForCausalLM.from_pretrained(cola_dir).state_dict()
    llama = LlamaForCausalLM.from_pretrained(base_dir).state_dict()

    latent = make_policy(settings(), cola_dir)
    assert_same(divided(latent), {name: cola[latent.stored(name)] for name, _ in latent.named_parameters()})
    free = make_policy(settings(**{"rl.algorithm": "etpo", "rl.actor_free": True}), cola_dir)
    assert_same(divided(free, whole=["q."]), {f"cola.{name}": tensor for name, tensor in cola.items()})
    tokens = make_policy(settings(**{"rl.action_space": "token"}), base_dir)
    assert_same(divided(tokens), {name: llama[tokens.stored(name)] for name, _ in tokens.named_parameters()})
    adapters = make_policy(settings(**{"rl.action_space": "token", "rl.lora_rank": 4}), base_dir)
    found = divided(adapters.policy.get_base_model())
    assert_same(found, {name: llama[name.replace(".base_layer", "")] for name in found})

    shape, tensors = opened(cola_dir)  # as in a pre-training stage
    stage = empty(CoLAForCausalLM, shape, torch.float32)
    fill(stage, tensors)
    assert_same(divided(stage), cola)

    config = settings(**{"model.dtype": "float32"})
    classifier = open_classifier(base_dir, PADS, config)
    whole = open_classifier(base_dir, PADS, config, whole=True)
    assert type(whole) is type(classifier)
    assert_same({"score.weight": classifier.score.weight}, whole.state_dict())
    zero = ZeroEngine(classifier, ("",), lr=1e-3, betas=(0.9, 0.95))
    assert_same(divided(classifier), AutoModelForSequenceClassification.from_pretrained(
        base_dir, num_labels=1, dtype=torch.float32).state_dict() | {"score.weight": whole.score.weight})  # fmt: skip
    ids = torch.arange(3, 11)[None]
    torch.testing.assert_close(zero.engine(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=0)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_of_four_ranks_loads_a_quarter(cola_dir, base_dir):
    mp.start_processes(rank_of, (free_port(), cola_dir, base_dir), nprocs=RANKS, start_method="fork")
