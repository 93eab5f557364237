"""One frozen tree of settings.

    config = override(config, {"rl.kl_coef": 0.01})            # a new tree; Ray Tune uses this

Its branches are in training.py, rl.py and studies.py, complete trees in presets.py. The limits of a single field are in
its type (limits.py); limits on combinations, and a run's requirements of its machine, are in refusals.py.

Sizes are counted in tokens, problems or sequences; times end in ``_s``.
"""

import dataclasses
import difflib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from cola_ray import registry
from cola_ray.settings import algorithms
from cola_ray.settings.algorithms import Algorithm
from cola_ray.settings.limits import Branch, Seed, Trackers, refusals
from cola_ray.settings.rl import CriticConfig, ReplayConfig, RLConfig, RolloutConfig
from cola_ray.settings.studies import (
    ClusterConfig,
    DiversityConfig,
    EvalConfig,
    HardwareConfig,
    HarnessConfig,
    LoggedQConfig,
    ReproduceConfig,
    SamplesConfig,
    SearchConfig,
    SweepConfig,
)
from cola_ray.settings.training import DataConfig, ModelConfig, PretrainConfig, TaskConfig

MULTI_TURN = tuple(registry.BUILT_IN["environment"])
"""Tasks that are environments; `cola_ray agent` plays them."""


class ConfigError(ValueError):
    """Settings that cannot run; one line for each: ``field = value: why; fix``."""


class RunFailedError(RuntimeError):
    """A run that ended before its time: ``WHAT; NEXT STEP (traceback in FILE)``.

    Args:
        what: the cause, in the words of the part that failed.
        then: what to do about it; runs/failure.py adds how to continue.
        file: the file with the whole traceback, once there is one.
    """

    def __init__(self, what: str, then: str = "", file: str = "") -> None:
        super().__init__(what, then, file)
        self.what, self.then, self.file = what, then, file

    def __str__(self) -> str:
        line = f"{self.what}; {self.then}" if self.then else self.what
        return f"{line} (traceback in {self.file})" if self.file else line


class Config(Branch):
    """Settings of a run. Every field can be given as --branch.field on the command line.

    Example:
        >>> import cola_ray
        >>> cola_ray.Config().rl.group_size
        4
    """

    preset: Literal["tiny", "smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "qwen3-1.7b", "llama-3.1-8b"] = "tiny"
    """tiny, smollm2-135m, qwen2.5-0.5b, llama-3.2-1b, qwen3-1.7b or llama-3.1-8b: sets every default below. Only the
    first two have been run here."""
    output_dir: str = ""
    """Folder of checkpoints, summary and plots. Empty: outputs/<job>-<preset>; of a submitted job, below ~/cola_ray."""
    seed: Seed = 0
    """Random seed for data order, initial weights and action noise."""
    resume: bool = False
    """Continue the run in output_dir from its last checkpoint."""
    overwrite: bool = False
    """Remove the files that an earlier run recorded as its own in output_dir, and begin anew."""
    report_to: Trackers = ("mlflow",)
    """Trackers that copy the run's log: mlflow, tensorboard (RUN/tensorboard), wandb (RUN/wandb, offline unless
    WANDB_MODE says otherwise). Empty: none; log.jsonl has everything."""
    tracking_uri: str = ""
    """MLflow server or database. Empty: sqlite file beside the outputs."""
    tracking_parent: str = ""
    """Parent run in MLflow, e.g. the sweep that a run belongs to: its id in MLflow, or in its log.jsonl."""
    model: ModelConfig = ModelConfig()
    """What CoLA is attached to, and its sizes."""
    task: TaskConfig = TaskConfig()
    """The problems or environment, and how responses are scored."""
    data: DataConfig = DataConfig()
    """Texts to pre-train on."""
    pretrain: PretrainConfig = PretrainConfig()
    """Stages that lead from a base to a policy over latent actions."""
    rollout: RolloutConfig = RolloutConfig()
    """Rollouts: workers, their vLLM engines, and sampling."""
    rl: RLConfig = RLConfig()
    """How the policy learns."""
    samples: SamplesConfig = SamplesConfig()
    """Samples that are kept for reading: prompts, completions, rewards, actions."""
    replay: ReplayConfig = ReplayConfig()
    """Agents: the turns that are kept for learning."""
    critic: CriticConfig = CriticConfig()
    """Agents: the utterance critic of archer, archer_soft and chai."""
    search: SearchConfig = SearchConfig()
    """Tree search and its budget."""
    q: LoggedQConfig = LoggedQConfig()
    """The Q of MCTS-Q: values of actions."""
    eval: EvalConfig = EvalConfig()
    """Evaluation: which problems a model is asked, and the ways in which it answers."""
    diversity: DiversityConfig = DiversityConfig()
    """How different the texts of latent actions are."""
    harness: HarnessConfig = HarnessConfig()
    """Which of the base's capabilities are kept, by EleutherAI's evaluation harness."""
    sweep: SweepConfig = SweepConfig()
    """A sweep of one setting over several values."""
    reproduce: ReproduceConfig = ReproduceConfig()
    """Reproduction of the papers' matrix."""
    hardware: HardwareConfig = HardwareConfig()
    """What `cola_ray plan` assumes of the machines."""
    cluster: ClusterConfig = ClusterConfig()
    """Where processes are placed."""

    @property
    def algorithm(self) -> Algorithm:
        """What ``rl.algorithm`` needs; ``rl.advantage`` and ``rl.loss`` replace its own."""
        found, rl = algorithms.of(self.rl.algorithm), self.rl
        return dataclasses.replace(found, advantage=rl.advantage or found.advantage, loss=rl.loss or found.loss)

    @property
    def learns_values(self) -> bool:
        """Whether a head over the frozen states trains beside the policy."""
        within_turns = self.rl.algorithm == "archer" and self.critic.token_baseline
        algorithm = self.algorithm
        return algorithm.value_head or algorithm.soft_q or self.rl.control_variate or within_turns

    @property
    def num_trained_steps(self) -> int:
        """How many of ``rl.max_steps`` train the policy: steps in which an utterance critic warms up do not."""
        return self.rl.max_steps - (self.critic.warmup_iterations if self.algorithm.critic else 0)

    @property
    def replays(self) -> bool:
        """Whether the learner trains on replayed data."""
        return self.algorithm.replays or self.rl.actor_free


def is_environment(task: str) -> bool:
    """Whether a task has many turns, judging by its name; a user's class does if it has a ``step``."""
    if task in MULTI_TURN or task in registry.BUILT_IN["task"]:
        return task in MULTI_TURN
    try:
        return hasattr(registry.find("environment", task), "step")
    except registry.NotFoundError:
        return False


NAMED: dict[str, registry.Kind] = {
    "rl.algorithm": "algorithm",
    "rl.advantage": "advantage",
    "rl.loss": "loss",
    "task.name": "task",
    "task.reward": "reward",
    "task.tools": "tool",
    "model.family": "base",
}
"""Settings whose values are names in the registry, with their kinds; ``task.name`` may also be an environment."""


def named(config: Config) -> list[tuple[str, str]]:
    """Names in these settings that the registry resolves, as (dotted field, name); some fields have several."""
    values = {field: value_at(config, field) for field in NAMED}
    return [
        (field, name)
        for field, value in values.items()
        for name in ([value] if isinstance(value, str) else value)
        if name
    ]


def results_root() -> Path:
    """The folder that relative outputs refer to: the current one, or ~/cola_ray for a submitted job, whose working
    directory Ray deletes.
    """
    return Path.home() / "cola_ray" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path()


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A new tree with dotted fields changed; ``config`` stays as it is.

    Raises:
        ConfigError: a line for each field that is unknown or has a wrong value.

    Example:
        >>> import cola_ray
        >>> cola_ray.override(cola_ray.preset("tiny"), {"rl.kl_coef": 0.01}).rl.kl_coef
        0.01
        >>> cola_ray.override(cola_ray.preset("tiny"), {"rl.kl_cof": 1})
        Traceback (most recent call last):
        cola_ray.settings.config.ConfigError: rl.kl_cof = 1: no such field; did you mean rl.kl_coef?
    """
    changed, wrong = try_override(config, changes)
    if wrong:
        raise ConfigError("\n".join(wrong.values()))
    return changed


def try_override(config: Config, changes: Mapping[str, Any]) -> tuple[Config, dict[str, str]]:
    """Like :func:`override`, but return the tree with all valid changes, and a line for each invalid field."""
    wrong: dict[str, str] = {}
    tree = config.model_dump()
    for dotted, value in changes.items():
        if _is_field(dotted):
            _put(tree, dotted, value)
        elif dotted in _NOT_OFFERED:
            wrong[dotted] = f"{dotted} = {value!r}: {_NOT_OFFERED[dotted]}"
        else:
            near = difflib.get_close_matches(dotted, schemas(), n=1, cutoff=0.7)  # a slip, not another word
            hint = f"did you mean {near[0]}?" if near else "see --help, and docs/names.md for TRL's and verl's names"
            wrong[dotted] = f"{dotted} = {value!r}: no such field; {hint}"
    try:
        return Config.model_validate(tree), wrong
    except ValidationError as error:
        refused = refusals(error, schemas(), tree)
    to_blame = [dotted for dotted in changes for field in refused if f"{field}.".startswith(f"{dotted}.")]
    right = {dotted: value for dotted, value in changes.items() if dotted not in {*wrong, *to_blame}}
    return try_override(config, right)[0], wrong | refused


_NOT_OFFERED = {
    "cluster.colocated": "learner ranks and engines do not share GPUs; give each GPUs of its own, as `cola_ray plan` "
    "divides them, and rl.max_staleness 1 to keep both busy",
}
"""Settings that users of other libraries look for: why they do not exist here, and what to use."""


def value_at(config: Config, field: str) -> Any:
    """The value of a dotted field."""
    return functools.reduce(getattr, field.split("."), config)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted field; an empty dictionary counts as a value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping) and bool(value)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


@functools.cache
def schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema of each dotted field, in the tree's order."""
    whole = Config.model_json_schema()
    found: dict[str, dict[str, Any]] = {}
    for name, schema in whole["properties"].items():
        branch = schema.get("$ref", "").rpartition("/")[2]
        inner = whole["$defs"][branch]["properties"] if branch else {}
        found |= {f"{name}.{leaf}": of_leaf for leaf, of_leaf in inner.items()} if branch else {name: schema}
    return found


def _is_field(dotted: str) -> bool:
    return dotted in schemas() or schemas().get(dotted.rpartition(".")[0], {}).get("type") == "object"


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *branches, leaf = dotted.split(".")
    for branch in branches:
        tree = tree[branch]
    tree[leaf] = {**tree[leaf], **value} if dotted == "pretrain.steps" and isinstance(value, dict) else value


def is_endpoint(reward_model: str) -> bool:
    return reward_model.startswith(("http://", "https://"))


# Hugging Face libraries stay quiet about progress inside workers; the driver shows its own.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
