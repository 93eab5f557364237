"""The group of rollout workers: work goes to the worker with the least, and a lost worker costs only time.

dispatch(items, method) ── each item to the worker with the fewest outstanding tokens ──> method(share)
                                 ^                                                          │        │
                                 │ the share goes to another worker                         v        v
ready again <── prepare: current weights <── a new process <── replace <── WorkerLostError ─┘     results,
                                                                                               in items' order
"""

import asyncio
import heapq
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cola_ray.experience import Ticket
from cola_ray.loop.supervisor import Supervisor
from cola_ray.settings.rl import RolloutConfig


class WorkerLostError(RuntimeError):
    """A worker's process is gone; its work must be given to another one."""


class WorkerNeverRanError(WorkerLostError):
    """Its machine was lost before it started: no work is lost with it, and another worker may run elsewhere."""


class WorkerPool(Protocol):
    """The interface to make, call and end workers: Ray actors in a run, plain objects in a single process."""

    def spawn(self) -> Any: ...

    def call(self, actor: Any, method: str, *args: Any) -> Awaitable[Any]:
        """Raises WorkerLostError when the process is gone (WorkerNeverRanError if there never was one), and whatever
        the method raises.
        """
        ...

    def kill(self, actor: Any) -> None: ...


@dataclass
class Worker:
    """A place in the group: its current actor, and the work that the actor has been given."""

    number: int
    actor: Any
    is_ready: bool = True  # holds the current weights
    outstanding_tokens: int = 0
    losses: int = 0  # in a row, without completing a share


@dataclass
class Totals:
    """Counts of failures and losses over the whole run; part of its checkpoints."""

    regenerated_groups: int = 0
    worker_losses: int = 0
    failed_rewards: int = 0
    response_length: float = 0.0  # running mean, in tokens; the estimated cost of a completion


class WorkerGroup:
    """Workers that share the work.

    Attributes:
        prepare: brings a new worker to the state of the others; does nothing until it is set.
        facts: the first worker's facts about its task and tokenizer, see the workers' ``facts``.
    """

    def __init__(self, config: RolloutConfig, pool: WorkerPool, supervisor: Supervisor) -> None:
        self.config, self.pool, self.supervisor = config, pool, supervisor
        self.workers = [Worker(number, pool.spawn()) for number in range(config.num_workers)]
        self.totals = Totals(response_length=config.max_new_tokens)
        self.prepare: Callable[[Any], Awaitable[None]] = _nothing
        self.facts: dict[str, Any] = {}

    async def start(self) -> dict[str, Any]:
        """Wait until the first worker answers. Returns its facts."""
        self.facts = await self.ask(self.workers[0], "facts")
        return self.facts

    def __str__(self) -> str:
        count = len(self.workers)
        return f"{count} engine{'s' * (count > 1)}"

    @property
    def ready(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.is_ready]

    # --- work -------------------------------------------------------------------------------------------------------

    async def generate(
        self, tickets: Sequence[Ticket], method: str, *args: Any, completions_per_ticket: int = 1
    ) -> list[Any]:
        """One rollout per ticket, in order: a group (whose prompt is computed only once) or an episode."""
        made = await self.dispatch(
            tickets, method, *args, completions=completions_per_ticket, on_loss=self._count_regenerated
        )
        if [one.position for one in made] != [ticket.position for ticket in tickets]:
            raise RuntimeError("workers returned other groups than those that they were asked for")
        return made

    async def dispatch(
        self,
        items: Sequence[Any],
        method: str,
        *args: Any,
        completions: int = 1,
        on_loss: Callable[[int], None] = lambda count: None,
    ) -> list[Any]:
        """Results of ``method(share, *args)`` over all workers, one per item, in the items' order; survives losses.

        Args:
            completions: number per item, each assumed to be of mean length; used to balance the workers.
            on_loss: called with the size of each share that has to be done again.
        """

        async def of_share(worker: Worker, places: list[int]) -> None:
            made = await self._insist(worker, [items[place] for place in places], completions, on_loss, method, *args)
            results.update(zip(places, made, strict=True))

        results: dict[int, Any] = {}
        shares = await self._deal(len(items), completions)
        await asyncio.gather(*(of_share(worker, places) for worker, places in shares))
        return [results[place] for place in range(len(items))]

    async def generate_each(
        self, tickets: Sequence[Ticket], use: Callable[[Any], Awaitable[None]], method: str, completions: int
    ) -> dict[int, asyncio.Task]:
        """One rollout per ticket, passed to ``use`` as soon as it is finished; the tasks, by ticket position."""

        async def of_ticket(worker: Worker, ticket: Ticket) -> None:
            (made,) = await self._insist(worker, [ticket], completions, self._count_regenerated, method)
            if made.position != ticket.position:
                raise RuntimeError("a worker returned another group than the one that it was asked for")
            await use(made)

        shares = await self._deal(len(tickets), completions)
        return {
            tickets[place].position: self.supervisor.spawn(of_ticket(worker, tickets[place]))
            for worker, places in shares
            for place in places
        }

    async def _insist(
        self,
        worker: Worker,
        share: list[Any],
        completions: int,
        on_loss: Callable[[int], None],
        method: str,
        *args: Any,
    ) -> list[Any]:
        """A share's results, from this worker or, if it is lost, from another."""
        while True:
            try:
                made = await self._serve(worker, share, completions, method, *args)
                break
            except WorkerLostError:
                on_loss(len(share))
                worker = min(await self._wait_until_ready(), key=lambda other: other.outstanding_tokens)
        if len(made) != len(share):
            raise RuntimeError(f"worker {worker.number}: {method} gave {len(made)} results for {len(share)} items")
        return made

    async def _deal(self, count: int, completions: int) -> list[tuple[Worker, list[int]]]:
        """Give each item (by its index) to the ready worker with the fewest outstanding tokens."""
        ready = await self._wait_until_ready()
        shares: dict[int, list[int]] = {worker.number: [] for worker in ready}
        outstanding = [(worker.outstanding_tokens, worker.number) for worker in ready]
        heapq.heapify(outstanding)
        tokens = self._expected_tokens(completions)
        for place in range(count):
            least, number = outstanding[0]
            shares[number].append(place)
            heapq.heapreplace(outstanding, (least + tokens, number))
        return [(worker, shares[worker.number]) for worker in ready if shares[worker.number]]

    async def _serve(self, worker: Worker, share: list[Any], completions: int, method: str, *args: Any) -> list[Any]:
        """Have one worker do a share; the share's tokens are outstanding until it returns or is lost."""
        tokens = self._expected_tokens(len(share) * completions)
        worker.outstanding_tokens += tokens
        try:
            made: list[Any] = await self.ask(worker, method, share, *args)
        finally:
            worker.outstanding_tokens -= tokens
        worker.losses = 0
        return made

    def _expected_tokens(self, completions: int) -> int:
        """An integer, so that outstanding tokens return to exactly 0."""
        return completions * math.ceil(self.totals.response_length)

    def _count_regenerated(self, count: int) -> None:
        self.totals.regenerated_groups += count

    async def ask(self, worker: Worker, method: str, *args: Any) -> Any:
        """Call one worker. Raises WorkerLostError when it is lost; the first caller to notice has it replaced."""
        actor = worker.actor
        with self.supervisor.waiting_for(f"worker {worker.number}: {method}"):
            try:
                return await self.pool.call(actor, method, *args)
            except WorkerLostError as lost:
                if worker.actor is actor and worker.is_ready:
                    self._replace(worker, lost)
                raise

    async def ask_all(self, method: str, *args: Any, without: Sequence[Any] = ()) -> None:
        """Call every ready worker whose actor is not in ``without``. One that is lost meanwhile is replaced."""
        left_out = {id(actor) for actor in without}
        asked = [self.ask(worker, method, *args) for worker in self.ready if id(worker.actor) not in left_out]
        for result in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, WorkerLostError):
                raise result

    # --- losses -----------------------------------------------------------------------------------------------------

    async def _wait_until_ready(self) -> list[Worker]:
        """All ready workers; waits until there is at least one."""
        await self.supervisor.until(lambda: bool(self.ready))
        return self.ready

    def _replace(self, worker: Worker, lost: BaseException) -> None:
        worker.is_ready = False
        if not isinstance(lost, WorkerNeverRanError):
            worker.losses += 1
            self.totals.worker_losses += 1
        if worker.losses > self.config.max_restarts:
            raise RuntimeError(f"worker {worker.number} died {worker.losses} times without completing a share: {lost}")
        self.supervisor.say(
            f"worker {worker.number} was lost and is started again; the next free worker takes over its share"
        )
        self.supervisor.spawn(self._start_again(worker))

    async def _start_again(self, worker: Worker) -> None:
        self.pool.kill(worker.actor)
        worker.actor = self.pool.spawn()
        try:
            with self.supervisor.waiting_for(f"worker {worker.number}: start again"):
                await self.prepare(worker.actor)
        except WorkerLostError as lost:
            self._replace(worker, lost)
            return
        worker.is_ready = True  # before any await: the next update must not miss it
        await self.supervisor.notify()


async def _nothing(actor: Any) -> None:
    """The default ``prepare``: does nothing."""
