"""Minutes each, behind `make test-slow`: the learning curve over three seeds, and a rank killed in pre-training."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def job(name: str, where: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--preset", "tiny", *args]
    return subprocess.Popen(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    shown, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, shown[-3000:]
    return shown


def test_rl_gains_twenty_points_over_the_cloned_policy_on_three_seeds():
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tiny_rl.py"), "0", "1", "2"], check=True, timeout=5000)
    figures = json.loads((ROOT / "docs" / "results" / "tiny_rl.json").read_text())["figures"]
    assert figures["eval_problems"] >= 500
    assert min(figures["gain_points"]) >= 20


def losses(where: Path) -> dict[int, float]:
    with sqlite3.connect(where / "outputs" / "mlflow.db") as database:
        query = "select step, value from metrics where key in ('base/loss', 'actions/loss') order by step, timestamp"
        return dict(database.execute(query).fetchall())


def learner_pids(parent: int) -> list[int]:
    """Ray Train's workers below a process."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    below = {parent}
    for _ in range(6):
        below |= {int(pid) for pid, ppid, _ in rows if int(ppid) in below}
    return [int(pid) for pid, _, args in rows if int(pid) in below and args.startswith("ray::RayTrainWorker")]


def test_a_killed_rank_resumes_on_the_same_loss_curve(tmp_path):
    short = ["--pretrain.steps.base", "60", "--pretrain.steps.actions", "60", "--pretrain.steps.policy", "5",
             "--pretrain.save-every", "20"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    finish(job("pretrain", whole, *short))
    process = job("pretrain", broken, *short)
    deadline = time.monotonic() + 300
    while not list((broken / "outputs").glob("**/checkpoint_*")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.5)
    victims = learner_pids(process.pid)
    assert victims
    os.kill(victims[-1], signal.SIGKILL)
    finish(process)
    expected, found = losses(whole), losses(broken)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-6), step
