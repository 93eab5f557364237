"""What a run's checkpoint holds besides the learner's weights: replay, critic, totals, unread metrics and samples.

    step v begins ──> before_step(v): the state, taken once ──┐
    learner saves version v ──> of_version(v) ────────────────┴──> {"version", "totals", "shards", "unread", ...}
    a learner that was restarted ──> restore(state) ──> replay, critic and totals are what they were

With ``max_staleness`` 0, the state is the one in which the step from this version began, although that step may have
been generated in the meantime: a run that returns to the checkpoint generates the same step. With a larger value steps
are generated concurrently, and the state is taken when the learner saves.
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
"""Checkpoints whose replay rows stay on disk: the two existing ones, and the one being made."""


class Checkpoints:
    """The states that a run can return to."""

    def __init__(self, config: Config, source: Source, workers: WorkerGroup, supervisor: Supervisor) -> None:
        self.config, self.source, self.workers, self.supervisor = config, source, workers, supervisor
        self.replay = source.replay
        self.taken: dict[int, asyncio.Task[State]] = {}  # version -> the state in which its step begins
        self.saved: dict[int, State] = {}  # the states of the last checkpoints

    async def before_step(self, version: int) -> None:
        """Take the state in which the step from ``version`` begins; call it before the step changes anything."""
        if not self.config.rl.max_staleness:
            await self._at(version)

    async def of_version(self, version: int) -> State:
        """The state to save with the learner's ``version``."""
        if self.config.rl.max_staleness:
            self.taken.pop(version, None)
        state = await self._at(version)
        self.saved = dict(sorted({**self.saved, version: state}.items())[-_KEPT:])
        await self.replay.keep([one["shards"] for one in self.saved.values()])
        return state | {"unread": self.supervisor.unread(version)}

    async def _at(self, version: int) -> State:
        """The state at ``version``; the first caller takes it."""
        for old in [one for one in self.taken if one < version - 1]:
            del self.taken[old]
        if version not in self.taken:
            self.taken[version] = self.supervisor.spawn(self._take(version))
        return await asyncio.shield(self.taken[version])

    async def _take(self, version: int) -> State:
        state = {"version": version, "totals": replace(self.workers.totals), "shards": await self.replay.state()}
        return state | await self.source.state(version)

    async def restore(self, state: Mapping[str, Any] | None) -> None:
        """Return to what :meth:`of_version` gave; None: to the state before the first step."""
        self.taken, self.saved = {}, {}
        if state is None:
            self.workers.totals = Totals(response_length=self.config.rollout.max_new_tokens)
            await self.replay.restore(None)
        else:
            self.workers.totals, self.saved = replace(state["totals"]), {state["version"]: dict(state)}
            await self.replay.restore(state["shards"])
            self.supervisor.tell_again(state["unread"])
        await self.source.restore(state)
