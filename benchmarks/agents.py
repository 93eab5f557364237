"""Sample efficiency on Twenty Questions: ArCHer, CHAI, filtered cloning and PPO from the same cloned start, by seed.

"archer" is the preset, where the critic chooses among utterances; "archer_alone" is ArCHer as in the paper.

python benchmarks/agents.py --folder outputs/agents --model MODEL [--seeds 0 1 2] [--iterations 60] [--parallel 2]

Follows figure 3 of Zhou et al. 2024: how many episodes each method needs until the mean return passes -9 and -8,
starting from about -11, and where it ends. The curve of a method is the mean return of its last 256 training episodes.
Runs that are already in the folder are not repeated, so a stopped benchmark continues.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
from cached_run import run_all, run_once, series
from record import RESULTS, record

THRESHOLDS = (-9.0, -8.0)
PER_STEP, WINDOW = 32, 256
COMMON = ["--preset", "tiny", "--task.name", "twenty_questions", "--cluster.learner-ranks", "1", "--rl.eval-every", "0",
          "--rl.eval-problems", "8", "--rl.prompts-per-step", str(PER_STEP), "--rl.save-every", "1000"]  # fmt: skip
METHODS: dict[str, list[str]] = {
    "archer": ["--rl.algorithm", "archer"],
    "archer_alone": ["--rl.algorithm", "archer", "--critic.no-chooses"],
    "chai": ["--rl.algorithm", "chai"],
    "filtered_bc": ["--rl.algorithm", "filtered_bc", "--rl.lr", "3e-4"],
    "ppo": ["--rl.algorithm", "ppo", "--rl.updates-per-batch", "2", "--rl.lr", "1e-3", "--rl.kl-coef", "0.01"],
}


def returns_of(where: Path, method: str, seed: int, iterations: int, model: str) -> np.ndarray:
    """(iterations,) mean returns of the episodes of each iteration."""
    run_once(
        where, "rl_agent", *COMMON, *METHODS[method], "--seed", str(seed), "--rl.max-steps", str(iterations),
        "--model.path", model,
    )  # fmt: skip
    return np.array(series(where, "reward/mean"))


def smoothed(returns: np.ndarray) -> np.ndarray:
    """Moving average over the last ``WINDOW`` episodes, or over all of them at the start."""
    width = WINDOW // PER_STEP
    return np.array([returns[max(0, i + 1 - width) : i + 1].mean() for i in range(len(returns))])


def episodes_to(curve: np.ndarray, threshold: float) -> float:
    """Episodes until the curve reaches a threshold, at least ``WINDOW``; infinite if it never does."""
    reached = np.flatnonzero(curve[WINDOW // PER_STEP - 1 :] >= threshold)
    return float((reached[0] + WINDOW // PER_STEP) * PER_STEP) if len(reached) else float("inf")


def plot(curves: dict[str, np.ndarray], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for method, runs in curves.items():
        episodes = PER_STEP * (1 + np.arange(runs.shape[1]))
        (line,) = axes.plot(episodes, runs.mean(0), label=method)
        axes.fill_between(episodes, runs.min(0), runs.max(0), color=line.get_color(), alpha=0.15)
    for threshold in THRESHOLDS:
        axes.axhline(threshold, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="episodes", ylabel=f"mean return of the last {WINDOW}", title="Twenty Questions, tiny preset")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument(
        "--model", required=True, help="the cloned start: a CoLA model that rl_agent.py has pre-trained"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; each uses about one core")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    args = parser.parse_args()
    folder, model = Path(args.folder).resolve(), str(Path(args.model).resolve())
    pairs = [(method, seed) for seed in args.seeds for method in args.methods]
    runs = run_all(
        [
            functools.partial(returns_of, folder / f"{method}-{seed}", method, seed, args.iterations, model)
            for method, seed in pairs
        ],
        args.parallel,
    )
    found = dict(zip(pairs, runs, strict=True))
    raw = {method: np.array([found[method, seed] for seed in args.seeds]) for method in args.methods}
    curves = {method: np.array([smoothed(returns) for returns in runs]) for method, runs in raw.items()}
    figures: dict[str, object] = {"episodes": args.iterations * PER_STEP}
    for method, runs in curves.items():
        for threshold in THRESHOLDS:
            figures[f"{method}_episodes_to_{threshold:g}"] = [episodes_to(curve, threshold) for curve in runs]
        figures[f"{method}_first"] = [float(returns[0]) for returns in raw[method]]
        figures[f"{method}_last"] = [float(curve[-1]) for curve in runs]
    plot(curves, RESULTS / "agents.png")
    record("agents", figures, args.seeds, "Twenty Questions from one cloned start; curves in docs/results/agents.png.")


if __name__ == "__main__":
    main()
