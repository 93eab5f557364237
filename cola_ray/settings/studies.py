"""Branches of the settings for samples, evaluations and other studies, plans, and the placement of processes."""

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
    """Every so many steps, and at the first and the last, completions are kept in output_dir/samples. Those of
    evaluations always are. 0: only those of evaluations."""
    prompts: Whole = 8
    """Prompts kept per step, with all of their completions, and per evaluation; agents: environment seeds with all of
    their episodes. With as many as rl.prompts_per_step everything is kept. 0: nothing is kept."""
    max_mb: Count = 256
    """Most disk space that samples take. Beyond it, intermediate steps are removed, so that the rest spans the run."""

    def due(self, version: int, last: int) -> bool:
        """Whether completions of the step that makes ``version`` are kept; ``last`` is the run's last version."""
        return bool(self.prompts and self.every) and (version in (1, last) or version % self.every == 0)

    def has(self, position: int, prompts_per_step: int, last: int) -> bool:
        """Whether completions of the prompt at this position of a run are kept; refills have positions beyond it."""
        step, number = divmod(position, prompts_per_step)
        return number < self.prompts and step < last and self.due(step + 1, last)


class SearchConfig(Branch):
    simulations: Count = 32
    """Completions that a search, or sampling, may generate for one problem."""
    max_tokens: Whole = 0
    """Tokens that may be generated for one problem. 0: no limit."""
    max_seconds: NonNegative = 0.0
    """Time limit in seconds for one problem, while eval.chunk problems share the engines. 0: no limit."""
    root_breadth: Count = 5
    """Actions that are tried after the prompt, the most probable ones."""
    breadth: Count = 4
    """Actions that are tried after any other state."""
    depth: Tokens = 64
    """Largest depth of a node, in tokens after the prompt."""
    c_puct: NonNegative = 0.7
    """PUCT's weight of the policy's probabilities relative to the values found so far."""
    searchers: Count = 4
    """Simulations of one problem that run at the same time."""


class LoggedQConfig(Branch):
    path: str = ""
    """mcts_q: the folder model/ that `cola_ray train-q` left."""
    gamma: Share = 1.0
    """Discount of an action; the reward comes at the last one."""
    lr: Rate = 1e-3
    """Adam's learning rate for Q."""
    copy_every: Count = 50
    """Steps between copies of Q to its target network."""
    max_error: NonNegative = 0.01
    """mcts_q: a state in which Q's squared temporal-difference error is below this counts as one without a decision."""
    jump: Count = 64
    """mcts_q: most actions in a row that a search may skip, in states without a decision."""


AnswerWay = Literal["greedy", "base", "sample", "beam", "mcts", "mcts_q"]


class EvalConfig(Branch):
    ways: Some[AnswerWay] = ("base", "greedy", "sample", "mcts")
    """greedy: the policy's most probable actions. base: the bare base, greedily. sample, beam, mcts: search.simulations
    completions each, drawn as in training, the most probable that a beam finds, or from a tree search. mcts_q: from a
    tree search that skips states in which q.path's Q sees no decision."""
    split: Literal["heldout", "train"] = "heldout"
    """Which problems are asked. heldout: for figures. train: for answers from which `cola_ray train-q` learns."""
    problems: Count = 256
    """Number of problems that are asked."""
    ks: Unique[Count] = (1, 4, 16)
    """The values of k for pass@k of the samples."""
    chunk: Count = 64
    """Problems in the engines at once; a stopped evaluation loses at most these."""


class DiversityConfig(Branch):
    prefixes: Count = 64
    """Texts, drawn from data.path or the task's demonstrations, whose beginnings are continued."""
    prefix_tokens: Tokens = 32
    """Largest length of a beginning; in texts of prompts and answers, a beginning ends where an answer starts."""
    continuations: Annotated[Count, Field(ge=2)] = 8
    """Continuations of each beginning, up to rollout.max_new_tokens long."""
    encoder: str = ""
    """A sentence-transformers model, directory or hub id. Empty: the MiniLM that `make evals` installs."""


class HarnessConfig(Branch):
    tasks: Unique[Name] = ()
    """Tasks of the evaluation harness, e.g. mmlu gsm8k; or names of your own in include_path."""
    include_path: str = ""
    """A folder of your own task files."""
    num_fewshot: Annotated[int, Field(strict=True, ge=-1)] = -1
    """Examples before each question. Below 0: the task's own number."""
    limit: Whole = 0
    """Questions of each task. 0: all."""
    likelihoods: Some[Literal["base", "marginal", "greedy"]] = ("base", "marginal")
    """base: the bare base. marginal: CoLA, its tokens' probabilities summed over all actions. greedy: CoLA, under its
    most probable action."""


class SweepConfig(Branch):
    field: str = "rl.kl_coef"
    """The setting that varies: any dotted field of these settings."""
    values: Some[bool | int | Finite | str] = (0.0, 0.001, 0.01, 0.1)
    """The values that sweep.field is set to; the parts of a field that takes several are separated by commas."""
    seeds: Some[Seed] = (0, 1)
    """Each value is tried with each of these seeds."""
    parallel: Whole = 0
    """Runs at the same time. 0: as many as the cluster has room for; one on a local cluster that this sweep starts."""
    asha: bool = False
    """Stop worse runs early: asynchronous successive halving on the training reward."""
    grace_steps: Count = 10
    """asha: learner steps before a run may be stopped."""


class ReproduceConfig(Branch):
    stages: Unique[Name] = ()
    """Names of the stages to run; those that they need run, too. Empty: all."""
    seeds: Unique[Seed] = ()
    """Seeds to run the stages with; the report then has intervals over seeds. Empty: `seed` alone."""
    parallel: Whole = 0
    """Stages at the same time. 0: two with the tiny preset, else one."""


class HardwareConfig(Branch):
    """What `cola_ray plan` assumes of the machines."""

    gpu: Literal["a100", "h100", "h200", "l40s"] = "h100"
    """GPU type, with the figures of its data sheet (GPUS in studies/planned_time.py); a100 and h100 have 80 GB."""
    gpus: Whole = 0
    """GPUs in the cluster. 0: as many as learner and engines ask for."""
    gpus_per_node: Count = 8
    """GPUs per node, which are connected by fast links."""
    network_gbs: Positive = 50.0
    """GB/s between nodes; 50 is 400 Gbit/s."""
    memory_gb: NonNegative = 0.0
    """GiB of the machine's memory, for runs on CPU. 0: this one's."""
    response_tokens: Whole = 0
    """Mean length of a completion. 0: half of rollout.max_new_tokens."""
    response_spread: Annotated[NonNegative, Field(le=4)] = 0.7
    """Standard deviation of the logarithm of a completion's length, from which idle shares are computed. 0: all have
    the mean length. The metrics rollout/response_length and rollout/truncated show it for your own runs."""


class ClusterConfig(Branch):
    address: str = ""
    """Ray cluster to attach to. Empty: RAY_ADDRESS or the running job's, else a local one for this run."""
    learner_ranks: Processes = 2
    """ZeRO-3 ranks. A run may be resumed on another number of them."""
    learner_placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy for the ranks: on as few nodes as possible, on one, over many, each on its own."""
    learner_group: str = ""
    """Ray's custom resource of the nodes that take learner ranks, as in the files of cluster/. Empty: any node."""
    rollout_group: str = ""
    """The same as learner_group, for the nodes that take engines."""
    service_group: str = ""
    """The same as learner_group, for the nodes that take controller, replay, critics and reward model."""
    use_gpu: bool = False
    """Place learner ranks and engines on GPUs (nccl); otherwise they run on CPU (gloo)."""
    threads_per_process: Processes = 1
    """PyTorch threads of each learner rank and engine on CPU."""
    gradient_checkpointing: bool = False
    """Learner: decoder layers that train store only their inputs and are recomputed in the backward pass, which takes a
    third more time and far less memory."""
    offload_optimizer: bool = False
    """Learner on GPUs: float32 weights, gradients and Adam's moments stay in host memory, and Adam steps there."""
    offload_frozen: bool = False
    """Learner on GPUs: weights that do not train, base and reference, stay in host memory and are loaded layer by
    layer."""
    max_failures: Whole = 2
    """Times the learner is restarted from its last checkpoint before the run fails."""
    weight_transport: Literal["object_store", "nccl"] = "object_store"
    """How new weights reach engines: Ray's object store, or a broadcast between GPUs (gloo where there are none)."""
    stall_timeout_s: Seconds = 1800.0
    """Seconds that the run waits for anything before it fails; the message names what it waited for."""
    answer_timeout_s: Seconds = 120.0
    """Seconds in which engines, ranks, services and Ray itself must answer once they have started; one that does not
    counts as hanging, is ended, and is treated as lost."""
