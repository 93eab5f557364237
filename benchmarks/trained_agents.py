"""Agents in environments other than Twenty Questions: returns before and after training, by method, over seeds.

python benchmarks/trained_agents.py --folder outputs/trained-agents [--environments program] [--seeds 0 1 2]
python benchmarks/trained_agents.py --folder outputs/agents-135m --preset smollm2-135m --environments tools

    program      the shop, played by examples/shop_agent.py over OpenAI's protocol
    shop         the same shop as an environment
    household    finding, moving and cleaning things in a house
    tools        questions that need calls of a calculator and of a table

    pretrain, one start per environment ─> rl with each method ─> mean return of held-out episodes before and after

Methods are ArCHer (archer, as in the preset), GiGPO and PPO over turns; each plays 32 episodes an iteration, as in
benchmarks/agents.py. program starts from the model that was pre-trained for shop. For tools the table also has the
share of calls that are well formed, in the first and in the last iteration. Intervals are Student's t over seeds; a
gain is end minus start of the same seed. smollm2-135m has only been tried with --methods gigpo, and plays as many
episodes an iteration as its preset has for the environment. Runs in the folder are not repeated: a stopped benchmark
continues.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import agents
import numpy as np
from algorithms import later_half
from cached_run import KeptRun, run_kept, series
from record import ROOT, record
from uncertainty import over_seeds

Settings = dict[str, Any]
ENVIRONMENTS: dict[str, Settings] = {
    "program": {"task.name": "program", "task.command": f"{sys.executable} {ROOT / 'examples' / 'shop_agent.py'}"},
    "shop": {"task.name": "shop"},
    "household": {"task.name": "household"},
    "tools": {"task.name": "tools"},
}
PRETRAINED = {"program": "shop"}
"""Environments that start from the model pre-trained for another one."""
METHODS = ("archer", "gigpo", "ppo_turn")
COMMON: Settings = {**agents.COMMON, "rl.eval_problems": 64}
TABLES = {"tiny": "trained_agents", "smollm2-135m": "trained_agents_135m"}
"""The table of each preset."""


def start_of(folder: Path, preset: str, environment: str) -> KeptRun:
    name = PRETRAINED.get(environment, environment)
    ranks = {} if preset == "tiny" else {"cluster.learner_ranks": 1}
    return KeptRun(folder / f"start-{name}", "pretrain", {"preset": preset, "task.name": name, **ranks})


def run_of(folder: Path, environment: str, method: str, start: KeptRun, iterations: int, seed: int) -> KeptRun:
    own = {name: value for name, value in agents.methods()[method].items() if name != "rl.anchor_state"}
    preset = start.settings["preset"]
    if preset != "tiny":  # whose sizes are the tiny preset's
        own = {name: value for name, value in own.items() if name not in ("rl.prompts_per_step", "rl.group_size")}
    return KeptRun(folder / f"{environment}-{method}-{seed}", "rl_agent", {
        **COMMON, "preset": preset, **ENVIRONMENTS[environment], **own, "rl.max_steps": iterations, "seed": seed,
        "model.path": str(start.output / "model"),
    })  # fmt: skip


def row_of(runs: Sequence[KeptRun]) -> dict[str, Any]:
    """The table's row for a method in an environment, from its runs, one per seed."""
    found = [run.summary() for run in runs]
    starts, ends = ([one[f"{when}_return"] for one in found] for when in ("bc", "rl"))
    calls = [series(run.where, "agent/well_formed_calls") for run in runs]
    return {
        **over_seeds("start", starts),
        **over_seeds("end", ends),
        **over_seeds("gain", [end - start for start, end in zip(starts, ends, strict=True)]),
        "well_formed_first": float(np.mean([one[0] for one in calls])) if all(calls) else None,
        "well_formed_last": float(np.mean([one[-1] for one in calls])) if all(calls) else None,
        "step_seconds": float(np.median([later_half(series(run.where, "time/step")) for run in runs])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept; reuse it to continue")
    parser.add_argument("--preset", choices=list(TABLES), default="tiny", help="the base and its sizes")
    parser.add_argument("--environments", nargs="+", choices=list(ENVIRONMENTS), default=list(ENVIRONMENTS),
                        metavar="ENVIRONMENT", help=f"of the table: {', '.join(ENVIRONMENTS)}")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help=f"of the table: {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=20, help="iterations per run")
    parser.add_argument("--parallel", type=int, default=1, help="concurrent runs; each uses about one core")
    args = parser.parse_args()
    folder = args.folder.resolve()
    starts = {environment: start_of(folder, args.preset, environment) for environment in args.environments}
    run_kept(list({start.where: start for start in starts.values()}.values()), parallel=1)
    runs = {
        (environment, method): [
            run_of(folder, environment, method, start, args.iterations, seed) for seed in args.seeds
        ]
        for environment, start in starts.items()
        for method in args.methods
    }
    run_kept([run for of_row in runs.values() for run in of_row], args.parallel)
    about = f"{args.preset}: mean return of 64 held-out episodes before and after {args.iterations} iterations."
    figures = {f"{environment} {method}": row_of(of_row) for (environment, method), of_row in runs.items()}
    record(TABLES[args.preset], figures, args.seeds, about)


if __name__ == "__main__":
    main()
