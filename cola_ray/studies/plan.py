"""Plans a run from its settings: memory by component, seconds per step, seconds per weight update.

cola_ray plan --preset llama-3.1-8b --hardware.gpus 16 --hardware.gpu h100
cola_ray plan --preset llama-3.1-8b --rl.action-space token --cluster.gradient-checkpointing
cola_ray plan --preset smollm2-135m                 (on CPU: only memory)

settings ─> planned_work.py: FLOPs and bytes of a micro-batch ─┬─> planned_memory.py ─> refuse what does not fit
                                                               └─> planned_time.py ──> expected | pessimistic
"""

import os
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from cola_ray.runs.display import wide_console
from cola_ray.settings.config import Config, ConfigError, override
from cola_ray.settings.training import PretrainStage
from cola_ray.studies.planned_idle import idle
from cola_ray.studies.planned_memory import (
    PROCESS_GIB,
    USABLE,
    Bytes,
    critic_memory,
    engine_memory,
    host_memory,
    kv_bytes,
    learner_memory,
    offloaded,
    rl_rows,
    stage_memory,
    weight_bytes,
)
from cola_ray.studies.planned_time import EXPECTED, GPUS, PESSIMISTIC, PUBLISHED, Assumed, Gpu, stage_time, step_time
from cola_ray.studies.planned_work import Sizes, learning, sizes


def refuse(config: Config, m: Sizes) -> None:
    """Raise ConfigError if a process does not fit its GPU, or if GPUs or memory are not sufficient."""
    lines = list(_too_little_on_gpus(config, m) if config.cluster.use_gpu else _too_little_on_cpu(config, m))
    if lines:
        raise ConfigError("\n".join(lines))


def _too_little_on_cpu(config: Config, m: Sizes) -> Iterator[str]:
    needs = host_memory(config, m)
    counts = {"learner": config.cluster.learner_ranks, "engine": config.rollout.num_workers}
    total = sum(needs[name] * count for name, count in counts.items()) / 2**30
    there = config.hardware.memory_gb or _this_machines_gib()
    if total > there:
        yield (
            f"cluster.learner_ranks = {counts['learner']}: the run needs {total:.1f} GiB of the {there:.1f} GiB "
            "there are; lower rl.micro_batch_tokens, rollout.kv_cache_mb or cluster.learner_ranks"
        )


def _too_little_on_gpus(config: Config, m: Sizes) -> Iterator[str]:
    gpu, there = GPUS[config.hardware.gpu], config.hardware.gpus
    ranks, engines = config.cluster.learner_ranks, _engine_gpus(config)
    if there and ranks + engines > there:
        yield (
            f"hardware.gpus = {there}: {ranks} learner ranks and {engines} GPUs of engines need {ranks + engines}; "
            f"e.g. --cluster.learner-ranks {there // 2} --rollout.num-workers {there - there // 2}"
        )
    checkpoint = "" if config.cluster.gradient_checkpointing else ", or set cluster.gradient_checkpointing"
    yield from _too_large(config, "a rank", learner_memory(config, m), f"lower rl.micro_batch_tokens{checkpoint}")
    for stage in _stages(config):
        yield from _too_large(config, f"a rank in pre-training, {stage},", stage_memory(config, m, stage),
                              f"lower pretrain.micro_batch_size{checkpoint}")  # fmt: skip
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    split = config.rollout.tensor_parallel_size
    if engine_memory(config, m, gpu.memory_gb)["keys and values"] * split < longest * kv_bytes(config, m):
        yield (
            f"rollout.tensor_parallel_size = {split}: weights of {weight_bytes(config, m) / 1e9:.0f} GB leave "
            f"no room for one sequence of {longest} tokens on a {config.hardware.gpu}; give each engine more GPUs"
        )


def _too_large(config: Config, whose: str, parts: Bytes, fix: str) -> Iterator[str]:
    """What to lower if activations take most of the memory; more ranks if they do not."""
    usable, needed = USABLE * GPUS[config.hardware.gpu].memory_gb * 1e9, sum(parts.values())
    largest = max(parts, key=lambda name: parts[name])
    if largest not in ("activations", "temporary"):
        fix = "take more ranks, or set cluster.offload_optimizer"
    if needed > usable:
        yield (
            f"cluster.learner_ranks = {config.cluster.learner_ranks}: {whose} needs {needed / 1e9:.0f} GB of the "
            f"{usable / 1e9:.0f} GB it may use of a {config.hardware.gpu}, most for {largest}, "
            f"{parts[largest] / 1e9:.0f} GB; {fix}"
        )


def _stages(config: Config) -> tuple[PretrainStage, ...]:
    """The stages of pre-training; none for a run from a finished model or over tokens."""
    return () if config.model.path or config.rl.action_space == "token" else config.pretrain.stages


def best_split(config: Config, m: Sizes) -> Config:
    """Return the settings with the same GPUs divided between learner and engines so that a step is shortest."""
    gpu, width = GPUS[config.hardware.gpu], config.rollout.tensor_parallel_size
    total = config.hardware.gpus or config.cluster.learner_ranks + _engine_gpus(config)
    sequences = config.rl.prompts_per_step * config.rl.group_size
    splits = [
        override(config, {"cluster.learner_ranks": ranks, "rollout.num_workers": (total - ranks) // width})
        for ranks in range(1, total - width + 1)
        if sequences % ranks == 0 and config.pretrain.batch_size % ranks == 0
    ]
    usable = USABLE * gpu.memory_gb * 1e9
    fitting = [one for one in splits if sum(learner_memory(one, m).values()) <= usable]
    overlapped = config.rl.max_staleness > 0
    return min(fitting or [config], key=lambda one: step_time(one, m, gpu).total(overlapped))


def _engine_gpus(config: Config) -> int:
    return config.rollout.num_workers * config.rollout.tensor_parallel_size


def _this_machines_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


# --- printed ------------------------------------------------------------------------------------------------------


def show(config: Config) -> None:
    """Print the plan; ConfigError if it does not fit."""
    m, console = sizes(config), wide_console(100)
    console.print(f"{config.preset}: {m.whole / 1e6:,.1f} M parameters, {m.num_bytes} bytes each")
    if config.cluster.use_gpu:
        _show_memory_of_gpus(console, config, m)
    else:
        learner = {"process": PROCESS_GIB["learner"] * 2.0**30, **learner_memory(config, m)}
        engine = {"process": PROCESS_GIB["engine"] * 2.0**30, **engine_memory(config, m, None)}
        _table(console, f"a learner rank of {config.cluster.learner_ranks}", learner, 2.0**30, "GiB")
        _table(console, f"an engine of {config.rollout.num_workers}", engine, 2.0**30, "GiB")
        peaks = host_memory(config, m)
        console.print(f"peak: learner {peaks['learner'] / 2**30:.2f} GiB, engine {peaks['engine'] / 2**30:.2f} GiB")
    refuse(config, m)
    if config.cluster.use_gpu:
        _show_time(console, config, m, GPUS[config.hardware.gpu])
        better = best_split(config, m)
        if better.cluster.learner_ranks != config.cluster.learner_ranks:
            console.print(
                f"shortest step with these GPUs: --cluster.learner-ranks {better.cluster.learner_ranks} "
                f"--rollout.num-workers {better.rollout.num_workers}"
            )
    console.print("it fits")


def _show_memory_of_gpus(console: Console, config: Config, m: Sizes) -> None:
    ranks, gpu = config.cluster.learner_ranks, config.hardware.gpu
    for stage in _stages(config):
        title = f"a rank of {ranks} in pre-training, {stage}, on a {gpu}"
        _table(console, title, stage_memory(config, m, stage), 1e9, "GB")
    _table(console, f"a learner rank of {ranks} in RL, on a {gpu}", learner_memory(config, m), 1e9, "GB")
    critic = critic_memory(config, m)
    if critic:
        where = "on its share of a GPU" if config.critic.gpu_share else "in host memory"
        _table(console, f"a replica of {config.critic.replicas} of the critic, {where}", critic, 1e9, "GB")
    waits = offloaded(config, learning(config, m, rl_rows(config)), m.num_bytes)
    if waits:
        console.print(f"in host memory wait {waits / 1e9:.1f} GB of each rank")
    engine = engine_memory(config, m, GPUS[gpu].memory_gb)
    _table(console, f"a GPU of {_engine_gpus(config)} for engines", engine, 1e9, "GB")


def _table(console: Console, title: str, parts: Bytes, unit: float, name: str) -> None:
    table = Table(title=title, show_header=False, show_footer=True)
    table.add_column(footer="together")
    table.add_column(justify="right", footer=f"{sum(parts.values()) / unit:.2f} {name}")
    for component, count in parts.items():
        table.add_row(component, f"{count / unit:.3f}")
    console.print(table)


def _show_time(console: Console, config: Config, m: Sizes, gpu: Gpu) -> None:
    table = Table(title="estimated, not measured; formulas in docs/scaling.md", show_header=True)
    for name in ("", "expected", "pessimistic"):
        table.add_column(name, justify="right" if name else "left")
    columns = [_times(config, m, gpu, assumed) for assumed in (EXPECTED, PESSIMISTIC)]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)
    for assumed, name in ((EXPECTED, "expected"), (PESSIMISTIC, "pessimistic")):
        console.print(
            f"{name}: MFU {assumed.mfu}, {assumed.decode} of memory bandwidth in decoding, {assumed.link_gbs:.0f} GB/s "
            f"within a node, {assumed.network} of {config.hardware.network_gbs:.0f} GB/s between nodes, "
            f"{assumed.pcie_gbs} GB/s to host memory, {assumed.store_gbs} GB/s into the object store, "
            f"{assumed.host_tflops} TFLOP/s of a host's processors"
        )
    console.print(
        f"waiting: with rl.max_staleness {config.rl.max_staleness} and rl.update_mode {config.rl.update_mode}, answers "
        f"of log-normal lengths, hardware.response_spread {config.hardware.response_spread}"
    )
    console.print("published by others, of their own systems:")
    for name, found in PUBLISHED.items():
        console.print(f"  {name}: {found}")


def _times(config: Config, m: Sizes, gpu: Gpu, assumed: Assumed) -> dict[str, str]:
    step, waiting = step_time(config, m, gpu, assumed), idle(config, m, gpu, assumed)
    total = step.total(config.rl.max_staleness > 0)
    gpus = config.cluster.learner_ranks + _engine_gpus(config)
    stages = {f"pre-training, {stage}: hours of {config.pretrain.num_steps(stage):,} steps":
              f"{config.pretrain.num_steps(stage) * stage_time(config, m, gpu, stage, assumed) / 3600:,.1f}"
              for stage in _stages(config)}  # fmt: skip
    return stages | {
        "sequences an engine decodes at once": f"{step.concurrent:.0f}",
        "tokens a second, all engines": f"{step.decode_tokens_per_second:,.0f}",
        "rollout": f"{step.rollout:.1f} s",
        **({"critic": f"{step.critic:.1f} s"} if step.critic else {}),
        "learning": f"{step.learn:.1f} s",
        f"weights by {config.cluster.weight_transport}": f"{step.sync:.2f} s",
        "a step": f"{total:.1f} s",
        "a step that waits for its longest answers": f"{waiting.step:.1f} s",
        "engines idle in it": f"{waiting.engines:.0%}",
        "learner idle in it": f"{waiting.learner:.0%}",
        "trained tokens a second and GPU": f"{step.tokens / total / gpus:,.0f}",
    }
