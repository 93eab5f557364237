"""Checks a checkpoint from its files, without loading the weights.

    faults(Path("outputs/demo/model"))            ["model.safetensors cannot be read (...); copy the checkpoint again"]
    shape_of(Path("SmolLM2-135M.gguf"))           sizes from config.json or from the header of a GGUF file

Needs only Python, NumPy and safetensors, so that a command line can be refused before torch is imported.
"""

import json
import struct
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cola_ray import registry

RELEASED = "IntentionForCausalLM"
"""Architecture named in the authors' checkpoints; their model_type is "llama"."""
NAMED_ALIKE = ("cola", *registry.BUILT_IN["base"])
"""Model types that use the same names for the embeddings and the last norm."""


class UnreadableError(ValueError):
    """A checkpoint's files are missing or broken; the message is ``why; fix``."""


@dataclass(frozen=True)
class Shape:
    """Properties that decide whether a checkpoint can be served and trained; 0 or "" if the checkpoint lacks them."""

    kind: str  # model_type; "cola" also for the authors' checkpoints
    head: int = 0  # size of an attention head
    positions: int = 0  # longest sequence
    vocabulary: int = 0  # rows of the embeddings
    actions: int = 0
    quantised: str = ""  # quantisation method
    settings: Mapping[str, Any] = field(default_factory=dict)  # the base's config.json, as its family reads it


def shape_of(path: Path) -> Shape:
    """Properties of a directory or a GGUF file; UnreadableError if config.json or the header cannot be read."""
    if path.suffix == ".gguf":
        return _of_gguf(path)
    raw = _json(path / "config.json")
    width, heads = raw.get("hidden_size", 0), raw.get("num_attention_heads", 0)
    numbers = (width, heads, raw.get("vocab_size", 0), raw.get("max_position_embeddings") or 0)
    if any(not isinstance(number, int) for number in numbers):
        raise UnreadableError(f"{path / 'config.json'} has sizes that are not integers; copy the checkpoint again")
    kind = "cola" if RELEASED in (raw.get("architectures") or []) else str(raw.get("model_type", "unknown"))
    return Shape(
        kind=kind,
        head=raw.get("head_dim") or (width // heads if heads else 0),
        positions=raw.get("max_position_embeddings") or 0,
        vocabulary=raw.get("vocab_size") or 0,
        actions=raw.get("num_actions") or raw.get("num_code") or 0,
        quantised=str((raw.get("quantization_config") or {}).get("quant_method", "")),
        settings=raw | ({"model_type": raw.get("base_model_type", "llama")} if kind == "cola" else {}),
    )


def faults(path: Path, tokenizer: bool = True) -> list[str]:
    """Reasons why the weights or the tokenizer of a directory or GGUF file cannot be used, each as ``why; fix``."""
    try:
        shape = shape_of(path)
        if path.suffix == ".gguf":
            return []  # shape_of has checked the whole header
        tensors = _tensors(path)
        width = _tokenizer_width(path) if tokenizer else 0
    except UnreadableError as error:
        return [str(error)]
    found = []
    embeddings = tensors.get("model.embed_tokens.weight", (shape.vocabulary,))[0]
    if shape.kind in NAMED_ALIKE and tensors:
        wanted = ["model.embed_tokens.weight", "model.norm.weight"]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            found.append(f"its weights lack {', '.join(missing)}; give a whole {shape.kind} checkpoint")
        elif shape.vocabulary and embeddings != shape.vocabulary:
            found.append(f"its embeddings have {embeddings} rows and its config.json says {shape.vocabulary}; they "
                         "are not of one checkpoint")  # fmt: skip
    if width and embeddings and width > embeddings:
        found.append(f"its tokenizer has ids up to {width - 1} and the embeddings {embeddings} rows; give the "
                     "tokenizer that the weights were trained with, or widen the embeddings")  # fmt: skip
    return found


def reward_model_faults(path: Path) -> list[str]:
    """Reasons why a directory is not a reward model: without its head, rewards would come from a random one."""
    architectures = [] if path.suffix == ".gguf" else _json(path / "config.json").get("architectures") or []
    if not architectures or any("SequenceClassification" in str(name) for name in architectures):
        return []
    wanted = "give a sequence classifier, e.g. what `cola_ray reward-model` left"
    return [f"{architectures[0]}, which gives no rewards; {wanted}"]


def _json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UnreadableError(f"no {file.name} in it; give the folder of a checkpoint") from None
    except OSError as error:
        raise UnreadableError(f"{file}: {error.strerror}; make it readable") from None
    except ValueError as error:
        raise UnreadableError(f"{file} is not complete JSON ({error}); copy the checkpoint again") from None
    if not isinstance(raw, dict):
        raise UnreadableError(f"{file} is not a JSON object; copy the checkpoint again")
    return raw


# --- safetensors --------------------------------------------------------------------------------------------------


def _tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in safetensors files, by name; empty if the weights are in another format."""
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = _json(index).get("weight_map", {})
        absent = sorted({str(name) for name in named.values()} - {shard.name for shard in shards})
        if absent:
            raise UnreadableError(f"{absent[0]} is missing, which {index.name} names; copy the checkpoint again")
    if not shards and not list(folder.glob("*.bin")):
        raise UnreadableError("no weights in it (*.safetensors); give the folder of a checkpoint")
    return {name: shape for shard in shards for name, shape in _header(shard)}


def q_actions(file: Path) -> int:
    """Number of actions of a ``q.safetensors`` by `cola_ray train-q`; UnreadableError if the file is something else."""
    shapes = dict(_header(file))
    if "layers.2.weight" not in shapes:
        raise UnreadableError(f"{file.name} holds no Q of latent actions; give the folder model/ of `cola_ray train-q`")
    return shapes["layers.2.weight"][0]


def _header(shard: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, "np") as tensors:  # checks the length of the file against its header
            for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                yield name, tuple(tensors.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise UnreadableError(f"{shard.name} cannot be read ({error}); copy the checkpoint again") from None


# --- tokenizers ---------------------------------------------------------------------------------------------------


def _tokenizer_width(folder: Path) -> int:
    """One more than the largest token id of the folder's tokenizer; 0 if its JSON files do not tell."""
    file = folder / "tokenizer.json"
    if not file.exists():
        if any((folder / name).exists() for name in ("tokenizer.model", "vocab.json", "spiece.model")):
            return 0
        raise UnreadableError("no tokenizer in it; save the base's tokenizer beside the weights")
    raw = _json(file)
    vocabulary = (raw.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else [len(vocabulary) - 1]
    ids += [token["id"] for token in raw.get("added_tokens") or [] if isinstance(token, Mapping) and "id" in token]
    return max((number for number in ids if isinstance(number, int)), default=-1) + 1


def chat_template(folder: Path) -> str:
    """The chat template of a folder's tokenizer, or all of them if it has several; empty if it has none."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text("utf-8")
    said = _json(settings).get("chat_template") if settings.is_file() else ""
    return said if isinstance(said, str) else json.dumps(said)


# --- GGUF ---------------------------------------------------------------------------------------------------------

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_KINDS = {"gemma3": "gemma3_text"}
"""transformers' ``model_type`` of architectures that llama.cpp names differently."""
_HEADS = {"qwen3": 128, "gemma3": 256}
"""Head sizes that transformers assumes for GGUF files of these architectures, whatever their headers say."""


def _of_gguf(path: Path) -> Shape:
    """Read the header; its format is in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
    try:
        with path.open("rb") as file:
            magic, version, tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise UnreadableError("not a GGUF file of version 2 or 3; give another file")
            known, names = {}, set()
            for _ in range(pairs):
                name = _text(file)
                known[name] = _gguf_value(file, _unpack(file, "I"))
            last = 0
            for _ in range(tensors):
                names.add(_text(file))
                dimensions = _unpack(file, "I")
                file.seek(8 * dimensions + 4, 1)
                last = max(last, _unpack(file, "Q"))
            if file.tell() + last >= path.stat().st_size:
                raise UnreadableError("the file is cut short; copy it again")
    except (struct.error, UnicodeDecodeError, MemoryError, OverflowError):
        raise UnreadableError("its header is broken or cut short; copy it again") from None
    except OSError as error:
        raise UnreadableError(f"{error.strerror}; make it readable") from None
    kind = str(known.get("general.architecture", "unknown"))
    width, heads = known.get(f"{kind}.embedding_length", 0), known.get(f"{kind}.attention.head_count", 0)
    head = known.get(f"{kind}.attention.key_length") or (width // heads if isinstance(heads, int) and heads else 0)
    if lost := _lost(kind, head, known, names):
        raise UnreadableError(f"transformers does not read {lost} from a GGUF file; give its safetensors files")
    return Shape(
        kind=_KINDS.get(kind, kind),
        head=head,
        positions=known.get(f"{kind}.context_length", 0),
        vocabulary=known.get(f"{kind}.vocab_size") or known.get("tokenizer.ggml.tokens", 0),
        settings={"model_type": _KINDS.get(kind, kind)},
    )


def _lost(kind: str, head: int, known: Mapping[str, Any], names: Container[str]) -> str:
    """What transformers would ignore in the file, so that it would open a different model, or none; empty: nothing."""
    if kind == "smollm3":
        return "a smollm3 model"
    if known.get(f"{kind}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
        return "scaled rotary embeddings"
    if head != _HEADS.get(kind, head):
        return f"the size of a {kind} model's heads, {head},"
    return ""


def _gguf_value(file: IO[bytes], kind: int) -> Any:
    """The value of a scalar or text, or the length of an array."""
    if kind in _SCALARS:
        return _unpack(file, _SCALARS[kind])
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        raise UnreadableError(f"its header has a value of unknown type {kind}; copy it again")
    inner, length = _unpack(file, "I"), _unpack(file, "Q")
    if inner in _SCALARS:
        file.seek(struct.calcsize(_SCALARS[inner]) * length, 1)
    else:
        for _ in range(length):
            _gguf_value(file, inner)
    return length


def _text(file: IO[bytes]) -> str:
    length = _unpack(file, "Q")
    data = file.read(min(length, 1 << 24))
    if len(data) < length:
        raise UnreadableError("its header is broken or cut short; copy it again")
    return data.decode("utf-8", "replace")


def _unpack(file: IO[bytes], form: str) -> Any:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]
