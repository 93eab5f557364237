"""What RL trains, in either action space: a module for ZeRO-3, and how its weights are published.

                    forward: logits over actions, frozen states e, the reference's logits           published
    LatentPolicy    base (frozen) ─> e ─> policy, reference                                         the policy
    SoftQPolicy     base (frozen) ─> e ─> Q in place of logits, reference (frozen)                  Q
    TokenPolicy     base (trains, or adapters in it) ─> logits;  reference (frozen) ─> e, logits    what trains, merged

Logits are computed at N of the B x T positions: where an action was taken, not in prompts or observations.
Legend: B sequences, T positions, K actions to choose from, latent ones or tokens.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cola_ray.learner.micro_batch import Frozen, MicroBatch
from cola_ray.learner.published import Published
from cola_ray.learner.sharding import checkpoint_layers, fill
from cola_ray.learner.shared_prompts import LayerInputs, SharedPrompts, share_prompts
from cola_ray.model.conversion import is_released, opened, plain_base, save, with_mlp_biases
from cola_ray.model.modeling_cola import CoLAForCausalLM, QHead
from cola_ray.model.tensors import empty
from cola_ray.settings.config import Config
from cola_ray.settings.rl import steered_layers

States = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Logits (N, K); e (B, T, H), the reference's logits (N, K), aliases (N, K): each None if not needed."""


_TRIED_AT_ONCE = 64
"""States on which all actions are tried at once: each takes K rows of vocabulary logits."""


class LatentPolicy(nn.Module):
    """The frozen model, its trainable policy and a frozen copy of that policy from the start of RL.

    Args:
        cola: taken over.
        without_base: the states come with every batch, so the base is dropped.
        with_aliases: return which actions would have given the token said; all actions are tried on the world model.
    """

    def __init__(self, cola: CoLAForCausalLM, without_base: bool = False, with_aliases: bool = False) -> None:
        super().__init__()
        self.shares_prompts = share_prompts(cola)
        self.cola, self.with_aliases = cola, with_aliases
        self.reference = copy.deepcopy(cola.policy)
        self.width, self.num_actions = cola.config.hidden_size, cola.config.num_actions
        # Not needed by the RL update.
        del cola.idm
        if not with_aliases:
            del cola.world_model, cola.codebook
        if without_base:
            del cola.model, cola.lm_head

    @property
    def trained(self) -> tuple[str, ...]:
        return ("cola.policy.",)

    @staticmethod
    def stored(name: str) -> str:
        """The checkpoint's name of the tensor that a parameter starts from."""
        owner, _, rest = name.partition(".")
        return rest if owner == "cola" else f"policy.{rest}"

    def published(self) -> list[Published]:
        return [Published(f"policy.{name}", (parameter,)) for name, parameter in self.cola.policy.named_parameters()]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored_mask: Tensor,
        hidden_states: Tensor | None = None,
        reference_logits: Tensor | None = None,
        aliases: Tensor | None = None,
        shared_prompts: SharedPrompts | None = None,
        held: Tensor | None = None,
    ) -> States:
        """e, the reference's logits and aliases are computed unless given.

        Args:
            held: (N,), the action before each scored position; only read if actions have learnt ends.
        """
        inputs = LayerInputs(attention_mask, scored_mask, shared_prompts)
        with torch.no_grad():
            if hidden_states is None:
                hidden_states = inputs.unpack(self.cola.encode(inputs.pack(input_ids), **inputs.arguments))
            e = inputs.pack(hidden_states)
            if reference_logits is None:
                reference_logits = self.reference(e, scored=inputs.scored, held=held, **inputs.arguments)
            if self.with_aliases and aliases is None:
                aliases = self._aliases(hidden_states[scored_mask], input_ids.roll(-1, 1)[scored_mask])
        logits = self.cola.policy(e, scored=inputs.scored, held=held, **inputs.arguments)
        return logits, hidden_states, reference_logits, aliases

    def _aliases(self, e: Tensor, said: Tensor) -> Tensor:
        """Which actions give the token that was generated: (N, H), (N,) -> (N, K) bool."""
        actions = torch.arange(self.num_actions, device=e.device)
        found = [
            self.cola.world_model_logits(
                some[:, None].expand(-1, self.num_actions, -1), actions.expand(len(some), -1)
            ).argmax(-1)
            for some in e.split(_TRIED_AT_ONCE)
        ]
        return torch.cat(found) == said[:, None]


class SoftQPolicy(nn.Module):
    """ETPO without an actor: the frozen model, its policy as rho, and the Q of the policy ``rho exp(Q / beta) / Z``.

    Args:
        cola: taken over; if its policy already has a Q, training continues from it.
    """

    def __init__(self, cola: CoLAForCausalLM, beta: float) -> None:
        super().__init__()
        self.shares_prompts = share_prompts(cola)
        cola.enable_soft_q(beta)
        self.width, self.num_actions = cola.config.hidden_size, cola.config.num_actions
        self.q: QHead = cola.policy.soft_q  # type: ignore[assignment]  # which enable_soft_q made
        cola.policy.soft_q = None
        self.cola = cola
        del cola.idm, cola.world_model, cola.codebook

    @property
    def trained(self) -> tuple[str, ...]:
        return ("q.",)

    @staticmethod
    def stored(name: str) -> str:
        """The checkpoint's name of the tensor that a parameter starts from."""
        return f"policy.soft_{name}" if name.startswith("q.") else name.removeprefix("cola.")

    def published(self) -> list[Published]:
        return [Published(f"policy.soft_q.{name}", (parameter,)) for name, parameter in self.q.named_parameters()]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored_mask: Tensor,
        hidden_states: Tensor | None = None,
        reference_logits: Tensor | None = None,
        aliases: None = None,
        shared_prompts: SharedPrompts | None = None,
        held: Tensor | None = None,
    ) -> States:
        """Q (N, K) first; e and the reference's logits are computed unless given."""
        inputs = LayerInputs(attention_mask, scored_mask, shared_prompts)
        with torch.no_grad():
            if hidden_states is None:
                hidden_states = inputs.unpack(self.cola.encode(inputs.pack(input_ids), **inputs.arguments))
            if reference_logits is None:
                e = inputs.pack(hidden_states)
                reference_logits = self.cola.policy(e, scored=inputs.scored, **inputs.arguments)
        return self.q(hidden_states[scored_mask]), hidden_states, reference_logits, None


class Steered(nn.Module):
    """A decoder layer's last projection plus a trained vector, which is thereby added to the layer's output.

    Turner et al. 2023 (2308.10248); trained by RL in Sinii et al. 2025 (2505.18706).
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.off = base_layer, False
        self.vector = nn.Parameter(base_layer.weight.new_zeros(base_layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        return out if self.off else out + self.vector


class TokenPolicy(nn.Module):
    """A plain base that trains (whole, by adapters, or by steering vectors), and a frozen copy of it as the reference.

    Args:
        base: taken over.
        lora_rank: of adapters in all linear layers; 0 makes none.
        steering: "all" or "last" decoder layers get a vector; their MLPs need biases, as which it is published.
        with_reference: whether the reference and its states are needed. With adapters or vectors it costs no memory:
            it is the base without them.
    """

    def __init__(self, base: Any, *, lora_rank: int = 0, steering: str = "off", with_reference: bool = True) -> None:
        super().__init__()
        self.shares_prompts = share_prompts(base)
        self.width, self.num_actions = base.config.hidden_size, base.config.vocab_size
        self.with_reference, self.lora_rank = with_reference, lora_rank
        layers = base.model.layers
        for index in steered_layers(steering, len(layers)):
            layers[index].mlp.down_proj = Steered(layers[index].mlp.down_proj)
        self.whole = not lora_rank and steering == "off"
        self.reference = copy.deepcopy(base) if with_reference and self.whole else None
        self.policy: Any = _adapted(base, lora_rank) if lora_rank else base

    @property
    def base(self) -> Any:
        """The policy without peft's wrapper."""
        return self.policy.get_base_model() if self.lora_rank else self.policy

    @property
    def trained(self) -> tuple[str, ...]:
        if self.whole:
            return ("policy.",)
        return tuple(name for name, _ in self.named_parameters() if ".lora_" in name or name.endswith(".vector"))

    @staticmethod
    def stored(name: str) -> str:
        """The checkpoint's name of the tensor that a parameter starts from, if all weights train."""
        return name.partition(".")[2]

    def published(self) -> list[Published]:
        """Adapters or vectors are merged: engines and users of the result need not know about them."""
        if self.whole:
            return [Published(name, (parameter,)) for name, parameter in self.policy.named_parameters()]
        found = []
        for name, module in self.base.named_modules():
            if isinstance(module, Steered):
                found.append(Published(f"{name}.bias", (module.base_layer.bias, module.vector), _sum))
            if hasattr(module, "lora_A"):
                found.append(Published(f"{name}.weight", _parts(module), _merged(module.scaling["default"])))
                if module.base_layer.bias is not None:  # unchanged; engines reload whole modules
                    found.append(Published(f"{name}.bias", (module.base_layer.bias,)))
        return found

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored_mask: Tensor,
        hidden_states: Tensor | None = None,
        reference_logits: Tensor | None = None,
        aliases: None = None,
        shared_prompts: SharedPrompts | None = None,
        held: Tensor | None = None,
    ) -> States:
        """The reference's states and logits are computed unless given or not needed. A token has no aliases."""
        inputs = LayerInputs(attention_mask, scored_mask, shared_prompts)
        if self.with_reference and reference_logits is None:
            with torch.no_grad():
                states, reference_logits = self._refer(input_ids, inputs)
                hidden_states = inputs.unpack(states)
        return _states_and_logits(self.base, input_ids, inputs)[1], hidden_states, reference_logits, aliases

    def _refer(self, input_ids: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        if self.reference is not None:
            return _states_and_logits(self.reference, input_ids, inputs)
        with self.policy.disable_adapter() if self.lora_rank else _unsteered(self.base):
            return _states_and_logits(self.base, input_ids, inputs)


@contextlib.contextmanager
def _unsteered(base: nn.Module) -> Iterator[None]:
    steered = [module for module in base.modules() if isinstance(module, Steered)]
    for module in steered:
        module.off = True
    try:
        yield
    finally:
        for module in steered:
            module.off = False


def _states_and_logits(base: Any, input_ids: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
    states = base.model(inputs.pack(input_ids), use_cache=False, **inputs.arguments).last_hidden_state
    return states, base.lm_head(states[inputs.scored])


def _adapted(base: PreTrainedModel, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config, autocast_adapter_dtype=False)  # ZeRO-3 needs a single dtype


def _parts(module: Any) -> tuple[nn.Parameter, ...]:
    return module.base_layer.weight, module.lora_A["default"].weight, module.lora_B["default"].weight


def _merged(scaling: float) -> Callable[..., Tensor]:
    """``W + scaling B A`` (Hu et al. 2021, section 4.1), in float32."""
    return lambda weight, a, b: (weight.float() + scaling * (b.float() @ a.float())).to(weight.dtype)


def _sum(bias: Tensor, vector: Tensor) -> Tensor:
    return (bias.float() + vector.float()).to(bias.dtype)


Policy = LatentPolicy | SoftQPolicy | TokenPolicy


def forward(policy: Callable[..., States], batch: MicroBatch, frozen: Frozen) -> tuple[Tensor, Frozen]:
    """A policy's logits, (N, K), and the outputs of its frozen parts, which are not recomputed if known.

    Args:
        policy: a :data:`Policy`, or the engine around it.
    """
    known = frozen.hidden_states, frozen.reference_logits, frozen.aliases
    shared = {} if batch.shared_prompts is None else {"shared_prompts": batch.shared_prompts}
    logits, *found = policy(batch.input_ids, batch.attention_mask, batch.scored_mask, *known, held=batch.held, **shared)
    return logits, Frozen(*found)


def make_policy(config: Config, model_path: str) -> Policy:
    """The policy of the run's action space, from the checkpoint at ``model_path``, in ``config.model.dtype``.

    In a process group it is divided over the ranks, each of which loads its share; a collective.
    """
    rl, dtype = config.rl, getattr(torch, config.model.dtype)
    shape, tensors = opened(model_path)
    latent = rl.action_space == "latent"
    model = empty(CoLAForCausalLM if latent else AutoModelForCausalLM, shape, dtype)
    if not rl.trains_all_weights:  # adapters and vectors are made for weights that are loaded
        fill(model, tensors, on_host=lambda _: config.cluster.offload_frozen)
    policy: Policy
    if latent and rl.actor_free:
        torch.manual_seed(config.seed)  # every rank draws the same Q
        policy = SoftQPolicy(model, rl.kl_coef)
    elif latent:
        policy = LatentPolicy(model, rl.cache_hidden_states, rl.marginal_aliases)
    else:
        refers = bool(rl.kl_coef or rl.kl_target) or config.learns_values
        policy = TokenPolicy(model, lora_rank=rl.lora_rank, steering=rl.steering, with_reference=refers)
    if rl.trains_all_weights:
        frozen = config.cluster.offload_frozen
        fill(policy, tensors, stored=policy.stored, whole=("q.",),
             on_host=lambda name: frozen and not name.startswith(policy.trained))  # fmt: skip
    if config.cluster.gradient_checkpointing:
        checkpoint_layers(model)
    return policy


def served(config: Config, start: Path | None, folder: Path) -> str:
    """The model that engines and learner open: the CoLA model that a run starts from, or for tokens a plain base.

    Args:
        folder: where a base is written if it has to be made.
    """
    if config.rl.action_space == "latent":
        return str(start)
    base = plain_base(start or config.model.base, folder / "base", config.model.family)
    if config.rl.steering != "off":
        base = with_mlp_biases(base, folder / "steered", config.model.family)
    return str(base)


def export(start_model: str, trained: dict[str, Tensor], target: Path, soft_q_beta: float = 0.0) -> None:
    """Write the start model with the trained tensors in it, as a Hugging Face directory, with its tokenizer."""
    plain = AutoConfig.from_pretrained(start_model).model_type != "cola" and not is_released(start_model)
    model = (AutoModelForCausalLM if plain else CoLAForCausalLM).from_pretrained(start_model, dtype="auto")
    if soft_q_beta:
        model.enable_soft_q(soft_q_beta)
    unknown = trained.keys() - model.state_dict().keys()
    if unknown:
        raise ValueError(f"trained tensors that the model does not have: {sorted(unknown)[:3]}")
    model.load_state_dict(trained, strict=False)
    save(model, AutoTokenizer.from_pretrained(start_model), target)
