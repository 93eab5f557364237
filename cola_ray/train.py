"""Everything that happens in a training run, top to bottom.

    pretrain(config)   TorchTrainer: ZeRO-3 ranks over the stages                             -> a CoLA model
    run_rl(config)     RolloutWorker actors <- Controller actor <- TorchTrainer: ZeRO-3 ranks -> a better policy
    train_reward_model(config)  TorchTrainer: ZeRO-3 ranks over preference pairs             -> a sequence classifier
    train_q(config)    TorchTrainer: ranks over logged answers                               -> MCTS-Q's values
    run_agent(config)  AgentWorker actors <- the same controller and learner                 -> a better agent
                                                └── ReplayShard and CriticService actors

All return the summary they write to ``output_dir/summary.json``; all track into MLflow and can be resumed.
"""

import contextlib
import functools
import importlib
import itertools
import logging
import os
import secrets
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
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from cola_ray.checks.refusals import check
from cola_ray.cluster import actors, head, watch
from cola_ray.loop.batches import Source
from cola_ray.loop.controller import Controller
from cola_ray.loop.episodes import Episodes
from cola_ray.loop.problems import Problems
from cola_ray.model.conversion import describe, plain_base
from cola_ray.rollout.agent_worker import AgentWorker
from cola_ray.rollout.worker import EngineWorker, RolloutWorker
from cola_ray.runs import checkpoints, launch, provenance, resume
from cola_ray.runs.display import current, print_line, shown
from cola_ray.runs.failure import explained_failures
from cola_ray.runs.figures import plot, print_summary
from cola_ray.runs.launch import Launch
from cola_ray.runs.run_folder import State, read_record, write_json
from cola_ray.runs.tracking import Tracker, peak_memory_gb
from cola_ray.settings import relevance
from cola_ray.settings.config import Config, RunFailedError, flat, is_environment, override
from cola_ray.settings.training import Q_STAGE, REWARD_STAGE
from cola_ray.tasks import least_right_reward

# --- pre-training -------------------------------------------------------------------------------------------------


@shown()
@explained_failures()
def pretrain(config: Config) -> dict[str, Any]:
    """Run the stages of ``config.pretrain``; leaves ``output_dir/model``. Returns the summary.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: a stage failed more often than ``cluster.max_failures``; the message is the last cause.
    """
    check(config, "pretrain")
    return _supervised(config, "pretrain", config.pretrain.stages, "pretrain", "latent pre-training")


@shown()
@explained_failures()
def train_reward_model(config: Config) -> dict[str, Any]:
    """A reward model from the preference pairs at ``task.path``, on ``model.base``; as ``pretrain``."""
    check(config, "reward_model")
    return _supervised(config, "reward_model", (REWARD_STAGE,), "reward_model", "reward model")


@shown()
@explained_failures()
def train_q(config: Config) -> dict[str, Any]:
    """MCTS-Q's values of actions, from the answers at ``data.path`` that evaluate logged; as ``pretrain``."""
    check(config, "train_q")
    return _supervised(config, "train_q", (Q_STAGE,), "logged_q", "Q of latent actions")


def _supervised(config: Config, job: str, stages: Sequence[str], module: str, about: str) -> dict[str, Any]:
    """Stages of supervised training by a module of ``learner``: progress, metrics, a summary, a plot of losses."""
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

        patience = itertools.chain([None], itertools.repeat(_ANSWER_S))  # the first answer waits for a process to start

        def poll(last: bool = False) -> None:
            waiting = ray.get(mailbox.actor.qsize.remote(), timeout=next(patience))
            for event in ray.get(mailbox.actor.get_nowait_batch.remote(waiting), timeout=_ANSWER_S):
                show(event)

        def stop() -> None:
            stops.put(True)
            display.say("stopping after this step; once more to stop at once")

        display.doing(f"{job}: starting {config.cluster.learner_ranks} learner ranks")
        loop = {"config": config.model_dump(), "mailbox": mailbox, "stops": stops,
                "module": f"cola_ray.learner.{module}"}  # fmt: skip
        try:
            _fit(config, _supervised_rank, loop, poll, stop)
        finally:
            if (output / "model" / "config.json").exists():
                provenance.write(output / "model", config, job)
        display.doing(f"{job}: writing the summary")
        for queue in (mailbox, stops):
            queue.shutdown(force=True)
    print_summary(f"{about}, {config.preset}: {output / 'model'}", tracker.summary)
    return tracker.summary


def _supervised_rank(loop: dict[str, Any]) -> None:
    config = _enter_rank(loop)
    learner = importlib.import_module(loop["module"])
    device = "cuda" if config.cluster.use_gpu else "cpu"
    learner.train_loop(config, _Mailbox(loop["mailbox"], loop["stops"], device))


class _Mailbox:
    """Where a rank's metrics go: the :class:`~cola_ray.learner.engine.Report` of supervised stages."""

    def __init__(self, mailbox: Queue, stops: Queue, device: str) -> None:
        self.mailbox, self.stops, self.device = mailbox, stops, device
        self.is_first = ray.train.get_context().get_world_rank() == 0
        self.looked = 0.0  # into ``stops``, which another process keeps: a step may take no longer than the look

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


# --- RL -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What differs between problems with answers and multi-turn agents."""

    name: str
    worker: type[EngineWorker]
    source: Callable[..., Source]


_ANSWER_S = 60.0  # that is waited for what never computes for long

OnStep = Callable[[int, Mapping[str, Any]], None]
"""What is told every learner step and its metrics."""


@shown()
@explained_failures()
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
        return _run(config, _Job("rl_preference", RolloutWorker, Problems), on_step)
    return _run(config, _Job("rl_math", RolloutWorker, Problems), on_step)


@shown()
@explained_failures()
def run_agent(config: Config, on_step: OnStep | None = None) -> dict[str, Any]:
    """RL over the turns of a multi-turn environment, with replay and an utterance critic beside it; as ``run_rl``."""
    check(config, "rl_agent")
    if config.rl.algorithm == "filtered_bc":  # cloning has no importance weights: any likelihood of the data will do
        config = override(config, {"rl.importance_cap": 0.0, "rl.kl_coef": 0.0})
    return _run(config, _Job("rl_agent", AgentWorker, Episodes), on_step)


def measured(config: Config) -> str:
    """What an evaluation is called, ``eval/<this>``: return, accuracy, or reward where nothing is simply right."""
    if is_environment(config.task.name):
        return "return"
    return "reward" if least_right_reward(config.task) is None else "accuracy"


def _run(config: Config, job: _Job, on_step: OnStep | None) -> dict[str, Any]:
    asked, begun = config, launch.begin(config, job.name)
    config, output = begun.config, begun.folder.path
    found: dict[str, Any] = {}

    def draw(tracker: Tracker) -> None:
        if not tracker.step:
            return
        lines = {
            "base": tracker.latest(f"eval/base_{measured(config)}"),
            "behaviour cloned": tracker.first(f"eval/{measured(config)}"),
        }
        plot(
            output / "reward.png",
            f"{config.task.name}: {config.rl.algorithm} over {_actions(config)}",
            {"reward (train, sampled)": tracker.series("reward/mean"),
             f"{measured(config)} (held out)": tracker.series(f"eval/{measured(config)}")},
            {name: value for name, value in lines.items() if value is not None},
        )  # fmt: skip

    def summarise(tracker: Tracker) -> dict[str, Any]:
        return _rl_summary(config, tracker, found)

    with begun.folder.failing(), actors.cluster(config):
        make_start_model(asked)
        resume.check_inputs(config, begun.start)
        model_path = served(config, begun.start)
        with tracked(begun, summarise, draw, on_step) as tracker:
            current().doing("starting the controller")
            services: dict[str, Any] = {"shards": actors.replay(config)}
            if job.source is Episodes:
                services["critic"] = actors.critic(config, model_path, services["shards"])
            judge = actors.judge(config)
            pool = actors.RayWorkers(config, model_path, job.worker, *([judge] if judge else []))
            controller = actors.controller(Controller, config, pool, functools.partial(job.source, **services))
            try:
                _train(config, model_path, controller, tracker, found, begun.resumes)
            finally:
                ray.kill(controller)  # and with it the workers, which it owns
                if (output / "model" / "config.json").exists():
                    provenance.write(output / "model", config, job.name, begun.start)
        print_summary(f"RL, {config.preset}: {output}", tracker.summary)
        print_line("\n".join(afterwards(config, job.name, tracker.summary)))
    return tracker.summary


def afterwards(config: Config, job: str, summary: Mapping[str, Any]) -> list[str]:
    """What a run has gained, where its model is, and what to do with it next."""
    measure = measured(config)
    before, after = summary.get(f"bc_{measure}"), summary.get(f"rl_{measure}")
    model = Path(config.output_dir) / "model"
    if model.is_relative_to(Path.cwd()):
        model = model.relative_to(Path.cwd())
    lines = []
    if before is not None and after is not None:
        gained = f"{100 * (after - before):+.0f} points" if measure == "accuracy" else f"{after - before:+.3g}"
        asked = f"{summary['eval_problems']} held-out {'episodes' if job == 'rl_agent' else 'problems'}"
        lines.append(f"{measure} on {asked}: {before:.3g} before RL, {after:.3g} after, {gained}")
    command = f"--preset {config.preset} --task.name {config.task.name} --model.path {model}"
    command += f" --task.path {config.task.path}" if config.task.path else ""
    lines += [f"the model: {model}", "next, for example:"]
    if config.task.name != "preference":
        space = " --rl.action-space token" if config.rl.action_space == "token" else ""
        lines.append(f"  cola_ray evaluate {command}{space}")
    if config.rl.action_space == "latent":
        lines.append(f"  cola_ray atlas {command}")
    return lines


def served(config: Config, start: Path | None) -> str:
    """What engines and learner open: the CoLA model that a run starts from, or over tokens a plain Llama."""
    if config.rl.action_space == "latent":
        return str(start)
    return str(plain_base(start or config.model.base, Path(config.output_dir) / "base"))


def _actions(config: Config) -> str:
    if config.rl.action_space == "token":
        return f"tokens, adapters of rank {config.rl.lora_rank}" if config.rl.lora_rank else "tokens"
    return f"{config.model.num_actions} latent actions"


def _train(
    config: Config, model_path: str, controller: Any, tracker: Tracker, found: dict[str, Any], resumed: bool
) -> None:
    """The loop between controller and learner until it ends; what is known of the run goes into ``found``."""
    talk = _Talk(controller, config.cluster.stall_timeout_s, config.cluster.answer_timeout_s)
    begun = controller.start.remote(resumed)
    display, export = current(), actors.exporter(config)
    evaluated = f"eval/{measured(config)}"
    names = {"reward/mean": "reward", "policy/kl": "kl", "policy/entropy": "entropy", evaluated: measured(config)}

    def poll(last: bool = False) -> None:
        if not found and ray.wait([begun], timeout=0)[0]:
            found.update(ray.get(begun))
            _say_arithmetic(config, found)
        events, failure = talk.drained(last)
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
            if not found and ray.wait([begun], timeout=0)[0]:
                ray.get(begun)  # which has it in its own words
            raise RunFailedError(failure)

    def stop() -> None:
        last = ray.get(controller.stop.remote(), timeout=_ANSWER_S)
        display.say(f"stopping after step {last}; once more to stop at once")

    loop = {"config": config.model_dump(), "model_path": model_path, "controller": controller}
    # Engines and ranks start side by side; where they share GPUs, engines first measure what memory is free.
    while config.cluster.colocated and not found:
        head.raise_if_lost()
        poll()
        time.sleep(0.5)
    _fit(config, _rl_rank, loop, poll, stop)
    display.doing("writing the summary")
    with contextlib.suppress(ray.exceptions.RayError):  # a figure is no reason to fail a run that has ended
        workers = ray.get(controller.rollout_workers.remote(), timeout=_ANSWER_S)
        peaks = ray.get([worker.peak_memory_gb.remote() for worker in workers], timeout=_ANSWER_S)
        found["peak_memory_worker_gb"] = max(peaks)


class _Talk:
    """What the controller has to tell, asked for without being held up by it.

    Args:
        start_s: that it may take to its first answer.
        patience_s: that it may take to each one after.
    """

    def __init__(self, controller: Any, start_s: float, patience_s: float) -> None:
        self.controller, self.limit_s, self.patience_s = controller, start_s, patience_s
        self._ask()

    def _ask(self) -> None:
        self.asked, self.looked, self.waited_s = self.controller.drain.remote(), time.monotonic(), 0.0

    def drained(self, last: bool) -> tuple[list[dict[str, Any]], str | None]:
        """Events since the last answer, and any failure.

        Args:
            last: wait for all that there is.

        Raises:
            RunFailedError: no answer has come in time.
        """
        events, failure = list[dict[str, Any]](), None
        for _ in range(1 + last):  # of the two the first may have been asked for too early
            if not ray.wait([self.asked], timeout=self.limit_s if last else 0.1)[0]:
                now = time.monotonic()
                # What is long between two looks is this process's own time, which somebody had stopped.
                self.waited_s += self.limit_s if last else min(now - self.looked, 2.0)
                self.looked = now
                if self.waited_s >= self.limit_s:
                    raise RunFailedError(
                        f"the controller has not answered for {self.limit_s:g} s", "look at its machine"
                    )
                break
            self.limit_s = self.patience_s
            more, failure = ray.get(self.asked)
            events += more
            self._ask()
        return events, failure


def make_start_model(config: Config) -> None:
    """Pre-train it where the preset makes its own and it is missing."""
    model = provenance.start_model(config)
    if provenance.makes_start_model(config) and not provenance.is_made(model):
        begun = read_record(model.parent) is not None
        changes = {"output_dir": "", "resume": begun, "overwrite": False, "task.reward_model": "", "task.oracle": "",
                   "tracking_parent": ""}  # fmt: skip
        pretrain(relevance.only_read(override(config, changes), "pretrain"))


def _rl_rank(loop: dict[str, Any]) -> None:
    config = _enter_rank(loop)
    from cola_ray.learner.train_loop import train_loop

    train_loop(config, loop["model_path"], actors.RemoteController(loop["controller"]))


def _rl_summary(config: Config, tracker: Tracker, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is known so far, which for a run that ended early may be little."""
    measure, seconds = measured(config), tracker.series("time/step")[1]
    memory, parameters = tracker.latest("memory/optimizer_mb"), tracker.latest("learner/trained_parameters")
    alive, stage = tracker.latest("actions/alive"), tracker.latest("learner/zero_stage")
    figures = {
        f"base_{measure}": tracker.latest(f"eval/base_{measure}"),
        f"bc_{measure}": tracker.first(f"eval/{measure}"),
        f"rl_{measure}": tracker.latest(f"eval/{measure}"),
        "eval_problems": min(config.rl.eval_problems, found["num_heldout"]) if found else None,
        "steps": tracker.step,
        "reward_first": tracker.first("reward/mean"),
        "reward_last": tracker.latest("reward/mean"),
        "kl_last": tracker.latest("policy/kl"),
        "alive_actions": None if alive is None else int(alive),
        "trained_parameters": None if parameters is None else int(parameters),
        "optimizer_mb": None if memory is None else round(memory, 2),
        "rollout_mismatch": None if config.rl.actor_free else tracker.latest("policy/rollout_mismatch"),
        "seconds_per_step": sum(seconds) / len(seconds) if seconds else None,
        "peak_memory_learner_gb": tracker.latest("memory/learner_gb"),
        "peak_memory_worker_gb": found.get("peak_memory_worker_gb"),
        "vllm_version": found.get("vllm_version"),
        "deepspeed_stage": None if stage is None else int(stage),
        "mlflow_run_id": tracker.mlflow_run_id,
    }
    about = {"preset": config.preset, "task": config.task.name, "algorithm": config.rl.algorithm,
             "action_space": config.rl.action_space, "seed": config.seed}  # fmt: skip
    return about | {name: value for name, value in figures.items() if value is not None}


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
    poll: Callable[..., None],
    stop: Callable[[], None] | None,
) -> None:
    """Ray Train over the ZeRO-3 ranks, which go on from the run's last checkpoint; also those that replace dead ones.

    ``fit`` runs in a thread of its own, so that this one can ``poll`` twice a second, fail as soon as polling does,
    and answer signals: the first Ctrl-C or SIGTERM calls ``stop`` and waits for the orderly end, the next one ends
    at once, as does the first where there is no ``stop``.
    """
    gpus = config.cluster.use_gpu
    # What Ray Train notes for itself, and would go on from: a new place each time, for checkpoints are ours to find.
    notes = Path(config.output_dir) / checkpoints.FOLDER / f"{checkpoints.RAY_NOTES}{secrets.token_hex(4)}"
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
            name=notes.name,
            storage_path=str(notes.parent),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
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


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The SIGINT, SIGTERM and SIGHUP that came so far, without those that are ignored, as under nohup; elsewhere than
    in a main thread, none.
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


# --- the run's folder, its tracker, its display -------------------------------------------------------------------


@contextlib.contextmanager
def tracked(
    begun: Launch,
    summarise: Callable[[Tracker], dict[str, Any]],
    draw: Callable[[Tracker], None] = lambda _: None,
    on_step: OnStep | None = None,
) -> Iterator[Tracker]:
    """A run from here to its end, whichever that is: summary and plot are left of where it came to.

    Args:
        summarise: what is known of the run; how it ended and how long it took is added.
        draw: its plots, where there is anything to show.
    """
    config, folder = begun.config, begun.folder
    output, params = folder.path, flat(config.model_dump())
    current().doing("opening MLflow")
    tracker = Tracker(config.tracking_uri, begun.job, output, params, config.tracking_parent, on_step)
    error: BaseException | None = None
    try:
        with explained_failures(output), head.blamed():
            yield tracker
    except BaseException as caught:
        error = caught
        raise
    finally:
        state = _state(error)
        with contextlib.suppress(Exception) if error else contextlib.nullcontext():
            ended = {"state": state, "step": tracker.step, **({"reason": str(error)} if str(error or "") else {})}
            tracker.summary = ended | summarise(tracker) | {"wall_seconds": round(time.time() - begun.began, 1)}
            write_json(output / "summary.json", tracker.summary)
            _describe(output / "model", config, begun.job, tracker.summary)
        with contextlib.suppress(Exception) if error else contextlib.nullcontext():
            draw(tracker)
        with contextlib.suppress(Exception) if error else contextlib.nullcontext():
            tracker.finish(state)
            folder.end(state, tracker.step)


def _describe(model: Path, config: Config, job: str, summary: Mapping[str, Any]) -> None:
    """The run's part of its model's card. Of paths the last name alone: a card is for other machines."""
    if not (model / "config.json").exists():
        return
    facts = {job: f"preset {config.preset}, seed {config.seed}, task {config.task.name}"}
    if job == "pretrain":
        facts["data"] = Path(config.data.path).name if config.data.path else f"the demonstrations of {config.task.name}"
        if not (config.model.base or config.model.path):
            facts["base"] = "a small Llama that was trained from nothing"
    cost = ("_seconds", "_gb", "_mb", "_per_step")
    figures = {
        f"{job}: {name}": round(value, 4) for name, value in summary.items()
        if isinstance(value, float) and not name.endswith(cost)
    }  # fmt: skip
    describe(model, facts, figures)


def _state(error: BaseException | None) -> State:
    return "finished" if error is None else "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
