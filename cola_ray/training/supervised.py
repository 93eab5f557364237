"""Supervised training under Ray Train: pre-training stages, reward models, Q from logged answers.

    driver: pretrain(config) ──> ranks: learner/pretrain.py, reward_model.py or logged_q.py ──> output_dir/model
       ^                                │ metrics, phases, lines
       └──────────── mailbox <──────────┘            stops ──> the ranks, after the step under way

All functions return the summary that they write to ``output_dir/summary.json``; all runs can be stopped and resumed.
"""

import functools
import importlib
import itertools
import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from ray.util.queue import Queue

from cola_ray.checks.refusals import check
from cola_ray.cluster import actors
from cola_ray.runs import launch, provenance, resume
from cola_ray.runs.display import current, shown
from cola_ray.runs.failure import explained_failures
from cola_ray.runs.figures import plot, print_summary
from cola_ray.runs.tracking import Tracker, peak_memory_gb
from cola_ray.settings.config import Config, RunFailedError, override
from cola_ray.settings.training import Q_STAGE, REWARD_STAGE
from cola_ray.training.ranks import ANSWER_S, enter_rank, fit_ranks
from cola_ray.training.tracked_run import tracked


@shown()
@explained_failures()
def pretrain(config: Config) -> dict[str, Any]:
    """Run the stages of ``config.pretrain``; writes ``output_dir/model``. Returns the summary.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: a stage failed more often than ``cluster.max_failures``; the message is the last cause.
    """
    check(config, "pretrain")
    return _supervised(config, "pretrain", config.pretrain.stages, "pretrain", "latent pre-training")


@shown()
@explained_failures()
def train_reward_model(config: Config) -> dict[str, Any]:
    """Train a reward model on the preference pairs at ``task.path``, from ``model.base``; else like ``pretrain``."""
    check(config, "reward_model")
    return _supervised(config, "reward_model", (REWARD_STAGE,), "reward_model", "reward model")


@shown()
@explained_failures()
def train_q(config: Config) -> dict[str, Any]:
    """Train MCTS-Q's action values on answers at ``data.path`` that evaluate logged; else like ``pretrain``."""
    check(config, "train_q")
    return _supervised(config, "train_q", (Q_STAGE,), "logged_q", "Q of latent actions")


def _supervised(config: Config, job: str, stages: Sequence[str], module: str, about: str) -> dict[str, Any]:
    """Run supervised stages with a module of ``learner``: progress, metrics, a summary, a plot of losses."""
    begun = launch.begin(config, job)
    config, output, display = begun.config, begun.folder.path, current()
    if begun.start is not None:
        config = override(config, {"model.path": str(begun.start)})
    lengths = [config.pretrain.num_steps(stage) for stage in stages]

    def draw(tracker: Tracker) -> None:
        losses = {f"{stage} loss": tracker.series(f"{stage}/loss") for stage in stages}
        if tracker.step:
            plot(output / "losses.png", about, losses, {})

    summarise = functools.partial(_supervised_summary, config, stages)
    with begun.folder.failing():
        resume.check_inputs(config, begun.start)
    with begun.folder.failing(), actors.cluster(config), tracked(begun, summarise, draw) as tracker:
        mailbox, stops = (Queue(actor_options={"num_cpus": 0}) for _ in range(2))
        first_step = {stage: sum(lengths[:index]) for index, stage in enumerate(stages)}

        def show(event: dict[str, Any]) -> None:
            if "failed" in event:
                raise RunFailedError(event["failed"])
            if "doing" in event:
                display.doing(f"{job}: {event['doing']}")
                return
            if "say" in event:
                display.say(event["say"])
                return
            metrics = event["metrics"]
            stage, step, total = metrics["stage"], metrics["step"], metrics["steps"]
            tracker.log(first_step[stage] + step, metrics)
            shown = {k: metrics[f"{stage}/{k}"] for k in ("loss", "base_loss", "accuracy") if f"{stage}/{k}" in metrics}
            note = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
            display.update(f"{job}: {stage}", step, total, note, milestone=step % 100 == 0 or step == total)

        patience = itertools.chain([None], itertools.repeat(ANSWER_S))  # for the first answer a process must start

        def poll(last: bool = False) -> None:
            waiting = ray.get(mailbox.actor.qsize.remote(), timeout=next(patience))
            for event in ray.get(mailbox.actor.get_nowait_batch.remote(waiting), timeout=ANSWER_S):
                show(event)

        def stop() -> None:
            stops.put(True)
            display.say("stopping after this step; once more to stop at once")

        ranks = config.cluster.learner_ranks
        display.doing(f"{job}: starting {ranks} learner rank{'s' if ranks > 1 else ''}")
        loop = {"config": config.model_dump(), "mailbox": mailbox, "stops": stops,
                "module": f"cola_ray.learner.{module}"}  # fmt: skip
        try:
            fit_ranks(config, _supervised_rank, loop, poll, stop)
        finally:
            if (output / "model" / "config.json").exists():
                provenance.write(output / "model", config, job)
        display.doing(f"{job}: writing the summary")
        for queue in (mailbox, stops):
            queue.shutdown(force=True)
    print_summary(f"{about}, {config.preset}: {output / 'model'}", tracker.summary)
    return tracker.summary


def _supervised_rank(loop: dict[str, Any]) -> None:
    config = enter_rank(loop)
    learner = importlib.import_module(loop["module"])
    device = "cuda" if config.cluster.use_gpu else "cpu"
    learner.train_loop(config, _Mailbox(loop["mailbox"], loop["stops"], device))


class _Mailbox:
    """Sends a rank's metrics to the driver: the :class:`~cola_ray.learner.engine.Report` of supervised stages."""

    def __init__(self, mailbox: Queue, stops: Queue, device: str) -> None:
        self.mailbox, self.stops, self.device = mailbox, stops, device
        self.is_first = ray.train.get_context().get_world_rank() == 0
        self.looked = 0.0  # at ``stops``: it is in another process, so a look may take as long as a step

    def __call__(self, metrics: dict[str, Any], saved: bool = False) -> bool:
        import torch

        step, last = metrics["step"], metrics["step"] == metrics["steps"]
        if self.is_first and (step == 1 or step % 10 == 0 or last or saved):
            self.mailbox.put({"metrics": {**metrics, "memory/learner_gb": peak_memory_gb()}})
        stopped = False
        if self.is_first and time.monotonic() - self.looked > 1.0:
            stopped, self.looked = not self.stops.empty(), time.monotonic()
        asked = torch.tensor(int(stopped), device=self.device)
        torch.distributed.broadcast(asked, 0)
        return bool(asked)

    def doing(self, what: str) -> None:
        if self.is_first:
            self.mailbox.put({"doing": what})

    def say(self, line: str) -> None:
        self.mailbox.put({"say": line})

    def fail(self, reason: str) -> None:
        self.mailbox.put({"failed": reason})


def _supervised_summary(config: Config, stages: Sequence[str], tracker: Tracker) -> dict[str, Any]:
    summary: dict[str, Any] = {"preset": config.preset, "seed": config.seed, "stages": list(stages)}
    of_actions = ("loss", "base_loss", "alive", "top_share", "reachable_tokens", "covered")
    actions = [f"actions/{name}" for name in of_actions]
    wanted = ["base/accuracy", *actions, "policy/loss", "policy/accuracy", "reward/loss", "reward/accuracy",
              "q/loss", "q/heldout_loss", "q/heldout_correlation", "memory/learner_gb"]  # fmt: skip
    for name in wanted:
        values = tracker.series(name)[1]
        if values:
            summary[name.replace("/", "_")] = max(values) if name.startswith("memory") else values[-1]
    return summary
