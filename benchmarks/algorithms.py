"""Every algorithm and loss on the tiny preset's arithmetic, from one cloned start per seed: how much each one gains.

python benchmarks/algorithms.py --folder outputs/algorithms [--seeds 0 1 2] [--steps 40] [--parallel 2]

    pretrain, a start a seed ─> rl with each row's settings ─> accuracy before and after, KL, seconds a step

Rows are all registered algorithms and losses (including your own, if a package registers them), and the recipes of
docs/algorithms.md that are neither. Algorithms that only agents can use are in benchmarks/agents.py. Losses are trained
with several passes over each batch, since with one pass they equal ppo; "loss ppo" is grpo with as many passes.

Accuracy is that of greedy answers to held-out problems. Intervals are Student's t over seeds; the interval of a gain
is over the differences within each seed. Before the first run the script prints how long all runs will take. Runs that
are already in the folder are not repeated, so a stopped benchmark continues; the table contains the requested rows.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cached_run import KeptRun, preset_of, run_kept, series
from record import record
from uncertainty import over_seeds

from cola_ray import registry
from cola_ray.settings.combinations import refused
from cola_ray.settings.config import override

Settings = dict[str, Any]
SUITED: dict[str, Settings] = {
    "remax": {"rl.group_size": 4, "rl.prompts_per_step": 128},  # plus a greedy completion per prompt
    "ppo": {"rl.updates_per_batch": 2, "rl.value_steps": 8},
    "etpo": {"rl.kl_coef": 0.05, "rl.value_steps": 20, "rl.target_tau": 0.05},
}
"""Settings specific to an algorithm; the other algorithms have none."""
PASSES = {"rl.updates_per_batch": 4}
LOSSES: dict[str, Settings] = {
    "gspo": {"rl.loss_agg_mode": "seq-mean-token-mean", "rl.clip_low": 3e-4, "rl.clip_high": 4e-4},
    "cispo": {"rl.clip_low": 1.0, "rl.clip_high": 4.0},
}
"""Clipping (and aggregation) from each loss's paper."""
RECIPES: dict[str, Settings] = {
    "dr_grpo": {"rl.loss_agg_mode": "seq-mean-token-sum-norm", "rl.scale_rewards": "none"},
    "dapo": {"rl.num_minibatches": 16, "rl.clip_high": 0.28, "rl.dynamic_sampling": True,
             "rl.mask_truncated_completions": True},
    "actor_free": {"rl.algorithm": "etpo", **SUITED["etpo"], "rl.actor_free": True},
}  # fmt: skip
"""Combinations of settings that are neither an algorithm nor a loss by themselves."""
COMMON: Settings = {"preset": "tiny", "cluster.learner_ranks": 1, "rl.eval_every": 0}


def candidates() -> dict[str, Settings]:
    """Settings by row: all registered algorithms and losses, and all recipes, for any kind of task."""
    found = {name: {"rl.algorithm": name, **SUITED.get(name, {})} for name in registry.names("algorithm")}
    found |= {f"loss {name}": {"rl.loss": name, **PASSES, **LOSSES.get(name, {})} for name in registry.names("loss")}
    return found | RECIPES


def rows(job: str = "rl_math", common: Mapping[str, Any] = COMMON) -> dict[str, Settings]:
    """The candidates that the job's task can use."""
    return {name: settings for name, settings in candidates().items() if not why_not(name, job, common)}


def why_not(name: str, job: str = "rl_math", common: Mapping[str, Any] = COMMON) -> list[str]:
    """Reasons why a candidate's settings are refused; empty if they are not."""
    changes = {**common, **candidates()[name]}
    return refused(override(preset_of(job, changes), changes))


def figures_of(starts: Sequence[float], ends: Sequence[float], more: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: accuracies before and after, as means over seeds with intervals."""
    gains = [100 * (end - start) for start, end in zip(starts, ends, strict=True)]
    return {
        **over_seeds("start", starts),
        **over_seeds("end", ends),
        **over_seeds("gain_points", gains),
        "ends": list(ends),
        **more,
    }


def later_half(values: Sequence[float]) -> float:
    """The median of the second half, which excludes start-up costs."""
    return float(np.median(values[len(values) // 2 :]))


def times_of(runs: Sequence[KeptRun]) -> dict[str, float]:
    """Columns of a row: seconds of a step and of its update, as medians over runs."""
    return {
        f"{name}_seconds": float(np.median([later_half(series(run.where, f"time/{name}")) for run in runs]))
        for name in ("step", "learn")
    }


def main() -> None:
    known = rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept; reuse it to continue")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(known), choices=list(known), metavar="ROW",
                        help=f"of the table: {', '.join(known)}")  # fmt: skip
    parser.add_argument("--steps", type=int, default=40, help="learner steps per run")
    parser.add_argument("--parallel", type=int, default=1, help="concurrent runs; each uses about one core")
    args = parser.parse_args()
    folder = args.folder.resolve()
    starts = [KeptRun(folder / f"start-{seed}", "pretrain", {"preset": "tiny", "seed": seed}) for seed in args.seeds]
    pairs = [(name, start) for start in starts for name in args.rows]
    runs = [
        KeptRun(folder / f"{name.replace(' ', '-')}-{start.settings['seed']}", "rl_math",
                {**COMMON, **known[name], "rl.max_steps": args.steps, "seed": start.settings["seed"],
                 "model.path": str(start.output / "model")})
        for name, start in pairs
    ]  # fmt: skip
    run_kept(starts, parallel=1)  # each has two learner ranks
    run_kept(runs, args.parallel)
    figures: dict[str, Any] = {}
    for name in args.rows:
        own = [run for run, (row, _) in zip(runs, pairs, strict=True) if row == name]
        found = [run.summary() for run in own]
        figures[name] = figures_of(
            [one["bc_accuracy"] for one in found],
            [one["rl_accuracy"] for one in found],
            {"kl": float(np.mean([one["kl_last"] for one in found])),
             "step_seconds": float(np.median([later_half(series(run.where, "time/step")) for run in own]))},
        )  # fmt: skip
    about = f"Greedy held-out accuracy on arithmetic before and after {args.steps} steps; intervals are over seeds."
    record("algorithms", figures, args.seeds, about)


if __name__ == "__main__":
    main()
