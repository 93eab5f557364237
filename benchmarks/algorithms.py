"""Every algorithm on the tiny preset's arithmetic, from one cloned start per seed: how much does each improve on it?

python benchmarks/algorithms.py --folder outputs/algorithms [--seeds 0 1 2] [--parallel 2]

Accuracy is measured by greedy answers to held-out problems. Runs that are already in the folder are not repeated.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
from cached_run import run_all, run_once
from record import record

ALGORITHMS: dict[str, list[str]] = {
    "grpo": [],
    "rloo": [],
    "remax": ["--rl.group-size", "4", "--rl.prompts-per-step", "128"],  # plus a greedy completion per prompt
    "reinforce": [],
    "ppo": ["--rl.updates-per-batch", "2", "--rl.value-steps", "8"],
    "etpo": ["--rl.kl-coef", "0.05", "--rl.value-steps", "20", "--rl.target-tau", "0.05"],
}
TINY = ["--preset", "tiny", "--cluster.learner-ranks", "1", "--rl.eval-every", "0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; each uses about one core")
    args = parser.parse_args()
    folder = args.folder.resolve()

    def start(seed: int) -> Path:
        return folder / f"start-{seed}" / "outputs" / "run" / "model"

    run_all(
        [
            functools.partial(run_once, folder / f"start-{seed}", "pretrain", "--preset", "tiny", "--seed", str(seed))
            for seed in args.seeds
        ],
        parallel=1,  # each has two learner ranks
    )
    pairs = [(seed, algorithm) for seed in args.seeds for algorithm in args.algorithms]
    summaries = run_all(
        [
            functools.partial(
                run_once, folder / f"{algorithm}-{seed}", "rl_math", *TINY, "--rl.algorithm", algorithm,
                *ALGORITHMS[algorithm], "--rl.max-steps", str(args.steps), "--seed", str(seed),
                "--model.path", str(start(seed)),
            )
            for seed, algorithm in pairs
        ],
        args.parallel,
    )  # fmt: skip
    found = dict(zip(pairs, summaries, strict=True))
    figures: dict[str, object] = {"start": [found[seed, args.algorithms[0]]["bc_accuracy"] for seed in args.seeds]}
    for algorithm in args.algorithms:
        ends = [found[seed, algorithm]["rl_accuracy"] for seed in args.seeds]
        starts = [found[seed, algorithm]["bc_accuracy"] for seed in args.seeds]
        figures[algorithm] = ends
        figures[f"{algorithm}_least_gain_points"] = 100 * float(np.min(np.subtract(ends, starts)))
    record("algorithms", figures, args.seeds, "Greedy held-out accuracy on arithmetic after RL, one value a seed.")


if __name__ == "__main__":
    main()
