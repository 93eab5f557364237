"""Supervised training: the loop that pre-training's stages, reward models and logged Q share.

    stage.step(number, lr) ─> metrics ─> report ──stop?──> checkpoint, then end
          ^                                └─ checkpoint every pretrain.save_every steps
          └──────────────────────────────────────────────────────────────────┘

A stage has its own model, data and loss. A step's rows are a pure function of (seed, step), so a resumed run needs no
cursor; learning rates are a pure function of the step.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from cola_ray.algorithms.schedules import lr_factor
from cola_ray.learner import sums
from cola_ray.learner.engine import Report, ZeroEngine, save_checkpoint
from cola_ray.settings.config import Config


class Stage(Protocol):
    """A model, its data and its training step; every rank holds one."""

    peak_lr: float
    measure_every: int  # steps between measurements on held-out data; the last step is always measured

    @property
    def name(self) -> str:
        """The prefix of its metrics, and its key in ``pretrain.steps``."""
        ...

    def step(self, number: int, lr: float) -> dict[str, Any]:
        """Train on one batch; returns metrics over all ranks. All ranks call, as for all methods."""
        ...

    def measure(self) -> dict[str, Any]:
        """Metrics on held-out data, empty if there is none."""
        ...

    def save(self, folder: Path, step: int) -> None:
        """Save this rank's part of a checkpoint, after which step ``step`` comes next."""
        ...


def train(
    config: Config, stage: Stage, report: Report, *, first_step: int = 0, steps_before: int = 0
) -> tuple[bool, dict[str, Any]]:
    """Train a stage to its end, or until ``report`` says stop, which leaves a checkpoint. A collective.

    Args:
        report: receives every step's metrics; returns whether to stop.
        first_step: the checkpoint's, if training continues from one.
        steps_before: of the run's earlier stages; checkpoints are counted over all stages.

    Returns:
        whether the stage reached its end, and the metrics of its last step.
    """
    settings, total = config.pretrain, config.pretrain.num_steps(stage.name)
    metrics: dict[str, Any] = {}
    for step in range(first_step, total):
        started, last = time.perf_counter(), step + 1 == total
        warmup = min(settings.warmup_steps, total)
        lr = stage.peak_lr * lr_factor("cosine", step, total, warmup, settings.min_lr_ratio)
        metrics = stage.step(step, lr) | {"stage": stage.name, "step": step + 1, "steps": total}
        metrics |= {f"{stage.name}/lr": lr, "time/step": time.perf_counter() - started}
        if (step + 1) % stage.measure_every == 0 or last:
            metrics |= stage.measure()
        due = (step + 1) % settings.save_every == 0 and not last
        stop = bool(report(metrics, due)) and not last
        if due or stop:
            save = functools.partial(stage.save, step=step + 1)
            save_checkpoint(Path(config.output_dir), steps_before + step + 1, save, report.fail)
        if stop:
            return False, metrics
    return True, metrics


def drawn(config: Config, step: int, count: int) -> np.ndarray:
    """Which of ``count`` examples a step trains on: ``pretrain.batch_size`` of them, without repetition if possible."""
    size = config.pretrain.batch_size
    return np.random.default_rng((config.seed, step)).choice(count, size, replace=count < size)


T = TypeVar("T")


def zero_step(
    zero: ZeroEngine, batches: Sequence[T], loss_of: Callable[[int, T], tuple[Tensor, dict[str, Tensor]]],
    denominator: int, lr: float,
) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """One optimizer step on this rank's micro-batches; all ranks have the same number of them.

    Args:
        loss_of: from a micro-batch's number and the micro-batch to its loss sum and metric sums.
        denominator: of the loss, over all ranks.

    Returns:
        metric sums over all ranks, and the gradient's norm before clipping.

    Raises:
        NonFiniteError: on every rank; the weights are unchanged.
    """
    found: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        loss, metrics = loss_of(index, batch)
        zero.backward(loss / denominator, last=index == len(batches) - 1)
        sums.add(found, metrics)
    grad_norm = zero.step(lr)
    for value in found.values():
        torch.distributed.all_reduce(value)
    return found, grad_norm


def micro_batches(mine: Any, config: Config) -> list[Any]:
    """A rank's examples, in anything that can be sliced, ``pretrain.micro_batch_size`` at a time."""
    size = config.pretrain.micro_batch_size
    return [mine[start : start + size] for start in range(0, len(mine), size)]
