"""Actors on a Ray cluster: where they are placed, how they are called, and what happens when they die.

    cluster(config)       attach to an existing cluster, or start one on this machine
    controller(...)       the run's loop, or a study's evaluator, which owns
    RayWorkers                rollout workers, spawned again when they die
    replay(config)        ReplayShard actors      ┐
    critic(config)        CriticService actors    ├ restarted by Ray, and continuing from their last save
    reward_model(config)  a RewardModel actor     ┘

The only file that uses ``ray.remote``. Classes that are called through it know nothing about Ray: each Remote class
implements the interface that its callers expect, and maps Ray's errors to theirs.
"""

import asyncio
import contextlib
import functools
import logging
import math
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from ray.util.metrics import Gauge

from cola_ray import registry
from cola_ray.batch import Batch, Group, Held, together
from cola_ray.cluster import head, watch
from cola_ray.experience import Ticket
from cola_ray.loop.workers import WorkerLostError, WorkerNeverRanError
from cola_ray.replay.critic_service import CriticReplicas, CriticService, ReplicaLostError
from cola_ray.replay.service import ReplayShard, Shards
from cola_ray.rollout.reward_model import RewardEndpoint, RewardFunction, RewardModel
from cola_ray.rollout.worker import EngineWorker, RolloutWorker
from cola_ray.runs.display import current
from cola_ray.runs.explanations import last_error
from cola_ray.runs.tracking import peak_memory_gb
from cola_ray.settings.config import Config, ConfigError, is_endpoint, named
from cola_ray.tasks.chat import Prompt
from cola_ray.weights import Bucket, Channel, Manifest, meeting_point


@contextlib.contextmanager
def cluster(config: Config, runs: int = 1) -> Iterator[None]:
    """Attach to an existing cluster, or start one on this machine and stop it afterwards.

    Args:
        runs: number of runs that the cluster has to hold at the same time.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    environment: dict[str, Any] = {"env_vars": _worker_environment(config)}
    if files := registry.files([*(name for _, name in named(config)), *map(str, config.sweep.values)]):
        environment["py_modules"] = files  # Ray does not accept an empty list
    there = address(config)
    current().doing(f"attaching to the Ray cluster at {there}" if there else "starting Ray")
    logging.getLogger("ray").setLevel(logging.WARNING)
    # Ray warns that token authentication, its default, is on; a cluster of this process alone needs no such warning.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    with contextlib.ExitStack() as stack:
        if there:
            # A job may have been submitted with its own variables, e.g. the number of threads: ours win, others stay.
            os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
            try:
                stack.enter_context(head.attached(there, runtime_env=environment, **quiet))
            except ConnectionError as error:
                said = str(error).splitlines()[0]
                raise ConfigError(
                    f"cluster.address = {there!r}: {said}; start the cluster, or mend the address"
                ) from None
        else:
            # Ray Train's helper that checks whether a cloud preempts nodes; nobody preempts this machine.
            environment["env_vars"]["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
            # Logical CPUs, so that every actor can be placed; threads are limited per process instead.
            needed = runs * (math.ceil(demand(config)["CPU"]) + 1)  # one more for work outside of actors, see alone()
            cpus = max(needed, os.cpu_count() or 1)
            stack.enter_context(head.started(environment, num_cpus=cpus, include_dashboard=False, **quiet))
        try:
            yield
        finally:
            current().doing("stopping Ray" if not there else "leaving the Ray cluster")
            watch.end()


# --- places -------------------------------------------------------------------------------------------------------

Part = Literal["learner", "rollout", "service"]


def booking(config: Config, part: Part) -> dict[str, float]:
    """Resources that one process of a part (a learner rank, an engine, a service) reserves on its node."""
    gpus = 0.0
    if config.cluster.use_gpu and part != "service":
        gpus = float(config.rollout.tensor_parallel_size if part == "rollout" else 1)
    group = getattr(config.cluster, f"{part}_group")
    return {"CPU": 1.0} | ({"GPU": gpus} if gpus else {}) | ({group: 0.001} if group else {})


def demand(config: Config) -> dict[str, float]:
    """Resources that a run reserves on a cluster."""
    has_model = bool(config.task.reward_model) and not is_endpoint(config.task.reward_model)
    counts: dict[Part, int] = {
        "learner": config.cluster.learner_ranks,
        "rollout": config.rollout.num_workers,
        "service": config.critic.replicas * config.algorithm.critic + has_model,
    }
    of_critics = config.critic.gpu_share * config.critic.replicas * config.algorithm.critic
    total = {"CPU": 0.0, "GPU": of_critics + float(has_model and config.cluster.use_gpu)}
    for part, count in counts.items():
        for name, amount in booking(config, part).items():
            total[name] = total.get(name, 0.0) + count * amount
    return total


def _placed(config: Config, part: Part, **more: Any) -> dict[str, Any]:
    """Ray options for an actor of a part, on the nodes of its group."""
    booked = booking(config, part) | more
    return {
        "num_cpus": booked.pop("CPU", 0.0),
        "num_gpus": booked.pop("GPU", 0.0),
        "resources": booked,
        # Set explicitly; otherwise actors would go into the placement group that Ray Tune keeps for a trial's driver.
        "scheduling_strategy": "DEFAULT",
    }


def exporter(config: Config) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that exports a step's metrics to Ray's dashboard and Prometheus.

    There a metric is named like ``ray_cola_ray_reward_mean``.

    On a cluster that the run itself started, which nobody watches, it does nothing.
    """
    if not address(config):
        return lambda _: None
    gauges: dict[str, Gauge] = {}
    run = Path(config.output_dir).name

    def show(metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, Real):
                if name not in gauges:
                    title = "cola_ray_" + re.sub(r"\W", "_", name)
                    gauges[name] = Gauge(title, description=name, tag_keys=("run",))
                gauges[name].set(float(value), tags={"run": run})

    return show


def address(config: Config) -> str:
    """Address of the cluster to attach to; empty if the run starts its own."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS", "")


def _worker_environment(config: Config) -> dict[str, str]:
    variables = {
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(config.cluster.answer_timeout_s),
    }
    if not config.cluster.use_gpu:
        variables |= {"OMP_NUM_THREADS": str(config.cluster.threads_per_process), "DS_ACCELERATOR": "cpu"}
    return variables


# --- controller and workers ---------------------------------------------------------------------------------------


def controller(make: type, config: Config, *args: Any) -> Any:
    """Create an actor ``make(config, *args)`` of this class; actors that it spawns die with it."""
    placed = _placed(config, "service", CPU=0.0)
    made = ray.remote(make).options(**placed, max_concurrency=256).remote(config, *args)
    watch.begin(made, config.cluster.answer_timeout_s)
    return made


class RayWorkers:
    """The controller's :class:`~cola_ray.loop.workers.WorkerPool`: actors, owned by the controller's process."""

    def __init__(self, config: Config, model_path: str, worker: type[EngineWorker] = RolloutWorker, *more: Any) -> None:
        # More than all calls in flight at once, so that an update never waits behind them.
        most = 256 + (config.rl.max_staleness + 1) * config.rl.prompts_per_step if config.rl.window else 256
        self.actor = ray.remote(worker).options(**_placed(config, "rollout"), max_concurrency=most)
        self.args = (config, model_path, *more)

    def spawn(self) -> Any:
        worker = self.actor.remote(*self.args)
        watch.begin(worker, self.args[0].cluster.answer_timeout_s)
        return worker

    async def call(self, worker: Any, method: str, *args: Any) -> Any:
        ask = functools.partial(self._groups, worker) if method == "generate_groups" else getattr(worker, method).remote
        try:
            return await _answer(ask, args, "a rollout worker", WorkerLostError)
        except WorkerLostError as lost:
            # Until Ray's health checks notice a lost machine, a replacement may be placed on it and be lost, too.
            if "The actor never ran" in str(lost.__cause__):
                raise WorkerNeverRanError(str(lost)) from lost
            raise

    async def _groups(self, worker: Any, tickets: Sequence[Ticket]) -> list[Group]:
        """Groups whose tokens stay in the object store, for the ranks to fetch by reference.

        An actor's result is owned by the caller, so it stays in the store of the worker's machine when the worker dies.
        It is also mapped here, without being read, which makes a copy on this machine in case the other one dies.
        """
        rl = self.args[0].rl
        states = len(tickets) * rl.group_size if rl.cache_hidden_states else 0
        groups, *parts = worker.generate_in_parts.options(num_returns=2 + states).remote(tickets)
        made = await groups
        values = await asyncio.gather(*parts)
        return together(made, [Held(*pair) for pair in zip(values, parts, strict=True)])

    def kill(self, worker: Any) -> None:
        ray.kill(worker)


async def _answer(ask: Callable[..., Awaitable[Any]], args: Sequence[Any], who: str, lost: type[Exception]) -> Any:
    """Return or raise what an actor does; ``lost`` if it died or its answer was lost; RuntimeError if it never ran."""
    try:
        return await ask(*args)
    except ray.exceptions.ObjectLostError as error:  # the result was lost with its machine before it was fetched
        raise lost(str(error).splitlines()[0]) from error
    except ray.exceptions.RayActorError as error:
        lines = str(error).strip().splitlines()
        if "creation task" in lines[0]:  # a replacement or a restart would fail in the same way
            raise RuntimeError(f"{who} could not start: {last_error(str(error))}") from None
        raise lost(lines[0]) from error
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None


class RemoteController:
    """The learner's :class:`~cola_ray.learner.train_loop.BatchSource` over the controller actor."""

    def __init__(self, controller: Any) -> None:
        self.controller = controller

    def begin(self, version: int, buckets: list[Bucket], state: Mapping[str, Any] | None) -> None:
        # The controller passes references on without reading them; each worker maps the payload from its node's store.
        ray.get(self.controller.begin.remote(version, [ray.put(bucket) for bucket in buckets], state))

    def next_batch(self, rank: int, version: int) -> Batch | None:
        batch = ray.get(self.controller.next_batch.remote(rank, version))
        return None if batch is None else batch.fetched(ray.get)

    def offer(self, version: int, manifest: Manifest) -> Channel:
        return ray.get(self.controller.offer.remote(version, manifest, *meeting_point()))

    def learnt(self, version: int, of_sequences: np.ndarray) -> None:
        ray.get(self.controller.learnt.remote(version, of_sequences))

    def publish(self, version: int, buckets: list[Bucket], metrics: dict[str, float]) -> None:
        metrics["memory/learner_gb"] = peak_memory_gb()
        ray.get(self.controller.publish.remote(version, [ray.put(bucket) for bucket in buckets], metrics))

    def checkpoint(self, rank: int, version: int) -> dict[str, Any] | None:
        return ray.get(self.controller.checkpoint.remote(rank, version))

    def fail(self, reason: str) -> None:
        ray.get(self.controller.fail.remote(reason))


def alone(config: Config, work: Callable[..., Any], *args: Any) -> Any:
    """Run ``work(*args)`` in its own process, with a GPU if the run uses GPUs; returns a reference to the result."""
    return ray.remote(work).options(num_cpus=1, num_gpus=int(config.cluster.use_gpu), max_retries=0).remote(*args)


# --- services -----------------------------------------------------------------------------------------------------

_LASTING = {"max_restarts": -1, "max_concurrency": 16}
"""Ray restarts such an actor when it dies, and it continues from its last save."""


def _watch_all(lasting: Sequence[Any], config: Config) -> None:
    for actor in lasting:
        watch.begin(actor, config.cluster.answer_timeout_s, restarts=True)


def replay(config: Config) -> Shards:
    """The replay service; without shards if nothing learns from it."""
    output, settings = Path(config.output_dir), config.replay
    shard = ray.remote(ReplayShard).options(**_placed(config, "service", CPU=0.0), max_task_retries=-1, **_LASTING)
    rows, nbytes = settings.max_rows // settings.shards, (settings.max_mb << 20) // settings.shards
    shards = [
        shard.remote(rows, nbytes, str(output / "replay" / str(i)), settings.snapshot_every_s)
        for i in range(settings.shards if config.replays else 0)
    ]
    _watch_all(shards, config)
    return Shards(len(shards), RemoteShards(shards), config.seed)


def critic(config: Config, model_path: str, stored: Shards) -> CriticReplicas:
    """The utterance critic; without replicas if the algorithm uses none."""
    from transformers import AutoConfig

    width, folder = AutoConfig.from_pretrained(model_path).hidden_size, str(Path(config.output_dir) / "critic")
    share = config.critic.gpu_share
    placed = _placed(config, "service", **({"GPU": share} if share else {}))
    actor = ray.remote(CriticService).options(**placed, **_LASTING)
    replicas = [
        actor.remote(config.critic, width, model_path, stored, folder, config.seed)
        for _ in range(config.critic.replicas if config.algorithm.critic else 0)
    ]
    _watch_all(replicas, config)
    return CriticReplicas(len(replicas), RemoteReplicas(replicas))


class RemoteShards:
    """How :class:`~cola_ray.replay.service.Shards` calls its actors."""

    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors

    async def __call__(self, shard: int, method: str, *args: Any) -> Any:
        return await getattr(self.actors[shard], method).remote(*args)


class RemoteReplicas:
    """How :class:`~cola_ray.replay.critic_service.CriticReplicas` calls its actors, which Ray restarts."""

    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors

    async def __call__(self, replica: int, method: str, *args: Any) -> Any:
        return await _answer(getattr(self.actors[replica], method).remote, args, "a critic", ReplicaLostError)


def reward_model(config: Config) -> RewardFunction | None:
    """What scores responses instead of a verifier: an endpoint, or a reward model on its own actor."""
    where = config.task.reward_model
    if not where:
        return None
    if is_endpoint(where):
        return RewardEndpoint(where, config.task.reward_timeout_s)
    rollout = config.rollout
    placed = _placed(config, "service", GPU=float(config.cluster.use_gpu))
    actor = ray.remote(RewardModel).options(**placed, max_restarts=-1, max_task_retries=-1)
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    return RemoteRewardModel(actor.remote(where, longest, config.data.date))


class RemoteRewardModel:
    """A :data:`~cola_ray.rollout.reward_model.RewardFunction` that calls its actor, which Ray restarts."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        rewards: list[float] = await self.actor.score.remote(list(prompts), list(responses))
        return rewards
