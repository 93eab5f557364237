"""RL on a real language model that already earns rewards: SmolLM2-135M on short instructions that a rule can check.

python benchmarks/language.py --folder outputs/language [--rows latent token] [--seeds 0 1 2] [--parallel 2]

    base ─> answers to held-out instructions ─> base rates by kind of instruction
    base ─> its own answers to training instructions ─> pre-training of latent actions and policy: the start
    start ─> rl over latent actions, rl over tokens, one run each per seed ─> accuracy before and after, KL, seconds

Latent actions are learnt from the base's own answers, so pre-training adds no right answers that the base would not
give. All seeds start from one pre-trained model; only RL differs between them. Runs over tokens start from the base
itself. All rows have the same instructions, rewards and algorithm; ROWS has what differs: the number of steps, the KL
coefficient, what trains, and the learning rate. Without a penalty, runs over tokens keep no reference, and their KL is
not known. Accuracy is that of greedy answers to held-out instructions; intervals are Student's t over seeds.

Runs in the folder are not repeated: a stopped benchmark continues.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from algorithms import figures_of, times_of
from cached_run import KeptRun, run_kept, series
from pictures import picture
from record import RESULTS, record

from cola_ray.algorithms.search import pass_at_k
from cola_ray.tasks import make_task

Settings = dict[str, Any]
TASK: Settings = {"preset": "smollm2-135m", "task.name": "instructions"}
SAMPLES = 8
"""Answers sampled for each instruction to measure base rates."""
PRETRAINING: Settings = {"cluster.learner_ranks": 1, "pretrain.states": "model"}
RL: Settings = {"cluster.learner_ranks": 1, "rl.eval_every": 0, "rl.kl_coef": 0.0}
TOKEN: Settings = {"rl.action_space": "token", "rl.lr": 1e-5}
ROWS: dict[str, Settings] = {
    "latent": {},
    "token": TOKEN,
    "latent_100_steps": {"rl.max_steps": 100},  # in the time of 40 steps over tokens
    "latent_kl": {"rl.kl_coef": 0.01},
    "token_kl": {**TOKEN, "rl.kl_coef": 0.01},
    "lora": {"rl.action_space": "token", "rl.lora_rank": 16, "rl.lr": 1e-4},
    "steering_all": {"rl.action_space": "token", "rl.steering": "all", "rl.lr": 1e-2},
}
"""Settings by row; over latent actions the learning rate is the preset's, and no rate was tuned."""
WINDOW = 5
"""Steps over which curves are averaged."""


def asked(folder: Path, name: str, problems: int, **settings: Any) -> KeptRun:
    """A run in which the bare base answers the task's instructions."""
    return KeptRun(folder / name, "evaluate", {
        **TASK, "rl.action_space": "token", "eval.problems": problems, "eval.chunk": 64, **settings
    })  # fmt: skip


def rows_of(run: KeptRun, way: str) -> Iterator[dict[str, Any]]:
    for file in sorted((run.output / "predictions" / way).glob("*.parquet")):
        yield from pq.read_table(file).to_pylist()


def base_rates(run: KeptRun) -> dict[str, dict[str, float]]:
    """By kind: the shares of right samples, of instructions with a right one among SAMPLES, of right greedy answers."""
    problems = make_task(run.config.task, run.config.seed).problems("heldout")
    kinds = list(dict.fromkeys(problem.source for problem in problems))
    rates: dict[str, dict[str, float]] = {}
    sampled, greedy = list(rows_of(run, "sample")), list(rows_of(run, "base"))
    for kind in [*kinds, "all"]:
        own = [row for row in sampled if kind in (problems[row["index"]].source, "all")]
        right = [sum(reward >= 1 for reward in row["rewards"]) for row in own]
        first = [row["rewards"][0] >= 1 for row in greedy if kind in (problems[row["index"]].source, "all")]
        rates[kind] = {
            "instructions": len(own),
            "sample": float(np.mean([pass_at_k(SAMPLES, one, 1) for one in right])),
            f"any_of_{SAMPLES}": float(np.mean([one > 0 for one in right])),
            "greedy": float(np.mean(first)),
        }
    return rates


def starts_from_base(row: str) -> bool:
    """Whether the row's runs are over tokens, and so start from the base itself."""
    return ROWS[row].get("rl.action_space") == "token"


def row_of(runs: Sequence[KeptRun], row: str) -> dict[str, Any]:
    """A row of the table from its runs, one per seed."""
    found = [run.summary() for run in runs]
    before = "base_accuracy" if starts_from_base(row) else "bc_accuracy"
    return figures_of(
        [one[before] for one in found],
        [one["rl_accuracy"] for one in found],
        {"base": float(np.mean([one["base_accuracy"] for one in found])),
         "kl": float(np.mean([one["kl_last"] for one in found])) if "kl_last" in found[0] else None,
         **times_of(runs)},
    )  # fmt: skip


def plot(runs: Mapping[str, Sequence[KeptRun]], path: Path) -> None:
    """Mean reward of sampled answers by number of answers and by seconds of steps, smoothed; a line per seed."""
    with picture(path, 2) as (by_answers, by_seconds):
        for number, (row, own) in enumerate(runs.items()):
            for run in own:
                reward = np.convolve(series(run.where, "reward/mean"), np.full(WINDOW, 1 / WINDOW), "valid")
                seconds = np.cumsum(series(run.where, "time/step"))[WINDOW - 1 :]
                rl = run.config.rl
                answers = rl.prompts_per_step * rl.group_size * np.arange(WINDOW, WINDOW + len(reward))
                label = {"color": f"C{number}", "label": row if run is own[0] else None}
                by_answers.plot(answers, reward, **label)
                by_seconds.plot(seconds, reward, **label)
        by_answers.set(xlabel="sampled answers", ylabel=f"mean reward, {WINDOW} steps")
        by_seconds.set(xlabel="seconds of steps")
        by_answers.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept; reuse it to continue")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="learner steps per run, unless its row says otherwise")
    parser.add_argument("--answers", type=int, default=3000, help="training instructions that the base answers, twice")
    parser.add_argument("--heldout", type=int, default=192, help="held-out instructions for base rates")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="ROW",
                        help=f"of the table: {', '.join(ROWS)}; none for base rates alone")  # fmt: skip
    parser.add_argument("--parallel", type=int, default=1, help="concurrent runs of RL; each uses about one core")
    args = parser.parse_args()
    folder = args.folder.resolve()
    rates = asked(folder, "rates", args.heldout, **{"eval.ways": ("base", "sample"), "search.simulations": SAMPLES})
    run_kept([rates], parallel=1)
    about = f"SmolLM2-135M-Instruct at temperature 1, {SAMPLES} samples each of {args.heldout} held-out instructions."
    record("language_base_rates", base_rates(rates), [0], about)
    if not args.rows:
        return
    answers = asked(folder, "answers", args.answers, **{
        "eval.split": "train", "eval.ways": ("sample",), "search.simulations": 2
    })  # fmt: skip
    data = str(answers.output / "answers.jsonl")
    start = KeptRun(folder / "start", "pretrain", {**TASK, **PRETRAINING, "data.path": data})
    if not all(map(starts_from_base, args.rows)):
        run_kept([answers], parallel=1)
        run_kept([start], parallel=1)
    runs = {
        row: [KeptRun(folder / f"{row}-{seed}", "rl_math", {
            **TASK, **RL, "rl.max_steps": args.steps, **ROWS[row], "seed": seed,
            **({} if starts_from_base(row) else {"model.path": str(start.output / "model")}),
        }) for seed in args.seeds]
        for row in args.rows
    }  # fmt: skip
    run_kept([run for seed in zip(*runs.values(), strict=True) for run in seed], args.parallel)
    plot(runs, RESULTS / "language.png")
    about = f"Greedy accuracy on held-out instructions before and after {args.steps} steps; intervals are over seeds."
    record("language", {row: row_of(own, row) for row, own in runs.items()}, args.seeds, about)


if __name__ == "__main__":
    main()
