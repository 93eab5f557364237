"""Conversion of checkpoints: attach CoLA to a base, extract the base again, and read or write the authors' format.

Released name                                      our name
model.{embed_tokens,layers,norm}, lm_head          the same
model.action_layers.* / action_norm / action_head  idm.layers.* / idm.norm / idm.head
model.action_code_book.weight (H, K)               codebook.weight (K, H), the transpose
model.action_merge_layers.{i}.*                    world_model.{i}.*
model.policy_layers.* / policy_norm / policy_head  policy.layers.* / policy.norm / policy.head
"""

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, try_to_load_from_cache
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from yaml import YAMLError

from cola_ray.model import checkpoints, families
from cola_ray.model.modeling_cola import (
    BY_LAYER,
    RELEASED_ARCHITECTURE,
    CoLAConfig,
    CoLAForCausalLM,
    is_released,
    model_card,
)
from cola_ray.model.tensors import DiscardedDraws, Tensors, empty, place

log = logging.getLogger(__name__)
_OURS_BY_RELEASED_PREFIX = {
    "model.action_layers.": "idm.layers.",
    "model.action_norm.": "idm.norm.",
    "model.action_head.": "idm.head.",
    "model.action_code_book.": "codebook.",
    "model.action_merge_layers.": "world_model.",
    "model.policy_layers.": "policy.layers.",
    "model.policy_norm.": "policy.norm.",
    "model.policy_head.": "policy.head.",
}


def attach(
    base_path: str | os.PathLike, *, seed: int = 0, dtype: torch.dtype | None = None, family: str = "", **sizes: Any
) -> CoLAForCausalLM:
    """Add untrained CoLA modules to a base, whose weights are copied unchanged.

    The world model starts in its identity form with zero output projections, so under *any* action the token logits
    of the new model equal those of the base, bit for bit.

    Args:
        base_path: a local directory, a hub id, or a ``.gguf`` file.
        seed: for the initial weights of the new modules. They also depend on the base's sizes: the random generator is
            in the state that it would have after the base's weights had been drawn.
        dtype: of all weights; by default that of the checkpoint.
        family: import path of the family if the package does not know the base's, ``package.module:name`` or
            ``file.py:name``.
        sizes: ``num_actions``, ``num_idm_layers``, ``num_world_model_layers``, ``num_policy_layers``, ``action_every``,
            ``learnt_ends``.

    Raises:
        ValueError: CoLA does not attach to the checkpoint's family, or the family refuses this checkpoint.

    Example:
        >>> import cola_ray, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> small = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                     num_attention_heads=2, num_key_value_heads=1, eos_token_id=None)
        >>> LlamaForCausalLM(small).save_pretrained("llama")
        >>> model = cola_ray.attach("llama", num_actions=8, num_idm_layers=1, num_policy_layers=1)
        >>> model.config.num_actions, model.codebook.weight.shape
        (8, torch.Size([8, 16]))
    """
    base = load_base(base_path, dtype, family)
    known = base.config.to_dict()
    whose = {"base_model_type": base.config.model_type, "base_family": family}
    config = CoLAConfig(**{**known, **whose, **sizes, "model_type": "cola", "architectures": ["CoLAForCausalLM"]})
    config.tie_word_embeddings = base.config.tie_word_embeddings
    config.card = {"base": str(base_path)} | ({"licence": licence} if (licence := licence_of(base_path)) else {})
    model = empty(CoLAForCausalLM, config, next(base.parameters()).dtype)
    for name, parameter in base.named_parameters():  # these become the new model's
        place(model, name, parameter.data)
    del base.model, base.lm_head
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            place(model, name, torch.ones(parameter.shape, dtype=parameter.dtype))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with DiscardedDraws():
            CoLAForCausalLM(config)
        reset_latent_modules(model.train())
    # Keep the base's end tokens but not its sampling settings, which were meant for tokens.
    model.generation_config.update(**_special_tokens(base.generation_config))
    return model


def load(path: str | os.PathLike, *, dtype: torch.dtype | str = "auto", **options: Any) -> CoLAForCausalLM:
    """Load a CoLA model in evaluation mode, for ``generate`` and pipelines.

    Args:
        path: directory of a model saved by a run, a released checkpoint, or a hub id. Load its tokenizer with
            ``transformers.AutoTokenizer.from_pretrained(path)``.
        dtype: of all weights; "auto" keeps that of the checkpoint.
        options: those of ``from_pretrained``, such as ``device_map``.

    Raises:
        OSError: there is no model.
        ValueError: it is not a CoLA model.

    Example (after that of :func:`attach`):
        >>> model.save_pretrained("cola")
        >>> again = cola_ray.load("cola")
        >>> again.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0).shape
        torch.Size([1, 7])
    """
    kind = "cola" if is_released(path) else AutoConfig.from_pretrained(path).model_type
    if kind != "cola":
        raise ValueError(f"path = {str(path)!r}: a {kind!r} model, not one of CoLA's; attach() adds CoLA to a base")
    model: CoLAForCausalLM = CoLAForCausalLM.from_pretrained(path, dtype=dtype, **options)
    return model.eval()


def load_base(base_path: str | os.PathLike, dtype: torch.dtype | None = None, family: str = "") -> PreTrainedModel:
    """Load the base at ``base_path`` (directory, hub id or GGUF file); ValueError if CoLA does not attach to it."""
    path = Path(base_path)
    source, options = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(base_path), {})
    if options:
        try:
            checkpoints.shape_of(path)
        except checkpoints.UnreadableError as error:
            raise ValueError(f"model.base = {str(base_path)!r}: {error}") from None
    config = AutoConfig.from_pretrained(source, **options)
    fault = families.fault(config.to_dict(), family)
    if fault:
        raise ValueError(f"model.base = {str(base_path)!r}: {fault}")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **options)
    if options:  # loading has dequantised the weights, so this is an ordinary model now
        base.hf_quantizer, base.is_quantized = None, False
        del base.config.quantization_config
    return base


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the checkpoint at ``path`` (directory, hub id or GGUF file)."""
    file = Path(path)
    if file.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return AutoTokenizer.from_pretrained(str(path))


def plain_base(path: str | os.PathLike, target: str | os.PathLike, family: str = "") -> Path:
    """Return a directory with the plain base of ``path`` and its tokenizer, which vLLM can serve.

    Args:
        path: a base's directory or hub id, which is returned unchanged; or a GGUF file or a CoLA checkpoint, whose base
            is written to ``target``.
        target: the directory to write to.
        family: as for :func:`attach`.
    """
    if Path(path).suffix == ".gguf":
        save(load_base(path, family=family), load_tokenizer(path), target)
        return Path(target)
    if is_released(path) or AutoConfig.from_pretrained(path).model_type == "cola":
        _detach(Path(path), Path(target))
        load_tokenizer(path).save_pretrained(target)
        return Path(target)
    return Path(path)


def with_mlp_biases(path: str | os.PathLike, target: str | os.PathLike, family: str = "") -> Path:
    """Return a plain base whose MLPs have biases (0 where it had none), to which steering vectors can be added.

    Args:
        path, family: as for :func:`plain_base`.
        target: the directory to write to; if it exists already, it is returned unchanged.
    """
    target = Path(target)
    if not target.exists():
        base, staging = load_base(path, family=family), target.with_name(f"{target.name}.tmp")
        for layer in base.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                if linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
        base.config.mlp_bias = True
        save(base, load_tokenizer(path), staging)
        staging.rename(target)
    return target


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: str | os.PathLike) -> None:
    """Save a model with its tokenizer; a generation config that transformers refuses to write is repaired first."""
    model.generation_config = valid_generation_config(model.generation_config)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def describe(folder: str | os.PathLike, facts: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Add facts ("base", "data", "task", ...) and results to the card of a saved model.

    They are kept in config.json, so they stay with the model when it is saved or pushed again. For a plain model, whose
    config.json is not ours to change, they are only in README.md. Cards that a user has edited are not changed.
    """
    config, readme = AutoConfig.from_pretrained(folder), Path(folder) / "README.md"
    if not isinstance(config, CoLAConfig):
        if not readme.exists() or _PLAIN_MARK in readme.read_text():
            readme.write_text(_plain_card(config.model_type, {**facts, **figures}))
        return
    ours = not readme.exists() or readme.read_text() == model_card(config)
    known = dict(config.card or {})
    config.card = known | dict(facts) | {"figures": {**known.get("figures", {}), **figures}}
    config.save_pretrained(folder)
    if ours:
        readme.write_text(model_card(config))


def licence_of(base: str | os.PathLike) -> str:
    """The licence named in the base's own model card, in its folder or in the hub's cache; "" if none is named."""
    file = Path(base) / "README.md"
    if not file.exists():
        cached = try_to_load_from_cache(str(base), "README.md") if str(base).count("/") == 1 else None
        if not isinstance(cached, str):
            return ""
        file = Path(cached)
    try:
        found = ModelCard.load(file, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, YAMLError):
        return ""
    return found if isinstance(found, str) and re.fullmatch(r"[\w.+-]+", found) else ""


def _plain_card(kind: str, facts: Mapping[str, Any]) -> str:
    """A README.md for a model without latent actions: one from RL over tokens, or a reward model."""
    table = "\n".join(f"| {name} | {value} |" for name, value in {"architecture": kind, **facts}.items())
    return _PLAIN_CARD.format(table=table, mark=_PLAIN_MARK)


_PLAIN_MARK = "<!-- written by cola_ray; without this line the card is yours, and stays as it is -->"
_PLAIN_CARD = """---
library_name: transformers
tags:
- reinforcement-learning
- cola_ray
---

# A model trained with cola_ray

| | |
| --- | --- |
{table}

## Licence

The weights contain those of the base model: its licence applies to them, and so does that of the data.

{mark}
"""


def valid_generation_config(settings: GenerationConfig) -> GenerationConfig:
    """``settings`` if they are valid, else the nearest valid ones, with a warning.

    Some models on the hub have settings that ``save_pretrained`` refuses to write.
    """
    sampling = copy.deepcopy(settings)
    sampling.do_sample = True
    for candidate, change in (
        (settings, ""),
        (sampling, "do_sample = true is added, which its sampling settings require"),
        (GenerationConfig(**_special_tokens(settings)), "only its special tokens are kept"),
    ):
        try:
            candidate.validate(strict=True)
        except ValueError:
            continue
        if change:
            log.warning("the base's generation_config.json is not valid: %s", change)
        break
    return candidate


def _special_tokens(settings: GenerationConfig) -> dict[str, int | list[int]]:
    """The ids of the begin, end and padding tokens; some checkpoints use -1 for none."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name in names if (value := getattr(settings, name)) not in (None, -1)}


_OURS = ("world_model_form", "v", "soft_q_beta", "action_every", "learnt_ends", "card", "auto_map", "base_model_type",
         "base_family")  # fmt: skip
"""Settings that CoLA adds to a base's config.json, besides the sizes of its modules."""


def base_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base's config.json, extracted from that of a CoLA model."""
    kind, layers = settings.get("base_model_type", "llama"), settings["num_hidden_layers"]
    added = {*CoLAConfig.attribute_map, *CoLAConfig.attribute_map.values(), *_OURS}
    of_llama, of_base = ({field.name for field in fields(one)} for one in (LlamaConfig, CONFIG_MAPPING[kind]))
    raw = {name: value for name, value in settings.items()
           if name not in added and (name in of_base or name not in of_llama)}  # fmt: skip
    raw |= {"model_type": kind, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]}
    return raw | {name: raw[name][:layers] for name in BY_LAYER if raw.get(name)}


def _detach(cola: Path, target: Path) -> None:
    """Write the base of a CoLA checkpoint, one file at a time to save memory."""
    target.mkdir(parents=True, exist_ok=True)
    raw = base_settings(json.loads((cola / "config.json").read_text()))
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if (cola / "generation_config.json").is_file():  # names end tokens in addition to those in config.json
        shutil.copy(cola / "generation_config.json", target)
    files: dict[str, str] = {}
    for shard in sorted(cola.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            names = [name for name in tensors.keys() if _belongs_to_base(_to_ours(name))]  # noqa: SIM118  (not a dictionary)
            save_file({name: tensors.get_tensor(name) for name in names}, target / shard.name, {"format": "pt"})
        files |= dict.fromkeys(names, shard.name)
    if set(files.values()) != {"model.safetensors"}:
        index = {"metadata": {}, "weight_map": files}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _belongs_to_base(name: str) -> bool:
    return name.startswith(("model.", "lm_head."))


def reset_latent_modules(model: CoLAForCausalLM) -> None:
    """Initialise the modules that CoLA adds.

    Linear layers are normal with deviation 1/sqrt(fan-in), and the outputs of residual branches are scaled down. The
    world model is the identity: ``d = e + sum of blocks`` with zero output projections (in the identity form).
    """
    config = model.config
    for name, module in model.named_modules():
        if not name.startswith(("idm", "policy", "world_model")):
            continue
        if not isinstance(module, nn.Linear):
            if next(module.parameters(recurse=False), None) is not None:
                model._init_weights(module)  # norms, which start at 1, or at 0 where 1 is added to them
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        std = module.in_features**-0.5
        if name.startswith("world_model") and name.endswith("down_proj"):
            std = 0.0 if config.world_model_form == "identity" else std
        elif name.endswith(("o_proj", "down_proj")):
            std /= (2 * max(config.num_policy_layers, 1)) ** 0.5
        elif name == "policy.head":
            std *= 0.1  # close to uniform over the actions
        elif name == "idm.head":
            # Logits with a deviation of about 3. From near-uniform logits the codes would be mostly Gumbel noise, and
            # the world model would learn to ignore them before the inverse dynamics model learns to choose them.
            std *= 3.0
        nn.init.normal_(module.weight, std=std)
    nn.init.normal_(model.codebook.weight, std=1.0)


def opened(path: str | os.PathLike) -> tuple[Any, Tensors]:
    """The configuration and the tensors, under our names, of a base or of a CoLA checkpoint in either format."""
    if not is_released(path):
        return AutoConfig.from_pretrained(path), Tensors(path)
    raw = json.loads((Path(path) / "config.json").read_text())
    raw |= {"model_type": "cola", "architectures": ["CoLAForCausalLM"], "world_model_form": "released"}
    return CoLAConfig(**raw), Tensors(path, _to_ours, _transposed_codebook)


def load_released(path: str | os.PathLike, **kwargs: Any) -> CoLAForCausalLM:
    """Load a checkpoint in the authors' format; every tensor must be present and used.

    Args:
        kwargs: those of ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Raises:
        FileNotFoundError: weights are missing (the message names the files).
        ValueError: a tensor is missing, unknown, or of the wrong shape (the message lists names).
    """
    config, tensors = opened(path)
    expected = {name: one.shape for name, one in empty(CoLAForCausalLM, config, torch.float32).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    names = {*tensors} - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    missing, unknown = sorted(expected.keys() - names), sorted(names - expected.keys())
    if missing or unknown:
        raise ValueError(f"model.path: {path} lacks {missing[:5]} and has unknown {unknown[:5]}")
    wrong = [f"{name} {tuple(tensors.shape(name))}" for name in expected if tensors.shape(name) != expected[name]]
    if wrong:
        raise ValueError(f"model.path: in {path} config.json asks for other shapes than {wrong[:5]}")
    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", None) or "auto")
    if kwargs["dtype"] == "auto":
        kwargs["dtype"] = tensors.dtype("model.embed_tokens.weight")
    mapped = {name: tensors.read(name) for name in names}  # memory-mapped; from_pretrained copies them one by one
    model = CoLAForCausalLM.from_pretrained(None, config=config, state_dict=mapped, **kwargs)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config.update(**_special_tokens(GenerationConfig.from_pretrained(path)))
    return model


def export_released(model: CoLAForCausalLM, path: str | os.PathLike) -> None:
    """Write ``model`` in the authors' format; tensors loaded from a released checkpoint are written byte-identical.

    Raises:
        ValueError: the world model is in the identity form, the policy has a Q, actions last several tokens, or the
            base is not a Llama; the released code supports none of these.
    """
    if model.config.base_model_type != "llama":
        raise ValueError(
            f"base_model_type: {model.config.base_model_type!r} cannot be exported; the released format is of a Llama"
        )
    if model.config.soft_q_beta:
        raise ValueError("soft_q_beta: a policy with a Q cannot be exported; the released format has no place for it")
    if lasting := model.config.lasting:
        raise ValueError(f"{lasting}: cannot be exported; the released code chooses a new action at every token")
    if model.config.world_model_form != "released":
        raise ValueError("world_model_form: 'identity' cannot be exported; the released format implies 'released'")
    Path(path).mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        released = _to_released(name)
        tensors[released] = _transposed_codebook(released, tensor).contiguous()
    save_file(tensors, Path(path) / "model.safetensors", metadata={"format": "pt"})
    raw = model.config.to_dict()
    for released, ours in CoLAConfig.attribute_map.items():
        raw[released] = raw.pop(ours, None) or getattr(model.config, ours)
    for name in _OURS:
        raw.pop(name, None)
    # The released code reads the settings of the rotary embedding from these two entries.
    rope = dict(raw.get("rope_parameters") or {})
    raw["rope_theta"] = rope.pop("rope_theta", None) or 10000.0
    raw["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    raw |= {"architectures": [RELEASED_ARCHITECTURE], "model_type": "llama", "v": 1}
    (Path(path) / "config.json").write_text(json.dumps(raw, indent=2, default=str) + "\n")


def _to_ours(name: str) -> str:
    for released, ours in _OURS_BY_RELEASED_PREFIX.items():
        if name.startswith(released):
            return ours + name.removeprefix(released)
    return name


def _to_released(name: str) -> str:
    for released, ours in _OURS_BY_RELEASED_PREFIX.items():
        if name.startswith(ours):
            return released + name.removeprefix(ours)
    return name


def _transposed_codebook(released_name: str, tensor: Tensor) -> Tensor:
    """Transpose a codebook, which is (H, K) in the released format and (K, H) in ours; return other tensors as is."""
    return tensor.t().contiguous() if released_name.startswith("model.action_code_book.") else tensor
