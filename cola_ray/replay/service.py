"""Replay as a service: shards of a :class:`ReplayBuffer`, each in its own actor, which save themselves.

    producers ── insert(rows) ──> shard of the key ──┐                      ┌── sample(n): n rows over all shards,
                                  shard of the key ──┼── snapshot thread ──>│   in proportion to what they hold
                                                     └── folder/*.parquet   └── set_priorities(draw, |TD error|)

A shard is a plain class. The driver makes it an actor and hands a :class:`Shards` client to whatever writes or samples
rows. A shard that is killed restarts with the rows of its last snapshot. Which rows are drawn depends only on the rows
held and on the draw's place in the run, not on which process draws, when, or how often.
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

from cola_ray.replay.buffer import ReplayBuffer, ReplayError
from cola_ray.replay.priorities import importance_weights

Array = np.ndarray
Seed = Sequence[int]
"""Seed of a draw: the run's seed, 1 + the shard's number, and the draw's place in the run."""
_CHECKPOINTS = 3
"""Files of this many latest checkpoints are kept, even before the run's checkpoint names them."""


class ReplayShard:
    """The buffer of one actor. Thread-safe: several producers and consumers may call at once.

    Args:
        max_rows, max_bytes, alpha: as for :class:`ReplayBuffer`.
        folder: where snapshots are saved; the first call loads the snapshots there, unless it is :meth:`restore`.
        snapshot_every_s: seconds between snapshots; 0 saves only in :meth:`snapshot` and :meth:`checkpoint`.
    """

    def __init__(self, max_rows: int, max_bytes: int, folder: str, snapshot_every_s: float, alpha: float = 0.6) -> None:
        self.buffer = ReplayBuffer(max_rows, max_bytes, alpha)
        self.folder, self.lock, self.saving = Path(folder), threading.Lock(), threading.Lock()
        self.needed: set[str] | None = None  # files that checkpoints name; None until known, so all are kept
        self.recent = deque[set[str]](maxlen=_CHECKPOINTS)  # files of the latest checkpoints
        self.is_open, self.restored, self.last_position = False, 0, -1
        self.failure = ""
        if snapshot_every_s:
            threading.Thread(target=self._save_periodically, args=(snapshot_every_s,), daemon=True).start()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the buffer; the first time, load the snapshots that an earlier process left in the folder."""
        with self.lock:
            if not self.is_open:
                self.restored = self.buffer.load_snapshots(self.folder) if self.folder.exists() else 0
                if len(self.buffer) and self.buffer.schema and "position" in self.buffer.schema.names:
                    self.last_position = int(self.buffer.column("position").max())
                self.is_open = True
            yield

    def insert(self, rows: pa.Table) -> int:
        """Add rows, except those of episodes it already holds (by ``position``); returns the number of rows held.

        A learner that returned to its checkpoint has the same episodes played again.

        Raises:
            RuntimeError: the last snapshot failed, e.g. because the disk is full.
        """
        with self._locked():
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
        """Rows held, their bytes, rows loaded from snapshots at the start, and this process id."""
        with self._locked():
            return len(self.buffer), self.buffer.nbytes, self.restored, os.getpid()

    def sample(self, count: int, seed: Seed) -> tuple[pa.Table, Array]:
        with self._locked():
            return self.buffer.sample(count, np.random.default_rng(seed))

    def sample_prioritised(self, count: int, seed: Seed) -> tuple[pa.Table, Array, Array]:
        with self._locked():
            return self.buffer.sample_prioritised(count, np.random.default_rng(seed))

    def priority_total(self) -> tuple[int, float]:
        """Rows held, and the sum of their ``priority**alpha``."""
        with self._locked():
            return len(self.buffer), self.buffer.priority_total

    def episode_returns(self) -> Array:
        """(episodes,) returns of the episodes with any row left."""
        with self._locked():
            if not len(self.buffer):
                return np.zeros(0, np.float32)
            _, firsts = np.unique(self.buffer.column("position"), return_index=True)
            return self.buffer.column("total_reward")[firsts]

    def rows_above(self, cutoff: float) -> int:
        """Number of rows of episodes whose return is at least ``cutoff``."""
        with self._locked():
            return int((self.buffer.column("total_reward") >= cutoff).sum()) if len(self.buffer) else 0

    def sample_above(self, count: int, cutoff: float, seed: Seed) -> pa.Table:
        """``count`` rows, drawn uniformly from episodes whose return is at least ``cutoff``."""
        with self._locked():
            good = np.flatnonzero(self.buffer.column("total_reward") >= cutoff) + self.buffer.first
            return self.buffer.take(np.random.default_rng(seed).choice(good, count))[0]

    def set_priorities(self, numbers: Array, priorities: Array) -> None:
        with self._locked():
            self.buffer.set_priorities(numbers, priorities)

    def snapshot(self) -> int:
        """Save the rows since the last snapshot; returns how many."""
        with self.saving:
            if not self.is_open:
                return 0
            needed = None if self.needed is None else self.needed.union(*self.recent)
            return self.buffer.snapshot(self.folder, self.lock, needed)

    def checkpoint(self) -> dict[str, Any]:
        """What :meth:`restore` needs besides the Parquet files that it names, which are on disk on return."""
        with self.saving:
            with self._locked():
                last_position = self.last_position
            state = self.buffer.checkpoint(self.folder, self.lock)
            self.recent.append({*state["files"]})
            return state | {"last_position": last_position}

    def keep_files(self, files: Collection[str]) -> None:
        """Keep these files and those of the latest checkpoints; others are removed once their rows are evicted."""
        self.needed = {*files}

    def restore(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Return to the state at a checkpoint; None: to an empty shard."""
        with self.saving, self.lock:
            self.buffer.restore(self.folder, checkpoint)
            self.last_position = checkpoint["last_position"] if checkpoint else -1
            self.is_open = True

    def _save_periodically(self, seconds: float) -> None:
        pause = threading.Event()
        while not pause.wait(seconds):
            try:
                self.snapshot()
            except OSError as error:  # e.g. a full disk: reported by the next insert, and tried again
                self.failure = f"{type(error).__name__}: {error}"
            else:
                self.failure = ""


Ask = Callable[..., Awaitable[Any]]
"""``await ask(shard, method, *arguments)``: the result of that method of the shard with that number."""


@dataclass(frozen=True)
class Draw:
    """Sampled rows, where each is kept, and its importance weight, all in the same order."""

    rows: pa.Table
    places: tuple[tuple[int, Array], ...] = ()  # (shard, row numbers there)
    weights: Array | None = None


class Shards:
    """Client of all shards, as of one buffer.

    Args:
        count: number of shards.
        ask: calls a shard: a Ray actor in a run, a plain object in a test.
        seed: of the run.
    """

    def __init__(self, count: int, ask: Ask, seed: int) -> None:
        self.count, self.ask, self.seed = count, ask, seed
        self.processes: dict[int, int] = {}  # shard -> process id, as of the last call of restarted

    def shard_of(self, key: str) -> int:
        """The shard for the rows of a key, e.g. of an episode: rows of one key stay together."""
        return zlib.crc32(key.encode()) % self.count

    async def insert(self, shard: int, rows: pa.Table) -> None:
        await self.ask(shard, "insert", rows)

    async def size(self) -> tuple[int, int]:
        """Rows and bytes over all shards."""
        sizes = await self._ask_all("size")
        return sum(rows for rows, *_ in sizes), sum(nbytes for _, nbytes, *_ in sizes)

    async def restarted(self) -> list[tuple[int, int]]:
        """Shards that restarted since the last call, with the number of rows that their snapshots held."""
        found = []
        for shard, (_, _, restored, process) in enumerate(await self._ask_all("size")):
            if self.processes.setdefault(shard, process) != process:
                found.append((shard, restored))
            self.processes[shard] = process
        return found

    async def sample(self, count: int, *place: int) -> pa.Table:
        """``count`` rows, drawn uniformly over all shards.

        Args:
            place: non-negative numbers that identify this draw in the run; they and the run's seed decide it.

        Raises:
            ReplayError: no shard holds a row.
        """
        parts = self._split(count, [rows for rows, *_ in await self._ask_all("size")], place)
        pieces = await asyncio.gather(*(self.ask(shard, "sample", n, seed) for shard, n, seed in parts))
        return pa.concat_tables([table for table, _ in pieces])

    async def sample_prioritised(self, count: int, beta: float, *place: int) -> "Draw":
        """``count`` rows over all shards in proportion to ``priority**alpha``, with importance weights of ``beta``."""
        held = await self._ask_all("priority_total")
        totals = np.array([total for _, total in held])
        parts = self._split(count, totals, place)
        pieces = await asyncio.gather(*(self.ask(shard, "sample_prioritised", n, seed) for shard, n, seed in parts))
        shares = np.concatenate([drawn for *_, drawn in pieces]) / totals.sum()
        return Draw(
            pa.concat_tables([table for table, *_ in pieces]),
            tuple((shard, numbers) for (shard, *_), (_, numbers, _) in zip(parts, pieces, strict=True)),
            importance_weights(shares, sum(rows for rows, _ in held), beta),
        )

    async def set_priorities(self, draw: "Draw", priorities: Array) -> None:
        """Set the priorities, e.g. ``|TD error|``, of the rows of a draw."""
        cuts = np.cumsum([len(numbers) for _, numbers in draw.places])[:-1]
        pieces = zip(draw.places, np.split(priorities, cuts), strict=True)
        await asyncio.gather(*(self.ask(shard, "set_priorities", numbers, new) for (shard, numbers), new in pieces))

    async def returns(self) -> Array:
        """(episodes,) returns of all episodes held."""
        return np.concatenate(await self._ask_all("episode_returns"))

    async def sample_best(self, count: int, share: float, *place: int) -> tuple[pa.Table, float]:
        """``count`` rows, uniform over the rows of the best ``share`` of episodes, and the lowest return among these.

        Episodes that tie with the lowest are included. An episode of many turns has as many rows.

        Raises:
            ReplayError: no shard holds an episode.
        """
        returns = await self.returns()
        if not len(returns):
            raise ReplayError("no shard holds an episode")
        cutoff = float(np.quantile(returns, 1.0 - share, method="higher"))  # the return of an episode, not interpolated
        parts = self._split(count, await self._ask_all("rows_above", cutoff), place)
        asked = (self.ask(shard, "sample_above", n, cutoff, seed) for shard, n, seed in parts)
        return pa.concat_tables(await asyncio.gather(*asked)), cutoff

    def _split(
        self, count: int, held: Sequence[float] | Array, place: Sequence[int]
    ) -> list[tuple[int, int, tuple[int, ...]]]:
        """Split a draw over shards in proportion to what each holds: (shard, rows to draw, seed)."""
        weights = np.asarray(held, np.float64)
        if not weights.sum() > 0:
            raise ReplayError("no shard holds a row to draw")
        counts = np.random.default_rng((self.seed, *place)).multinomial(count, weights / weights.sum())
        return [(shard, int(n), (self.seed, 1 + shard, *place)) for shard, n in enumerate(counts) if n]

    async def checkpoint(self) -> list[dict[str, Any]]:
        """What :meth:`restore` needs besides the files on disk, one entry per shard."""
        return list(await self._ask_all("checkpoint"))

    async def keep_files(self, checkpoints: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Keep the files that these checkpoints name; others are removed once their rows are evicted."""
        files = [
            {name for checkpoint in checkpoints for name in checkpoint[shard]["files"]} for shard in range(self.count)
        ]
        await asyncio.gather(*(self.ask(shard, "keep_files", files[shard]) for shard in range(self.count)))

    async def restore(self, checkpoint: Sequence[Mapping[str, Any]] | None) -> None:
        """Return to the state at a checkpoint; None: to empty shards."""
        asked = (self.ask(shard, "restore", checkpoint[shard] if checkpoint else None) for shard in range(self.count))
        await asyncio.gather(*asked)

    async def _ask_all(self, method: str, *args: Any) -> Sequence[Any]:
        return await asyncio.gather(*(self.ask(shard, method, *args) for shard in range(self.count)))
