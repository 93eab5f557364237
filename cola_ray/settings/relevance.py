"""Which settings a job reads. A setting that was given but has no effect is refused, since the user expects an effect.

unread(config, "rl_math")      # ["critic.steps = 9: rl_math does not read it; rl_agent and sweep do"]
given(config)                  # what differs from the preset, by dotted field
"""

import fnmatch
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cola_ray.settings.algorithms import OF_TURNS
from cola_ray.settings.config import Config, flat, is_environment, override
from cola_ray.settings.presets import preset
from cola_ray.settings.training import SIZES

ON_GPU = ("gpu_memory_utilization", "quantization", "kv_cache_dtype", "enforce_eager", "optimization_level",
          "async_scheduling")  # fmt: skip
"""Settings of ``rollout`` that only apply to engines on GPUs."""
OF_ROWS = ("dataset", "gsm8k", "math500", "preference")
"""Tasks that are read from files or the hub rather than generated."""
UNSCORED = ("preference", "dataset")
"""Tasks without a verifier: ``task.reward`` or ``task.reward_model`` says what a response is worth."""

_RUN = ("preset", "output_dir", "seed", "resume", "overwrite", "report_to", "tracking_uri", "tracking_parent",
        "cluster.address", "cluster.use_gpu",
        "cluster.threads_per_process", "cluster.*_group", "cluster.answer_timeout_s")  # fmt: skip
_SIZES = tuple(f"model.{name}" for name in SIZES)
_TRAINS = ("cluster.learner_*", "cluster.max_failures", "pretrain.max_steps", "pretrain.batch_size",
           "pretrain.micro_batch_size", "pretrain.warmup_steps", "pretrain.min_lr_ratio",
           "pretrain.save_every")  # fmt: skip
_MEMORY = ("cluster.gradient_checkpointing", "cluster.offload_optimizer")
_SERVED = ("rollout.tensor_parallel_size", "rollout.temperature", "rollout.top_k", "rollout.top_p",
           "rollout.max_*", "rollout.kv_cache_mb", "rollout.engine_args.*", "cluster.rollout_group",
           *(f"rollout.{name}" for name in ON_GPU), "rollout.prefix_caching")  # fmt: skip
_TEXTS = ("task.*", "data.path", "data.*_field", "data.date")
_CORPUS = ("data.path", "data.more_paths", "data.weights", "data.streaming", "data.max_broken", "data.cache",
           "data.processes")  # fmt: skip
_RL = ("model.*", "task.*", "data.*", "pretrain.*", "rollout.*", "rl.*", "samples.*", "cluster.*")
_RL_JOBS = ("rl_math", "rl_preference", "rl_agent", "sweep")
_READ: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("model.*", "task.*", "data.*", "pretrain.*", "cluster.learner_*", "cluster.max_failures", *_MEMORY,
                 "cluster.offload_frozen"),
    "reward_model": ("model.path", "model.base", "model.family", "model.dtype", "task.name", "task.path", "data.date",
                     *_TRAINS, *_MEMORY,
                     "pretrain.steps.reward", "pretrain.base_lr", "pretrain.sequence_length",
                     "pretrain.adam_betas"),
    "train_q": ("model.path", "model.dtype", "task.name", "data.path", *_TRAINS, "pretrain.steps.q", "q.gamma", "q.lr",
                "q.copy_every"),
    "rl_math": (*_RL, "replay.*"),
    "rl_preference": (*_RL, "replay.*"),
    "rl_agent": (*_RL, "replay.*", "critic.*"),
    "sweep": (*_RL, "replay.*", "critic.*", "sweep.*"),
    "evaluate": ("model.path", "model.base", "model.family", "model.dtype", "task.*", "data.date",
                 "data.chat_options.*", "rollout.*", "eval.*", "search.*", "q.path", "q.gamma", "q.max_error",
                 "q.jump", "rl.action_space", "rl.actor_free", "rl.algorithm", "rl.kl_coef",
                 "cluster.rollout_group", "cluster.service_group", "cluster.stall_timeout_s"),
    "diversity": ("model.path", "model.dtype", *_TEXTS, "diversity.*", *_SERVED),
    "atlas": ("model.path", "model.dtype", *_TEXTS, "diversity.prefixes", "diversity.prefix_tokens",
              "pretrain.sequence_length", "pretrain.response_only", "pretrain.micro_batch_size",
              "rollout.max_prompt_tokens", "rollout.max_new_tokens"),
    "capabilities": ("model.path", "model.dtype", "harness.*"),
    "reproduce": ("task.*", "data.*", "rollout.*", "cluster.*", "harness.*", "reproduce.*"),
    "data": ("model.path", "model.base", "model.family", "task.*", "data.date", "data.chat_options.*",
             "rollout.max_prompt_tokens"),
    "plan": ("*",),
}  # fmt: skip
"""Settings by job, in addition to those that every run reads."""


@dataclass(frozen=True)
class _Only:
    """Fields that have an effect only under some settings."""

    fields: tuple[str, ...]
    when: Callable[[Config, str], bool]
    readers: str  # who reads them, to end a sentence


def _named(*names: str) -> Callable[[Config, str], bool]:
    return lambda config, _: config.task.name in names or ":" in config.task.name


def _trains_agent(config: Config, job: str) -> bool:
    return job == "rl_agent" or (job == "sweep" and is_environment(config.task.name))


def _pretrains(config: Config, job: str) -> bool:
    """Whether the job pre-trains, or looks for a model that was pre-trained with these settings."""
    return job in ("pretrain", "plan") or (job in _RL_JOBS and not config.model.path and not _on_plain_base(config))


def _on_plain_base(config: Config) -> bool:
    """Whether RL over tokens was given a plain base, without a CoLA model around it."""
    return config.rl.action_space == "token" and config.model.base != defaults(config).model.base


def _stage(*stages: str) -> Callable[[Config, str], bool]:
    return lambda config, job: not _pretrains(config, job) or bool({*stages} & {*config.pretrain.stages})


_SEARCHES = ("beam", "mcts", "mcts_q")
_ONLY: tuple[_Only, ...] = (
    _Only(("task.path",), _named("dataset", "gsm8k", "math500", "preference", "data_science", "tools"),
          "of task.name, dataset, gsm8k, math500, preference, data_science, tools or a class of your own does"),
    _Only(("task.columns.*", "task.splits.*", "task.subset", "task.more_paths", "task.weights"),
          lambda c, job: _named("dataset")(c, job) or (c.task.name == "tools" and bool(c.task.path)),
          "dataset does, and tools with rows of task.path"),
    _Only(("task.game",), _named("jericho"), "jericho does"),
    _Only(("task.command",), lambda c, _: c.task.name == "program", "program does"),
    _Only(("task.tools",), lambda c, _: c.task.name == "tools", "of task.name, tools does"),
    _Only(("task.tool_parser",), lambda c, _: c.task.name in ("program", "tools"), "program and tools do"),
    _Only(("task.options.*",), lambda c, _: c.task.name not in OF_ROWS,
          "arithmetic, instructions, generators of reasoning-gym and environments do"),
    _Only(("task.thinking",), lambda c, _: c.task.name != "preference" and not is_environment(c.task.name),
          "tasks with a verifier do"),
    _Only(("task.num_problems",), lambda c, job: c.task.name not in OF_ROWS
          and (not is_environment(c.task.name) or (job != "evaluate" and (job in ("atlas", "diversity", "reproduce")
                                                                         or _pretrains(c, job)))),
          "procedural generators do, and for agents pre-training does"),
    _Only(("task.reward_model",), lambda c, job: job in ("evaluate", "plan") or (job in ("rl_preference", "rl_math",
          "sweep") and (c.task.name in UNSCORED
          or "reward_model" in c.task.reward)),
          "preference, dataset and evaluate do, and the reward reward_model"),
    _Only(("task.reward_weights",), lambda c, _: bool(c.task.reward), "task.reward does"),
    _Only(("task.pattern",), lambda c, _: "regex" in c.task.reward, "of task.reward, regex does"),
    _Only(("task.length",), lambda c, _: "length" in c.task.reward, "of task.reward, length does"),
    _Only(("task.reward", "task.reward_weights", "task.pattern", "task.length"),
          lambda c, job: job in ("rl_math", "rl_preference", "rl_agent", "sweep", "evaluate", "plan", "data")
          and (c.task.name == "tools" or not is_environment(c.task.name)),
          "RL and evaluate do, of tasks with answers and of tools"),
    _Only(("task.right_from",),
          lambda c, job: job in ("rl_math", "rl_preference", "sweep", "evaluate", "plan", "data")
          and not is_environment(c.task.name), "RL and evaluate do, of tasks with answers"),
    _Only(("task.oracle",), lambda c, job: job in ("rl_agent", "sweep", "evaluate", "plan"),
          "rl_agent and evaluate do"),
    _Only(("task.reward_timeout_s", "task.max_failed_rewards"),
          lambda _, job: job not in ("pretrain", "diversity", "atlas"), "RL and evaluate do"),
    _Only(("data.chat_options.*",),
          lambda c, _: not is_environment(c.task.name) or c.task.name in ("program", "tools") or bool(c.data.path),
          "tasks with questions, agent programs and tools do, and rows of data.path"),
    _Only(("data.prompt_field", "data.response_field", "data.text_field", "data.more_paths", "data.weights",
           "data.streaming", "data.max_broken", "data.cache", "data.processes"), lambda c, _: bool(c.data.path),
          "rows of data.path do"),
    _Only(("model.base", "model.family"), lambda c, _: not c.model.path, "a run without model.path does"),
    _Only(("pretrain.*", *_CORPUS), lambda c, job: job not in _RL_JOBS or not c.model.path,
          "pre-training does, and model.path is a model that has had it"),
    _Only(("pretrain.*", *_CORPUS, *_SIZES), lambda c, job: job not in _RL_JOBS or bool(c.model.path)
          or not _on_plain_base(c), "pre-training does, and model.base is trained as it is"),
    _Only(_SIZES, lambda c, job: job != "pretrain" or c.pretrain.stages != ("base",),
          "the stages actions and policy do"),
    _Only(("rollout.temperature", "rollout.top_k", "rollout.top_p"),
          lambda c, job: job != "evaluate" or not {*c.eval.ways} <= {"base", "greedy"},
          "of eval.ways, sample, beam, mcts and mcts_q do"),
    _Only(("pretrain.gumbel_tau", "pretrain.entropy_coef", "pretrain.balance_coef", "pretrain.revive_every"),
          _stage("actions"), "the stage actions does"),
    _Only(("pretrain.switch_cost",), lambda c, job: c.model.learnt_ends and _stage("actions")(c, job),
          "the stage actions does, with model.learnt_ends"),
    _Only(("pretrain.steps.base",), _stage("base"), "the stage base does"),
    _Only(("pretrain.steps.actions",), _stage("actions"), "the stage actions does"),
    _Only(("pretrain.steps.policy",), _stage("policy"), "the stage policy does"),
    _Only(("pretrain.steps.fta_idm",), _stage("fta_idm"), "the stage fta_idm does"),
    _Only(("pretrain.steps.fta_policy",), _stage("fta_policy"), "the stage fta_policy does"),
    _Only(("pretrain.steps.reward",), lambda _, job: job in ("reward_model", "plan"), "reward_model does"),
    _Only(("pretrain.steps.q",), lambda _, job: job in ("train_q", "plan"), "train_q does"),
    _Only(("pretrain.lr", "pretrain.states", "pretrain.states_cache", "pretrain.states_gb"),
          _stage("actions", "policy"), "the stages actions and policy do"),
    _Only(("pretrain.base_lr",),
          lambda c, job: job == "reward_model" or _stage("base", "fta_idm", "fta_policy")(c, job),
          "the stages base, fta_idm and fta_policy do"),
    _Only(tuple(f"rollout.{name}" for name in ON_GPU), lambda c, _: c.cluster.use_gpu,
          "engines on GPUs do, with cluster.use_gpu"),
    _Only(("rollout.kv_cache_mb",), lambda c, _: not c.cluster.use_gpu,
          "engines on CPU do; on GPU use rollout.gpu_memory_utilization"),
    _Only(("cluster.offload_frozen",), lambda c, job: job != "pretrain" or c.pretrain.stages != ("base",),
          "stages after base do"),
    _Only(("rollout.environment_processes",), lambda c, _: is_environment(c.task.name), "agents do"),
    _Only(("rollout.in_rounds",),
          lambda c, job: job == "plan" or (_trains_agent(c, job) and c.task.name != "program"),
          "rl_agent does, of environments"),
    _Only(("critic.gamma",), lambda c, job: job == "plan" or _trains_agent(c, job), "agents do"),
    _Only(("critic.fresh_states",), lambda c, job: job == "plan" or (_trains_agent(c, job)
          and c.algorithm.replays), f"{', '.join(OF_TURNS)} do"),
    _Only(tuple(f"critic.{name}" for name in (
        "gpu_share", "encoder", "replicas", "tau", "lr", "grad_clip", "steps", "batch_size", "warmup_iterations",
        "candidates", "chooses", "priority_beta", "actor_states", "reuse", "td_share", "token_baseline", "expectile")),
          lambda c, job: job == "plan" or (_trains_agent(c, job) and c.algorithm.critic),
          "archer, archer_soft and chai do, of agents"),
    _Only(("tracking_uri",), lambda c, _: "mlflow" in c.report_to, "with mlflow in report_to it has"),
    _Only(("samples.every", "samples.max_mb"), lambda c, _: c.samples.prompts > 0, "samples.prompts above 0 does"),
    _Only(("replay.*",), lambda c, job: job == "plan" or c.replays, f"{', '.join(OF_TURNS)} and rl.actor_free do"),
    _Only(("replay.kept_share",), lambda c, job: job == "plan" or c.rl.algorithm == "filtered_bc", "filtered_bc does"),
    _Only(("search.simulations",), lambda c, _: bool({"sample", *_SEARCHES} & {*c.eval.ways}),
          "of eval.ways, sample, beam, mcts and mcts_q do"),
    _Only(("search.max_tokens", "search.max_seconds"), lambda c, _: bool({"sample", *_SEARCHES} & {*c.eval.ways}),
          "of eval.ways, sample, beam, mcts and mcts_q do"),
    _Only(tuple(f"search.{name}" for name in ("root_breadth", "breadth", "depth", "c_puct", "searchers")),
          lambda c, _: bool({*_SEARCHES} & {*c.eval.ways}), "of eval.ways, beam, mcts and mcts_q do"),
    _Only(("q.path", "q.max_error", "q.jump"), lambda c, job: job == "plan" or "mcts_q" in c.eval.ways,
          "of eval.ways, mcts_q does"),
    _Only(("q.gamma",), lambda c, job: job in ("plan", "train_q") or "mcts_q" in c.eval.ways,
          "train_q does, and of eval.ways mcts_q"),
    _Only(("rl.algorithm", "rl.kl_coef"), lambda c, job: job != "evaluate" or c.rl.actor_free,
          "RL does, and of evaluations that of rl.actor_free"),
    _Only(("eval.ks",), lambda c, _: "sample" in c.eval.ways, "of eval.ways, sample does"),
    _Only(("sweep.grace_steps",), lambda c, _: c.sweep.asha, "sweep.asha does"),
)  # fmt: skip


def defaults(config: Config) -> Config:
    """The preset's tree for this kind of task."""
    return _usual(config.preset, config.task.name)


@functools.lru_cache(maxsize=8)
def _usual(name: str, task: str) -> Config:
    return preset(name, is_environment(task), task)


def entries(config: Config) -> dict[str, Any]:
    """All settings by dotted field, with one entry for each entry of a dictionary."""
    return {field: value for field, value in flat(config.model_dump()).items() if value != {}}


def given(config: Config) -> dict[str, Any]:
    """Settings that differ from the preset's, by dotted field; for dictionaries, the entries that differ."""
    usual = entries(defaults(config))
    return {name: value for name, value in entries(config).items() if name not in usual or usual[name] != value}


def reads(job: str, field: str) -> bool:
    """Whether the job reads a dotted field under any settings; for a dictionary, any of its entries."""
    return any(
        fnmatch.fnmatchcase(field, pattern) or pattern.startswith(f"{field}.") for pattern in (*_RUN, *_READ[job])
    )


def readers(*fields: str) -> str:
    """The first three jobs that read any of the fields, in words."""
    found = [job for job in _READ if job != "plan" and any(reads(job, field) for field in fields)]
    return _listed(found) if found else "plan"


def unread(config: Config, job: str, sized: Config | None = None) -> list[str]:
    """A line for each given setting that has no effect in the job: field, value, and the jobs that do read it.

    Args:
        sized: the settings with the sizes of the start model, on which an effect may depend.
    """
    whys = ((field, value, _why_unread(sized or config, job, field)) for field, value in given(config).items())
    return [f"{field} = {value!r}: {why}" for field, value, why in whys if why]


def has_effect(config: Config, job: str, field: str) -> bool:
    """Whether the job, or any job if it is empty, reads a dotted field under these settings."""
    return not job or not _why_unread(config, job, field)


def _why_unread(config: Config, job: str, field: str) -> str:
    """Why a setting has no effect in the job, and what does read it; empty if it has an effect."""
    if field == "preset" or (field == "task.name" and reads(job, field)):
        return ""
    if not reads(job, field):
        whom = readers(field)
        verb = "only plan does" if whom == "plan" else f"{whom} {'do' if ' and ' in whom else 'does'}"
        return f"{job} does not read it; {verb}"
    for only in _ONLY:
        if any(fnmatch.fnmatchcase(field, pattern) for pattern in only.fields) and not only.when(config, job):
            return f"has no effect here; {only.readers}"
    return ""


def only_read(config: Config, job: str) -> Config:
    """Return the settings with those that have no effect in the job reset to the preset's."""
    usual = entries(defaults(config))
    return override(config, {
        field: usual[field] for field in given(config)
        if field != "task.name" and field in usual and _why_unread(config, job, field)
    })  # fmt: skip


def _listed(names: list[str]) -> str:
    shown = names[:3]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
