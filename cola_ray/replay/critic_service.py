"""The critic as a service: replicas that step together, saved after every fit, formed anew when one of them dies.

CriticReplicas.fit(fresh) ──> each replica: its share of a batch from replay ─> gradient ─┐
     │  ^                                        all-reduce: the same step on all <────────┘
     │  └── a replica is lost: the others' step fails at once; Ray starts it again,
     v      the first one's last save goes to all, and the fit is made again
CriticReplicas.advantages(fresh) ──> each replica: a share
CriticReplicas.assess(new rows)  ──> likewise, before they are replayed: do advantages foretell what they brought?
"""

import asyncio
import copy
import functools
import itertools
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tenacity
import torch
from torch import nn
from transformers import AutoModel

from cola_ray.algorithms.advantages import centred, over_spread
from cola_ray.algorithms.archer import TwinHeads
from cola_ray.replay.critic import Critic, EncodedTwins
from cola_ray.replay.service import Draw, Shards
from cola_ray.replay.transitions import Read, TextReader, critic_batch, read_features
from cola_ray.runs.saved import write_whole
from cola_ray.settings.config import CriticConfig
from cola_ray.weights import Channel, join, meeting_point

Array = np.ndarray
Metrics = dict[str, float]
_TYPICAL_ROWS = 4096  # enough to know how often a turn ends an episode
_SAVES = 3
"""The last ones, which stay: a checkpoint is made of one while the next fit goes on."""
_DRAWS = 1
"""Begins the places of a critic's draws in the run; those of the controller begin with 0."""


class ReplicaLostError(RuntimeError):
    """A replica's process is gone, or one that it stepped with."""


class CriticService:
    """One replica. A plain class; the driver makes it an actor.

    Args:
        width: of the base's features, which ``config.encoder`` takes the place of.
        model_path: whose ids replay holds.
        folder: of what each fit saves, ``critic-<steps>.pt``.
    """

    def __init__(
        self, config: CriticConfig, width: int, model_path: str, shards: Shards, folder: str, seed: int
    ) -> None:
        self.config, self.width, self.shards, self.seed = config, width, shards, seed
        self.folder, self.busy = Path(folder), asyncio.Lock()
        self.read: Read = TextReader(config.encoder, model_path) if config.encoder else read_features
        self.rank, self.size = 0, 1

    async def saved(self) -> Mapping[str, Any] | None:
        """What the last fit left; None where there was none."""
        files = self._files()
        return torch.load(files[-1], map_location="cpu", weights_only=True) if files else None

    async def mark(self) -> str:
        """The file of the last fit; empty where there was none."""
        async with self.busy:
            return str(self._files()[-1]) if self._files() else ""

    async def go_back(self, file: str) -> None:
        """Go on from what a fit saved, at the next ``join``; empty: from nothing."""
        async with self.busy:
            for old in self._files():
                if not file or old.resolve() != Path(file).resolve():
                    old.unlink()
            if file:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(self.folder / Path(file).name, lambda to: to.write(Path(file).read_bytes()))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("critic-*.pt"))

    async def address(self) -> tuple[str, int]:
        """Where the other replicas can meet this one."""
        return meeting_point()

    async def join(self, channel: Channel, rank: int, state: Mapping[str, Any] | None) -> None:
        """Start from ``state`` together with the channel's other replicas; returns when all have come."""
        self.rank, self.size = rank, channel.world_size
        config = self.config
        torch.manual_seed(self.seed)
        self.critic = Critic(
            self._heads(),
            gamma=config.gamma, tau=config.tau, lr=config.lr, grad_clip=config.grad_clip, expectile=config.expectile,
        )  # fmt: skip
        if state is not None:
            self.critic.load_state_dict(copy.deepcopy(dict(state)))  # Adam keeps the tensors that it is given
        if self.size > 1:
            group = await asyncio.to_thread(join, channel, rank, torch.device("cpu"))
            self.critic.average = functools.partial(_average, group, self.size)

    def _heads(self) -> nn.Module:
        if self.config.encoder:
            return EncodedTwins(AutoModel.from_pretrained(self.config.encoder))
        return TwinHeads(self.width + 1, self.width + 1)  # each has one number beside e, see read_features

    async def fit(self, fresh: pa.Table) -> Metrics:
        """``critic.steps`` steps; metrics are means over them. The next rows are fetched while a step is made.

        Draws depend on the run's seed, the replica and the number of the step alone.
        """
        async with self.busy:
            return await self._fit(fresh)

    async def _fit(self, fresh: pa.Table) -> Metrics:
        if not self.critic.steps:
            rows = await self.shards.sample(_TYPICAL_ROWS, _DRAWS, self.rank)
            columns = [torch.tensor(rows[name].to_numpy()) for name in ("reward", "terminated")]
            features = [] if self.config.encoder else [self.read(rows, name) for name in ("state", "utterance")]
            await asyncio.to_thread(self.critic.start_from, *columns, *features)
        metrics = list[Metrics]()
        share = -(-self.config.batch_size // self.size)
        first = self.critic.steps
        coming = asyncio.create_task(self._draw(share, first))
        for step in range(first, first + self.config.steps):
            draw = await coming
            if step + 1 < first + self.config.steps:
                coming = asyncio.create_task(self._draw(share, step + 1))
            rng = np.random.default_rng((self.seed, self.rank, step))
            some = fresh.take(pa.array(rng.integers(0, len(fresh), share)))
            batch = await asyncio.to_thread(critic_batch, self.read, draw.rows, some, draw.weights)
            metrics.append(await asyncio.to_thread(self.critic.step, batch))
            if draw.places:
                await asyncio.wait([coming])  # or it would depend on time which priorities the next draw sees
                await self.shards.set_priorities(draw, await asyncio.to_thread(self.critic.td_errors, batch))
        if self.rank == 0:
            await asyncio.to_thread(self._save)
        means = {name: float(np.mean([one[name] for one in metrics])) for name in metrics[0]}
        return means | {"critic/steps": float(self.critic.steps)}

    async def _draw(self, count: int, step: int) -> Draw:
        place = (_DRAWS, self.rank, 1 + step)
        if self.config.priority_beta:
            return await self.shards.sample_prioritised(count, self.config.priority_beta, *place)
        return Draw(await self.shards.sample(count, *place))

    async def advantages(self, fresh: pa.Table) -> Array:
        """Of each fresh utterance; a replica may be asked about none."""
        return np.concatenate([np.zeros(0, np.float32), *await self._in_batches(self._advantages, fresh)])

    async def foretold(self, rows: pa.Table) -> Array:
        """Advantages of played utterances and V's errors after them, (2, rows)."""
        none = np.zeros((2, 0), np.float32)
        return np.concatenate([none, *await self._in_batches(self._foretold, rows)], axis=1)

    async def _in_batches(self, of: Callable[[pa.Table], Array], rows: pa.Table) -> list[Array]:
        size = self.config.batch_size
        return [await asyncio.to_thread(of, rows.slice(start, size)) for start in range(0, len(rows), size)]

    def _advantages(self, rows: pa.Table) -> Array:
        return self.critic.advantages(self.read(rows, "state"), self.read(rows, "utterance"))

    def _foretold(self, rows: pa.Table) -> Array:
        return np.stack(self.critic.foretold(critic_batch(self.read, rows, rows[:1])))  # nothing fresh is looked at

    async def judge(self) -> dict[str, Array]:
        return self.critic.judge()

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"critic-{self.critic.steps:09d}.pt"
        write_whole(file, lambda opened: torch.save(self.critic.state_dict(), opened))
        for old in self._files()[:-_SAVES]:
            old.unlink()


def _average(group: Any, size: int, gradients: torch.Tensor) -> None:
    try:
        group.allreduce(gradients).wait()
    except RuntimeError as error:
        raise ReplicaLostError(f"a critic replica is gone: {error}") from error
    gradients /= size


Ask = Callable[..., Awaitable[Any]]
"""(number of the replica, method, *arguments) -> what it returns; ReplicaLostError where that cannot come."""


class CriticReplicas:
    """All replicas as one critic.

    Args:
        ask: reaches them: Ray actors in a run, plain objects in a test.
    """

    def __init__(self, count: int, ask: Ask) -> None:
        self.count, self.ask = count, ask
        self.together, self.restarts = False, 0

    async def fit(self, fresh: pa.Table) -> Metrics:
        """Metrics are means over replicas; ``critic/restarts`` counts how often they were formed anew."""
        metrics = await self._all("fit", [(fresh,)] * self.count)
        means = {name: float(np.mean([one[name] for one in metrics])) for name in metrics[0]}
        return means | {"critic/restarts": float(self.restarts)}

    async def advantages(self, fresh: pa.Table) -> Array:
        return np.concatenate(await self._all("advantages", self._shares(fresh)))

    async def assess(self, rows: pa.Table) -> Metrics:
        """How well advantages foretell what rows brought that no step has seen yet.

        ``critic/foresight`` is the slope of V's temporal-difference errors over advantages: 1 where an advantage of 1
        is followed by an error of 1, 0 where it says nothing, below 0 where it misleads. Beside it their correlation.
        Both are 0 where all advantages are alike.
        """
        both = torch.from_numpy(await self.foretold(rows)).double()
        advantages, errors = centred(both)
        spreads, largest = both.std(1, correction=0), both.abs().amax(1)
        slope = over_spread((advantages * errors).mean() / spreads[0], spreads[0], largest[0])
        return {
            "critic/foresight": float(slope),
            "critic/foresight_correlation": float(over_spread(slope * spreads[0], spreads[1], largest[1])),
        }

    async def foretold(self, rows: pa.Table) -> Array:
        """Advantages of played utterances, and V's temporal-difference errors after them, (2, rows)."""
        return np.concatenate(await self._all("foretold", self._shares(rows)), axis=1)

    def _shares(self, rows: pa.Table) -> list[tuple[pa.Table]]:
        cuts = np.linspace(0, len(rows), self.count + 1).astype(int)
        return [(rows.slice(start, stop - start),) for start, stop in itertools.pairwise(cuts)]

    async def judge(self) -> dict[str, Array]:
        """The target heads' weights."""
        return (await self._all("judge", [()] * self.count))[0]

    async def mark(self) -> str:
        """The file that :meth:`go_back` needs; empty where nothing was fitted yet, or there is no critic."""
        return str(await self._patiently(self.ask, 0, "mark")) if self.count else ""

    async def go_back(self, file: str) -> None:
        """Be what the critic was when this file was saved; empty: what it is at first."""
        self.together = False
        if self.count:
            await self._patiently(self.ask, 0, "go_back", file)

    async def _all(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """What each replica makes of its arguments; after a loss once more, from the last save."""
        made: list[Any] = await self._patiently(self._once, method, arguments)
        return made

    @staticmethod
    async def _patiently(work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        patience = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ReplicaLostError),
            wait=tenacity.wait_exponential(max=10),
            stop=tenacity.stop_after_delay(600),  # seconds; a process starts within one minute, if slowly
            reraise=True,
        )
        return await patience(work, *args)

    async def _once(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        try:
            if not self.together:
                await self._join()
            return await self._gather((i, method, *given) for i, given in enumerate(arguments))
        except ReplicaLostError:
            self.restarts += self.together
            self.together = False
            raise

    async def _join(self) -> None:
        state = await self.ask(0, "saved")
        host, port = await self.ask(0, "address")
        channel = Channel(host, port, self.count)
        await self._gather((i, "join", channel, i, state) for i in range(self.count))
        self.together = True

    async def _gather(self, calls: Any) -> list[Any]:
        """All of them to their end; a lost replica counts before what it made the others fail with."""
        results = await asyncio.gather(*(self.ask(*call) for call in calls), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in sorted(errors, key=lambda error: not isinstance(error, ReplicaLostError)):
            raise error
        return results
