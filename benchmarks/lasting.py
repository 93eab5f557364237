"""Latent actions that last a fixed time, or until the policy ends them: accuracy, diversity and cost.

python benchmarks/lasting.py --folder outputs/lasting [--seeds 0 1 2] [--parallel 2]
python benchmarks/lasting.py --folder outputs/lasting-135m --setting smollm2 --data ANSWERS --seeds 0

    base ─> latent actions, one pre-training per row ─> rl ─> a row of the table

    row        model
    1, 2, 4    model.action_every
    ends       model.learnt_ends, with pretrain.switch_cost's default
    ends 0.5   the same at a switch_cost of 0.5

"lasts" is the mean number of tokens for which an action goes on, in completions of the first and of the last step; a
fixed length is at most n, also where the next action is the same. "distinct" is the share of distinct completions among
the 8 of a prompt, and "covered" the share of states, or of spans of n tokens, in which a single action gives all
tokens. Base, task, number of steps and learning rates are the same in all rows of a seed. Runs in the folder are
not repeated: a stopped benchmark continues.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from algorithms import figures_of, times_of
from cached_run import KeptRun, run_kept, series
from language import PRETRAINING, RL, TASK
from record import record

Settings = dict[str, Any]
ROWS: dict[str, Settings] = {
    "1": {},
    "2": {"model.action_every": 2},
    "4": {"model.action_every": 4},
    "ends": {"model.learnt_ends": True},
    "ends 0.5": {"model.learnt_ends": True, "pretrain.switch_cost": 0.5},
}


@dataclass(frozen=True)
class Setting:
    """A preset and task whose answers have several tokens.

    Attributes:
        common: settings of all jobs.
        base: of the stage that makes the base; None where the preset has one.
        pretraining: of the stages actions and policy.
        rl: of RL.
    """

    result: str
    common: Settings
    base: Settings | None
    pretraining: Settings
    rl: Settings
    about: str


_SORTING: Settings = {"task.name": "number_sorting"} | {
    f"task.options.{name}": value
    for name, value in {"min_numbers": 4, "max_numbers": 5, "min_decimals": 0, "max_decimals": 0, "min_value": 0,
                        "max_value": 20}.items()
}  # fmt: skip
SETTINGS = {
    "tiny": Setting(
        "lasting", {"preset": "tiny", **_SORTING},
        {"pretrain.stages": ("base",), "pretrain.sequence_length": 192, "pretrain.steps.base": 400},
        {"pretrain.sequence_length": 192},
        {"cluster.learner_ranks": 1, "rl.eval_every": 0, "rl.prompts_per_step": 16, "rollout.max_prompt_tokens": 160,
         "rollout.max_new_tokens": 32},
        "Sorting four or five numbers, tiny: greedy held-out accuracy before and after RL, and how long actions last.",
    ),
    "smollm2": Setting(
        "lasting_135m", TASK, None, {**PRETRAINING, "pretrain.steps.actions": 100, "pretrain.steps.policy": 100},
        RL,
        "Short instructions, SmolLM2-135M: greedy held-out accuracy before and after RL, and how long actions last.",
    ),
}  # fmt: skip


def lengths(actions: Sequence[int], every: int) -> Iterator[int]:
    """For how many tokens each action of a completion lasts.

    Example: 3 3 7 7 7, every 1 -> 2 3; every 2 -> 2 2 1.
    """
    start = 0
    for place in range(1, len(actions) + 1):
        ended = place == len(actions) or (place % every == 0 if every > 1 else actions[place] != actions[start])
        if ended:
            yield place - start
            start = place


def mean_length(run: KeptRun, every: int, last: bool) -> float:
    """Mean number of tokens for which actions last, in the kept completions of the first or last training step."""
    file = sorted((run.output / "samples").glob("*-train.parquet"))[-1 if last else 0]
    rows = pq.read_table(file, columns=["actions"])["actions"].to_pylist()
    return float(np.mean([length for row in rows for length in lengths(row, every)]))


def row_of(starts: Sequence[KeptRun], runs: Sequence[KeptRun], every: int) -> dict[str, Any]:
    """The table's row, from pre-training and RL with each seed."""
    found = [run.summary() for run in runs]

    def mean(of: Sequence[KeptRun], metric: str, places: slice) -> float:
        return float(np.mean([np.mean(series(run.where, metric)[places]) for run in of]))

    return figures_of(
        [one["bc_accuracy"] for one in found],
        [one["rl_accuracy"] for one in found],
        {"covered": mean(starts, "actions/covered", slice(-1, None)),
         "lasts_first": float(np.mean([mean_length(run, every, last=False) for run in runs])),
         "lasts_last": float(np.mean([mean_length(run, every, last=True) for run in runs])),
         "distinct_first": mean(runs, "rollout/distinct", slice(1)),
         "distinct_last": mean(runs, "rollout/distinct", slice(-10, None)),
         **times_of(runs)},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept; reuse it to continue")
    parser.add_argument("--setting", choices=SETTINGS, default="tiny")
    parser.add_argument(
        "--data", default="", help="for smollm2: answers.jsonl of the base, which `cola_ray evaluate` writes"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW",
                        help=f"of the table: {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--steps", type=int, default=40, help="learner steps per run")
    parser.add_argument("--parallel", type=int, default=1, help="concurrent runs; each uses about one core")
    args = parser.parse_args()
    folder, setting = args.folder.resolve(), SETTINGS[args.setting]
    given: Settings = {"data.path": str(Path(args.data).resolve())} if args.data else {}
    bases: dict[int, Settings] = {seed: {} for seed in args.seeds}
    if setting.base is not None:
        made = [KeptRun(folder / f"base-{seed}", "pretrain", {**setting.common, **setting.base, "seed": seed})
                for seed in args.seeds]  # fmt: skip
        run_kept(made, parallel=1)
        bases = {seed: {"model.base": str(run.output / "model")} for seed, run in zip(args.seeds, made, strict=True)}
    starts = {
        row: [KeptRun(folder / f"start-{row.replace(' ', '-')}-{seed}", "pretrain", {
            **setting.common, **given, **setting.pretraining, **bases[seed], **ROWS[row], "seed": seed,
        } | ({"pretrain.stages": ("actions", "policy")} if bases[seed] else {})) for seed in args.seeds]
        for row in args.rows
    }  # fmt: skip
    runs = {
        row: [KeptRun(folder / f"rl-{row.replace(' ', '-')}-{seed}", "rl_math", {
            **setting.common, **setting.rl, "rl.max_steps": args.steps, "seed": seed,
            "model.path": str(start.output / "model"),
        }) for seed, start in zip(args.seeds, starts[row], strict=True)]
        for row in args.rows
    }  # fmt: skip
    run_kept([one for of_row in starts.values() for one in of_row], args.parallel)
    run_kept([one for of_row in runs.values() for one in of_row], args.parallel)
    figures = {row: row_of(starts[row], runs[row], ROWS[row].get("model.action_every", 1)) for row in args.rows}
    record(setting.result, figures, args.seeds, setting.about)


if __name__ == "__main__":
    main()
