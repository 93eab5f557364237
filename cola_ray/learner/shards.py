"""Tokenised documents on disk: memory-mapped Arrow IPC files, which are never read into memory as a whole.

    FOLDER/part-000000.arrow     one record batch: ids (large_list of uint16 or uint32), prompt_tokens (int32)
    FOLDER/part-000000.json      the part's numbers of documents, tokens and rows, and its broken rows
    FOLDER/corpus.json           all parts, once all are there

    with ShardWriter(path, small=True) as writer: writer.add(ids, prompt_tokens)
    documents = Documents([FOLDER, ...])
    lengths, prompts = documents.lengths(numbers)
    for ids in documents.read(numbers): ...

A document's response mask is a single number, since a response follows its prompt: with ``prompt_tokens`` p, the tokens
from p on are the model's own; :data:`TEXT` marks a document without a prompt.
"""

import array
import collections
import itertools
import json
import mmap
import os
import resource
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

MANIFEST = "corpus.json"
TEXT = -1
_OPEN = max(64, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))  # mapped shards, one descriptor each
_TOUCHED = 256  # documents read before mapped pages are given back: up to three times 64 KB for each
_BUFFERED = 1 << 20  # tokens


class ShardWriter:
    """Writes one shard in constant memory; the file appears, complete, if the ``with`` ends without an exception.

    Args:
        path: of the shard; nothing is written if no document was added.
        small: whether all ids fit into 16 bits.
    """

    def __init__(self, path: Path, small: bool) -> None:
        self.path, self.type = path, np.dtype(np.uint16 if small else np.uint32)
        mark = secrets.token_hex(4)
        self.ids_path, self.staging = (path.with_name(f".{path.name}-{mark}.{end}") for end in ("ids", "tmp"))
        self.file = self.ids_path.open("xb")
        self.buffer = array.array("H" if small else "I")
        self.offsets, self.prompts = array.array("q", [0]), array.array("i")

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    @property
    def documents(self) -> int:
        return len(self.prompts)

    def add(self, ids: Sequence[int], prompt_tokens: int) -> None:
        self.buffer.extend(ids)
        self.offsets.append(self.offsets[-1] + len(ids))
        self.prompts.append(prompt_tokens)
        if len(self.buffer) >= _BUFFERED:
            self._flush()

    def _flush(self) -> None:
        self.buffer.tofile(self.file)
        del self.buffer[:]

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
                self.file.close()
                if self.documents:
                    self._assemble()
        finally:
            self.file.close()
            for path in (self.ids_path, self.staging):
                path.unlink(missing_ok=True)

    def _assemble(self) -> None:
        ids = pa.array(np.memmap(self.ids_path, self.type, "r") if self.tokens else np.zeros(0, self.type))
        offsets = pa.array(np.frombuffer(self.offsets, np.int64))
        columns = [pa.LargeListArray.from_arrays(offsets, ids), pa.array(np.frombuffer(self.prompts, np.int32))]
        batch = pa.record_batch(columns, names=["ids", "prompt_tokens"])
        with self.staging.open("xb") as file:
            with pa.ipc.new_file(file, batch.schema) as sink:
                sink.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        self.staging.replace(self.path)


class _Shard:
    """A mapped shard, as views of numpy: offsets (N + 1,), prompts (N,), ids (tokens,)."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.map.madvise(mmap.MADV_RANDOM)
        batch = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self.map))).get_batch(0)
        ids = batch.column("ids")
        self.offsets = ids.offsets.to_numpy(zero_copy_only=True)
        self.ids = ids.values.to_numpy(zero_copy_only=True)
        self.prompts = batch.column("prompt_tokens").to_numpy(zero_copy_only=True)

    def give_back(self) -> None:
        """Give back the mapped pages; the system's cache keeps the file's contents."""
        self.map.madvise(mmap.MADV_DONTNEED)


class Documents:
    """The documents of one or more folders of shards, numbered from 0 in the order of folders, parts and rows.

    Resident memory does not grow with their number: pages are given back after a few hundred documents.

    Raises:
        FileNotFoundError: a folder has no manifest.
        ValueError: there is no document in any folder.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        manifests = [read_manifest(folder) for folder in folders]
        parts = [(folder / one["file"], one) for folder, manifest in zip(folders, manifests, strict=True)
                 for one in manifest["parts"] if one["documents"]]  # fmt: skip
        if not parts:
            raise ValueError(f"no documents in {', '.join(map(str, folders))}")
        self.paths = [path for path, _ in parts]
        self.starts = np.array([0, *itertools.accumulate(one["documents"] for _, one in parts)], np.int64)
        self.first_tokens = np.cumsum([0, *(one["tokens"] for _, one in parts)])
        self.tokens = int(self.first_tokens[-1])
        self.are_pairs = not any(one["texts"] for _, one in parts)
        self.fingerprints = [manifest["fingerprint"] for manifest in manifests]
        self._open: collections.OrderedDict[int, _Shard] = collections.OrderedDict()
        self._read: list[_Shard] = []  # shards read since pages were given back
        self._touched = 0  # documents read since then

    def __len__(self) -> int:
        return int(self.starts[-1])

    def lengths(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token counts of these documents, and of their prompts (or :data:`TEXT`): (N,) -> (N,), (N,) int64."""
        lengths, prompts = (np.empty(len(numbers), np.int64) for _ in range(2))
        for shard, where, inside in self._by_shard(numbers):
            lengths[where] = shard.offsets[inside + 1] - shard.offsets[inside]
            prompts[where] = shard.prompts[inside]
            self._touch(shard, len(where))
        return lengths, prompts

    def addresses(self, numbers: np.ndarray) -> np.ndarray:
        """How many tokens come before each of these documents: (N,) -> (N,) int64."""
        found = self.first_tokens[np.searchsorted(self.starts, numbers, "right") - 1]
        for shard, where, inside in self._by_shard(numbers):
            found[where] += shard.offsets[inside]
            self._touch(shard, len(where))
        return found

    def read(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the index in ``numbers`` and the ids of each document, shard by shard.

        The ids are a view of the file: copy them before asking for the next.
        """
        for shard, where, inside in self._by_shard(numbers):
            for index, document in zip(where.tolist(), inside.tolist(), strict=True):
                yield index, shard.ids[shard.offsets[document] : shard.offsets[document + 1]]
                self._touch(shard, 1)

    def _by_shard(self, numbers: np.ndarray) -> Iterator[tuple[_Shard, np.ndarray, np.ndarray]]:
        """Each shard with some of the documents, their places in ``numbers``, and their numbers in the shard."""
        shards = np.searchsorted(self.starts, numbers, "right") - 1
        order = np.argsort(shards, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(where):
                shard = int(shards[where[0]])
                yield self._shard(shard), where, numbers[where] - self.starts[shard]

    def _shard(self, index: int) -> _Shard:
        if index not in self._open:
            if len(self._open) >= _OPEN:
                self._open.popitem(last=False)
            self._open[index] = _Shard(self.paths[index])
        self._open.move_to_end(index)
        return self._open[index]

    def _touch(self, shard: _Shard, count: int) -> None:
        self._touched += count
        if not self._read or self._read[-1] is not shard:
            self._read.append(shard)
        if self._touched >= _TOUCHED:
            for one in self._read:
                one.give_back()
            self._read, self._touched = [], 0


def read_manifest(folder: Path) -> dict[str, Any]:
    """``source``, ``fingerprint``, and ``parts``: ``file``, ``documents``, ``tokens``, ``texts``, ``rows`` of each."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest
