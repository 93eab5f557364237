"""Refuses combinations of settings, and jobs whose needs this machine does not meet, before a process starts.

    check(config, "rl_math")          # raises ConfigError: a line for each mistake

The limits of a single setting are in its type (config.py, limits.py); which options of algorithms can be combined is in
the table of combinations.py.
"""

import difflib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cola_ray import registry
from cola_ray.checks import engine_args, preflight
from cola_ray.runs import launch
from cola_ray.runs.followers import TRACKERS
from cola_ray.runs.redaction import redacted
from cola_ray.settings import combinations, matrix, relevance
from cola_ray.settings.config import (
    MULTI_TURN,
    NAMED,
    Config,
    ConfigError,
    TaskConfig,
    is_environment,
    named,
    schemas,
    value_at,
)
from cola_ray.settings.presets import trial
from cola_ray.tasks import inspection
from cola_ray.tasks.dataset import name_of as source_name
from cola_ray.tasks.rewarded import REWARD_MODEL, name_of
from cola_ray.tasks.weighing import TOOLS

_MOST_SEQUENCES = 2**20  # of a step, which are in memory together
_OF_OURS = ("soft_q", "bellman_residual", "replays", "critic", "turns")
"""Requirements that a user's algorithm cannot have."""


def check(config: Config, job: str = "") -> None:
    """Refuse settings that cannot run. Cheap: no weights are read, and neither torch nor Ray is imported.

    Args:
        job: the job to run, as ``outputs/<job>-<preset>`` names it; empty: check the settings by themselves.

    Raises:
        ConfigError: one line for each mistake: ``field = value: why; fix``.
    """
    unseen = preflight.unseen(config)
    if unseen:  # nothing more can be said about paths that the system refuses to look up
        raise ConfigError(redacted("\n".join(unseen)))
    nowhere = _check_named(config)
    if nowhere:  # what an algorithm or a task needs is not known then
        raise ConfigError("\n".join(nowhere))
    rules = (*_RULES, *_OF_JOB.get(job, ()))
    lines = dict.fromkeys(line for rule in rules for line in rule(config))
    lines |= dict.fromkeys([*_check_batches(config, job), *preflight.faults(config, job)])
    if job:
        lines |= dict.fromkeys(launch.refusals(config, job))
    lines |= dict.fromkeys([] if lines else preflight.further_faults(config, job))
    if lines:
        raise ConfigError(redacted("\n".join(lines)))


def _check_named(config: Config) -> list[str]:
    """Check that names of the registry exist and can be called as needed; tasks are tried later."""
    lines = [
        f"{field} = {value!r}: {why}"
        for field, value in named(config)
        if field != "task.name" and (why := registry.why_not(NAMED[field], value))
    ]
    if lines:
        return lines
    try:
        algorithm = config.algorithm
    except registry.NotFoundError as error:  # the name exists, but is not an algorithm
        return [f"rl.algorithm = {config.rl.algorithm!r}: {error}"]
    own = config.rl.algorithm not in registry.BUILT_IN["algorithm"]
    if own and any(getattr(algorithm, need) for need in _OF_OURS):
        needs = f"{', '.join(_OF_OURS[:-1])} and {_OF_OURS[-1]}"
        return [f"rl.algorithm = {config.rl.algorithm!r}: {needs} are needs of the project's own algorithms; let yours "
                "have an advantage, a loss or a value head"]  # fmt: skip
    return []


def _check_actions(config: Config) -> list[str]:
    """Check against the codebook that a run makes; a given model's own is looked at with its files."""
    given = config.model.path and (Path(config.model.path) / "config.json").is_file()
    if given or config.rl.action_space == "token" or config.rollout.top_k <= config.model.num_actions:
        return []
    return [
        f"rollout.top_k = {config.rollout.top_k}: the codebook has {config.model.num_actions} actions; "
        f"use 0 (all) to {config.model.num_actions}"
    ]


def _check_batches(config: Config, job: str) -> list[str]:
    ranks, lines = config.cluster.learner_ranks, []
    for fields, value in (
        (("rl.prompts_per_step", "rl.group_size"), config.rl.prompts_per_step * config.rl.group_size),
        (("pretrain.batch_size",), config.pretrain.batch_size),
    ):
        named = " x ".join(fields)
        if value % ranks and relevance.has_effect(config, job, fields[0]):
            lines.append(f"{named} = {value}: does not divide over cluster.learner_ranks = {ranks}; use a multiple")
        if value > _MOST_SEQUENCES:
            lines.append(f"{named} = {value}: sequences of one step; use at most {_MOST_SEQUENCES}")
    return lines


def _check_paths(config: Config) -> list[str]:
    lines = []
    if config.task.name == "dataset" and not config.task.path:
        lines.append("task.path = '': dataset needs rows: .jsonl, .parquet or .csv, a folder of them, or a hub id")
    if config.task.name == "preference" and not config.task.path:
        lines.append("task.path = '': preference needs rows with a column prompt: a file, a folder or a hub id")
    if config.task.name == "gsm8k" and not config.task.path:
        lines.append("task.path = '': gsm8k needs a folder with train.jsonl and test.jsonl, or openai/gsm8k")
    if config.task.name == "math500" and not config.task.path:
        lines.append("task.path = '': math500 needs a folder with test.jsonl, or HuggingFaceH4/MATH-500")
    return lines


def _check_sources(config: Config) -> list[str]:
    data, lines = config.data, list[str]()
    if not data.path:
        return []
    if data.prompt_field == data.response_field:
        lines.append(f"data.response_field = {data.response_field!r}: the column of prompts, too; name another")
    if data.path in data.more_paths:
        lines.append(f"data.more_paths = {data.more_paths}: data.path is there already; name each source once")
    if data.weights and len(data.weights) != len(data.sources):
        lines.append(f"data.weights = {data.weights}: not one for each source; give {len(data.sources)}, first that "
                     "of data.path")  # fmt: skip
    if data.streaming and not any(not preflight.looks_local(source) for source in data.sources):
        lines.append("data.streaming = True: files are read as they are; leave it out, or name a hub id")
    if data.max_broken == 1:
        lines.append("data.max_broken = 1.0: there may be nothing left to learn from; use less")
    return lines


def _check_stages_before(config: Config) -> list[str]:
    """Check that each stage has the stages that it needs before it."""
    stages, model = config.pretrain.stages, config.model
    if model.path or stages == ("base",):
        return []
    if "actions" not in stages:
        return [f"pretrain.stages = {stages}: {stages[0]} needs a model that has actions; give its --model.path, or "
                "the stage actions before it"]  # fmt: skip
    if "base" not in stages and not model.base:
        return [f"pretrain.stages = {stages}: there is no base; give --model.base, or the stage base before actions"]
    return []


def _check_base_alone(config: Config) -> list[str]:
    """Refuse the stage base on a CoLA model: training the base alone keeps nothing that was learned around it."""
    stages, path = config.pretrain.stages, config.model.path
    if not path or "base" not in stages:
        return []
    return [f"pretrain.stages = {stages}: base trains a base by itself, and model.path = {path!r} has actions around "
            "it already; leave the stage base out, or give a base by --model.base"]  # fmt: skip


def _check_start(config: Config) -> list[str]:
    """Check that the stages of pre-training before RL give the model that RL needs."""
    stages = config.pretrain.stages
    if stages == ("base",) and config.rl.action_space == "latent" and not config.model.path:
        return [f"pretrain.stages = {stages}: RL over latent actions needs more than a base; add actions and policy"]
    return _check_stages_before(config)


def _check_task(config: Config) -> list[str]:
    if config.task.name in ("textworld", "jericho") and importlib.util.find_spec(config.task.name) is None:
        return [f"task.name = {config.task.name!r}: needs the package {config.task.name}; `make games` installs it"]
    if config.task.name == "jericho" and not Path(config.task.game).is_file():
        return [f"task.game = {config.task.game!r}: no such file; give a z-machine game, e.g. detective.z5"]
    if config.task.oracle and config.task.name not in ("twenty_questions", "guess_city"):
        return [f"task.oracle = {config.task.oracle!r}: {config.task.name} asks nobody; leave it out"]
    if config.task.oracle and "OPENAI_BASE_URL" not in os.environ:
        return [f"task.oracle = {config.task.oracle!r}: set OPENAI_BASE_URL to an OpenAI-compatible endpoint"]
    why = inspection.unknown(config.task.name)
    return [f"task.name = {config.task.name!r}: {why}"] if why else []


def _check_trackers(config: Config) -> list[str]:
    lines = []
    for name in (one for one in TRACKERS if one in config.report_to):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of this name, such as a run's wandb/, is not a package
            lines.append(f"report_to = {config.report_to}: needs the package {name}; `pip install {name}` installs it")
    return lines


def _check_mixture(config: Config) -> list[str]:
    task, lines = config.task, list[str]()
    paths = (task.path, *task.more_paths)
    names = list(map(source_name, paths))
    if task.path in task.more_paths:
        lines.append(f"task.more_paths = {task.more_paths}: task.path is there already; name each source once")
    elif task.more_paths and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        lines.append(f"task.more_paths = {task.more_paths}: several are called {twice}, as their metrics are; rename "
                     "one")  # fmt: skip
    if task.weights and len(task.weights) != len(paths):
        lines.append(f"task.weights = {task.weights}: not one for each source; give {len(paths)}, first that of "
                     "task.path")  # fmt: skip
    return lines


def _check_rewards(config: Config) -> list[str]:
    """Check that the rewards of ``task.reward`` can be combined."""
    task, lines = config.task, list[str]()
    names = list(map(name_of, task.reward))
    if "verifier" in task.reward and task.name in relevance.UNSCORED:
        lines.append(f"task.reward = 'verifier': {task.name} has none; leave it out")
    for path, name in zip(task.reward, names, strict=True):
        if names.count(name) > 1:
            lines.append(f"task.reward = {path!r}: several rewards are called {name}, as their metrics are; rename one")
        elif name in _METRICS:
            lines.append(f"task.reward = {path!r}: reward/{name} is a metric already; rename the function")
    if task.reward_weights and len(task.reward_weights) != len(names):
        lines.append(f"task.reward_weights = {task.reward_weights}: not one for each reward; give {len(names)}")
    elif task.reward_weights and not any(task.reward_weights):
        lines.append(f"task.reward_weights = {task.reward_weights}: no reward counts; let one of them be other than 0")
    if "regex" in names and not task.pattern:
        lines.append("task.pattern = '': the reward regex searches for it; give a regular expression")
    if REWARD_MODEL in names and not task.reward_model:
        lines.append("task.reward_model = '': the reward reward_model asks it; give a classifier or an endpoint")
    if task.thinking and (len(names) > 1 or _any_takes_batches(task.reward)):
        lines.append("task.thinking = True: hands the answer alone to one reward (problem, response); leave it out, "
                     "and add format to task.reward")  # fmt: skip
    return lines


_METRICS = ("mean", "std", "failed", "clipped", "zero_variance_groups", "taught_groups")


def _any_takes_batches(rewards: Iterable[str]) -> bool:
    own = (one for one in rewards if one not in registry.BUILT_IN["reward"])
    return any(registry.takes_batches(registry.find("reward", one)) for one in own)


def _unlike(config: Config, wants: Mapping[str, Any], whose: str) -> list[str]:
    """A line for each dotted field that does not have the value that the setting ``whose`` needs."""
    given = {field: value_at(config, field) for field in wants}
    return [f"{field} = {given[field]!r}: {whose} needs {want!r}" for field, want in wants.items()
            if given[field] != want]  # fmt: skip


def _check_answers(config: Config) -> list[str]:
    if "mcts_q" not in config.eval.ways:
        return []
    if not config.q.path:
        return ["q.path = '': mcts_q asks a Q; train one with `cola_ray train-q` and give its folder model/"]
    return _unlike(config, {"rl.action_space": "latent", "rl.actor_free": False}, "mcts_q")


# --- what single jobs refuse --------------------------------------------------------------------------------------


def _check_reward_model(config: Config) -> list[str]:
    lines = []
    if config.task.name != "preference":
        lines.append(f"task.name = {config.task.name!r}: reward models learn from preference pairs; use preference")
    if not (config.model.base or config.model.path):
        lines.append("model.base = '': a reward model starts from a base; give a directory, a hub id or .gguf file")
    return lines


def _check_logged(config: Config) -> list[str]:
    if config.data.path:
        return []
    return ["data.path = '': Q learns from logged answers; log some with `cola_ray evaluate --eval.split train "
            "--eval.ways sample` and give its folder predictions/sample"]  # fmt: skip


def _check_problems(config: Config) -> list[str]:
    task = config.task
    if is_environment(task.name):
        return [f"task.name = {task.name!r}: an environment of many turns; use `cola_ray agent`"]
    if task.reward and task.reward_model and REWARD_MODEL not in task.reward:
        return [f"task.reward = {task.reward!r}: task.reward_model scores responses, too; leave one of them out, or "
                "add reward_model to task.reward"]  # fmt: skip
    if task.name == "dataset" and not (task.reward_model or task.reward):
        return [f"task.reward = (): rows do not say what a response is worth; {_GIVE_REWARD}"]
    if task.name == "preference" and not (task.reward_model or task.reward):
        return ["task.reward_model = '': preference has no verifier; give a model that `cola_ray reward-model` left, "
                "any sequence classifier, or an http(s) endpoint; or task.reward"]  # fmt: skip
    if task.name not in relevance.UNSCORED and task.reward_model and not task.reward:
        return [f"task.reward_model = {task.reward_model!r}: {task.name} has a verifier; leave it out, or let "
                "task.reward be reward_model"]  # fmt: skip
    return []


_GIVE_REWARD = (
    "give exact, math, format, regex, length, code or reward_model, or a function of your own as FILE.py:name"
)


def _check_preferences(config: Config) -> list[str]:
    if config.task.name == "preference":
        return _check_problems(config)
    command = "agent" if is_environment(config.task.name) else "rl"
    return [f"task.name = {config.task.name!r}: rl_preference learns from a reward model; use `cola_ray {command}`"]


def _check_agent(config: Config) -> list[str]:
    if config.task.name == "tools":
        return _check_tools(config.task)
    if is_environment(config.task.name) or _check_task(config):
        return []
    known = ", ".join(MULTI_TURN)
    return [
        f"task.name = {config.task.name!r}: not an environment, which has reset and step; use {known} or your own class"
    ]


def _check_tools(task: TaskConfig) -> list[str]:
    """Check the questions and rewards of the task tools."""
    if not task.path and task.tools and not {*TOOLS} <= {*task.tools}:
        return [f"task.tools = {task.tools}: drawn questions need {' and '.join(TOOLS)}; name them, too, or give rows "
                "by task.path"]  # fmt: skip
    if task.path and not task.reward:
        return ["task.reward = (): rows do not say what an answer is worth; give exact, math, format, regex, length or "
                "code, or a function of your own as FILE.py:name"]  # fmt: skip
    if REWARD_MODEL in task.reward:
        return [f"task.reward = {task.reward!r}: answers that tools lead to are scored where tools are called, without "
                "a reward model; leave reward_model out"]  # fmt: skip
    if task.path and "verifier" in task.reward:
        return [f"task.reward = {task.reward!r}: rows have no verifier; leave it out"]
    return []


def _check_shown(config: Config) -> list[str]:
    if not is_environment(config.task.name):
        return []
    return [f"task.name = {config.task.name!r}: an environment of many turns has no rows; use a task with answers"]


def _check_evaluation(config: Config) -> list[str]:
    if config.task.name == "tools":
        return _check_tools(config.task)
    if config.task.name == "dataset" and not config.task.reward:
        return [f"task.reward = (): rows do not say what a response is worth; {_GIVE_REWARD}"]
    if config.task.name == "preference" and not config.task.reward:
        return ["task.name = 'preference': has no verifier; give task.reward, or use another task or an environment"]
    if REWARD_MODEL in config.task.reward:
        return [f"task.reward = {config.task.reward!r}: in evaluations the reward model chooses among answers, which "
                "the others score; leave reward_model out of task.reward"]  # fmt: skip
    ks, most = config.eval.ks, config.search.simulations
    usual = relevance.defaults(config).eval.ks
    if "sample" in config.eval.ways and ks != usual and max(ks, default=0) > most:
        return [f"eval.ks = {ks}: of search.simulations = {most} samples; use at most that, or more simulations"]
    searches = [way for way in config.eval.ways if way not in ("base", "greedy", "sample")]
    if not searches or not is_environment(config.task.name):
        return []
    return [f"eval.ways = {searches[0]!r}: searches answers of one turn; use base, greedy or sample to play "
            f"{config.task.name}"]  # fmt: skip


def _check_harness(config: Config) -> list[str]:
    lines = _lacking("lm_eval", "harness.tasks", config.harness.tasks)
    if not config.harness.tasks:
        lines.append("harness.tasks = (): nothing to score on; name tasks of the harness, e.g. arc_easy")
    return lines


def _check_encoder(config: Config) -> list[str]:
    return _lacking("sentence_transformers", "diversity.encoder", config.diversity.encoder)


def _lacking(package: str, field: str, value: object) -> list[str]:
    if importlib.util.find_spec(package):
        return []
    return [f"{field} = {value!r}: needs the package {package}; `make evals` installs it"]


def _check_sweep(config: Config) -> list[str]:
    sweep, lines = config.sweep, list[str]()
    if sweep.asha and sweep.grace_steps > config.rl.max_steps:
        lines.append(f"sweep.grace_steps = {sweep.grace_steps}: no run would be stopped early; use at most "
                     f"rl.max_steps = {config.rl.max_steps}")  # fmt: skip
    near = difflib.get_close_matches(sweep.field, schemas(), n=1)
    if sweep.field not in schemas():
        hint = f"did you mean {near[0]}?" if near else "name a dotted field"
        return [*lines, f"sweep.field = {sweep.field!r}: no such field; {hint}"]
    if {sweep.field, sweep.field.partition(".")[0]} & {*_ONE_OF_A_SWEEP}:
        return [*lines, f"sweep.field = {sweep.field!r}: each run has its own, or all have one; name another field"]
    if sweep.field.startswith(("pretrain.", "data.", "model.")) and sweep.field != "model.dtype":
        return [f"sweep.field = {sweep.field!r}: all runs start from one model; train one a value with "
                "`cola_ray pretrain` and run `cola_ray rl` from each"]  # fmt: skip
    if sweep.field in relevance.given(config):
        given = value_at(config, sweep.field)
        lines.append(f"{sweep.field} = {given!r}: has no effect here; sweep.values do")
    for value in sweep.values:
        try:
            check(trial(config, value, sweep.seeds[0]), "rl_agent" if is_environment(config.task.name) else "rl_math")
        except ConfigError as error:
            lines += str(error).splitlines()
    return lines


def _check_stages(config: Config) -> list[str]:
    try:
        stages = matrix.chosen(config)
    except ConfigError as error:
        return str(error).splitlines()
    jobs = {stage.job for stage in stages}
    if any(stage.name == "own_answers" for stage in stages) and not config.model.base:
        return [f"task.name = {config.task.name!r}: latent actions are learnt from a base's answers, and this preset "
                "has no base; use --preset smollm2-135m, or give texts as --data.path"]  # fmt: skip
    lacking = _lacking("lm_eval", "reproduce.stages", "capabilities") if "capabilities" in jobs else []
    if config.task.name in relevance.UNSCORED:
        lacking.append(f"task.name = {config.task.name!r}: has no verifier, which stages ask; use a task that has one")
    if redacted(config.tracking_uri) != config.tracking_uri:
        lacking.append(
            f"tracking_uri = {redacted(config.tracking_uri)!r}: its secret would stand in the command lines of stages; "
            "leave it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return lacking + (_lacking("sentence_transformers", "reproduce.stages", "diversity") if "diversity" in jobs else [])


_ONE_OF_A_SWEEP = ("cluster.address", "output_dir", "overwrite", "preset", "resume", "seed", "sweep", "tracking_parent",
                   "report_to", "tracking_uri")  # fmt: skip

Rule = Callable[[Config], list[str]]

_RULES: tuple[Rule, ...] = (
    combinations.refused,
    _check_actions,
    engine_args.faults,
    _check_paths,
    _check_sources,
    _check_mixture,
    _check_trackers,
    _check_rewards,
    _check_task,
    _check_answers,
)

_OF_JOB: dict[str, tuple[Rule, ...]] = {
    "pretrain": (_check_stages_before, _check_base_alone),
    "reward_model": (_check_reward_model,),
    "train_q": (_check_logged,),
    "rl_math": (_check_problems, _check_start),
    "rl_preference": (_check_preferences, _check_start),
    "rl_agent": (_check_agent, _check_start),
    "sweep": (_check_sweep, _check_start),
    "evaluate": (_check_evaluation,),
    "diversity": (_check_encoder,),
    "capabilities": (_check_harness,),
    "reproduce": (_check_stages,),
    "data": (_check_shown,),
}
