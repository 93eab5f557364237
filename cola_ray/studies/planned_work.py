"""FLOPs and memory of a learner rank for one micro-batch, in every mode.

                no gradient                  gradient                                 loss over
    latent      base, reference              policy                                   K actions
    actor-free  base, policy                 Q                                        K actions
    token       reference                    the base                                 V tokens, piece by piece
    LoRA        the base                     the base, whose adapters train           V tokens, piece by piece
    actions     base                         IDM, codebook, world model               V tokens, piece by piece
    policy      base, IDM                    policy                                   K actions
    fta         IDM or policy                base, through the world model            V tokens, piece by piece

A family's norms of queries and keys count as parameters, but their activations for the backward pass are not counted.
Each formula follows the modules' operations in order, with fused attention and a padding mask as on a GPU.
``benchmarks/full_shapes.py`` compares them with the modules themselves, run at full shapes (docs/scaling.md).
Legend: b bytes of a number, H width, I of the MLP, Q and KV of all query and key heads, V vocabulary, K actions,
r rank of adapters; a micro-batch has T tokens in rows of W, and N of them are scored.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_ray.learner.pieces import AT_ONCE
from cola_ray.settings.config import Config, ConfigError
from cola_ray.settings.rl import steered_layers
from cola_ray.settings.training import SIZES, PretrainStage


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model's layers, and numbers of parameters P of its parts."""

    width: int  # H
    mlp: int  # I
    queries: int  # Q
    keys: int  # KV
    heads: int
    vocabulary: int  # V
    actions: int  # K
    layers: int
    policy_layers: int
    idm_layers: int
    blocks: int  # of the world model
    base: float  # P of embeddings and base layers
    head: float  # P of the LM head; 0 if it is tied to the embeddings
    policy: float
    idm: float
    codebook: float
    world_model: float
    num_bytes: int  # b

    @property
    def whole(self) -> float:
        return self.base + self.head + self.policy + self.idm + self.codebook + self.world_model

    @property
    def served(self) -> float:
        return self.whole - self.idm

    @property
    def linear(self) -> float:
        """P of a decoder layer's matrices."""
        return self.width * (2.0 * self.queries + 2.0 * self.keys + 3.0 * self.mlp)

    @property
    def block(self) -> float:
        """P of a block of the world model, which reads state and code."""
        return 5.0 * self.width * self.mlp


def sizes(config: Config) -> Sizes:
    """Count the parameters of the configured model, built on the meta device."""
    import torch

    from cola_ray.model.modeling_cola import CoLAConfig, CoLAForCausalLM

    latent, known = config.model, _shape(config)
    if known["model_type"] != "cola":
        known |= {"base_model_type": known["model_type"], "model_type": "cola"}
    ours = latent.model_dump(include=set(SIZES))
    shape = CoLAConfig(**(ours | known))
    with torch.device("meta"):
        model = CoLAForCausalLM(shape)

    def count(module: torch.nn.Module) -> float:
        return float(sum({id(p): p.numel() for p in module.parameters()}.values()))

    head = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    return Sizes(
        width=shape.hidden_size, mlp=shape.intermediate_size, queries=head * shape.num_attention_heads,
        keys=head * shape.num_key_value_heads, heads=shape.num_attention_heads, vocabulary=shape.vocab_size,
        actions=shape.num_actions, layers=shape.num_hidden_layers, policy_layers=shape.num_policy_layers,
        idm_layers=shape.num_idm_layers, blocks=shape.num_world_model_layers, base=count(model.model),
        head=0.0 if shape.tie_word_embeddings else count(model.lm_head), policy=count(model.policy),
        idm=count(model.idm), codebook=count(model.codebook), world_model=count(model.world_model),
        num_bytes=2 if latent.dtype == "bfloat16" else 4,
    )  # fmt: skip


LLAMA_31_8B: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA_32_1B = LLAMA_31_8B | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "num_attention_heads": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
_QWEN25_05B = {
    "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN3_17B = {
    "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
_KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": LLAMA_31_8B, "meta-llama/Llama-3.1-8B-Instruct": LLAMA_31_8B,
    "meta-llama/Llama-3.2-1B": _LLAMA_32_1B, "Qwen/Qwen2.5-0.5B-Instruct": _QWEN25_05B, "Qwen/Qwen3-1.7B": _QWEN3_17B,
}  # fmt: skip
"""Configurations of the presets' bases, some of them gated on the hub; with them a plan needs no token or network."""


def _shape(config: Config) -> dict[str, Any]:
    from transformers import AutoConfig

    from cola_ray.runs import provenance

    start, base = provenance.start_model(config), config.model.base
    if (start / "config.json").is_file():
        return dict(AutoConfig.from_pretrained(start).to_dict())
    if base in _KNOWN:
        return dict(AutoConfig.for_model(**({"model_type": "llama"} | _KNOWN[base])).to_dict())
    if not base:
        from cola_ray.learner.start_model import make_tiny_llama

        return dict(make_tiny_llama(280, 1, 0).config.to_dict())
    file = Path(base)
    source, options = (str(file.parent), {"gguf_file": file.name}) if file.suffix == ".gguf" else (base, {})
    try:
        known = AutoConfig.from_pretrained(source, **options).to_dict()
    except OSError as error:
        raise ConfigError(f"model.base = {base!r}: {str(error).splitlines()[0]}") from None
    known.pop("quantization_config", None)
    return dict(known)


@dataclass(frozen=True)
class Rows:
    """Shape of a micro-batch."""

    tokens: float  # T
    width: float  # W
    scored: float  # N


@dataclass(frozen=True)
class Work:
    """Work and memory of one micro-batch."""

    frozen: float  # P of frozen parts
    trained: float  # P of parts that train
    kept: float  # bytes that the forward pass keeps for the backward pass
    temporary: float  # peak bytes in addition to those
    known: float  # bytes of a micro-batch that are kept if later passes use them: e, the reference's logits
    look: float  # FLOPs of parts without gradient
    forward: float  # FLOPs of the forward pass of parts with gradient
    backward: float


# --- a layer, and the parts after the last one --------------------------------------------------------------------


def kept_of_layer(m: Sizes, width: float, trains: bool = True) -> float:
    """Bytes per token that a decoder layer keeps for its backward pass.

    ``2 (4 H + 2 b H)``  two norms: input in float32, normalised, output (the input of linear layers that train)
    ``b (4 Q + W)``      queries, keys and values repeated to the number of query heads, output; a row of the mask
    ``4 heads``          log-sum-exp of attention
    ``4 b I``            gate, its SiLU, up, their product
    """
    b, norms = m.num_bytes, 2.0 * m.width * (4 + m.num_bytes * (2 if trains else 1))
    return norms + b * (4.0 * m.queries + width) + 4.0 * m.heads + 4.0 * b * m.mlp


def kept_of_norm(m: Sizes) -> float:
    """Bytes per token: ``4 H + 2 b H``."""
    return m.width * (4.0 + 2 * m.num_bytes)


def forward_of_layer(m: Sizes, width: float) -> float:
    """FLOPs per token: ``2 P_linear + 4 W Q``; with a mask, attention computes the whole square."""
    return 2 * m.linear + 4.0 * width * m.queries


def backward_of_layer(m: Sizes, width: float, trains: bool = True) -> float:
    """``(4 or, for frozen weights, 2) P_linear + 10 W Q``: attention's scores are recomputed."""
    return (4 if trains else 2) * m.linear + 10.0 * width * m.queries


def _temporary(m: Sizes, rows: Rows) -> float:
    """``T max(20 H, 3 b I - norm)``: the last norm's gradient in float32, or that of the last layer's MLP."""
    return rows.tokens * max(20.0 * m.width, 3.0 * m.num_bytes * m.mlp - kept_of_norm(m))


def _without_gradient(m: Sizes, rows: Rows) -> float:
    """``T b (3 I + 4 H)``: a layer that keeps nothing."""
    return rows.tokens * m.num_bytes * (3.0 * m.mlp + 4 * m.width)


def _pieces(m: Sizes, rows: Rows) -> float:
    """``b N V + 20 2^25``: gradients of the logits, and a piece in float32; in one piece ``11 N V``, and 8 kept."""
    numbers = rows.scored * m.vocabulary
    return m.num_bytes * numbers + (20.0 * AT_ONCE if numbers > AT_ONCE else 11.0 * numbers)


def _head(m: Sizes, rows: Rows, trains: bool) -> float:
    """``8 min(N V, 2^25)``: logits of a piece and their softmax in float32; for a head that trains, ``4 H V`` instead
    of the ``b H V`` that stay, and another ``b H V`` for a piece's part, if b is not 4.
    """  # fmt: skip
    numbers, head, b = min(rows.scored * m.vocabulary, AT_ONCE), float(m.width * m.vocabulary), m.num_bytes
    if not trains or b == 4:
        return 8.0 * numbers
    return (4 - b) * head + max(8.0 * numbers, b * (numbers + head))


def _again(m: Sizes, rows: Rows, layers: int) -> float:
    """FLOPs of recomputing layers, up to the last product, because DeepSpeed's linear function saves its input."""
    return rows.tokens * layers * forward_of_layer(m, rows.width)


def _stack(m: Sizes, rows: Rows, layers: int, checkpoints: bool) -> Work:
    """Layers over e with a head of K actions: all of them train, and e gets no gradient."""
    b, head, first = m.num_bytes, 2.0 * m.width * m.actions, 2.0 * m.width * (m.queries + 2 * m.keys)
    layer, temporary = kept_of_layer(m, rows.width), _temporary(m, rows)
    kept = layers * layer - 4.0 * m.width
    backward = rows.tokens * (layers * backward_of_layer(m, rows.width) - first) + 2 * rows.scored * head
    if checkpoints:  # only layer inputs are kept, the first of which is e; one layer at a time is recomputed
        kept, backward = (layers - 1.0) * b * m.width, backward + _again(m, rows, layers)
        temporary = max(temporary, rows.tokens * (layer + 3.0 * b * m.mlp - kept_of_norm(m)))
    last = kept_of_norm(m) + 16.0 * m.actions
    return Work(
        frozen=0, trained=0, known=0, look=0, temporary=temporary, kept=rows.tokens * kept + rows.scored * last,
        forward=rows.tokens * layers * forward_of_layer(m, rows.width) + rows.scored * head, backward=backward,
    )  # fmt: skip


# --- reinforcement learning ---------------------------------------------------------------------------------------


def learning(config: Config, m: Sizes, rows: Rows) -> Work:
    """The RL update in the configured mode."""
    rl = config.rl
    if rl.action_space == "token":
        return _tokens(config, m, rows)
    base = 0.0 if rl.cache_hidden_states else rows.tokens * m.layers * forward_of_layer(m, rows.width)
    held = 0.0 if rl.cache_hidden_states else m.base + m.head
    e = m.num_bytes * m.width * rows.tokens
    known = e + 4.0 * rows.scored * m.actions
    stack = _stack(m, rows, m.policy_layers, config.cluster.gradient_checkpointing)
    if rl.actor_free:
        square, out = float(m.width * m.width), float(m.width * m.actions)
        # In float32: input and output of the norm, the hidden layer, and the weights
        kept = known + rows.scored * (12.0 * m.width + 16.0 * m.actions) + 4 * square
        return Work(
            frozen=held + m.policy, trained=square + 3.0 * m.width + out + m.actions, known=known,
            kept=kept, temporary=max(_without_gradient(m, rows) - kept, 8 * (m.width * rows.scored + square)),
            look=base + stack.forward, forward=rows.scored * 2 * (square + out),
            backward=rows.scored * (2 * square + 4 * out),
        )  # fmt: skip
    tried = rows.scored * m.actions * (2 * m.blocks * m.block + 2.0 * m.width * m.vocabulary)
    return Work(
        frozen=held + m.policy + rl.marginal_aliases * (m.world_model + m.codebook), trained=m.policy, known=known,
        kept=known + stack.kept, temporary=stack.temporary,
        look=base + stack.forward + rl.marginal_aliases * tried, forward=stack.forward, backward=stack.backward,
    )  # fmt: skip


def adapters(m: Sizes, rank: int) -> float:
    """P of low-rank adapters in all linear layers: ``r (in + out)`` for each."""
    return rank * m.layers * (2.0 * (m.width + m.queries) + 2.0 * (m.width + m.keys) + 3.0 * (m.width + m.mlp))


def vectors(m: Sizes, steering: str) -> float:
    """P of steering vectors."""
    return m.width * len(steered_layers(steering, int(m.layers)))


def _tokens(config: Config, m: Sizes, rows: Rows) -> Work:
    """The base itself, its adapters, or steering vectors, whose gradient passes through the layers above the lowest."""
    rl, b, rank = config.rl, m.num_bytes, config.rl.lora_rank
    whole, passed = rl.trains_all_weights, 0 if rl.steering == "last" else m.layers
    refers = bool(rl.kl_coef or rl.kl_target) or config.learns_values
    logits, numbers = rows.scored * 2.0 * m.width * m.vocabulary, rows.scored * m.vocabulary
    own = adapters(m, rank) + vectors(m, rl.steering)
    plain = rows.tokens * m.layers * forward_of_layer(m, rows.width) + logits
    forward = plain + rows.tokens * 2 * own
    backward = rows.tokens * (passed * backward_of_layer(m, rows.width, whole) + 4 * own) + logits * (1 + whole)
    layer = kept_of_layer(m, rows.width, whole) + 7.0 * b * rank
    # Logits, also the reference's; if a Q learns over all tokens, their log-probabilities are held at the same time.
    every = config.algorithm.soft_q or rl.control_variate
    held = 12.0 if every else 8.0 if numbers <= AT_ONCE else 0.0
    wide = numbers * (b * (1 + refers) + held)
    last = rows.tokens * (kept_of_norm(m) if whole else 4.0 * m.width) + whole * rows.scored * b * m.width
    temporary = max(_temporary(m, rows), b * numbers + 20.0 * numbers if every else _pieces(m, rows))
    kept = rows.tokens * passed * layer + last + wide
    if config.cluster.gradient_checkpointing:
        kept = rows.tokens * passed * b * m.width + last + wide
        # One layer at a time is recomputed, after the logits have been freed.
        temporary = max(temporary, rows.tokens * (layer + 3.0 * b * m.mlp) - wide)
        backward += _again(m, rows, passed)
    return Work(
        frozen=(m.base + m.head) if refers or not whole else 0.0, trained=m.base + m.head if whole else own,
        kept=kept, temporary=temporary, known=refers * b * (numbers + rows.tokens * m.width), look=refers * plain,
        forward=forward, backward=backward,
    )  # fmt: skip


# --- pre-training -------------------------------------------------------------------------------------------------


def pretraining(stage: PretrainStage, m: Sizes, rows: Rows, checkpoints: bool = False) -> Work:
    """A stage of pre-training; all its tokens are scored.

    One step in ten of the stage actions also computes the bare base's logits, which are not counted here.

    Args:
        checkpoints: whether layers that train, and the world model's blocks, are recomputed (gradient checkpointing).
    """
    b, base = m.num_bytes, rows.tokens * m.layers * forward_of_layer(m, rows.width)
    idm, policy = (_stack(m, rows, layers, checkpoints) for layers in (m.idm_layers, m.policy_layers))
    e, numbers = b * m.width * rows.tokens, rows.scored * m.vocabulary
    if stage == "policy":
        return _staged(m, m.policy, e + policy.kept, policy.temporary, base + idm.forward, policy.forward,
                       policy.backward)  # fmt: skip
    logits, world = 2.0 * m.width * numbers, rows.scored * 2 * m.blocks * m.block
    temporary, pairs = _temporary(m, rows), 2.0 * b * m.width  # state and code of a block
    blocks = 0 if stage == "base" else m.blocks
    code = rows.scored * (pairs + (0.0 if checkpoints else 4.0 * b * m.mlp)) * blocks
    loss = b * m.width * rows.scored  # the head's gradient with respect to its input, computed in the forward pass
    again = world * checkpoints
    if stage == "actions":
        temporary = max(temporary, _head(m, rows, trains=False), idm.temporary - code - loss)
        return _staged(m, m.idm + m.codebook + m.world_model, 2 * e + idm.kept + code + loss, temporary, base,
                       idm.forward + world + logits, idm.backward + 2 * world + again + logits)  # fmt: skip
    layer, temporary = kept_of_layer(m, rows.width), max(temporary, _head(m, rows, trains=True))
    loss += b * m.width * m.vocabulary  # the LM head's own gradient
    whole = rows.tokens * (m.layers * (b * m.width if checkpoints else layer) + kept_of_norm(m)) + e + loss
    backward = rows.tokens * m.layers * backward_of_layer(m, rows.width) + 2 * logits
    if checkpoints:
        backward += _again(m, rows, m.layers)
        temporary = max(temporary, rows.tokens * (layer + 3.0 * b * m.mlp - kept_of_norm(m)) - code - loss)
    if stage == "base":
        return Work(
            frozen=0.0, trained=m.base + m.head, kept=whole, temporary=temporary, known=0.0,
            look=0.0, forward=base + logits, backward=backward,
        )  # fmt: skip
    look = (idm if stage == "fta_idm" else policy).forward
    return _staged(m, m.base + m.head, whole + code, temporary, look, base + world + logits,
                   backward + world + again)  # fmt: skip


def _staged(
    m: Sizes, trained: float, kept: float, temporary: float, look: float, forward: float, backward: float
) -> Work:
    """Every stage holds the whole model."""
    return Work(m.whole - trained, trained, kept, temporary, 0.0, look, forward, backward)


# --- an engine ----------------------------------------------------------------------------------------------------


def generating(m: Sizes, context: float, tokens_are_actions: bool = False) -> float:
    """FLOPs of one token in an engine; ``context`` positions are attended to."""
    head = 2.0 * m.width * m.vocabulary
    if tokens_are_actions:
        return m.layers * forward_of_layer(m, context) + head
    latent = 2 * m.blocks * m.block + 2.0 * m.width * m.actions
    return (m.layers + m.policy_layers) * forward_of_layer(m, context) + latent + head
