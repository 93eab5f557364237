"""CoLA in vLLM: policy layers use the paged key/value cache, and actions are sampled in the engine.

    forward          base layers ─> e ─> policy layers ─> row [e ; p], in one graph        (every token)
    compute_logits   heads(p) ─> sample action ─> world model(e, action) ─> token logits   (only last tokens)

Prefill, chunking and prefix caching need no special treatment, because only the world model depends on the action, and
it works position by position. :class:`~cola_ray.model.vllm_rows.RowTable` says which request owns which row of
``compute_logits`` and keeps the actions. It is filled by :class:`~cola_ray.model.vllm_rows.RowTracker` in vLLM's V1
model runner, and by :class:`~cola_ray.model.vllm_slots.CoLAModelState` in V2, the default on GPUs.
"""

import functools
import inspect
from collections.abc import Iterable
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor as LogitsLayer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from cola_ray.model import families
from cola_ray.model.action_requests import BASE_TOKENS
from cola_ray.model.modeling_cola import Linear32, QHead
from cola_ray.model.vllm_rows import RowTable
from cola_ray.model.vllm_states import StateStore


def engine_overrides(keep_hidden_states: bool = False, soft_q_beta: float = 0.0) -> dict[str, Any]:
    """``hf_overrides`` for an engine.

    Args:
        keep_hidden_states: keep e of every position in a :class:`~cola_ray.model.vllm_states.StateStore`.
        soft_q_beta: if above 0, the policy is ``rho exp(Q / beta) / Z``; if the checkpoint has no Q, it starts at 0.
    """
    return {"keep_hidden_states": keep_hidden_states} | ({"soft_q_beta": soft_q_beta} if soft_q_beta else {})


class WithPolicy:
    """Base layers followed by policy layers, all with paged caches. An output row is [e ; p], of width 2H.

    Mixed into vLLM's model of the base's family; the policy's layers and norm are of the same classes.
    """

    layers: nn.ModuleList
    norm: nn.Module

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # of vLLM's model
        config = vllm_config.model_config.hf_config
        kind, given = type(self.layers[0]), {"vllm_config": vllm_config}
        if "vllm_config" not in inspect.signature(kind).parameters:
            given = {
                "config": config,
                "cache_config": vllm_config.cache_config,
                "quant_config": vllm_config.quant_config,
            }
        # vLLM finds the cache of a layer by the integer in its name, so policy layers are numbered after the base's.
        self.policy_layers = nn.ModuleList(
            kind(**given, prefix=f"{prefix}.policy_layers.{config.num_hidden_layers + index}")
            for index in range(config.num_policy_layers)
        )
        self.policy_norm = type(self.norm)(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        residual = None
        # e leaves before the policy layers, because they receive it as the residual that a fused norm overwrites. It
        # goes into part of a wider buffer, since vLLM's compiler removes a clone whose original is not read again.
        width = hidden.shape[-1]
        rows = hidden.new_empty((hidden.shape[0], 2 * width))
        rows[:, :width] = hidden
        for layer in self.policy_layers:
            hidden, residual = layer(positions, hidden, residual)
        rows[:, width:], _ = self.policy_norm(hidden, residual)
        return rows


@functools.cache
def with_policy(base: type[nn.Module]) -> type[nn.Module]:
    """vLLM's model of a family with policy layers after its own, as vLLM compiles it."""
    made = type(f"CoLA{base.__name__}", (WithPolicy, base), {"__module__": __name__})
    inputs = ("input_ids", "positions", "intermediate_tensors", "inputs_embeds")
    return support_torch_compile(dynamic_arg_dims=dict.fromkeys(inputs, 0))(made)


def served_model(config: Any) -> type[nn.Module]:
    """:func:`with_policy` of the base's family; NotFoundError if there is none."""
    module, _, name = families.family(config.base_model_type, config.base_family).served_by.partition(":")
    return with_policy(getattr(import_module(module), name))


class WorldModelBlock(nn.Module):
    """``s + down(silu(gate([s; c])) * up([s; c]))``, split over tensor-parallel ranks like the MLP of a base."""

    def __init__(self, hidden: int, inner: int, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            2 * hidden, [inner] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(inner, hidden, bias=False, prefix=f"{prefix}.down_proj")

    def forward(self, state: Tensor, code: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(torch.cat([state, code], -1))[0].chunk(2, -1)
        return state + self.down_proj(F.silu(gate) * up)[0]


class CoLAForCausalLM(nn.Module):
    """The served model."""

    hf_to_vllm_mapper = LlamaModel.hf_to_vllm_mapper  # that of every family that has these projections
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.model_config = vllm_config.model_config
        config = self.config = vllm_config.model_config.hf_config
        if vllm_config.parallel_config.pipeline_parallel_size != 1:
            raise ValueError("pipeline_parallel_size: CoLA's policy layers read the base's last hidden state; use 1")
        hidden = config.hidden_size
        self.model: Any = served_model(config)(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.policy_head = Linear32(hidden, config.num_actions, bias=False)
        self.end_head = Linear32(hidden, config.num_actions, bias=False) if config.learnt_ends else None
        self.soft_q = QHead(hidden, config.num_actions) if config.soft_q_beta else None
        self.codebook = nn.Embedding(config.num_actions, hidden)
        self.world_model = nn.ModuleList(
            WorldModelBlock(hidden, config.intermediate_size, maybe_prefix(prefix, f"world_model.{index}"))
            for index in range(config.num_world_model_layers)
        )
        self.lm_head = ParallelLMHead(config.vocab_size, hidden, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_layer = LogitsLayer(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.rows = RowTable.of(vllm_config)
        self.states = None
        if getattr(config, "keep_hidden_states", False):
            name = f"states.{config.num_hidden_layers + config.num_policy_layers}"  # the number after the last layer's
            self.states = StateStore(vllm_config, hidden, maybe_prefix(prefix, name))

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        from cola_ray.model.vllm_slots import CoLAModelState

        return CoLAModelState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **_):
        rows = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        if self.states is not None:
            self.states.write(rows[:, : self.config.hidden_size])
        return rows

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Draw actions for rows [e ; p] (N, 2H); returns logits (N, V) of the tokens given the actions."""
        e, policy_hidden = hidden_states.chunk(2, -1)
        action_logits = self.policy_head(policy_hidden)
        if self.soft_q is not None:
            action_logits = action_logits + self.soft_q(e) / self.config.soft_q_beta
        actions, rows = self.rows.draw(action_logits, None if self.end_head is None else self.end_head(policy_hidden))
        state, code = e, self.codebook(actions)
        for block in self.world_model:
            state = block(state, code)
        if self.config.world_model_form == "released":
            # cloned, because vLLM's norm may work in place
            state = self.model.norm(state.clone()) - e
        if rows.forced is not None:  # perhaps by the bare base, for comparison: its logits are lm_head(e)
            state = torch.where((rows.forced == BASE_TOKENS)[:, None], e, state)
        logits = self.logits_layer(self.lm_head, state)
        return None if logits is None else logits.float()  # None: tensor-parallel ranks that do not sample

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint in our names. The IDM is not served; a missing Q may arrive with a weight update."""
        optional = {name for name, _ in self.named_parameters() if name.startswith("soft_q.")}
        return optional | AutoWeightsLoader(self).load_weights(self._served(weights), mapper=self.hf_to_vllm_mapper)

    def _served(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        for name, tensor in weights:
            if not name.startswith("idm.") and (name != "lm_head.weight" or not self.config.tie_word_embeddings):
                yield served_name(name), tensor

    def policy_modules(self) -> list[nn.Module]:
        """The modules that a weight update replaces."""
        return [
            *self.model.policy_layers, self.model.policy_norm, self.policy_head,
            *filter(None, [self.end_head, self.soft_q]),
        ]  # fmt: skip


def served_name(name: str) -> str:
    """The served model's name of a parameter, given our name."""
    if name.startswith("policy.head."):
        return name.replace("policy.head.", "policy_head.")
    if name.startswith(("policy.soft_q.", "policy.end_head.")):
        return name.removeprefix("policy.")
    return name.replace("policy.layers.", "model.policy_layers.").replace("policy.norm.", "model.policy_norm.")
