"""Part 3 of benchmarks/gpu.py: vLLM engines that draw actions, and whole runs; each in its own process."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_bench import Bench, Figure
from record import ROOT

_SEQUENCES, _PROMPT, _NEW = 256, 128, 128


def _shape(bench: Bench) -> tuple[int, int, int]:
    """Number of sequences, and tokens per prompt and per completion."""
    return (_SEQUENCES, _PROMPT, _NEW) if bench.name != "toy" else (16, 16, 16)


def _engine(bench: Bench, folder: str, dtype: str, **args: Any) -> Any:
    from cola_ray.rollout.engine import LatentEngine

    sequences, prompt, new = _shape(bench)
    return LatentEngine(
        folder, dtype=dtype, max_model_len=2 * (prompt + new), stop_token_ids=[0], max_num_seqs=sequences,
        **args,
    )  # fmt: skip


def _requests(bench: Bench, new: int = 0) -> list[Any]:
    from cola_ray.rollout.engine import Request

    sequences, prompt, most = _shape(bench)
    ids = np.random.default_rng(0).integers(1, bench.size.shape["vocab_size"], (sequences, prompt))
    return [Request(row.tolist(), seed, 1.0, 0, new or most) for seed, row in enumerate(ids)]


def parity(bench: Bench) -> Iterator[Figure]:
    """Tokens, actions, log-probabilities and states of the engine against PyTorch's, in float32 with a few layers.

    Then again after an update of all policy weights, which has to reach CUDA graphs captured before it.
    """
    from cola_ray.model.modeling_cola import CoLAForCausalLM
    from cola_ray.weights import WeightSender

    few = {"num_hidden_layers": min(4, bench.size.shape["num_hidden_layers"])}
    folder = bench.saved(torch.float32, **few)
    shared = {"gpu_memory_utilization": 0.4} if bench.device.type == "cuda" else {}  # PyTorch's model is there, too
    engine, requests = _engine(bench, folder, "float32", keep_hidden_states=True, **shared), _requests(bench)[:16]
    model = CoLAForCausalLM.from_pretrained(folder, dtype=torch.float32).to(bench.device)
    completions = engine.generate(requests)
    yield from _same(bench, "at first", completions, model, requests)
    yield _states(bench, completions[0], model, requests[0])
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.mul_(-1.5)
    buckets = list(WeightSender().buckets(1, [(f"policy.{name}", one) for name, one in
                                              model.policy.named_parameters()]))  # fmt: skip
    took = bench.seconds(lambda: engine.update_weights(1, buckets), repeats=3)
    sent = sum(one.nbytes for bucket in buckets for one in bucket.payload)
    yield Figure("loading an update", sent / 1e9 / took, "GB/s", f"{sent / 1e9:.3g} GB in {took:.2f} s")
    yield from _same(bench, "after an update", engine.generate(requests), model, requests)
    engine.close()


def _same(bench: Bench, when: str, found: Any, model: Any, requests: Any) -> Iterator[Figure]:
    ids = torch.tensor([request.prompt_ids for request in requests], device=bench.device)
    seeds = torch.tensor([request.seed for request in requests], device=bench.device)
    new = requests[0].max_new_tokens
    tokens, actions, scores = (one.cpu().numpy() for one in model.generate_latent(
        ids, max_new_tokens=new, seed=seeds, eos_token_id=0))  # fmt: skip
    equal, worst = 0, 0.0
    for row, one in enumerate(found):
        count = len(one.token_ids)
        same = one.token_ids.tolist() == tokens[row, :count].tolist() and (
            one.actions.tolist() == actions[row, :count].tolist())  # fmt: skip
        equal += same
        if same:
            worst = max(worst, float(np.abs(one.log_probs - scores[row, :count]).max()))
    yield Figure(f"{when}: completions equal to PyTorch's", equal, f"of {len(found)}")
    yield Figure(f"{when}: |log-probability - PyTorch's| of those", worst, "")


@torch.no_grad()
def _states(bench: Bench, found: Any, model: Any, request: Any) -> Figure:
    """The states e that the engine's cache kept, for prompt and completion, against the base in PyTorch."""
    ids = torch.tensor([[*request.prompt_ids, *found.token_ids[:-1].tolist()]], device=bench.device)
    e = model.encode(ids)[0].cpu().numpy()
    return Figure("states: largest |e - PyTorch's|", float(np.abs(found.hidden_states - e).max()), "")


def decoding(bench: Bench) -> Iterator[Figure]:
    """Tokens per second of the latent engine, and the bytes that a decoding step has to read."""
    from cola_ray.studies import planned_work

    engine, m = _engine(bench, bench.saved(torch.bfloat16), "bfloat16"), bench.sizes()
    _, prompt, new = _shape(bench)
    layers = m.layers + m.policy_layers
    flops = planned_work.generating(m, prompt + new / 2)
    yield from _speed(bench, lambda count: engine.generate(_requests(bench, count)), engine.reset_prefix_cache,
                      2 * m.served, layers, flops)  # fmt: skip
    engine.close()


def plain(bench: Bench) -> Iterator[Figure]:
    """The same for the base in vLLM's own Llama, greedy; and the ratio of the latent engine's FLOP/s to it."""
    from cola_ray.rollout.engine import prepare_process
    from cola_ray.studies import planned_work

    prepare_process(1)
    import vllm

    sequences, prompt, new = _shape(bench)
    on_cpu: dict[str, Any] = {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True, "block_size": 32,
                              "distributed_executor_backend": "uni"}  # fmt: skip
    llm = vllm.LLM(
        bench.saved(torch.bfloat16, plain=True), skip_tokenizer_init=True, dtype="bfloat16",
        max_model_len=2 * (prompt + new), max_num_seqs=sequences, **(on_cpu if bench.device.type == "cpu" else {}),
    )  # fmt: skip
    greedy: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    inputs: Any = [{"prompt_token_ids": list(request.prompt_ids)} for request in _requests(bench)]
    m = bench.sizes()
    flops = planned_work.generating(m, prompt + new / 2, tokens_are_actions=True)
    figures = list(_speed(
        bench, lambda count: llm.generate(inputs, vllm.SamplingParams(max_tokens=count, **greedy), use_tqdm=False),
        llm.reset_prefix_cache, 2 * (m.base + m.head), m.layers, flops,
    ))  # fmt: skip
    yield from figures
    latent = bench.known.get("decoding: tokens a second, prompts included", {})
    if latent.get("card") == bench.card:
        ratio = latent["value"] * planned_work.generating(m, prompt + new / 2) / (figures[0].value * flops)
        yield Figure("FLOP/s of the latent engine / these", ratio, "")


def _speed(bench: Bench, generate: Any, reset: Any, weights: float, layers: int, flops: float) -> Iterator[Figure]:
    """``generate(n)`` makes n tokens for each sequence."""
    sequences, prompt, new = _shape(bench)

    def seconds(count: int) -> float:
        times = []
        for _ in range(4):
            reset()
            started = time.perf_counter()
            generate(count)
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    prompts, whole, m = seconds(1), seconds(new), bench.sizes()
    yield Figure("tokens a second, prompts included", sequences * new / whole, "")
    yield bench.of_flops("prompts", prompts, sequences * prompt * flops)
    # A step reads all weights, and the keys and values of all sequences.
    moved = weights + sequences * (prompt + new / 2) * 2 * m.num_bytes * m.keys * layers
    step = (whole - prompts) / (new - 1)
    yield bench.of_bytes("a decoding step", step, moved)
    yield bench.of_flops("FLOPs of such a step", step, sequences * flops)


def whole_tiny(bench: Bench) -> Iterator[Figure]:
    """`cola_ray rl --preset tiny` from nothing: base, actions, policy, RL."""
    yield from _whole(bench, "tiny", [])


def whole_smollm2(bench: Bench) -> Iterator[Figure]:
    """The same with SmolLM2-135M in bfloat16 and a few steps of each stage."""
    yield from _whole(bench, "smollm2-135m", ["--task.name", "arithmetic", "--model.dtype", "bfloat16"])


def _whole(bench: Bench, preset: str, more: list[str]) -> Iterator[Figure]:
    on_gpu = bench.device.type == "cuda"
    if on_gpu and torch.cuda.device_count() < 2:
        print("a run takes two GPUs, one to learn and one to generate: left out", flush=True)
        return
    folder = ROOT / "outputs" / "gpu" / f"run-{preset}"
    start, stages = folder.with_name(f"start-{preset}"), ["--pretrain.max-steps", "20" if on_gpu else "2"]
    steps = ["--rl.max-steps", "4"] if on_gpu else ["--rl.max-steps", "2", "--rl.eval-problems", "8"]
    placed = ["--cluster.learner-ranks", "1", "--cluster.use-gpu", str(on_gpu).lower()]
    started = time.perf_counter()
    for command in (
        ["pretrain", "--output-dir", str(start), *stages],
        ["rl", "--output-dir", str(folder), "--model.path", str(start / "model"), *steps],
    ):
        whole = [sys.executable, "-m", "cola_ray", *command, "--preset", preset, "--overwrite", *placed, *more]
        done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:], flush=True)
            raise RuntimeError(f"`cola_ray {command[0]}` in {folder} ended with {done.returncode}")
    yield Figure("from nothing to the end", time.perf_counter() - started, "s")
    summary = json.loads((Path(folder) / "summary.json").read_text())
    for name in ("rollout_mismatch", "seconds_per_step"):
        yield Figure(name, float(summary[name]), "")
