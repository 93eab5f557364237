"""Branches of the settings for the model, the task, the texts and pre-training; rl.py has those of RL."""

import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from cola_ray.settings.limits import (
    Branch,
    Count,
    Decay,
    Finite,
    Layers,
    Name,
    Names,
    NonNegative,
    Positive,
    Processes,
    Rate,
    Seconds,
    Share,
    Some,
    Temperature,
    Unique,
    Whole,
    Worth,
)

OWN_BASE_POSITIONS = 512
"""Context, in tokens, of the base that is created if none is given."""

PretrainStage = Literal["base", "actions", "policy", "fta_idm", "fta_policy"]
StageWithSteps = Literal["base", "actions", "policy", "fta_idm", "fta_policy", "reward", "q"]
REWARD_STAGE = "reward"
"""The stage that `cola_ray reward-model` trains, as named in ``pretrain.steps``."""
Q_STAGE = "q"
"""The stage that `cola_ray train-q` trains, as named in ``pretrain.steps``."""


_STEPS: dict[StageWithSteps, int] = {
    "base": 300,
    "actions": 1000,
    "policy": 500,
    "fta_idm": 300,
    "fta_policy": 300,
    "reward": 300,
    "q": 1000,
}


def _and_the_rest(steps: Any) -> Any:
    return _STEPS | steps if isinstance(steps, dict) else steps


def _in_order(stages: tuple[PretrainStage, ...]) -> tuple[PretrainStage, ...]:
    order = list(get_args(PretrainStage))
    if list(stages) != sorted(stages, key=order.index):
        raise ValueError(f"not in order; each stage needs those before it: {', '.join(order)}")
    if stages[0] == "base" and len(stages) > 1 and stages[1] != "actions":
        raise ValueError(f"a new base has no actions yet; give actions between base and {stages[1]}")
    return stages


def _a_day(date: str) -> str:
    if date:
        try:
            datetime.date.fromisoformat(date)
        except ValueError as error:
            raise ValueError(f"{error}; use YYYY-MM-DD") from None
    return date


class ModelConfig(Branch):
    base: str = ""
    """Checkpoint that CoLA is attached to, of llama, mistral, qwen2, qwen3, gemma3_text or smollm3: directory, hub id
    or .gguf file. Empty: the preset's own."""
    family: str = ""
    """Family of a base with any other architecture, as package.module:name or file.py:name, see docs/extending.md.
    Empty: by the base's model_type."""
    path: str = ""
    """CoLA checkpoint that RL starts from. Empty: what `cola_ray pretrain` left for this preset."""
    num_actions: Annotated[Count, Field(ge=2, le=65_536)] = 64
    """K, codes in the codebook."""
    num_idm_layers: Layers = 4
    """Decoder layers of the inverse dynamics model."""
    num_world_model_layers: Layers = 2
    """SwiGLU blocks of the world model."""
    num_policy_layers: Layers = 8
    """Decoder layers of the policy."""
    action_every: Count = 1
    """n, the response tokens that a latent action lasts: one is chosen at tokens 0, n, 2n, ..., and held. Learnt in
    pre-training, and the same in RL and wherever the model is served."""
    learnt_ends: bool = False
    """The policy decides at each token whether the last action goes on. Learnt in pre-training, where
    pretrain.switch_cost makes actions last."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights, in learner and engine."""


SIZES = ("num_actions", "num_idm_layers", "num_world_model_layers", "num_policy_layers", "action_every", "learnt_ends")
"""Settings of a model that its checkpoint records, and that cannot be changed afterwards."""


class TaskConfig(Branch):
    name: str = "arithmetic"
    """arithmetic, gsm8k, math500, instructions (checked by rules), a reasoning-gym generator, preference, dataset
    (rows of your own), or your own as package.module:Class or file.py:Class. For agents: twenty_questions, guess_city,
    textworld, jericho, data_science, tools, shop, household, program, your own, a class with reset and step as
    gymnasium's, or gymnasium:ID."""
    path: str = ""
    """dataset: JSON lines, Parquet or CSV, a folder or glob of them, or a hub id. gsm8k, math500: a folder with
    train.jsonl and test.jsonl, or a hub id. preference: rows of prompt, chosen and rejected, a .jsonl or .parquet
    file, a folder of them, or a hub id. data_science: a CSV file, with the column to predict in the option target;
    empty: tables that come with scikit-learn. tools: rows as for dataset; empty: generated questions. Others: leave
    empty."""
    more_paths: Unique[Name] = ()
    """dataset, tools: sources in addition to task.path, in the same forms; metrics are kept apart by their names."""
    weights: tuple[Positive, ...] = ()
    """dataset, tools: shares of prompts that task.path and each of task.more_paths have in training, in any unit; a
    small source is repeated. Empty: every prompt as often as it is in its source."""
    columns: dict[Literal["prompt", "solution", "response", "system"], Name] = Field(default_factory=dict)
    """dataset, tools: names of columns that are not recognised, e.g. prompt body solution label; a dot selects a
    field of an object: solution reward_model.ground_truth. Rewards compare with solution; a first policy is cloned
    from response."""
    splits: dict[Literal["train", "heldout"], Name] = Field(default_factory=dict)
    """dataset, tools: splits of the hub, or beginnings of file names in a folder, e.g. train train_sft heldout
    test_sft. Empty: train, and the first of test, heldout, validation, dev and eval; if there is only one split, a
    sixth of it is held out, by checksum of the prompt."""
    subset: str = ""
    """dataset, tools: configuration of a data set on the hub that has several, e.g. main."""
    game: str = ""
    """jericho: the z-machine file to play."""
    command: str = ""
    """program: the command that starts your own agent program, e.g. "python agent.py"; see docs/agents.md."""
    tools: Names = ()
    """tools: what the model may call, one or more: calculator, lookup (in a row's column table), python (in the
    sandbox), or functions of your own, file.py:name or package.module:name, with type hints and a docstring that says
    what each argument is. Empty: calculator and lookup."""
    tool_parser: str = ""
    """How the model writes tool calls. program: the name of one of vLLM's parsers, e.g. hermes, llama3_json or
    qwen3_xml; empty: calls stay in the text. tools: hermes, llama3_json or json; empty: any of them."""
    reward_model: str = ""
    """A Hugging Face sequence classifier, directory or hub id, which runs in its own actor; or an http(s)://
    endpoint that answers {"prompts": [...], "responses": [...]} with {"rewards": [...]}. Scores the responses of
    preference, and of every task whose task.reward names reward_model. evaluate: it guides searches and chooses among
    answers, while figures come from the verifier."""
    reward: Names = ()
    """Rewards of a response, one or more: verifier (the task's own), exact, math, format (<think> and <answer>),
    regex, length, code (the tests of a row), reward_model, or functions of your own, file.py:name or
    package.module:name, called with (problem, response) or as TRL calls its own, with lists (prompts, completions,
    **columns). Empty: the task's verifier. For agents, only with tools."""
    reward_weights: tuple[Worth, ...] = ()
    """Weight of each reward of task.reward; the total is the weighted sum. Empty: 1 each."""
    right_from: Worth | None = None
    """Smallest reward of a right response, for accuracies. None: the value that the task, or a single reward, declares;
    if neither does, there is no accuracy."""
    pattern: str = ""
    """Reward regex: the regular expression to find in a response."""
    length: Count = 1000
    """Reward length: up to this many characters the reward is 1; it falls to 0 at twice as many."""
    oracle: str = ""
    """twenty_questions, guess_city: model that answers, at the OpenAI-compatible endpoint OPENAI_BASE_URL with the key
    OPENAI_API_KEY. Empty: tables, offline."""
    options: dict[Name, int | Finite | str | bool] = Field(default_factory=dict)
    """Arguments of a reasoning-gym generator, an environment or arithmetic, e.g. min_terms 2. Of instructions: kinds,
    one or more of ends_with, first_letter and at_most, separated by spaces."""
    thinking: bool = False
    """Ask for thoughts in <think> and the answer in <answer> tags; the form alone is worth 0.1. Not for agents."""
    num_problems: Annotated[Count, Field(ge=2)] = 20_000
    """Problems that a procedural generator makes; a sixth of the distinct ones is held out."""
    reward_timeout_s: Seconds = 30.0
    """Seconds that a reward or an environment's step may take; a longer one fails its sample or episode only."""
    max_failed_rewards: Share = 0.1
    """Share of a step's rewards or episodes that may raise, time out, exceed 10^6 or be NaN before the run fails."""


class PretrainConfig(Branch):
    stages: Annotated[Some[PretrainStage], AfterValidator(_in_order)] = ("actions", "policy")
    """Stages in this order; each starts from the previous one's model. base trains the given base by itself, as a
    language model, or creates a small one if none is given."""
    max_steps: Count | None = None
    """Most optimizer steps of every stage; for trials."""
    steps: Annotated[dict[StageWithSteps, Count], BeforeValidator(_and_the_rest)] = Field(
        default_factory=lambda: dict(_STEPS)
    )
    """Optimizer steps of each stage; reward is for reward models, q for `cola_ray train-q`. Stages that are not named
    keep their defaults."""
    batch_size: Count = 64
    """Sequences per step, over all ranks."""
    micro_batch_size: Count = 8
    """Sequences per forward pass, on one rank."""
    sequence_length: Annotated[Count, Field(ge=2)] = 512
    """Tokens of a packed sequence."""
    lr: Rate = 1e-4
    """Peak learning rate of the stages actions and policy."""
    min_lr_ratio: Share = 0.4
    """The cosine decay of the learning rate ends at lr times this."""
    base_lr: Rate = 5e-6
    """Peak learning rate where the base trains: stages base, fta_idm, fta_policy."""
    warmup_steps: Whole = 100
    """Steps of linear warm-up of the learning rate."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's two betas."""
    gumbel_tau: Temperature = 2.0
    """Relaxation temperature of the straight-through action."""
    entropy_coef: NonNegative = 0.001
    """Weight of sum p log p of the relaxed action: keeps codes alive."""
    balance_coef: NonNegative = 0.0
    """Weight of log K - H(batch's mean code usage)."""
    switch_cost: NonNegative = 0.1
    """With model.learnt_ends: what it costs, in nats, that an action changes, beyond changes by chance."""
    revive_every: Whole = 0
    """Every so many steps, codes not used since the last time are replaced by the most used code's row. 0: never."""
    response_only: bool = False
    """Prompt/response pairs: learn from response tokens only. The stages fta_* always do."""
    states: Literal["off", "model", "bfloat16"] = "off"
    """The frozen base's outputs for each token are written to disk when the stages actions and policy first need them,
    and read from there afterwards. model: in model.dtype. bfloat16: in half of float32's bytes, and with this rounding
    in training. off: they are computed in every step."""
    states_cache: str = ""
    """Folder of these outputs, which runs share and all nodes with learner ranks can access. Relative paths start where
    output_dir's do. Empty: states beside output_dir, such as outputs/states."""
    states_gb: Positive = 100.0
    """Most disk space in GB that these outputs may take; a stage that could need more is refused."""
    save_every: Count = 100
    """Steps between checkpoints inside a stage."""

    def num_steps(self, stage: str) -> int:
        """Optimizer steps of a stage, at most ``max_steps``."""
        steps = dict[str, int](**self.steps)[stage]
        return steps if self.max_steps is None else min(steps, self.max_steps)


class DataConfig(Branch):
    path: str = ""
    """JSON lines, Parquet or text file, folder or glob of them, or a hub id. Empty: the task's own problems."""
    more_paths: Unique[Name] = ()
    """Further sources to pre-train on, each given as data.path is."""
    weights: tuple[Positive, ...] = ()
    """Shares of the rows of each step that come from data.path and from each of data.more_paths, in any unit; small
    sources are repeated. Empty: all documents of all sources once an epoch, shuffled together."""
    prompt_field: Name = "question"
    """Column of the prompt, where rows are prompt/response pairs."""
    response_field: Name = "answer"
    """Column of the response."""
    text_field: Name = "text"
    """Column of plain text or of whole conversations, where rows are documents."""
    streaming: bool = False
    """Read data sets from the hub while they are downloaded; otherwise they are downloaded first."""
    max_broken: Share = 0.0
    """Largest share of a source's rows that may be broken: they are skipped, counted and noted. 0: a single one ends
    the run."""
    cache: str = ""
    """Folder of tokenised shards, which runs share and all nodes with learner ranks can access. Relative paths start
    where output_dir's do. Empty: corpus beside output_dir, such as outputs/corpus."""
    processes: Processes = 2
    """Processes that tokenise, on the node of the first learner rank. 1: the rank itself."""
    date: Annotated[str, AfterValidator(_a_day)] = ""
    """YYYY-MM-DD, for chat templates that show a date. Empty: the start model's, else the day when the run began."""
    chat_options: dict[Name, int | Finite | str | bool] = Field(default_factory=dict)
    """Arguments of the model's chat template, e.g. enable_thinking false of Qwen3 and SmolLM3. Empty: the start
    model's."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources of texts: ``path`` and ``more_paths``."""
        return (self.path, *self.more_paths) if self.path else ()
