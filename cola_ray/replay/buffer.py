"""A replay buffer over Arrow: bounded, first in first out, read by columns, and safe on disk.

    append(table) ─> chunks: [ full | full | large | small | new ]     the smallest neighbours are merged: few chunks
                        │                                  ^
                 evicted from here                    appended here
                        └── sample(256) ─> row numbers ─> one Arrow take a chunk ─> table

Rows have numbers that only grow; eviction never renumbers. Nothing on the way of a sample is done row by row in Python.

On disk a snapshot adds one Parquet file of the rows since the last one, ``rows-<first>-<end>.parquet``, written beside,
synced and renamed. A killed process therefore loses what came after the last snapshot and nothing else, and the folder
can be read at any time with ``datasets.load_dataset("parquet", data_files="<folder>/*.parquet")``. A mark is all else
that the buffer is at a moment: with it and the files that it names, the buffer is again what it was.
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

from cola_ray.runs.saved import Described, describe, write_whole

Array = np.ndarray
_FULL = 512 << 20  # bytes of a chunk that is not merged any further: Arrow's offsets have 31 bits
_OPEN_CHUNKS = 2  # chunks beside the full ones: each costs a sample one take, fewer cost appends more copying
_BLOCK = 128  # rows whose priorities are summed together
_LEAST = 1e-6  # priority of a row: errors below are rounding


class ReplayError(RuntimeError):
    """A snapshot that cannot be read, or rows that do not fit the buffer."""


class ReplayBuffer:
    """Rows of one Arrow schema, at most ``max_rows`` of them and about ``max_bytes``.

    Args:
        max_rows: oldest rows beyond are evicted.
        max_bytes: likewise, by the chunks' bytes; the last appended table always stays.
        alpha: exponent of priorities in prioritised sampling (Schaul et al. 2016, eq. 1).
    """

    def __init__(self, max_rows: int, max_bytes: int, alpha: float = 0.6) -> None:
        self.max_rows, self.max_bytes, self.alpha = max_rows, max_bytes, alpha
        self._empty()

    def _empty(self) -> None:
        self.schema: pa.Schema | None = None
        self.chunks: list[pa.RecordBatch] = []
        self.starts: list[int] = []  # number of each chunk's first row
        self.first, self.end = 0, 0  # rows first..end-1 are there
        self.saved = 0  # rows before this one are on disk
        self.files: Described = {}  # what is on disk
        blocks = -(-self.max_rows // _BLOCK)
        self.priorities = np.zeros(blocks * _BLOCK)  # by row number modulo its length; already raised to alpha
        self.block_sums = np.zeros(blocks)
        self.highest = 1.0

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def nbytes(self) -> int:
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        """Bytes of each chunk's rows that are still there."""
        return [
            chunk.slice(max(self.first - start, 0)).nbytes
            for start, chunk in zip(self.starts, self.chunks, strict=True)
        ]

    def append(self, table: pa.Table) -> tuple[int, int]:
        """Add rows, evicting old ones where there is no room; returns the numbers (first, end) of the new rows.

        New rows get the highest priority so far, so that each is likely to be seen once.
        Raises ReplayError for another schema or for more rows than fit.
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
        self._set_priorities(np.arange(*added), np.full(table.num_rows, self.highest**self.alpha))
        self._evict(added[0])
        self._merge()
        return added

    # --- sampling -----------------------------------------------------------------------------------------------

    def sample(self, count: int, rng: np.random.Generator) -> tuple[pa.Table, Array]:
        """``count`` rows, uniformly with replacement, and their numbers, in order."""
        self._require_rows()
        return self.take(rng.integers(self.first, self.end, count))

    @property
    def priority_total(self) -> float:
        """Sum of priority**alpha over all rows."""
        return float(self.block_sums.sum())

    def sample_prioritised(self, count: int, rng: np.random.Generator) -> tuple[pa.Table, Array, Array]:
        """Rows in proportion to priority**alpha, their numbers and what each was drawn in proportion to.

        Proportional prioritisation of Schaul et al. 2016, section 3.3.
        """
        self._require_rows()
        sums = self.block_sums.cumsum()
        drawn = rng.random(count) * sums[-1]
        # Sums are rounded: what falls behind the last row, of all or of its block, is meant for that one.
        blocks = np.minimum(np.searchsorted(sums, drawn, side="right"), np.flatnonzero(self.block_sums)[-1])
        priorities = self.priorities.reshape(-1, _BLOCK)[blocks]
        rest = drawn - (sums[blocks] - self.block_sums[blocks])
        last = _BLOCK - 1 - (priorities[:, ::-1] > 0).argmax(1)
        offsets = np.minimum((priorities.cumsum(1) <= rest[:, None]).sum(1), last)
        slots = blocks * _BLOCK + offsets
        numbers = self._row_at(slots)
        table, numbers = self.take(numbers)
        return table, numbers, self.priorities[numbers % len(self.priorities)]

    def column(self, name: str) -> Array:
        """A column of numbers over all rows, oldest first."""
        self._require_rows()
        return np.concatenate([chunk[name].to_numpy() for chunk in self.chunks])[-len(self) :]

    def take(self, numbers: Array) -> tuple[pa.Table, Array]:
        """These rows, oldest first, and their numbers in the order of the table."""
        numbers = np.sort(numbers)  # and not as chunks have been merged, which nobody is to see
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        hit, cuts = np.unique(owners, return_index=True)
        pieces = [
            self.chunks[owner].take(pa.array(mine - self.starts[owner]))
            for owner, mine in zip(hit, np.split(numbers, cuts[1:]), strict=True)
        ]
        return pa.Table.from_batches(pieces), numbers

    def set_priorities(self, numbers: Array, priorities: Array) -> None:
        """E.g. |TD error| of rows that were trained on; rows evicted meanwhile are passed over.

        A row without error still has some priority, so that it is seen again (Schaul et al. 2016, section 3.3).
        """
        alive = (numbers >= self.first) & (numbers < self.end)
        self.highest = max(self.highest, float(priorities.max(initial=0.0)))
        self._set_priorities(numbers[alive], np.maximum(priorities[alive], _LEAST) ** self.alpha)

    def _set_priorities(self, numbers: Array, values: Array) -> None:
        slots = numbers % len(self.priorities)
        self.priorities[slots] = values
        touched = np.unique(slots // _BLOCK)
        self.block_sums[touched] = self.priorities.reshape(-1, _BLOCK)[touched].sum(1)

    def _row_at(self, slots: Array) -> Array:
        """The row number that a slot of ``priorities`` stands for now."""
        size = len(self.priorities)
        numbers = slots + (self.end // size) * size
        return np.where(numbers >= self.end, numbers - size, numbers)

    def _require_rows(self) -> None:
        if not len(self):
            raise ReplayError("the replay buffer is empty")

    # --- room ---------------------------------------------------------------------------------------------------

    def _merge(self) -> None:
        """Join the smallest neighbours until few chunks are left beside the full ones."""
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
        """Rows beyond ``max_rows``; for ``max_bytes`` whole chunks. Never rows from ``newest`` on."""
        first = max(self.first, self.end - self.max_rows)
        total = self.nbytes
        for start, chunk, size in zip(self.starts, self.chunks, self._sizes(), strict=True):
            if total <= self.max_bytes or start + chunk.num_rows > newest:
                break
            total -= size
            first = max(first, start + chunk.num_rows)
        gone = np.arange(self.first, first)
        self.first = first
        if len(gone):
            # A slot may belong to a new row already.
            gone = gone[gone + len(self.priorities) >= self.end]
            self._set_priorities(gone, np.zeros(len(gone)))
        while self.starts and self.starts[0] + self.chunks[0].num_rows <= self.first:
            self.starts.pop(0)
            self.chunks.pop(0)
        dead = self.first - self.starts[0]
        if dead > max(self.max_rows // 4, 1):  # give their memory back by a copy of the rest
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
        """Add the rows since the last snapshot to ``folder``; returns how many. What was evicted is removed there.

        Args:
            lock: held while the buffer is looked at, but not while the disk is written.
            needed: files that stay, although all their rows were evicted; None: all of them do.
            until: number of the first row that is left out.
        """
        lock = lock or contextlib.nullcontext()
        folder.mkdir(parents=True, exist_ok=True)
        with lock:
            first, end = max(self.saved, self.first), self.end if until is None else until
            table = self._slice(first, end) if end > first else None
        if table is not None:
            path = folder / f"rows-{first:012d}-{end:012d}.parquet"
            write_whole(path, lambda file: pq.write_table(table, file, compression="zstd"))
            self.files |= describe(folder, [path])
        with lock:
            self.saved = max(self.saved, end)
            oldest = self.first
        for path, _, last in _files(folder):
            if needed is not None and last <= oldest and path.name not in needed:
                path.unlink()
                self.files.pop(path.name, None)
        return max(end - first, 0)

    def mark(self, folder: Path, lock: contextlib.AbstractContextManager | None = None) -> dict[str, Any]:
        """All that the buffer is now, beside its rows, which the files ``files`` in ``folder`` have on return."""
        lock = lock or contextlib.nullcontext()
        with lock:
            numbers = np.arange(self.first, self.end)
            found = {
                "first": self.first, "end": self.end, "highest": self.highest,
                "starts": [max(start, self.first) for start in self.starts],
                "priorities": self.priorities[numbers % len(self.priorities)],
            }  # fmt: skip
        self.snapshot(folder, lock, None, found["end"])
        spans = {path.name: (start, end) for path, start, end in _files(folder)}
        files = {name: what for name, what in self.files.items() if _overlap(spans.get(name), found)}
        return found | {"files": files}

    def go_back(self, folder: Path, mark: Mapping[str, Any] | None) -> None:
        """Be what the buffer was at the mark, or empty. Files of later rows are removed.

        Raises ReplayError naming the file that cannot be read.
        """
        first, end = (mark["first"], mark["end"]) if mark else (0, 0)
        for path, start, _ in _files(folder):
            if start >= end:
                path.unlink()
        self._empty()
        if mark is None or first == end:
            self.first = self.end = self.saved = end
            return
        spans = {path: (start, stop) for path, start, stop in _files(folder) if path.name in mark["files"]}
        rows = pa.concat_tables(_rows(path, *span) for path, span in spans.items())
        origin = next(iter(spans.values()))[0]
        if origin > first or origin + rows.num_rows != end:
            raise ReplayError(f"{folder}: rows between {first} and {end} are missing")
        self.schema, self.files = rows.schema, dict(mark["files"])
        self.first, self.end, self.saved, self.highest = first, end, end, mark["highest"]
        self.starts = list(mark["starts"])
        for start, stop in itertools.pairwise([*self.starts, end]):
            chunk = _one_batch(rows.slice(start - origin, stop - start).combine_chunks())
            self.chunks.append(pa.concat_batches([chunk, chunk.slice(0, 0)]))  # a copy: what is evicted is free
        self.priorities[np.arange(first, end) % len(self.priorities)] = mark["priorities"]
        self.block_sums = self.priorities.reshape(-1, _BLOCK).sum(1)

    def restore(self, folder: Path) -> int:
        """Fill an empty buffer from ``folder``; returns how many rows.

        Priorities are not kept: every row is as likely as a new one. Raises ReplayError naming the file that cannot
        be read, or the gap between two.
        """
        for path, first, end in _files(folder):
            if len(self) and first != self.end:
                raise ReplayError(f"{folder}: rows {self.end} to {first} are missing")
            table = _rows(path, first, end)
            if not len(self):
                self.first = self.end = first
            for batch in table.to_batches(max_chunksize=self.max_rows):
                self.append(pa.Table.from_batches([batch]))
        self.files = describe(folder, (path for path, *_ in _files(folder)))
        self.saved = self.end
        return len(self)

    def _slice(self, first: int, end: int) -> pa.Table:
        pieces = [
            chunk.slice(max(first - start, 0), end - max(first, start))
            for start, chunk in zip(self.starts, self.chunks, strict=True)
            if start + chunk.num_rows > first and start < end
        ]
        return pa.Table.from_batches(pieces)


def _overlap(span: tuple[int, int] | None, mark: Mapping[str, Any]) -> bool:
    return span is not None and span[0] < mark["end"] and mark["first"] < span[1]


def _rows(path: Path, first: int, end: int) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ReplayError(f"{path} cannot be read ({error}); remove it and what follows to go on") from None
    if table.num_rows != end - first:
        raise ReplayError(f"{path} holds {table.num_rows} rows, not {end - first}")
    return table


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.to_batches()
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    """Snapshot files as (path, first row, end), in order."""
    found = []
    for path in folder.glob("rows-*.parquet"):
        match = re.fullmatch(r"rows-(\d+)-(\d+)\.parquet", path.name)
        if match:
            found.append((path, int(match[1]), int(match[2])))
    return sorted(found, key=lambda item: item[1])


def importance_weights(shares: Array, rows: int, beta: float) -> Array:
    """``(N p)^-beta`` over its maximum: what undoes prioritised sampling (Schaul et al. 2016, section 3.4).

    Args:
        shares: ``p`` of each drawn row.
        rows: N.
    """
    weights = (rows * shares) ** -beta
    return weights / weights.max()
