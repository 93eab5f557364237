"""The decoding part of `make bench`, and the model sizes and timing that all parts share.

python benchmarks/decoding.py [REVISION]      the host's work in a decoding step, for this revision and another one
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, ROOT, record
from transformers import LlamaConfig, LlamaForCausalLM

from cola_ray import CoLAForCausalLM

REPEATS, BATCH, PROMPT, NEW = 5, 64, 32, 32
POLICY_LAYERS, WORLD_MODEL_LAYERS = 2, 2
WIDE = LlamaConfig(
    vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, max_position_embeddings=512,
)  # fmt: skip


def seconds(action: Callable[[], object], repeats: int = REPEATS, warm_ups: int = 1, pause: float = 0.0) -> float:
    """Median duration after warm-ups; the pause before each call lets other processes clean up after the last call."""
    times = []
    for _ in range(warm_ups + repeats):
        time.sleep(pause)
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm_ups:])


def flops_per_token(config: LlamaConfig, latent: bool) -> int:
    """FLOPs (two per multiply-add) of decoding one token, without attention over the cache."""
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 4 * hidden * hidden + 3 * hidden * inner
    total = config.num_hidden_layers * layer + hidden * config.vocab_size
    if latent:
        total += POLICY_LAYERS * layer + WORLD_MODEL_LAYERS * 5 * hidden * inner + 64 * hidden
    return 2 * total


def prompts() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 31_000, (BATCH, PROMPT))


def rollout_prompts() -> tuple[np.ndarray, np.ndarray]:
    """Prompts and response lengths as in rollouts: groups of 8 share a prompt of 128 tokens; responses have 8 to 64."""
    draw = np.random.default_rng(1)
    return draw.integers(1, 31_000, (BATCH // 8, 128)).repeat(8, 0), draw.integers(8, 65, BATCH)


def gemm_rate() -> float:
    """FLOP/s of a decoding step's typical matrix product on one thread: an upper bound for decoding."""
    torch.set_num_threads(1)
    x, w = torch.randn(BATCH, WIDE.hidden_size), torch.randn(WIDE.intermediate_size, WIDE.hidden_size)
    return 2 * BATCH * w.numel() / seconds(lambda: torch.nn.functional.linear(x, w), repeats=200)


def latent_decoding(latent: str) -> dict[str, float]:
    from cola_ray.rollout.engine import LatentEngine, Request

    engine = LatentEngine(
        latent, dtype="float32", max_model_len=256, stop_token_ids=[31_999], max_num_seqs=BATCH, kv_cache_mb=512
    )
    uniform = [Request(prompt.tolist(), seed, 1.0, 0, NEW) for seed, prompt in enumerate(prompts())]
    ragged = [
        Request(prompt.tolist(), seed, 1.0, 0, int(length))
        for seed, (prompt, length) in enumerate(zip(*rollout_prompts(), strict=True))
    ]

    def decode(requests: list[Any]) -> None:
        engine.reset_prefix_cache()
        done = sum(len(completion.actions) for completion in engine.generate(requests))
        assert done == sum(request.max_new_tokens for request in requests)

    return {
        "latent_tokens_per_second": BATCH * NEW / seconds(lambda: decode(uniform)),
        "latent_rollouts_seconds": seconds(lambda: decode(ragged)),
        "engine_load_vs_memcpy": loading(engine, latent),
    }


def plain_decoding(base: str) -> dict[str, float]:
    """vLLM's Llama with the same base and the settings of the latent engine."""
    from cola_ray.rollout.engine import prepare_process

    prepare_process(1)
    import vllm

    llm = vllm.LLM(
        base, skip_tokenizer_init=True, dtype="float32", max_model_len=256, max_num_seqs=BATCH,
        kv_cache_memory_bytes=512 << 20, distributed_executor_backend="uni", enforce_eager=True, seed=0,
    )  # fmt: skip
    params = vllm.SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, detokenize=False)
    inputs: Any = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts()]

    def decode() -> None:
        llm.reset_prefix_cache()
        llm.generate(inputs, params, use_tqdm=False)

    return {"plain_tokens_per_second": BATCH * NEW / seconds(decode)}


def torch_decoding(latent: str) -> dict[str, float]:
    """A loop like PyTorch's ``generate`` with key/value caches; every row runs until the longest has ended."""
    rate = gemm_rate()
    model = CoLAForCausalLM.from_pretrained(latent).eval()
    seeds = torch.arange(BATCH)
    uniform = torch.from_numpy(prompts())
    shared, lengths = rollout_prompts()
    ragged, longest = torch.from_numpy(shared), int(lengths.max())
    return {
        "gemm_gflops_per_second": rate / 1e9,
        "torch_tokens_per_second": BATCH
        * NEW
        / seconds(lambda: model.generate_latent(uniform, max_new_tokens=NEW, seed=seeds)),
        "torch_rollouts_seconds": seconds(lambda: model.generate_latent(ragged, max_new_tokens=longest, seed=seeds)),
    }


def loading(engine: Any, latent: str) -> float:
    """Loading new weights into the engine, which repacks them on CPU, relative to copying them once."""
    from cola_ray.weights import WeightSender

    model = CoLAForCausalLM.from_pretrained(latent)
    policy = [(f"policy.{name}", tensor) for name, tensor in model.policy.state_dict().items()]
    buckets = list(WeightSender().buckets(1, policy))
    return memcpy_seconds(sum(tensor.nbytes for _, tensor in policy)) / seconds(
        lambda: engine.update_weights(1, buckets)
    )


def memcpy_seconds(nbytes: int) -> float:
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8)
    target = torch.empty_like(source)
    return seconds(lambda: target.copy_(source), warm_ups=3)


# --- the host's work in a step ----------------------------------------------------------------------------------------

SEQUENCES, STEPS = 256, 48
NARROW = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, max_position_embeddings=128,
)  # fmt: skip
"""So small that a call costs only its overhead, as on a GPU, where it only launches a kernel."""


def host_ms(llm: Any, submit: Callable[[int], None], step: Callable[[], object]) -> float:
    """Median milliseconds of a step that decodes 256 sequences, without the model's forward pass.

    A GPU replays the forward pass as one graph. The rest runs on the host: scheduling, the batch's settings, the
    calls that draw actions and tokens, and storing their results. Measured in CPU time, which other processes do not
    affect.
    """
    (model,) = llm.apply_model(lambda served: served)
    forward, spent = model.forward, [0.0]

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        made = forward(*args, **kwargs)
        spent[0] += time.process_time() - started
        return made

    model.forward = timed
    rest = []
    for turn in range(3):  # the first warms up
        for index in range(SEQUENCES):
            submit(turn * SEQUENCES + index)
        for _ in range(STEPS):
            spent[0], started = 0.0, time.process_time()
            step()
            rest.append(time.process_time() - started - spent[0])
        assert not llm.llm_engine.has_unfinished_requests()
    decoding = [rest[turn * STEPS + at] for turn in (1, 2) for at in range(STEPS // 4, STEPS - 1)]
    return 1000 * statistics.median(decoding)


_HOST = {"max_model_len": 96, "max_num_seqs": SEQUENCES, "max_num_batched_tokens": 8 * SEQUENCES}


def latent_host_ms(latent: str) -> float:
    from cola_ray.rollout.engine import LatentEngine, Request

    engine = LatentEngine(latent, dtype="float32", stop_token_ids=[63], kv_cache_mb=256, **_HOST)
    return host_ms(
        engine.llm, lambda seed: engine.submit(Request([1 + seed % 60] * 8, seed, 1.0, 0, STEPS)), engine.step
    )


def plain_host_ms(base: str) -> float:
    """The same for vLLM's Llama with the same base and greedy tokens."""
    from cola_ray.rollout.engine import prepare_process

    prepare_process(1)
    import vllm

    llm = vllm.LLM(
        base, skip_tokenizer_init=True, dtype="float32", kv_cache_memory_bytes=256 << 20, block_size=32,
        distributed_executor_backend="uni", enforce_eager=True, seed=0, **_HOST,
    )  # fmt: skip
    params = vllm.SamplingParams(
        max_tokens=STEPS, temperature=0.0, ignore_eos=True, detokenize=False,
        output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY, skip_clone=True,
    )  # fmt: skip
    return host_ms(
        llm,
        lambda seed: llm.llm_engine.add_request(str(seed), {"prompt_token_ids": [1 + seed % 60] * 8}, params),
        llm.llm_engine.step,
    )


def measured(function: str, model: str, source: Path = ROOT) -> float:
    """The figure of one of these functions, measured in its own process with the package as it is in ``source``."""
    code = f"import json, decoding; print('RESULT' + json.dumps(decoding.{function}({model!r})))"
    paths = f"{source}:{Path(__file__).parent}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=source, check=False
    )  # in that folder, because Python looks there first
    if done.returncode:
        sys.exit(f"{function} failed:\n{done.stderr[-3000:]}")
    return float(next(line for line in done.stdout.splitlines() if line.startswith("RESULT")).removeprefix("RESULT"))


def main(revision: str = "") -> None:
    file = RESULTS / "host_work.json"
    figures: dict[str, float] = json.loads(file.read_text())["figures"] if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        base, latent, other = (str(Path(folder) / name) for name in ("base", "latent", "other"))
        torch.manual_seed(0)
        LlamaForCausalLM(NARROW).save_pretrained(base)
        sizes = {"num_actions": 8, "num_idm_layers": 1, "num_policy_layers": 1, "num_world_model_layers": 1}
        CoLAForCausalLM.attach(base, **sizes).save_pretrained(latent)
        figures |= {"plain_ms": measured("plain_host_ms", base), "latent_ms": measured("latent_host_ms", latent)}
        if revision:
            subprocess.run(["git", "worktree", "add", "--detach", "--quiet", other, revision], cwd=ROOT, check=True)
            try:
                figures["latent_before_ms"] = measured("latent_host_ms", latent, Path(other))
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
    figures["ours_ms"] = figures["latent_ms"] - figures["plain_ms"]
    if "latent_before_ms" in figures:
        figures["ours_before_ms"] = figures["latent_before_ms"] - figures["plain_ms"]
        figures["ours_vs_before"] = figures["ours_ms"] / figures["ours_before_ms"]
    record(
        "host_work",
        figures,
        about="256 sequences, hidden 32, 1 + 1 layers, 8 actions, vocabulary 64, float32, one thread.",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
