"""A sweep as a user runs it: killed half-way and resumed, its table equals that of an undisturbed sweep."""

import json
import sqlite3
import time

import pytest
from runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
SWEEP = ["--sweep.values", "0.0", "0.1", "--sweep.seeds", "0", "1", "--rl.max-steps", "4",
         "--rl.prompts-per-step", "16", "--rl.eval-problems", "64",
         "--rl.eval-every", "0", "--rl.save-every", "1"]  # fmt: skip
OUTPUT = "outputs/sweep-tiny-seed0"


def summary(where):
    return json.loads((where / OUTPUT / "summary.json").read_text())


def test_killed_and_resumed_equals_undisturbed(model, tmp_path):
    start = ["--model.path", model, *SWEEP]
    Run("sweep_kl", tmp_path / "straight", *start).finish()
    straight = summary(tmp_path / "straight")
    assert [(row["value"], row["seed"]) for row in straight["runs"]] == [(0.0, 0), (0.0, 1), (0.1, 0), (0.1, 1)]
    assert set(straight["values"]) == {"0.0", "0.1"}
    assert (tmp_path / "straight" / OUTPUT / "frontier.png").stat().st_size > 5000

    killed = Run("sweep_kl", tmp_path / "killed", *start)
    first = tmp_path / "killed" / OUTPUT / "runs" / "rl.kl_coef=0.0-seed0" / "summary.json"
    deadline = time.monotonic() + 900
    while not first.exists() or json.loads(first.read_text())["state"] != "finished":
        assert killed.process.poll() is None, killed.log
        assert time.monotonic() < deadline
        time.sleep(0.5)
    time.sleep(20)  # the next run is in progress
    killed.end()
    time.sleep(5)
    written = first.stat().st_mtime
    Run("sweep_kl", tmp_path / "killed", *start, "--resume").finish()
    assert summary(tmp_path / "killed")["runs"] == straight["runs"]
    assert first.stat().st_mtime == written, "a run that had ended is not made again"

    with sqlite3.connect(tmp_path / "killed" / "outputs" / "mlflow.db") as database:
        query = "select count(distinct run_uuid), count(distinct value) from tags where key = 'mlflow.parentRunId'"
        assert database.execute(query).fetchone() == (4, 1), "four runs below one"
