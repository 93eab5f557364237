"""A simulated cluster around the real controller: engines, learner ranks and losses, in one event loop.

    SimulatedTime    an asyncio event loop whose clock jumps to the next timer
    Engines          the controller's WorkerPool: completions decode together in each, as fast as the plan says
    Learner          all ranks: next_batch, learning, handing over, publish
    Accounts         CPU seconds of the simulation, to be subtracted; the controller's calls and their bytes

An engine decodes one token for each of its sequences in a step of ``Decoding.seconds(sequences)``. Steps in which no
sequence ends are computed together.
"""

import asyncio
import contextlib
import heapq
import math
import pickle
import selectors
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from cola_ray.batch import Group, Held, apart, as_groups, together
from cola_ray.experience import Ticket, Trajectory
from cola_ray.loop import evaluation, problems, supervisor, weight_sync
from cola_ray.loop.controller import Controller
from cola_ray.loop.workers import WorkerLostError
from cola_ray.settings.config import Config
from cola_ray.studies.planned_time import Decoding

# --- time -----------------------------------------------------------------------------------------------------------


class _NoFiles(selectors.DefaultSelector):
    """Never waits: where the loop would sleep, its clock is set forward."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing will ever happen: everybody waits for somebody else")
        self.now += max(timeout, 0.0)
        return []


class SimulatedTime(asyncio.SelectorEventLoop):
    """An event loop in simulated seconds."""

    def __init__(self) -> None:
        self.clock = _NoFiles()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now

    @contextlib.contextmanager
    def as_the_controllers_clock(self) -> Iterator[None]:
        """Let the controller's own time measurements and stall detection use simulated seconds, too."""
        modules = (evaluation, problems, supervisor, weight_sync)
        stand_in: Any = SimpleNamespace(perf_counter=self.time, monotonic=self.time)
        try:
            for module in modules:
                module.time = stand_in
            yield
        finally:
            for module in modules:
                module.time = time


# --- accounts -------------------------------------------------------------------------------------------------------


@dataclass
class Accounts:
    """CPU time of the simulation, and the calls and bytes that went through the controller's process."""

    simulated: float = 0.0  # CPU seconds of engines and learner, by this process's clock
    calls: int = 0  # made by the controller and to it
    call_bytes: int = 0  # of their pickled arguments; results are measured at whole lengths, see scale.py

    @contextlib.contextmanager
    def simulating(self) -> Iterator[None]:
        """Count the CPU seconds of this block as simulation, not as the controller's. It must not await anything."""
        started = time.process_time()
        try:
            yield
        finally:
            self.simulated += time.process_time() - started


def pickled(value: Any) -> int:
    """The size in bytes of a message as Ray would send it."""
    return len(pickle.dumps(value, protocol=5))


# --- an engine ------------------------------------------------------------------------------------------------------


@dataclass
class Share:
    """The completions of one call."""

    left: int
    ended: asyncio.Future[None]


class SimulatedEngine:
    """Sequences that decode together, with pauses for loading weights.

    Args:
        decoding: how long a decoding step takes, and how many sequences fit.
        ready_at: simulated second from which the engine answers.
    """

    def __init__(self, loop: SimulatedTime, decoding: Decoding, ready_at: float) -> None:
        self.loop, self.decoding = loop, decoding
        self.most = max(int(decoding.most), 1)
        self.running: list[tuple[float, int, Share]] = []  # a heap: decoding step of its last token, number, share
        self.queue: deque[tuple[float, Share]] = deque()
        self.at, self.steps, self.number = ready_at, 0.0, 0  # simulated up to this second and decoding step
        self.busy = self.loaded = 0.0
        self.ready_at, self.version, self.lost = ready_at, 0, False
        self.timer: asyncio.TimerHandle | None = None
        self.lifetime: asyncio.TimerHandle | None = None
        self.drained: list[asyncio.Future[None]] = []
        self.gate = asyncio.Lock()  # held while a call joins, and during a weight update, as in RunningBatch

    def worked(self) -> float:
        """Seconds so far in which the engine decoded or loaded weights."""
        self._advance(self.loop.time())
        return self.busy + self.loaded

    def decode(self, lengths: Sequence[int], prefill: float) -> asyncio.Future[None]:
        """Start a call's completions now; the future is done when the last of them is."""
        self._advance(self.loop.time())
        share = Share(len(lengths), self.loop.create_future())
        # Prompts are computed in chunks during decoding steps, which delays all of the call's completions.
        later = prefill / self.decoding.seconds(len(lengths))
        self.queue.extend((length + later, share) for length in lengths)
        self._admit()
        self._set_timer()
        return share.ended

    def pause(self, seconds: float) -> None:
        """Load weights; requests in flight continue afterwards."""
        self._advance(self.loop.time())
        self.at += seconds
        self.loaded += seconds
        self._set_timer()

    async def drain(self) -> None:
        """Wait until no request is in flight."""
        self._advance(self.loop.time())
        if self.running:
            self.drained.append(self.loop.create_future())
            await self.drained[-1]

    def raise_if_lost(self) -> None:
        if self.lost:
            raise WorkerLostError("its machine is gone")

    def lose(self) -> None:
        """Lose the engine and all requests in it."""
        self._advance(self.loop.time())
        self.lost = True
        lost = {id(share): share.ended for _, _, share in self.running}
        lost |= {id(share): share.ended for _, share in self.queue}
        for future in (*lost.values(), *self.drained):
            if not future.done():
                future.set_exception(WorkerLostError("its machine is gone"))
        self.running, self.queue, self.drained = [], deque(), []
        for timer in (self.timer, self.lifetime):
            if timer is not None:
                timer.cancel()

    def _admit(self) -> None:
        while self.queue and len(self.running) < self.most:
            tokens, share = self.queue.popleft()
            self.number += 1
            heapq.heappush(self.running, (self.steps + tokens, self.number, share))

    def _advance(self, until: float) -> None:
        """Decode up to the second ``until``."""
        while self.running:
            seconds = self.decoding.seconds(len(self.running))
            last = self.running[0][0]
            ends = self.at + (last - self.steps) * seconds
            if ends > until + 1e-9:  # the clock's resolution
                if self.at < until:
                    self.steps += (until - self.at) / seconds
                    self.busy += until - self.at
                    self.at = until
                return
            self.busy += ends - self.at
            self.at, self.steps = ends, last
            share = heapq.heappop(self.running)[2]
            share.left -= 1
            if not share.left:
                share.ended.set_result(None)
            self._admit()
        self.at = max(self.at, until)
        if not self.running:
            for future in self.drained:
                future.set_result(None)
            self.drained = []

    def _set_timer(self) -> None:
        """Wake up when the next call ends, unless another call joins before."""
        if self.timer is not None:
            self.timer.cancel()
        if self.running:
            self.timer = self.loop.call_at(self._next_end(), self._wake)

    def _wake(self) -> None:
        self._advance(self.loop.time())
        self._set_timer()

    def _next_end(self) -> float:
        running, queue, left = list(self.running), list(self.queue), dict[int, int]()
        at, steps, taken = self.at, self.steps, 0
        while running:
            last, _, share = heapq.heappop(running)
            at += (last - steps) * self.decoding.seconds(len(running) + 1)
            steps = last
            left[id(share)] = left.get(id(share), share.left) - 1
            if not left[id(share)]:
                break
            if taken < len(queue):
                tokens, other = queue[taken]
                taken += 1
                heapq.heappush(running, (steps + tokens, self.number + taken, other))
        return at


# --- all engines ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """The simulated cluster.

    Args:
        lengths: (positions, completions) completion lengths, by position of the run modulo the number of rows.
        token_share: the share of a completion's tokens that its arrays really hold.
        losses_per_second: how often one engine is lost.
    """

    lengths: np.ndarray
    decoding: Decoding
    learn_per_token: float  # seconds that all ranks together need per token of the step
    hands_over: float
    loads: float
    buckets: int
    token_share: float
    losses_per_second: float = 0.0
    restart_seconds: float = 120.0
    prompt_tokens: int = 512
    seed: int = 0


@dataclass
class Engines:
    """The controller's :class:`~cola_ray.loop.workers.WorkerPool`."""

    config: Config
    cluster: Cluster
    accounts: Accounts
    loop: SimulatedTime
    spawned: list[SimulatedEngine] = field(default_factory=list)
    lost: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng((self.cluster.seed, 1))
        self.drains = self.config.rl.update_mode == "drain"
        longest = self.config.rollout.max_new_tokens + self.cluster.prompt_tokens
        self.ids, self.log_probs = np.ones(longest, np.int64), np.full(longest, -0.5, np.float32)
        self.actions = self.random.integers(0, self.config.model.num_actions, longest)
        self.versions = dict[int, np.ndarray]()

    def spawn(self) -> SimulatedEngine:
        with self.accounts.simulating():
            first = len(self.spawned) < self.config.rollout.num_workers
            ready_at = self.loop.time() + (0.0 if first else self.cluster.restart_seconds)
            made = SimulatedEngine(self.loop, self.cluster.decoding, ready_at)
            self.spawned.append(made)
            if self.cluster.losses_per_second:
                lives = float(self.random.exponential(1 / self.cluster.losses_per_second))
                made.lifetime = self.loop.call_at(ready_at + lives, self._lose, made)
            return made

    def _lose(self, engine: SimulatedEngine) -> None:
        with self.accounts.simulating():
            self.lost += 1
            engine.lose()

    def kill(self, engine: SimulatedEngine) -> None:
        with self.accounts.simulating():
            engine.lose()

    async def call(self, engine: SimulatedEngine, method: str, *args: Any) -> Any:
        with self.accounts.simulating():
            self.accounts.calls += 1
            self.accounts.call_bytes += pickled((method, *args))
        if engine.ready_at > self.loop.time():
            await asyncio.sleep(engine.ready_at - self.loop.time())
        engine.raise_if_lost()
        return await getattr(self, f"_{method}")(engine, *args)

    async def _facts(self, engine: SimulatedEngine) -> dict[str, int]:
        return {"num_train": len(self.cluster.lengths), "num_heldout": 0, "pad_token_id": 0, "num_too_long": 0}

    async def _update_weights(self, engine: SimulatedEngine, version: int, *references: Any) -> int:
        async with engine.gate if self.drains else contextlib.nullcontext():
            if self.drains:
                await engine.drain()
            with self.accounts.simulating():
                engine.raise_if_lost()
                engine.pause(self.cluster.loads)
            await asyncio.sleep(self.cluster.loads)
        engine.version = version
        return version

    async def _generate_groups(self, engine: SimulatedEngine, tickets: Sequence[Ticket]) -> list[Group]:
        async with engine.gate:
            with self.accounts.simulating():
                engine.raise_if_lost()
                lengths = [self.cluster.lengths[ticket.position % len(self.cluster.lengths)] for ticket in tickets]
                share = len(tickets) * self.config.rl.group_size / self.cluster.decoding.sequences
                version = engine.version
                decoded = engine.decode(np.concatenate(lengths).tolist(), share * self.cluster.decoding.prefill)
        await decoded
        with self.accounts.simulating():
            positions = [ticket.position for ticket in tickets]
            groups, data = apart(self.groups(positions, lengths, version))
            return together(groups, [Held(None, f"{one.position:056x}") for one, _ in zip(groups, data, strict=False)])

    def groups(self, positions: Sequence[int], lengths: Sequence[np.ndarray], version: int) -> list[Group]:
        """Completions of these lengths as an engine would return them, with only the given share of their tokens."""
        return as_groups(
            [(at, self.completions(at, of, version), None) for at, of in zip(positions, lengths, strict=True)]
        )

    def completions(self, position: int, lengths: np.ndarray, version: int) -> list[Trajectory]:
        limit, share = self.config.rollout.max_new_tokens, self.cluster.token_share
        prompt = slice(0, max(int(self.cluster.prompt_tokens * share), 1))
        versions = self.versions.setdefault(version, np.full(len(self.ids), version, np.int64))
        made = []
        for sibling, length in enumerate(lengths.tolist()):
            kept = slice(0, max(math.ceil(length * share), 1))
            reward = float((position * 7 + sibling) % 3 == 0)
            made.append(
                Trajectory(
                    self.ids[prompt], self.ids[kept], self.actions[kept], self.log_probs[kept], versions[kept], reward,
                    truncated=length == limit, text="",
                )
            )  # fmt: skip
        return made


# --- the learner ----------------------------------------------------------------------------------------------------


@dataclass
class Learner:
    """All ranks, as one, since ZeRO-3 keeps them in step."""

    engines: Engines
    busy: float = 0.0
    marks: list[tuple[float, float, float]] = field(default_factory=list)
    """For each version's hand-over: simulated second, seconds that the learner and that all engines have worked."""

    async def train(self, controller: Controller) -> None:
        """Train until the controller has no more batches."""
        cluster, accounts, loop = self.engines.cluster, self.engines.accounts, self.engines.loop
        references, version = [f"{bucket:028x}" for bucket in range(cluster.buckets)], 0
        await controller.begin(version, references)
        while True:
            ranks = range(controller.config.cluster.learner_ranks)
            batches = await asyncio.gather(*(controller.next_batch(rank, version) for rank in ranks))
            if batches[0] is None:
                return
            with accounts.simulating():
                accounts.calls += len(batches) + 1
                accounts.call_bytes += len(batches) * pickled(("next_batch", 0, version)) + pickled(references)
            learns = batches[0].num_tokens_global / cluster.token_share * cluster.learn_per_token
            del batches
            await asyncio.sleep(learns + cluster.hands_over)
            self.busy += learns + cluster.hands_over
            version += 1
            with accounts.simulating():
                self.marks.append((loop.time(), self.busy, sum(one.worked() for one in self.engines.spawned)))
            await controller.publish(version, references, {"time/learn": learns})
