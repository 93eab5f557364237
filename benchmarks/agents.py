"""Sample efficiency on Twenty Questions: every agent algorithm with equal episodes and the same start, over seeds.

python benchmarks/agents.py --folder outputs/agents [--model MODEL] [--seeds 0 1 2] [--iterations 60] [--parallel 2]

Methods are all registered algorithms that agents can use (including your own, if a package registers them), and

    archer_alone    ArCHer as in the paper; "archer" is the preset, where the critic chooses among utterances
    ppo_turn        PPO over turns (rl.gae_level turn); "ppo" has values and advantages of tokens

Each plays 32 episodes an iteration; methods that compare the episodes of a group play 8 for each of 4 game seeds.
Follows figure 3 of Zhou et al. 2024: how many episodes a method needs until its mean return, which starts at about
-11, passes a threshold, and its final return. The curve of a method is the mean return of its last 256 training
episodes; intervals are Student's t over seeds. Before the first run the script prints how long all runs will take.
Runs that are already in the folder are not repeated, so a stopped benchmark continues; the table contains the
requested methods.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from algorithms import why_not
from cached_run import KeptRun, run_kept, series
from pictures import picture
from record import RESULTS, record
from uncertainty import over_seeds

from cola_ray import registry
from cola_ray.settings.algorithms import of

Settings = dict[str, Any]
THRESHOLDS = (-9, -8, -7, -6)
EPISODES, WINDOW = 32, 256
GROUP = 8
"""Episodes per game seed, for methods that compare them."""
COMMON: Settings = {
    "preset": "tiny", "task.name": "twenty_questions", "cluster.learner_ranks": 1, "rl.eval_every": 0,
    "rl.eval_problems": 8, "rl.save_every": 1000,
}  # fmt: skip
SUITED: dict[str, Settings] = {
    "filtered_bc": {"rl.lr": 3e-4},
    "etpo": {"rl.kl_coef": 0.05},
    # A step moves all actions of an episode alike: with the preset's rates, residuals of long episodes overshoot.
    "tbrm": {"rl.kl_coef": 0.1, "rl.lr": 1e-4},
    "gigpo": {"rl.anchor_state": "transcript"},  # a bare answer does not identify the state
    # Soft values overestimate by about the variance of Q's errors over twice the coefficient: at 0.1 they diverge here.
    "archer_soft": {"rl.kl_coef": 0.5, "rl.target_tau": 0.1, "critic.chooses": False},
}
"""Settings that differ from the preset, by algorithm; the other algorithms have none."""
VARIANTS: dict[str, Settings] = {
    "archer_alone": {"rl.algorithm": "archer", "critic.chooses": False},
    "ppo_turn": {"rl.algorithm": "ppo", "rl.gae_level": "turn"},
}


def methods() -> dict[str, Settings]:
    """Settings by method."""
    names = [name for name in registry.names("algorithm") if not why_not(name, "rl_agent", {**COMMON, **sizes(name)})]
    found = {name: {"rl.algorithm": name, **sizes(name), **SUITED.get(name, {})} for name in names}
    return found | {name: {**sizes(settings["rl.algorithm"]), **settings} for name, settings in VARIANTS.items()}


def sizes(algorithm: str) -> Settings:
    """Game seeds per iteration, and episodes per seed: every algorithm plays the same number of episodes."""
    size = GROUP if of(algorithm).groups else 1
    return {"rl.prompts_per_step": EPISODES // size, "rl.group_size": size}


def smoothed(returns: np.ndarray) -> np.ndarray:
    """Moving average over the last ``WINDOW`` episodes, or over all of them at the start."""
    width = WINDOW // EPISODES
    return np.array([returns[max(0, i + 1 - width) : i + 1].mean() for i in range(len(returns))])


def episodes_to(curve: np.ndarray, threshold: float) -> int | None:
    """Episodes until the curve reaches a threshold, at least ``WINDOW``; None if it never does."""
    reached = np.flatnonzero(curve[WINDOW // EPISODES - 1 :] >= threshold)
    return int((reached[0] + WINDOW // EPISODES) * EPISODES) if len(reached) else None


def figures_of(returns: np.ndarray) -> dict[str, Any]:
    """A method's row of the table.

    Args:
        returns: (seeds, iterations), the mean return of each iteration's episodes.
    """
    curves = np.array([smoothed(one) for one in returns])
    last = curves[:, -1].tolist()
    return {
        "episodes": returns.shape[1] * EPISODES,
        "first": returns[:, 0].tolist(),
        **{f"to {threshold}": [episodes_to(curve, threshold) for curve in curves] for threshold in THRESHOLDS},
        "each_last": last,
        **over_seeds("last", last),
    }


def plot(curves: Mapping[str, np.ndarray], path: Path) -> None:
    with picture(path) as (axes,):
        axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)  # more methods than usual colours
        for method, runs in curves.items():
            episodes = EPISODES * (1 + np.arange(runs.shape[1]))
            (line,) = axes.plot(episodes, runs.mean(0), label=method)
            axes.fill_between(episodes, runs.min(0), runs.max(0), color=line.get_color(), alpha=0.15)
        for threshold in THRESHOLDS:
            axes.axhline(threshold, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel="episodes", ylabel=f"mean return of the last {WINDOW}", title="Twenty Questions, tiny preset")
        axes.legend(fontsize="small", ncols=2)


def main() -> None:
    known = methods()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept; reuse it to continue")
    parser.add_argument("--model", type=Path, help="the cloned start; by default, the script pre-trains one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=60, help=f"iterations of {EPISODES} episodes each")
    parser.add_argument("--parallel", type=int, default=1, help="concurrent runs; each uses about one core")
    parser.add_argument("--methods", nargs="+", default=list(known), choices=list(known), metavar="METHOD",
                        help=f"of the table: {', '.join(known)}")  # fmt: skip
    args = parser.parse_args()
    folder = args.folder.resolve()
    model = args.model
    if model is None:
        start = KeptRun(folder / "start", "pretrain", {"preset": "tiny", "task.name": COMMON["task.name"]})
        run_kept([start], parallel=1)
        model = start.output / "model"
    pairs = [(method, seed) for seed in args.seeds for method in args.methods]
    runs = [
        KeptRun(folder / f"{method}-{seed}", "rl_agent",
                {**COMMON, **known[method], "rl.max_steps": args.iterations, "seed": seed,
                 "model.path": str(model.resolve())})
        for method, seed in pairs
    ]  # fmt: skip
    run_kept(runs, args.parallel)
    returns = {
        method: np.array([series(run.where, "reward/mean") for run, (name, _) in zip(runs, pairs, strict=True)
                          if name == method])
        for method in args.methods
    }  # fmt: skip
    plot(
        {method: np.array([smoothed(one) for one in seeds]) for method, seeds in returns.items()},
        RESULTS / "agents.png",
    )
    about = f"Twenty Questions from one cloned start, {EPISODES} episodes an iteration; curves in agents.png."
    record("agents", {method: figures_of(seeds) for method, seeds in returns.items()}, args.seeds, about)


if __name__ == "__main__":
    main()
