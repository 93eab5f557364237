"""Latent pre-training of SmolLM2-135M by tokens seen: loss, tokens in reach of the actions, diversity of their texts.

    python benchmarks/pretraining_curve.py --folder outputs/curve --gsm8k DATA/gsm8k --minutes 180 [--threads 2]

    run, stopped at 2^k x 64 steps ──> FOLDER/points/STEP (a model) ──> diversity ──> FOLDER/points/STEP.json
     ^           │
     └─ resumed ─┘       until the minutes are over; another call with the same folder continues

One run of the stage ``actions`` with a constant learning rate, so that no point depends on the run's planned length,
on states of the base that are computed once. A step is 4 rows of 256 tokens. Losses and reach are means over the steps
since the previous point; the base's loss is that on the same rows. Needs the packages of `make evals`.
"""

import argparse
import itertools
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cached_run import run_once
from pictures import picture
from record import RESULTS, ROOT, record

from cola_ray.runs import event_log

FIRST = 64  # steps of the first point; each next one has twice as many
TOKENS = 4 * 256  # per step
NAMES = {"actions/loss": "loss", "actions/base_loss": "base's loss", "actions/reachable_tokens": "tokens in reach",
         "actions/covered": "covered", "actions/alive": "alive actions"}  # fmt: skip
WAYS = {"random_actions": "random actions", "base": "base", "random_tokens": "random tokens"}
ENDS = {"": "", "_low": ", low", "_high": ", high"}
BASE = ["--preset", "smollm2-135m", "--task.name", "gsm8k"]
SAMPLE = ["--diversity.prefixes", "24", "--diversity.continuations", "6", "--rollout.max-new-tokens", "32"]


def train_until(step: int, run: Path, gsm8k: Path, threads: int, deadline: float) -> bool:
    """Run until ``step`` and stop there; returns whether the step was reached before the deadline."""
    settings = [*BASE, "--data.path", str(gsm8k / "train.jsonl"), "--pretrain.stages", "actions",
                "--pretrain.steps.actions", "1000000", "--pretrain.min-lr-ratio", "1", "--pretrain.states", "bfloat16",
                "--pretrain.save-every", "64", "--cluster.learner-ranks", "1",
                "--cluster.threads-per-process", str(threads), "--output-dir", str(run)]  # fmt: skip
    if run.exists():
        settings.append("--resume")
    with (run.parent / "log.txt").open("a") as log:
        job = subprocess.Popen([sys.executable, str(ROOT / "jobs" / "pretrain.py"), *settings], stdout=log, stderr=log)
    try:
        while job.poll() is None and reached(run) < step and time.monotonic() < deadline:
            time.sleep(2)
    finally:
        job.send_signal(signal.SIGTERM)  # not SIGINT, which a shell's background jobs ignore
    if job.wait() not in (0, 130):
        raise SystemExit(f"the run failed; see {run.parent / 'log.txt'}")
    return reached(run) >= step


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """Metrics of the run's steps so far."""
    return event_log.history(event_log.read(run))


def reached(run: Path) -> int:
    return max(metrics(run), default=0)


def keep(run: Path, points: Path) -> None:
    """Copy the stopped run's model to a folder named after its last step."""
    target = points / f"{reached(run):07d}"
    shutil.copytree(run / "model", target.with_suffix(".tmp"), dirs_exist_ok=True)
    target.with_suffix(".tmp").rename(target)


def measure(point: Path, run: Path, since: int, gsm8k: Path) -> dict[str, float]:
    """A point's row of the table; computed once."""
    file, step = point.with_suffix(".json"), int(point.name)
    if not file.exists():
        some = [one for number, one in metrics(run).items() if since < number <= step]
        row = {"tokens": float(step * TOKENS)} | {
            name: statistics.fmean(one[metric] for one in some if metric in one) for metric, name in NAMES.items()
        }
        found = run_once(point.parent / f"{point.name}-diversity", "diversity", *BASE, "--model.path", str(point),
                         "--data.path", str(gsm8k / "test.jsonl"), *SAMPLE)  # fmt: skip
        for way, name in WAYS.items():
            row |= {f"diversity of {name}{end}": found[way]["diversity" + of] for of, end in ENDS.items()}
        file.write_text(json.dumps(row))
    return dict(json.loads(file.read_text()))


def rows(folder: Path, gsm8k: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    points = sorted(path for path in (folder / "points").glob("[0-9]*") if path.is_dir() and path.name.isdigit())
    for before, point in itertools.pairwise([Path("0"), *points]):
        yield f"step {int(point.name)}", measure(point, folder / "run", int(before.name), gsm8k)


def extend(folder: Path, gsm8k: Path, threads: int, minutes: float) -> None:
    """Train from point to point until the minutes are over, which may make one more point between two."""
    deadline = time.monotonic() + 60 * minutes
    for step in (FIRST << doubling for doubling in itertools.count()):
        if reached(folder / "run") >= step:
            continue
        came = train_until(step, folder / "run", gsm8k, threads, deadline)
        keep(folder / "run", folder / "points")
        for name, row in rows(folder, gsm8k):
            print(name, row, flush=True)
        if not came:
            return


def plot(points: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot losses, tokens in reach, and diversity with its intervals over tokens seen."""
    tokens = [point["tokens"] for point in points]
    drawn = {
        "loss": ["loss", "base's loss"],
        "tokens in reach of a state's actions": ["tokens in reach"],
        "diversity": [f"diversity of {way}" for way in WAYS.values()],
    }
    with picture(path, len(drawn), (13, 4)) as panels:
        for axes, (title, names) in zip(panels, drawn.items(), strict=True):
            for name in names:
                values = [point[name] for point in points]
                (line,) = axes.plot(tokens, values, marker="o", markersize=4, label=name.removeprefix("diversity of "))
                if f"{name}, low" in points[0]:
                    low, high = ([point[f"{name}, {end}"] for point in points] for end in ("low", "high"))
                    axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.2)
            axes.set(xscale="log", xlabel="tokens seen", title=title)
            axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=180.0, help="training time of this call; 0: only the table")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the run is ended first
    folder, gsm8k = args.folder.absolute(), args.gsm8k.absolute()
    (folder / "points").mkdir(parents=True, exist_ok=True)
    if args.minutes:
        extend(folder, gsm8k, args.threads, args.minutes)
    made = dict(rows(folder, gsm8k))
    plot([*made.values()], RESULTS / "pretraining_curve.png")
    record("pretraining_curve", made, [0], "SmolLM2-135M with 64 actions, by tokens of GSM8K")


if __name__ == "__main__":
    main()
