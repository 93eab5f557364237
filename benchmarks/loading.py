"""Host memory of each learner rank while it loads a random 1 GB checkpoint, against its share of the parameters.

python benchmarks/loading.py --folder outputs/loading [--ranks 4] [--gigabytes 1.0]

The checkpoint is a CoLA model in bfloat16 in several safetensors files. A rank's peak is the largest increase of its
resident memory from the end of its imports until its policy is sharded, including pages of mapped files.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.multiprocessing as mp
from ranks import free_port, join
from record import record
from safetensors.torch import save_file

from cola_ray import CoLAConfig, CoLAForCausalLM
from cola_ray.learner.policies import make_policy
from cola_ray.model.tensors import empty
from cola_ray.settings.config import Config, override
from cola_ray.settings.presets import preset

SHAPE = {
    "vocab_size": 32_000, "hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12,
    "num_key_value_heads": 4, "num_idm_layers": 1, "num_world_model_layers": 1, "num_policy_layers": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
FILES = 4
ALLOWED = 1.15
"""Allowed peak, as a multiple of a rank's share."""


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """A random checkpoint with as many base layers as this size requires."""

    def shape(layers: int) -> CoLAConfig:
        return CoLAConfig(**SHAPE, num_hidden_layers=layers)

    def size(layers: int) -> int:
        return sum(p.nbytes for p in empty(CoLAForCausalLM, shape(layers), torch.bfloat16).parameters())

    a_layer = size(2) - size(1)
    layers = max(1, 1 + round((gigabytes * 1e9 - size(1)) / a_layer))
    model = empty(CoLAForCausalLM, shape(layers), torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["CoLAForCausalLM"]
    model.config.save_pretrained(folder)
    parameters, places = dict(model.named_parameters()), {}
    names = list(parameters)
    for number in range(FILES):
        file, held = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors", names[number::FILES]
        tensors = {name: torch.empty(parameters[name].shape, dtype=torch.bfloat16).normal_(std=0.02) for name in held}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def settings() -> Config:
    return override(preset("tiny"), {"model.dtype": "bfloat16"})


def status_mb(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e6


def load(rank: int, ranks: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join("gloo", rank, ranks, port)
    torch.distributed.all_reduce(torch.zeros(1))  # opens the connections
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    policy = make_policy(settings(), str(folder))
    peak = status_mb("VmHWM") - before
    kept = sum(parameter.ds_numel * parameter.element_size() for parameter in policy.parameters()) / 1e6
    largest = max(parameter.ds_numel * parameter.element_size() for parameter in policy.parameters()) / 1e6
    figures = {"peak_mb": peak, "kept_by_all_mb": kept, "share_mb": kept / ranks, "largest_tensor_mb": largest}
    (folder / f"rank-{rank}.json").write_text(json.dumps(figures))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    args = parser.parse_args()
    folder = args.folder.resolve()
    if not (folder / "model.safetensors.index.json").exists():
        make_checkpoint(folder, args.gigabytes)
    mp.spawn(load, (args.ranks, free_port(), folder), nprocs=args.ranks)
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(args.ranks)]
    share, largest = ranks[0]["share_mb"], ranks[0]["largest_tensor_mb"]
    peaks = [round(one["peak_mb"], 1) for one in ranks]
    checkpoint = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    figures: dict[str, object] = {
        "checkpoint_mb": checkpoint,
        "ranks": args.ranks,
        "kept_by_all_ranks_mb": ranks[0]["kept_by_all_mb"],
        "share_of_a_rank_mb": share,
        "largest_tensor_mb": largest,
        "peak_of_each_rank_mb": peaks,
        "allowed_mb": ALLOWED * share,
        "highest_peak_over_share": max(peaks) / share,
    }
    print(json.dumps(figures, indent=2))
    record("loading", figures, [0], "Resident memory of learner ranks above their imports while they load a model")


if __name__ == "__main__":
    main()
