"""An RL update of the policy with random bfloat16 weights in the shapes of Llama-3.1-8B: seconds, MFU and GPU memory.

python benchmarks/learner_gpu.py                (needs a GPU of 80 GB or more, torch, transformers and deepspeed)
python benchmarks/learner_gpu.py --shape tiny   (a toy size, which checks on a CPU that the benchmark runs)
"""

import argparse
import os
import socket
import statistics
import time

import torch
from record import record
from run import random_batch

from cola_ray import CoLAConfig, CoLAForCausalLM
from cola_ray.experience import Batch
from cola_ray.learner.engine import join_group
from cola_ray.learner.policies import LatentPolicy
from cola_ray.learner.rl import RLLearner
from cola_ray.settings.config import Config, override
from cola_ray.settings.presets import preset
from cola_ray.studies.plan import GPUS

LLAMA_31_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_idm_layers": 1, "num_policy_layers": 8,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_idm_layers": 1, "num_policy_layers": 2,
}  # fmt: skip
REPEATS = 5


def settings(gpu: bool) -> Config:
    """The settings of the paper, with one rank."""
    changes = {"model.dtype": "bfloat16", "cluster.use_gpu": gpu, "cluster.learner_ranks": 1, "rl.kl_coef": 0.001}
    return override(preset("llama-3.1-8b"), changes)


def random_model(shape: dict[str, int], device: torch.device) -> CoLAForCausalLM:
    config = CoLAConfig(**shape, tie_word_embeddings=False, max_position_embeddings=8192)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = CoLAForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def flops(model: CoLAForCausalLM, batch: Batch) -> float:
    """FLOPs of an update with attention: forward through base, reference and policy, backward through the policy."""
    config, tokens = model.config, float(batch.attention_mask.sum())
    width = batch.input_ids.shape[1]

    def layers(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    scores = 2 * 2 * width / 2 * config.num_attention_heads * config.head_dim  # causal: half of the square
    base = 2 * layers(model.model.layers) + config.num_hidden_layers * scores
    policy = 2 * layers(model.policy) + config.num_policy_layers * scores
    return tokens * (base + policy + 3 * policy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=["llama-3.1-8b", "tiny"], default="llama-3.1-8b")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--response", type=int, default=896)
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(free.getsockname()[1])}  # fmt: skip
    join_group("nccl" if gpu else "gloo")
    shape = TINY if args.shape == "tiny" else LLAMA_31_8B
    model = random_model(shape, device)
    batch = random_batch(128, args.response, args.sequences, shape["vocab_size"], args.micro_batch_tokens)
    work = flops(model, batch)
    learner = RLLearner(settings(gpu), LatentPolicy(model))
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        learner.step(batch)
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[1:])
    tokens = float(batch.attention_mask.sum())
    figures: dict[str, object] = {
        "shape": args.shape,
        "tokens": tokens,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "teraflops_per_second": work / seconds / 1e12,
    }
    if gpu:
        name = torch.cuda.get_device_name()
        peak = next((sheet.tflops * 1e12 for part, sheet in GPUS.items() if part in name.lower()), None)
        figures |= {
            "gpu": name,
            "mfu": work / seconds / peak if peak else "unknown peak",
            "peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30,
        }
    print(figures)
    if gpu:  # figures of a CPU are of no interest here
        record("learner_gpu", figures, [0], "One RL update of the policy at these shapes, random weights, bfloat16.")


if __name__ == "__main__":
    main()
