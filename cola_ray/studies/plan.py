"""Plans a run from its settings: memory by component, seconds per step, seconds per weight update.

    cola_ray plan --preset llama-3.1-8b --hardware.gpus 16 --hardware.gpu h100
    cola_ray plan --preset smollm2-135m                 (on CPU: only memory)

Parameters are counted on the model itself, built without weights. Each formula stands as a comment beside its code, and
in docs/scaling.md. If something does not fit, the plan is refused with what to change. Legend: P parameters, b bytes
per parameter, H and I widths of a layer and of its MLP, T tokens of a micro-batch, M learner ranks.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cola_ray.runs import provenance
from cola_ray.settings.config import Config, ConfigError, override

Bytes = dict[str, float]
"""Component -> bytes."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as in its data sheet; FLOP/s are dense, in bfloat16."""

    memory_gb: float
    bandwidth_gbs: float
    tflops: float


GPUS = {
    "a100": Gpu(80, 2039, 312),
    "h100": Gpu(80, 3350, 989),
    "h200": Gpu(141, 4800, 989),
    "l40s": Gpu(48, 864, 362),
}

# Assumed, not measured: the share of the data sheet's figures that is reached.
_MFU = 0.4  # of FLOP/s, in the learner's matrix products
_DECODE = 0.6  # of memory bandwidth, in the engine's decoding
_USABLE = 0.9  # of GPU memory: vLLM's default, and a margin for fragmentation in the learner
_LINK_GBS = 300.0  # GB/s between GPUs of a node
_STORE_GBS = 2.5  # GB/s into Ray's object store and out of it, with checksums (docs/benchmarks.md, publish_vs_memcpy)
# DeepSpeed's defaults for stage 3, in parameters.
_LIVE, _BUCKET, _PREFETCH = 1e9, 5e8, 5e7
# Resident memory of a process after its imports, on CPU, in GiB. Measured.
_PROCESS_GIB = {"learner": 0.70, "engine": 1.85}
# Factor on temporary tensors of a learner on CPU, because malloc keeps freed memory. With its mmap threshold fixed at
# 1 MiB the peak of smollm2-135m falls from 2.74 to 2.38 GiB.
_HEAP = 1.5


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, and of its parts in the learner and in the engines."""

    width: int  # H
    mlp: int  # I
    layers: int
    policy_layers: int
    heads: int  # width of all query heads together: heads x head_dim
    kv: int  # width of all key heads together
    base: float  # P of embeddings and base layers, which only encode
    policy: float  # P of the policy, which trains
    learner: float  # P in the learner: base, policy and reference
    served: float  # P in an engine
    whole: float  # P in a checkpoint
    num_bytes: int  # b


def sizes(config: Config) -> Sizes:
    """Count the parameters of the configured model, built on the meta device."""
    import torch

    from cola_ray.learner.policies import LatentPolicy
    from cola_ray.model.modeling_cola import CoLAConfig, CoLAForCausalLM

    known = _shape(config)
    latent = config.model
    shape = CoLAConfig(
        **{
            "num_actions": latent.num_actions,
            "num_idm_layers": latent.num_idm_layers,
            "num_world_model_layers": latent.num_world_model_layers,
            "num_policy_layers": latent.num_policy_layers,
            **known,
            "model_type": "cola",
        }
    )
    with torch.device("meta"):
        model = CoLAForCausalLM(shape)

    def count(module: torch.nn.Module) -> float:
        return float(sum({id(p): p.numel() for p in module.parameters()}.values()))

    whole, idm, policy = count(model), count(model.idm), count(model.policy)
    base = count(model.model)
    learner = count(LatentPolicy(model))
    head = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    return Sizes(
        width=shape.hidden_size, mlp=shape.intermediate_size, layers=shape.num_hidden_layers,
        policy_layers=shape.num_policy_layers, heads=head * shape.num_attention_heads,
        kv=head * shape.num_key_value_heads, base=base, policy=policy, learner=learner, served=whole - idm, whole=whole,
        num_bytes=2 if latent.dtype == "bfloat16" else 4,
    )  # fmt: skip


_LLAMA_31_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
_KNOWN = {"meta-llama/Llama-3.1-8B": _LLAMA_31_8B, "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31_8B}
"""Gated on the hub; known here, so that a plan needs no token."""


def _shape(config: Config) -> dict[str, object]:
    from transformers import AutoConfig

    start, base = provenance.start_model(config), config.model.base
    if (start / "config.json").is_file():
        return dict(AutoConfig.from_pretrained(start).to_dict())
    if base in _KNOWN:
        return dict(_KNOWN[base])
    if not base:
        from cola_ray.learner.start_model import make_tiny_llama

        return dict(make_tiny_llama(280, 1, 0).config.to_dict())
    file = Path(base)
    source, options = (str(file.parent), {"gguf_file": file.name}) if file.suffix == ".gguf" else (base, {})
    try:
        known = AutoConfig.from_pretrained(source, **options).to_dict()
    except OSError as error:
        raise ConfigError(f"model.base = {base!r}: {str(error).splitlines()[0]}") from None
    known.pop("quantization_config", None)
    return dict(known)


# --- memory -------------------------------------------------------------------------------------------------------


def learner_memory(config: Config, model: Sizes) -> Bytes:
    """Peak memory of a ZeRO-3 rank, in the policy's backward pass; on CPU with its share of the object store."""
    ranks, b = config.cluster.learner_ranks, model.num_bytes
    tokens, on_gpu = config.rl.micro_batch_tokens, config.cluster.use_gpu
    parts = {
        # b (P - P_policy) / M: base and reference are divided over ranks
        "base and reference": b * (model.learner - model.policy) / ranks,
        # (b + b) P_policy / M: weights and gradients
        "policy and its gradients": 2 * b * model.policy / ranks,
        # 12 P_policy / M: float32 weights and Adam's two moments
        "Adam": 12 * model.policy / ranks,
        # b (min(P, 1e9) + min(P, 5e7)): gathered parameters that are not released yet, and the prefetch buffer
        "gathered parameters": b * (min(model.learner, _LIVE) + min(model.learner, _PREFETCH)),
        # b 5e8: DeepSpeed's reduction bucket; on CPU only as much of it is touched as there are gradients
        "reduction bucket": b * (_BUCKET if on_gpu else min(_BUCKET, model.policy)),
        # T l_policy (2 H (4 + b) + 2 b (Q + 2 KV) + b H + 4 b I): norms in float32; queries, keys and values with and
        # without positions; inner values of attention and MLP
        "activations of the policy": tokens * model.policy_layers * _kept_of_a_layer(model),
        # T (b (4 H + 2 I) + b H): one layer of the base at a time, and e
        "activations of the base": tokens * b * (5 * model.width + 2 * model.mlp),
    }  # fmt: skip
    if on_gpu:
        return parts
    temporary = ("gathered parameters", "activations of the policy", "activations of the base")
    parts |= {name: _HEAP * parts[name] for name in temporary}
    # 2 b P_policy: this version and the previous one in the object store, mapped by rank 0
    return parts | {"weights for engines": 2 * b * model.policy}


def _kept_of_a_layer(model: Sizes) -> float:
    """Bytes per token that a decoder layer keeps for its backward pass."""
    b, wide = model.num_bytes, model.width
    return 2 * wide * (4 + b) + 2 * b * (model.heads + 2 * model.kv) + b * wide + 4 * b * model.mlp


def engine_memory(config: Config, model: Sizes, gpu: Gpu | None) -> Bytes:
    """Memory of one GPU of an engine, or of the engine's process on CPU."""
    split = config.rollout.tensor_parallel_size
    weights = model.num_bytes * model.served / split
    if gpu is None:
        return {"weights": weights, "keys and values": config.rollout.kv_cache_mb * 2.0**20}
    # Keys and values get what is left of the share that vLLM may use after weights and a step of 8192 tokens
    inner = 8192 * model.num_bytes * (4 * model.width + 3 * model.mlp) / split
    room = _USABLE * gpu.memory_gb * 1e9 - weights - inner
    return {"weights": weights, "inner values": inner, "keys and values": max(room, 0.0)}


def kv_bytes(model: Sizes) -> float:
    """Bytes per token in an engine's cache, with e: ``2 b KV (layers + policy layers) + b H``."""
    b = model.num_bytes
    return 2 * b * model.kv * (model.layers + model.policy_layers) + b * model.width


def host_memory(config: Config, model: Sizes) -> Mapping[str, float]:
    """Peak resident memory of a learner rank and of an engine on CPU, in bytes."""
    process = {name: gib * 2.0**30 for name, gib in _PROCESS_GIB.items()}
    learner = process["learner"] + sum(learner_memory(config, model).values())
    # While loading, each rank holds the whole checkpoint, and a copy of the policy for the reference.
    loading = process["learner"] + model.num_bytes * (model.whole + model.policy)
    engine = process["engine"] + sum(engine_memory(config, model, None).values())
    return {"learner": max(learner, loading), "engine": engine}


# --- time ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Planned duration of a step, in seconds; also decoding speed, and sequences that an engine decodes at a time."""

    rollout: float
    learn: float
    sync: float
    decode_tokens_per_second: float
    concurrent: float

    def total(self, overlapped: bool) -> float:
        return (max(self.rollout, self.learn) if overlapped else self.rollout + self.learn) + self.sync


def step_time(config: Config, model: Sizes, gpu: Gpu) -> Step:
    """Estimate the duration of a step; the assumptions are at the top of this file."""
    rl, rollout, hardware = config.rl, config.rollout, config.hardware
    trained = rl.prompts_per_step * rl.group_size
    sequences = trained + rl.prompts_per_step * config.algorithm.greedy  # greedy baselines are generated, too
    answer = hardware.response_tokens or rollout.max_new_tokens // 2
    length = rollout.max_prompt_tokens / 2 + answer
    # Decoding: a step reads all weights and the cache of every sequence, or computes 2 P FLOPs per token
    capacity = engine_memory(config, model, gpu)["keys and values"] * rollout.tensor_parallel_size / kv_bytes(model)
    most = min(sequences / rollout.num_workers, rollout.max_num_seqs, capacity / length)
    width = rollout.tensor_parallel_size
    read = (model.num_bytes * model.served + most * length * kv_bytes(model)) / (
        width * gpu.bandwidth_gbs * 1e9 * _DECODE
    )
    computed = most * 2 * model.served / (width * gpu.tflops * 1e12 * _MFU)
    per_second = rollout.num_workers * most / max(read, computed)
    # A step lasts at least as long as its longest answer
    rounds = max(sequences / rollout.num_workers / most, 1.0)
    generate = max(sequences * answer / per_second, rounds * answer * max(read, computed))
    # Learning, FLOPs per token: 2 P_base for e, 2 P for the reference, 6 P for each update of the policy
    tokens = trained * length / config.cluster.learner_ranks
    flops = tokens * (2 * model.base + (2 + 6 * rl.updates_per_batch) * model.policy)
    # Every micro-batch gathers all layers once, and those of the policy twice more
    batches = max(tokens / rl.micro_batch_tokens, 1.0)
    link = _LINK_GBS if config.cluster.learner_ranks <= hardware.gpus_per_node else hardware.network_gbs
    gathered = batches * model.num_bytes * (model.learner + 2 * model.policy) / (link * 1e9)
    learn = max(flops / (gpu.tflops * 1e12 * _MFU), gathered if config.cluster.learner_ranks > 1 else 0.0)
    # Weight update: gather the policy from the ranks, and send it to each engine
    moved = model.num_bytes * model.policy / 1e9
    by_store = 2 * moved / _STORE_GBS + moved / hardware.network_gbs
    sync = moved / _LINK_GBS + (by_store if config.cluster.weight_transport == "object_store" else
                                moved / hardware.network_gbs)  # fmt: skip
    return Step(generate, learn, sync, per_second, most)


# --- the plan -----------------------------------------------------------------------------------------------------


def refuse(config: Config, model: Sizes) -> None:
    """Raise ConfigError if a process does not fit its GPU, or if GPUs or memory are not sufficient."""
    lines = []
    if not config.cluster.use_gpu:
        needs = host_memory(config, model)
        counts = {"learner": config.cluster.learner_ranks, "engine": config.rollout.num_workers}
        total = sum(needs[name] * count for name, count in counts.items()) / 2**30
        there = config.hardware.memory_gb or _this_machines_gib()
        if total > there:
            lines.append(
                f"cluster.learner_ranks = {counts['learner']}: the run needs {total:.1f} GiB of the {there:.1f} GiB "
                "there are; lower rl.micro_batch_tokens, rollout.kv_cache_mb or cluster.learner_ranks"
            )
        if lines:
            raise ConfigError("\n".join(lines))
        return
    gpu, b = GPUS[config.hardware.gpu], model.num_bytes
    there, ranks, engines = config.hardware.gpus, config.cluster.learner_ranks, _engine_gpus(config)
    needed = ranks + engines
    if there and needed > there:
        lines.append(
            f"hardware.gpus = {there}: {ranks} learner ranks and {engines} GPUs of engines need {needed}; "
            f"e.g. --cluster.learner-ranks {there // 2} --rollout.num-workers {there - there // 2}"
        )
    usable = _USABLE * gpu.memory_gb * 1e9
    parts = learner_memory(config, model)
    if sum(parts.values()) > usable:
        largest = max(parts, key=lambda name: parts[name])
        fixes = {"activations of the policy": "lower rl.micro_batch_tokens", "activations of the base":
                 "lower rl.micro_batch_tokens"}  # fmt: skip
        lines.append(
            f"cluster.learner_ranks = {ranks}: a rank needs {sum(parts.values()) / 1e9:.0f} GB of the "
            f"{usable / 1e9:.0f} GB it may take of a {config.hardware.gpu}, most for {largest}, "
            f"{parts[largest] / 1e9:.0f} GB; {fixes.get(largest, 'take more ranks')}"
        )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    room = engine_memory(config, model, gpu)["keys and values"] * config.rollout.tensor_parallel_size
    if room < longest * kv_bytes(model):
        lines.append(
            f"rollout.tensor_parallel_size = {config.rollout.tensor_parallel_size}: weights of "
            f"{b * model.served / 1e9:.0f} GB leave no room for one sequence of {longest} tokens on a "
            f"{config.hardware.gpu}; take more GPUs an engine"
        )
    if lines:
        raise ConfigError("\n".join(lines))


def best_split(config: Config, model: Sizes) -> Config:
    """The settings with the same number of GPUs, divided between learner and engines so that a step is shortest."""
    gpu, width = GPUS[config.hardware.gpu], config.rollout.tensor_parallel_size
    total = config.hardware.gpus or config.cluster.learner_ranks + _engine_gpus(config)
    sequences = config.rl.prompts_per_step * config.rl.group_size
    splits = [
        override(config, {"cluster.learner_ranks": ranks, "rollout.num_workers": (total - ranks) // width})
        for ranks in range(1, total - width + 1)
        if sequences % ranks == 0 and config.pretrain.batch_size % ranks == 0
    ]
    usable = _USABLE * gpu.memory_gb * 1e9
    fitting = [one for one in splits if sum(learner_memory(one, model).values()) <= usable]
    overlapped = config.rl.max_staleness > 0
    return min(fitting or [config], key=lambda one: step_time(one, model, gpu).total(overlapped))


def _engine_gpus(config: Config) -> int:
    return config.rollout.num_workers * config.rollout.tensor_parallel_size


def _this_machines_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def show(config: Config) -> None:
    """Print the plan; ConfigError if it does not fit."""
    model, console = sizes(config), Console(highlight=False)
    console.print(
        f"{config.preset}: {model.whole / 1e6:,.1f} M parameters, {model.policy / 1e6:,.1f} M of them train, "
        f"{model.num_bytes} bytes each"
    )
    if config.cluster.use_gpu:
        gpu = GPUS[config.hardware.gpu]
        _table(console, f"a learner rank of {config.cluster.learner_ranks}, on a {config.hardware.gpu}",
               learner_memory(config, model), 1e9, "GB")  # fmt: skip
        _table(console, f"a GPU of {_engine_gpus(config)} for engines", engine_memory(config, model, gpu), 1e9, "GB")
    else:
        learner = {"process": _PROCESS_GIB["learner"] * 2.0**30, **learner_memory(config, model)}
        engine = {"process": _PROCESS_GIB["engine"] * 2.0**30, **engine_memory(config, model, None)}
        _table(console, f"a learner rank of {config.cluster.learner_ranks}", learner, 2.0**30, "GiB")
        _table(console, f"an engine of {config.rollout.num_workers}", engine, 2.0**30, "GiB")
        peaks = host_memory(config, model)
        console.print(f"peak: learner {peaks['learner'] / 2**30:.2f} GiB, engine {peaks['engine'] / 2**30:.2f} GiB")
    refuse(config, model)
    if config.cluster.use_gpu:
        gpu = GPUS[config.hardware.gpu]
        _time_table(console, config, model, gpu)
        better = best_split(config, model)
        if better.cluster.learner_ranks != config.cluster.learner_ranks:
            console.print(
                f"shortest step with these GPUs: --cluster.learner-ranks {better.cluster.learner_ranks} "
                f"--rollout.num-workers {better.rollout.num_workers}"
            )
    console.print("it fits")


def _table(console: Console, title: str, parts: Bytes, unit: float, name: str) -> None:
    table = Table(title=title, show_header=False, show_footer=True)
    table.add_column(footer="together")
    table.add_column(justify="right", footer=f"{sum(parts.values()) / unit:.2f} {name}")
    for component, count in parts.items():
        table.add_row(component, f"{count / unit:.3f}")
    console.print(table)


def _time_table(console: Console, config: Config, model: Sizes, gpu: Gpu) -> None:
    step = step_time(config, model, gpu)
    table = Table(title="a step, by the model of docs/scaling.md", show_header=False)
    rows = {
        "sequences an engine decodes at once": f"{step.concurrent:.0f}",
        "tokens a second, all engines": f"{step.decode_tokens_per_second:,.0f}",
        "rollout": f"{step.rollout:.1f} s",
        "learning": f"{step.learn:.1f} s",
        f"weights by {config.cluster.weight_transport}": f"{step.sync:.2f} s",
        "together": f"{step.total(config.rl.max_staleness > 0):.1f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
