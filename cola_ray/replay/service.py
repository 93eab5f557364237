"""Replay as a service: shards of a :class:`ReplayBuffer`, each an actor, saved as they go.

    producers ── insert(rows) ──> shard of the key ──┐                      ┌── sample(n): n rows, drawn over all shards
                                  shard of the key ──┼── snapshot thread ──>│   in proportion to what they hold
                                                     └── folder/*.parquet   └── set_priorities(draw, |TD error|)

A shard is a plain class; the driver makes it an actor and hands a :class:`Shards` to whoever produces or consumes. A
shard that is killed comes back with what its last snapshot held, and says how many rows that is. Which rows are drawn
depends on what is held and on the draw's place in the run alone: who asks when, and how often, does not matter.
"""

import asyncio
import contextlib
import os
import threading
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cola_ray.replay.buffer import ReplayBuffer, ReplayError, importance_weights

Array = np.ndarray
Seed = Sequence[int]
"""Of a draw: the run's, the shard's number, and the draw's place in the run."""
_MARKS = 3
"""The last ones whose files stay, also before a checkpoint has named them."""


class ReplayShard:
    """One actor's buffer. Thread-safe: several producers and consumers call at once.

    Args:
        folder: of its snapshots; what is there is restored, unless :meth:`go_back` is asked first.
        snapshot_every_s: seconds between snapshots; 0 saves only when asked.
    """

    def __init__(self, max_rows: int, max_bytes: int, folder: str, snapshot_every_s: float, alpha: float = 0.6) -> None:
        self.buffer = ReplayBuffer(max_rows, max_bytes, alpha)
        self.folder, self.lock, self.saving = Path(folder), threading.Lock(), threading.Lock()
        self.needed: set[str] | None = None  # files that checkpoints name; not known: all may be
        self.marked = deque[set[str]](maxlen=_MARKS)
        self.is_open, self.restored, self.last_position = False, 0, -1
        self.failure = ""
        if snapshot_every_s:
            threading.Thread(target=self._save_now_and_then, args=(snapshot_every_s,), daemon=True).start()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Nobody else looks at the buffer meanwhile; one that was started again has what its folder holds."""
        with self.lock:
            if not self.is_open:
                self.restored = self.buffer.restore(self.folder) if self.folder.exists() else 0
                if len(self.buffer) and self.buffer.schema and "position" in self.buffer.schema.names:
                    self.last_position = int(self.buffer.column("position").max())
                self.is_open = True
            yield

    def insert(self, rows: pa.Table) -> int:
        """Returns how many rows the shard holds then. Raises what the last snapshot failed with, if it did.

        Episodes that it holds already, by their ``position``, are passed over: a learner that went back to its
        checkpoint has them played again.
        """
        with self._held():
            if self.failure:
                raise RuntimeError(f"replay snapshots fail: {self.failure}")
            if "position" in rows.column_names:
                rows = self._unseen(rows)
            self.buffer.append(rows)
            return len(self.buffer)

    def _unseen(self, rows: pa.Table) -> pa.Table:
        positions = rows["position"].to_numpy()
        if len(self.buffer) and positions.min(initial=self.last_position + 1) <= self.last_position:
            rows = rows.filter(pa.array(~np.isin(positions, self.buffer.column("position"))))
        self.last_position = max(self.last_position, int(positions.max(initial=-1)))
        return rows

    def size(self) -> tuple[int, int, int, int]:
        """Rows held, their bytes, rows restored from disk at the start, and this process."""
        with self._held():
            return len(self.buffer), self.buffer.nbytes, self.restored, os.getpid()

    def sample(self, count: int, seed: Seed) -> tuple[pa.Table, Array]:
        with self._held():
            return self.buffer.sample(count, np.random.default_rng(seed))

    def sample_prioritised(self, count: int, seed: Seed) -> tuple[pa.Table, Array, Array]:
        with self._held():
            return self.buffer.sample_prioritised(count, np.random.default_rng(seed))

    def priority_total(self) -> tuple[int, float]:
        """Rows held, and the sum of their priorities."""
        with self._held():
            return len(self.buffer), self.buffer.priority_total

    def totals(self) -> Array:
        """The returns of the episodes held, one an episode, also where its first turns are gone."""
        with self._held():
            if not len(self.buffer):
                return np.zeros(0, np.float32)
            _, firsts = np.unique(self.buffer.column("position"), return_index=True)
            return self.buffer.column("total_reward")[firsts]

    def rows_above(self, cutoff: float) -> int:
        """How many rows there are of episodes that returned at least ``cutoff``."""
        with self._held():
            return int((self.buffer.column("total_reward") >= cutoff).sum()) if len(self.buffer) else 0

    def sample_above(self, count: int, cutoff: float, seed: Seed) -> pa.Table:
        """``count`` rows, uniformly, of episodes that returned at least ``cutoff``."""
        with self._held():
            good = np.flatnonzero(self.buffer.column("total_reward") >= cutoff) + self.buffer.first
            return self.buffer.take(np.random.default_rng(seed).choice(good, count))[0]

    def set_priorities(self, numbers: Array, priorities: Array) -> None:
        with self._held():
            self.buffer.set_priorities(numbers, priorities)

    def snapshot(self) -> int:
        """Save what is new; returns how many rows."""
        with self.saving:
            if not self.is_open:
                return 0
            needed = None if self.needed is None else self.needed.union(*self.marked)
            return self.buffer.snapshot(self.folder, self.lock, needed)

    def mark(self) -> dict[str, Any]:
        """What :meth:`go_back` needs beside the files that it names, which are on disk."""
        with self.saving:
            with self._held():
                last_position = self.last_position
            mark = self.buffer.mark(self.folder, self.lock)
            self.marked.append({*mark["files"]})
            return mark | {"last_position": last_position}

    def need(self, files: Collection[str]) -> None:
        """Keep these on disk, and the files of the last marks; others may go when their rows do."""
        self.needed = {*files}

    def go_back(self, mark: Mapping[str, Any] | None) -> None:
        """Be what the shard was at a mark; None: empty."""
        with self.saving, self.lock:
            self.buffer.go_back(self.folder, mark)
            self.last_position = mark["last_position"] if mark else -1
            self.is_open = True

    def _save_now_and_then(self, seconds: float) -> None:
        pause = threading.Event()
        while not pause.wait(seconds):
            try:
                self.snapshot()
            except OSError as error:  # a full disk: said at the next insert, and tried again
                self.failure = f"{type(error).__name__}: {error}"
            else:
                self.failure = ""


Ask = Callable[..., Awaitable[Any]]
"""(number of the shard, method, *arguments) -> what that shard's method returns."""


@dataclass(frozen=True)
class Draw:
    """Rows, where they are kept, and their importance weights; in one order."""

    rows: pa.Table
    places: tuple[tuple[int, Array], ...] = ()  # (shard, row numbers there)
    weights: Array | None = None


class Shards:
    """All shards as one buffer. ``ask`` reaches them: Ray actors in a run, plain objects in a test."""

    def __init__(self, count: int, ask: Ask, seed: int) -> None:
        self.count, self.ask, self.seed = count, ask, seed
        self.processes: dict[int, int] = {}  # of the shards, as last seen

    def shard_of(self, key: str) -> int:
        """Where rows of one key, e.g. an episode, are kept together."""
        return zlib.crc32(key.encode()) % self.count

    async def insert(self, shard: int, rows: pa.Table) -> None:
        await self.ask(shard, "insert", rows)

    async def size(self) -> tuple[int, int]:
        """Rows and bytes."""
        sizes = await self._ask_all("size")
        return sum(rows for rows, *_ in sizes), sum(nbytes for _, nbytes, *_ in sizes)

    async def came_back(self) -> list[tuple[int, int]]:
        """Shards that were started again since the last call, each with the rows that its snapshots held."""
        found = []
        for shard, (_, _, restored, process) in enumerate(await self._ask_all("size")):
            if self.processes.setdefault(shard, process) != process:
                found.append((shard, restored))
            self.processes[shard] = process
        return found

    async def sample(self, count: int, *place: int) -> pa.Table:
        """``count`` rows, uniform over all shards.

        Args:
            place: numbers of at least 0 that no other draw of the run has.
        """
        hit = self._shares(count, [rows for rows, *_ in await self._ask_all("size")], place)
        pieces = await asyncio.gather(*(self.ask(shard, "sample", n, seed) for shard, n, seed in hit))
        return pa.concat_tables([table for table, _ in pieces])

    async def sample_prioritised(self, count: int, beta: float, *place: int) -> "Draw":
        """``count`` rows in proportion to their priorities over all shards."""
        held = await self._ask_all("priority_total")
        totals = np.array([total for _, total in held])
        hit = self._shares(count, totals, place)
        pieces = await asyncio.gather(*(self.ask(shard, "sample_prioritised", n, seed) for shard, n, seed in hit))
        shares = np.concatenate([drawn for *_, drawn in pieces]) / totals.sum()
        return Draw(
            pa.concat_tables([table for table, *_ in pieces]),
            tuple((shard, numbers) for (shard, *_), (_, numbers, _) in zip(hit, pieces, strict=True)),
            importance_weights(shares, sum(rows for rows, _ in held), beta),
        )

    async def set_priorities(self, draw: "Draw", priorities: Array) -> None:
        """New priorities, e.g. |TD error|, of rows that were drawn."""
        cuts = np.cumsum([len(numbers) for _, numbers in draw.places])[:-1]
        pieces = zip(draw.places, np.split(priorities, cuts), strict=True)
        await asyncio.gather(*(self.ask(shard, "set_priorities", numbers, new) for (shard, numbers), new in pieces))

    async def returns(self) -> Array:
        """Of all episodes held, one an episode."""
        return np.concatenate(await self._ask_all("totals"))

    async def sample_best(self, count: int, share: float, *place: int) -> tuple[pa.Table, float]:
        """``count`` rows, uniform over all those of the best ``share`` of episodes, and the return that makes one.

        Ties are kept. An episode of many turns has as many rows.
        """
        totals = await self.returns()
        if not len(totals):
            raise ReplayError("no shard holds an episode")
        cutoff = float(np.quantile(totals, 1.0 - share, method="higher"))  # a return that there was
        hit = self._shares(count, await self._ask_all("rows_above", cutoff), place)
        asked = (self.ask(shard, "sample_above", n, cutoff, seed) for shard, n, seed in hit)
        return pa.concat_tables(await asyncio.gather(*asked)), cutoff

    def _shares(
        self, count: int, held: Sequence[float] | Array, place: Sequence[int]
    ) -> list[tuple[int, int, tuple[int, ...]]]:
        """(shard, how many of ``count`` draws fall on it, their seed), in proportion to what each holds."""
        parts = np.asarray(held, np.float64)
        if not parts.sum() > 0:
            raise ReplayError("no shard holds a row to draw")
        counts = np.random.default_rng((self.seed, *place)).multinomial(count, parts / parts.sum())
        return [(shard, int(n), (self.seed, 1 + shard, *place)) for shard, n in enumerate(counts) if n]

    async def mark(self) -> list[dict[str, Any]]:
        """What :meth:`go_back` needs beside the files on disk, of each shard."""
        return list(await self._ask_all("mark"))

    async def need(self, marks: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Keep what these marks name on disk."""
        files = [{name for mark in marks for name in mark[shard]["files"]} for shard in range(self.count)]
        await asyncio.gather(*(self.ask(shard, "need", files[shard]) for shard in range(self.count)))

    async def go_back(self, mark: Sequence[Mapping[str, Any]] | None) -> None:
        """Be what the shards were at a mark; None: empty."""
        asked = (self.ask(shard, "go_back", mark[shard] if mark else None) for shard in range(self.count))
        await asyncio.gather(*asked)

    async def _ask_all(self, method: str, *args: Any) -> Sequence[Any]:
        return await asyncio.gather(*(self.ask(shard, method, *args) for shard in range(self.count)))
