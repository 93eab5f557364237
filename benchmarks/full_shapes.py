"""Memory and FLOPs at full shapes, without weights, against the plan: the learner's step and the engine's forward pass.

    python benchmarks/full_shapes.py                     (Llama-3.1-8B; takes seconds of CPU and almost no memory)
    python benchmarks/full_shapes.py --modes token lora

Modules and losses are the learner's own, on torch's meta device: every operation reports what it would allocate, and
none computes. Operations that differ on a GPU are replaced: attention is fused, with a mask where rows are padded or
packed. The number of set positions in a mask is unknown on the meta device, so it is given. One rank that holds
everything is measured; the effects of ZeRO-3 (sharding, gathering, buffers) are only in the plan's arithmetic. The
model's Hugging Face modules, whose FLOPs are those of vLLM's layers, stand in for an engine; vLLM's memory is not
measured.

Legend: B rows, W positions per row, T = B W.
"""

import argparse
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from record import record
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import local_torch_dtype

from cola_ray.learner.micro_batch import Advantages, Frozen, MicroBatch
from cola_ray.learner.objective import policy_objective
from cola_ray.learner.policies import LatentPolicy, Policy, SoftQPolicy, TokenPolicy, forward
from cola_ray.learner.sharding import checkpoint_layers
from cola_ray.learner.stage_module import TRAINED, StageModule
from cola_ray.model.modeling_cola import CoLAConfig, CoLAForCausalLM
from cola_ray.settings.config import Config, override
from cola_ray.settings.presets import preset
from cola_ray.settings.training import PretrainStage
from cola_ray.studies import planned_work
from cola_ray.studies.planned_work import LLAMA_31_8B, Rows, Sizes, Work

_aten = torch.ops.aten
_AGAIN: dict[str, Any] = {"cluster.gradient_checkpointing": True}
_TOKENS: dict[str, Any] = {"rl.action_space": "token"}
MODES: dict[str, dict[str, Any]] = {
    "latent": {},
    "actor_free": {"rl.algorithm": "etpo", "rl.actor_free": True, "rl.kl_coef": 0.05},
    "token": _TOKENS,
    "latent_checkpointed": _AGAIN,
    "token_checkpointed": _TOKENS | _AGAIN,
    "lora": _TOKENS | {"rl.lora_rank": 64},
    "actions": {},
    "policy": {},
    "fta_idm": {},
    "fta_policy": {},
    "actions_checkpointed": _AGAIN,
    "fta_idm_checkpointed": _AGAIN,
    "generate": {},
}
"""Modes and the settings that select them."""


class Meter(TorchDispatchMode):
    """Live bytes by category, and their values when the total peaks.

    Args:
        share: the share of a mask's positions that are set.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.live: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = {}
        self._known: dict[int, tuple[str, int]] = {}  # storage -> category, bytes

    def mark(self, tensors: Iterable[Tensor], category: str) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known:
                self.live[self._known[key][0]] -= size
            else:
                weakref.finalize(storage, self._freed, key)
            self._known[key] = (category, size)
            self.live[category] += size

    def saved(self, tensor: Tensor) -> Tensor:
        """A hook for tensors that autograd keeps."""
        if self._known.get(tensor.untyped_storage()._cdata, ("",))[0] == "temporary":
            self.mark([tensor], "kept")
        return tensor

    def _freed(self, key: int) -> None:
        category, size = self._known.pop(key)
        self.live[category] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._made(func, args, kwargs or {})
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.mark([one for one in made if one.untyped_storage()._cdata not in self._known], "temporary")
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)
        return out

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation's result; operations that depend on values get those that a padded batch would have."""
        on_meta = isinstance(args[0], Tensor) and args[0].is_meta if args else False
        if func is _aten._local_scalar_dense.default and on_meta:
            return False if args[0].dtype is torch.bool else 1
        if func is _aten.bincount.default:
            return torch.empty(kwargs.get("minlength", 0), dtype=torch.int64, device="meta")
        if func is _aten.index.Tensor and any(one is not None and one.dtype is torch.bool for one in args[1]):
            (mask,) = args[1]
            count = round(mask.numel() * self.share)
            places = [torch.empty(count, dtype=torch.int64, device="meta") for _ in range(mask.dim())]
            return func(args[0], places)
        return func(*args, **kwargs)


def _attention_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The kernels that torch uses on CUDA: flash attention, or memory-efficient attention if there is a mask."""
    out: Tensor
    if attn_mask is None:
        out, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)
        return out
    bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill_(attn_mask.logical_not(), float("-inf")).expand(*query.shape[:3], key.shape[2])
    out, *_ = _aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), 0.0, False, scale=scale
    )
    return out


def measure(module: nn.Module, trained: tuple[str, ...], share: float, step: Callable[[], Tensor]) -> dict[str, float]:
    """FLOPs of a step, forward and backward; and peak bytes by category of a micro-batch after the first.

    Args:
        trained: name prefixes of the parameters that have gradients.
        step: the forward pass; returns the loss.
    """
    meter = Meter(share)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    meter.mark([*module.parameters(), *module.buffers()], "parameters")
    own = [parameter for parameter in module.parameters() if parameter.requires_grad]
    on_gpu = mock.patch.multiple(
        nn.functional, scaled_dot_product_attention=_attention_on_gpu, linear=zero3_linear_wrap
    )
    flops = FlopCounterMode(display=False)
    with flops, meter, on_gpu:  # the FLOP counter keeps graphs alive, so memory is measured without it
        loss = step()
        if own:
            loss.backward()
    meter.mark([one.grad for one in own if one.grad is not None], "gradients")
    with meter:
        shards = [nn.Parameter(torch.empty(one.numel(), dtype=torch.float32, device="meta")) for one in own]
        for shard in shards:
            shard.grad = torch.empty_like(shard)
        optimizer = torch.optim.AdamW(shards) if own else None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
            moments = [one for state in optimizer.state.values() for one in state.values()]
            meter.mark([*shards, *moments], "Adam")
    del loss
    meter.peak = {}
    with meter, on_gpu, torch.autograd.graph.saved_tensors_hooks(meter.saved, lambda tensor: tensor):
        loss = step()
        if own:
            loss.backward()
    return {**dict.fromkeys(("gradients", "Adam", "kept"), 0), **meter.peak, "flops": flops.get_total_flops()}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _micro_batch(rows: int, width: int) -> MicroBatch:
    ids = [_meta(rows, width, dtype=torch.int64) for _ in range(3)]
    masks = [_meta(rows, width, dtype=torch.bool) for _ in range(2)]
    return MicroBatch(*ids, *masks, *(_meta(rows, width) for _ in range(4)), masks[0])


def _without_weights(config: Config, shape: dict[str, Any], plain: bool) -> Any:
    sizes = config.model.model_dump(include={"num_actions", "num_idm_layers", "num_world_model_layers",
                                             "num_policy_layers"})  # fmt: skip
    with torch.device("meta"), local_torch_dtype(getattr(torch, config.model.dtype)):
        return LlamaForCausalLM(LlamaConfig(**shape)) if plain else CoLAForCausalLM(CoLAConfig(**shape, **sizes))


def _stage(mode: str) -> PretrainStage | None:
    """The pre-training stage of a mode, if it is one."""
    return next((stage for stage in TRAINED if stage == mode.removesuffix("_checkpointed")), None)


def run(mode: str, config: Config, shape: dict[str, Any], rows: int, width: int) -> dict[str, float]:
    """Measure one of MODES, with all positions scored."""
    model = _without_weights(config, shape, plain=config.rl.action_space == "token")
    batch = _micro_batch(rows, width)
    if mode == "generate":
        return measure(model, ("none",), 1.0, lambda: _generate(model, batch))
    if config.cluster.gradient_checkpointing:
        checkpoint_layers(model)
    if stage := _stage(mode):
        module = StageModule(model, stage, config)
        seeds = _meta(rows, dtype=torch.int64)
        given = (batch.input_ids, batch.input_ids, batch.action_mask, seeds, False)
        return measure(module, TRAINED[stage], 1.0, lambda: module(*given)[0])
    rl = config.rl
    policy: Policy
    if rl.action_space == "token":
        policy = TokenPolicy(model, lora_rank=rl.lora_rank)
    else:
        with torch.device("meta"):  # for the new Q head
            policy = SoftQPolicy(model, rl.kl_coef) if rl.actor_free else LatentPolicy(model)

    def step() -> Tensor:
        logits, frozen = forward(policy, batch, Frozen())
        if rl.actor_free:
            return batch.taken(logits).square().sum()
        follows = Advantages(batch.advantages)
        return policy_objective(
            logits, batch, frozen, follows, None, rl=rl, kl_coef=rl.kl_coef, temperature=1.0, top_k=0
        )[0]

    return measure(policy, policy.trained, 1.0, step)


@torch.no_grad()
def _generate(model: CoLAForCausalLM, batch: MicroBatch) -> Tensor:
    e = model.encode(batch.input_ids, batch.attention_mask)
    return model.world_model_logits(e, model.policy_logits(e, batch.attention_mask).argmax(-1))


def planned(mode: str, config: Config, m: Sizes, rows: int, width: int) -> Work:
    shape = Rows(rows * width, width, rows * width)
    if stage := _stage(mode):
        return planned_work.pretraining(stage, m, shape, config.cluster.gradient_checkpointing)
    if mode == "generate":
        return Work(m.whole, 0, 0, 0, 0, 0, rows * width * planned_work.generating(m, width), 0)
    return planned_work.learning(config, m, shape)


def compare(mode: str, shape: dict[str, Any], rows: int, width: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """GB and TFLOP of one micro-batch on a rank that holds everything, and how the plan compares."""
    config = override(preset("llama-3.1-8b"), MODES[mode] | {"model.dtype": dtype})
    with mock.patch.dict(planned_work._KNOWN, {config.model.base: shape}):
        m = planned_work.sizes(config)
    found, plan = run(mode, config, shape, rows, width), planned(mode, config, m, rows, width)
    parts = {
        "parameters": (found["parameters"], m.num_bytes * (plan.frozen + plan.trained)),
        "gradients": (found["gradients"], m.num_bytes * plan.trained),
        "Adam": (found["Adam"], 12 * plan.trained),
        "activations": (found["kept"] + found["temporary"], plan.kept + plan.temporary),
    }
    of_flops = plan.look + plan.forward + plan.backward
    figures = {f"{name} GB": measured / 1e9 for name, (measured, _) in parts.items()}
    kept, static = parts["activations"], sum(ours for name, (_, ours) in parts.items() if name != "activations")
    return figures | {
        "static, plan / measured": static / sum(found[name] for name in parts if name != "activations"),
        "activations, plan / measured": kept[1] / kept[0] if plan.kept else "not planned",
        "TFLOP": found["flops"] / 1e12,
        "FLOPs, plan / measured": of_flops / found["flops"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    figures = {}
    for mode in args.modes:
        # 16 384 tokens for RL, and the preset's 8192 for pre-training
        figures[mode] = compare(mode, LLAMA_31_8B, 4 if _stage(mode) else 8, 2048)
        print(mode, figures[mode], flush=True)
    if len(args.modes) == len(MODES):
        record("full_shapes", figures, [], "One micro-batch of Llama-3.1-8B without weights, on one rank.")


if __name__ == "__main__":
    main()
