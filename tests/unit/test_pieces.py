"""Losses over a vocabulary in pieces, against the plain ones: values, gradients, memory, and under ZeRO-3."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import BASES, NUM_ACTIONS, VOCAB_SIZE, random_base, small_base
from deepspeed.utils import safe_get_full_grad, z3_leaf_module
from runs import ROOT
from torch import nn

from cola_ray import CoLAForCausalLM, registry
from cola_ray.learner import pieces
from cola_ray.learner.engine import ZeroEngine
from cola_ray.learner.pieces import HeadLoss
from cola_ray.learner.stage_module import TRAINED, StageModule
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

sys.path.insert(0, str(ROOT / "benchmarks"))
from full_shapes import Meter

N, V, H = 37, 50, 24


def made(dtype, frozen):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = nn.Parameter(torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype), not frozen)
    return states, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("at_once", [V * N, 5 * V, V, 1])
def test_a_loss_in_pieces_is_the_plain_one(dtype, frozen, at_once, monkeypatch):
    monkeypatch.setattr(pieces, "AT_ONCE", at_once)
    states, weight, targets = made(dtype, frozen)
    wanted = F.cross_entropy(F.linear(states, weight), targets, reduction="sum")
    (0.37 * wanted).backward()
    expected = [one.grad for one in (states, weight)]
    states.grad = weight.grad = None
    found = HeadLoss(weight)(states, targets)
    (0.37 * found).backward()
    assert found.dtype is dtype
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for one, other in zip((states, weight), expected, strict=True):
        assert (one.grad is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one.grad, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


def test_in_bfloat16_the_heads_gradient_adds_up_in_float32(monkeypatch):
    """As near to the exact one as one rounding of it, whatever the number of pieces: 37 of a row each, or one."""
    states, weight, targets = made(torch.bfloat16, frozen=False)
    exact = [one.detach().double().requires_grad_() for one in (states, weight)]
    F.cross_entropy(F.linear(*exact), targets, reduction="sum").backward()
    off = {}
    for at_once in (1, V * N):
        monkeypatch.setattr(pieces, "AT_ONCE", at_once)
        states.grad = weight.grad = None
        loss = HeadLoss(weight)(states, targets)
        loss.backward()
        assert loss.dtype is torch.float32
        off[at_once] = float((weight.grad.double() - exact[1].grad).norm() / exact[1].grad.norm())
    assert off[1] < 1.2 * off[V * N]
    assert off[1] < 0.01


def test_where_nothing_learns_no_gradient_is_made(monkeypatch):
    states, weight, targets = made(torch.float32, frozen=False)
    monkeypatch.setattr(torch, "mm", None)
    with torch.no_grad():
        loss = HeadLoss(weight)(states, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(states, weight), targets, reduction="sum"))


def test_a_second_backward_pass_is_refused():
    states, weight, targets = made(torch.float32, frozen=False)
    loss = HeadLoss(weight)(states, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError, match="gradients"):
        loss.backward()


@pytest.mark.parametrize("frozen", [True, False])
def test_memory_is_that_of_a_piece(frozen, monkeypatch):
    """Beside the gradients that it leaves; the plain form holds several times the 512 x 4096 logits."""
    rows, vocabulary, width, some = 512, 4096, 16, 32
    monkeypatch.setattr(pieces, "AT_ONCE", some * vocabulary)
    weight = nn.Parameter(torch.empty(vocabulary, width, device="meta"), not frozen)
    states = torch.empty(rows, width, device="meta", requires_grad=True)
    targets = torch.empty(rows, dtype=torch.int64, device="meta")

    def peak(loss):
        states.grad = weight.grad = None
        meter = Meter(1.0)
        meter.mark([weight, states, targets], "given")
        with meter:
            loss().backward()
        return sum(meter.peak.values()) - meter.peak["given"]

    left = 4 * width * (rows + (0 if frozen else 2 * vocabulary))
    logits, piece = 4 * rows * vocabulary, 4 * some * vocabulary
    assert peak(lambda: HeadLoss(weight)(states, targets)) < 2.1 * piece + left
    assert peak(lambda: F.cross_entropy(F.linear(states, weight), targets, reduction="sum")) > 2 * logits


# --- stages ---------------------------------------------------------------------------------------------------------

FAMILIES = [name for name, (kind, _) in BASES.items() if kind in registry.BUILT_IN["base"]]
CAPPED = {"head_dim": 32, "query_pre_attn_scalar": 32, "final_logit_softcapping": 2.0}
OF_ITS_OWN = {
    "gemma3 with a cap": ("gemma3_text", CAPPED),  # which attach refuses
    "gemma2": ("gemma2", CAPPED),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "phi": ("phi", {}),  # whose head has a bias
}
"""Bases whose logits are more than their head of the last states."""


class _Plain(nn.Module):
    """The loss as it is written down, of all logits, by the model's own head."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, states, targets):
        return F.cross_entropy(self.head(states).float(), targets, reduction="sum")


def of_stage(stage, name, folder, plain=False):
    """A stage's module around a small base of a family, whose head trains or not, and is the embeddings or not."""
    model = small_base(name)
    if stage != "base":
        model.save_pretrained(folder)
        torch.manual_seed(5)
        model = CoLAForCausalLM.attach(folder, num_actions=NUM_ACTIONS, num_idm_layers=1, num_policy_layers=1)
        for block in model.world_model:  # else states would not depend on actions
            nn.init.normal_(block.down_proj.weight, std=0.1)
    module = StageModule(model, stage, override(preset("tiny"), {"model.num_actions": NUM_ACTIONS}))
    if plain:
        module.head_loss = _Plain(model.lm_head)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[stage]))
    return module


def rows_of_two():
    generator = torch.Generator().manual_seed(2)
    positions = torch.cat([torch.arange(5), torch.arange(9)]).expand(2, -1)
    mask = torch.rand(2, 14, generator=generator) < 0.7
    return torch.randint(3, VOCAB_SIZE, (2, 14), generator=generator), positions, mask, torch.arange(2), True


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stage", ["base", "actions", "policy", "fta_idm", "fta_policy"])
def test_stages_under_zero3_have_the_plain_gradients(stage, name, tmp_path, one_rank, monkeypatch):
    """Of every family, whose frozen layers are gathered whole; the loss in pieces of three rows."""
    monkeypatch.setattr(pieces, "AT_ONCE", 3 * VOCAB_SIZE)
    plain = of_stage(stage, name, tmp_path, plain=True)
    wanted, _ = plain(*rows_of_two())
    wanted.backward()
    expected = {name: one.grad for name, one in plain.named_parameters() if one.requires_grad}
    module = of_stage(stage, name, tmp_path)
    zero = ZeroEngine(module, TRAINED[stage], lr=1e-3, betas=(0.9, 0.95))
    whole = [layer for layer in module.modules() if z3_leaf_module(layer)]
    assert len(whole) == {"base": 0, "actions": 3, "policy": 3, "fta_idm": 2, "fta_policy": 2}[stage]
    for _ in range(2):  # gradients add up
        loss, sums = zero.engine(*rows_of_two())
        torch.testing.assert_close(loss, wanted, rtol=3e-6, atol=0)
        zero.backward(loss, last=False)
    loss, _ = zero.engine(*rows_of_two())
    zero.backward(loss, last=True)
    found = {name: safe_get_full_grad(one) for name, one in zero.trained}
    zero.close()
    assert found.keys() == expected.keys()
    assert "loss" in sums
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], 3 * gradient, rtol=1e-6, atol=3e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", [*BASES, *OF_ITS_OWN])
def test_the_stage_base_learns_by_the_logits_that_a_base_has(name):
    """Of built-in families by its head alone; of any other by what its class makes of them."""
    base = random_base(*(BASES | OF_ITS_OWN)[name])
    ids, positions, mask, seeds, measure = rows_of_two()
    logits = base(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    wanted = F.cross_entropy(logits[mask[:, :-1]], ids[:, 1:][mask[:, :-1]], reduction="sum")
    wanted.backward()
    expected = {name: one.grad.clone() for name, one in base.named_parameters()}
    base.zero_grad()
    module = StageModule(base, "base", preset("tiny"))
    assert module.own_logits == (name not in FAMILIES)
    loss, _ = module(ids, positions, mask, seeds, measure)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for name, parameter in base.named_parameters():
        gradient = expected[name]
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", OF_ITS_OWN)
@torch.no_grad()
def test_of_those_the_head_alone_would_learn_something_else(name):
    module = StageModule(random_base(*OF_ITS_OWN[name]), "base", preset("tiny"))
    right, _ = module(*rows_of_two())
    module.own_logits = False
    wrong, _ = module(*rows_of_two())
    assert abs(float(wrong) / float(right) - 1) > 1e-3
