"""Draw a row of a benchmark at random, repeat one of its runs, and see whether the value is the one that was published.

python benchmarks/again.py --folder outputs/algorithms [--draws 3] [--draw-seed 7] [--row grpo]

    FOLDER/ROW-SEED ─> the settings that the run recorded ─> the same job in FOLDER/again/ROW-SEED ─> both values

A row's runs differ only in their seed. The repeated value should lie within the row's interval: Student's t over its
seeds. A job whose rollouts overlap with learning does not repeat bit by bit, since versions depend on timing; with
rl.max_staleness 0 it does. Works in the folder of every benchmark that keeps its runs by seed. Exit status 1 if a value
is outside. A stopped benchmark continues: a run that was repeated is not repeated again.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from cached_run import run_once

from cola_ray.algorithms.intervals import seed_interval
from cola_ray.runs.run_folder import read_record, summary_of
from cola_ray.settings import relevance
from cola_ray.settings.config import Config
from cola_ray.settings.matrix import as_words

MEASURES = ("rl_accuracy", "rl_return", "rl_reward", "reward_last")
"""What a summary may have that a row is about; the first one that it has is compared."""
PLACE = ("output_dir", "resume", "overwrite")


def rows_of(folder: Path) -> dict[str, dict[str, Path]]:
    """Finished runs by row and seed."""
    rows: dict[str, dict[str, Path]] = {}
    for where in sorted(folder.iterdir()):
        row, _, seed = where.name.rpartition("-")
        summary = summary_of(where / "outputs" / "run") if row and seed.isdigit() else None
        if summary is not None and measure_of(summary):
            rows.setdefault(row, {})[seed] = where
    return {row: runs for row, runs in rows.items() if len(runs) > 1}


def measure_of(summary: dict[str, Any]) -> str:
    return next((name for name in MEASURES if name in summary), "")


def settings_of(where: Path) -> tuple[str, list[str]]:
    """A run's job, and its settings as command-line words."""
    output = where / "outputs" / "run"
    job = str((read_record(output) or {})["job"])
    config = Config.model_validate(json.loads((output / "config.json").read_text()))
    config = relevance.only_read(config, job)
    given = {field: value for field, value in relevance.given(config).items() if field not in PLACE}
    return job, as_words({"preset": config.preset, "task.name": config.task.name, **given})


def repeat(folder: Path, row: str, runs: dict[str, Path], seed: str) -> bool:
    """Repeat a run and print both values; returns whether the new one lies within the row's interval."""
    before = {one: summary_of(where / "outputs" / "run") or {} for one, where in runs.items()}
    measure = measure_of(before[seed])
    job, words = settings_of(runs[seed])
    print(f"{row}, seed {seed}: jobs/{job}.py {' '.join(words)}", flush=True)
    found = float(run_once(folder / "again" / f"{row}-{seed}", job, *words)[measure])
    low, high = seed_interval([float(one[measure]) for one in before.values()]) or (found, found)
    inside = low <= found <= high
    said = "within" if inside else "OUTSIDE"
    print(f"    {measure} was {before[seed][measure]:.4g}, is {found:.4g}: {said} [{low:.4g}, {high:.4g}]", flush=True)
    return inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder with the runs of a benchmark")
    parser.add_argument("--draws", type=int, default=1, help="how many runs to repeat")
    parser.add_argument("--draw-seed", type=int, default=None, help="to draw the same rows again")
    parser.add_argument("--row", default="", help="repeat a run of this row instead of a random one")
    args = parser.parse_args()
    folder = args.folder.resolve()
    rows = rows_of(folder)
    if not rows or (args.row and args.row not in rows):
        raise SystemExit(f"{folder}: no {args.row or 'row'} with several seeds; it has {', '.join(rows) or 'none'}")
    draw = random.Random(args.draw_seed)
    drawn = [(row, draw.choice(list(rows[row]))) for row in ([args.row] if args.row else sorted(rows))]
    chosen = draw.sample(drawn, min(args.draws, len(drawn)))
    if not all([repeat(folder, row, rows[row], seed) for row, seed in chosen]):
        sys.exit(1)


if __name__ == "__main__":
    main()
