"""Tests that take minutes (`make test-slow`): learning curves, a rank killed in pre-training, RL from preferences."""

import itertools
import json
import math
import subprocess
import sys
import time

import pytest
import torch
from runs import ROOT, SHORT_PRETRAINING, Run
from safetensors.torch import load_file

from cola_ray.settings.config import TaskConfig
from cola_ray.tasks import make_task

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
    while not list((broken.where / "outputs").glob("*/checkpoints/step-*[0-9]")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.5)
    broken.kill_actor("ray::RayTrainWorker")
    broken.finish()
    expected, found = losses(whole), losses(broken)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-6), step


def test_every_stage_runs_under_zero3_with_codes_revived(tmp_path):
    """Base, actions, policy, and both kinds of fine-tuning under actions; each stage opens the previous one's model."""
    stages = ["base", "actions", "policy", "fta_idm", "fta_policy"]
    run = Run("pretrain", tmp_path, "--pretrain.stages", *stages, "--pretrain.max-steps", "30",
              "--pretrain.revive-every", "10", "--pretrain.balance-coef", "0")  # fmt: skip
    run.finish()
    model = run.output
    assert json.loads((model / "summary.json").read_text())["stages"] == stages
    for index, stage in enumerate(stages):
        found = run.series(f"{stage}/loss")
        assert max(found) == 30 * (index + 1), stage
        assert (model / "stages" / stage / "done.json").exists()
    assert run.series("actions/revived"), "codes were looked after"
    tensors = {stage: load_file(model / "stages" / stage / "model.safetensors") for stage in stages[1:]}
    for before, after, moves in (("actions", "policy", False), ("policy", "fta_idm", True)):
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(tensors[before][name], tensors[after][name]) != moves, "the base trains in fta alone"


def test_a_reward_model_teaches_a_policy_what_it_prefers(tmp_path):
    """The smaller of two numbers is preferred: a reward model is trained on such pairs and is RL's only reward."""
    problems = make_task(TaskConfig(num_problems=5000), 0)
    rows = [
        {"prompt": p.question, "chosen": str(int(p.solution) - shift), "rejected": str(int(p.solution) + shift)}
        for split in ("train", "heldout")
        for p, shift in zip(problems.problems(split), itertools.cycle((1, 2, 3)), strict=False)
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)))
    start = Run("pretrain", tmp_path / "start", *SHORT_PRETRAINING)
    start.finish()
    model = str(start.output / "model")
    judge = Run("reward_model", tmp_path / "judge", "--task.path", str(pairs), "--model.path", model,
                "--pretrain.base-lr", "1e-3", "--pretrain.batch-size", "64", "--pretrain.micro-batch-size", "32",
                "--pretrain.max-steps", "150")  # fmt: skip
    judge.finish()
    assert judge.series("reward/accuracy")[150] > 0.9
    assert judge.series("reward/loss")[1] == pytest.approx(math.log(2), abs=0.3)
    run = Run("rl_preference", tmp_path / "rl", "--task.path", str(pairs), "--model.path", model,
              "--task.reward-model", str(judge.output / "model"), "--rl.max-steps", "15", "--rl.eval-every", "0",
              "--rl.eval-problems", "128")  # fmt: skip
    run.finish()
    rewards = run.series("eval/reward")
    assert rewards[15] > rewards[0] + 0.5
