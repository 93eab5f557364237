"""Checkpoints in and out: attach CoLA to a Llama, and the authors' released names.

Released name                                      ours
model.{embed_tokens,layers,norm}, lm_head          the same
model.action_layers.* / action_norm / action_head  idm.layers.* / idm.norm / idm.head
model.action_code_book.weight (H, K)               codebook.weight (K, H), the transpose
model.action_merge_layers.{i}.*                    world_model.{i}.*
model.policy_layers.* / policy_norm / policy_head  policy.layers.* / policy.norm / policy.head
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cola_ray.model.modeling_cola import CoLAConfig, CoLAForCausalLM

RELEASED_ARCHITECTURE = "IntentionForCausalLM"
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
    base_path: str | os.PathLike, *, seed: int = 0, dtype: torch.dtype | None = None, **sizes: Any
) -> CoLAForCausalLM:
    """Put an untrained CoLA around a Llama checkpoint; the base's weights are taken over untouched.

    The world model starts in its identity form with zero output projections, so under *any* action the new
    model's token logits are the base's, bit for bit.

    Args:
        base_path: a local directory, a hub id, or a ``.gguf`` file.
        seed: of the new modules' initial weights.
        dtype: of all weights; default the checkpoint's own.
        sizes: ``num_actions``, ``num_idm_layers``, ``num_world_model_layers``, ``num_policy_layers``.

    Raises:
        ValueError: the checkpoint is not a Llama.
    """
    base = load_base(base_path, dtype)
    known = base.config.to_dict()
    known.pop("quantization_config", None)  # a GGUF file's; its weights were unpacked on loading
    config = CoLAConfig(**{**known, **sizes, "model_type": "cola", "architectures": ["CoLAForCausalLM"]})
    config.tie_word_embeddings = base.config.tie_word_embeddings
    weights_dtype = next(base.parameters()).dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CoLAForCausalLM(config).to(weights_dtype)
        reset_latent_modules(model)
    model.model.load_state_dict(base.model.state_dict())
    if not config.tie_word_embeddings:
        model.lm_head.load_state_dict(base.lm_head.state_dict())
    model.tie_weights()
    return model


def load_base(base_path: str | os.PathLike, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The Llama at ``base_path`` (directory, hub id or GGUF file); ValueError if it is another architecture."""
    path = Path(base_path)
    source, options = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(base_path), {})
    config = AutoConfig.from_pretrained(source, **options)
    if config.model_type != "llama":
        raise ValueError(
            f"model.base: {base_path} is a {config.model_type!r} model; CoLA attaches to Llama checkpoints"
        )
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **options)


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Of the checkpoint at ``path`` (directory, hub id or GGUF file)."""
    file = Path(path)
    if file.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return AutoTokenizer.from_pretrained(str(path))


def plain_base(path: str | os.PathLike, target: str | os.PathLike) -> Path:
    """A directory of the plain Llama at ``path``, which vLLM can serve, with its tokenizer.

    Args:
        path: a Llama's directory or hub id, which is the answer itself; a GGUF file or a CoLA checkpoint, whose base is
            written to ``target``.
    """
    if Path(path).suffix == ".gguf":
        load_base(path).save_pretrained(target)
    elif is_released(path) or AutoConfig.from_pretrained(path).model_type == "cola":
        _detach(Path(path), Path(target))
    else:
        return Path(path)
    load_tokenizer(path).save_pretrained(target)
    return Path(target)


def _detach(cola: Path, target: Path) -> None:
    """File by file, so that no more than one of them is in memory."""
    target.mkdir(parents=True, exist_ok=True)
    raw = json.loads((cola / "config.json").read_text())
    of_cola = {*CoLAConfig.attribute_map, *CoLAConfig.attribute_map.values(), "world_model_form", "v", "soft_q_beta"}
    raw = {name: value for name, value in raw.items() if name not in of_cola}
    raw |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    places: dict[str, str] = {}
    for shard in sorted(cola.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            names = [name for name in tensors.keys() if _is_of_base(_to_ours(name))]  # noqa: SIM118  (no dictionary)
            save_file({name: tensors.get_tensor(name) for name in names}, target / shard.name, {"format": "pt"})
        places |= dict.fromkeys(names, shard.name)
    if set(places.values()) != {"model.safetensors"}:
        index = {"metadata": {}, "weight_map": places}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _is_of_base(name: str) -> bool:
    return name.startswith(("model.", "lm_head."))


def reset_latent_modules(model: CoLAForCausalLM) -> None:
    """Initial weights of what CoLA adds: 1/sqrt(fan-in) linears, residual outputs scaled down, identity world model."""
    config = model.config
    for name, module in model.named_modules():
        if not name.startswith(("idm", "policy", "world_model")) or not isinstance(module, nn.Linear):
            continue
        std = module.in_features**-0.5
        if name.startswith("world_model") and name.endswith("down_proj"):
            std = 0.0 if config.world_model_form == "identity" else std
        elif name.endswith(("o_proj", "down_proj")):
            std /= (2 * max(config.num_policy_layers, 1)) ** 0.5
        elif name == "policy.head":
            std *= 0.1  # close to uniform over the actions
        elif name == "idm.head":
            # Sure of its codes from the start: were the actions mostly Gumbel noise, the world model would learn to
            # ignore them before the inverse dynamics model learns to choose them.
            std *= 3.0
        nn.init.normal_(module.weight, std=std)
    nn.init.normal_(model.codebook.weight, std=1.0)


def is_released(path: str | os.PathLike) -> bool:
    """Does this directory hold a checkpoint in the authors' names?"""
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        return False
    return RELEASED_ARCHITECTURE in (json.loads(config_file.read_text()).get("architectures") or [])


def load_released(path: str | os.PathLike, *, dtype: torch.dtype | None = None, **_: Any) -> CoLAForCausalLM:
    """Read a released checkpoint; every tensor must be there and used.

    Raises:
        ValueError: a tensor is missing, unknown, or of the wrong shape (the message lists names).
    """
    raw = json.loads((Path(path) / "config.json").read_text())
    raw |= {"model_type": "cola", "architectures": ["CoLAForCausalLM"], "world_model_form": "released"}
    tensors: dict[str, Tensor] = {}
    for shard in sorted(Path(path).glob("*.safetensors")):
        tensors |= {_to_ours(name): _flip(name, tensor) for name, tensor in load_file(shard).items()}
    config = CoLAConfig(**raw)
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model = CoLAForCausalLM(config)
    stored = next(iter(tensors.values())).dtype
    model.to(dtype or stored)
    expected = model.state_dict().keys()
    missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unknown:
        raise ValueError(f"model.path: {path} lacks {missing[:5]} and has unknown {unknown[:5]}")
    model.load_state_dict(tensors)
    return model.eval()


def export_released(model: CoLAForCausalLM, path: str | os.PathLike) -> None:
    """Write ``model`` in the authors' names; tensors that came from a released checkpoint go back byte-identical.

    Raises:
        ValueError: the world model is in the identity form, or the policy has a Q: the released code reads neither.
    """
    if model.config.soft_q_beta:
        raise ValueError("soft_q_beta: a policy with a Q cannot be exported; the released format has no place for it")
    if model.config.world_model_form != "released":
        raise ValueError("world_model_form: 'identity' cannot be exported; the released format implies 'released'")
    Path(path).mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        released = _to_released(name)
        tensors[released] = _flip(released, tensor).contiguous()
    save_file(tensors, Path(path) / "model.safetensors", metadata={"format": "pt"})
    raw = model.config.to_dict()
    for released, ours in CoLAConfig.attribute_map.items():
        raw[released] = raw.pop(ours, None) or getattr(model.config, ours)
    raw.pop("world_model_form", None)
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


def _flip(released_name: str, tensor: Tensor) -> Tensor:
    """The released codebook is a linear over one-hots, (H, K); ours is a table, (K, H)."""
    return tensor.t().contiguous() if released_name.startswith("model.action_code_book.") else tensor
