"""Seconds of a step, from FLOPs, bytes and the GPU's data sheet under stated assumptions; and published figures.

    FLOPs of planned_work.py / (FLOP/s x MFU)          bytes read per decoding step / (GB/s x share)
    b P of what is sent, over each link that it crosses

benchmarks/gpu.py measures some of it on one GPU (docs/benchmarks.md). Legend: as in planned_work.py.
"""

from dataclasses import dataclass

from cola_ray.settings.config import Config
from cola_ray.settings.training import PretrainStage
from cola_ray.studies import planned_work
from cola_ray.studies.planned_memory import critic_width, engine_memory, kv_bytes, looks_first, stage_rows, weight_bytes
from cola_ray.studies.planned_work import Rows, Sizes


@dataclass(frozen=True)
class Gpu:
    """A GPU as in its data sheet."""

    memory_gb: float
    bandwidth_gbs: float
    tflops: float  # in bfloat16, dense
    float32: float  # TFLOP/s


GPUS = {
    "a100": Gpu(80, 2039, 312, 19.5),
    "h100": Gpu(80, 3350, 989, 67),
    "h200": Gpu(141, 4800, 989, 67),
    "l40s": Gpu(48, 864, 362, 91.6),
}


@dataclass(frozen=True)
class Assumed:
    """Which share of the data sheet's figures is reached, and other speeds."""

    mfu: float  # of FLOP/s, in the learner's and a prefill's matrix products
    decode: float  # of memory bandwidth, in decoding
    link_gbs: float  # GB/s between GPUs of a node
    network: float  # of hardware.network_gbs
    pcie_gbs: float  # GB/s between a GPU and host memory
    host_tflops: float  # TFLOP/s of a critic replica on the host's processors, float32
    store_gbs: float  # GB/s into Ray's object store, or out of it, with the copy from the GPU and the checksum


EXPECTED = Assumed(mfu=0.35, decode=0.55, link_gbs=300, network=0.5, pcie_gbs=25, host_tflops=0.5, store_gbs=2.5)
PESSIMISTIC = Assumed(mfu=0.15, decode=0.30, link_gbs=100, network=0.05, pcie_gbs=10, host_tflops=0.1, store_gbs=1.0)
"""Both lie within PUBLISHED; ``store_gbs`` 2.5 was measured here (docs/benchmarks.md, publish_vs_memcpy)."""

PUBLISHED = {
    "NeMo RL 0.4, GRPO, all weights": "16 H100, Llama-3.1-8B, 2048 sequences of 1060 tokens: 97.7 s a step, 1562 "
    "tokens a second and GPU; one step off-policy 74.6 s, 2161 (docs.nvidia.com/nemo/rl, performance summary)",
    "vLLM 0.30, decoding": "one H100, Qwen3-8B in bf16, 396 sequences of 128 + 1024 tokens at once: 13 322 tokens a "
    "second, by our formula 0.54 of the bandwidth (github.com/tgarg01/silybench-data)",
    "verl, MFU": "Qwen3-30B-A3B on 8, 16 and 32 GPUs: 0.40, 0.37, 0.31 (verl's documentation, DeepSeek-671B)",
    "prime-rl, MFU": "0.11 to 0.27 at 16 to 64 thousand tokens (prime-rl's documentation)",
    "verl, weights": "Qwen2.5-7B by NCCL from one H100 node to another: 5.5 to 6.0 s (its page on delta updates)",
    "OpenRLHF": "8 H200, DAPO: generation takes more than 0.9 of the time (arXiv 2405.11143v6)",
}
"""Figures that other projects have published. TRL publishes none for this size."""


@dataclass(frozen=True)
class Step:
    """Planned duration of a step, in seconds; also decoding speed, and sequences that an engine decodes at a time."""

    rollout: float
    learn: float
    sync: float
    decode_tokens_per_second: float
    concurrent: float
    tokens: float  # that the step trains on
    critic: float = 0.0

    def total(self, overlapped: bool) -> float:
        learn = self.critic + self.learn
        return (max(self.rollout, learn) if overlapped else self.rollout + learn) + self.sync


def step_time(config: Config, m: Sizes, gpu: Gpu, assumed: Assumed = EXPECTED) -> Step:
    """Estimate the duration of a step of RL."""
    answer = mean_answer(config)
    engine, length = decoding(config, m, gpu, assumed), config.rollout.max_prompt_tokens / 2 + answer
    per_token = engine.seconds(engine.most)
    generate = engine.prefill + engine.sequences / engine.most * answer * per_token  # in several rounds if needed
    per_second = config.rollout.num_workers * engine.most / per_token
    trained = config.rl.prompts_per_step * config.rl.group_size
    learn = _learning(config, m, gpu, assumed, Rows(trained * length, length, trained * answer))
    sync = sum(update(config, m, assumed))
    share = config.critic.gpu_share  # of a GPU; 0 on CPU
    rate = share * gpu.float32 * assumed.mfu if share else assumed.host_tflops
    critic = critic_flops(config, m) / config.critic.replicas / (rate * 1e12)
    return Step(generate, learn, sync, per_second, engine.most, trained * length, critic)


def critic_flops(config: Config, m: Sizes) -> float:
    """FLOPs of all critic steps of an iteration: ``68 U^2`` for each turn of a batch.

    Forward and backward passes of the twin heads of Q take 28 U^2 and of V 20, as features get no gradient; the
    target's V of the next states takes 8, and its Q of fresh utterances 12.
    """
    return 68.0 * critic_width(config, m) ** 2 * config.critic.batch_size * config.critic.steps


@dataclass(frozen=True)
class Decoding:
    """How long an engine's decoding steps take. All seconds are per engine."""

    weights: float  # seconds to read the weights once
    cache: float  # seconds to read one sequence's keys and values
    compute: float  # seconds to compute one token of one sequence
    prefill: float  # seconds for the prompts of the engine's share of a step
    sequences: float  # number of sequences in this share
    most: float  # most sequences decoded at a time, at most the share

    def seconds(self, sequences: float) -> float:
        """Seconds of one decoding step, limited by reading all weights and every sequence's cache, or by computing."""
        return max(self.weights + sequences * self.cache, sequences * self.compute)


def decoding(config: Config, m: Sizes, gpu: Gpu, assumed: Assumed = EXPECTED, steps: int = 1) -> Decoding:
    """How an engine decodes sequences of mean length.

    Args:
        steps: number of steps whose shares an engine may hold at the same time.
    """
    rl, rollout = config.rl, config.rollout
    # Greedy baselines are also generated.
    share = rl.prompts_per_step * (rl.group_size + config.algorithm.greedy) / rollout.num_workers
    length = rollout.max_prompt_tokens / 2 + mean_answer(config)
    width, cache = rollout.tensor_parallel_size, kv_bytes(config, m)
    capacity = engine_memory(config, m, gpu.memory_gb)["keys and values"] * width / cache
    read = width * gpu.bandwidth_gbs * 1e9 * assumed.decode
    of_token = planned_work.generating(m, length, rl.action_space == "token") / (
        width * gpu.tflops * 1e12 * assumed.mfu
    )
    # With prefix caching, a group's prompt is computed once.
    prompts = (
        rl.prompts_per_step / rollout.num_workers if rollout.prefix_caching else share
    ) * rollout.max_prompt_tokens
    return Decoding(
        weights=weight_bytes(config, m) / read, cache=length * cache / read, compute=of_token,
        prefill=prompts / 2 * of_token, sequences=share,
        most=min(steps * share, rollout.max_num_seqs, capacity / length),
    )  # fmt: skip


def mean_answer(config: Config) -> float:
    """Tokens of a completion."""
    return float(config.hardware.response_tokens or max(config.rollout.max_new_tokens // 2, 1))


def _learning(config: Config, m: Sizes, gpu: Gpu, assumed: Assumed, batch: Rows) -> float:
    """Seconds of the learner: its FLOPs, or ZeRO-3's gathering of weights if that takes longer."""
    rl, hardware, ranks = config.rl, config.hardware, config.cluster.learner_ranks
    share = Rows(batch.tokens / ranks, batch.width, batch.scored / ranks)
    work = planned_work.learning(config, m, share)
    updates = rl.value_steps if rl.actor_free else rl.updates_per_batch
    flops = work.look + updates * (work.forward + work.backward)
    flops += work.forward * (looks_first(config) and not rl.actor_free)
    # Every micro-batch gathers all weights, and those that train twice more; a mini-batch has at least one micro-batch.
    micro_batches = max(share.tokens / rl.micro_batch_tokens, 1.0)
    of_a_pass = max(micro_batches, float(rl.num_minibatches))
    link = assumed.link_gbs if ranks <= hardware.gpus_per_node else hardware.network_gbs * assumed.network
    moved = m.num_bytes * (micro_batches * (work.frozen + work.trained) + of_a_pass * 2 * updates * work.trained)
    computed = max(flops / (gpu.tflops * 1e12 * assumed.mfu), moved / (link * 1e9) if ranks > 1 else 0.0)
    frozen = micro_batches * m.num_bytes * work.frozen
    trained = updates * (of_a_pass * 4 + rl.num_minibatches * m.num_bytes) * work.trained
    return computed + _over_pcie(config, frozen, trained, assumed)


def _over_pcie(config: Config, frozen: float, trained: float, assumed: Assumed) -> float:
    """Seconds of offloading: frozen shares come in every micro-batch, gradients go to the host and weights return."""
    cluster, ranks = config.cluster, config.cluster.learner_ranks
    frozen, trained = frozen * cluster.offload_frozen, trained * cluster.offload_optimizer
    return (frozen + trained) / ranks / (assumed.pcie_gbs * 1e9)


def update(config: Config, m: Sizes, assumed: Assumed = EXPECTED) -> tuple[float, float]:
    """Seconds in which the learner gathers and publishes new weights, and in which each engine loads them."""
    sent = m.num_bytes * published(config, m) / 1e9
    into_store, network = sent / assumed.store_gbs, sent / (config.hardware.network_gbs * assumed.network)
    # A broadcast only saves reading from the store: buckets are still written, for engines that start later.
    by_store = into_store if config.cluster.weight_transport == "object_store" else 0.0
    return sent / assumed.link_gbs + into_store, network + by_store


def published(config: Config, m: Sizes) -> float:
    """P, the number of parameters that are sent to the engines after every step."""
    rl = config.rl
    if rl.action_space == "token":
        if rl.steering != "off":
            return planned_work.vectors(m, rl.steering)
        return m.layers * m.linear if rl.lora_rank else m.base + m.head
    return planned_work.learning(config, m, Rows(1, 1, 1)).trained


def stage_time(config: Config, m: Sizes, gpu: Gpu, stage: PretrainStage, assumed: Assumed = EXPECTED) -> float:
    """Seconds of an optimizer step of a stage of pre-training."""
    rows, ranks = stage_rows(config), config.cluster.learner_ranks
    micro_batches = config.pretrain.batch_size / config.pretrain.micro_batch_size / ranks
    work = planned_work.pretraining(stage, m, rows, config.cluster.gradient_checkpointing)
    flops = work.look + work.forward + work.backward
    moved = m.num_bytes * (work.frozen + 3 * work.trained) if ranks > 1 else 0.0
    link = assumed.link_gbs if ranks <= config.hardware.gpus_per_node else (
        config.hardware.network_gbs * assumed.network
    )  # fmt: skip
    return micro_batches * max(flops / (gpu.tflops * 1e12 * assumed.mfu), moved / (link * 1e9))
