"""RL under Ray Train, for problems with answers and for multi-turn agents.

    run_rl(config)     RolloutWorker actors <─ Controller actor <─ ZeRO-3 ranks ─> a better policy
    run_agent(config)  AgentWorker actors   <─ the same controller and learner  ─> a better agent
                                                └── ReplayShard and CriticService actors

The driver starts the actors, then reads the controller's events until the ranks end (``_train``), and writes the
summary, the plot and the model's card.
"""

import contextlib
import functools
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from transformers import AutoTokenizer

from cola_ray.checks.refusals import check
from cola_ray.cluster import actors
from cola_ray.learner.policies import served
from cola_ray.loop.batches import Source
from cola_ray.loop.controller import Controller
from cola_ray.loop.episodes import Episodes
from cola_ray.loop.problems import Problems
from cola_ray.model.conversion import load_tokenizer
from cola_ray.rollout.agent_worker import AgentWorker
from cola_ray.rollout.worker import EngineWorker, RolloutWorker
from cola_ray.runs import launch, provenance, resume
from cola_ray.runs.display import current, print_line, shown
from cola_ray.runs.failure import explained_failures
from cola_ray.runs.figures import plot, print_summary
from cola_ray.runs.run_folder import read_record
from cola_ray.runs.samples import SampleFolder
from cola_ray.runs.tracking import Tracker
from cola_ray.settings import relevance
from cola_ray.settings.config import Config, RunFailedError, is_environment, override
from cola_ray.settings.matrix import as_words
from cola_ray.tasks import least_right_reward, summary
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.inspection import undemonstrated
from cola_ray.tasks.rewarded import REWARD_MODEL
from cola_ray.training.ranks import ANSWER_S, enter_rank, fit_ranks
from cola_ray.training.supervised import pretrain
from cola_ray.training.tracked_run import OnStep, tracked


@dataclass(frozen=True)
class _Job:
    """What differs between problems with answers and multi-turn agents."""

    name: str
    worker: type[EngineWorker]
    source: Callable[..., Source]


@shown()
@explained_failures()
def run_rl(config: Config, on_step: OnStep | None = None) -> dict[str, Any]:
    """RL on problems with answers; writes ``output_dir/model``. Returns the summary.

    If the start model is missing, the tiny preset pre-trains it first.

    Args:
        on_step: receives each step's metrics, in addition to MLflow.

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
    """RL over the turns of a multi-turn environment, with replay and an utterance critic; otherwise like ``run_rl``."""
    check(config, "rl_agent")
    if config.rl.algorithm == "filtered_bc":  # cloning has no importance weights: any likelihood of the data will do
        config = override(config, {"rl.importance_cap": 0.0, "rl.kl_coef": 0.0})
    return _run(config, _Job("rl_agent", AgentWorker, Episodes), on_step)


def measured(config: Config) -> str:
    """The name of the evaluation metric ``eval/<name>``: return, accuracy, or reward if no answer is simply right."""
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
        model_path = served(config, begun.start, output)
        _say_data(config, model_path)
        with tracked(begun, summarise, draw, on_step) as tracker:
            current().doing("starting the controller")
            services: dict[str, Any] = {"shards": actors.replay(config)}
            if job.source is Episodes:
                services["critic"] = actors.critic(config, model_path, services["shards"])
            reward_model = actors.reward_model(config)
            pool = actors.RayWorkers(config, model_path, job.worker, *([reward_model] if reward_model else []))
            controller = actors.controller(Controller, config, pool, functools.partial(job.source, **services))
            try:
                _train(config, model_path, controller, tracker, found, begun.resumes)
            finally:
                ray.kill(controller)  # and thereby the workers, which it owns
                if (output / "model" / "config.json").exists():
                    provenance.write(output / "model", config, job.name, begun.start)
        print_summary(f"RL, {config.preset}: {output}", tracker.summary)
        print_line("\n".join(afterwards(config, job.name, tracker.summary)))
    return tracker.summary


def _say_data(config: Config, model_path: str) -> None:
    """Describe the data that was read, if the task has rows or rewards of its own."""
    if (config.task.path or config.task.reward) and not is_environment(config.task.name):
        current().doing("reading the task")
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        chat = ChatTokenizer(tokenizer, config.data.date, config.data.chat_options)
        for line in summary.lines(config, chat):
            current().say(line)


def afterwards(config: Config, job: str, summary: Mapping[str, Any]) -> list[str]:
    """Lines for the end of a run: the gain, the model's path, and commands to try next."""
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
    command = ["--preset", config.preset, "--task.name", config.task.name, "--model.path", str(model)]
    lines += [f"the model: {model}", "next, for example:", f"  cola_ray view {shlex.quote(str(model.parent))}"]
    if (config.task.reward or config.task.name not in relevance.UNSCORED) and REWARD_MODEL not in config.task.reward:
        space = ["--rl.action-space", "token"] if config.rl.action_space == "token" else []
        lines.append(f"  cola_ray evaluate {shlex.join([*command, *_of_task(config, 'evaluate'), *space])}")
    texts = _texts(config)
    if config.rl.action_space == "latent" and texts is not None:
        lines.append(f"  cola_ray atlas {shlex.join([*command, *_of_task(config, 'atlas'), *texts])}")
    return lines


def _texts(config: Config) -> list[str] | None:
    """Words that name texts of the task: none if it has its own, else those of pre-training; None if not known."""
    if not undemonstrated(config.task):
        return []
    path = provenance.read(provenance.start_model(config)).get("settings", {}).get("data.path")
    return ["--data.path", str(path)] if path else None


def _of_task(config: Config, job: str) -> list[str]:
    """The task settings that differ from the preset's and that ``job`` reads, as words of its command."""
    given = {field: value for field, value in relevance.given(config).items() if field.startswith("task.")}
    return as_words({field: value for field, value in given.items()
                     if field != "task.name" and relevance.has_effect(config, job, field)})  # fmt: skip


def _actions(config: Config) -> str:
    if config.rl.action_space == "token":
        steered = {"off": "tokens", "all": "tokens, steering vectors", "last": "tokens, one steering vector"}
        return f"tokens, adapters of rank {config.rl.lora_rank}" if config.rl.lora_rank else steered[config.rl.steering]
    return f"{config.model.num_actions} latent actions"


def _train(
    config: Config, model_path: str, controller: Any, tracker: Tracker, found: dict[str, Any], resumed: bool
) -> None:
    """Run controller and learner until training ends; facts about the run are put into ``found``."""
    talk = _Talk(controller, config.cluster.stall_timeout_s, config.cluster.answer_timeout_s)
    begun = controller.start.remote(resumed)
    display, export = current(), actors.exporter(config)
    open_tokenizer = functools.partial(load_tokenizer, model_path)
    samples = SampleFolder(Path(config.output_dir), config.samples.max_mb, open_tokenizer)
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
            if "goes on from" in event:
                samples.forget_after(event["goes on from"])
                continue
            if "samples" in event:
                samples.keep(event["samples"])
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
                ray.get(begun)  # raises the original error
            raise RunFailedError(failure)

    def stop() -> None:
        last = ray.get(controller.stop.remote(), timeout=ANSWER_S)
        display.say(f"stopping after step {last}; once more to stop at once")

    loop = {"config": config.model_dump(), "model_path": model_path, "controller": controller}
    fit_ranks(config, _rl_rank, loop, poll, stop)
    display.doing("writing the summary")
    with contextlib.suppress(ray.exceptions.RayError):  # a missing figure must not fail a finished run
        workers = ray.get(controller.rollout_workers.remote(), timeout=ANSWER_S)
        peaks = ray.get([worker.peak_memory_gb.remote() for worker in workers], timeout=ANSWER_S)
        found["peak_memory_worker_gb"] = max(peaks)


class _Talk:
    """Fetches the controller's events without being blocked by it.

    Args:
        start_s: time limit for its first answer.
        patience_s: time limit for each later answer.
    """

    def __init__(self, controller: Any, start_s: float, patience_s: float) -> None:
        self.controller, self.limit_s, self.patience_s = controller, start_s, patience_s
        self.num_returned = 0  # events so far; the next request confirms that they were read
        self._ask()

    def _ask(self) -> None:
        asked = self.controller.drain.remote(self.num_returned)
        self.asked, self.looked, self.waited_s = asked, time.monotonic(), 0.0

    def drained(self, last: bool) -> tuple[list[dict[str, Any]], str | None]:
        """Events since the last answer, and any failure.

        Args:
            last: wait for all remaining events.

        Raises:
            RunFailedError: no answer came in time.
        """
        events, failure = list[dict[str, Any]](), None
        for _ in range(1 + last):  # with last, twice: the first request may have been made too early
            if not ray.wait([self.asked], timeout=self.limit_s if last else 0.1)[0]:
                now = time.monotonic()
                # A long gap between two looks means that this process itself was suspended: that time does not count.
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
        self.num_returned += len(events)
        return events, failure


def make_start_model(config: Config) -> None:
    """Pre-train the start model if the preset makes its own and it is missing."""
    model = provenance.start_model(config)
    if provenance.makes_start_model(config) and not provenance.is_made(model):
        begun = read_record(model.parent) is not None
        changes = {"output_dir": "", "resume": begun, "overwrite": False, "tracking_parent": ""}
        pretrain(relevance.only_read(override(config, changes), "pretrain"))


def _rl_rank(loop: dict[str, Any]) -> None:
    config = enter_rank(loop)
    from cola_ray.learner.train_loop import train_loop

    train_loop(config, loop["model_path"], actors.RemoteController(loop["controller"]))


def _rl_summary(config: Config, tracker: Tracker, found: Mapping[str, Any]) -> dict[str, Any]:
    """Figures known so far; a run that ended early may have few."""
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
    """Print derived numbers that people otherwise guess."""
    rl, ranks = config.rl, config.cluster.learner_ranks
    sequences, updates = rl.prompts_per_step * rl.group_size, rl.updates_per_batch * rl.num_minibatches
    current().say(
        f"a step: {rl.prompts_per_step} prompts x {rl.group_size} completions = {sequences} sequences; {ranks} ranks x "
        f"micro-batches of up to {rl.micro_batch_tokens} tokens; {updates} update(s); "
        f"rollouts up to {rl.max_staleness} version(s) behind"
    )
    if "num_too_long" not in facts:
        return  # an environment has no list of problems
    too_long = facts["num_too_long"], facts["num_heldout_too_long"]
    left_out = f"; {too_long[0]} and {too_long[1]} longer than rollout.max_prompt_tokens are left out"
    problems = f"{facts['num_train']} training problems, {facts['num_heldout']} held out"
    current().say(problems + (left_out if any(too_long) else ""))
