"""Outputs of frozen modules for a corpus's tokens, computed once and kept on disk: the base's states, the IDM's labels.

    a micro-batch ──are all of its tokens kept, on all ranks?──┬─ yes ─> read
                                                               └─ no ──> computed by all ranks, written, used as written

    FOLDER/<digest>/000000.values    numbers by token, in the corpus's order; holes where nothing was computed yet
                    000000.checks    a CRC-32 of each piece at its first token; 0 where there is none

Nothing is computed ahead: the first step that trains on a token writes what later epochs and stages read. So the base
runs once for each token that is trained on, and a killed run continues with what is on disk. A piece with a wrong CRC
(e.g. after a power failure) is computed again. Folders are identified by a digest of the corpus, of the weights that
computed the values, and of the numbers' type.

A state depends only on its document, but its last bits depend on where in a row the document stands. So in float32
training is the same bit for bit while rows are repeated unchanged (with shards in the first epoch, with data in memory
in all epochs), and up to rounding in later epochs, whose rows are packed anew.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cola_ray.learner.packed import Rows
from cola_ray.learner.stage_module import StageModule
from cola_ray.model import conversion
from cola_ray.settings.config import Config

FORMAT = 1
TOKENS_A_FILE = 1 << 20
_OPEN = 64  # files of a store, two descriptors each
_NOTES = ("_name_or_path", "transformers_version", "dtype")  # entries of a config.json that change no state


class TokenStore:
    """Numbers by token in a folder's files, written and read in pieces of consecutive tokens.

    A piece is in the file of its first token. Processes may share a store: pieces do not overlap, and a piece that two
    processes wrote at the same time is valid if both wrote the same.

    Args:
        width: numbers per token.
        dtype: float32, bfloat16 or int16.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype) -> None:
        self.folder, self.width, self.dtype = folder, width, dtype
        self.size = width * dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[int, tuple[io.FileIO, io.FileIO]] = {}

    def read(self, address: int, into: Tensor) -> bool:
        """Fill ``into``, (n, width), contiguous, with the piece at a token's address; returns whether it exists."""
        file, place = divmod(address, TOKENS_A_FILE)
        values, checks = self._opened(file)
        check = os.pread(checks, 4, 4 * place)
        if len(check) < 4 or check == bytes(4):
            return False
        view = into.view(torch.uint8).numpy().data.cast("B")
        return os.preadv(values, [view], self.size * place) == len(view) and _check(view) == check

    def write(self, address: int, piece: Tensor) -> None:
        """Write a piece, (n, width).

        Raises:
            OSError: there is no space.
        """
        file, place = divmod(address, TOKENS_A_FILE)
        values, checks = self._opened(file)
        view = piece.contiguous().view(torch.uint8).numpy().data.cast("B")
        written = 0
        while written < len(view):
            written += os.pwrite(values, view[written:], self.size * place + written)
        os.pwrite(checks, _check(view), 4 * place)

    def _opened(self, file: int) -> tuple[int, int]:
        if file not in self._files:
            if len(self._files) >= _OPEN:
                self._close(next(iter(self._files)))
            paths = (self.folder / f"{file:06d}.{kind}" for kind in ("values", "checks"))
            first, second = (open(path, "r+b", 0, opener=_made) for path in paths)  # noqa: SIM115
            self._files[file] = first, second
        values, checks = self._files[file]
        return values.fileno(), checks.fileno()

    def _close(self, file: int) -> None:
        for one in self._files.pop(file):
            one.close()

    def __del__(self) -> None:
        for file in list(self._files):
            self._close(file)


def _made(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o644)


def _check(view: memoryview) -> bytes:
    return (zlib.crc32(view) or 1).to_bytes(4, "little")


class Kept:
    """One frozen module's outputs for the tokens of rows: a store for each pool of the corpus.

    Args:
        folder: of all stores.
        of: digest of the module that computes the outputs.
    """

    def __init__(self, rows: Rows, folder: Path, of: str, width: int, dtype: torch.dtype) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        digests = (_digest([FORMAT, of, one, rows.width, width, str(dtype)]) for one in rows.fingerprints)
        self.stores = [TokenStore(folder / digest, width, dtype) for digest in digests]

    def get(self, indices: np.ndarray, device: torch.device, compute: Callable[[], Tensor]) -> Tensor:
        """The outputs for these rows, (B, T, width) in the store's type, on ``device``; a collective.

        Args:
            compute: computes all of them, in any type; called on all ranks if one of them lacks a piece.
        """
        pieces = self.rows.pieces(indices)
        found = torch.zeros(len(indices), self.rows.width, self.width, dtype=self.dtype)
        there = all(self.stores[one.pool].read(one.address, found[one.row, one.start : one.start + one.length])
                    for one in pieces)  # fmt: skip
        on_all = torch.tensor(int(there), device=device)
        torch.distributed.all_reduce(on_all, torch.distributed.ReduceOp.MIN)
        if bool(on_all):
            return found.to(device)
        computed = compute().to(self.dtype)
        on_host = computed.cpu()
        for one in pieces:
            self.stores[one.pool].write(one.address, on_host[one.row, one.start : one.start + one.length])
        return computed


@dataclasses.dataclass(frozen=True)
class KeptStates:
    """What a stage keeps: the base's states and the IDM's labels; None for what it does not keep."""

    states: Kept | None = None
    labels: Kept | None = None

    def of(
        self, indices: np.ndarray, device: torch.device, module: StageModule, input_ids: Tensor, position_ids: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """``e`` and ``labels`` of the module's forward, for these rows; None for what it has to compute itself."""
        if self.states is None:
            return None, None
        e = self.states.get(indices, device, lambda: module.states(input_ids, position_ids)).to(module.model.dtype)
        if self.labels is None:
            return e, None
        labels = self.labels.get(indices, device, lambda: module.labels(e, position_ids)[..., None])
        return e, labels[..., 0].long() & 0xFFFF  # the store's type is signed


NOTHING_KEPT = KeptStates()


# --- a run's ----------------------------------------------------------------------------------------------------------


def kept_states(config: Config, stage: str, source: Path, rows: Rows) -> KeptStates:
    """The states of the base of the model in ``source``, and in the stage policy its IDM's labels.

    A collective.

    Raises:
        ValueError: the states of this stage would not fit on the disk.
    """
    if config.pretrain.states == "off" or stage not in ("actions", "policy"):
        return NOTHING_KEPT
    folder = states_folder(config)
    digests: list[str] = ["", ""]
    if torch.distributed.get_rank() == 0:
        digests = [digest_of_weights(source, config.model.dtype, part) for part in ("model.", "idm.")]
    torch.distributed.broadcast_object_list(digests)
    width = int(conversion.opened(source)[0].hidden_size)
    dtype = getattr(torch, config.model.dtype if config.pretrain.states == "model" else config.pretrain.states)
    states = Kept(rows, folder, digests[0], width, dtype)
    _check_room(config, stage, states, folder)
    # Labels of 16 bits: num_actions is at most 65 536.
    # Labels of spans depend on where responses begin, so they are computed.
    of_tokens = stage == "policy" and getattr(conversion.opened(source)[0], "action_every", 1) == 1
    labels = Kept(rows, folder, "".join((*digests, str(dtype))), 1, torch.int16) if of_tokens else None
    return KeptStates(states, labels)


def states_folder(config: Config) -> Path:
    return Path(config.pretrain.states_cache or Path(config.output_dir).parent / "states")


def digest_of_weights(source: Path, dtype: str, prefix: str) -> str:
    """A digest of part of a CoLA model: tensors whose names begin with ``prefix``, its base's settings, and its dtype.

    Settings of other parts are left out, so that stages that add or change those find what others have written.
    """
    shape, tensors = conversion.opened(source)
    settings = {name: value for name, value in conversion.base_settings(shape.to_dict()).items() if name not in _NOTES}
    digest = hashlib.sha256(dtype.encode())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(name for name in tensors if name.startswith(prefix)):
        tensor = tensors.read(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_room(config: Config, stage: str, states: Kept, folder: Path) -> None:
    settings, gb = config.pretrain, 1e9
    trained = settings.num_steps(stage) * settings.batch_size * states.rows.width
    needed = min(trained, states.rows.tokens) * states.width * states.dtype.itemsize
    files = [file for store in states.stores for file in store.folder.glob("*.values")]
    there = sum(file.stat().st_blocks * 512 for file in files)
    named = f"pretrain.states = {settings.states!r}: up to {needed / gb:.3g} GB of states"
    if needed > settings.states_gb * gb:
        raise ValueError(f"{named}, and pretrain.states_gb = {settings.states_gb:g}; raise it, or leave states out")
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise ValueError(f"{named}, of which {there / gb:.3g} are there, and {folder} has room for {free / gb:.3g} GB; "
                         "name another folder with pretrain.states_cache, or leave states out")  # fmt: skip


def _digest(about: object) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
