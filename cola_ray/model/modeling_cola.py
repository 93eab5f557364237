"""CoLA as Hugging Face classes: a language model whose next token is chosen through K latent actions.

        x (B,T) ──> model (base) ──> e (B,T,H) ──┬──> idm     ──> u (B,T,K)   "which action led from t-1 to t"
                                                 ├──> policy  ──> logits (B,T,K)   pi(a | x_1..t)
                                                 └──> world_model(e, a) ──> d (B,T,H) ──> lm_head ──> token logits

Legend: B sequences, T positions, H hidden size, K actions, V vocabulary size.
Source: Jia et al., "Controlling Large Language Models with Latent Actions", ICML 2025 (arXiv 2503.21383).

Alignment, by example: tokens p0 p1 p2 are the prompt, x3 x4 the response. The action taken at position 2 (from
e_2) produced x3. The inverse dynamics model (IDM) sees x3 only at position 3, so its output at t+1 labels the action
taken at t; the last position has no action.

The base is any decoder of transformers that is built like a Llama: embeddings, ``layers``, ``norm`` and ``rotary_emb``.
``config.base_model_type`` names it. The IDM and the policy are built from the base's own decoder layer class, so they
support everything that the base does.

``save_pretrained`` copies this file beside the weights (``auto_map``), so that a checkpoint opens with transformers
alone. Therefore the file imports nothing from this package, and it also contains the function that draws actions.
"""

import copy
import importlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationConfig, LlamaConfig, LlamaPreTrainedModel, PreTrainedModel
from transformers import initialization as init
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.generic import can_return_tuple

WorldModelForm = Literal["identity", "released"]
Likelihood = Literal["base", "marginal", "greedy"]
RELEASED_ARCHITECTURE = "IntentionForCausalLM"
"""Name of the model class in the authors' checkpoints."""


@strict
class CoLAConfig(LlamaConfig):
    """Configuration of :class:`CoLAForCausalLM`: that of its base, and the sizes of the modules that CoLA adds.

    Lists with an entry for each layer of the base (:data:`BY_LAYER`) are extended by entries for the policy's layers,
    which a key/value cache numbers after the base's. If all layers of the base are of one kind, the policy's are of
    that kind; otherwise they attend to the full context.

    Args:
        base_model_type: of the base, as in its own config.json. Settings of its family that a Llama does not have are
            kept under their own names.
        base_family: import path of the family that tells the engine how to serve the base, if the package does not know
            its ``base_model_type``.
        num_actions: K, the number of latent actions (codebook rows).
        num_idm_layers: decoder layers of the inverse dynamics model.
        num_world_model_layers: position-wise SwiGLU blocks of the world model.
        num_policy_layers: decoder layers of the policy.
        world_model_form: "identity" computes ``d = e + sum of block outputs``, which is the base language model at
            initialisation; "released" computes ``d = norm(s) - e`` as in the authors' checkpoints.
        soft_q_beta: if above 0, the policy is ``rho exp(Q / beta) / Z``, where rho is the output of its layers and Q
            an additional head.
        action_every: n, the number of response tokens that an action lasts: one is chosen at tokens 0, n, 2n, ... and
            held, and the policy does not choose in between.
        learnt_ends: whether the policy decides at each token if the last action goes on, see :func:`held_or_new`.
        card: facts for the model card, such as "base", "data", "task" and "figures".
    """

    model_type = "cola"
    # Names of these four numbers in the released checkpoints.
    attribute_map: ClassVar[dict[str, str]] = {
        "num_code": "num_actions",
        "num_action_layer": "num_idm_layers",
        "num_dyna_layer": "num_world_model_layers",
        "num_policy_layer": "num_policy_layers",
    }

    base_model_type: str = "llama"
    base_family: str = ""
    num_actions: int = 64
    num_idm_layers: int = 4
    num_world_model_layers: int = 2
    num_policy_layers: int = 8
    world_model_form: str = "identity"
    soft_q_beta: float = 0.0
    action_every: int = 1
    learnt_ends: bool = False
    card: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.action_every < 1:
            raise ValueError(f"action_every = {self.action_every}: an action lasts a token at least; use 1 or more")
        if self.action_every > 1 and self.learnt_ends:
            raise ValueError(
                f"action_every = {self.action_every}: with learnt_ends actions have no fixed length; use 1"
            )
        rope: dict[str, Any] = getattr(self, "rope_parameters", None) or {}
        if kinds := {name: one for name, one in rope.items() if isinstance(one, dict)}:
            self.rope_parameters = kinds  # by kind of layer; no other entries
        for name, usual in BY_LAYER.items():
            of_base = getattr(self, name, None)
            if of_base and len(of_base) == self.num_hidden_layers:
                kind = of_base[0] if len(set(of_base)) == 1 else usual
                setattr(self, name, [*of_base, *[kind] * max(self.num_policy_layers, 1)])

    def validate_architecture(self) -> None:
        """Check a Llama's rules; those of another family were checked when the base's own configuration was read."""
        if self.base_model_type == "llama":
            super().validate_architecture()

    def validate_layer_type(self) -> None:
        """Skip transformers' check: lists by layer are longer here than it expects."""

    @property
    def lasting(self) -> str:
        """The setting by which actions last several tokens, for messages; empty if an action gives one token."""
        if self.learnt_ends:
            return "learnt_ends"
        return f"action_every = {self.action_every}" if self.action_every > 1 else ""

    @property
    def window(self) -> bool:
        """Whether the layers that CoLA adds attend to a sliding window only."""
        of_layers = getattr(self, "layer_types", None)
        if of_layers is None:
            return getattr(self, "sliding_window", None) is not None
        return of_layers[-1] == "sliding_attention"

    @property
    def per_layer_config(self) -> "_PerLayer":
        """One configuration per layer of a key/value cache: the base's layers, then the policy's."""
        return _PerLayer([*super().per_layer_config, *[self] * self.num_policy_layers])

    @per_layer_config.setter
    def per_layer_config(self, layers: Any) -> None:
        if layers is not None:
            raise ValueError("per_layer_config: all layers of a CoLA model have one shape; leave it out")


class _PerLayer(list[Any]):
    """Indexed by layer, or by kind of layer as scaled rotary embeddings do; all layers share one configuration."""

    def __getitem__(self, layer: Any) -> Any:
        return super().__getitem__(0 if isinstance(layer, str) else layer)


BY_LAYER: dict[str, Any] = {"layer_types": "full_attention", "no_rope_layers": 1}
"""Settings that are lists with an entry for each layer, and the entry for a layer that attends to everything."""


def base_class(config: CoLAConfig) -> type[PreTrainedModel]:
    """transformers' class of the base, without a head.

    Raises:
        ValueError: transformers does not know ``base_model_type``.
    """
    try:
        return MODEL_MAPPING[CONFIG_MAPPING[config.base_model_type]]
    except KeyError:
        raise ValueError(f"base_model_type = {config.base_model_type!r}: unknown to transformers; install it") from None


# --- drawing an action --------------------------------------------------------------------------------------------
# A draw is a pure function of (seed, position, logits). The Gumbel noise comes from a counter-based hash, so a request
# draws the same actions alone or in any batch, in vLLM or in PyTorch, before or after a preemption. Any trajectory can
# be replayed exactly, and parity tests can compare actions instead of distributions.


def _as_int64(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


# Constants of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
_GOLDEN = _as_int64(0x9E3779B97F4A7C15)
_MIX_1 = _as_int64(0xBF58476D1CE4E5B9)
_MIX_2 = _as_int64(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's ``>>`` on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    # int64 multiplication wraps around in the same way on CPU and CUDA.
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def gumbel_noise(seed: Tensor, position: Tensor, num_actions: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard Gumbel noise (N, K), a pure function of ``seed`` (N,) and ``position`` (N,), both int64.

    In float32 the noise is the same up to rounding above -1 and coarser below, where it wins no draw among thousands of
    actions.
    """
    key = _mix(_mix(seed + _GOLDEN) + position * _GOLDEN)
    index = torch.arange(1, num_actions + 1, device=seed.device, dtype=torch.int64)
    # 52 random bits, centred within their interval, so never 0 or 1
    bits = _shift_right(_mix(key[:, None] + index[None] * _GOLDEN), 12)
    if dtype is torch.float64:
        return -torch.log(-torch.log((bits.double() + 0.5) * 2.0**-52))
    # Large noise belongs to u close to 1, where float32 is coarse; 1 - u is fine there. Its limit of 1 - 2^-24 cuts off
    # noise below -2.8.
    rest = (((1 << 52) - 1 - bits).to(dtype) + 0.5) * 2.0**-52
    return -torch.log(-torch.log1p(-rest.clamp_max(1 - 2.0**-24)))


def action_log_probs(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None = None
) -> Tensor:
    """Log-probabilities (..., K) of the distribution that is sampled: after temperature, top-k and then top-p.

    Args:
        logits: (..., K); the result has the same dtype.
        temperature: (...,); 0 means greedy, which is scored as temperature 1. None: 1 everywhere.
        top_k: (...,) int64; 0 keeps all K actions. All actions tied at the k-th value are kept. None: 0 everywhere.
        top_p: (...,) in (0, 1]; keeps the smallest set of most probable actions whose total probability reaches this,
            and those tied with the last of them. 1 keeps all. None: 1 everywhere.
    """
    num_actions = logits.shape[-1]
    if temperature is not None:
        temperature = torch.where(temperature > 0, temperature, torch.ones_like(temperature))
        logits = logits / temperature[..., None].to(logits.dtype)
    if top_k is None and top_p is None:
        return logits.log_softmax(-1)
    ranked = logits.sort(dim=-1, descending=True).values
    if top_k is not None:
        keep = torch.where(top_k > 0, top_k.clamp(max=num_actions), torch.full_like(top_k, num_actions))
        kth = ranked.gather(-1, (keep - 1)[..., None])
        logits, ranked = (one.masked_fill(one < kth, float("-inf")) for one in (logits, ranked))
    if top_p is not None:
        probs = ranked.softmax(-1)
        before = probs.cumsum(-1) - probs  # total probability of more probable actions
        last = (before < top_p[..., None]).sum(-1, keepdim=True) - 1
        lowest = ranked.gather(-1, last.clamp_min(0)).masked_fill(top_p[..., None] >= 1, float("-inf"))
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    return logits.log_softmax(-1)


def held_or_new(logits: Tensor, end_logits: Tensor, held: Tensor | None) -> Tensor:
    """Log-probabilities (..., K) of the next action h', where the policy may let the last one go on.

    ``pi(h' | e, h) = (1 - b_h) [h' = h] + b_h pi(h' | e)``, with ``b_h = sigmoid(end_logits_h)`` the probability that
    action h ends here. An ended action may be chosen again; the two ways to get h are summed. A learnt switch between
    latent actions is the idea of arXiv 2512.20605; there the switch is continuous, and not part of the policy.

    Args:
        logits: (..., K) float, of a new action.
        end_logits: (..., K) float, of the end of each action.
        held: (...,) int64, the action at the token before; -1 where there is none. None: none anywhere.
    """
    new = logits.log_softmax(-1)
    if held is None:
        return new
    end = end_logits.gather(-1, held.clamp_min(0)[..., None])
    begins = (held < 0)[..., None]
    ended = nn.functional.logsigmoid(end).masked_fill(begins, 0.0) + new
    goes_on = nn.functional.logsigmoid(-end).masked_fill(begins, float("-inf"))
    is_held = torch.arange(logits.shape[-1], device=logits.device) == held[..., None]
    return torch.where(is_held, torch.logaddexp(ended, goes_on), ended)


RANKED = -3
"""As a forced action, ``RANKED - i`` takes the i-th most probable action, counted from 0."""
FEW_ACTIONS = 4096
"""Up to this many actions are drawn in float64; a vocabulary is drawn in float32, with half the memory traffic."""


NOISE_AT_ONCE = 1 << 23
"""Noise values in memory at a time, with temporaries of 64 MB each: 65 rows of a vocabulary of 128 k."""


def sample_actions(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    seed: Tensor,
    position: Tensor,
    forced: Tensor | None,
    top_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one action per row, and score it under the distribution it was drawn from.

    ``a = argmax_k (log pi_k + g_k)`` with Gumbel noise g is an exact categorical sample (the Gumbel-max trick). Of
    equal sums the first wins. In float64, rounding decides no draw. In float32, sums that differ by less than 4e-6 may
    count as equal, which changes about one draw in 10^5 and no probability by more than that share of itself.

    Nothing here waits for the device: the caller knows which rows have settings, and passes None where no row has any.

    Args:
        logits: (N, K) policy logits.
        temperature: (N,) float; 0 is greedy. None: all rows are greedy.
        top_k: (N,) int64; 0 keeps all actions. None: all rows keep all.
        seed: (N,) int64, the request's seed.
        position: (N,) int64, index within its sequence of the token at which the action is taken.
        forced: (N,) int64; an action to take instead of drawing one, or -1 to draw, or ``RANKED - i`` for the i-th most
            probable one. None: all rows draw.
        top_p: (N,) float in (0, 1]; 1 keeps all actions. None: all rows keep all.

    Returns:
        actions (N,) int64 and their log-probabilities (N,) float32. A forced action outside the
        truncation has log-probability -inf.
    """
    num_actions = logits.shape[-1]
    dtype = torch.float64 if num_actions <= FEW_ACTIONS else torch.float32
    log_probs = action_log_probs(logits.to(dtype), temperature, top_k, top_p)
    actions = log_probs.argmax(-1)
    if temperature is not None:
        parts = (one.split(max(1, NOISE_AT_ONCE // num_actions)) for one in (seed, position, log_probs))
        drawn = [
            gumbel_noise(seeds, at, num_actions, dtype).add_(scores).argmax(-1)
            for seeds, at, scores in zip(*parts, strict=True)
        ]
        actions = torch.where(temperature > 0, torch.cat(drawn), actions)
    if forced is not None:
        ranks = (RANKED - forced).clamp(0, num_actions - 1)
        ranked = logits.argsort(dim=-1, descending=True, stable=True).gather(-1, ranks[:, None])[:, 0]
        actions = torch.where(forced >= 0, forced, torch.where(forced <= RANKED, ranked, actions))
    return actions, log_probs.gather(-1, actions[:, None])[:, 0].float()


# --- modules -------------------------------------------------------------------------------------------------------


class Linear32(nn.Linear):
    """Computes in float32, with weights of any type: (..., I) -> (..., O) float32.

    Action logits and values are computed by such layers, which are small. In bfloat16 a logit of 8 would be rounded to
    multiples of 1/16, differently in learner and engine, which would change probabilities by 3 percent.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight.float(), bias)


class LayerNorm32(nn.LayerNorm):
    """Computes in float32, with weights of any type."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class QHead(nn.Module):
    """Q values of all actions, computed in float32: e (..., H) -> (..., K) float32; all 0 after initialisation."""

    def __init__(self, width: int, num_actions: int) -> None:
        super().__init__()
        self.norm = LayerNorm32(width)
        self.layers = nn.Sequential(Linear32(width, width), nn.ReLU(), Linear32(width, num_actions))
        self.reset()

    def reset(self) -> None:
        for name in ("weight", "bias"):
            init.zeros_(self.layers[-1].get_parameter(name))

    def forward(self, e: Tensor) -> Tensor:
        return self.layers(self.norm(e))

    def save(self, file: Path) -> None:
        save_file(self.state_dict(), file)

    @classmethod
    def open(cls, file: Path) -> "QHead":
        """Load a head written by :meth:`save`; sizes are taken from the tensors."""
        tensors = load_file(file)
        num_actions, width = tensors["layers.2.weight"].shape
        head = cls(width, num_actions)
        head.load_state_dict(tensors)
        return head


class ActionStack(nn.Module):
    """Causal decoder layers over e, a norm, and a float32 head with K outputs; the IDM and the policy are such stacks.

    Args:
        base: its classes of layers, norm and rotary embedding are used; the base itself is not kept.
        cached: whether the layers have places in a key/value cache, after the base's.
        ends: whether a second head says which actions end, see :func:`held_or_new`.
    """

    def __init__(
        self, config: CoLAConfig, base: Any, num_layers: int, cached: bool = False, ends: bool = False
    ) -> None:
        super().__init__()
        self.config, self.first_layer = config, config.num_hidden_layers
        layer, norm, rotary = (type(one) for one in (base.layers[0], base.norm, base.rotary_emb))
        self.layers = nn.ModuleList(layer(config, self.first_layer + index * cached) for index in range(num_layers))
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = Linear32(config.hidden_size, config.num_actions, bias=False)
        self.end_head = Linear32(config.hidden_size, config.num_actions, bias=False) if ends else None
        self.rotary_emb = rotary(config=config)
        self.soft_q: QHead | None = None
        # Families that mix full and windowed attention have a rotary embedding for each kind of layer.
        kinds = "layer_type" in inspect.signature(self.rotary_emb.forward).parameters
        self.kind = {"layer_type": config.layer_types[-1]} if kinds else {}

    def forward(self, *args: Any, held: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Logits (B, T, K) or (N, K) float32, from the arguments of :meth:`heads`.

        Args:
            held: (B, T), or (N,) with ``scored``, as in :func:`held_or_new`; only read if actions have learnt ends.
        """
        logits, end_logits = self.heads(*args, **kwargs)
        if end_logits is None:
            return logits
        # .to: a device map may place the heads elsewhere
        device = logits.device
        return held_or_new(logits, end_logits.to(device), None if held is None else held.to(device))

    def heads(
        self,
        e: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        scored: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of a new action, and of the end of each if ends are learnt: e (B, T, H) -> (B, T, K) float32 each.

        Args:
            scored: index of N positions, such as a mask (B, T); the results are then (N, K).
            kwargs: passed on to the layers' attention.
        """
        if position_ids is None:
            position_ids = positions(attention_mask, e.shape[:2], e.device)
        mask = (create_sliding_window_causal_mask if self.config.window else create_causal_mask)(
            config=self.config,
            inputs_embeds=e,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            layer_idx=self.first_layer,  # the base's layers have cached these tokens already
        )
        rotary = self.rotary_emb(e, position_ids=position_ids, **self.kind)
        hidden = e
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                position_embeddings=rotary,
                **kwargs,
            )
        hidden = self.norm(hidden if scored is None else hidden[scored])
        logits, end_logits = self.head(hidden), None if self.end_head is None else self.end_head(hidden)
        if self.soft_q is not None:
            soft_q = self.soft_q(e if scored is None else e[scored]).to(logits.device)
            logits = logits + soft_q / self.config.soft_q_beta
        return logits, end_logits


class Codebook(nn.Embedding):
    """K rows of width H, indexed by action ids (...) int64, or by one-hot (also straight-through) vectors (..., K)."""

    def forward(self, actions: Tensor) -> Tensor:
        if actions.is_floating_point():
            return actions.to(self.weight.dtype) @ self.weight
        return super().forward(actions)


class WorldModelBlock(GradientCheckpointingLayer):
    """``down(silu(gate([s; c])) * up([s; c]))``: input 2H, intermediate size I, output H; no bias, no norm."""

    def __init__(self, config: CoLAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(2 * config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(2 * config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, state: Tensor, code: Tensor) -> Tensor:
        joined = torch.cat([state, code], -1)
        return self.down_proj(nn.functional.silu(self.gate_proj(joined)) * self.up_proj(joined))


@dataclass
class CoLACausalLMOutput(CausalLMOutputWithPast):
    """Output of a causal language model, and the policy's output at the positions of ``logits``.

    Args:
        action_logits: (B, T, K) float32, unnormalised.
        actions: (B, T) int64, the actions that ``logits`` are conditioned on.
        last_hidden_state: (B, T, H), e at all positions.
    """

    action_logits: Tensor | None = None
    actions: Tensor | None = None
    last_hidden_state: Tensor | None = None


@dataclass
class CoLAGenerateOutput(GenerateDecoderOnlyOutput):
    """Result of ``generate(return_dict_in_generate=True)``; ``logits`` and ``scores`` are of tokens given the actions.

    Args:
        actions: (B, N) int64, one for each of the N new tokens; -1 after the end of a sequence.
        action_log_probs: (B, N) float32, under the distribution they were drawn from; 0 where an action is held, and
            after the end of a sequence.
    """

    actions: Tensor | None = None
    action_log_probs: Tensor | None = None


class _ActionChooser:
    """Chooses the actions of each step of ``generate``; keeps those of the last step with their log-probabilities.

    Args:
        every: for how many tokens an action is held.
    """

    def __init__(self, sampled: bool, processors: LogitsProcessorList, every: int = 1) -> None:
        self.sampled, self.processors, self.every = sampled, processors, every
        self.step = 0  # number of tokens generated so far
        self.latest: tuple[Tensor, Tensor]

    def held(self, shape: torch.Size) -> Tensor | None:
        """The last actions, (B, T) for ``shape`` (B, T); None before the first."""
        return self.latest[0][:, None].expand(shape) if self.step else None

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, 1, K) -> (B, 1)."""
        if self.step % self.every:
            held, log_probs = self.latest
            self.latest = held, torch.zeros_like(log_probs)
            return held[:, None]
        ids = torch.empty(
            len(logits), 0, dtype=torch.int64, device=logits.device
        )  # processors of token histories do not apply to actions
        log_probs = self.processors(ids, logits[:, -1]).log_softmax(-1)
        actions = torch.multinomial(log_probs.exp(), 1) if self.sampled else log_probs.argmax(-1, keepdim=True)
        self.latest = actions[:, 0], log_probs.gather(-1, actions)[:, 0]
        return actions


class _ActionRecorder(StoppingCriteriaList):
    """Stopping criteria, which ``generate`` calls after each token; also records the actions of unfinished rows."""

    def __init__(self, criteria: StoppingCriteriaList, chooser: _ActionChooser) -> None:
        super().__init__(criteria)
        self.chooser, self.ended = chooser, torch.tensor(False)
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        actions, log_probs = self.chooser.latest
        ended = self.ended.to(actions.device)
        self.steps.append((actions.masked_fill(ended, -1), log_probs.masked_fill(ended, 0.0)))
        self.chooser.step += 1
        done = super().__call__(input_ids, scores, **kwargs)
        self.ended = done | ended.to(done.device)
        return done


_ACTION_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Generation settings that shape the sampled distribution; here that is the policy's distribution over actions."""

_REASON = "CoLA draws latent actions, and tokens follow from the actions"
_REFUSED_MODES = {
    GenerationMode.ASSISTED_GENERATION: f"drafts are accepted by the probabilities of their tokens, and {_REASON}",
    GenerationMode.CONTRASTIVE_SEARCH: f"it ranks tokens, and {_REASON}",
    GenerationMode.DOLA_GENERATION: f"it contrasts token distributions of layers, and {_REASON}",
}
_NO_BEAMS = (
    f"beams are ranked by the probabilities of their tokens, and {_REASON}; use do_sample=True with "
    "num_return_sequences, or search over actions with `cola_ray evaluate`"
)
_LOGITS_AT_ONCE = 1 << 25
"""Largest number of token logits (positions x K x V) that the loss computes at a time."""


def positions(attention_mask: Tensor | None, shape: torch.Size, device: torch.device, seen: int | Tensor = 0) -> Tensor:
    """Position ids (B, T) that count 0, 1, 2, ... over the tokens that are not padding, on either side.

    Args:
        attention_mask: (B, seen + T), or None if there is no padding.
        shape: (B, T).
        seen: number of tokens already in the cache.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return (torch.arange(shape[1], device=device) + seen).expand(shape[0], -1)
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -shape[1] :]


def is_released(path: str | os.PathLike) -> bool:
    """Whether this directory holds a checkpoint with the authors' parameter names."""
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        return False
    return RELEASED_ARCHITECTURE in (json.loads(config_file.read_text()).get("architectures") or [])


def _conversion() -> Any:
    """The package's conversion module; ModuleNotFoundError if the package is not installed."""
    try:
        return importlib.import_module("cola_ray.model.conversion")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("attach and checkpoints in the released names need the package cola_ray") from error


class CoLAPreTrainedModel(LlamaPreTrainedModel):
    """How a CoLA model is loaded, saved and described."""

    config_class = CoLAConfig
    config: CoLAConfig
    _auto_class = "AutoModelForCausalLM"  # save_pretrained copies this file
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules: ClassVar[list[str]] = ["WorldModelBlock"]  # the base adds its own layers

    def _init_weights(self, module: nn.Module) -> None:
        self.model._init_weights(module)  # norms of some families start at 0
        if isinstance(module, QHead):
            module.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> "CoLAForCausalLM":
        """Load a directory or hub id saved by this class, or a directory with the authors' parameter names."""
        path = pretrained_model_name_or_path
        if path is not None and is_released(path):
            return _conversion().load_released(path, **kwargs)
        return super().from_pretrained(path, *args, **kwargs)

    @classmethod
    def attach(cls, base_path: str | os.PathLike, **sizes: Any) -> "CoLAForCausalLM":
        """A new CoLA model around a base: see :func:`cola_ray.model.conversion.attach`."""
        return _conversion().attach(base_path, **sizes)

    def export_released(self, path: str | os.PathLike) -> None:
        """Write a checkpoint with the authors' names: see :func:`cola_ray.model.conversion.export_released`."""
        _conversion().export_released(self, path)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the model, a copy of this file for machines without the package, and a model card."""
        name = type(self).__module__.split(".")[-1]
        model = f"{name}.CoLAForCausalLM"
        self.config.auto_map = {"AutoConfig": f"{name}.CoLAConfig", "AutoModel": model, "AutoModelForCausalLM": model}
        if kwargs.get("is_main_process", True):
            self._write_card(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        self._write_card(working_dir)  # push_to_hub has replaced the card by a template
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _write_card(self, folder: str | os.PathLike) -> None:
        """Write README.md unless a user has written one."""
        readme = Path(folder) / "README.md"
        if readme.exists() and "This model card has been automatically generated." not in readme.read_text():
            return
        readme.parent.mkdir(parents=True, exist_ok=True)
        readme.write_text(model_card(self.config))


class LatentActionMixin:
    """The maps of the paper between tokens, states and actions, and the likelihood that follows from them."""

    config: CoLAConfig
    model: PreTrainedModel
    lm_head: nn.Linear
    idm: ActionStack
    codebook: Codebook
    world_model: nn.ModuleList
    policy: ActionStack

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """e, the base's last hidden state after its final norm: (B, T) -> (B, T, H).

        Pass ``attention_mask`` (B, T) for padding on either side, or ``position_ids`` (B, T) that restart at 0
        for each of several sequences packed into a row. Further arguments go to the layers' attention.
        """
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = positions(attention_mask, input_ids.shape, input_ids.device, seen)
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            **kwargs,
        ).last_hidden_state

    def inverse_dynamics_logits(
        self, e: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """u (B, T, K), not shifted: the logits at position t+1 label the action taken at t."""
        return self.idm(e, attention_mask, position_ids)

    def inverse_dynamics_actions(
        self, e: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """``a_t = argmax u_{t+1}``, (B, T-1) int64, shifted: entry t is the action that led from token t to t+1.

        Raises:
            ValueError: an action lasts n tokens, so labels belong to spans; see ``cola_ray.algorithms.spans``.
        """
        if self.config.action_every > 1:
            self._refuse_held("inverse_dynamics_actions", "an action has one label for all of its tokens")
        return self.inverse_dynamics_logits(e, attention_mask, position_ids)[:, 1:].argmax(-1)

    def policy_logits(
        self,
        e: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        held: Tensor | None = None,
    ) -> Tensor:
        """Unnormalised ``pi(a | x_1..t)``, (B, T, K) float32; with ``held`` (B, T) as in :func:`held_or_new`."""
        return self.policy(e, attention_mask, position_ids, past_key_values, held=held)

    def world_model_states(self, e: Tensor, actions: Tensor) -> Tensor:
        """d (..., H), which the LM head reads, from states e (..., H) and actions (...) int64 or one-hot (..., K)."""
        # .to(e.device): a device map may place blocks on other devices
        state, code = e, self.codebook(actions).to(e.device)
        for block in self.world_model:
            state = state + block(state, code).to(e.device)
        if self.config.world_model_form == "released":
            state = self.model.norm(state).to(e.device) - e
        return state

    def world_model_logits(self, e: Tensor, actions: Tensor) -> Tensor:
        """Next-token logits (..., V), from the same arguments."""
        return self.lm_head(self.world_model_states(e, actions))

    def token_log_probs(self, e: Tensor, policy_logits: Tensor, likelihood: Likelihood) -> Tensor:
        """Log-probabilities of the next token: states (N, H) and ``policy_logits`` (N, K) -> (N, V) float32.

        marginal: ``log sum_a pi(a | e) p(x | e, a)``, over all actions. greedy: ``log p(x | e, argmax_a pi(a | e))``.
        base: ``log p(x | e)`` of the bare base. Here p(x | e, a) is the softmax that the world model was trained with,
        although generation takes its most probable token; under that rule almost every text would have probability 0.
        """
        if likelihood == "base":
            return self.lm_head(e).float().log_softmax(-1)
        self._refuse_held(f"likelihood = {likelihood!r}", "a token's probability depends on where its action began")
        if likelihood == "greedy":
            return self.world_model_logits(e, policy_logits.argmax(-1)).float().log_softmax(-1)
        num_actions = policy_logits.shape[-1]
        every = torch.arange(num_actions, device=e.device).expand(len(e), -1)
        tokens = self.world_model_logits(e[:, None].expand(-1, num_actions, -1), every).float().log_softmax(-1)
        return torch.logsumexp(policy_logits.log_softmax(-1)[..., None] + tokens, 1)

    def _refuse_held(self, what: str, why: str) -> None:
        """Raise ValueError if an action lasts several tokens, for operations that are defined token by token."""
        if self.config.lasting:
            raise ValueError(f"{what}: with {self.config.lasting} {why}")

    def _loss(
        self,
        e: Tensor,
        policy_logits: Tensor,
        labels: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Mean of ``-log sum_a pi(a | e) p(x | e, a)`` over labelled tokens.

        A token has K rows of logits; they are computed piece by piece, and again for the gradient.
        """
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        shift_labels = shift_labels.to(e.device)
        rows = shift_labels != -100
        columns = (e[rows], policy_logits.to(e.device)[rows], shift_labels[rows])
        size = max(1, _LOGITS_AT_ONCE // (policy_logits.shape[-1] * self.config.vocab_size))
        pieces = zip(*(column.split(size) for column in columns), strict=True)
        losses = [checkpoint(self._negative_log_likelihood, *piece, use_reentrant=False) for piece in pieces]
        total = torch.stack(losses).sum()
        if num_items_in_batch is None:
            return total / rows.sum().clamp_min(1)
        return total / torch.as_tensor(num_items_in_batch, device=total.device)

    def _negative_log_likelihood(self, e: Tensor, policy_logits: Tensor, tokens: Tensor) -> Tensor:
        """(N, H), (N, K), (N,) -> the sum of ``-log p(x | e)``."""
        num_actions = policy_logits.shape[-1]
        every = torch.arange(num_actions, device=e.device).expand(len(e), -1)
        logits = self.world_model_logits(e[:, None].expand(-1, num_actions, -1), every).float()
        targets = tokens.repeat_interleave(num_actions)
        given = -nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none").view(-1, num_actions)
        return -torch.logsumexp(policy_logits.log_softmax(-1) + given, -1).sum()


class LatentGenerationMixin(LatentActionMixin, GenerationMixin):
    """``generate`` over latent actions, with transformers' random numbers or with the engine's."""

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        top_k = kwargs.get("top_k", getattr(generation_config, "top_k", None))
        settings, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name in {"actions", "choose_actions"} & model_kwargs.keys():
            raise ValueError(f"{name}: generate chooses actions itself; force them with generate_latent(actions=...)")
        if top_k is None and self.generation_config.top_k is None:
            settings.top_k = 0  # transformers' default of 50 is meant for a vocabulary; here it would be most actions
        if settings.guidance_scale not in (None, 1, 1.0):
            raise ValueError(f"guidance_scale: it mixes two token distributions, and {_REASON}")
        if settings.penalty_alpha:
            raise ValueError(f"penalty_alpha: {_REFUSED_MODES[GenerationMode.CONTRASTIVE_SEARCH]}")
        self._refuse_mode(settings.get_generation_mode())
        return settings, model_kwargs

    def _validate_generation_mode(self, generation_mode: GenerationMode, *args: Any) -> None:
        self._refuse_mode(generation_mode)
        super()._validate_generation_mode(generation_mode, *args)

    def _refuse_mode(self, mode: GenerationMode) -> None:
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(f"{mode.value.replace('_', ' ')}: {_REFUSED_MODES.get(mode, _NO_BEAMS)}")

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Not supported, because it samples tokens in its own loop. vLLM batches continuously and draws actions."""
        raise ValueError("continuous batching: it samples tokens itself; serve the model with `cola_ray serve` instead")

    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
        """Processors of token logits only; :meth:`_sample` applies those that shape the distribution over actions."""
        for_tokens = copy.copy(generation_config)
        for_tokens.do_sample = False
        return super()._get_logits_processor(generation_config=for_tokens, **kwargs)

    def _sample(
        self, input_ids: Tensor, *, generation_config: GenerationConfig, **kwargs: Any
    ) -> Tensor | CoLAGenerateOutput:
        """transformers' loop with greedy tokens, where ``forward`` chooses the action of each step."""
        action_processors = LogitsProcessorList()
        if generation_config.do_sample:
            shape = GenerationConfig(
                do_sample=True, **{name: getattr(generation_config, name) for name in _ACTION_SETTINGS}
            )
            action_processors = super()._get_logits_processor(shape, device=input_ids.device)
        chooser = _ActionChooser(generation_config.do_sample, action_processors, self.config.action_every)
        for_tokens = copy.copy(generation_config)
        for_tokens.do_sample = False
        recorder = _ActionRecorder(kwargs.pop("stopping_criteria"), chooser)
        kwargs |= {"stopping_criteria": recorder, "choose_actions": chooser, "logits_to_keep": 1}
        generated = super()._sample(input_ids, generation_config=for_tokens, **kwargs)
        if not generation_config.return_dict_in_generate:
            return generated
        steps = recorder.steps[: generated.sequences.shape[1] - input_ids.shape[1]]
        actions, log_probs = (torch.stack(column, 1) for column in zip(*steps, strict=True))
        return CoLAGenerateOutput(**generated, actions=actions, action_log_probs=log_probs)

    @torch.no_grad()
    def generate_latent(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        temperature: float | Tensor = 1.0,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 1.0,
        seed: int | Tensor = 0,
        actions: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``generate`` with a seed for each row: draws equal those of vLLM and do not depend on the batch.

        Args:
            input_ids: (B, P) prompts, left-padded where ``attention_mask`` (B, P) is 0.
            temperature, top_k, top_p, seed: numbers, or (B,) tensors, as in :func:`sample_actions`.
            actions: (B, F) int64 actions to force in the first F steps, or ranks, as ``forced`` there; -1 draws. Not
                read at steps that hold an action.
            eos_token_id: ends a row; its later tokens are the first such id (or 0), its actions -1, its log-probs 0.
            stopping_criteria: applied after each token, e.g. ``StopStringCriteria(tokenizer, ["\\n"])``.

        Returns:
            tokens (B, N), actions (B, N), log-probabilities of the actions (B, N) float32, 0 where an action is held;
            N <= max_new_tokens.

        Raises:
            ValueError: fewer than one new token, padding on the right, a negative temperature, or an unknown action.
        """
        _check_latent_arguments(self.config, input_ids, attention_mask, max_new_tokens, temperature, actions)
        device, (batch, _) = input_ids.device, input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        rows = (
            None if _is(temperature, 0) else _per_row(temperature, input_ids, torch.float32),
            None if _is(top_k, 0) else _per_row(top_k, input_ids),
            _per_row(seed, input_ids),
        )
        share = None if _is(top_p, 1) else _per_row(top_p, input_ids, torch.float32)
        cache = DynamicCache(config=self.config)
        position_ids = positions(mask, input_ids.shape, device)
        finished = torch.zeros(batch, dtype=torch.bool, device=device)
        action = torch.full((batch,), -1, device=device)
        step_ids, out = input_ids, []
        for step in range(max_new_tokens):
            e = self.encode(step_ids, mask, position_ids, cache)
            # Its layers cache what is held, too.
            logits = self.policy_logits(e, mask, position_ids, cache, action[:, None].expand(e.shape[:2]))[:, -1]
            if step % self.config.action_every == 0:
                forced = actions[:, step] if actions is not None and step < actions.shape[1] else None
                action, log_prob = sample_actions(logits, *rows, position_ids[:, -1], forced, share)
            else:
                log_prob = torch.zeros_like(log_prob)
            token = self.world_model_logits(e[:, -1], action).argmax(-1)
            token = token.masked_fill(finished, stops[0] if stops else 0)
            out.append((token, action.masked_fill(finished, -1), log_prob.masked_fill(finished, 0.0)))
            finished = finished | torch.isin(token, torch.tensor(stops, dtype=token.dtype, device=device))
            if stopping_criteria:
                generated = torch.stack([tokens for tokens, _, _ in out], 1)
                finished = finished | stopping_criteria(torch.cat([input_ids, generated], 1), None)
            if bool(finished.all()):
                break
            step_ids, position_ids = token[:, None], position_ids[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
        tokens, taken, log_probs = (torch.stack(column, 1) for column in zip(*out, strict=True))
        return tokens, taken, log_probs


def _is(value: float | Tensor, number: int) -> bool:
    return not isinstance(value, Tensor) and value == number


def _per_row(value: float | Tensor, input_ids: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """A number, or (B,) numbers, as (B,) on the device of ``input_ids`` (B, P)."""
    return torch.as_tensor(value, dtype=dtype, device=input_ids.device).expand(len(input_ids))


def _check_latent_arguments(
    config: CoLAConfig, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int,
    temperature: float | Tensor, actions: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError for arguments that :meth:`LatentGenerationMixin.generate_latent` does not accept."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: needs 1 or more")
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ValueError("attention_mask: a prompt ends in padding; pad on the left")
    if bool((torch.as_tensor(temperature) < 0).any()):
        raise ValueError(f"temperature = {temperature}: must be >= 0 (0 is greedy)")
    if actions is not None:
        known = (actions < config.num_actions) & ((actions >= -1) | (actions <= RANKED))
        if len(actions) != len(input_ids) or not bool(known.all()):
            raise ValueError(
                f"actions: needs a row for each prompt, of 0 to {config.num_actions - 1}, -1 for a free step, "
                f"or {RANKED} - i for the i-th most probable one"
            )


class CoLAForCausalLM(CoLAPreTrainedModel, LatentGenerationMixin, GenerationMixin):
    """A base steered by latent actions, usable as a causal language model of transformers.

    ``from_pretrained`` opens our own checkpoints and those in the authors' names; ``attach`` adds CoLA to the
    checkpoint of a base.

    ``forward`` takes the policy's greedy action at every position, or ``actions``, and returns the token logits given
    these actions, so that other decoding loops decode greedily as ours does. Its ``loss`` is the mean of
    ``-log sum_a pi(a | e) p(x | e, a)`` over labelled tokens: the likelihood of a proper distribution over texts, from
    which the policy, the world model and the base all receive gradients.

    ``generate`` first takes an action, and then the most probable token given the action, as in RL and in vLLM; where
    ``config.action_every`` is n, it takes one at the new tokens 0, n, 2n, ..., and holds it. With ``learnt_ends`` the
    distribution over actions depends on the action of the token before. Base and policy layers share one key/value
    cache.

    ==========================================================  =======================================================
    do_sample=False                                             the policy's most probable action
    do_sample=True                                              an action drawn from the policy
    temperature, top_k, top_p, min_p, top_h, typical_p,         shape this distribution over actions; top_k counts
    epsilon_cutoff, eta_cutoff                                  actions, and all K are kept unless it is set
    repetition_penalty, no_repeat_ngram_size, bad_words_ids,    change the token logits given the action, before the
    suppress_tokens, min_new_tokens, logits_processor, ...      most probable token is taken
    num_return_sequences, stopping criteria, streamers, caches  as for any model
    num_beams, assistant_model, prompt_lookup_num_tokens,       refused: they rank tokens by probabilities from which
    penalty_alpha, dola_layers, guidance_scale                  CoLA does not draw
    ==========================================================  =======================================================
    """

    def __init__(self, config: CoLAConfig) -> None:
        super().__init__(config)
        self.model = base_class(config)(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.idm = ActionStack(config, self.model, config.num_idm_layers)
        self.codebook = Codebook(config.num_actions, config.hidden_size)
        self.world_model = nn.ModuleList(WorldModelBlock(config) for _ in range(config.num_world_model_layers))
        self.policy = ActionStack(config, self.model, config.num_policy_layers, cached=True, ends=config.learnt_ends)
        if config.soft_q_beta:
            self.policy.soft_q = QHead(config.hidden_size, config.num_actions)
        self.post_init()
        self.generation_config.do_sample = False  # pipelines sample by default

    def enable_soft_q(self, beta: float) -> None:
        """Make the policy ``rho exp(Q / beta) / Z`` from now on; if the checkpoint has no Q, it starts at 0."""
        self.config.soft_q_beta = beta
        if self.policy.soft_q is None:
            head = QHead(self.config.hidden_size, self.config.num_actions).to(self.policy.head.weight.dtype)
            self.policy.soft_q = head if self.device.type == "meta" else head.to(self.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        actions: Tensor | None = None,
        choose_actions: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> CoLACausalLMOutput:
        """Token logits given actions, at all positions or at the last ``logits_to_keep``.

        If actions last (``config.action_every``, ``learnt_ends``), the caller has to hold actions: each position needs
        its action, there is no loss, and with learnt ends ``action_logits`` are those of new actions.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in :meth:`encode`.
            past_key_values: a cache of the base's and then the policy's layers: ``DynamicCache(config=model.config)``.
            labels: (B, T) int64, shifted here; -100 is ignored. ``shift_labels`` and ``num_items_in_batch`` also work.
            actions: (B, logits_to_keep or T) int64; None or -1 take the policy's most probable action.
            choose_actions: chooses actions instead: policy logits (B, T, K) -> (B, T).
            kwargs: ``output_hidden_states`` and ``output_attentions`` return those of the base.

        Raises:
            ValueError: ``actions`` has another shape; or an action lasts several tokens and some are not given.
        """
        if choose_actions is None and (actions is None or (self.config.lasting and bool((actions < 0).any()))):
            self._refuse_held("actions", "forward does not know where a response begins; give one for each position")
        if labels is not None:
            self._refuse_held("labels", "the likelihood is one of spans, which is not computed here; leave them out")
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given = input_ids if inputs_embeds is None else inputs_embeds
        if position_ids is None and given is not None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = positions(attention_mask, given.shape[:2], given.device, seen)
        base = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        e = base.last_hidden_state
        held = choose_actions.held(e.shape[:2]) if isinstance(choose_actions, _ActionChooser) else None
        policy = self.policy(e, attention_mask, position_ids, past_key_values, held=held)
        loss = None if labels is None else self._loss(e, policy, labels, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        e, policy = e[:, kept], policy[:, kept].to(e.device)
        chosen = policy.argmax(-1) if choose_actions is None else choose_actions(policy)
        if actions is not None:
            chosen = _with_actions(chosen, actions)
        return CoLACausalLMOutput(
            loss=loss, logits=self.world_model_logits(e, chosen), past_key_values=past_key_values,
            hidden_states=base.hidden_states, attentions=base.attentions, action_logits=policy, actions=chosen,
            last_hidden_state=base.last_hidden_state,
        )  # fmt: skip


def _with_actions(chosen: Tensor, actions: Tensor) -> Tensor:
    """``actions`` where they are not negative, else ``chosen``."""
    if actions.shape != chosen.shape:
        raise ValueError(
            f"actions of shape {tuple(actions.shape)}: logits are of {tuple(chosen.shape)} positions; "
            "one action for each"
        )
    return torch.where(actions < 0, chosen, actions)


def model_card(config: CoLAConfig) -> str:
    """Text of a checkpoint's README.md: what it was made from, its results, and how to open it."""
    known = dict(sorted((config.card or {}).items()))  # sorted, since config.json keeps no order
    base, figures = (
        str(known.pop("base", None) or f"a {config.base_model_type} model"),
        dict(sorted((known.pop("figures", None) or {}).items())),
    )
    licence = str(known.get("licence") or "")
    on_hub = base.count("/") == 1 and not Path(base).exists()
    base = base if on_hub else Path(base).name
    layers = (config.num_hidden_layers, config.num_policy_layers, config.num_idm_layers, config.num_world_model_layers)
    facts = {"base": base} | known | {
        "latent actions": config.num_actions,
        "layers of base, policy, inverse dynamics, world model": ", ".join(map(str, layers)),
    }  # fmt: skip
    if config.lasting:
        facts["tokens that an action lasts"] = "until it ends" if config.learnt_ends else config.action_every
    table = "\n".join(f"| {name} | {value} |" for name, value in (facts | figures).items())
    known_to_hub = f"base_model: {base}\n" if on_hub else ""
    if licence:
        known_to_hub += f"license: {licence}\n"
    return _CARD.format(
        base=base, base_model=known_to_hub, table=table, num_actions=config.num_actions,
        licence=licence or "not known here, so look it up",
    )  # fmt: skip


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags:
- cola
- latent-actions
---

# A language model steered by latent actions

CoLA ([Jia et al. 2025](https://arxiv.org/abs/2503.21383)) around {base}: at each step a policy chooses one of
{num_actions} latent actions, and a world model turns the base's state and the action into the next token.

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH)
inputs = tokenizer(PROMPT, return_tensors="pt")
tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=64))
```

`do_sample=True` draws an action from the policy and takes its most probable token; `temperature`, `top_k` and `top_p`
apply to the distribution over actions. If the package `cola_ray` is installed, `trust_remote_code` is not needed, and
`cola_ray serve PATH` serves the model with OpenAI's API.

## Licence

The weights contain those of the base model: its licence ({licence}) applies to them, and so does that of the data.
`modeling_cola.py` is Apache-2.0.
"""
