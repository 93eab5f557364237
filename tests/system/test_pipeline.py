"""The whole pipeline as a user runs it, cut short: real Ray, vLLM, DeepSpeed ZeRO-3 and MLflow."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cola_ray import CoLAForCausalLM

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1200)
# A base trained just long enough to be right now and then, so that RL has something to learn from.
PRETRAIN = ["--pretrain.steps.base", "120", "--pretrain.steps.actions", "40", "--pretrain.steps.policy", "40"]
RL = ["--rl.prompts-per-step", "8", "--rl.group-size", "8", "--rl.eval-problems", "64", "--rl.eval-every", "0",
      "--rl.save-every", "2"]  # fmt: skip


def run_job(job: str, where: Path, *args: str) -> str:
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--preset", "tiny", *PRETRAIN, *RL, *args]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, timeout=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    where = tmp_path_factory.mktemp("run")
    shown = run_job("rl_math", where, "--rl.max-steps", "3")
    return where, shown


def output(where: Path) -> Path:
    return where / "outputs" / "rl_math-tiny-seed0"


def points(where: Path, key: str) -> list[tuple[int, float]]:
    query = "select step, value from metrics where key = ? order by step"
    with sqlite3.connect(where / "outputs" / "mlflow.db") as database:
        return database.execute(query, (key,)).fetchall()


def test_summary_plot_and_metrics(finished):
    where, shown = finished
    summary = json.loads((output(where) / "summary.json").read_text())
    assert {"base_accuracy", "bc_accuracy", "rl_accuracy", "wall_seconds", "alive_actions"} <= summary.keys()
    assert summary["steps"] == 3
    assert summary["deepspeed_stage"] == 3
    assert summary["vllm_version"].startswith("0.")
    assert "8 prompts x 8 completions = 64 sequences; 2 ranks" in shown
    assert (output(where) / "reward.png").stat().st_size > 5000
    assert [step for step, _ in points(where, "reward/mean")] == [1, 2, 3]
    assert [step for step, _ in points(where, "actions/reachable_tokens")], "pre-training logs its own metrics"


def test_engine_and_learner_agree_in_the_run(finished):
    where, _ = finished
    assert max(value for _, value in points(where, "policy/rollout_mismatch_max")) < 1e-4
    assert {value for _, value in points(where, "staleness/mean")} == {0.0}


def test_rl_changed_the_policy_and_nothing_else(finished):
    where, _ = finished
    start = CoLAForCausalLM.from_pretrained(where / "outputs" / "pretrain-tiny-seed0" / "model").state_dict()
    end = CoLAForCausalLM.from_pretrained(output(where) / "model").state_dict()
    for name, tensor in start.items():
        assert torch.equal(end[name], tensor) != name.startswith("policy."), name


def test_resume_goes_on_in_the_same_run(finished):
    where, _ = finished
    before = json.loads((output(where) / "summary.json").read_text())
    run_job("rl_math", where, "--rl.max-steps", "5", "--resume")
    after = json.loads((output(where) / "summary.json").read_text())
    assert after["steps"] == 5
    assert after["mlflow_run_id"] == before["mlflow_run_id"]
    assert after["bc_accuracy"] == before["bc_accuracy"]
    assert [step for step, _ in points(where, "reward/mean")] == [1, 2, 3, 4, 5]
