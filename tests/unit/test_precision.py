"""bfloat16 where it costs nothing: logits and values are float32, and so are sums of gradients."""

import copy

import pytest
import torch
from conftest import NUM_ACTIONS
from deepspeed.utils import safe_get_full_grad
from torch import nn

from cola_ray.learner import engine
from cola_ray.learner.engine import ZeroEngine
from cola_ray.learner.policies import LatentPolicy
from cola_ray.learner.sharding import zero_config
from cola_ray.model.modeling_cola import QHead


def scored(model, generator):
    """Ids, mask and scored positions of random tokens."""
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    return ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)


def test_action_logits_of_bfloat16_states_are_not_rounded(cola, monkeypatch):
    model = LatentPolicy(copy.deepcopy(cola)).to(torch.bfloat16)
    seen = {}
    model.cola.policy.norm.register_forward_hook(lambda *one: seen.update(states=one[-1]))
    logits = model(*scored(model, torch.Generator().manual_seed(0)))[0].double()
    head = model.cola.policy.head.weight
    exact = seen["states"].double() @ head.double().T
    assert logits.shape[-1] == NUM_ACTIONS
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()
    rounded = nn.functional.linear(seen["states"], head).double()
    assert (rounded - exact).abs().max() > 1e-3 * exact.abs().max(), "what a bfloat16 head would have done"


def test_values_of_bfloat16_states_are_not_rounded():
    head = QHead(32, 6)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    head = head.to(torch.bfloat16)
    e = torch.randn(50, 32).to(torch.bfloat16)
    exact = copy.deepcopy(head).double()
    hidden = nn.functional.layer_norm(e.double(), (32,), exact.norm.weight, exact.norm.bias)
    first, last = exact.layers[0], exact.layers[2]
    wanted = nn.functional.linear(nn.functional.linear(hidden, first.weight, first.bias).relu(), last.weight, last.bias)
    found = head(e)
    assert found.dtype is torch.float32
    assert (found.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


class Dot(nn.Module):
    """Its gradient is its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 8, dtype=torch.bfloat16))

    def forward(self, gradient):
        return (self.weight * gradient).sum()


@pytest.mark.parametrize("accumulated_in", ["fp32", "bf16"])
def test_gradients_of_128_micro_batches_add_up_in_float32(accumulated_in, one_rank, monkeypatch):
    """Against float64; in bfloat16, DeepSpeed's default, the sum is off by about 1 %."""
    if accumulated_in == "bf16":
        monkeypatch.setattr(engine, "zero_config", lambda *given: zero_config(*given) | {"data_types": {}})
    zero = ZeroEngine(Dot(), ("weight",), lr=1e-3, betas=(0.9, 0.95), bfloat16=True)
    parts = (1.0 + torch.randn(128, 64, 8)).to(torch.bfloat16)
    for index, part in enumerate(parts):
        zero.backward(zero.engine(part), last=index == len(parts) - 1)
    found = safe_get_full_grad(zero.trained[0][1]).double()
    wanted = parts.double().sum(0)
    error = float((found - wanted).norm() / wanted.norm())
    if accumulated_in == "fp32":
        assert error < 1e-6
    else:
        assert error > 5e-3, "the fault that float32 sums mend"
