"""Families of bases that CoLA attaches to, one row each, by the ``model_type`` in their config.json.

A row contains only what cannot be derived. transformers finds the base's classes by its ``model_type``, and a policy is
built from the classes of the base's layers, norm and rotary embedding (``modeling_cola.base_class``). Parameter names
in a weight update, biases, norms of queries and keys, tied heads, and the layers that LoRA adapts are read from these
modules (``rollout/weight_loading.py``).

    learner   model_type ─> transformers' classes ─> base, and policy of the base's own layers
    engine    BaseFamily.served_by ─> vLLM's model ─> base, and policy of the model's own layers

docs/extending.md shows how to add a family. Needs only Python, so a command line can be refused before torch is
imported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cola_ray import registry

Settings = Mapping[str, Any]
"""A config.json."""


def _nothing(_: Settings) -> str:
    return ""


@dataclass(frozen=True)
class BaseFamily:
    """How a family of bases is served, and which of its checkpoints are refused.

    Args:
        served_by: vLLM's model without a head, ``module:Class``. Its ``layers`` take ``(positions, hidden, residual)``
            and give ``(hidden, residual)``; its ``norm`` takes both.
        refused: returns why a checkpoint with this config.json is refused, as ``why; fix``; empty if it is not.
        mlp_bias: whether ``mlp_bias`` in config.json gives the MLPs biases, in transformers as in vLLM; steering
            vectors are stored as these biases.
    """

    served_by: str
    refused: Callable[[Settings], str] = _nothing
    mlp_bias: bool = False


def sees_everything(config: Any) -> bool:
    """Whether all layers of a model with this configuration of transformers attend to the full context."""
    kinds = {*(getattr(config, "layer_types", None) or ())}
    return getattr(config, "sliding_window", None) is None and kinds <= {"full_attention"}


def fault(settings: Settings, given: str = "") -> str:
    """Why CoLA cannot attach to a base with this config.json, as ``why; fix``; empty if it can.

    Args:
        given: import path of the family, used instead of the registered one for the ``model_type``.

    Example:
        >>> fault({"model_type": "qwen3"}), fault({"model_type": "mixtral"})[:46]
        ('', "a 'mixtral' model, whose layers are mixtures o")
    """
    kind = str(settings.get("model_type", "unknown"))
    try:
        return family(kind, given).refused(settings)
    except registry.NotFoundError as error:
        if given:
            return f"family {given!r}: {error}"
    known = ", ".join(registry.names("base"))
    why = next((f", whose {why}" for marks, why in _OTHERS.items() if any(mark in kind for mark in marks)), "")
    return f"a {kind!r} model{why}; CoLA attaches to {known}, or to what model.family names (docs/extending.md)"


def family(model_type: str, given: str = "") -> BaseFamily:
    """The family of a base; NotFoundError if there is none, or if the path leads to something else.

    Args:
        given: as in :func:`fault`.
    """
    found = registry.find("base", given or model_type)
    if not isinstance(found, BaseFamily):
        raise registry.NotFoundError(f"it is of type {type(found).__name__}; name an instance of BaseFamily")
    return found


def has_plain_head(settings: Settings) -> bool:
    """Whether a base's token logits are ``lm_head`` applied to its last states, without bias, scale or cap.

    This is known only for the built-in families; logits of any other must come from its own class in transformers.

    Example:
        >>> has_plain_head({"model_type": "qwen3"}), has_plain_head({"model_type": "granite", "logits_scaling": 8.0})
        (True, False)
    """
    return settings.get("model_type") in registry.BUILT_IN["base"] and not fault(settings)


_OTHERS = {
    ("moe", "mixtral", "gpt_oss", "deepseek"): "layers are mixtures of experts: transformers stacks their weights, "
    "vLLM splits them, and no weight update here names either",
    ("_vl", "llava", "vision", "mllama", "paligemma", "idefics"): "prompts hold images: tasks, batches and weight "
    "updates here know tokens only",
    ("mamba", "jamba", "hybrid", "zamba", "rwkv", "qwen3_next", "qwen3_5", "lfm2"): "layers keep a recurrent state: "
    "packed rows and the engine's states of e presume attention",
    ("olmo",): "layers vLLM serves through transformers only, where a policy's layers would have "
    "no key/value cache",
}  # fmt: skip
"""Why other families are not in the table, by a part of their ``model_type``."""


# --- the rows -----------------------------------------------------------------------------------------------------


def _windows(settings: Settings) -> str:
    if not settings.get("use_sliding_window"):
        return ""
    return "use_sliding_window is set, and vLLM's layers of this family have no windows; use a base without"


def _windows_or_output_bias(settings: Settings) -> str:
    if settings.get("attention_bias"):
        return "attention_bias is set, and vLLM's o_proj of this family has no bias; use a base without"
    return _windows(settings)


def _not_causal_or_capped(settings: Settings) -> str:
    if settings.get("use_bidirectional_attention"):
        return "use_bidirectional_attention is set, and policies are causal; use a base without"
    if settings.get("final_logit_softcapping"):
        return "final_logit_softcapping is set, and logits here have no cap; use a base without"
    return ""


LLAMA = BaseFamily("vllm.model_executor.models.llama:LlamaModel", mlp_bias=True)
"""Llama 2 and 3.x with scaled rotary embeddings, SmolLM2, and other models of this form, with or without biases."""
MISTRAL = BaseFamily("vllm.model_executor.models.mistral:MistralModel")
"""Either all layers use a sliding window, or none does."""
QWEN2 = BaseFamily("vllm.model_executor.models.qwen2:Qwen2Model", _windows)
"""Qwen2 and Qwen2.5: queries, keys and values have biases."""
QWEN3 = BaseFamily("vllm.model_executor.models.qwen3:Qwen3Model", _windows_or_output_bias)
"""Queries and keys are normalised, and the head size is set independently."""
GEMMA3_TEXT = BaseFamily("vllm.model_executor.models.gemma3:Gemma3Model", _not_causal_or_capped)
"""Gemma 3 without images: sliding windows in some layers, four norms per layer that start at 0, scaled embeddings."""
SMOLLM3 = BaseFamily("cola_ray.model.vllm_smollm3:SmolLM3Model", mlp_bias=True)
"""Some layers have no rotary embedding."""
