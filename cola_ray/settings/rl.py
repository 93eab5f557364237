"""Branches of the settings for rollouts, RL, and the replay and critic of agents."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cola_ray import registry
from cola_ray.settings.limits import (
    Branch,
    Count,
    Decay,
    Finite,
    Name,
    NonNegative,
    Positive,
    PositiveShare,
    Processes,
    Rate,
    Seconds,
    Share,
    Temperature,
    Tokens,
    Whole,
    nearest,
)


def _known_algorithm(name: str) -> str:
    known = registry.BUILT_IN["algorithm"]
    if name not in known and not registry.is_path(name) and name not in registry.names("algorithm"):
        raise ValueError(nearest(name, list(known), "unknown"))
    return name


def _above_half(expectile: float) -> float:
    if 0 < expectile <= 0.5:
        raise ValueError("an expectile up to 0.5 looks away from good actions; use 0 (none) or a number above 0.5")
    return expectile


def _above_one(bound: float) -> float:
    if 0 < bound <= 1:
        raise ValueError("a ratio of 1 is no change; use 0 (none) or a number above 1, e.g. 3")
    return bound


class RolloutConfig(Branch):
    num_workers: Processes = 1
    """vLLM engines, each a Ray actor: the data parallelism of rollouts."""
    tensor_parallel_size: Processes = 1
    """GPUs per engine."""
    temperature: Temperature = 1.0
    """Temperature of the action distribution; log-probabilities include it."""
    top_k: Whole = 0
    """The most probable actions kept when sampling. 0: all. Log-probabilities include the truncation."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling: among top_k, the smallest set of most probable actions with this total probability is kept when
    sampling. 1: all. Log-probabilities include the truncation."""
    max_prompt_tokens: Tokens = 256
    """Longest prompt in tokens; problems with longer prompts are left out and counted."""
    max_new_tokens: Tokens = 256
    """Most tokens that a completion may have."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion or an agent's utterance, in addition to the checkpoint's end tokens and what the
    task declares. A verifier or environment reads the text before the string."""
    max_num_seqs: Annotated[Count, Field(le=65_536)] = 64
    """Most concurrent requests in an engine."""
    kv_cache_mb: Count = 512
    """Size in MB of an engine's key/value cache on CPU; on GPU, rollout.gpu_memory_utilization determines it."""
    gpu_memory_utilization: PositiveShare = 0.9
    """On GPU: share of each GPU's memory that an engine takes; the part that the weights leave is the key/value
    cache."""
    max_num_batched_tokens: Whole = 0
    """Most tokens of prompts and completions that an engine computes in one step. 0: vLLM's choice."""
    prefix_caching: bool = True
    """Prompts share the keys and values of common prefixes, so that a group's prompt is computed once."""
    quantization: Literal["none", "fp8"] = "none"
    """On GPU, fp8: the decoder layers' weights have 8 bits in the engine, converted from each version as it arrives.
    The engine then samples from a policy that differs from the learner's; rl.importance_cap corrects for it."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """On GPU, fp8: keys and values have 8 bits, so twice as many fit. auto: model.dtype."""
    enforce_eager: bool = False
    """On GPU: no compilation and no CUDA graphs. Starts in seconds and decodes slowly."""
    optimization_level: Annotated[Whole, Field(le=3)] = 2
    """On GPU: how far vLLM compiles the model, 0 not at all; higher levels start later and decode faster."""
    async_scheduling: bool = True
    """On GPU: an engine prepares the next step while the GPU computes this one."""
    engine_args: dict[Name, int | Finite | str | bool] = Field(default_factory=dict)
    """Further arguments of vllm.LLM by name, e.g. block_size 64; arguments that have a setting here are refused."""
    environment_processes: Processes = 2
    """Processes that a worker's multi-turn environments share; for task.name program, how many task.command
    processes a worker runs at a time."""
    in_rounds: bool = False
    """Agents: a worker's episodes take their turns together, so that a run is reproducible bit for bit however fast
    environments answer, if the engine's arithmetic allows it. Each round waits for the slowest."""
    max_restarts: Whole = 3
    """Times in a row a worker may die without completing a share of a step's prompts before the run fails."""


def steered_layers(steering: str, num_layers: int) -> range:
    """The decoder layers of a base that get a steering vector."""
    return range({"off": num_layers, "last": num_layers - 1, "all": 0}[steering], num_layers)


class RLConfig(Branch):
    algorithm: Annotated[
        str, AfterValidator(_known_algorithm), Field(json_schema_extra={"enum": list(registry.BUILT_IN["algorithm"])})
    ] = "grpo"
    """grpo: group-normalised advantages. rloo: leave-one-out baseline. remax: the greedy completion as baseline.
    reinforce: the batch's mean as baseline. ppo: a value head on the base's states, and GAE. etpo: soft Q-learning over
    actions, with kl_coef as beta. tbrm: the policy's own logits are values, with kl_coef as beta, and account for the
    reward of each whole trajectory. For agents also: archer: advantages of whole utterances by an off-policy critic.
    archer_soft: the same critic over replayed utterances, and a soft Q over actions inside them, as etpo's.
    chai: the policy stays fixed, and the critic chooses among its utterances. filtered_bc: clone the best of all
    episodes. gigpo: episodes against others of their seed, and turns against others from the same state. Or your own,
    package.module:name or file.py:name."""
    advantage: str = ""
    """Advantage that replaces the algorithm's, for grpo, rloo, remax, reinforce and yours: one of these names, or your
    own function of a step's outcomes as package.module:name or file.py:name. Empty: the algorithm's."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What grpo's advantages, rewards minus their prompt's mean, are divided by. group: the standard deviation of the
    prompt's rewards. batch: that of all rewards in the batch. none: nothing, as in Dr. GRPO. For gigpo the same, with
    returns of a seed's episodes, and with what followed turns from the same state."""
    step_advantage_w: NonNegative = 1.0
    """gigpo: weight of comparing a turn with others from its state, relative to the comparison of episodes."""
    anchor_state: Literal["observation", "transcript"] = "observation"
    """gigpo: when the states of two turns count as the same. observation: if the environment's last observation (at the
    first turn, its opening) is the same; for environments that describe where the agent is. transcript: if the
    whole text that the policy reads is the same."""
    loss: str = ""
    """ppo: the clipped surrogate with each action's ratio. gspo: with a sequence's ratio; use clips of about 3e-4 and
    rl.loss_agg_mode seq-mean-token-mean. cispo: the clipped ratio is a weight, and no action loses its gradient. Or
    your own function of log-probabilities and advantages, as package.module:name or file.py:name. Empty: the
    algorithm's loss, or ppo if it has none."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How the losses of actions become one number. token-mean: every action of the batch has the same weight, as in
    DAPO. seq-mean-token-mean: every sequence has the same, as in GRPO's paper. seq-mean-token-sum: the mean over
    sequences of their sums. seq-mean-token-sum-norm: that divided by rollout.max_new_tokens, as in Dr. GRPO."""
    action_space: Literal["latent", "token"] = "latent"
    """latent: actions of the learned codebook; the policy over them trains. token: the plain base chooses tokens and is
    trained itself, with the same workers, tasks and algorithms, for comparison with latent actions."""
    actor_free: bool = False
    """etpo over latent actions: no policy trains. Actions come from rho exp(Q / kl_coef) / Z, exact over all actions,
    with rho the start policy. Per step, Q learns from as many replayed completions, of any age, as are generated."""
    lora_rank: Whole = 0
    """token: above 0, low-rank adapters of this rank are trained instead of the base."""
    steering: Literal["off", "all", "last"] = "off"
    """token: steering vectors, which are added to the outputs of decoder layers, are trained instead of the base. all:
    one for each layer. last: one, for the last layer. The final model of a run has them as biases."""
    max_steps: Count = 100
    """Learner steps."""
    prompts_per_step: Count = 64
    """Prompts per step, each with a group of completions; for agents, environment seeds per step."""
    group_size: Count = 4
    """Completions per prompt."""
    lr: Rate = 5e-7
    """Adam's peak learning rate."""
    warmup_steps: Whole = 0
    """Steps of linear warm-up of the learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: a constant lr, or a decay to lr times min_lr_ratio at rl.max_steps."""
    min_lr_ratio: Share = 0.0
    """The schedules linear and cosine end at lr times this."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Adam's two betas."""
    grad_clip: NonNegative = 1.0
    """Norm to which all policy gradients together are clipped."""
    kl_coef: NonNegative = 0.001
    """Weight of KL(policy || reference) over actions. etpo, tbrm, archer_soft: a difference in value of about four
    times this decides a choice; 0.05 suits rewards of 0 and 1."""
    kl_in: Literal["reward", "loss"] = "reward"
    """reward: an action is also penalised for the divergence in states that it leads to. loss: only for that in its own
    state."""
    kl_estimator: Literal["exact", "k1", "k2", "k3"] = "exact"
    """exact: the sum over all actions, which is cheap with 64 of them and has no sampling variance. k1, k2, k3:
    estimates from the action taken."""
    kl_target: NonNegative = 0.0
    """Above 0: kl_coef is adapted after every step to keep the divergence per action near this."""
    entropy_coef: NonNegative = 0.0
    """Weight of a bonus for the policy's entropy, in the loss."""
    control_variate: bool = False
    """A Q over all actions is subtracted from each advantage as a control variate, and its mean is added exactly: the
    same expected gradient with less variance. For grpo, rloo, remax and reinforce on problems with answers."""
    marginal_aliases: bool = False
    """latent: an action's log-probability is that of its token, summed over all actions that give this token: the same
    expected gradient with less variance, at the cost of running the world model on all actions."""
    dynamic_sampling: bool = False
    """grpo, rloo: groups whose rewards are all equal give no signal and are replaced by other prompts."""
    refill_rounds: Whole = 2
    """dynamic_sampling: how often a step draws other prompts for missing groups; after that its batch is smaller."""
    reward_clip_range: Positive | None = None
    """Rewards of completions, and of an agent's turns, are clipped to at most this far from 0 for learning. Metrics,
    samples and evaluations have the original rewards. None: no clip."""
    overlong_buffer: Whole = 0
    """Above 0: within this many tokens of rollout.max_new_tokens, a completion's reward falls, by 1 at the limit. With
    grpo, rloo and remax only if the rewards of a prompt's completions differ: length alone is no signal."""
    mask_truncated_completions: bool = False
    """Completions that rollout.max_new_tokens cut off are left out of the loss, since their outcome is unknown. Their
    rewards still count when others are compared with them."""
    clip_low: Share = 0.2
    """The lower clip of the ratio is 1 - clip_low."""
    clip_high: NonNegative = 0.2
    """The upper clip of the ratio is 1 + clip_high."""
    clip_c: Annotated[NonNegative, AfterValidator(_above_one)] = 0.0
    """Dual clip: upper bound of the ratio if the advantage is negative, e.g. 3. 0: no bound."""
    updates_per_batch: Count = 1
    """Passes over one batch of rollouts, with an optimizer step for each of their mini-batches."""
    num_minibatches: Count = 1
    """Mini-batches into which a step's sequences are divided, anew in every pass, with an optimizer step each. Ratios
    are relative to the policy before the first one, and advantages are those of the whole batch."""
    gae_lambda: Share = 0.95
    """ppo: decay of temporal-difference errors over actions, or over turns with gae_level turn."""
    gae_level: Literal["token", "turn"] = "token"
    """ppo, for agents: the unit of advantages. token: each action has its own value and advantage. turn: an utterance
    is one step, with a value at its first action and one advantage for all of its actions."""
    value_lr: Rate = 1e-3
    """Adam's learning rate for the value head (of ppo, and of archer with critic.token_baseline) and for the Q of etpo
    and archer_soft."""
    value_steps: Count = 4
    """Gradient steps of the value head or Q on one batch."""
    cliprange_value: NonNegative = 0.0
    """ppo, and archer with critic.token_baseline: how far a value may move on one batch, in units of the reward. 0: no
    limit."""
    target_tau: PositiveShare = 0.005
    """etpo, archer_soft: share of Q that its target network takes over after each step of Q."""
    micro_batch_tokens: Count = 16_384
    """Tokens per forward pass on one rank, with padding, or where prompts are shared without; at least one sequence."""
    max_staleness: Whole = 0
    """Versions a rollout may lag behind the learner. 0 is strictly on-policy; 1 overlaps rollouts with learning."""
    window: Whole = 0
    """How many steps late a prompt's group may be trained on: a step takes the first rl.prompts_per_step groups that
    finish, and does not wait for the longest. It is part of rl.max_staleness, whose rest, 1 or more, is the number of
    steps that are generated ahead. 0: every step waits for its own groups."""
    update_mode: Literal["drain", "continue"] = "drain"
    """When new weights arrive, requests in flight finish on the old version first (drain), or continue on the new one
    (continue)."""
    importance_cap: NonNegative = 2.0
    """Cap of pi_learner / pi_rollout, the weight that corrects staleness and engine mismatch. 0: no weight."""
    importance_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask"
    ] = "token_truncate"
    """token: each action has its own weight. sequence: the product over its sequence's actions. geometric: their
    geometric mean; use caps of about 1.01. truncate: weights are at most importance_cap. mask: actions or sequences
    with larger weights are left out, with geometric_mask also those with weights below 1 / importance_cap."""
    cache_hidden_states: bool = False
    """The engine returns the base's states with the tokens, and the learner holds no base at all."""
    share_prompts: bool = True
    """The learner computes a prompt once for all of its completions in a micro-batch. No effect on models with
    sliding-window attention."""
    eval_every: Whole = 10
    """Steps between greedy evaluations. 0: only at start and end."""
    eval_problems: Count = 512
    """Held-out problems per evaluation."""
    save_every: Count = 20
    """Steps between checkpoints."""

    @property
    def trains_all_weights(self) -> bool:
        """Whether the policy or base itself is trained, rather than adapters or steering vectors."""
        return not self.lora_rank and self.steering == "off"


class ReplayConfig(Branch):
    max_rows: Count = 100_000
    """Turns kept (with rl.actor_free, completions), over all shards; the oldest are removed first."""
    max_mb: Count = 4096
    """Largest size in MB of the replayed data, over all shards."""
    shards: Processes = 1
    """Actors among which the replayed data is divided."""
    snapshot_every_s: Seconds = 30.0
    """Seconds between snapshots; a shard that dies loses at most the data since the last one."""
    kept_share: PositiveShare = 0.1
    """filtered_bc: share of the best episodes that are cloned."""


class CriticConfig(Branch):
    gpu_share: Share = 0.0
    """Share of a GPU that each replica takes if cluster.use_gpu is set, e.g. 0.25. 0: replicas compute on CPU."""
    encoder: str = ""
    """A Hugging Face encoder that reads states and utterances as text and trains with the critic, e.g. roberta-base.
    Empty: the base's own states, which cost nothing. Not for chai, whose players choose by these states."""
    replicas: Processes = 1
    """Actors among which each of the critic's batches is divided."""
    gamma: Share = 0.95
    """Discount per turn, also for ppo and gigpo."""
    tau: PositiveShare = 0.1
    """Share of the critic that its target network takes over after each critic step."""
    lr: Rate = 3e-4
    """Adam's learning rate for the critic."""
    grad_clip: NonNegative = 1.0
    """Norm to which the critic's gradients are clipped."""
    steps: Count = 50
    """Critic steps per iteration."""
    batch_size: Count = 256
    """Turns per critic step."""
    fresh_states: Count = 512
    """Replayed states per iteration in which the policy generates a fresh utterance, for V's targets and the actor's
    batch. archer_soft: the replayed utterances are used, and nothing is generated."""
    warmup_iterations: Whole = 10
    """Iterations at the start that train only the critic."""
    candidates: Count = 5
    """chai, or archer and archer_soft with chooses: utterances to choose from per turn."""
    chooses: bool = False
    """archer, archer_soft: players say the utterance that the critic rates highest of several, as chai's do, and the
    policy learns from it. Features that the critic reads and the policy's states lack take effect at once. Not
    with critic.encoder."""
    priority_beta: Share = 0.0
    """Above 0, e.g. 0.4: turns with a large error are replayed more often, and have importance weights with this
    exponent."""
    actor_states: Literal["replayed", "played"] = "replayed"
    """archer: replayed: the actor learns from its fresh utterances in fresh_states, as in the paper. played: from all
    turns of the episodes just played; the learner processes each sequence once for all of its turns."""
    reuse: Count = 1
    """actor_states played: number of latest iterations whose episodes the actor learns from; older ones have importance
    weights, see rl.importance_cap."""
    td_share: Share = 0.0
    """archer: share of r + gamma V(s') - V(s) in a played utterance's advantage; the rest is Q(s, u) - V(s). The former
    has sampling variance, the latter Q's error on utterances that it has rarely seen."""
    token_baseline: bool = False
    """archer: subtract a value head's estimate of the utterance's advantage, learnt at every token."""
    expectile: Annotated[Decay, AfterValidator(_above_half)] = 0.0
    """0: V is fitted to fresh utterances. Above 0.5: to replayed ones, by IQL's expectile regression."""
