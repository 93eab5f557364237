"""The loop of a learner rank: batches in, weights out, checkpoints in between.

    next_batch(rank, v) ─> RLLearner.step ─> version v + 1 ─> publish(v + 1, policy buckets, metrics) ─┐
         ^                                                    checkpoint every rl.save_every versions  │
         └─────────────────────────────────────────────────────────────────────────────────────────────┘

It ends when there are no more batches, and writes ``output_dir/model``.
"""

import functools
import pickle
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cola_ray.algorithms.gradients import NonFiniteError
from cola_ray.batch import Batch
from cola_ray.learner.engine import last_checkpoint, save_checkpoint
from cola_ray.learner.policies import export, make_policy
from cola_ray.learner.rl import RLLearner
from cola_ray.runs.checkpoints import Checksums
from cola_ray.settings.config import Config
from cola_ray.weights import Bucket, Channel, Manifest

_SERVICES = "services.pkl"


class BatchSource(Protocol):
    """The controller's interface for the learner."""

    def begin(self, version: int, buckets: list[Bucket], state: Mapping[str, Any] | None) -> None:
        """Hand out batches from ``version`` on, which the learner holds: new, or from a checkpoint with ``state``."""
        ...

    def next_batch(self, rank: int, version: int) -> Batch | None:
        """Return this rank's share of the batch that trains version ``version``; None when the run is over."""
        ...

    def offer(self, version: int, manifest: Manifest) -> Channel:
        """Announce a broadcast; the caller sends over the returned channel, then publishes."""
        ...

    def learnt(self, version: int, of_sequences: np.ndarray) -> None:
        """Report one number per sequence of the step that made ``version``, in the order of collation.

        For an algorithm whose critic learns from these numbers; comes before :meth:`publish`.
        """
        ...

    def publish(self, version: int, buckets: list[Bucket], metrics: dict[str, float]) -> None:
        """Publish new weights; may return before workers hold them."""
        ...

    def checkpoint(self, rank: int, version: int) -> dict[str, Any] | None:
        """The checkpoint of ``version`` besides the learner's own state; the critic's part is a file.

        Every rank calls and waits until all workers hold ``version``; None on all ranks but the first.
        """
        ...

    def fail(self, reason: str) -> None:
        """Report that training cannot go on, and that a retry would not help."""
        ...


def train_loop(
    config: Config,
    model_path: str,
    source: BatchSource,
) -> None:
    """Train from the run's last checkpoint until the source has no more batches. Runs on every rank."""
    learner, output = RLLearner(config, make_policy(config, model_path)), Path(config.output_dir)
    is_first = learner.zero.rank == 0
    checkpoint = last_checkpoint(output)
    if checkpoint is not None:
        learner.load(checkpoint.folder)
    buckets = learner.buckets()
    if is_first:
        source.begin(learner.version, buckets, _services_of(checkpoint.folder) if checkpoint else None)
    torch.distributed.barrier()
    saved = learner.version
    metrics: dict[str, float] = {}
    while True:
        started = time.perf_counter()
        batch = source.next_batch(learner.zero.rank, learner.version)
        waited = time.perf_counter() - started
        if batch is not None:
            try:
                metrics = learner.step(batch) | {"time/wait": waited}
            except NonFiniteError as error:
                source.fail(f"step {learner.version}: {error}")
                raise
            started = time.perf_counter()
            channel = None
            if is_first and config.cluster.weight_transport == "nccl":
                channel = source.offer(learner.version, learner.manifest())
            buckets = learner.buckets(channel)
            metrics["time/gather"] = time.perf_counter() - started
            metrics["learner/zero_stage"] = float(learner.zero.zero_stage)
            if is_first and learner.of_sequences is not None:
                source.learnt(learner.version, learner.of_sequences)
            if is_first:
                source.publish(learner.version, buckets, metrics)
        if learner.version > saved and (batch is None or learner.version % config.rl.save_every == 0):
            save_checkpoint(output, learner.version, functools.partial(_save, learner, source), source.fail)
            saved = learner.version
        if batch is None:
            break
    tensors = learner.zero.collect(learner.policy.published())
    if is_first:
        beta = config.rl.kl_coef if config.rl.actor_free else 0.0
        export(model_path, tensors, output / "model", beta)


def _save(learner: RLLearner, source: BatchSource, folder: Path) -> Checksums:
    """Save the learner's part of a checkpoint, and the state of controller, replay and critic at its version."""
    state = source.checkpoint(learner.zero.rank, learner.version)  # may take longer than ranks wait for each other
    learner.save(folder)
    if state is None:
        return {}
    if state.get("critic"):
        state["critic"] = shutil.copy(state["critic"], folder)
    (folder / _SERVICES).write_bytes(pickle.dumps(state))
    rows = enumerate(shard["files"] for shard in state["shards"])
    return {f"replay/{shard}/{name}": what for shard, files in rows for name, what in files.items()}


def _services_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = pickle.loads((folder / _SERVICES).read_bytes())
    if state.get("critic"):
        state["critic"] = str(folder / Path(state["critic"]).name)
    return state
