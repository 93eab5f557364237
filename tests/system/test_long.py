"""Minutes each, behind `make test-slow`: the learning curve over three seeds, and a rank killed in pre-training."""

import json
import subprocess
import sys
import time

import pytest
from runs import ROOT, Run

pytestmark = pytest.mark.slow


def test_rl_gains_twenty_points_over_the_cloned_policy_on_three_seeds():
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tiny_rl.py"), "0", "1", "2"], check=True, timeout=5000)
    figures = json.loads((ROOT / "docs" / "results" / "tiny_rl.json").read_text())["figures"]
    assert figures["eval_problems"] >= 500
    assert min(figures["gain_points"]) >= 20


def losses(run: Run) -> dict[int, float]:
    return run.series("base/loss") | run.series("actions/loss")


def test_a_killed_rank_resumes_on_the_same_loss_curve(tmp_path):
    short = ["--pretrain.steps.base", "60", "--pretrain.steps.actions", "60", "--pretrain.steps.policy", "5",
             "--pretrain.save-every", "20"]  # fmt: skip
    whole = Run("pretrain", tmp_path / "whole", *short)
    whole.finish()
    broken = Run("pretrain", tmp_path / "broken", *short)
    deadline = time.monotonic() + 300
    while not list((broken.where / "outputs").glob("**/checkpoint_*")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.5)
    broken.kill_actor("ray::RayTrainWorker")
    broken.finish()
    expected, found = losses(whole), losses(broken)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-6), step
