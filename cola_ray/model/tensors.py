"""Reads checkpoints tensor by tensor, and makes models without weights that can be filled in this way.

    empty(LlamaForCausalLM, config, dtype) ─> parameters on the meta device, buffers real
    Tensors(path).read(name)               ─> one tensor, from safetensors or torch files

Tensors in safetensors files are memory-mapped, so a loader that copies its share of each needs little more memory than
that share.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Renaming = Callable[[str], str]


class Tensors:
    """The tensors of a checkpoint by name; a file is opened for one tensor at a time, so that no mapping is kept.

    Args:
        path: directory, or a hub id whose weights are downloaded first.
        renamed: maps a name in the files to the name used here.
        converted: converts a tensor after reading, given its name in the files.

    Raises:
        FileNotFoundError: weights are missing (the message names the files).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        renamed: Renaming = lambda name: name,
        converted: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
    ) -> None:
        self.path, self.converted = path, converted
        self._places: dict[str, tuple[Path, str]] = {}
        for file in weight_files(_folder(path)):
            self._places |= {renamed(name): (file, name) for name in _names(file)}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> Tensor:
        """Return a tensor in the checkpoint's dtype; its memory may be mapped from the file."""
        file, stored = self._places[name]
        if file.suffix != ".safetensors":
            return self.converted(stored, _torch_file(file)[stored])
        with safe_open(file, "pt") as opened:
            return self.converted(stored, opened.get_tensor(stored))

    def shape(self, name: str) -> torch.Size:
        """Return a tensor's shape; in safetensors files, the tensor itself is not read."""
        file, stored = self._places[name]
        if file.suffix != ".safetensors":
            return self.read(name).shape
        with safe_open(file, "pt") as opened:
            there = torch.empty(opened.get_slice(stored).get_shape(), device="meta")
        return self.converted(stored, there).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.read(name).dtype


def weight_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint, safetensors if there are any; FileNotFoundError if one is missing."""
    for kind, index in (("*.safetensors", "model.safetensors.index.json"), ("*.bin", "pytorch_model.bin.index.json")):
        files = sorted(file for file in path.glob(kind) if file.name != "training_args.bin")
        if (path / index).is_file():
            files = [path / name for name in sorted({*json.loads((path / index).read_text())["weight_map"].values()})]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(
                        f"model.path: {file} is missing, which {index} names; download the checkpoint again"
                    )
        if files:
            return files
    raise FileNotFoundError(
        f"model.path: {path} has neither model.safetensors nor pytorch_model.bin, nor shards of one"
    )


def _folder(path: str | os.PathLike) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))
    return folder if list(folder.glob("*.safetensors")) else Path(snapshot_download(str(path), allow_patterns="*.bin*"))


def _names(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return list(_torch_file(file))
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _torch_file(file: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return tensors


def empty(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a model whose parameters have a shape but no memory; buffers, e.g. of rotary embeddings, are real.

    Args:
        kind: the model's class, from transformers or derived from such a class; or an ``AutoModelFor...``.
    """
    from accelerate import init_empty_weights  # models that are opened whole run without it

    make = getattr(kind, "from_config", None) or kind._from_config
    with init_empty_weights(include_buffers=False):
        model = make(config, dtype=dtype)
    model.tie_weights()  # each parameter was replaced by one on the meta device
    return model.eval()


def place(module: nn.Module, name: str, tensor: Tensor) -> nn.Parameter:
    """Make ``tensor`` the parameter ``name`` of a module, wherever it is tied to that name."""
    old = module.get_parameter(name)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    for owner in module.modules():
        for own, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(owner, own, new)
    return new


class DiscardedDraws(TorchDispatchMode):
    """Gives empty tensors no memory; the random numbers that would fill them are drawn and discarded, piece by piece.

    So the random generator ends in the same state as after really initialising the model.
    """

    PIECE = 1 << 22
    """Numbers drawn at a time, a multiple of the 16 that torch generates together."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            left = args[0].numel()
            while left:
                size = left if left < 2 * self.PIECE else self.PIECE
                func(torch.empty(size, dtype=args[0].dtype), *args[1:], **kwargs)
                left -= size
        return func(*args, **kwargs)
