"""Latent actions against tokens: the same base, task, algorithm and number of steps, with and without a KL penalty.

python benchmarks/latent_vs_token.py --folder outputs/latent-vs-token --start MODEL [MODEL ...] [--parallel 2]

Each seed starts from a CoLA model made by jobs/pretrain.py. Over tokens, all weights of the model's base train, at a
fifth of the policy's learning rate. Runs that are already in the folder are not repeated. Accuracy is that of greedy
answers to held-out problems; "distinct" is the share of distinct completions per prompt, over the last ten steps.
"""

import argparse
import functools
import itertools
from pathlib import Path

import numpy as np
from cached_run import run_all, run_once, series
from pictures import picture
from record import RESULTS, record

SPACES = {"latent": "5e-4", "token": "1e-4"}
TINY = ["--preset", "tiny", "--cluster.learner-ranks", "1", "--rl.eval-every", "10"]


def plot(curves: dict[str, np.ndarray], steps: int, path: Path) -> None:
    with picture(path) as (axes,):
        for name, runs in curves.items():
            at = np.linspace(0, steps, runs.shape[1])
            (line,) = axes.plot(at, runs.mean(0), marker="o", markersize=3, label=name)
            axes.fill_between(at, runs.min(0), runs.max(0), color=line.get_color(), alpha=0.15)
        axes.set(xlabel="learner steps", ylabel="held-out accuracy", title="arithmetic, tiny preset, GRPO")
        axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--start", type=Path, nargs="+", required=True, help="a CoLA model for each seed 0, 1, ...")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kl-coefs", nargs="+", default=["0.0", "0.01"])
    parser.add_argument(
        "--name",
        default="latent_vs_token",
        help="name of the result file; give another one to keep the results of the full run",
    )
    parser.add_argument("--parallel", type=int, default=1, help="concurrent runs; each uses about one core")
    args = parser.parse_args()
    folder, seeds = args.folder.resolve(), range(len(args.start))
    cases = list(itertools.product(SPACES, args.kl_coefs, seeds))

    def where(space: str, kl_coef: str, seed: int) -> Path:
        return folder / f"{space}-{kl_coef}-{seed}"

    summaries = run_all(
        [
            functools.partial(
                run_once, where(space, kl_coef, seed), "rl_math", *TINY, "--rl.action-space", space, "--rl.lr",
                SPACES[space], "--rl.kl-coef", kl_coef, "--rl.max-steps", str(args.steps), "--seed", str(seed),
                "--model.path", str(args.start[seed].resolve()),
            )
            for space, kl_coef, seed in cases
        ],
        args.parallel,
    )  # fmt: skip
    found = dict(zip(cases, summaries, strict=True))
    figures: dict[str, object] = {}
    curves = {}
    for space, kl_coef in itertools.product(SPACES, args.kl_coefs):
        runs = [found[space, kl_coef, seed] for seed in seeds]
        places = [where(space, kl_coef, seed) for seed in seeds]
        name = f"{space}_kl_{kl_coef}"
        curves[name] = np.array([series(place, "eval/accuracy") for place in places])
        figures[f"{name}_start_accuracy"] = [one["bc_accuracy"] for one in runs]
        figures[f"{name}_accuracy"] = [one["rl_accuracy"] for one in runs]
        figures[f"{name}_distinct"] = [float(np.mean(series(p, "rollout/distinct")[-10:])) for p in places]
        figures[f"{name}_entropy"] = [float(np.mean(series(p, "policy/entropy")[-10:])) for p in places]
        figures[f"{name}_step_seconds"] = [float(np.median(series(p, "time/step")[5:])) for p in places]
        figures[f"{name}_learn_seconds"] = [float(np.median(series(p, "time/learn")[5:])) for p in places]
        figures[f"{name}_optimizer_mb"] = runs[0]["optimizer_mb"]
        figures[f"{name}_trained_parameters"] = runs[0]["trained_parameters"]
    plot(curves, args.steps, RESULTS / f"{args.name}.png")
    about = f"GRPO over 16 latent actions and over tokens from one model a seed; curves: docs/results/{args.name}.png."
    record(args.name, figures, list(seeds), about)


if __name__ == "__main__":
    main()
