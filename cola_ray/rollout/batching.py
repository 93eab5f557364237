"""Which requests share the engine's next step.

RunningBatch   continuous batching: every request that has arrived joins before the next step
Rounds         episodes that take their turns in lockstep, so that batches do not depend on how fast games answer
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from cola_ray.rollout.engine import Completion, Engine, Request

T = TypeVar("T")


class RunningBatch:
    """One engine that many coroutines share. Requests that arrive during a step join the batch before the next one.

        complete(requests) ─> arrivals ─> admitted together ─> engine.step(), in a thread, until nothing is in flight
        swap(load)         ─> between two steps, or with ``drain`` once nothing is in flight

    If a step fails, its error is raised in every call that waits for a completion.

    Admitting all arrivals together is what keeps batches full: 64 episodes of Twenty Questions then share some 200
    steps. When each caller had to find the engine between two steps, it was one turn per step, 1270 steps, and 2.4
    times as long.

    Args:
        drain: swap weights only after all requests in flight have finished, rather than between two steps.
    """

    def __init__(self, engine: Engine, drain: bool) -> None:
        self.engine, self.drain = engine, drain
        self.gate = asyncio.Lock()  # held briefly by each call that joins, and throughout a swap that drains
        self.between_steps = asyncio.Lock()
        self.arrivals: list[tuple[Request, asyncio.Future[Completion]]] = []
        self.waiting: dict[str, asyncio.Future[Completion]] = {}
        self.runner: asyncio.Task | None = None
        # One thread for all steps, because OpenMP keeps a pool for each thread that calls it. A new thread has OpenMP's
        # own number of threads until torch has set it, and vLLM's attention refuses a number that changes in mid-step.
        self.stepper = ThreadPoolExecutor(1, initializer=_use_torchs_threads)

    async def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completions in order. All requests of a call join at once, so timing cannot split them.

        If the caller is cancelled, its requests leave the engine before the next step.
        """
        async with self.gate:
            arrivals = [(request, asyncio.get_running_loop().create_future()) for request in requests]
            self.arrivals += arrivals
            if self.runner is None or self.runner.done():
                self.runner = asyncio.create_task(self._run())
        return await asyncio.gather(*(future for _, future in arrivals))

    async def swap(self, load: Callable[[], None]) -> None:
        """Run ``load`` while the engine is not stepping."""
        async with self.gate if self.drain else self.between_steps:
            if self.drain and self.runner is not None:
                await self.runner
            await asyncio.get_running_loop().run_in_executor(self.stepper, load)

    async def _run(self) -> None:
        """Step until nothing is in flight and nothing has arrived."""
        try:
            while self.arrivals or self.engine.num_in_flight:
                async with self.between_steps:
                    self._admit()
                    if not self.engine.num_in_flight:
                        continue
                    finished = await asyncio.get_running_loop().run_in_executor(self.stepper, self.engine.step)
                for name, completion in finished.items():
                    future = self.waiting.pop(name)
                    if not future.done():  # it may have been cancelled during the step
                        future.set_result(completion)
        except Exception as error:
            futures = [*self.waiting.values(), *(future for _, future in self.arrivals)]
            self.waiting, self.arrivals = {}, []
            for future in futures:
                if not future.done():
                    future.set_exception(error)

    def _admit(self) -> None:
        """Drop what was cancelled, and submit all arrivals.

        Episodes that finished a turn in one step thus all have their next turn in the next step.
        """
        for name in [name for name, future in self.waiting.items() if future.done()]:
            del self.waiting[name]
            self.engine.abort(name)

        arrivals, self.arrivals = self.arrivals, []
        for request, future in arrivals:
            if future.done():
                continue
            try:
                self.waiting[self.engine.submit(request)] = future
            except Exception as error:  # vLLM refused this request; the others go on
                future.set_exception(error)


class Rounds(Generic[T]):
    """Episodes that take their turns together: each round submits the requests of all episodes still playing.

    Args:
        count: number of episodes.
        submit_all: takes all requests of a round, in the order of the episodes, and returns one result per request.
    """

    def __init__(self, count: int, submit_all: Callable[[Sequence[Request]], Awaitable[list[T]]]) -> None:
        self.num_playing, self.submit_all = count, submit_all
        self.waiting: dict[int, tuple[Sequence[Request], asyncio.Future[list[T]]]] = {}
        self.round: asyncio.Task[None] | None = None

    async def submit(self, episode: int, requests: Sequence[Request]) -> list[T]:
        """Wait until every episode still playing has submitted; return the results of this episode's requests."""
        results = asyncio.get_running_loop().create_future()
        self.waiting[episode] = requests, results
        self._start_if_complete()
        return await results

    def leave(self) -> None:
        """Take an episode that has ended out of the rounds to come."""
        self.num_playing -= 1
        self._start_if_complete()

    def _start_if_complete(self) -> None:
        if self.waiting and len(self.waiting) == self.num_playing:
            submitted = [self.waiting[episode] for episode in sorted(self.waiting)]
            self.waiting = {}
            self.round = asyncio.create_task(self._play(submitted))

    async def _play(self, submitted: Sequence[tuple[Sequence[Request], asyncio.Future[list[T]]]]) -> None:
        try:
            made = iter(await self.submit_all([request for requests, _ in submitted for request in requests]))
        except Exception as error:
            for _, results in submitted:
                if not results.done():
                    results.set_exception(error)
            return
        for requests, results in submitted:
            own = list(itertools.islice(made, len(requests)))
            if not results.done():  # the episode may have been cancelled
                results.set_result(own)


def _use_torchs_threads() -> None:
    """Give this thread the number of OpenMP threads that ``torch.set_num_threads`` has set for the process."""
    import torch

    torch.get_num_threads()  # sets it at a thread's first call
