"""Replay as the loop uses it: rows go to their episode's shard, batches are drawn, checkpoints keep the rows' files."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cola_ray.loop.supervisor import Supervisor
from cola_ray.replay.service import Shards

_DRAWS = 0
"""First part of a draw's place in the run, for the loop's draws; the critic's begin with 1."""


class ReplayClient:
    """One run's replay shards; there are none if nothing is learnt from replay."""

    def __init__(self, shards: Shards, supervisor: Supervisor) -> None:
        self.shards, self.supervisor = shards, supervisor
        self.kept: Sequence[Any] = ()  # the shards' states that checkpoints may return to

    async def store(self, rows: pa.Table) -> None:
        """Put each row into the shard of its position; one insert per shard that gets any."""
        lost = await self.shards.restarted()
        for shard, held in lost:
            self.supervisor.say(
                f"replay shard {shard} was started again and has the {held} rows of its last snapshot"
            )  # fmt: skip
        if lost:
            await self.shards.keep_files(self.kept)
        homes = np.array([self.shards.shard_of(str(position)) for position in rows["position"].to_pylist()])
        inserts = (self.shards.insert(int(home), rows.filter(pa.array(homes == home))) for home in np.unique(homes))
        await asyncio.gather(*inserts)

    async def sample(self, count: int, step: int) -> pa.Table:
        return await self.shards.sample(count, _DRAWS, step)

    async def sample_best(self, count: int, share: float, step: int) -> tuple[pa.Table, float]:
        """Rows of the best ``share`` of episodes, and the least return of these."""
        return await self.shards.sample_best(count, share, _DRAWS, step)

    async def size(self) -> dict[str, float]:
        rows, nbytes = await self.shards.size()
        return {"replay/rows": float(rows), "replay/megabytes": nbytes / 2**20}

    # --- checkpoints ------------------------------------------------------------------------------------------------

    async def state(self) -> list[dict[str, Any]]:
        """The shards' current state; their rows are on disk."""
        return await self.shards.checkpoint()

    async def keep(self, states: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Keep the files of these states on disk."""
        self.kept = states
        await self.shards.keep_files(states)

    async def restore(self, state: Sequence[Mapping[str, Any]] | None) -> None:
        """Return to a state of the shards; None: empty shards."""
        self.kept = ()
        await self.shards.restore(state)
        if state is not None:
            await self.keep([state])
