"""Half an hour of RL with the tiny preset, with a random rollout worker killed every two minutes.

python benchmarks/soak.py --minutes 30

Asserts that every prompt is trained on exactly once. Records the resident memory of each kind of process after a tenth
of the time and at the end, to detect growth.
"""

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import ROOT, record

NAMES = ("ray::RolloutWorker", "ray::RayTrainWorker", "ray::Controller", "jobs/rl_math.py", "gcs_server", "raylet")


def processes(root: int) -> dict[str, list[tuple[int, float]]]:
    """(pid, resident MB) of all descendants of ``root``, by kind of process."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,rss,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in found.splitlines()[1:]]
    below = {root}
    while more := {int(pid) for pid, parent, *_ in rows if int(parent) in below} - below:
        below |= more
    kinds: dict[str, list[tuple[int, float]]] = {name: [] for name in NAMES}
    for pid, _, rss, args in rows:
        for name in NAMES:
            if int(pid) in below and name in args.split(" --")[0]:
                kinds[name].append((int(pid), int(rss) / 1024))
    return kinds


def megabytes(root: int) -> dict[str, float]:
    """Resident MB of the largest process of each kind."""
    return {name: round(max((size for _, size in found), default=0.0), 1) for name, found in processes(root).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model", default="", help="CoLA checkpoint to start from; empty: pre-train one first")
    args = parser.parse_args()
    draw, kills = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        job = [sys.executable, str(ROOT / "jobs" / "rl_math.py"), "--preset", "tiny", "--output-dir", "outputs/soak",
               "--rl.max-steps", "100000", "--rollout.num-workers", "2", "--rl.max-staleness", "1",
               "--rl.eval-every", "100"]  # fmt: skip
        job += ["--model.path", str(Path(args.model).resolve())] if args.model else []
        process = subprocess.Popen(job, cwd=folder)
        database = Path(folder) / "outputs" / "mlflow.db"

        def series(key: str) -> dict[int, float]:
            with sqlite3.connect(database, timeout=60) as connection:
                query = "select step, value from metrics where key = ? order by step, timestamp"
                return dict(connection.execute(query, (key,)).fetchall())

        while not database.exists() or not series("reward/mean"):
            assert process.poll() is None, "the run ended before its first step"
            time.sleep(1)
        started, early = time.monotonic(), None
        while time.monotonic() - started < 60 * args.minutes:
            time.sleep(min(120.0, 60 * args.minutes / 10))
            assert process.poll() is None, "the run ended by itself"
            early = early or megabytes(process.pid)
            workers = [pid for pid, _ in processes(process.pid)["ray::RolloutWorker"]]
            if workers:
                os.kill(draw.choice(workers), signal.SIGKILL)
                kills += 1
        late = megabytes(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait(300)
        steps = sorted(series("reward/mean"))
        assert steps == list(range(1, len(steps) + 1)), "a step is missing"
        positions = series("rollout/last_position")
        settings = json.loads((Path(folder) / "outputs/soak/config.json").read_text())["rl"]
        wanted = {step: step * settings["prompts_per_step"] - 1 for step in steps}
        figures = {
            "minutes": args.minutes,
            "steps": len(steps),
            "workers_killed": kills,
            "worker_losses_seen": max(series("rollout/worker_losses").values()),
            "groups_generated_again": max(series("rollout/regenerated_groups").values()),
            "every_prompt_once": positions == wanted,
            "megabytes_early": early,
            "megabytes_late": late,
            "exit_code": process.returncode,
        }
    record("soak", figures, [0], "Two engines, staleness 1; memory is the largest process of each kind.")
    assert figures["every_prompt_once"]


if __name__ == "__main__":
    main()
