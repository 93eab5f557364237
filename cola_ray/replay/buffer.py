"""A replay buffer over Arrow: bounded, first in first out, read by columns, and saved in Parquet.

    append(table) ─> chunks: [ full | full | large | small | new ]     small neighbours are merged, so chunks stay few
                        │                                  ^
                 evicted from here                    appended here
                        └── sample(256) ─> row numbers ─> one Arrow take per chunk ─> table

Row numbers only grow; eviction does not renumber rows. Sampling never loops over rows in Python.

A snapshot writes the rows since the previous one to a new Parquet file, ``rows-<first>-<end>.parquet``, by way of a
temporary file that is synced and renamed. A killed process therefore loses only the rows since its last snapshot, and
the folder can be read at any time with ``datasets.load_dataset("parquet", data_files="<folder>/*.parquet")``. A
checkpoint has everything else that is needed to rebuild the buffer exactly: row numbers, chunks, priorities, and the
names of the files.
"""

import contextlib
import itertools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cola_ray.replay.priorities import Priorities
from cola_ray.runs.checkpoints import Checksums, checksums, write_atomically

Array = np.ndarray
_FULL = 512 << 20  # bytes of a chunk that is not merged any further: Arrow's offsets have 31 bits
_OPEN_CHUNKS = 2  # chunks kept beside the full ones: more make sampling slower, fewer make appends copy more


class ReplayError(RuntimeError):
    """A snapshot cannot be read, rows do not fit the buffer, or there is no row to sample."""


class ReplayBuffer:
    """Rows of one Arrow schema, limited in number and in memory.

    Args:
        max_rows: beyond this many rows the oldest are evicted.
        max_bytes: beyond this size the oldest chunks are evicted; the table appended last always stays.
        alpha: exponent of the priorities in :class:`Priorities`.
    """

    def __init__(self, max_rows: int, max_bytes: int, alpha: float = 0.6) -> None:
        self.max_rows, self.max_bytes, self.alpha = max_rows, max_bytes, alpha
        self._empty()

    def _empty(self) -> None:
        self.schema: pa.Schema | None = None
        self.chunks: list[pa.RecordBatch] = []
        self.starts: list[int] = []  # number of each chunk's first row
        self.first, self.end = 0, 0  # the buffer holds rows first..end-1
        self.saved = 0  # rows before this one are on disk
        self.files: Checksums = {}  # snapshot files, with sizes and checksums
        self.priorities = Priorities(self.max_rows, self.alpha)

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def nbytes(self) -> int:
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        """Bytes of the rows of each chunk that are not evicted."""
        return [
            chunk.slice(max(self.first - start, 0)).nbytes
            for start, chunk in zip(self.starts, self.chunks, strict=True)
        ]

    def append(self, table: pa.Table) -> tuple[int, int]:
        """Add rows and evict old ones if needed; returns the numbers (first, end) of the new rows.

        Raises:
            ReplayError: the schema differs from that of earlier rows, or the table has more than ``max_rows`` rows.
        """
        if self.schema is None:
            self.schema = table.schema
        if not table.schema.equals(self.schema):
            raise ReplayError(f"rows of another schema: {table.schema.names} into {self.schema.names}")
        if table.num_rows > self.max_rows:
            raise ReplayError(f"{table.num_rows} rows at once into a buffer of {self.max_rows}")
        added = (self.end, self.end + table.num_rows)
        if not table.num_rows:
            return added
        self.chunks.append(_one_batch(table))
        self.starts.append(self.end)
        self.end += table.num_rows
        self.priorities.add(np.arange(*added))
        self._evict(added[0])
        self._merge()
        return added

    # --- sampling -----------------------------------------------------------------------------------------------

    def sample(self, count: int, rng: np.random.Generator) -> tuple[pa.Table, Array]:
        """``count`` rows, drawn uniformly with replacement, and their numbers; both in the order of the numbers."""
        self._require_rows()
        return self.take(rng.integers(self.first, self.end, count))

    @property
    def priority_total(self) -> float:
        """Sum of ``priority**alpha`` over all rows."""
        return self.priorities.total

    def sample_prioritised(self, count: int, rng: np.random.Generator) -> tuple[pa.Table, Array, Array]:
        """``count`` rows, drawn in proportion to ``priority**alpha``; their numbers, and their ``priority**alpha``."""
        self._require_rows()
        table, numbers = self.take(self.priorities.draw(count, rng, self.end))
        return table, numbers, self.priorities.of(numbers)

    def column(self, name: str) -> Array:
        """A numeric column of all rows, oldest first."""
        self._require_rows()
        return np.concatenate([chunk[name].to_numpy() for chunk in self.chunks])[-len(self) :]

    def take(self, numbers: Array) -> tuple[pa.Table, Array]:
        """The rows with these numbers and the numbers, both sorted by number.

        Sorting makes the order independent of how chunks have been merged.
        """
        numbers = np.sort(numbers)
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        chunks, cuts = np.unique(owners, return_index=True)
        pieces = [
            self.chunks[chunk].take(pa.array(in_chunk - self.starts[chunk]))
            for chunk, in_chunk in zip(chunks, np.split(numbers, cuts[1:]), strict=True)
        ]
        return pa.Table.from_batches(pieces), numbers

    def set_priorities(self, numbers: Array, priorities: Array) -> None:
        """Set priorities, e.g. ``|TD error|``, of rows that were trained on; rows evicted since are ignored."""
        held = (numbers >= self.first) & (numbers < self.end)
        self.priorities.highest = max(self.priorities.highest, float(priorities.max(initial=0.0)))
        self.priorities.update(numbers[held], priorities[held])

    def _require_rows(self) -> None:
        if not len(self):
            raise ReplayError("the replay buffer is empty")

    # --- eviction -----------------------------------------------------------------------------------------------

    def _merge(self) -> None:
        """Merge the smallest neighbouring chunks until only ``_OPEN_CHUNKS`` are left beside the full ones."""
        while True:
            sizes = self._sizes()
            pairs = [(one + next_one, i) for i, (one, next_one) in enumerate(itertools.pairwise(sizes))]
            joinable = [pair for pair in pairs if pair[0] <= _FULL]
            if not joinable or sum(size <= _FULL // 2 for size in sizes) <= _OPEN_CHUNKS:
                return
            _, at = min(joinable)
            self.chunks[at : at + 2] = [pa.concat_batches(self.chunks[at : at + 2])]
            self.starts.pop(at + 1)

    def _evict(self, newest: int) -> None:
        """Evict rows beyond ``max_rows``, and whole chunks beyond ``max_bytes``; never row ``newest`` or later ones."""
        first = max(self.first, self.end - self.max_rows)
        total = self.nbytes
        for start, chunk, size in zip(self.starts, self.chunks, self._sizes(), strict=True):
            if total <= self.max_bytes or start + chunk.num_rows > newest:
                break
            total -= size
            first = max(first, start + chunk.num_rows)
        evicted = np.arange(self.first, first)
        self.first = first
        if len(evicted):
            self.priorities.remove(evicted, self.end)
        while self.starts and self.starts[0] + self.chunks[0].num_rows <= self.first:
            self.starts.pop(0)
            self.chunks.pop(0)
        dead = self.first - self.starts[0]
        if dead > max(self.max_rows // 4, 1):  # copy the rest, which frees the memory of the evicted rows
            self.chunks[0] = pa.concat_batches([self.chunks[0].slice(dead), self.chunks[0].slice(0, 0)])
            self.starts[0] = self.first

    # --- disk ---------------------------------------------------------------------------------------------------

    def snapshot(
        self,
        folder: Path,
        lock: contextlib.AbstractContextManager | None = None,
        needed: Collection[str] | None = (),
        until: int | None = None,
    ) -> int:
        """Write the rows since the last snapshot to ``folder`` and remove files of evicted rows; returns the row count.

        Args:
            lock: held while the buffer is read, but not while files are written.
            needed: names of files to keep even if all their rows were evicted; None keeps all.
            until: write only rows with smaller numbers.
        """
        lock = lock or contextlib.nullcontext()
        folder.mkdir(parents=True, exist_ok=True)
        with lock:
            first, end = max(self.saved, self.first), self.end if until is None else until
            table = self._slice(first, end) if end > first else None
        if table is not None:
            path = folder / f"rows-{first:012d}-{end:012d}.parquet"
            write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd"))
            self.files |= checksums(folder, [path])
        with lock:
            self.saved = max(self.saved, end)
            oldest = self.first
        for path, _, last in _files(folder):
            if needed is not None and last <= oldest and path.name not in needed:
                path.unlink()
                self.files.pop(path.name, None)
        return max(end - first, 0)

    def checkpoint(self, folder: Path, lock: contextlib.AbstractContextManager | None = None) -> dict[str, Any]:
        """Snapshot the rows, and return what :meth:`restore` needs besides them.

        The entry ``files`` describes the files in ``folder`` that hold the rows; they must be kept.
        """
        lock = lock or contextlib.nullcontext()
        with lock:
            numbers = np.arange(self.first, self.end)
            state: dict[str, Any] = {
                "first": self.first, "end": self.end, "highest": self.priorities.highest,
                "starts": [max(start, self.first) for start in self.starts],
                "priorities": self.priorities.of(numbers),
            }  # fmt: skip
        self.snapshot(folder, lock, None, state["end"])
        spans = {path.name: (start, end) for path, start, end in _files(folder)}
        files = {name: about for name, about in self.files.items() if _overlap(spans.get(name), state)}
        return state | {"files": files}

    def restore(self, folder: Path, checkpoint: Mapping[str, Any] | None) -> None:
        """Return to the state at a checkpoint, bit for bit, or to an empty buffer; removes files of later rows.

        Raises:
            ReplayError: a file cannot be read (the message names it), or rows are missing.
        """
        first, end = (checkpoint["first"], checkpoint["end"]) if checkpoint else (0, 0)
        for path, start, _ in _files(folder):
            if start >= end:
                path.unlink()
        self._empty()
        if checkpoint is None or first == end:
            self.first = self.end = self.saved = end
            return
        spans = {path: (start, stop) for path, start, stop in _files(folder) if path.name in checkpoint["files"]}
        rows = pa.concat_tables(_read(path, *span) for path, span in spans.items())
        origin = next(iter(spans.values()))[0]
        if origin > first or origin + rows.num_rows != end:
            raise ReplayError(f"{folder}: rows between {first} and {end} are missing")
        self.schema, self.files = rows.schema, dict(checkpoint["files"])
        self.first, self.end, self.saved = first, end, end
        self.starts = list(checkpoint["starts"])
        for start, stop in itertools.pairwise([*self.starts, end]):
            chunk = _one_batch(rows.slice(start - origin, stop - start).combine_chunks())
            self.chunks.append(pa.concat_batches([chunk, chunk.slice(0, 0)]))  # a copy, so evicting a chunk frees it
        self.priorities.highest = checkpoint["highest"]
        self.priorities.set_weights(np.arange(first, end), checkpoint["priorities"])

    def load_snapshots(self, folder: Path) -> int:
        """Fill an empty buffer with the rows saved in ``folder``; returns the number of rows.

        Snapshots hold no priorities: every row gets that of a new one.

        Raises:
            ReplayError: a file cannot be read, or rows between two files are missing (the message names them).
        """
        for path, first, end in _files(folder):
            if len(self) and first != self.end:
                raise ReplayError(f"{folder}: rows {self.end} to {first} are missing")
            table = _read(path, first, end)
            if not len(self):
                self.first = self.end = first
            for batch in table.to_batches(max_chunksize=self.max_rows):
                self.append(pa.Table.from_batches([batch]))
        self.files = checksums(folder, (path for path, *_ in _files(folder)))
        self.saved = self.end
        return len(self)

    def _slice(self, first: int, end: int) -> pa.Table:
        pieces = [
            chunk.slice(max(first - start, 0), end - max(first, start))
            for start, chunk in zip(self.starts, self.chunks, strict=True)
            if start + chunk.num_rows > first and start < end
        ]
        return pa.Table.from_batches(pieces)


def _overlap(span: tuple[int, int] | None, state: Mapping[str, Any]) -> bool:
    return span is not None and span[0] < state["end"] and state["first"] < span[1]


def _read(path: Path, first: int, end: int) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ReplayError(f"{path} cannot be read ({error}); remove it and all later files") from None
    if table.num_rows != end - first:
        raise ReplayError(f"{path} holds {table.num_rows} rows, not {end - first}")
    return table


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.to_batches()
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    """Snapshot files as (path, first row, end), sorted by first row."""
    found = []
    for path in folder.glob("rows-*.parquet"):
        match = re.fullmatch(r"rows-(\d+)-(\d+)\.parquet", path.name)
        if match:
            found.append((path, int(match[1]), int(match[2])))
    return sorted(found, key=lambda item: item[1])
