"""Everything that happens in a training run, top to bottom.

    pretrain(config)   TorchTrainer: ZeRO-3 ranks over the stages                             -> a CoLA model
    run_rl(config)     RolloutWorker actors <- Controller actor <- TorchTrainer: ZeRO-3 ranks -> a better policy
    train_reward_model(config)  TorchTrainer: ZeRO-3 ranks over preference pairs             -> a sequence classifier
    train_q(config)    TorchTrainer: ranks over logged answers                               -> MCTS-Q's values
    run_agent(config)  AgentWorker actors <- AgentController actor <- the same learner        -> a better agent
                                                └── ReplayShard and CriticService actors

All return the summary they write to ``output_dir/summary.json``; all track into MLflow and can be resumed.
"""

import contextlib
import importlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from cola_ray import actors
from cola_ray.agents import AgentController
from cola_ray.config import Q_STAGE, REWARD_STAGE, Config, RunFailedError, is_environment, override
from cola_ray.controller import Controller
from cola_ray.display import current, shown
from cola_ray.model.conversion import plain_base
from cola_ray.refusals import check
from cola_ray.rollout.agent import AgentWorker
from cola_ray.rollout.worker import EngineWorker, RolloutWorker
from cola_ray.tasks import least_right_reward
from cola_ray.tracking import (
    Tracker,
    peak_memory_gb,
    plot,
    print_summary,
    write_json,
)

# --- pre-training -------------------------------------------------------------------------------------------------


@shown()
def pretrain(config: Config) -> dict[str, Any]:
    """Run the stages of ``config.pretrain``; leaves ``output_dir/model``. Returns the summary.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: a stage failed more often than ``cluster.max_failures``; the message is the last cause.
    """
    check(config, "pretrain")
    return _supervised(config, "pretrain", config.pretrain.stages, "pretrain", "latent pre-training")


@shown()
def train_reward_model(config: Config) -> dict[str, Any]:
    """A reward model from the preference pairs at ``task.path``, on ``model.base``; as ``pretrain``."""
    check(config, "reward_model")
    return _supervised(config, "reward_model", (REWARD_STAGE,), "reward_model", "reward model")


@shown()
def train_q(config: Config) -> dict[str, Any]:
    """MCTS-Q's values of actions, from the answers at ``data.path`` that evaluate logged; as ``pretrain``."""
    check(config, "train_q")
    config = override(config, {"model.path": str(config.start_model.resolve())})
    return _supervised(config, "train_q", (Q_STAGE,), "logged_q", "Q of latent actions")


def _supervised(config: Config, job: str, stages: Sequence[str], module: str, about: str) -> dict[str, Any]:
    """Stages of supervised training by a module of ``learner``: progress, metrics, a summary, a plot of losses."""
    config = config.resolve_paths(job)
    output, display = prepare_output(config), current()
    started = time.time()
    with actors.cluster(config), tracked(config, job) as tracker:
        mailbox = Queue(actor_options={"num_cpus": 0})
        lengths = [config.pretrain.num_steps(stage) for stage in stages]
        first_step = {stage: sum(lengths[:index]) for index, stage in enumerate(stages)}

        def show(event: dict[str, Any]) -> None:
            if "doing" in event:
                display.doing(f"{job}: {event['doing']}")
                return
            metrics = event["metrics"]
            stage, step, total = metrics["stage"], metrics["step"], metrics["steps"]
            tracker.log(first_step[stage] + step, metrics)
            shown = {k: metrics[f"{stage}/{k}"] for k in ("loss", "base_loss", "accuracy") if f"{stage}/{k}" in metrics}
            note = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
            display.update(f"{job}: {stage}", step, total, note, milestone=step % 100 == 0 or step == total)

        def poll() -> None:
            for event in mailbox.get_nowait_batch(mailbox.qsize()):
                show(event)

        display.doing(f"{job}: starting {config.cluster.learner_ranks} learner ranks")
        loop = {"config": config.model_dump(), "mailbox": mailbox, "module": f"cola_ray.learner.{module}"}
        _fit(config, _supervised_rank, loop, poll, stop=None)
        display.doing(f"{job}: writing the summary")
        mailbox.shutdown(force=True)
        summary = _supervised_summary(config, stages, tracker, time.time() - started)
        write_json(output / "summary.json", summary)
        losses = {f"{stage} loss": tracker.series(f"{stage}/loss") for stage in stages}
        plot(output / "losses.png", about, losses, {})
    print_summary(f"{about}, {config.preset}: {output / 'model'}", summary)
    return summary


def _supervised_rank(loop: dict[str, Any]) -> None:
    config = _enter_rank(loop)
    learner = importlib.import_module(loop["module"])
    with _last_checkpoint() as checkpoint:
        learner.train_loop(config, checkpoint, _Mailbox(loop["mailbox"]))


class _Mailbox:
    """Where a rank's metrics and checkpoints go: the :class:`~cola_ray.learner.engine.Report` of supervised stages."""

    def __init__(self, mailbox: Queue) -> None:
        self.mailbox, self.is_first = mailbox, ray.train.get_context().get_world_rank() == 0

    def __call__(self, metrics: dict[str, Any], folder: Path | None) -> None:
        step, last = metrics["step"], metrics["step"] == metrics["steps"]
        if self.is_first and (step == 1 or step % 10 == 0 or last or folder is not None):
            self.mailbox.put({"metrics": {**metrics, "memory/learner_gb": peak_memory_gb()}})
        if folder is not None:
            _report(metrics, folder)

    def doing(self, what: str) -> None:
        if self.is_first:
            self.mailbox.put({"doing": what})


def _supervised_summary(config: Config, stages: Sequence[str], tracker: Tracker, seconds: float) -> dict[str, Any]:
    summary: dict[str, Any] = {"preset": config.preset, "seed": config.seed, "stages": list(stages)}
    of_actions = ("loss", "base_loss", "alive", "top_share", "reachable_tokens", "covered")
    actions = [f"actions/{name}" for name in of_actions]
    wanted = ["base/accuracy", *actions, "policy/loss", "policy/accuracy", "reward/loss", "reward/accuracy",
              "q/loss", "q/heldout_loss", "q/heldout_correlation", "memory/learner_gb"]  # fmt: skip
    for name in wanted:
        values = tracker.series(name)[1]
        if values:
            summary[name.replace("/", "_")] = max(values) if name.startswith("memory") else values[-1]
    return summary | {"wall_seconds": round(seconds, 1)}


# --- RL -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What differs between problems with answers and multi-turn agents."""

    name: str
    worker: type[EngineWorker]
    controller: type[Controller]


OnStep = Callable[[int, Mapping[str, Any]], None]
"""What is told every learner step and its metrics."""


@shown()
def run_rl(config: Config, on_step: OnStep | None = None) -> dict[str, Any]:
    """RL of the policy over latent actions on problems with answers; leaves ``output_dir/model``. Returns the summary.

    For the tiny preset the model that RL starts from is made first where it is missing.

    Args:
        on_step: is told each step's metrics beside MLflow.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: the message names the cause.
    """
    check(config, "rl_math")
    if config.task.name == "preference":
        return _run(config, _Job("rl_preference", RolloutWorker, Controller), on_step)
    return _run(config, _Job("rl_math", RolloutWorker, Controller), on_step)


@shown()
def run_agent(config: Config, on_step: OnStep | None = None) -> dict[str, Any]:
    """RL over the turns of a multi-turn environment, with replay and an utterance critic beside it; as ``run_rl``."""
    check(config, "rl_agent")
    if config.rl.algorithm == "filtered_bc":  # cloning has no importance weights: any likelihood of the data will do
        config = override(config, {"rl.importance_cap": 0.0, "rl.kl_coef": 0.0})
    return _run(config, _Job("rl_agent", AgentWorker, AgentController), on_step)


def measured(config: Config) -> str:
    """What an evaluation is called, ``eval/<this>``: return, accuracy, or reward where nothing is simply right."""
    if is_environment(config.task.name):
        return "return"
    return "reward" if least_right_reward(config.task) is None else "accuracy"


def _run(config: Config, job: _Job, on_step: OnStep | None) -> dict[str, Any]:
    started = time.time()
    with actors.cluster(config):
        make_start_model(config)
        start = config.start_model.resolve()
        config = config.resolve_paths(job.name)
        output = prepare_output(config)
        model_path = served(config, start)
        with tracked(config, job.name, on_step) as tracker:
            replay = actors.replay(config)
            services = (replay, actors.critic(config, model_path, replay)) if job.name == "rl_agent" else (replay,)
            judge = actors.judge(config)
            pool = actors.RayWorkers(config, model_path, job.worker, *([judge] if judge else []))
            controller = actors.controller(job.controller, config, pool, *services)
            try:
                facts, memory = _train(config, model_path, controller, tracker)
            finally:
                ray.kill(controller)  # and with it the workers, which it owns
            summary = _rl_summary(config, tracker, facts, memory, time.time() - started)
            measure = measured(config)
            write_json(output / "summary.json", summary)
            plot(
                output / "reward.png",
                f"{config.task.name}: {config.rl.algorithm} over {_actions(config)}",
                {"reward (train, sampled)": tracker.series("reward/mean"),
                 f"{measure} (held out)": tracker.series(f"eval/{measure}")},
                {label: summary[f"{when}_{measure}"] for when, label in (("base", "base"), ("bc", "behaviour cloned"))
                 if f"{when}_{measure}" in summary},
            )  # fmt: skip
        print_summary(f"RL, {config.preset}: {output}", summary)
    return summary


def served(config: Config, start: Path) -> str:
    """What engines and learner open: the CoLA model that a run starts from, or over tokens a plain Llama."""
    if config.rl.action_space == "latent":
        return str(start)
    return str(plain_base(start if start.exists() else config.model.base, Path(config.output_dir) / "base"))


def _actions(config: Config) -> str:
    if config.rl.action_space == "token":
        return f"tokens, adapters of rank {config.rl.lora_rank}" if config.rl.lora_rank else "tokens"
    return f"{config.model.num_actions} latent actions"


def _train(config: Config, model_path: str, controller: Any, tracker: Tracker) -> tuple[dict[str, Any], list[float]]:
    """The loop between controller and learner until it ends; returns the run's facts and the workers' memory."""
    facts: dict[str, Any] = {}
    begun = controller.start.remote(_checkpoint_exists(Path(config.output_dir)))
    display, export = current(), actors.exporter(config)
    evaluated = f"eval/{measured(config)}"
    names = {"reward/mean": "reward", "policy/kl": "kl", "policy/entropy": "entropy", evaluated: measured(config)}

    def poll() -> None:
        if not facts and ray.wait([begun], timeout=0)[0]:
            try:
                facts.update(ray.get(begun))
            except ray.exceptions.RayTaskError as error:
                raise RunFailedError(str(error.cause or error)) from None
            _say_arithmetic(config, facts)
        events, failure = ray.get(controller.drain.remote())
        for event in events:
            if "say" in event:
                display.say(event["say"])
                tracker.note("say", text=event["say"])
                continue
            if "doing" in event:
                display.doing(event["doing"])
                continue
            step, metrics = event["step"], event["metrics"]
            tracker.log(step, metrics)
            export(metrics)
            note = "  ".join(f"{label} {metrics[name]:.3f}" for name, label in names.items() if name in metrics)
            if step == 0:
                display.say(f"before RL: {note}")
                continue
            display.update("rl", step, config.rl.max_steps, note, milestone=evaluated in metrics or step % 10 == 0)
        if failure:
            raise RunFailedError(failure)

    def stop() -> None:
        last = ray.get(controller.stop.remote())
        display.say(f"stopping after step {last}; once more to stop at once")

    loop = {"config": config.model_dump(), "model_path": model_path, "controller": controller}
    # Engines and ranks start side by side; where they share GPUs, engines first measure what memory is free.
    while config.cluster.colocated and not facts:
        poll()
        time.sleep(0.5)
    _fit(config, _rl_rank, loop, poll, stop)
    display.doing("writing the summary")
    workers = ray.get(controller.workers.remote())
    return facts, ray.get([worker.peak_memory_gb.remote() for worker in workers])


def make_start_model(config: Config) -> None:
    """Pre-train it where the preset makes its own and it is missing."""
    if config.makes_start_model and not config.start_model.exists():
        pretrain(config.model_copy(update={"output_dir": "", "resume": True}))


def _rl_rank(loop: dict[str, Any]) -> None:
    config = _enter_rank(loop)
    from cola_ray.learner import rl

    with _last_checkpoint() as checkpoint:
        rl.train_loop(config, loop["model_path"], actors.RemoteController(loop["controller"]), checkpoint, _report)


def _rl_summary(
    config: Config, tracker: Tracker, facts: dict[str, Any], worker_memory: list[float], seconds: float
) -> dict[str, Any]:
    def last(name: str) -> float:
        return tracker.series(name)[1][-1]

    measure = measured(config)
    base, evaluated = (tracker.series(f"eval/{name}")[1] for name in (f"base_{measure}", measure))
    times = tracker.series("time/step")[1]
    return {
        "preset": config.preset,
        "task": config.task.name,
        "algorithm": config.rl.algorithm,
        "action_space": config.rl.action_space,
        "seed": config.seed,
        # Nothing, where nothing is held out.
        **({f"base_{measure}": base[-1]} if base else {}),
        **({f"bc_{measure}": evaluated[0], f"rl_{measure}": evaluated[-1]} if evaluated else {}),
        "eval_problems": min(config.rl.eval_problems, facts["num_heldout"]),
        "steps": config.rl.max_steps,
        "reward_first": tracker.series("reward/mean")[1][0],
        "reward_last": last("reward/mean"),
        **({"kl_last": last("policy/kl")} if tracker.series("policy/kl")[1] else {}),
        "alive_actions": int(last("actions/alive")),
        "trained_parameters": int(last("learner/trained_parameters")),
        "optimizer_mb": round(last("memory/optimizer_mb"), 2),
        **({} if config.rl.actor_free else {"rollout_mismatch": last("policy/rollout_mismatch")}),
        "seconds_per_step": sum(times) / max(len(times), 1),
        "wall_seconds": round(seconds, 1),
        "peak_memory_learner_gb": last("memory/learner_gb"),
        "peak_memory_worker_gb": max(worker_memory),
        "vllm_version": facts["vllm_version"],
        "deepspeed_stage": int(last("learner/zero_stage")),
        "mlflow_run_id": tracker.run.info.run_id,
    }


def _say_arithmetic(config: Config, facts: dict[str, Any]) -> None:
    """The derived numbers that people otherwise guess."""
    rl, ranks = config.rl, config.cluster.learner_ranks
    sequences = rl.prompts_per_step * rl.group_size
    current().say(
        f"a step: {rl.prompts_per_step} prompts x {rl.group_size} completions = {sequences} sequences; {ranks} ranks x "
        f"micro-batches of up to {rl.micro_batch_tokens} tokens; {rl.updates_per_batch} update(s); "
        f"rollouts up to {rl.max_staleness} version(s) behind"
    )
    if "num_too_long" not in facts:
        return  # an environment has no list of problems
    too_long = facts["num_too_long"], facts["num_heldout_too_long"]
    left_out = f"; {too_long[0]} and {too_long[1]} longer than rollout.max_prompt_tokens are left out"
    problems = f"{facts['num_train']} training problems, {facts['num_heldout']} held out"
    current().say(problems + (left_out if any(too_long) else ""))


# --- Ray ----------------------------------------------------------------------------------------------------------


def _fit(
    config: Config,
    rank_loop: Callable[[dict[str, Any]], None],
    loop: dict[str, Any],
    poll: Callable[[], None],
    stop: Callable[[], None] | None,
) -> None:
    """Ray Train over the ZeRO-3 ranks; restarted from the last checkpoint when a rank dies.

    ``fit`` runs in a thread of its own, so that this one can ``poll`` twice a second, fail as soon as polling does,
    and answer signals: the first Ctrl-C or SIGTERM calls ``stop`` and waits for the orderly end, the next one ends
    at once, as does the first where there is no ``stop``.
    """
    gpus = config.cluster.use_gpu
    trainer = TorchTrainer(
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
            name="learner",
            storage_path=str(Path(config.output_dir) / "checkpoints"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    with signals() as received:
        thread.start()
        asked = False
        while thread.is_alive():
            thread.join(0.5)
            poll()
            if received and not asked and stop is not None:
                stop()
                asked = True
            elif len(received) > int(asked):
                raise KeyboardInterrupt
    poll()
    if errors:
        raise RunFailedError(str(errors[0]).strip()) from errors[0]
    if received:
        raise KeyboardInterrupt


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The SIGINT and SIGTERM that came so far; elsewhere than in a main thread, none."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _enter_rank(loop: dict[str, Any]) -> Config:
    """What every learner rank does first: threads, process group, settings."""
    config = Config.model_validate(loop["config"])
    import torch

    from cola_ray.learner.engine import join_group

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not config.cluster.use_gpu:
        torch.set_num_threads(config.cluster.threads_per_process)
    os.environ["LOCAL_RANK"] = str(ray.train.get_context().get_local_rank())
    join_group("nccl" if config.cluster.use_gpu else "gloo")
    return config


@contextlib.contextmanager
def _last_checkpoint() -> Iterator[Path | None]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as folder:
            yield Path(folder)


def _report(metrics: dict[str, Any], folder: Path | None) -> None:
    """Every rank uploads its own shard; Ray Train merges them into one checkpoint."""
    ray.train.report(metrics, checkpoint=Checkpoint.from_directory(str(folder)) if folder else None)


# --- the run's folder, its tracker, its display -------------------------------------------------------------------


def prepare_output(config: Config) -> Path:
    """The run's folder; without ``resume`` what an earlier run left there is removed."""
    output = Path(config.output_dir)
    if not config.resume:
        for name in ("checkpoints", "stages", "model", "base", "replay", "critic", "predictions", "runs", "tune"):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in ("summary.json", "mlflow_run_id", "reward.png", "losses.png", "frontier.png"):
            (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", config.model_dump())
    return output


def _checkpoint_exists(output: Path) -> bool:
    return any((output / "checkpoints" / "learner").glob("checkpoint_*"))


@contextlib.contextmanager
def tracked(config: Config, job: str, on_step: OnStep | None = None) -> Iterator[Tracker]:
    output, params = Path(config.output_dir), _flat(config.model_dump())
    current().doing("opening MLflow")
    tracker = Tracker(config.tracking_uri, job, output, params, config.tracking_parent, on_step)
    try:
        yield tracker
    except BaseException as error:
        tracker.finish(output, error)
        raise
    tracker.finish(output)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return out
