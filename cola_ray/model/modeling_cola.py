"""CoLA as Hugging Face classes: a Llama base with 64 latent actions between its state and the next token.

        x (B,T) ──> model (Llama) ──> e (B,T,H) ──┬──> idm     ──> u (B,T,K)   "which action led from t-1 to t"
                                                  ├──> policy  ──> logits (B,T,K)   pi(a | x_1..t)
                                                  └──> world_model(e, a) ──> d (B,T,H) ──> lm_head ──> token logits

Legend: B sequences, T positions, H hidden width, K actions, V vocabulary.
Source: Jia et al., "Controlling Large Language Models with Latent Actions", ICML 2025 (arXiv 2503.21383).

Alignment, by example: tokens p0 p1 p2 are the prompt, x3 x4 the response. The action taken at position 2 (from
e_2) produced x3. The inverse dynamics model has seen x3 only at position 3, so its output at t+1 labels the
action taken at t; the last position has no action.
"""

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from cola_ray.algorithms.latent_actions import sample_actions

WorldModelForm = Literal["identity", "released"]
Likelihood = Literal["base", "marginal", "greedy"]


@strict
class CoLAConfig(LlamaConfig):
    """Configuration of :class:`CoLAForCausalLM`: a Llama's, and the sizes of what CoLA adds.

    Args:
        num_actions: K, the number of latent actions (codebook rows).
        num_idm_layers: decoder layers of the inverse dynamics model.
        num_world_model_layers: position-wise SwiGLU blocks of the world model.
        num_policy_layers: decoder layers of the policy.
        world_model_form: "identity" reads ``d = e + sum of block outputs`` and is the base language model at
            start; "released" reads ``d = norm(s) - e`` as in the authors' checkpoints.
        soft_q_beta: above 0, the policy is ``rho exp(Q / beta) / Z``: its layers are rho, and a head Q is added.
    """

    model_type = "cola"
    # The released checkpoints' names for the same four numbers.
    attribute_map: ClassVar[dict[str, str]] = {
        "num_code": "num_actions",
        "num_action_layer": "num_idm_layers",
        "num_dyna_layer": "num_world_model_layers",
        "num_policy_layer": "num_policy_layers",
    }

    num_actions: int = 64
    num_idm_layers: int = 4
    num_world_model_layers: int = 2
    num_policy_layers: int = 8
    world_model_form: str = "identity"
    soft_q_beta: float = 0.0


class QHead(nn.Module):
    """``Q(e, .)``: (..., H) -> (..., K), float32; 0 for all at first."""

    def __init__(self, width: int, num_actions: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_actions))
        nn.init.zeros_(self.layers[-1].get_parameter("weight"))
        nn.init.zeros_(self.layers[-1].get_parameter("bias"))

    def forward(self, e: Tensor) -> Tensor:
        return self.layers(self.norm(e.to(self.norm.weight.dtype))).float()

    def save(self, file: Path) -> None:
        save_file(self.state_dict(), file)

    @classmethod
    def open(cls, file: Path) -> "QHead":
        """What ``save`` wrote; its sizes are in its tensors."""
        tensors = load_file(file)
        num_actions, width = tensors["layers.2.weight"].shape
        head = cls(width, num_actions)
        head.load_state_dict(tensors)
        return head


class ActionStack(nn.Module):
    """Causal decoder layers over e, a norm and a linear head to K logits: the shape of both IDM and policy.

    Shares the base's rotary frequencies; has its own key/value cache, counted from layer 0.
    """

    def __init__(self, config: CoLAConfig, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(num_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.num_actions, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.soft_q: QHead | None = None

    def forward(
        self,
        e: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        """e (B, T, H) -> logits (B, T, K), float32; (N, K) at the N positions where ``scored`` (B, T) is true."""
        if position_ids is None:
            position_ids = positions(attention_mask, e.shape[:2], e.device)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=e,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(e, position_ids=position_ids)
        hidden = e
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                position_embeddings=rotary,
            )
        logits: Tensor = self.head(self.norm(hidden if scored is None else hidden[scored])).float()
        if self.soft_q is None:
            return logits
        return logits + self.soft_q(e if scored is None else e[scored]) / self.config.soft_q_beta


class Codebook(nn.Embedding):
    """K rows of width H, looked up by action ids (...) or mixed by one-hots (..., K), straight-through ones too."""

    def forward(self, actions: Tensor) -> Tensor:
        if actions.is_floating_point():
            return actions.to(self.weight.dtype) @ self.weight
        return super().forward(actions)


class WorldModelBlock(nn.Module):
    """``down(silu(gate([s; c])) * up([s; c]))``: input 2H, inner I, output H, no bias, no norm."""

    def __init__(self, config: CoLAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(2 * config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(2 * config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, state: Tensor, code: Tensor) -> Tensor:
        joined = torch.cat([state, code], -1)
        return self.down_proj(nn.functional.silu(self.gate_proj(joined)) * self.up_proj(joined))


class CoLAForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """A Llama steered by latent actions.

    ``from_pretrained`` takes our own directories and those in the released names; ``attach`` adds CoLA to any
    Llama checkpoint. Plain ``forward`` marginalises nothing: it takes the policy's greedy action at every
    position and returns token logits, so that code written for a causal language model runs.
    """

    config_class = CoLAConfig
    config: CoLAConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer"]

    def __init__(self, config: CoLAConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.idm = ActionStack(config, config.num_idm_layers)
        self.codebook = Codebook(config.num_actions, config.hidden_size)
        self.world_model = nn.ModuleList(WorldModelBlock(config) for _ in range(config.num_world_model_layers))
        self.policy = ActionStack(config, config.num_policy_layers)
        if config.soft_q_beta:
            self.policy.soft_q = QHead(config.hidden_size, config.num_actions)
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *args: Any, **kwargs: Any) -> "CoLAForCausalLM":
        """Load ``path``: a directory or hub id of ours, or a directory in the authors' released names."""
        from cola_ray.model import conversion

        if conversion.is_released(path):
            return conversion.load_released(path, **kwargs)
        return super().from_pretrained(path, *args, **kwargs)

    @classmethod
    def attach(cls, base_path: str | os.PathLike, **sizes: Any) -> "CoLAForCausalLM":
        """A CoLA model around any Llama checkpoint: see :func:`cola_ray.model.conversion.attach`."""
        from cola_ray.model import conversion

        return conversion.attach(base_path, **sizes)

    def export_released(self, path: str | os.PathLike) -> None:
        """Write the authors' names and layout: see :func:`cola_ray.model.conversion.export_released`."""
        from cola_ray.model import conversion

        conversion.export_released(self, path)

    def act_softly(self, beta: float) -> None:
        """From here on the policy is ``rho exp(Q / beta) / Z``, with a Q of 0 where the checkpoint has none."""
        self.config.soft_q_beta = beta
        if self.policy.soft_q is None:
            head = QHead(self.config.hidden_size, self.config.num_actions)
            self.policy.soft_q = head.to(device=self.device, dtype=self.policy.head.weight.dtype)

    # --- the five maps of the paper -------------------------------------------------------------------------

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> Tensor:
        """e = the base's last hidden state after its final norm: (B, T) -> (B, T, H).

        Pass ``attention_mask`` (B, T) for padding on either side, or ``position_ids`` (B, T) that restart at 0
        for each of several sequences packed into a row.
        """
        if position_ids is None:
            position_ids = positions(attention_mask, input_ids.shape, input_ids.device)
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state

    def inverse_dynamics_logits(
        self, e: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """u (B, T, K), raw and unshifted: position t+1 labels the action taken at t."""
        return self.idm(e, attention_mask, position_ids)

    def inverse_dynamics_actions(
        self, e: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """``a_t = argmax u_{t+1}``, (B, T-1) int64: shifted, so entry t led from token t to token t+1."""
        return self.inverse_dynamics_logits(e, attention_mask, position_ids)[:, 1:].argmax(-1)

    def policy_logits(
        self,
        e: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> Tensor:
        """Unnormalised ``pi(a | x_1..t)``, (B, T, K) float32."""
        return self.policy(e, attention_mask, position_ids, past_key_values)

    def world_model_logits(self, e: Tensor, actions: Tensor) -> Tensor:
        """Next-token logits (..., V) from states e (..., H) and actions (...) int64, or one-hots (..., K)."""
        state, code = e, self.codebook(actions)
        for block in self.world_model:
            state = state + block(state, code)
        if self.config.world_model_form == "released":
            state = self.model.norm(state) - e
        return self.lm_head(state)

    def token_log_probs(self, e: Tensor, policy_logits: Tensor, likelihood: Likelihood) -> Tensor:
        """Of the next token: states (N, H) and ``policy_logits`` (N, K) -> (N, V) float32.

        marginal: ``log sum_a pi(a | e) p(x | e, a)``, over all actions. greedy: ``log p(x | e, argmax_a pi(a | e))``.
        base: ``log p(x | e)`` of the bare base. p(x | e, a) is the softmax that the world model was trained with; what
        CoLA says is its most probable token alone, under which almost every text would have the probability 0.
        """
        if likelihood == "base":
            return self.lm_head(e).float().log_softmax(-1)
        if likelihood == "greedy":
            return self.world_model_logits(e, policy_logits.argmax(-1)).float().log_softmax(-1)
        num_actions = policy_logits.shape[-1]
        every = torch.arange(num_actions, device=e.device).expand(len(e), -1)
        tokens = self.world_model_logits(e[:, None].expand(-1, num_actions, -1), every).float().log_softmax(-1)
        return torch.logsumexp(policy_logits.log_softmax(-1)[..., None] + tokens, 1)

    # --- generation -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_latent(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        temperature: float | Tensor = 1.0,
        top_k: int | Tensor = 0,
        seed: int | Tensor = 0,
        actions: Tensor | None = None,
        eos_token_id: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Act, step the world model, repeat, with key/value caches for base and policy.

        Tokens are ``argmax lm_head(d_t)``: deterministic given the action.

        Args:
            input_ids: (B, P) prompts, left-padded where ``attention_mask`` (B, P) is 0.
            temperature, top_k, seed: one number, or (B,) tensors, as in :func:`sample_actions`.
            actions: (B, F) int64 actions to force at the first F steps; -1 leaves a step free.
            eos_token_id: a row that produced it is finished; its later tokens are eos, actions -1,
                log-probabilities 0.

        Returns:
            tokens (B, N), actions (B, N), log-probabilities of the actions (B, N) float32, N <= max_new_tokens.
        """
        device, (batch, _) = input_ids.device, input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask

        def per_row(value: float | Tensor, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(value, dtype=dtype, device=device).expand(batch)

        rows = (per_row(temperature, torch.float32), per_row(top_k, torch.int64), per_row(seed, torch.int64))
        base_cache, policy_cache = DynamicCache(config=self.config), DynamicCache()
        position_ids = positions(mask, input_ids.shape, device)
        finished = torch.zeros(batch, dtype=torch.bool, device=device)
        step_ids, out = input_ids, []
        for step in range(max_new_tokens):
            e = self.encode(step_ids, mask, position_ids, base_cache)
            logits = self.policy_logits(e, mask, position_ids, policy_cache)[:, -1]
            forced = torch.full((batch,), -1, dtype=torch.int64, device=device)
            if actions is not None and step < actions.shape[1]:
                forced = actions[:, step]
            action, log_prob = sample_actions(logits, *rows, position_ids[:, -1], forced)
            token = self.world_model_logits(e[:, -1], action).argmax(-1)
            if eos_token_id is not None:
                token = token.masked_fill(finished, eos_token_id)
            out.append((token, action.masked_fill(finished, -1), log_prob.masked_fill(finished, 0.0)))
            if eos_token_id is not None:
                finished = finished | (token == eos_token_id)
                if bool(finished.all()):
                    break
            step_ids, position_ids = token[:, None], position_ids[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
        tokens, taken, log_probs = (torch.stack(column, 1) for column in zip(*out, strict=True))
        return tokens, taken, log_probs

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Token logits (B, T, V) under the policy's greedy action at each position."""
        e = self.encode(input_ids, attention_mask, position_ids)
        actions = self.policy_logits(e, attention_mask, position_ids).argmax(-1)
        logits = self.world_model_logits(e, actions)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def positions(attention_mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Position ids (B, T): 0, 1, 2, ... over the tokens that are not padding, on whichever side it lies."""
    if attention_mask is None:
        return torch.arange(shape[1], device=device).expand(shape[0], -1)
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
