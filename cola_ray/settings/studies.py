"""Branches of the settings for what is measured and kept to look at, for plans, and for where processes are placed."""

from typing import Annotated, Literal

from pydantic import Field

from cola_ray.settings.limits import (
    Branch,
    Count,
    Finite,
    Name,
    NonNegative,
    Positive,
    Processes,
    Rate,
    Seconds,
    Seed,
    Share,
    Some,
    Tokens,
    Unique,
    Whole,
)


class SamplesConfig(Branch):
    every: Whole = 10
    """Steps between those whose completions are kept in output_dir/samples, beside the first and the last step.
    Evaluations' always are. 0: those alone."""
    prompts: Whole = 8
    """Prompts kept of a step, with all of their completions, and of an evaluation; agents: environment seeds with all
    of their episodes. As many as rl.prompts_per_step keeps everything. 0: nothing is kept."""
    max_mb: Count = 256
    """Most that they take on disk. Beyond it steps between others are removed, so that the rest spans the run."""

    def due(self, version: int, last: int) -> bool:
        """Whether completions of the step that makes ``version``, of ``last``, are kept."""
        return bool(self.prompts and self.every) and (version in (1, last) or version % self.every == 0)

    def has(self, position: int, prompts_per_step: int, last: int) -> bool:
        """Whether completions of the prompt at this position of a run are kept; those of refills lie beyond its end."""
        step, number = divmod(position, prompts_per_step)
        return number < self.prompts and step < last and self.due(step + 1, last)


class SearchConfig(Branch):
    simulations: Count = 32
    """Completions that a search, or sampling, may make of one problem."""
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


class LoggedQConfig(Branch):
    path: str = ""
    """mcts_q: the folder model/ that `cola_ray train-q` left."""
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


class EvalConfig(Branch):
    ways: Some[AnswerWay] = ("base", "greedy", "sample", "mcts")
    """greedy: the policy's most probable actions. base: the bare base, greedily. sample, beam, mcts: search.simulations
    completions each, drawn as in training, the most probable that a beam finds, or from a tree search; mcts_q: from
    one that passes over states where q.path's Q says that nothing is decided."""
    split: Literal["heldout", "train"] = "heldout"
    """heldout: for figures. train: for answers to learn from, `cola_ray train-q`'s."""
    problems: Count = 256
    """Problems that are asked."""
    ks: Unique[Count] = (1, 4, 16)
    """pass@k of the samples."""
    chunk: Count = 64
    """Problems in the engines at once; what a stopped evaluation may lose."""


class DiversityConfig(Branch):
    prefixes: Count = 64
    """Texts, drawn from data.path or the task's demonstrations, whose beginnings are continued."""
    prefix_tokens: Tokens = 32
    """Length of a beginning at most; of prompts and answers, a beginning ends where an answer starts."""
    continuations: Annotated[Count, Field(ge=2)] = 8
    """Of each beginning, up to rollout.max_new_tokens long."""
    encoder: str = ""
    """A sentence-transformers model, directory or hub id. Empty: the MiniLM that `make evals` installs."""


class HarnessConfig(Branch):
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


class SweepConfig(Branch):
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


class ReproduceConfig(Branch):
    stages: Unique[Name] = ()
    """Names of those to run, with what they need; empty: all."""
    parallel: Whole = 0
    """Stages at the same time. 0: two with the tiny preset, else one."""


class HardwareConfig(Branch):
    """What `cola_ray plan` assumes of the machines."""

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
    response_spread: Annotated[NonNegative, Field(le=4)] = 0.7
    """Standard deviation of the logarithm of a completion's length, of which idle shares come. 0: all are of the mean
    length; rollout/response_length and rollout/truncated tell of your own runs."""


class ClusterConfig(Branch):
    address: str = ""
    """Ray cluster to attach to. Empty: RAY_ADDRESS or the running job's, else a local one for this run."""
    learner_ranks: Processes = 2
    """ZeRO-3 ranks. A run may be resumed on another number of them."""
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
    gradient_checkpointing: bool = False
    """Learner: decoder layers that train keep their inputs alone and are computed again in the backward pass, a third
    more time for far less memory."""
    offload_optimizer: bool = False
    """Learner on GPUs: float32 weights, gradients and Adam's moments stay in host memory, and Adam steps there."""
    offload_frozen: bool = False
    """Learner on GPUs: weights that do not train, base and reference, wait in host memory and come layer by layer."""
    max_failures: Whole = 2
    """Times the learner is restarted from its last checkpoint before the run fails."""
    weight_transport: Literal["object_store", "nccl"] = "object_store"
    """How new weights reach engines: Ray's object store, or a broadcast between GPUs (gloo where there are none)."""
    stall_timeout_s: Seconds = 1800.0
    """Seconds anything may be waited for before the run fails and names it."""
    answer_timeout_s: Seconds = 120.0
    """Seconds in which engines, ranks, services and Ray itself must answer once they are up; what does not hangs, is
    ended, and counts as lost."""
