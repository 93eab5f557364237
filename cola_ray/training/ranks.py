"""Ray Train over the learner's ranks: starts, polls and watches them until they end, and handles signals."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cola_ray.cluster import actors, head, watch
from cola_ray.runs import checkpoints
from cola_ray.settings.config import Config

ANSWER_S = 60.0
"""Timeout for calls that never compute for long."""


def fit_ranks(
    config: Config,
    rank_loop: Callable[[dict[str, Any]], None],
    loop: dict[str, Any],
    poll: Callable[..., None],
    stop: Callable[[], None] | None,
) -> None:
    """Run the ZeRO-3 ranks under Ray Train; they, and replacements of dead ones, resume from the run's last checkpoint.

    ``fit`` runs in a separate thread, so that this one can ``poll`` twice a second, fail as soon as polling does,
    and handle signals: the first Ctrl-C or SIGTERM calls ``stop`` and waits for an orderly end, the next one ends the
    run at once. Without ``stop`` the first one does so.
    """
    # Ray Train's own records, which it would resume from. A new folder each time, since we find checkpoints ourselves.
    notes = Path(config.output_dir) / checkpoints.FOLDER / f"{checkpoints.RAY_NOTES}{secrets.token_hex(4)}"
    trainer = _trainer(config, rank_loop, loop, notes)
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    supervisor = watch.Unreachable("TrainController", config.cluster.answer_timeout_s)
    with signals() as received:
        thread.start()
        asked = False
        while thread.is_alive():
            thread.join(0.5)
            head.raise_if_lost()
            supervisor.look()
            poll()
            if received and not asked and stop is not None:
                stop()
                asked = True
            elif len(received) > int(asked):
                raise KeyboardInterrupt
    poll(last=True)
    shutil.rmtree(notes, ignore_errors=True)
    if errors:
        raise errors[0]
    if received:
        raise KeyboardInterrupt


def _trainer(
    config: Config, rank_loop: Callable[[dict[str, Any]], None], loop: dict[str, Any], notes: Path
) -> TorchTrainer:
    gpus = config.cluster.use_gpu
    return TorchTrainer(
        rank_loop,
        train_loop_config=loop,
        scaling_config=ScalingConfig(
            num_workers=config.cluster.learner_ranks,
            use_gpu=gpus,
            resources_per_worker=actors.booking(config, "learner"),
            placement_strategy=config.cluster.learner_placement,
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=notes.name,
            storage_path=str(notes.parent),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The SIGINT, SIGTERM and SIGHUP signals received so far. Ignored signals are left out, as SIGHUP under nohup;
    outside the main thread there are none.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda n, _: received.append(n))
        for number in asked
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def enter_rank(loop: dict[str, Any]) -> Config:
    """What every learner rank does first: set threads, join the process group, return the settings."""
    config = Config.model_validate(loop["config"])
    import torch
    from ray.train.torch import get_device

    from cola_ray.learner.engine import join_group

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not config.cluster.use_gpu:
        torch.set_num_threads(config.cluster.threads_per_process)
    # DeepSpeed takes the GPU with this number. Ray may show a process only its own GPU, or all GPUs of its node.
    device = get_device() if config.cluster.use_gpu else torch.device("cpu")
    os.environ["LOCAL_RANK"] = str(device.index if device.type == "cuda" else ray.train.get_context().get_local_rank())
    join_group("nccl" if config.cluster.use_gpu else "gloo")
    return config
