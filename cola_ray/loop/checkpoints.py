"""What a checkpoint of the run holds beside the learner's weights: replay, critic, totals, unread metrics and samples.

    step v begins ──> before_step(v): the state, taken once ──┐
    learner saves version v ──> of_version(v) ────────────────┴──> {"version", "totals", "shards", "unread", ...}
    a learner that comes back ──> restore(state) ──> replay, critic and totals are what they were

With ``max_staleness`` 0 the state is that in which the step from its version began, although that step may have been
made meanwhile: a run that goes back to it makes the same step. With more, steps are made at the same time, and the
state is what it is when the learner saves.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cola_ray.loop.batches import Source
from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.workers import Totals, WorkerGroup
from cola_ray.settings.config import Config

State = dict[str, Any]
_KEPT = 3
"""Checkpoints whose rows of replay stay on disk: two that there are, and the one that is being made."""


class Checkpoints:
    """The states that a run can go back to."""

    def __init__(self, config: Config, source: Source, workers: WorkerGroup, supervisor: Supervisor) -> None:
        self.config, self.source, self.workers, self.supervisor = config, source, workers, supervisor
        self.replay = source.replay
        self.taken: dict[int, asyncio.Task[State]] = {}  # version -> what its step begins with
        self.saved: dict[int, State] = {}  # those of them that the last checkpoints are made of

    async def before_step(self, version: int) -> None:
        """Take the state that the step from ``version`` begins with; the step must change nothing before."""
        if not self.config.rl.max_staleness:
            await self._at(version)

    async def of_version(self, version: int) -> State:
        """What to save with the learner's ``version``."""
        if self.config.rl.max_staleness:
            self.taken.pop(version, None)
        state = await self._at(version)
        self.saved = dict(sorted({**self.saved, version: state}.items())[-_KEPT:])
        await self.replay.keep([one["shards"] for one in self.saved.values()])
        return state | {"unread": self.supervisor.unread(version)}

    async def _at(self, version: int) -> State:
        """The state at ``version``, taken by whoever asks first."""
        for old in [one for one in self.taken if one < version - 1]:
            del self.taken[old]
        if version not in self.taken:
            self.taken[version] = self.supervisor.spawn(self._take(version))
        return await asyncio.shield(self.taken[version])

    async def _take(self, version: int) -> State:
        state = {"version": version, "totals": replace(self.workers.totals), "shards": await self.replay.state()}
        return state | await self.source.state(version)

    async def restore(self, state: Mapping[str, Any] | None) -> None:
        """Be what :meth:`of_version` returned, or what there is before the first step."""
        self.taken, self.saved = {}, {}
        if state is None:
            self.workers.totals = Totals(response_length=self.config.rollout.max_new_tokens)
            await self.replay.restore(None)
        else:
            self.workers.totals, self.saved = replace(state["totals"]), {state["version"]: dict(state)}
            await self.replay.restore(state["shards"])
            self.supervisor.tell_again(state["unread"])
        await self.source.restore(state)
