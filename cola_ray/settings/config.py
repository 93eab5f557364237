"""One frozen tree of settings.

    config = override(config, {"rl.kl_coef": 0.01})            # a new tree; Ray Tune uses this

Complete trees come from presets.py. What one field may be stands in its type (limits.py); what several may be together,
and what a run needs of its machine, in refusals.py.

Sizes are counted in tokens, problems or sequences; times end in ``_s``.
"""

import datetime
import difflib
import functools
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cola_ray.settings.limits import (
    Count,
    Decay,
    Finite,
    Layers,
    Name,
    NonNegative,
    Positive,
    PositiveShare,
    Processes,
    Rate,
    Seconds,
    Seed,
    Share,
    Some,
    Temperature,
    Tokens,
    Unique,
    Whole,
    refusals,
)

MULTI_TURN = ("twenty_questions", "guess_city", "textworld", "jericho", "data_science")
"""Tasks that are environments; jobs/rl_agent.py plays them."""
COMPARING = ("grpo", "rloo")
"""Algorithms that compare completions or episodes of one group."""
WITHIN_PROMPTS = (*COMPARING, "remax")
"""Those and what compares completions with their prompt's greedy one."""
OF_OUTCOMES = ("grpo", "rloo", "remax", "reinforce")
"""Algorithms whose advantages come from the outcomes of whole completions."""
OF_TURNS = ("archer", "chai", "filtered_bc")
"""Algorithms that learn from an agent's turns in replay."""
WITH_CRITIC = ("archer", "chai")
"""Those of them that ask an utterance critic."""

OWN_BASE_POSITIONS = 512
"""Context of the base that is made where none is given, in tokens."""

PretrainStage = Literal["base", "actions", "policy", "fta_idm", "fta_policy"]
StageWithSteps = Literal["base", "actions", "policy", "fta_idm", "fta_policy", "reward", "q"]
REWARD_STAGE = "reward"
"""What jobs/reward_model.py trains, in ``pretrain.steps``."""
Q_STAGE = "q"
"""What jobs/train_q.py trains, there."""


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


class ConfigError(ValueError):
    """Settings that cannot run; one line each: ``field = value: why; fix``."""


class RunFailedError(RuntimeError):
    """A run that ended before its time: ``WHAT; NEXT STEP (traceback in FILE)``.

    Args:
        what: ended it, in the words of the part that failed.
        then: what to do about it; ending.py adds how to go on.
        file: that has the whole traceback, once there is one.
    """

    def __init__(self, what: str, then: str = "", file: str = "") -> None:
        super().__init__(what, then, file)
        self.what, self.then, self.file = what, then, file

    def __str__(self) -> str:
        line = f"{self.what}; {self.then}" if self.then else self.what
        return f"{line} (traceback in {self.file})" if self.file else line


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


def _above_half(expectile: float) -> float:
    if 0 < expectile <= 0.5:
        raise ValueError("an expectile up to 0.5 looks away from good actions; use 0 (none) or a number above 0.5")
    return expectile


class _Branch(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(_Branch):
    base: str = ""
    """Llama checkpoint that CoLA is attached to: directory, hub id or .gguf file. Empty: the preset's own."""
    path: str = ""
    """CoLA checkpoint that RL starts from. Empty: what pretrain.py left for this preset."""
    num_actions: Annotated[Count, Field(ge=2, le=65_536)] = 64
    """K, codes in the codebook."""
    num_idm_layers: Layers = 4
    """Decoder layers of the inverse dynamics model."""
    num_world_model_layers: Layers = 2
    """SwiGLU blocks of the world model."""
    num_policy_layers: Layers = 8
    """Decoder layers of the policy."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights, in learner and engine."""


class TaskConfig(_Branch):
    name: str = "arithmetic"
    """arithmetic, gsm8k, math500, a reasoning-gym generator, preference, or your own as package.module:Class. For
    agents: twenty_questions, guess_city, textworld, jericho, data_science, or your own, a class with reset and step."""
    path: str = ""
    """gsm8k, math500: a folder with train.jsonl and test.jsonl, or a hub id. preference: rows of prompt, chosen and
    rejected, a .jsonl or .parquet file, a folder of them, or a hub id. data_science: a CSV file whose column to predict
    the option target names; empty: tables that scikit-learn brings along. Others: leave empty."""
    game: str = ""
    """jericho: the z-machine file to play."""
    reward_model: str = ""
    """preference: a Hugging Face sequence classifier, directory or hub id, which gets an actor of its own; or an
    http(s):// endpoint that answers {"prompts": [...], "responses": [...]} with {"rewards": [...]}. evaluate.py: leads
    searches and chooses among answers, while figures are the verifier's."""
    oracle: str = ""
    """twenty_questions, guess_city: model that answers, at the OpenAI-compatible endpoint OPENAI_BASE_URL with the key
    OPENAI_API_KEY. Empty: tables, offline."""
    options: dict[Name, int | Finite | str | bool] = Field(default_factory=dict)
    """Arguments of a reasoning-gym generator or an environment, e.g. min_terms 2."""
    thinking: bool = False
    """Ask for thoughts in <think> and the answer in <answer> tags; the form alone is worth 0.1. Not for agents."""
    num_problems: Annotated[Count, Field(ge=2)] = 20_000
    """Problems a procedural generator makes; a sixth of the distinct ones is held out."""
    reward_timeout_s: Seconds = 30.0
    """Seconds a reward or an environment's step may take; longer costs its own sample or episode."""
    max_failed_rewards: Share = 0.1
    """Share of a step's rewards or episodes that may raise, time out, exceed 10^6 or be NaN before the run fails."""


class PretrainConfig(_Branch):
    stages: Annotated[Some[PretrainStage], AfterValidator(_in_order)] = ("actions", "policy")
    """Run in this order; each takes the model the one before left."""
    max_steps: Count | None = None
    """Caps every stage; for trials."""
    steps: Annotated[dict[StageWithSteps, Count], BeforeValidator(_and_the_rest)] = Field(
        default_factory=lambda: dict(_STEPS)
    )
    """Optimizer steps of each stage; reward is a reward model's, q that of jobs/train_q.py. Stages that are not named
    keep theirs."""
    batch_size: Count = 64
    """Sequences a step, over all ranks."""
    micro_batch_size: Count = 8
    """Sequences a forward pass, on one rank."""
    sequence_length: Annotated[Count, Field(ge=2)] = 512
    """Tokens of a packed sequence."""
    lr: Rate = 1e-4
    """Peak learning rate of the stages actions and policy."""
    min_lr_ratio: Share = 0.4
    """Cosine decay ends at lr times this."""
    base_lr: Rate = 5e-6
    """Peak learning rate where the base trains: stages base, fta_idm, fta_policy."""
    warmup_steps: Whole = 100
    """Linear warm-up."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's."""
    gumbel_tau: Temperature = 2.0
    """Relaxation temperature of the straight-through action."""
    entropy_coef: NonNegative = 0.001
    """Weight of sum p log p of the relaxed action: keeps codes alive."""
    balance_coef: NonNegative = 0.0
    """Weight of log K - H(batch's mean code usage)."""
    revive_every: Whole = 0
    """Every so many steps, codes unused since the last time take over the most used code's row. 0: never."""
    response_only: bool = False
    """Prompt/response pairs: learn from response tokens only. The stages fta_* always do."""
    save_every: Count = 100
    """Steps between checkpoints inside a stage."""

    def num_steps(self, stage: str) -> int:
        """Optimizer steps of a stage, capped."""
        steps = dict[str, int](**self.steps)[stage]
        return steps if self.max_steps is None else min(steps, self.max_steps)


class DataConfig(_Branch):
    path: str = ""
    """JSON lines, Parquet or text file, folder of them, or a hub id. Empty: the task's own problems."""
    prompt_field: Name = "question"
    """Column of the prompt, where rows are prompt/response pairs."""
    response_field: Name = "answer"
    """Column of the response."""
    text_field: Name = "text"
    """Column of plain text or of whole conversations, where rows are documents."""
    date: Annotated[str, AfterValidator(_a_day)] = ""
    """YYYY-MM-DD, told to chat templates that show a date. Empty: the start model's, else the day the run began."""


class RolloutConfig(_Branch):
    num_workers: Processes = 1
    """vLLM engines, each a Ray actor."""
    tensor_parallel_size: Processes = 1
    """GPUs an engine spans."""
    temperature: Temperature = 1.0
    """Of the action distribution; log-probabilities include it."""
    top_k: Whole = 0
    """Actions kept when sampling, 0 all; log-probabilities include the truncation."""
    max_prompt_tokens: Tokens = 256
    """Longer prompts are left out and counted."""
    max_new_tokens: Tokens = 256
    """Actions a completion may take."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion or an agent's utterance, beside the checkpoint's end tokens and what the task
    declares. A verifier or environment reads the text in front of the string."""
    max_num_seqs: Annotated[Count, Field(le=65_536)] = 64
    """Concurrent requests in an engine."""
    kv_cache_mb: Count = 512
    """Key/value cache of an engine on CPU; on GPU vLLM's memory share rules."""
    environment_processes: Processes = 2
    """Processes that a worker's multi-turn environments share."""
    in_rounds: bool = False
    """Agents: a worker's episodes take their turns together, so that a run comes out the same bit for bit however fast
    environments answer, where the engine's arithmetic allows. Each round waits for the slowest."""
    max_restarts: Whole = 3
    """Times in a row a worker may die without completing a share before the run fails."""


class RLConfig(_Branch):
    algorithm: Literal[
        "grpo", "rloo", "remax", "reinforce", "ppo", "etpo", "archer", "chai", "filtered_bc"
    ] = "grpo"  # fmt: skip
    """grpo: group-normalised advantages. rloo: leave-one-out baseline. remax: the greedy completion as baseline.
    reinforce: the batch's mean as baseline. ppo: a value head on the base's states, and GAE. etpo: soft Q-learning over
    actions, with kl_coef as beta. For agents also: archer: advantages of whole utterances by an off-policy critic.
    chai: the policy stays, and the critic chooses among its utterances. filtered_bc: clone the best of all episodes."""
    action_space: Literal["latent", "token"] = "latent"
    """latent: actions of the learned codebook; the policy over them trains. token: the plain base chooses tokens and
    itself trains, through the same workers, tasks and algorithms: what latent actions are compared with."""
    actor_free: bool = False
    """etpo over latent actions: no policy trains. The start policy's rho exp(Q / kl_coef) / Z acts, exact over all
    actions, and Q learns from as many completions of any age, out of replay, as a step generates."""
    lora_rank: Whole = 0
    """token: above 0, low-rank adapters of this rank train in the base's place."""
    gradient_checkpointing: bool = False
    """token: activations are computed again in the backward pass, a third more time for far less memory."""
    max_steps: Count = 100
    """Learner steps."""
    prompts_per_step: Count = 64
    """Groups a step; for agents, environment seeds a step."""
    group_size: Count = 4
    """Completions of one prompt."""
    lr: Rate = 5e-7
    """Adam's, constant after warm-up."""
    warmup_steps: Whole = 0
    """Linear warm-up."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Adam's."""
    grad_clip: NonNegative = 1.0
    """Norm over all policy gradients."""
    kl_coef: NonNegative = 0.001
    """Weight of KL(policy || reference) over actions. etpo: a choice is decided at a difference in value of about four
    times this; 0.05 suits rewards of 0 and 1."""
    kl_in: Literal["reward", "loss"] = "reward"
    """reward: an action also answers for the divergence of the states that it leads to. loss: for its own state's."""
    kl_estimator: Literal["exact", "k1", "k2", "k3"] = "exact"
    """exact: summed over all actions, which 64 make cheap, without the variance of the draw. k1, k2, k3: estimates from
    the action taken."""
    kl_target: NonNegative = 0.0
    """Above 0: kl_coef is adapted after every step to keep the divergence an action near this."""
    entropy_coef: NonNegative = 0.0
    """Weight of a bonus for the policy's entropy, in the loss."""
    control_variate: bool = False
    """A Q over all actions takes out of each advantage what it expected, and its mean is added exactly: the same
    expected gradient with less variance. For grpo, rloo, remax and reinforce on problems with answers."""
    marginal_aliases: bool = False
    """latent: an action's log-probability is that of its token, summed over all actions that give it: the same expected
    gradient with less variance, for the price of trying all actions on the world model."""
    dynamic_sampling: bool = False
    """grpo, rloo: groups whose rewards are all equal have no signal; other prompts take their place."""
    refill_rounds: Whole = 2
    """dynamic_sampling: how often a step asks other prompts for what is missing; after that its batch is smaller."""
    overlong_buffer: Whole = 0
    """Above 0: within so many tokens of rollout.max_new_tokens, a completion's reward falls, by 1 at the limit. With
    grpo, rloo and remax only among completions of a prompt whose rewards differ: length alone is no signal."""
    clip_low: Share = 0.2
    """Ratio's lower clip, 1 - clip_low."""
    clip_high: NonNegative = 0.2
    """Ratio's upper clip, 1 + clip_high."""
    updates_per_batch: Count = 1
    """Optimizer steps on one batch of rollouts."""
    gae_lambda: Share = 0.95
    """ppo: decay of temporal-difference errors over actions."""
    value_lr: Rate = 1e-3
    """Learning rate of the Adam of the value head, ppo's and archer's with critic.token_baseline, and of etpo's Q."""
    value_steps: Count = 4
    """Gradient steps of value head or Q on one batch."""
    target_tau: PositiveShare = 0.005
    """etpo: share of Q that its target takes over after each of its steps."""
    micro_batch_tokens: Count = 16_384
    """Padded tokens a forward pass, on one rank; at least one sequence."""
    max_staleness: Whole = 0
    """Versions a rollout may lag behind the learner. 0 is strictly on-policy; 1 overlaps rollouts with learning."""
    update_mode: Literal["drain", "continue"] = "drain"
    """At new weights, requests in flight end on the old version first, or continue on the new one."""
    importance_cap: NonNegative = 2.0
    """Truncation of pi_learner / pi_rollout, the weight that corrects staleness and engine mismatch. 0: no weight."""
    cache_hidden_states: bool = False
    """The engine hands the base's states out with the tokens, and the learner holds no base at all."""
    eval_every: Whole = 10
    """Steps between greedy evaluations; 0 only at start and end."""
    eval_problems: Count = 512
    """Held-out problems an evaluation asks."""
    save_every: Count = 20
    """Steps between checkpoints."""


class ReplayConfig(_Branch):
    max_rows: Count = 100_000
    """Turns kept, with rl.actor_free completions, over all shards; the oldest go first."""
    max_mb: Count = 4096
    """Their size, over all shards."""
    shards: Processes = 1
    """Actors that share them."""
    snapshot_every_s: Seconds = 30.0
    """Seconds between snapshots; a shard that dies loses no more."""
    kept_share: PositiveShare = 0.1
    """filtered_bc: share of the best episodes that are cloned."""


class CriticConfig(_Branch):
    encoder: str = ""
    """A Hugging Face encoder that reads states and utterances as text and trains with the critic, e.g. roberta-base.
    Empty: the base's own states, which cost nothing. Not for chai, whose players choose by those."""
    replicas: Processes = 1
    """Actors that share each of the critic's batches."""
    gamma: Share = 0.95
    """Discount of a turn; ppo's too."""
    tau: PositiveShare = 0.1
    """Share of the critic that its target takes over after each step."""
    lr: Rate = 3e-4
    """Adam's."""
    grad_clip: NonNegative = 1.0
    """Norm of its gradients."""
    steps: Count = 50
    """Critic steps an iteration."""
    batch_size: Count = 256
    """Turns a critic step."""
    fresh_states: Count = 512
    """Replayed states that the policy speaks in anew, an iteration: targets of V and the actor's batch."""
    warmup_iterations: Whole = 10
    """Iterations that train the critic alone."""
    candidates: Count = 5
    """chai, or archer with chooses: utterances to choose from, a turn."""
    chooses: bool = False
    """archer: players say what the critic likes best of several utterances, as chai's do, and the policy learns from
    that: what the critic is told, and the states do not show, counts at once. Not with critic.encoder."""
    priority_beta: Share = 0.0
    """Above 0, e.g. 0.4: turns with a large error are replayed more often, and weighed down with this exponent."""
    actor_states: Literal["replayed", "played"] = "replayed"
    """archer: replayed: the actor learns from its fresh utterances in fresh_states, as in the paper. played: from all
    turns of the episodes just played, whose sequences a learner reads once for all of their turns."""
    reuse: Count = 1
    """played: iterations whose episodes the actor learns from; older ones are weighed by rl.importance_cap."""
    td_share: Share = 0.0
    """archer: share of r + gamma V(s') - V(s) in a played utterance's advantage, where Q(s, u) - V(s) is the rest. What
    was drawn has the variance of the draw; Q has its error on utterances that it has seen little of."""
    token_baseline: bool = False
    """archer: subtract a value head's guess of the utterance's advantage, learnt at every token."""
    expectile: Annotated[Decay, AfterValidator(_above_half)] = 0.0
    """0: V follows fresh utterances. Above 0.5: IQL's expectile over replayed ones."""


class SearchConfig(_Branch):
    simulations: Count = 32
    """Completions that a search, or best-of-n, may make of one problem."""
    max_tokens: Whole = 0
    """Tokens that it may generate for one problem; 0 is no limit."""
    max_seconds: NonNegative = 0.0
    """Time that it may take for one problem, of all those in the engine at once (eval.chunk); 0 is no limit."""
    root_breadth: Count = 5
    """Actions that are tried after the prompt, the most probable ones."""
    breadth: Count = 4
    """Actions that are tried after any other state."""
    depth: Tokens = 64
    """Tokens that a node may lie behind the prompt."""
    c_puct: NonNegative = 0.7
    """Weight of the policy's preference against what was found."""
    searchers: Count = 4
    """Simulations of one problem at the same time."""


class LoggedQConfig(_Branch):
    path: str = ""
    """mcts_q: the folder model/ that jobs/train_q.py left."""
    gamma: Share = 1.0
    """Discount of an action; the reward comes at the last one."""
    lr: Rate = 1e-3
    """Adam's."""
    copy_every: Count = 50
    """Steps after which the target takes over all of Q."""
    max_error: NonNegative = 0.01
    """mcts_q: where Q's squared temporal-difference error is below this, nothing is decided."""
    jump: Count = 64
    """mcts_q: actions that a search may pass over where nothing is decided."""


AnswerWay = Literal["greedy", "base", "sample", "beam", "mcts", "mcts_q"]


class EvalConfig(_Branch):
    ways: Some[AnswerWay] = ("base", "greedy", "sample", "mcts")
    """greedy: the policy's most probable actions. base: the bare base, greedily. sample, beam, mcts: search.simulations
    completions each, drawn as in training, the most probable that a beam finds, or from a tree search; mcts_q: from
    one that passes over states where q.path's Q says that nothing is decided."""
    split: Literal["heldout", "train"] = "heldout"
    """heldout: for figures. train: for answers to learn from, jobs/train_q.py's."""
    problems: Count = 256
    """Problems that are asked."""
    ks: Unique[Count] = (1, 4, 16)
    """pass@k of the samples."""
    chunk: Count = 64
    """Problems in the engines at once; what a stopped evaluation may lose."""


class DiversityConfig(_Branch):
    prefixes: Count = 64
    """Texts, drawn from data.path or the task's demonstrations, whose beginnings are continued."""
    prefix_tokens: Tokens = 32
    """Length of a beginning at most; of prompts and answers, a beginning ends where an answer starts."""
    continuations: Annotated[Count, Field(ge=2)] = 8
    """Of each beginning, up to rollout.max_new_tokens long."""
    encoder: str = ""
    """A sentence-transformers model, directory or hub id. Empty: the MiniLM that `make evals` installs."""


class HarnessConfig(_Branch):
    tasks: Unique[Name] = ()
    """Of the evaluation harness, e.g. mmlu gsm8k; or names of your own in include_path."""
    include_path: str = ""
    """A folder of your own task files."""
    num_fewshot: Annotated[int, Field(strict=True, ge=-1)] = -1
    """Examples before each question; below 0, as many as the task says."""
    limit: Whole = 0
    """Questions of each task; 0 for all."""
    likelihoods: Some[Literal["base", "marginal", "greedy"]] = ("base", "marginal")
    """base: the bare base. marginal: CoLA, its tokens' probabilities summed over all actions. greedy: CoLA, under its
    most probable action."""


class SweepConfig(_Branch):
    field: str = "rl.kl_coef"
    """Any dotted field of these settings."""
    values: Some[bool | int | Finite | str] = (0.0, 0.001, 0.01, 0.1)
    """What it is set to; a field that takes several parts takes them with commas."""
    seeds: Some[Seed] = (0, 1)
    """Each value is tried with each of them."""
    parallel: Whole = 0
    """Runs at the same time. 0: as many as the cluster has room for, of a local one that this sweep starts: one."""
    asha: bool = False
    """Stop the runs that are behind early: asynchronous successive halving on the training reward."""
    grace_steps: Count = 10
    """asha: learner steps before a run may be stopped."""


class ReproduceConfig(_Branch):
    stages: Unique[Name] = ()
    """Names of those to run, with what they need; empty: all."""
    parallel: Whole = 0
    """Stages at the same time. 0: two with the tiny preset, else one."""


class HardwareConfig(_Branch):
    """What `python -m cola_ray.studies.plan` assumes of the machines."""

    gpu: Literal["a100", "h100", "h200", "l40s"] = "h100"
    """Data sheets are in plan.py; a100 and h100 with 80 GB."""
    gpus: Whole = 0
    """In the cluster. 0: as many as learner and engines ask for."""
    gpus_per_node: Count = 8
    """Between which the fast links are."""
    network_gbs: Positive = 50.0
    """GB/s between nodes; 50 is 400 Gbit/s."""
    memory_gb: NonNegative = 0.0
    """GiB of the machine's memory, for runs on CPU. 0: this one's."""
    response_tokens: Whole = 0
    """Mean length of a completion. 0: half of rollout.max_new_tokens."""


class ClusterConfig(_Branch):
    address: str = ""
    """Ray cluster to attach to. Empty: RAY_ADDRESS or the running job's, else a local one for this run."""
    learner_ranks: Processes = 2
    """ZeRO-3 ranks."""
    learner_placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """Of the ranks, in Ray's words: on as few nodes as there are, on one, over many, each on its own."""
    learner_group: str = ""
    """Custom resource of the nodes that take learner ranks, as cluster/ names it. Empty: any node."""
    rollout_group: str = ""
    """Of the nodes that take engines."""
    service_group: str = ""
    """Of the nodes that take controller, replay, critics and reward model."""
    use_gpu: bool = False
    """Place learner ranks and engines on GPUs (nccl); else CPU (gloo)."""
    threads_per_process: Processes = 1
    """PyTorch threads of each learner rank and engine on CPU."""
    max_failures: Whole = 2
    """Times the learner is restarted from its last checkpoint before the run fails."""
    colocated: bool = False
    """Learner and engines share GPUs in turn: engines sleep while the learner trains. Needs max_staleness 0."""
    weight_transport: Literal["object_store", "nccl"] = "object_store"
    """How new weights reach engines: Ray's object store, or a broadcast between GPUs (gloo where there are none)."""
    stall_timeout_s: Seconds = 1800.0
    """Seconds anything may be waited for before the run fails and names it."""
    answer_timeout_s: Seconds = 120.0
    """Seconds in which engines, ranks, services and Ray itself must answer once they are up; what does not hangs, is
    ended, and counts as lost."""


class Config(_Branch):
    """Settings of a run. Every field can be given as --branch.field on the command line."""

    preset: Literal["tiny", "smollm2-135m", "llama-3.1-8b"] = "tiny"
    """tiny, smollm2-135m or llama-3.1-8b: sets every default below."""
    output_dir: str = ""
    """Folder of checkpoints, summary and plots. Empty: outputs/<job>-<preset>, of a submitted job below ~/cola_ray."""
    seed: Seed = 0
    """Of data order, initial weights and action noise."""
    resume: bool = False
    """Continue the run in output_dir from its last checkpoint."""
    overwrite: bool = False
    """Remove what an earlier run wrote in output_dir, by its own record, and begin anew."""
    tracking_uri: str = ""
    """MLflow server or database. Empty: sqlite file beside the outputs."""
    tracking_parent: str = ""
    """Run that this one is shown below in MLflow, as a sweep's are: its id there, or in its log.jsonl."""
    model: ModelConfig = ModelConfig()
    """What CoLA is attached to, and its sizes."""
    task: TaskConfig = TaskConfig()
    """What is asked, and how it is scored."""
    data: DataConfig = DataConfig()
    """Texts to pre-train on."""
    pretrain: PretrainConfig = PretrainConfig()
    """From a base to a policy over latent actions."""
    rollout: RolloutConfig = RolloutConfig()
    """The engines that answer."""
    rl: RLConfig = RLConfig()
    """How the policy learns."""
    replay: ReplayConfig = ReplayConfig()
    """Agents: the turns that are kept to learn from."""
    critic: CriticConfig = CriticConfig()
    """Agents: the utterance critic of archer and chai."""
    search: SearchConfig = SearchConfig()
    """Tree search, and how much of it."""
    q: LoggedQConfig = LoggedQConfig()
    """MCTS-Q's values of actions."""
    eval: EvalConfig = EvalConfig()
    """Jobs/evaluate.py."""
    diversity: DiversityConfig = DiversityConfig()
    """Jobs/diversity.py."""
    harness: HarnessConfig = HarnessConfig()
    """Jobs/capabilities.py."""
    sweep: SweepConfig = SweepConfig()
    """Jobs/sweep_kl.py."""
    reproduce: ReproduceConfig = ReproduceConfig()
    """Jobs/reproduce.py."""
    hardware: HardwareConfig = HardwareConfig()
    """What `python -m cola_ray.studies.plan` assumes of the machines."""
    cluster: ClusterConfig = ClusterConfig()
    """Where processes are placed."""

    @property
    def learns_values(self) -> bool:
        """Whether a head over the frozen states trains beside the policy."""
        rl = self.rl
        within_turns = rl.algorithm == "archer" and self.critic.token_baseline
        return rl.algorithm in ("ppo", "etpo") or rl.control_variate or within_turns

    @property
    def replays(self) -> bool:
        """Whether what the learner trains on comes out of replay."""
        return self.rl.algorithm in OF_TURNS or self.rl.actor_free


def is_environment(task: str) -> bool:
    """Whether a task has many turns, by its name; of your own, whether the class has a ``step``."""
    if ":" not in task:
        return task in MULTI_TURN
    module, _, attribute = task.partition(":")
    try:
        return hasattr(getattr(importlib.import_module(module), attribute, None), "step")
    except (Exception, SystemExit):  # of the module's own code, which tasks/inspection.py tells
        return False


def results_root() -> Path:
    """What relative outputs are relative to: here, or ~/cola_ray for a submitted job, whose copy Ray deletes."""
    return Path.home() / "cola_ray" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path()


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A new tree with dotted fields changed, e.g. ``{"rl.kl_coef": 0.01}``.

    Raises:
        ConfigError: a line for each field that is unknown or has a wrong value.
    """
    changed, wrong = try_override(config, changes)
    if wrong:
        raise ConfigError("\n".join(wrong.values()))
    return changed


def try_override(config: Config, changes: Mapping[str, Any]) -> tuple[Config, dict[str, str]]:
    """As :func:`override`: the tree with those changes that can be made, and a line for each field that cannot."""
    wrong: dict[str, str] = {}
    tree = config.model_dump()
    for dotted, value in changes.items():
        if _is_field(dotted):
            _put(tree, dotted, value)
        else:
            near = difflib.get_close_matches(dotted, schemas(), n=1)
            wrong[dotted] = f"{dotted} = {value!r}: no such field; did you mean {near[0] if near else '--help'}?"
    try:
        return Config.model_validate(tree), wrong
    except ValidationError as error:
        refused = refusals(error, schemas(), tree)
    to_blame = [dotted for dotted in changes for field in refused if f"{field}.".startswith(f"{dotted}.")]
    right = {dotted: value for dotted, value in changes.items() if dotted not in {*wrong, *to_blame}}
    return try_override(config, right)[0], wrong | refused


def value_at(config: Config, field: str) -> Any:
    """Of a dotted field."""
    return functools.reduce(getattr, field.split("."), config)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted field; an empty dictionary is a value."""
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
