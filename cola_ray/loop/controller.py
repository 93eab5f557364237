"""The controller: hands prompts out, collects groups, feeds the learner, spreads new weights.

              admit (slots free)                        finish
    tickets ───────────────────> workers.generate_groups ─────> one step's groups ─> collate ──┐ take
    (step, prompt)  ^                 │ a worker dies: its share goes to another               v
                    │                 v                                                 next_batch(rank, v)
                    │ release     seat refilled: new worker, current weights                   │
                    └──────────── spread(v+1) <─────────── publish(v+1) <─── learner trains <──┘

Who waits for what:
    _produce      waits for free slots; freed by spread. Steps v .. v + max_staleness are generated at the same time
    next_batch    waits for step v's groups
    publish       waits for the spread before it, and returns while its own goes on: the learner is not held up
    spread        waits until every live worker holds v+1; then evaluates when due, then frees step v's slots
    a lost share  waits for any seat that is ready

With ``max_staleness = 0`` this is strictly on-policy: step v+1 is handed out when all workers hold v+1.
The class is plain asyncio; the driver makes it a Ray actor and hands in the pool of workers. A failure anywhere is
raised in the learner's next call and told to the driver: nothing waits on something that is dead.
"""

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import Awaitable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch

from cola_ray.algorithms.advantages import Outcomes, all_alike, overlong_penalty
from cola_ray.algorithms.latent_actions import usage
from cola_ray.experience import Batch, Group, Ticket, Trajectory, collate
from cola_ray.loop.work_buffer import WorkBuffer
from cola_ray.replay.service import Shards
from cola_ray.replay.transitions import as_completion_rows, as_trajectories
from cola_ray.runs import ending
from cola_ray.settings.config import Config, is_environment
from cola_ray.tasks import least_right_reward
from cola_ray.weights import Bucket, Channel, Manifest, Offer

T = TypeVar("T")
_REFILLS = 1 << 40
"""Tickets that stand in for prompts without signal are numbered from here, so that no draw is made twice."""

_BETWEEN_STEPS = "the learner, which saves or goes on to its next step"


_NAMED = 3
"""Checkpoints whose rows stay on disk: two that there are, and the one that is made."""
DRAWS = 0
"""Begins the places of the controller's draws in the run."""


class WorkerLostError(RuntimeError):
    """A worker's process is gone; what it was asked for must be asked of another."""


class WorkerNeverRanError(WorkerLostError):
    """It was sent to a machine that was gone already: it takes nothing along, and another may run elsewhere."""


class WorkerPool(Protocol):
    """How to make, ask and end workers: Ray actors in a run."""

    def spawn(self) -> Any: ...

    def call(self, worker: Any, method: str, *args: Any) -> Awaitable[Any]:
        """Raises WorkerLostError when the process is gone (WorkerNeverRanError when there never was one), and
        whatever the method raised otherwise.
        """
        ...

    def kill(self, worker: Any) -> None: ...


@dataclass
class Seat:
    """A worker's place: who sits there now, and what it owes."""

    number: int
    worker: Any
    ready: bool = True  # holds the current weights
    owed_tokens: int = 0
    losses: int = 0  # in a row, without a share completed


@dataclass
class Ledger:
    """What became of prompts and workers, over the whole run."""

    regenerated_groups: int = 0
    worker_losses: int = 0
    failed_rewards: int = 0
    response_length: float = 0.0  # running mean, to weigh what a worker owes


class Controller:
    """One run's state between workers and learner; its heirs make other batches of other rollouts.

    Args:
        shards: replay; none where the algorithm asks for none.
    """

    def __init__(self, config: Config, pool: WorkerPool, shards: Shards) -> None:
        rl = config.rl
        self.right_from = None if is_environment(config.task.name) else least_right_reward(config.task)
        self.config, self.pool, self.shards = config, pool, shards
        self.seats = [Seat(number, pool.spawn()) for number in range(config.rollout.num_workers)]
        self.buffer = WorkBuffer(rl.prompts_per_step, rl.max_staleness)
        self.ledger = Ledger(response_length=config.rollout.max_new_tokens)
        self.version = 0  # that every ready worker holds
        self.weights: tuple[int, Sequence[Bucket]] | None = None  # what a new worker must be given
        self.marks: dict[int, asyncio.Task[dict[str, Any]]] = {}  # version -> what its step begins with
        self.named: dict[int, dict[str, Any]] = {}  # those of them that the last checkpoints are made of
        self.told: dict[int, dict[str, float]] = {}  # metrics of steps since the checkpoint before the last
        self.step_batches: dict[int, list[Batch]] = {}  # version -> a batch a rank
        self.rollout_metrics: dict[int, dict[str, float]] = {}
        self.events: list[dict[str, Any]] = []  # for the driver, in order
        self.changed = asyncio.Condition()
        self.failure: str | None = None
        self.handed_out = -1  # the last version a batch was given out for
        self.last_version = rl.max_steps  # training ends when the learner holds it
        self.producer: asyncio.Task | None = None
        self.spreading: asyncio.Task | None = None
        self.receiving: asyncio.Task | None = None  # a broadcast that workers take part in
        self.channel: Channel | None = None
        self.members: list[Any] = []  # the workers in the channel
        self.chores: set[asyncio.Task] = set()
        self.pending: dict[str, float] = {}  # what is being waited for, since when
        self.published_at = 0.0
        self.is_open = False

    # --- the driver's side --------------------------------------------------------------------------------------

    async def start(self, resumed: bool) -> dict[str, Any]:
        """Wait for the workers; evaluate the start policy and the bare base unless this resumes. Returns facts."""
        self._spawn(self._watch_for_stalls())
        try:
            await self._open(resumed)
        except Exception as error:
            await self.fail(ending.reason(error))
            raise
        async with self.changed:
            self.is_open = True
            self.changed.notify_all()
        return self.facts

    async def _open(self, resumed: bool) -> None:
        self._doing(f"starting {len(self.seats)} engine{'s' * (len(self.seats) > 1)}, and the learner's ranks")
        self.facts = await self._ask(self.seats[0], "facts")
        if not self.facts.get("num_train", 1):
            raise ValueError(
                f"task.name = {self.config.task.name!r}: no problem to train on; all are held out, or longer than "
                f"rollout.max_prompt_tokens = {self.config.rollout.max_prompt_tokens}"
            )
        if not self.facts["num_heldout"]:
            self._say("no problem is held out, or none fits rollout.max_prompt_tokens: nothing is evaluated")
        if not resumed:
            self._doing("evaluating the bare base")
            base = await self._evaluate(bare_base=True)
            self._doing("evaluating the start policy")
            start = await self._evaluate(bare_base=False)
            self._event(0, {f"eval/base_{name}": value for name, value in base.items()} | _evals(start))
        self._doing("starting the learner's ranks")

    async def drain(self) -> tuple[list[dict[str, Any]], str | None]:
        """Events since the last call, and any failure.

        ``{"step": version, "metrics": {...}}``, ``{"say": line}``, or ``{"doing": what takes a while now}``.
        """
        events, self.events = self.events, []
        return events, self.failure

    async def stop(self) -> int:
        """End early and in order: after the step that ranks are training on. Returns the last version."""
        async with self.changed:
            self.last_version = min(self.last_version, self.handed_out + 1)
            self.changed.notify_all()
        return self.last_version

    async def workers(self) -> list[Any]:
        return [seat.worker for seat in self.seats]

    # --- the learner's side -------------------------------------------------------------------------------------

    async def begin(self, version: int, buckets: Sequence[Bucket], state: Mapping[str, Any] | None = None) -> None:
        """Go on from ``version``, which the learner holds: forget what is under way, spread ``buckets``, produce.

        A first start, a resumed run and a learner that died and came back all begin here. Waits for :meth:`start`.

        Args:
            state: of the checkpoint that the learner has gone back to, see :meth:`checkpoint`; None: it begins anew.
        """
        with self._waiting_for("engines to start"):
            async with self.changed:
                await self.changed.wait_for(lambda: self.is_open or self.failure)
        self._raise_failure()
        self.pending.pop(_BETWEEN_STEPS, None)
        if self.producer is not None:
            self._say(f"the learner was started again and goes on from version {version}")
        self._doing("the first rollouts")
        for task in (self.producer, self.spreading, self.receiving):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self.receiving = self.channel = None  # its rank 0 may be another process now
        self.buffer = WorkBuffer(self.config.rl.prompts_per_step, self.config.rl.max_staleness)
        self.step_batches, self.rollout_metrics = {}, {}
        await self._go_back(state)
        self.handed_out, self.published_at = version - 1, time.perf_counter()
        await self._update_workers(version, buckets)
        self.producer = self._spawn(self._produce(version))

    async def next_batch(self, rank: int, version: int) -> Batch | None:
        """This rank's share of the batch that version ``version`` is to train on; None when the run is over."""
        if rank == 0:
            self.pending.pop(_BETWEEN_STEPS, None)
        with self._waiting_for(f"groups of step {version}"):
            async with self.changed:
                await self.changed.wait_for(
                    lambda: version in self.step_batches or version >= self.last_version or self.failure
                )
        self._raise_failure()
        if version >= self.last_version:
            if self.spreading is not None:
                await asyncio.gather(self.spreading)
            if rank == 0:
                self.pending[_BETWEEN_STEPS] = time.monotonic()
                self._doing("saving checkpoint and model")
            return None
        self.handed_out = max(self.handed_out, version)
        self.pending[f"the learner's step {version}"] = time.monotonic()
        return self.step_batches[version][rank]

    async def offer(self, version: int, manifest: Manifest, host: str, port: int) -> Channel:
        """Have every ready worker take part in a broadcast of ``version``, sent next by the caller, then published.

        Args:
            host, port: where the caller can be met if a new channel is needed.
        """
        await self._settle(version)
        seats = [seat for seat in self.seats if seat.ready]
        size = self.config.rollout.tensor_parallel_size
        if self.channel is None or self.members != [seat.worker for seat in seats]:
            self.members = [seat.worker for seat in seats]
            self.channel = Channel(host, port, 1 + size * len(seats))
        if self.config.cluster.colocated:
            await self._ask_all("wake_up")
        offers = [Offer(version, self.channel, 1 + size * index, manifest) for index in range(len(seats))]
        self.receiving = self._spawn(self._receive(seats, offers))
        return self.channel

    async def publish(self, version: int, buckets: Sequence[Bucket], metrics: dict[str, float]) -> None:
        """Take over new weights and the metrics of the step that made them; returns before workers hold them."""
        await self._settle(version)
        self.pending[_BETWEEN_STEPS] = time.monotonic()
        self.spreading = self._spawn(self._spread(version, buckets, metrics))

    async def _settle(self, version: int) -> None:
        """The learner made ``version``; wait until the one before is with all workers."""
        self.pending.pop(f"the learner's step {version - 1}", None)
        if self.spreading is not None:
            with self._waiting_for(f"workers to hold version {version - 1}"):
                await asyncio.gather(self.spreading, return_exceptions=True)
        self._raise_failure()

    async def checkpoint(self, rank: int, version: int) -> dict[str, Any] | None:
        """What belongs to ``version`` beside the learner's own: replay, critic, and what this class remembers.

        All ranks wait here for an evaluation that is under way, and the first one is told.
        With ``max_staleness`` 0 all is as it was when the step from ``version`` began; with more, steps are made at the
        same time, and all is as it is now. A run that goes back to it makes the same step.
        """
        if self.spreading is not None:
            with self._waiting_for(f"workers to hold version {version}"):
                await asyncio.gather(self.spreading, return_exceptions=True)
        self._raise_failure()
        if rank:
            return None
        if self.config.rl.max_staleness:
            self.marks.pop(version, None)
        mark = await self._marked(version)
        self.named = dict(sorted({**self.named, version: mark}.items())[-_NAMED:])
        await self.shards.need([one["shards"] for one in self.named.values()])
        told = {step: metrics for step, metrics in self.told.items() if step <= version}
        self.told = {step: metrics for step, metrics in self.told.items() if step > min(self.named)}
        return mark | {"metrics": told}

    async def _marked(self, version: int) -> dict[str, Any]:
        """The mark of the step from ``version``, which is taken once, before the step changes anything."""
        for old in [one for one in self.marks if one < version - 1]:
            del self.marks[old]
        if version not in self.marks:
            self.marks[version] = self._spawn(self._mark(version))
        return await asyncio.shield(self.marks[version])

    async def _mark(self, version: int) -> dict[str, Any]:
        return {"version": version, "ledger": replace(self.ledger), "shards": await self.shards.mark()}

    async def _go_back(self, state: Mapping[str, Any] | None) -> None:
        """Be what :meth:`checkpoint` told, or what there is before the first step."""
        self.marks, self.named, self.told = {}, {}, {}
        if state is None:
            self.ledger = Ledger(response_length=self.config.rollout.max_new_tokens)
            await self.shards.go_back(None)
            return
        self.ledger, self.named = replace(state["ledger"]), {state["version"]: dict(state)}
        await self.shards.go_back(state["shards"])
        await self.shards.need([state["shards"]])
        for step, metrics in state["metrics"].items():  # a driver that was killed may not have heard of them
            self._event(step, metrics)

    async def fail(self, reason: str) -> None:
        """The learner cannot go on; the driver is told and the run ends."""
        async with self.changed:
            self.failure = self.failure or reason
            self.changed.notify_all()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise RuntimeError(self.failure)

    # --- production ---------------------------------------------------------------------------------------------

    async def _produce(self, first: int) -> None:
        rl = self.config.rl
        async with asyncio.TaskGroup() as steps:
            for target in range(first, rl.max_steps):
                await self.buffer.admit(rl.prompts_per_step)
                if target >= self.last_version:
                    return
                steps.create_task(self._produce_step(target))

    async def _produce_step(self, target: int) -> None:
        if not self.config.rl.max_staleness:
            await self._marked(target)
        batches, self.rollout_metrics[target] = await self._make_step(target)
        if self.config.cluster.colocated:
            await self._ask_all("sleep")
        wanted = self.config.rl.prompts_per_step
        self.buffer.finish(wanted)
        self.buffer.take(wanted)
        async with self.changed:
            self.step_batches[target] = batches
            self.changed.notify_all()

    async def _make_step(self, target: int) -> tuple[list[Batch], dict[str, float]]:
        """One step's groups, generated, scored and collated: a batch a rank, and metrics."""
        started = time.perf_counter()
        groups: list[Group] = await self._generate(self._tickets(target), "generate_groups")
        others = await self._refill_groups(groups, target) if self.config.rl.dynamic_sampling else []
        seconds = time.perf_counter() - started
        asked = [one for group in (*groups, *others) for one in group.asked]
        self._check_failures([one.failure for one in asked if one.failure], len(asked), "rewards")
        taught, more = groups, {"rollout/tokens_per_second": sum(len(one.token_ids) for one in asked) / seconds}
        if self.config.rl.dynamic_sampling:
            taught = [group for group in (*groups, *others) if self._differs(group)]
            more |= {"rollout/refilled_groups": float(len(others)), "reward/taught_groups": float(len(taught))}
        batches, replayed = await self._collate(taught or groups, target)
        return batches, self._measure(groups, target, seconds) | more | replayed

    async def _refill_groups(self, groups: Sequence[Group], target: int) -> list[Group]:
        """Other prompts' groups where too few have rewards that differ (DAPO, Yu et al. 2025, section 3.2).

        Metrics stay those of the first draw, which is a fair sample of the problems, but for what failed. Where no
        group at all differs, the first draw is the batch.
        """
        rl, others = self.config.rl, list[Group]()
        for round_number in range(rl.refill_rounds):
            missing = rl.prompts_per_step - sum(self._differs(group) for group in (*groups, *others))
            if not missing:
                break
            first = _REFILLS + (target * rl.refill_rounds + round_number) * rl.prompts_per_step
            others += await self._generate([self._ticket(first + i) for i in range(missing)], "generate_groups")
        return others

    def _differs(self, group: Group) -> bool:
        return bool(group.scored) and not all_alike(self._outcomes(group).rewards)

    def _tickets(self, target: int) -> list[Ticket]:
        wanted = self.config.rl.prompts_per_step
        return [self._ticket(position) for position in range(target * wanted, (target + 1) * wanted)]

    def _ticket(self, position: int) -> Ticket:
        """The training problem that is handed out at ``position`` of the run: a new permutation every epoch."""
        num_train = self.facts["num_train"]
        epoch, offset = divmod(position, num_train)
        return Ticket(position, int(_epoch_order(self.config.seed, epoch, num_train)[offset]))

    async def _generate(self, tickets: Sequence[Ticket], method: str, *args: Any) -> list[Any]:
        """What workers make of each ticket, in order. A group stays whole, so that its prompt is computed once."""
        shares = await self._deal(tickets)
        results = await asyncio.gather(*(self._generate_share(seat, share, method, *args) for seat, share in shares))
        made = sorted((item for share in results for item in share), key=lambda item: item.position)
        if [item.position for item in made] != [ticket.position for ticket in tickets]:
            raise RuntimeError("groups came back that are not exactly those handed out")
        return made

    async def _deal(self, tickets: Sequence[Ticket]) -> list[tuple[Seat, list[Ticket]]]:
        """Each ticket to the ready worker that owes the fewest tokens."""
        ready = await self._ready_seats()
        owed = {seat.number: seat.owed_tokens for seat in ready}
        shares: dict[int, list[Ticket]] = {seat.number: [] for seat in ready}
        for ticket in tickets:
            least = min(owed, key=lambda number: (owed[number], number))
            shares[least].append(ticket)
            owed[least] += self._expected_tokens(1)
        return [(seat, shares[seat.number]) for seat in ready if shares[seat.number]]

    async def _generate_share(self, seat: Seat, share: list[Ticket], method: str, *args: Any) -> list[Any]:
        while True:
            try:
                return await self._serve(seat, share, self._expected_tokens(len(share)), method, *args)
            except WorkerLostError:
                self.ledger.regenerated_groups += len(share)
                seat = min(await self._ready_seats(), key=lambda other: other.owed_tokens)

    async def _serve(self, seat: Seat, share: list[Any], tokens: int, method: str, *args: Any) -> list[Any]:
        """What a seat's worker makes of a share; it owes these tokens until it has, or is lost."""
        seat.owed_tokens += tokens
        try:
            made: list[Any] = await self._ask(seat, method, share, *args)
        finally:
            seat.owed_tokens -= tokens
        seat.losses = 0
        return made

    def _expected_tokens(self, num_groups: int) -> int:
        """Whole ones, so that what is owed comes back to nothing exactly."""
        return num_groups * self.config.rl.group_size * math.ceil(self.ledger.response_length)

    def _check_failures(self, failures: Sequence[str], count: int, what: str) -> None:
        """Count what user code failed at; raises when that is too large a share."""
        self.ledger.failed_rewards += len(failures)
        share = len(failures) / count
        if share > self.config.task.max_failed_rewards:
            raise RuntimeError(
                f"{share:.0%} of a step's {what} failed, more than task.max_failed_rewards = "
                f"{self.config.task.max_failed_rewards:.0%}; the first one {failures[0]}"
            )

    async def _collate(self, groups: Sequence[Group], target: int) -> tuple[list[Batch], dict[str, float]]:
        scored = [group for group in groups if group.scored]
        if not scored:
            raise RuntimeError("a step has no sample with a reward")
        relative = self._advantages([self._outcomes(group) for group in scored])
        trajectories = [trajectory for group in scored for trajectory in group.scored]
        positions = [group.position for group in scored for _ in group.scored]
        return await self._train_on(positions, trajectories, [a for advantages in relative for a in advantages], target)

    async def _train_on(
        self, positions: Sequence[int], trajectories: Sequence[Trajectory], advantages: Sequence[float], target: int
    ) -> tuple[list[Batch], dict[str, float]]:
        """A batch a rank: of these; without an actor, of as many out of replay, where these go first."""
        if not self.config.rl.actor_free:
            return self._batches(trajectories, advantages, target), {}
        await self._store(as_completion_rows(positions, trajectories, np.asarray(advantages)))
        rows = await self.shards.sample(len(trajectories), DRAWS, target)
        age = {"replay/age": float(target - np.mean(rows["version"].to_numpy()))}
        batches = self._batches(as_trajectories(rows), rows["outcome"].to_pylist(), target)
        return batches, age | await self._replay_size()

    async def _store(self, rows: pa.Table) -> None:
        """Into replay, each row in its position's shard; one insert for each that gets any."""
        lost = await self.shards.came_back()
        for shard, held in lost:
            self._say(f"replay shard {shard} was started again and has the {held} rows of its last snapshot")
        if lost:
            await self.shards.need([one["shards"] for one in self.named.values()])
        homes = np.array([self.shards.shard_of(str(position)) for position in rows["position"].to_pylist()])
        inserts = (self.shards.insert(int(home), rows.filter(pa.array(homes == home))) for home in np.unique(homes))
        await asyncio.gather(*inserts)

    async def _replay_size(self) -> dict[str, float]:
        rows, nbytes = await self.shards.size()
        return {"replay/rows": float(rows), "replay/megabytes": nbytes / 2**20}

    def _outcomes(self, group: Group) -> Outcomes:
        """Rewards as the algorithm sees them: less for what is overlong.

        Where completions are compared with each other, or with the greedy one, and all have the same reward, length
        alone teaches nothing: DAPO drops such groups by their accuracy, before the penalty (Yu et al. 2025, eq. 11).
        """
        greedy = None if group.greedy is None or group.greedy.failure else group.greedy
        whole = [*group.scored, *([greedy] if greedy else [])]
        rewards = torch.tensor([one.reward for one in whole], dtype=torch.float64)
        limit, buffer = self.config.rollout.max_new_tokens, self.config.rl.overlong_buffer
        if buffer and not (self.config.algorithm.within_prompts and all_alike(rewards)):
            lengths = [len(one.token_ids) for one in whole]
            rewards -= torch.tensor([overlong_penalty(length, limit, buffer) for length in lengths])
        return Outcomes(rewards[: len(group.scored)], float(rewards[-1]) if greedy else float("nan"))

    def _advantages(self, prompts: Sequence[Outcomes]) -> list[list[float]]:
        """Of each prompt's completions. Where the learner's value head is the baseline, the rewards themselves."""
        algorithm = self.config.algorithm.advantages()
        found = [one.rewards for one in prompts] if algorithm is None else algorithm(prompts)
        return [advantages.tolist() for advantages in found]

    def _batches(self, trajectories: Sequence[Trajectory], advantages: Sequence[float], target: int) -> list[Batch]:
        """One for each learner rank."""
        return collate(
            trajectories, advantages, self.config.cluster.learner_ranks, self.facts["pad_token_id"], target,
            self.config.rl.micro_batch_tokens,
        )  # fmt: skip

    def _measure(self, groups: Sequence[Group], target: int, seconds: float) -> dict[str, float]:
        """Of a step's first draw; where no reward of it came, what was counted alone."""
        counted = {
            "reward/failed": float(self.ledger.failed_rewards),
            "rollout/regenerated_groups": float(self.ledger.regenerated_groups),
            "rollout/worker_losses": float(self.ledger.worker_losses),
            "rollout/last_position": float(groups[-1].position),  # tickets up to here have been generated, each once
            "time/rollout": seconds,
        }
        scored = [group for group in groups if group.scored]
        if not scored:
            return counted
        trajectories = [trajectory for group in scored for trajectory in group.scored]
        rewards = np.array([trajectory.reward for trajectory in trajectories])
        lengths = np.array([len(trajectory.token_ids) for trajectory in trajectories])
        actions = np.concatenate([trajectory.actions for trajectory in trajectories])
        staleness = target - np.concatenate([trajectory.versions for trajectory in trajectories])
        counts = torch.from_numpy(np.bincount(actions, minlength=self.config.model.num_actions))
        self.ledger.response_length = 0.9 * self.ledger.response_length + 0.1 * float(lengths.mean())
        return counted | {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/zero_variance_groups": float(np.mean([not _has_signal(group) for group in scored])),
            "rollout/response_length": float(lengths.mean()),
            "rollout/distinct": float(np.mean([_distinct(group) for group in scored])),
            "rollout/truncated": float(np.mean([trajectory.truncated for trajectory in trajectories])),
            "staleness/mean": float(staleness.mean()),
            "staleness/max": float(staleness.max()),
            **usage(counts),
        }

    # --- weights ------------------------------------------------------------------------------------------------

    async def _spread(self, version: int, buckets: Sequence[Bucket], metrics: dict[str, float]) -> None:
        """Load ``buckets`` into every worker; then, and only then, free the slots that were trained on."""
        started = time.perf_counter()
        await self._update_workers(version, buckets)
        merged = {**self.rollout_metrics.pop(version - 1, {}), **metrics, "time/sync": time.perf_counter() - started}
        self.step_batches.pop(version - 1, None)
        merged["time/step"] = time.perf_counter() - self.published_at
        await self._evaluate_if_due(version, merged)
        self.published_at = time.perf_counter()
        self.told[version] = merged
        self._event(version, merged)
        await self.buffer.release(self.config.rl.prompts_per_step)

    async def _update_workers(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Every ready worker holds ``version`` on return; one that is being replaced will before it is ready."""
        self.weights = (version, buckets)
        holders: list[Any] = []
        if self.receiving is not None:
            await asyncio.gather(self.receiving)
            self.receiving, holders = None, self.members
        elif self.config.cluster.colocated:
            await self._ask_all("wake_up")
        await self._ask_all("update_weights", version, *buckets, spare=holders)
        self.version = version

    async def _receive(self, seats: Sequence[Seat], offers: Sequence[Offer]) -> None:
        asked = (self._ask(seat, "receive_weights", offer) for seat, offer in zip(seats, offers, strict=True))
        try:
            await asyncio.gather(*asked)
        except WorkerLostError as lost:  # the others wait for it inside the broadcast and cannot be called back
            raise RuntimeError(
                f"a worker was lost while weights were broadcast ({lost}); --resume goes on from the last checkpoint"
            ) from lost

    async def _evaluate_if_due(self, version: int, metrics: dict[str, float]) -> None:
        rl = self.config.rl
        if version == rl.max_steps or (rl.eval_every and version % rl.eval_every == 0):
            started = time.perf_counter()
            metrics |= _evals(await self._evaluate(bare_base=False))
            metrics["time/eval"] = time.perf_counter() - started

    async def _evaluate(self, bare_base: bool) -> dict[str, float]:
        """Of greedy responses to held-out problems: mean reward, and the share that is right where a task says so.

        Where scoring failed a response is not right, and has no part in the mean.
        """
        rewards = await self._evaluation_rewards(bare_base)
        known = [reward for reward in rewards if math.isfinite(reward)]
        found = {"reward": float(np.mean(known))} if known else {}
        if rewards and self.right_from is not None:
            found["accuracy"] = sum(reward >= self.right_from for reward in known) / len(rewards)
        return found

    async def _evaluation_rewards(self, bare_base: bool, *args: Any) -> list[float]:
        """Of each held-out problem that is asked; what is not finite has failed, and is said."""
        indices = range(min(self.config.rl.eval_problems, self.facts["num_heldout"]))
        rewards = await self._share_out(indices, "evaluate", bare_base, *args)
        failed = sum(not math.isfinite(reward) for reward in rewards)
        if failed:
            self._say(f"{failed} of {len(rewards)} evaluations failed in their task; none is right, or in a mean")
        return rewards

    async def _share_out(self, items: Sequence[Any], method: str, *args: Any) -> list[Any]:
        """``method(items, *args)`` gives a result an item; here, over all workers, also if some die. In order."""

        async def of_a_share(share: list[Any]) -> list[Any]:
            owed = len(share) * math.ceil(self.ledger.response_length)
            while True:
                seat = min(await self._ready_seats(), key=lambda other: other.owed_tokens)
                with contextlib.suppress(WorkerLostError):
                    return await self._serve(seat, share, owed, method, *args)

        count = len(self.seats)
        shares = [share for share in (list(items[i::count]) for i in range(count)) if share]
        results = await asyncio.gather(*(of_a_share(share) for share in shares))
        return [results[i % len(shares)][i // len(shares)] for i in range(len(items))]

    # --- workers ------------------------------------------------------------------------------------------------

    async def _ask(self, seat: Seat, method: str, *args: Any) -> Any:
        worker = seat.worker
        with self._waiting_for(f"worker {seat.number}: {method}"):
            try:
                return await self.pool.call(worker, method, *args)
            except WorkerLostError as lost:
                if seat.worker is worker and seat.ready:  # the first to notice
                    self._replace(seat, lost)
                raise

    async def _ask_all(self, method: str, *args: Any, spare: Sequence[Any] = ()) -> None:
        """Of every ready worker but ``spare``; one that is lost on the way is replaced, and nothing more is to do."""
        asked = [self._ask(seat, method, *args) for seat in self.seats if seat.ready and seat.worker not in spare]
        for result in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, WorkerLostError):
                raise result

    async def _ready_seats(self) -> list[Seat]:
        async with self.changed:
            await self.changed.wait_for(lambda: any(seat.ready for seat in self.seats))
        return [seat for seat in self.seats if seat.ready]

    def _replace(self, seat: Seat, lost: BaseException) -> None:
        seat.ready = False
        if not isinstance(lost, WorkerNeverRanError):
            seat.losses += 1
            self.ledger.worker_losses += 1
        if seat.losses > self.config.rollout.max_restarts:
            raise RuntimeError(f"worker {seat.number} died {seat.losses} times without completing a share: {lost}")
        self._say(f"worker {seat.number} was lost and is started again; its share goes to whoever is ready")
        self._spawn(self._refill(seat))

    async def _refill(self, seat: Seat) -> None:
        """A new worker that holds the current weights, also if they change meanwhile."""
        self.pool.kill(seat.worker)
        seat.worker = self.pool.spawn()
        given = None
        try:
            while given is not self.weights:
                given = self.weights
                if given is not None:
                    with self._waiting_for(f"worker {seat.number}: start again"):
                        await self.pool.call(seat.worker, "update_weights", given[0], *given[1])
        except WorkerLostError as lost:
            self._replace(seat, lost)
            return
        async with self.changed:
            seat.ready = True
            self.changed.notify_all()

    # --- tasks, events, and what is waited for --------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task whose failure is the run's."""

        async def guarded() -> T:
            try:
                return await work
            except Exception as error:
                await self.fail(ending.reason(error))
                raise

        task = asyncio.get_running_loop().create_task(guarded())
        self.chores.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task) -> None:
        self.chores.discard(task)
        if not task.cancelled():
            task.exception()  # was told already

    @contextlib.contextmanager
    def _waiting_for(self, what: str) -> Iterator[None]:
        since = self.pending[what] = time.monotonic()
        try:
            yield
        finally:
            if self.pending.get(what) == since:
                del self.pending[what]

    async def _watch_for_stalls(self) -> None:
        limit = self.config.cluster.stall_timeout_s
        while True:
            await asyncio.sleep(min(limit / 4, 5.0))
            now = time.monotonic()
            stuck = [f"{what} ({now - since:.0f} s)" for what, since in self.pending.items() if now - since > limit]
            if stuck:
                raise RuntimeError(
                    f"no progress for cluster.stall_timeout_s = {limit:g} s; waiting for: {', '.join(stuck)}"
                )

    def _event(self, step: int, metrics: dict[str, float]) -> None:
        self.events.append({"step": step, "metrics": metrics})

    def _say(self, line: str) -> None:
        """To whoever watches the run."""
        self.events.append({"say": line})

    def _doing(self, what: str) -> None:
        self.events.append({"doing": what})


def _evals(found: Mapping[str, float]) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in found.items()}


def _has_signal(group: Group) -> bool:
    """Whether its rewards differ by more than rounding."""
    return not all_alike(torch.from_numpy(group.rewards))


def _distinct(group: Group) -> float:
    """Different completions of a group over all of them."""
    return len({one.token_ids.tobytes() for one in group.scored}) / len(group.scored)


@functools.lru_cache(maxsize=2)  # a step may reach into the next epoch
def _epoch_order(seed: int, epoch: int, num_train: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_train)
