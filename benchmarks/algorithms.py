"""Every algorithm on the tiny preset's arithmetic, from the same cloned start a seed: does each improve on it?

python benchmarks/algorithms.py --folder outputs/algorithms [--seeds 0 1 2] [--parallel 2]

Accuracy is of greedy answers to held-out problems. Runs that are already in the folder are not made again.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
from record import record
from trial import all_of, trial

ALGORITHMS: dict[str, list[str]] = {
    "grpo": [],
    "rloo": [],
    "remax": ["--rl.group-size", "4", "--rl.prompts-per-step", "128"],  # the greedy one comes on top
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
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; each keeps about one core busy")
    args = parser.parse_args()
    folder = args.folder.resolve()

    def start(seed: int) -> Path:
        return folder / f"start-{seed}" / "outputs" / "run" / "model"

    all_of(
        [
            functools.partial(trial, folder / f"start-{seed}", "pretrain", "--preset", "tiny", "--seed", str(seed))
            for seed in args.seeds
        ],
        parallel=1,  # two ranks of their own
    )
    pairs = [(seed, algorithm) for seed in args.seeds for algorithm in args.algorithms]
    summaries = all_of(
        [
            functools.partial(
                trial, folder / f"{algorithm}-{seed}", "rl_math", *TINY, "--rl.algorithm", algorithm,
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
