"""Memory that a run needs, by component: for a learner rank in RL and in each stage of pre-training, and for an engine.

    memory of a micro-batch (planned_work.py) + what ZeRO-3 shards over M ranks, gathers and buffers ─> a rank

Legend: P parameters, b bytes of one, T tokens of a micro-batch, M ``cluster.learner_ranks``.
"""

from collections.abc import Mapping

from cola_ray.settings.config import Config, is_environment
from cola_ray.settings.training import PretrainStage
from cola_ray.studies.planned_work import Rows, Sizes, Work, learning, pretraining

Bytes = dict[str, float]
"""Component -> bytes."""

# DeepSpeed's defaults for stage 3, in parameters.
_LIVE, _BUCKET, _PREFETCH = 1e9, 5e8, 5e7
# Resident memory of a process after its imports, on CPU, in GiB. Measured.
PROCESS_GIB = {"learner": 0.70, "engine": 1.85}
# Factor on temporary tensors of a learner on CPU, because malloc keeps freed memory. With malloc's mmap threshold fixed
# at 1 MiB, the peak of smollm2-135m falls from 2.74 to 2.38 GiB.
_HEAP = 1.5
USABLE = 0.9
"""Usable share of a GPU's memory in the learner; the rest is a margin for fragmentation."""
_OF_A_MICRO_BATCH = ("gathered parameters", "activations", "temporary")


def rl_rows(config: Config) -> Rows:
    """The largest micro-batch of RL: full, with rows of maximal length and an action at every position."""
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    tokens = float(max(config.rl.micro_batch_tokens, longest))
    return Rows(tokens, longest, tokens)


def stage_rows(config: Config) -> Rows:
    """A micro-batch of pre-training."""
    length = config.pretrain.sequence_length
    tokens = float(config.pretrain.micro_batch_size * length)
    return Rows(tokens, length, tokens)


def looks_first(config: Config) -> bool:
    """Whether frozen parts process a whole batch before its first update, so that their outputs have to be kept."""
    return config.rl.updates_per_batch * config.rl.num_minibatches > 1 or config.learns_values


def learner_memory(config: Config, m: Sizes) -> Bytes:
    """Peak memory of a rank in RL; on CPU including its share of the object store."""
    work = learning(config, m, rl_rows(config))
    parts = _of_rank(config, m, work)
    if looks_first(config):
        # b H, and 4 K or b V, for each token of all the rank's micro-batches except the current one; with mini-batches,
        # of all of them, since the current one is additional
        others = _micro_batches(config) - (config.rl.num_minibatches == 1)
        parts["states of the batch"] = work.known * others
    heads = _heads(config, m)
    if heads:
        # float32 weights, gradients and moments, complete on every rank; a target, and what a head keeps of e
        parts["heads"] = heads
    if not config.cluster.use_gpu:
        # 2 b P_trained: this version and the previous one in the object store, mapped by rank 0
        parts["weights for engines"] = 2 * m.num_bytes * work.trained
    return parts


def stage_memory(config: Config, m: Sizes, stage: PretrainStage) -> Bytes:
    """Peak memory of a rank in a stage of pre-training."""
    return _of_rank(config, m, pretraining(stage, m, stage_rows(config), config.cluster.gradient_checkpointing))


def _of_rank(config: Config, m: Sizes, work: Work) -> Bytes:
    cluster, b, held = config.cluster, m.num_bytes, work.frozen + work.trained
    parts = {
        # b P_frozen / M
        "what is frozen": b * work.frozen / cluster.learner_ranks,
        # (b + 4) P_trained / M: weights, and gradients in float32
        "what trains, with gradients": (b + 4) * work.trained / cluster.learner_ranks,
        # 12 P_trained / M: float32 weights and Adam's two moments
        "Adam": 12 * work.trained / cluster.learner_ranks,
        # b (min(P, 1e9) + min(P, 5e7)): gathered parameters not yet released, and the prefetch buffer
        "gathered parameters": b * (min(held, _LIVE) + min(held, _PREFETCH)),
        # b 5e8: DeepSpeed's reduction bucket; on CPU only the part that gradients fill takes memory
        "reduction bucket": b * (_BUCKET if cluster.use_gpu else min(_BUCKET, work.trained)),
        "activations": work.kept,
        "temporary": work.temporary,
    }
    if not cluster.use_gpu:
        return parts | {name: _HEAP * parts[name] for name in _OF_A_MICRO_BATCH}
    if cluster.offload_frozen:
        parts["what is frozen"] = 0.0
    if cluster.offload_optimizer:
        parts |= {"what trains, with gradients": b * work.trained / cluster.learner_ranks, "Adam": 0.0}
    return parts


def offloaded(config: Config, work: Work, num_bytes: int) -> float:
    """Bytes of a rank that are offloaded to host memory."""
    cluster = config.cluster
    frozen = num_bytes * work.frozen * cluster.offload_frozen
    return (frozen + 16 * work.trained * cluster.offload_optimizer) / cluster.learner_ranks


def _micro_batches(config: Config) -> float:
    """Number of a rank's micro-batches in a step, each as full as possible."""
    rows, sequences = rl_rows(config), config.rl.prompts_per_step * config.rl.group_size
    return max(sequences * rows.width / config.cluster.learner_ranks / rows.tokens, 1.0)


def _heads(config: Config, m: Sizes) -> float:
    """Bytes of value and Q heads that learn from e beside the policy, with the activations of their own step."""
    if not config.learns_values or config.rl.actor_free:
        return 0.0
    q_learns = config.algorithm.soft_q or config.rl.control_variate
    outputs = float(m.actions if config.rl.action_space == "latent" else m.vocabulary) if q_learns else 1.0
    values = float(config.algorithm.soft_q and config.algorithm.critic)  # archer_soft's Q has a value head beside it
    parameters = (1 + values) * m.width * (m.width + 4.0) + (outputs + values) * (m.width + 1)
    rows = rl_rows(config)
    # 16 P, and 4 P of a target; 4 (4 H + 3 outputs) of each token
    return (20.0 if q_learns else 16.0) * parameters + 4.0 * rows.scored * (4 * (1 + values) * m.width + 3 * outputs)


def critic_width(config: Config, m: Sizes) -> int:
    """U, the number of features of a turn that ArCHer's heads read: e and one number; 0 without such a critic."""
    agents = is_environment(config.task.name) and config.algorithm.critic
    return m.width + 1 if agents and not config.critic.encoder else 0


def critic_memory(config: Config, m: Sizes) -> Bytes:
    """Memory of each replica: twin heads of ``3 U^2`` for Q and ``2 U^2`` for V, in float32; empty without a critic."""
    square, rows = float(critic_width(config, m) ** 2), config.critic.batch_size / config.critic.replicas
    if not square:
        return {}
    return {
        # 4 bytes of weights, gradients, Adam's two moments and the target
        "twin heads": 20 * 10 * square,
        # five kinds of features, and two hidden layers with ReLU of six pairs of heads
        "a batch": 4 * rows * (5 + 48) * critic_width(config, m),
    }


# --- engines ------------------------------------------------------------------------------------------------------


def engine_memory(config: Config, m: Sizes, gpu_gb: float | None) -> Bytes:
    """Memory of one GPU of an engine, or of the engine's process on CPU.

    Args:
        gpu_gb: of the GPU; None on CPU.
    """
    rollout = config.rollout
    split = rollout.tensor_parallel_size
    weights = weight_bytes(config, m) / split
    if gpu_gb is None:
        return {"weights": weights, "keys and values": rollout.kv_cache_mb * 2.0**20}
    # T b (4 H + 3 I) / split: a step's hidden states and its widest layer
    inner = batched_tokens(config) * m.num_bytes * (4.0 * m.width + 3 * m.mlp) / split
    # Keys and values get the rest of the share that vLLM may use.
    room = rollout.gpu_memory_utilization * gpu_gb * 1e9 - weights - inner
    return {"weights": weights, "a step's tokens": inner, "keys and values": max(room, 0.0)}


def batched_tokens(config: Config) -> float:
    """Tokens of an engine's largest step; by default vLLM's choice for the GPU."""
    by_default = 16_384 if config.hardware.gpu in ("h100", "h200") else 8192
    return float(config.rollout.max_num_batched_tokens or by_default)


def weight_bytes(config: Config, m: Sizes) -> float:
    """Bytes of an engine's weights: ``b P``; with fp8 the matrices of decoder layers have one byte per number."""
    tokens_act = config.rl.action_space == "token"
    parameters = m.base + m.head if tokens_act else m.served
    layers = m.layers + (0 if tokens_act else m.policy_layers)
    saved = (m.num_bytes - 1) * layers * m.linear if config.rollout.quantization == "fp8" else 0.0
    return m.num_bytes * parameters - saved


def kv_bytes(config: Config, m: Sizes) -> float:
    """Bytes of a token in an engine's cache: ``2 KV layers`` of b, or with fp8 1, each; and ``b H`` for e if kept."""
    rl, tokens_act = config.rl, config.rl.action_space == "token"
    layers = m.layers + (0 if tokens_act else m.policy_layers)
    of_number = 1.0 if config.rollout.kv_cache_dtype == "fp8" else m.num_bytes
    keeps_e = rl.cache_hidden_states or is_environment(config.task.name)
    return 2.0 * of_number * m.keys * layers + keeps_e * m.num_bytes * m.width


def host_memory(config: Config, m: Sizes) -> Mapping[str, float]:
    """Peak resident memory of a learner rank and of an engine on CPU, in bytes."""
    process = {name: gib * 2.0**30 for name, gib in PROCESS_GIB.items()}
    learner = process["learner"] + sum(learner_memory(config, m).values())
    engine = process["engine"] + sum(engine_memory(config, m, None).values())
    return {"learner": learner, "engine": engine}  # loading needs less: a rank's share and one tensor
