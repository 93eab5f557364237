"""Branches of the settings that decide on rollouts, RL, and the critic of agents."""

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
    """GPUs an engine spans."""
    temperature: Temperature = 1.0
    """Of the action distribution; log-probabilities include it."""
    top_k: Whole = 0
    """Actions kept when sampling, 0 all; log-probabilities include the truncation."""
    top_p: PositiveShare = 1.0
    """The fewest most probable actions that have this probability together are kept when sampling, among those of
    top_k; 1 all. Log-probabilities include the truncation."""
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
    gpu_memory_utilization: PositiveShare = 0.9
    """On GPU: share of each GPU's memory that an engine takes; what weights leave of it is for keys and values."""
    max_num_batched_tokens: Whole = 0
    """Tokens of prompts and completions that an engine computes in a step. 0: as vLLM chooses."""
    prefix_caching: bool = True
    """Prompts share the keys and values of what they begin with, so that a group's prompt is computed once."""
    quantization: Literal["none", "fp8"] = "none"
    """On GPU, fp8: the decoder layers' weights have 8 bits in the engine, made of each version as it arrives. What the
    engine then samples differs from the learner's policy; rl.importance_cap corrects for it."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """On GPU, fp8: keys and values have 8 bits, so twice as many fit. auto: model.dtype."""
    enforce_eager: bool = False
    """On GPU: no compilation and no CUDA graphs. Starts in seconds and decodes slowly."""
    optimization_level: Annotated[Whole, Field(le=3)] = 2
    """On GPU: how far vLLM compiles the model, 0 not at all; a higher one starts later and decodes faster."""
    async_scheduling: bool = True
    """On GPU: an engine prepares the next step while the GPU computes this one."""
    engine_args: dict[Name, int | Finite | str | bool] = Field(default_factory=dict)
    """Further arguments of vllm.LLM by name, e.g. block_size 64; those that a setting has are refused."""
    environment_processes: Processes = 2
    """Processes that a worker's multi-turn environments share; of program, those of task.command at a time."""
    in_rounds: bool = False
    """Agents: a worker's episodes take their turns together, so that a run comes out the same bit for bit however fast
    environments answer, where the engine's arithmetic allows. Each round waits for the slowest."""
    max_restarts: Whole = 3
    """Times in a row a worker may die without completing a share before the run fails."""


def steered_layers(steering: str, num_layers: int) -> range:
    """Which of a base's decoder layers get a steering vector."""
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
    chai: the policy stays, and the critic chooses among its utterances. filtered_bc: clone the best of all episodes.
    gigpo: episodes against others of their seed, and turns against others from the same state.
    Or your own, package.module:name or file.py:name."""
    advantage: str = ""
    """In place of the algorithm's own, for grpo, rloo, remax, reinforce and yours: one of these names, or your own
    function of a step's outcomes as package.module:name or file.py:name. Empty: the algorithm's."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What grpo's advantages, rewards less their prompt's mean, are divided by. group: the standard deviation of the
    prompt's rewards. batch: of all rewards in the batch. none: nothing, as in Dr. GRPO. gigpo: the same, of returns of
    a seed's episodes, and of what followed turns from one state."""
    step_advantage_w: NonNegative = 1.0
    """gigpo: weight of a turn's comparison with others from its state, beside that of the episodes."""
    anchor_state: Literal["observation", "transcript"] = "observation"
    """gigpo: what makes the states of two turns the same. observation: what the environment said last, at the first
    turn its opening; for environments that describe where one is. transcript: all that the policy reads."""
    loss: str = ""
    """ppo: the clipped surrogate, of each action's ratio. gspo: of a sequence's ratio, with clips of some 3e-4 and
    rl.loss_agg_mode seq-mean-token-mean. cispo: the ratio is a weight, clipped, and no action loses its gradient. Or
    your own function of log-probabilities and advantages, as package.module:name or file.py:name. Empty: the
    algorithm's, which is ppo where it has none."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How the losses of actions become one number. token-mean: every action of the batch weighs the same, as in DAPO.
    seq-mean-token-mean: every sequence does, as in GRPO's paper. seq-mean-token-sum: sums over sequences, whose mean is
    taken. seq-mean-token-sum-norm: these over rollout.max_new_tokens, as in Dr. GRPO."""
    action_space: Literal["latent", "token"] = "latent"
    """latent: actions of the learned codebook; the policy over them trains. token: the plain base chooses tokens and
    itself trains, through the same workers, tasks and algorithms: what latent actions are compared with."""
    actor_free: bool = False
    """etpo over latent actions: no policy trains. The start policy's rho exp(Q / kl_coef) / Z acts, exact over all
    actions, and Q learns from as many completions of any age, out of replay, as a step generates."""
    lora_rank: Whole = 0
    """token: above 0, low-rank adapters of this rank train in the base's place."""
    steering: Literal["off", "all", "last"] = "off"
    """token: steering vectors train in the base's place, of its width, which are added to what decoder layers give.
    all: one for each layer. last: one, for the last layer. The model that a run leaves has them as biases."""
    max_steps: Count = 100
    """Learner steps."""
    prompts_per_step: Count = 64
    """Groups a step; for agents, environment seeds a step."""
    group_size: Count = 4
    """Completions of one prompt."""
    lr: Rate = 5e-7
    """Adam's, at its peak."""
    warmup_steps: Whole = 0
    """Linear warm-up."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: lr as it is, or a fall to lr times min_lr_ratio at rl.max_steps."""
    min_lr_ratio: Share = 0.0
    """linear and cosine end at lr times this."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Adam's."""
    grad_clip: NonNegative = 1.0
    """Norm over all policy gradients."""
    kl_coef: NonNegative = 0.001
    """Weight of KL(policy || reference) over actions. etpo, tbrm, archer_soft: a choice is decided at a difference in
    value of about four times this; 0.05 suits rewards of 0 and 1."""
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
    reward_clip_range: Positive | None = None
    """Rewards of completions, and of an agent's turns, are clipped to no more than this from 0 before anything is
    learnt from them. Metrics, samples and evaluations have them as they were. None: no clip."""
    overlong_buffer: Whole = 0
    """Above 0: within so many tokens of rollout.max_new_tokens, a completion's reward falls, by 1 at the limit. With
    grpo, rloo and remax only among completions of a prompt whose rewards differ: length alone is no signal."""
    mask_truncated_completions: bool = False
    """Completions that rollout.max_new_tokens cut off are left out of the loss: what they would have become is unknown.
    Their rewards still count where others are compared with them."""
    clip_low: Share = 0.2
    """Ratio's lower clip, 1 - clip_low."""
    clip_high: NonNegative = 0.2
    """Ratio's upper clip, 1 + clip_high."""
    clip_c: Annotated[NonNegative, AfterValidator(_above_one)] = 0.0
    """Dual clip: the most that a ratio counts where the advantage is negative, e.g. 3. 0: no bound."""
    updates_per_batch: Count = 1
    """Passes over one batch of rollouts, with an optimizer step for each of their mini-batches."""
    num_minibatches: Count = 1
    """Parts that a step's sequences are cut into, in every pass anew, with an optimizer step each. Ratios are to the
    policy before the first, and advantages are those of the whole batch."""
    gae_lambda: Share = 0.95
    """ppo: decay of temporal-difference errors over actions, or over turns with gae_level turn."""
    gae_level: Literal["token", "turn"] = "token"
    """ppo, of agents: what advantages are of. token: each action has its own value and advantage. turn: an utterance
    is one step, with a value at its first action and one advantage for all of its actions."""
    value_lr: Rate = 1e-3
    """Learning rate of the Adam of the value head, ppo's and archer's with critic.token_baseline, and of the Q of etpo
    and archer_soft."""
    value_steps: Count = 4
    """Gradient steps of value head or Q on one batch."""
    cliprange_value: NonNegative = 0.0
    """ppo, and archer with critic.token_baseline: how far a value may move on one batch, in units of the reward. 0: as
    far as it will."""
    target_tau: PositiveShare = 0.005
    """etpo, archer_soft: share of Q that its target takes over after each of its steps."""
    micro_batch_tokens: Count = 16_384
    """Padded tokens a forward pass, on one rank; at least one sequence."""
    max_staleness: Whole = 0
    """Versions a rollout may lag behind the learner. 0 is strictly on-policy; 1 overlaps rollouts with learning."""
    window: Whole = 0
    """Steps that a prompt's group may be trained on later than its own: a step takes the first rl.prompts_per_step
    groups that finish, and does not wait for the longest. Part of rl.max_staleness, whose rest, 1 or more, is the steps
    that are generated ahead. 0: every step waits for its own groups."""
    update_mode: Literal["drain", "continue"] = "drain"
    """At new weights, requests in flight end on the old version first, or continue on the new one."""
    importance_cap: NonNegative = 2.0
    """Cap of pi_learner / pi_rollout, the weight that corrects staleness and engine mismatch. 0: no weight."""
    importance_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask"
    ] = "token_truncate"
    """token: each action has its own weight. sequence: the product over its sequence's actions. geometric: their
    geometric mean, with caps of some 1.01. truncate: a weight is importance_cap at most. mask: what weighs more is left
    out, with geometric_mask also what weighs less than 1 / importance_cap."""
    cache_hidden_states: bool = False
    """The engine hands the base's states out with the tokens, and the learner holds no base at all."""
    eval_every: Whole = 10
    """Steps between greedy evaluations; 0 only at start and end."""
    eval_problems: Count = 512
    """Held-out problems an evaluation asks."""
    save_every: Count = 20
    """Steps between checkpoints."""

    @property
    def trains_all_weights(self) -> bool:
        """Whether neither adapters nor steering vectors train in the place of what the action space names."""
        return not self.lora_rank and self.steering == "off"


class ReplayConfig(Branch):
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


class CriticConfig(Branch):
    gpu_share: Share = 0.0
    """Of a GPU, what each replica takes where cluster.use_gpu is set, e.g. 0.25. 0: replicas compute on CPU."""
    encoder: str = ""
    """A Hugging Face encoder that reads states and utterances as text and trains with the critic, e.g. roberta-base.
    Empty: the base's own states, which cost nothing. Not for chai, whose players choose by those."""
    replicas: Processes = 1
    """Actors that share each of the critic's batches."""
    gamma: Share = 0.95
    """Discount of a turn; that of ppo and gigpo, too."""
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
    """Replayed states that the policy speaks in anew, an iteration: targets of V and the actor's batch. archer_soft:
    with the utterances that were said there, and nothing is generated."""
    warmup_iterations: Whole = 10
    """Iterations that train the critic alone."""
    candidates: Count = 5
    """chai, or archer and archer_soft with chooses: utterances to choose from, a turn."""
    chooses: bool = False
    """archer, archer_soft: players say what the critic likes best of several utterances, as chai's do, and the policy
    learns from that: what the critic is told, and the states do not show, counts at once. Not with critic.encoder."""
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
