"""`make bench`: ratios within one run, against what one would use instead; medians of five.

latent_vs_hf_generate   tokens/s of the vLLM engine over those of the PyTorch loop on the same model, batch 64
publish_vs_memcpy       bytes/s of packing, checking and loading a policy over those of one memory copy
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from record import record
from transformers import LlamaConfig, LlamaForCausalLM

from cola_ray import CoLAForCausalLM
from cola_ray.rollout.engine import LatentEngine, Request
from cola_ray.weights import WeightSender

REPEATS, BATCH, PROMPT, NEW = 5, 64, 32, 32


def seconds(action: Callable[[], object]) -> float:
    """Median of five, after one warm-up."""
    action()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, eos_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as path:
        LlamaForCausalLM(config).save_pretrained(base)
        model = CoLAForCausalLM.attach(base, num_idm_layers=1, num_policy_layers=2).eval()
        model.save_pretrained(path)
        engine = LatentEngine(path, dtype="float32", max_model_len=PROMPT + NEW, stop_token_id=4095)
    prompts = np.random.default_rng(0).integers(1, 4000, (BATCH, PROMPT))
    requests = [Request(prompt.tolist(), seed, 1.0, 0, NEW) for seed, prompt in enumerate(prompts)]
    ids, seeds = torch.from_numpy(prompts), torch.arange(BATCH)

    def decode() -> None:
        engine.reset_prefix_cache()
        engine.generate(requests)

    in_engine = seconds(decode)
    in_torch = seconds(lambda: model.generate_latent(ids, max_new_tokens=NEW, seed=seeds))

    policy = [(f"policy.{name}", tensor) for name, tensor in model.policy.state_dict().items()]
    nbytes = sum(tensor.nbytes for _, tensor in policy)
    publish = seconds(lambda: engine.update_weights(1, list(WeightSender().buckets(1, policy))))
    source = torch.empty(nbytes, dtype=torch.uint8)
    copy = seconds(source.clone)
    record(
        "bench",
        {
            "latent_vs_hf_generate": in_torch / in_engine,
            "latent_tokens_per_second": BATCH * NEW / in_engine,
            "publish_vs_memcpy": copy / publish,
            "publish_megabytes": nbytes / 1e6,
        },
        about="Hidden 256, 4 + 2 layers, vocabulary 4096, batch 64, 32 + 32 tokens, float32, one thread.",
    )


if __name__ == "__main__":
    main()
