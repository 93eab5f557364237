"""The critic as a service: data-parallel replicas, saved after every fit and re-formed when one of them dies.

CriticReplicas.fit(fresh) ──> each replica: its share of a batch from replay ─> gradient ─┐
     │  ^                                        all-reduce, so all take the same step <──┘
     │  └── if a replica dies, the step fails on the others at once; Ray restarts it,
     v      all load the state that replica 0 saved last, and the fit is repeated
CriticReplicas.advantages(fresh) ──> each replica computes a share
CriticReplicas.assess(new rows)  ──> likewise, before the rows enter replay: do advantages predict what followed?
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

from cola_ray.algorithms.advantages import centred, over_spread
from cola_ray.algorithms.archer import TwinHeads
from cola_ray.replay.critic import Critic, TextTwinHeads
from cola_ray.replay.service import Draw, Shards
from cola_ray.replay.transitions import Reader, TextReader, critic_batch, read_features
from cola_ray.runs.checkpoints import write_atomically
from cola_ray.settings.config import CriticConfig
from cola_ray.weights import Channel, join, meeting_point

Array = np.ndarray
Metrics = dict[str, float]
_INITIAL_ROWS = 4096  # sampled to initialise the critic: enough to estimate how often a turn ends an episode
_SAVES = 3
"""Number of saved states to keep: a checkpoint copies one of them while the next fit runs."""
_DRAWS = 1
"""First number in the place of every draw by a critic; the places of draws by the controller start with 0."""


class ReplicaLostError(RuntimeError):
    """The process of this replica, or of another one in its group, died."""


class CriticService:
    """One replica: a plain class, which the driver makes an actor.

    Args:
        config: the settings under ``critic``.
        width: of the base's features; unused with ``config.encoder``.
        model_path: the model whose token ids are in replay.
        shards: the replay service.
        folder: where replica 0 saves its state after each fit, as ``critic-<steps>.pt``.
        seed: of the run.
    """

    def __init__(
        self, config: CriticConfig, width: int, model_path: str, shards: Shards, folder: str, seed: int
    ) -> None:
        self.config, self.width, self.shards, self.seed = config, width, shards, seed
        self.folder, self.busy = Path(folder), asyncio.Lock()
        self.read: Reader = TextReader(config.encoder, model_path) if config.encoder else read_features
        self.rank, self.size = 0, 1
        self.device = torch.device("cuda" if config.gpu_share else "cpu")

    async def saved_state(self) -> Mapping[str, Any] | None:
        """The state saved by the last fit; None if there is none."""
        files = self._files()
        return torch.load(files[-1], map_location="cpu", weights_only=True) if files else None

    async def checkpoint(self) -> str:
        """Path of the state saved by the last fit; empty if there is none."""
        async with self.busy:
            return str(self._files()[-1]) if self._files() else ""

    async def restore(self, file: str) -> None:
        """Make the next :meth:`join` start from a saved state, or from a new critic if ``file`` is empty."""
        async with self.busy:
            for old in self._files():
                if not file or old.resolve() != Path(file).resolve():
                    old.unlink()
            if file:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / Path(file).name, lambda to: to.write(Path(file).read_bytes()))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("critic-*.pt"))

    async def address(self) -> tuple[str, int]:
        """Host and port at which the other replicas can reach this one."""
        return meeting_point()

    async def join(self, channel: Channel, rank: int, state: Mapping[str, Any] | None) -> None:
        """Form a process group with the other replicas, and load ``state``; returns when all have joined."""
        self.rank, self.size = rank, channel.world_size
        config = self.config
        torch.manual_seed(self.seed)
        self.critic = Critic(
            self._heads().to(self.device),  # their initial weights are the same on every device
            gamma=config.gamma, tau=config.tau, lr=config.lr, grad_clip=config.grad_clip, expectile=config.expectile,
        )  # fmt: skip
        if state is not None:
            self.critic.load_state_dict(copy.deepcopy(dict(state)))  # Adam keeps references to the tensors it is given
        if self.size > 1:
            # gloo also works for several replicas on one GPU; gradients are some megabytes.
            group = await asyncio.to_thread(join, channel, rank, torch.device("cpu"))
            self.critic.average = functools.partial(_average, group, self.size)

    def _heads(self) -> nn.Module:
        if self.config.encoder:
            from transformers import AutoModel

            return TextTwinHeads(AutoModel.from_pretrained(self.config.encoder))
        return TwinHeads(self.width + 1, self.width + 1)  # one number beside e, see read_features

    async def fit(self, fresh: pa.Table) -> Metrics:
        """Take ``critic.steps`` steps and return the means of their metrics; rows are fetched one step ahead.

        Draws depend only on the run's seed, the replica's rank and the number of the step.

        Args:
            fresh: rows of :func:`fresh_rows` or :func:`with_soft_advantages`, from which each step samples.
        """
        async with self.busy:
            return await self._fit(fresh)

    async def _fit(self, fresh: pa.Table) -> Metrics:
        if not self.critic.steps:
            rows = await self.shards.sample(_INITIAL_ROWS, _DRAWS, self.rank)
            columns = [torch.tensor(rows[name].to_numpy()) for name in ("reward", "terminated")]
            features = [] if self.config.encoder else [self.read(rows, name) for name in ("state", "utterance")]
            await asyncio.to_thread(self.critic.initialise, *columns, *features)
        metrics = list[Metrics]()
        share = -(-self.config.batch_size // self.size)
        first = self.critic.steps
        next_draw = asyncio.create_task(self._draw(share, first))
        for step in range(first, first + self.config.steps):
            draw = await next_draw
            if step + 1 < first + self.config.steps:
                next_draw = asyncio.create_task(self._draw(share, step + 1))
            rng = np.random.default_rng((self.seed, self.rank, step))
            some = fresh.take(pa.array(rng.integers(0, len(fresh), share)))
            batch = await asyncio.to_thread(critic_batch, self.read, draw.rows, some, draw.weights)
            metrics.append(await asyncio.to_thread(self.critic.step, batch))
            if draw.places:
                await asyncio.wait([next_draw])  # otherwise timing would decide which priorities the next draw sees
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
        """(rows,) advantages of fresh utterances; ``fresh`` may be empty."""
        return np.concatenate([np.zeros(0, np.float32), *await self._in_batches(self._advantages, fresh)])

    async def advantages_and_td_errors(self, rows: pa.Table) -> Array:
        """Advantages of played utterances and V's temporal-difference errors of the same turns, (2, rows)."""
        none = np.zeros((2, 0), np.float32)
        return np.concatenate([none, *await self._in_batches(self._advantages_and_td_errors, rows)], axis=1)

    async def _in_batches(self, compute: Callable[[pa.Table], Array], rows: pa.Table) -> list[Array]:
        size = self.config.batch_size
        return [await asyncio.to_thread(compute, rows.slice(start, size)) for start in range(0, len(rows), size)]

    def _advantages(self, rows: pa.Table) -> Array:
        return self.critic.advantages(self.read(rows, "state"), self.read(rows, "utterance"))

    def _advantages_and_td_errors(self, rows: pa.Table) -> Array:
        batch = critic_batch(self.read, rows, fresh=rows[:1])  # the fresh part is not used
        return np.stack(self.critic.advantages_and_td_errors(batch))

    async def target_weights(self) -> dict[str, Array]:
        return self.critic.target_weights()

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"critic-{self.critic.steps:09d}.pt"
        write_atomically(file, lambda opened: torch.save(self.critic.state_dict(), opened))
        for old in self._files()[:-_SAVES]:
            old.unlink()


def _average(group: Any, size: int, gradients: torch.Tensor) -> None:
    on_host = gradients.cpu()  # no copy if it is already there
    try:
        group.allreduce(on_host).wait()
    except RuntimeError as error:
        raise ReplicaLostError(f"a critic replica is gone: {error}") from error
    gradients.copy_(on_host).div_(size)


Ask = Callable[..., Awaitable[Any]]
"""``await ask(replica, method, *arguments)``: the method's result; ReplicaLostError if the replica died."""


class CriticReplicas:
    """Client of all replicas, as of one critic.

    Args:
        count: number of replicas; 0 for algorithms without a critic.
        ask: calls a replica: a Ray actor in a run, a plain object in a test.
    """

    def __init__(self, count: int, ask: Ask) -> None:
        self.count, self.ask = count, ask
        self.joined, self.restarts = False, 0

    async def fit(self, fresh: pa.Table) -> Metrics:
        """Fit the critic; returns means over replicas, and in ``critic/restarts`` how often they were re-formed."""
        metrics = await self._all("fit", [(fresh,)] * self.count)
        means = {name: float(np.mean([one[name] for one in metrics])) for name in metrics[0]}
        return means | {"critic/restarts": float(self.restarts)}

    async def advantages(self, fresh: pa.Table) -> Array:
        return np.concatenate(await self._all("advantages", self._shares(fresh)))

    async def assess(self, rows: pa.Table) -> Metrics:
        """How well advantages predict what followed, on rows that no step has trained on yet.

        ``critic/foresight`` is the slope of the regression of V's temporal-difference errors on advantages: 1 if an
        advantage of 1 is followed by an error of 1 on average, 0 if advantages say nothing, negative if they mislead.
        ``critic/foresight_correlation`` is their correlation. Both are 0 if all advantages are equal.
        """
        both = torch.from_numpy(await self.advantages_and_td_errors(rows)).double()
        advantages, errors = centred(both)
        deviations, largest = both.std(1, correction=0), both.abs().amax(1)
        slope = over_spread((advantages * errors).mean() / deviations[0], deviations[0], largest[0])
        return {
            "critic/foresight": float(slope),
            "critic/foresight_correlation": float(over_spread(slope * deviations[0], deviations[1], largest[1])),
        }

    async def advantages_and_td_errors(self, rows: pa.Table) -> Array:
        """Advantages of played utterances and V's temporal-difference errors of the same turns, (2, rows)."""
        return np.concatenate(await self._all("advantages_and_td_errors", self._shares(rows)), axis=1)

    def _shares(self, rows: pa.Table) -> list[tuple[pa.Table]]:
        cuts = np.linspace(0, len(rows), self.count + 1).astype(int)
        return [(rows.slice(start, stop - start),) for start, stop in itertools.pairwise(cuts)]

    async def target_weights(self) -> dict[str, Array]:
        """The target heads' weights by name."""
        return (await self._all("target_weights", [()] * self.count))[0]

    async def checkpoint(self) -> str:
        """The file that :meth:`restore` needs; empty if nothing was fitted yet or there is no critic."""
        return str(await self._with_retries(self.ask, 0, "checkpoint")) if self.count else ""

    async def restore(self, file: str) -> None:
        """Return to the state saved in ``file``, or to a new critic if it is empty."""
        self.joined = False
        if self.count:
            await self._with_retries(self.ask, 0, "restore", file)

    async def _all(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method on each replica; after a loss, re-form the replicas from the last save and call again."""
        results: list[Any] = await self._with_retries(self._attempt, method, arguments)
        return results

    @staticmethod
    async def _with_retries(work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        retry = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ReplicaLostError),
            wait=tenacity.wait_exponential(max=10),
            stop=tenacity.stop_after_delay(600),  # seconds; even a slow process starts within a minute
            reraise=True,
        )
        return await retry(work, *args)

    async def _attempt(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        try:
            if not self.joined:
                await self._join()
            return await self._gather((i, method, *given) for i, given in enumerate(arguments))
        except ReplicaLostError:
            self.restarts += self.joined
            self.joined = False
            raise

    async def _join(self) -> None:
        state = await self.ask(0, "saved_state")
        host, port = await self.ask(0, "address")
        channel = Channel(host, port, self.count)
        await self._gather((i, "join", channel, i, state) for i in range(self.count))
        self.joined = True

    async def _gather(self, calls: Any) -> list[Any]:
        """Wait for all calls; raise a ReplicaLostError in preference to errors that the loss caused on others."""
        results = await asyncio.gather(*(self.ask(*call) for call in calls), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in sorted(errors, key=lambda error: not isinstance(error, ReplicaLostError)):
            raise error
        return results
