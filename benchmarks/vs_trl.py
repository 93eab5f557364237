"""Called by vs_trl.sh when TRL is installed: trains with both libraries in turn and records the results.

    setting   ours                    theirs        result
    tiny      tokens                  GRPOTrainer   docs/results/vs_trl.json
    smollm2   tokens, latent actions  GRPOTrainer   docs/results/vs_trl_smollm2.json

The runs of a seed follow one another, each with the whole machine. The base, prompts, reward, group size,
completions per micro-batch, learning rate, clipping and number of steps are the same.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cached_run import run_once, series
from record import ROOT, record

from cola_ray.settings.config import Config, override
from cola_ray.settings.presets import preset


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
        shared: settings of both trainers; all others are the trainer's defaults.
        micro_batch: completions per micro-batch in TRL.
        skipped: number of first steps to skip, while allocators and caches warm up.
        spaces: action spaces that our trainer uses.
        evaluated: whether greedy answers to held-out problems are evaluated.
    """

    preset: str
    result: str
    shared: dict[str, Any]
    micro_batch: int
    steps: int
    skipped: int
    spaces: tuple[str, ...]
    evaluated: bool
    about: str


SETTINGS = {
    "tiny": Setting(
        "tiny", "vs_trl", {"rl.lr": 1e-4, "rl.kl_coef": 0.0, "rl.prompts_per_step": 64, "rl.group_size": 8},
        micro_batch=512, steps=80, skipped=5, spaces=("token",), evaluated=True,
        about="Token-level GRPO on arithmetic, 64 prompts x 8 completions a step, against GRPOTrainer of TRL with "
        "the same base, prompts, reward, learning rate and clipping. Times of steps are medians.",
    ),
    # At temperature 1 this base never solves GSM8K; a reward for length distinguishes its completions.
    "smollm2": Setting(
        "smollm2-135m", "vs_trl_smollm2",
        {"task.name": "gsm8k", "rl.lr": 1e-6, "rl.kl_coef": 0.0, "rl.prompts_per_step": 4, "rl.group_size": 8,
         "rl.micro_batch_tokens": 1024, "rollout.max_num_seqs": 32, "rollout.max_new_tokens": 128,
         "task.reward": "length", "task.length": 300},
        micro_batch=4, steps=4, skipped=1, spaces=("token", "latent"), evaluated=False,
        about="SmolLM2-135M, prompts of GSM8K, 4 prompts x 8 completions of up to 128 tokens a step, a reward for "
        "length: GRPO over tokens and latent actions here, against TRL's GRPOTrainer. Times of steps are medians.",
    ),
}  # fmt: skip


def config_of(setting: Setting, seed: int, steps: int, path: str) -> Config:
    changes = {name: (value,) if name == "task.reward" else value for name, value in setting.shared.items()}
    return override(
        preset(setting.preset, task=changes.get("task.name", "")),
        {**changes, "rl.max_steps": steps, "seed": seed} | ({"task.path": path} if path else {}),
    )


def ours(folder: Path, setting: Setting, config: Config, model: str, space: str) -> dict[str, Any]:
    where = folder / f"cola_ray-{setting.preset}-{space}-{config.seed}"
    shared = [part for name, value in setting.shared.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    summary = run_once(
        where, "rl_math", "--preset", setting.preset, *shared, "--rl.action-space", space, "--model.path", model,
        "--rl.max-steps", str(config.rl.max_steps), "--seed", str(config.seed), "--rl.eval-every", "0",
        "--rl.save-every", "1000", "--cluster.learner-ranks", "1",
        "--cluster.threads-per-process", str(os.cpu_count()),
        *(["--task.path", config.task.path] if config.task.path else []),
    )  # fmt: skip
    return {
        "start": summary.get("base_accuracy"),
        "accuracy": summary.get("rl_accuracy"),
        "rewards": series(where, "reward/mean"),
        "step_seconds": series(where, "time/step"),
        "rollout_seconds": series(where, "time/rollout"),
        "learn_seconds": series(where, "time/learn"),
        "response_length": series(where, "rollout/response_length"),
        "base": str(where / "outputs" / "run" / "base"),
    }


def theirs(folder: Path, setting: Setting, config: Config, base: str) -> dict[str, Any]:
    name = f"trl-{setting.preset}-{config.seed}"
    result = folder / f"{name}.json"
    if not result.exists():
        rl, rollout = config.rl, config.rollout
        settings = {
            "base": base, "steps": rl.max_steps, "seed": config.seed, "lr": rl.lr, "betas": rl.adam_betas,
            "prompts": rl.prompts_per_step, "group": rl.group_size, "micro_batch": setting.micro_batch,
            "new_tokens": rollout.max_new_tokens, "max_grad_norm": rl.grad_clip,
            "eval_problems": rl.eval_problems if setting.evaluated else 0, "task": config.task.model_dump(),
        }  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("OMP_NUM_THREADS", None)  # all cores
        command = [
            str(folder / "trl/bin/python"),
            str(ROOT / "benchmarks/trl_peer.py"),
            json.dumps(settings),
            str(result),
        ]
        with (folder / f"{name}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    return json.loads(result.read_text())


def figures_of(setting: Setting, runs: dict[str, list[dict[str, Any]]], size: int) -> dict[str, Any]:
    """The recorded figures: medians over steps, one value per seed; ratios above 1 mean that ours is faster.

    Args:
        runs: trainer name ("trl" is one of them) -> one run per seed.
        size: completions per step.
    """

    def medians(name: str, series: str) -> list[float]:
        return [float(np.median(run[series][setting.skipped :])) for run in runs[name]]

    figures: dict[str, Any] = {}
    if setting.evaluated:
        figures["start_accuracy"] = [run["start"] for run in next(iter(runs.values()))]
        figures |= {f"{name}_accuracy": [run["accuracy"] for run in runs[name]] for name in runs}
        figures |= {
            f"{name}_reward_last_10": [float(np.mean(run["rewards"][-10:])) for run in runs[name]] for name in runs
        }
    seconds = {name: medians(name, "step_seconds") for name in runs}
    learn = {name: medians(name, "learn_seconds") for name in runs}
    for name in runs:
        figures[f"{name}_samples_per_second"] = [size / one for one in seconds[name]]
        figures[f"{name}_rollout_seconds"] = [
            step - update if name == "trl" else float(np.median(run["rollout_seconds"][setting.skipped :]))
            for run, step, update in zip(runs[name], seconds[name], learn[name], strict=True)
        ]
        figures[f"{name}_learn_seconds"] = learn[name]
        figures[f"{name}_response_length"] = medians(name, "response_length")
    for name in runs.keys() - {"trl"}:
        figures[f"{name}_samples_per_second_ratio"] = _ratios(seconds["trl"], seconds[name])
        figures[f"{name}_learn_ratio"] = _ratios(learn["trl"], learn[name])
    return figures | {"trl_version": runs["trl"][0]["version"]}


def _ratios(theirs: list[float], ours: list[float]) -> list[float]:
    return [there / here for there, here in zip(theirs, ours, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", required=True, help="a CoLA model of the setting's preset; all start from its base")
    parser.add_argument("--setting", choices=SETTINGS, default="tiny")
    parser.add_argument("--path", default="", help="for smollm2: a folder with GSM8K instead of the hub's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="steps per run; by default 80 for tiny and 4 for smollm2")
    args = parser.parse_args()
    setting, model = SETTINGS[args.setting], str(Path(args.model).resolve())
    runs: dict[str, list[dict[str, Any]]] = {f"cola_ray_{space}": [] for space in setting.spaces} | {"trl": []}
    for seed in args.seeds:
        config = config_of(setting, seed, args.steps or setting.steps, args.path)
        for space in setting.spaces:
            runs[f"cola_ray_{space}"].append(ours(args.folder, setting, config, model, space))
        runs["trl"].append(theirs(args.folder, setting, config, runs["cola_ray_token"][-1]["base"]))
        last = {name: float(np.median(of[-1]["step_seconds"][setting.skipped :])) for name, of in runs.items()}
        print(f"seed {seed}: " + ", ".join(f"{name} {one:.3g} s a step" for name, one in last.items()), file=sys.stderr)
    size = setting.shared["rl.prompts_per_step"] * setting.shared["rl.group_size"]
    record(setting.result, figures_of(setting, runs, size), args.seeds, setting.about)


if __name__ == "__main__":
    main()
