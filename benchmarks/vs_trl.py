"""Called by vs_trl.sh when TRL is installed: runs both trainers in turn and writes docs/results/vs_trl.json."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cached_run import run_once, series
from record import ROOT, record

from cola_ray.settings.config import Config, override
from cola_ray.settings.presets import preset

# Settings of both trainers; all others are the trainer's defaults.
SHARED: dict[str, Any] = {"rl.lr": 1e-4, "rl.kl_coef": 0.0, "rl.prompts_per_step": 64, "rl.group_size": 8}
SKIPPED = 5  # first steps, while allocators and caches warm up


def settings(steps: int, seed: int) -> Config:
    return override(preset("tiny"), {**SHARED, "rl.max_steps": steps, "seed": seed})


def ours(folder: Path, config: Config, model: str) -> dict[str, Any]:
    where = folder / f"cola_ray-{config.seed}"
    shared = [part for name, value in SHARED.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    summary = run_once(
        where, "rl_math", "--preset", "tiny", *shared, "--rl.action-space", "token", "--model.path", model,
        "--rl.max-steps", str(config.rl.max_steps), "--seed", str(config.seed), "--rl.eval-every", "0",
        "--rl.save-every", "1000", "--cluster.learner-ranks", "1",
        "--cluster.threads-per-process", str(os.cpu_count()),
    )  # fmt: skip
    return {
        "start": summary["base_accuracy"],
        "accuracy": summary["rl_accuracy"],
        "rewards": series(where, "reward/mean"),
        "step_seconds": series(where, "time/step"),
        "rollout_seconds": series(where, "time/rollout"),
        "learn_seconds": series(where, "time/learn"),
        "response_length": series(where, "rollout/response_length"),
    }


def theirs(folder: Path, config: Config, base: str) -> dict[str, Any]:
    result = folder / f"trl-{config.seed}.json"
    if not result.exists():
        rl, rollout = config.rl, config.rollout
        settings = {
            "base": base, "steps": rl.max_steps, "seed": config.seed, "lr": rl.lr, "betas": rl.adam_betas,
            "prompts": rl.prompts_per_step, "group": rl.group_size, "new_tokens": rollout.max_new_tokens,
            "max_grad_norm": rl.grad_clip, "eval_problems": rl.eval_problems, "num_problems": config.task.num_problems,
        }  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("OMP_NUM_THREADS", None)  # all cores
        command = [
            str(folder / "trl/bin/python"),
            str(ROOT / "benchmarks/trl_peer.py"),
            json.dumps(settings),
            str(result),
        ]
        with (folder / f"trl-{config.seed}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    model, pairs = str(Path(args.model).resolve()), []
    for seed in args.seeds:
        config = settings(args.steps, seed)
        mine = ours(args.folder, config, model)
        base = str(args.folder / f"cola_ray-{seed}" / "outputs" / "run" / "base")
        pairs.append((mine, theirs(args.folder, config, base)))
        print(f"seed {seed}: {mine['accuracy']:.3f} here, {pairs[-1][1]['accuracy']:.3f} there", file=sys.stderr)
    size = SHARED["rl.prompts_per_step"] * SHARED["rl.group_size"]
    seconds = [[float(np.median(one["step_seconds"][SKIPPED:])) for one in pair] for pair in pairs]
    figures = {
        "start_accuracy": [mine["start"] for mine, _ in pairs],
        "cola_ray_accuracy": [mine["accuracy"] for mine, _ in pairs],
        "trl_accuracy": [other["accuracy"] for _, other in pairs],
        "cola_ray_reward_last_10": [float(np.mean(mine["rewards"][-10:])) for mine, _ in pairs],
        "trl_reward_last_10": [float(np.mean(other["rewards"][-10:])) for _, other in pairs],
        "cola_ray_samples_per_second": [size / here for here, _ in seconds],
        "trl_samples_per_second": [size / there for _, there in seconds],
        "cola_ray_rollout_seconds": [float(np.median(mine["rollout_seconds"][SKIPPED:])) for mine, _ in pairs],
        "cola_ray_learn_seconds": [float(np.median(mine["learn_seconds"][SKIPPED:])) for mine, _ in pairs],
        "cola_ray_response_length": [float(np.median(mine["response_length"][SKIPPED:])) for mine, _ in pairs],
        "samples_per_second_ratio": [there / here for here, there in seconds],
        "trl_version": pairs[0][1]["version"],
    }
    record(
        "vs_trl", figures, args.seeds,
        "Token-level GRPO on arithmetic, 64 prompts x 8 completions a step, against TRL's GRPOTrainer with the same "
        "base, prompts, reward, learning rate and clipping, each with the whole machine. A step's time is its median.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
