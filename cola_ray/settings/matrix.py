"""The papers' matrix as a graph of stages: what each preset runs, with which settings, and which other stages' models
and answers it reads.

stages(config)      all of it, for one seed
chosen(config)      those of ``reproduce.stages``, and what they need, for each of ``reproduce.seeds``
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cola_ray.settings import relevance
from cola_ray.settings.config import Config, ConfigError, override, schemas
from cola_ray.settings.limits import nearest
from cola_ray.settings.presets import preset


@dataclass(frozen=True)
class Stage:
    """One job of the matrix. In settings, ``{name}`` is the folder of another stage, which this one then waits for."""

    name: str
    job: str
    settings: Sequence[str] = field(default=())
    seed: int = 0

    @property
    def folder(self) -> str:
        """Identifies the stage among those of all seeds."""
        return folder_of(self.name, self.seed)

    @property
    def names(self) -> list[str]:
        """Names of the stages that the settings refer to."""
        words = " ".join(self.settings).split("{")[1:]
        return list(dict.fromkeys(word.split("}")[0] for word in words))

    @property
    def needs(self) -> list[str]:
        """Folders of these stages, with the same seed."""
        return [folder_of(name, self.seed) for name in self.names]


def folder_of(name: str, seed: int | str) -> str:
    """The folder of a stage; with ``seed`` "*" a pattern for those of all seeds."""
    return f"{name}-seed{seed}"


def stage_of(folder: str) -> tuple[str, int]:
    """Name and seed of the stage that has this folder. Example: "rl_latent-seed3" -> "rl_latent", 3."""
    name, _, seed = folder.rpartition("-seed")
    return name, int(seed)


def stages(config: Config) -> list[Stage]:
    """The matrix of a preset and a seed; sizes are the papers' or, for tiny and smollm2-135m, what two cores can do in
    hours.

    The matrix of smollm2-135m leaves out Countdown, since its base solves none of it.
    """
    tiny, small = config.preset == "tiny", config.preset in _TOKEN_LR
    own = ["--data.path", "{own_answers}/answers.jsonl"] if learns_from_answers(config) else []
    start = ["--model.path", "{pretrain}/model"]
    trained = ["--model.path", "{rl_latent}/model"]
    few = ["--rl.max-steps", "40"] if small else []
    steps = [] if tiny else few
    token_lr = _TOKEN_LR.get(config.preset, [])
    countdown = ["--task.name", "countdown", "--task.thinking", *(_TINY_COUNTDOWN if tiny else [])]
    learnt, short = (_TINY_COUNTDOWN_PRETRAINING, _TINY_COUNTDOWN_ROLLOUTS) if tiny else ([], [])
    agent = ["--task.name", "twenty_questions", "--model.path", "{agent_start}/model"]
    agent_steps = ["--rl.max-steps", "30", "--rl.eval-every", "0"] if small else []
    if small and not tiny:  # tiny's preset has more
        agent_steps += ["--rl.prompts-per-step", "16"]
    asked = ["--eval.problems", "256"] if small else []
    logged = ["--eval.problems", "2048" if small else "7000", "--search.simulations", "16"]
    values = ["--sweep.values", "0", "0.001", "0.01", "0.1", "--sweep.seeds", str(config.seed)]
    values += ["--sweep.parallel", "1"] if small else []

    def math(job: str) -> list[str]:
        """The task, with those of its settings that the job reads."""
        path = ["--task.path", config.task.path] if config.task.path else []
        return ["--task.name", config.task.name, *path, *_said(config, "task", job, ("name", "path"))]

    def texts(job: str) -> list[str]:
        return [*math(job), *own, *_said(config, "data", job, ("date",))]

    asks, learns, trains = math("evaluate"), texts("pretrain"), math("rl_math")
    found = [
        Stage("own_answers", "evaluate", [*asks, "--rl.action-space", "token", "--eval.split", "train", "--eval.ways",
                                          "sample", "--eval.problems", "3000", "--search.simulations", "2"]),
        Stage("pretrain", "pretrain", learns),
        Stage("fta", "pretrain", [*learns, *start, "--pretrain.stages", "fta_idm", "fta_policy"]),
        Stage("rl_latent", "rl_math", [*trains, *start, *steps]),
        Stage("rl_token", "rl_math", [*trains, *start, *steps, "--rl.action-space", "token", *token_lr]),
        Stage("rl_fta", "rl_math", [*trains, "--model.path", "{fta}/model", *few]),
        Stage("kl_sweep", "sweep", [*math("sweep"), *start, *values, *few]),
        Stage("etpo", "rl_math", [*trains, *start, "--rl.algorithm", "etpo", "--rl.kl-coef", "0.05", *few]),
        Stage("countdown_start", "pretrain", [*countdown, *learnt]),
        Stage("countdown_latent", "rl_math", [*countdown, *short, "--model.path", "{countdown_start}/model", *few]),
        Stage("countdown_token", "rl_math", [*countdown, *short, "--model.path", "{countdown_start}/model", *few,
                                             "--rl.action-space", "token", *token_lr]),
        Stage("agent_start", "pretrain", ["--task.name", "twenty_questions"]),
        Stage("agent_archer", "rl_agent", [*agent, *agent_steps]),
        Stage("agent_ppo", "rl_agent", [*agent, *agent_steps, "--rl.algorithm", "ppo"]),
        Stage("answers", "evaluate", [*asks, *trained, "--eval.split", "train", "--eval.ways", "sample", *logged]),
        Stage("q", "train_q", [*trained, "--data.path", "{answers}/predictions/sample"]),
        Stage("search", "evaluate", [*asks, *trained, *asked, "--q.path", "{q}/model", "--eval.ways", "base", "greedy",
                                     "sample", "beam", "mcts", "mcts_q"]),
        Stage("diversity", "diversity", [*texts("diversity"), *start]),
        Stage("capabilities", "capabilities", [*start, *_harness(config)]),
        Stage("atlas", "atlas", [*texts("atlas"), *start]),
    ]  # fmt: skip
    left_out = [*([] if own else ["own_answers"]), *(["countdown"] if small and not tiny else [])]
    return [stage for stage in found if not stage.name.startswith(tuple(left_out))]


def learns_from_answers(config: Config) -> bool:
    """Whether latent actions are learnt from the base's own answers, since the task instructions demonstrates none."""
    return config.task.name == "instructions" and not config.data.path


def chosen(config: Config) -> list[Stage]:
    """The stages of ``reproduce.stages`` and all that they need, seed by seed; ConfigError for an unknown name."""
    matrix = {stage.name: stage for stage in stages(config)}
    unknown = [name for name in config.reproduce.stages if name not in matrix]
    if unknown:
        lines = (f"reproduce.stages = {name!r}: {nearest(name, list(matrix), 'no such stage')}" for name in unknown)
        raise ConfigError("\n".join(lines))
    wanted = set(config.reproduce.stages or matrix)
    for stage in reversed(matrix.values()):  # a stage comes after those that it needs
        wanted |= set(stage.names) if stage.name in wanted else set()
    return [
        replace(stage, seed=seed)
        for seed in config.reproduce.seeds or (config.seed,)
        for stage in stages(override(config, {"seed": seed}))
        if stage.name in wanted
    ]


def _harness(config: Config) -> list[str]:
    """Tasks for the evaluation harness: those given, else the paper's; for small presets sums, by ``write_sums``."""
    said = _said(config, "harness", "capabilities")
    if config.harness.tasks:
        return said
    if config.preset in _TOKEN_LR:
        return [*said, "--harness.tasks", "sums", "--harness.include-path", str(Path(config.output_dir) / "sums")]
    return [*said, "--harness.tasks", "mmlu", "mathqa", "cmmlu"]


# What small presets train tokens with, whose learning rate is that of latent actions.
_TOKEN_LR = {"tiny": ["--rl.lr", "1e-4"], "smollm2-135m": ["--rl.lr", "1e-5"]}
# The part of Countdown that a base of a million parameters can learn: which sign to put between two small numbers.
_TINY_COUNTDOWN = ["--task.options", "min_numbers", "2", "max_numbers", "2", "min_value", "1", "max_value", "12",
                   "min_target", "1", "max_target", "40"]  # fmt: skip
_TINY_COUNTDOWN_ROLLOUTS = ["--rollout.max-prompt-tokens", "160", "--rollout.max-new-tokens", "24"]
_TINY_COUNTDOWN_PRETRAINING = ["--pretrain.sequence-length", "176", "--pretrain.steps.base", "800"]


def machines(config: Config, job: str) -> list[str]:
    """Command-line words that pass on the user's settings of engines, ranks and tracking, if the stage's job reads
    them."""
    usual = preset(config.preset)
    # Two stages of one rank each keep two cores busier than one stage of two ranks, which wait for each other.
    changes: dict[str, Any] = {"cluster.learner_ranks": 1} if config.preset == "tiny" else {}
    for branch in ("rollout", "cluster"):
        now, before = getattr(config, branch).model_dump(), getattr(usual, branch).model_dump()
        changes |= {f"{branch}.{name}": value for name, value in now.items() if value != before[name]}
    changes.pop("cluster.address", None)  # Ray tells a job which cluster it is on
    for name in ("report_to", "tracking_uri"):
        if getattr(config, name) != getattr(usual, name):
            changes[name] = getattr(config, name)
    return as_words({name: value for name, value in changes.items() if relevance.reads(job, name)})


def _said(config: Config, branch: str, job: str, without: Sequence[str] = ()) -> list[str]:
    """The settings that were given in a branch and have an effect in the job, as command-line words."""
    given = {name: value for name, value in relevance.given(config).items() if name.startswith(f"{branch}.")}
    return as_words({name: value for name, value in given.items()
                     if name.partition(".")[2] not in without and relevance.has_effect(config, job, name)})  # fmt: skip


def as_words(changes: Mapping[str, Any]) -> list[str]:
    """Settings by dotted field, as command-line words."""
    words: list[str] = []
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in schemas():  # an entry of a dictionary, whose value is always said
            words += [f"--{name}", str(value)]
        elif isinstance(value, bool):
            branch, dot, last = flag.removeprefix("--").rpartition(".")
            words.append(flag if value else f"--{branch}{dot}no-{last}")
        else:
            words += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return words
