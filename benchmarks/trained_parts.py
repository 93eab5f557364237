"""What to train: a policy over latent actions, all weights over tokens, LoRA or steering vectors; same base and task.

python benchmarks/trained_parts.py --folder outputs/trained-parts [--seeds 0 1 2] [--parallel 2]

    pretrain, one start per seed ─> rl with each part ─> accuracy before and after, bytes, seconds per step, KL

    latent           the policy over latent actions
    token            all weights of the model's base, with tokens as actions
    lora             adapters in the base
    steering_all     one vector per layer of the base; steering_last: one vector for its last layer

All have the same prompts, rewards, algorithm and number of steps. They need different learning rates: those of RATES,
which were not searched for, so final figures show what a part reaches with its rate; --lr lora=3e-4 tries another one.
Trained bytes are those of the weights that receive gradients; optimizer bytes are those of Adam's moments and float32
master weights. KL is per action: a latent action or a token. All rows start from the result of pre-training; over
tokens that is the base, whose accuracy differs from that of the cloned policy.

Intervals are Student's t over seeds. Seconds are medians over the second half of a run's steps: where they matter, run
nothing else beside it, and use --parallel 1. Runs in the folder are not repeated: a stopped benchmark continues.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from algorithms import figures_of, times_of
from cached_run import KeptRun, run_kept, series
from record import record

Settings = dict[str, Any]
PARTS: dict[str, Settings] = {
    "latent": {},
    "token": {"rl.action_space": "token"},
    "lora": {"rl.action_space": "token", "rl.lora_rank": 16},
    "steering_all": {"rl.action_space": "token", "rl.steering": "all"},
    "steering_last": {"rl.action_space": "token", "rl.steering": "last"},
}
RATES = {"latent": 5e-4, "token": 1e-4, "lora": 1e-3, "steering_all": 1e-2, "steering_last": 1e-2}
"""Learning rates by part."""


def starts_of(folder: Path, seeds: list[int]) -> list[KeptRun]:
    return [KeptRun(folder / f"start-{seed}", "pretrain", {"preset": "tiny", "seed": seed}) for seed in seeds]


def run_of(folder: Path, part: str, rate: float, start: KeptRun, steps: int, problems: int) -> KeptRun:
    seed = start.settings["seed"]
    return KeptRun(folder / f"{part}-{rate:g}-{seed}", "rl_math", {
        "preset": "tiny", **PARTS[part], "rl.lr": rate, "rl.max_steps": steps, "rl.eval_every": 0,
        "rl.eval_problems": problems, "cluster.learner_ranks": 1, "seed": seed,
        "model.path": str(start.output / "model"),
    })  # fmt: skip


def row_of(runs: list[KeptRun], rate: float) -> dict[str, Any]:
    """A row of the table from a part's runs, one per seed."""
    found = [run.summary() for run in runs]
    trained = found[0]["trained_parameters"]
    more = {
        "kl": float(np.mean([one["kl_last"] for one in found])),
        "trained_bytes": bytes_of(trained, runs[0].config.model.dtype),
        "optimizer_bytes": round(series(runs[0].where, "memory/optimizer_mb")[-1] * 2**20),  # summaries round it
        **times_of(runs),
        "lr": rate,
    }
    return figures_of([one["bc_accuracy"] for one in found], [one["rl_accuracy"] for one in found], more)


def bytes_of(parameters: int, dtype: str) -> int:
    """Example: 1000 parameters in bfloat16 -> 2000."""
    return parameters * getattr(torch, dtype).itemsize


def rates(given: list[str]) -> dict[str, float]:
    """Learning rates of the parts; those given as PART=RATE replace the defaults.

    Raises:
        SystemExit: there is no such part, or the rate is not a number.
    """
    found = dict(RATES)
    for one in given:
        part, _, rate = one.partition("=")
        if part not in found:
            raise SystemExit(f"--lr {one}: no such part; PART=RATE, with one of {', '.join(found)}")
        try:
            found[part] = float(rate)
        except ValueError:
            raise SystemExit(f"--lr {one}: {rate!r} is no number; PART=RATE, e.g. lora=3e-4") from None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept; reuse it to continue")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="learner steps per run")
    parser.add_argument("--problems", type=int, default=512, help="held-out problems asked before and after training")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"rows of the table: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--lr", nargs="+", default=[], metavar="PART=RATE", help="replaces the rate in RATES")
    parser.add_argument("--parallel", type=int, default=1, help="concurrent runs; each uses about one core")
    args = parser.parse_args()
    folder, rate_of = args.folder.resolve(), rates(args.lr)
    starts = starts_of(folder, args.seeds)
    run_kept(starts, parallel=1)
    runs = {
        part: [run_of(folder, part, rate_of[part], start, args.steps, args.problems) for start in starts]
        for part in args.parts
    }
    run_kept([run for seed in zip(*runs.values(), strict=True) for run in seed], args.parallel)
    figures = {part: row_of(of_part, rate_of[part]) for part, of_part in runs.items()}
    about = f"Greedy held-out accuracy before and after {args.steps} steps of GRPO, by what trains."
    record("trained_parts", figures, args.seeds, about)


if __name__ == "__main__":
    main()
