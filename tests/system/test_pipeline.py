"""The whole pipeline as a user runs it, cut short: real Ray, vLLM, DeepSpeed ZeRO-3 and MLflow."""

import json
import signal

import pytest
import torch
from runs import SHORT_PRETRAINING, Run
from transformers import LlamaForCausalLM

from cola_ray import CoLAForCausalLM

pytestmark = pytest.mark.timeout(1200)
RL = ["--rl.prompts-per-step", "8", "--rl.group-size", "8", "--rl.eval-problems", "64", "--rl.eval-every", "0",
      "--rl.save-every", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = Run("rl_math", tmp_path_factory.mktemp("run"), *SHORT_PRETRAINING, *RL, "--rl.max-steps", "3")
    run.finish()
    return run


def summary_of(run):
    return json.loads((run.output / "summary.json").read_text())


def test_summary_plot_and_metrics(finished):
    summary = summary_of(finished)
    assert {"base_accuracy", "bc_accuracy", "rl_accuracy", "wall_seconds", "alive_actions"} <= summary.keys()
    assert summary["steps"] == 3
    assert summary["deepspeed_stage"] == 3
    assert summary["vllm_version"].startswith("0.")
    assert "8 prompts x 8 completions = 64 sequences; 2 ranks" in finished.log
    assert (finished.output / "reward.png").stat().st_size > 5000
    assert list(finished.series("reward/mean")) == [1, 2, 3]
    assert finished.series("actions/reachable_tokens"), "pre-training logs its own metrics"


def test_engine_and_learner_agree_in_the_run(finished):
    assert max(finished.series("policy/rollout_mismatch_max").values()) < 1e-4
    assert set(finished.series("staleness/mean").values()) == {0.0}


def test_rl_changed_the_policy_and_nothing_else(finished):
    start = CoLAForCausalLM.from_pretrained(finished.start).state_dict()
    end = CoLAForCausalLM.from_pretrained(finished.output / "model").state_dict()
    for name, tensor in start.items():
        assert torch.equal(end[name], tensor) != name.startswith("policy."), name


def test_resume_goes_on_in_the_same_run(finished):
    before = summary_of(finished)
    Run("rl_math", finished.where, *SHORT_PRETRAINING, *RL, "--rl.max-steps", "5", "--resume").finish()
    after = summary_of(finished)
    assert after["steps"] == 5
    assert after["mlflow_run_id"] == before["mlflow_run_id"]
    assert after["bc_accuracy"] == before["bc_accuracy"]
    assert list(finished.series("reward/mean")) == [1, 2, 3, 4, 5]


def test_again_without_consent_is_refused_in_one_line(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")}
    again = Run("rl_math", finished.where, *SHORT_PRETRAINING, *RL, "--rl.max-steps", "5")
    said = again.finish(code=2, timeout=60).splitlines()[-1]
    assert said == (
        f"output_dir = {str(finished.output)!r}: holds a finished run of rl_math, at step 5; use --resume to go on "
        "with it, --overwrite to remove it and begin anew, or another --output-dir"
    )
    assert {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")} == before


def test_a_stopped_run_leaves_model_summary_and_plot(finished):
    """Ctrl-C: all that a run leaves, of where it is."""
    run = Run("rl_math", finished.where / "stopped", *RL, "--rl.max-steps", "500", "--model.path", str(finished.start))
    run.wait_for_step("reward/mean", 2)
    run.process.send_signal(signal.SIGINT)
    shown = run.finish(code=130, timeout=120)
    assert f"starts from  {finished.start}" in shown.splitlines()[0]
    assert f"writes to    {run.output}" in shown
    summary, record = summary_of(run), json.loads((run.output / "run.json").read_text())
    reached = max(run.series("reward/mean"))
    assert (summary["state"], record["state"]) == ("stopped", "stopped")
    assert summary["steps"] == summary["step"] == record["step"] == reached < 500
    assert (run.output / "reward.png").stat().st_size > 5000
    start, end = (CoLAForCausalLM.from_pretrained(path).state_dict() for path in (finished.start, run.output / "model"))
    assert any(not torch.equal(end[name], tensor) for name, tensor in start.items() if name.startswith("policy."))
    made = json.loads((run.output / "model" / "provenance.json").read_text())
    assert (made["made_by"], made["start"]["settings"]["pretrain.steps.base"]) == ("rl_math", 120)


def test_the_same_run_over_tokens(finished):
    """The plain base of the same model, in vLLM's own Llama; all of it trains."""
    model = str(finished.start)
    run = Run("rl_math", finished.where / "tokens", *RL, "--rl.max-steps", "2", "--rl.action-space", "token",
              "--model.path", model)  # fmt: skip
    run.finish()
    summary = summary_of(run)
    assert summary["base_accuracy"] == summary["bc_accuracy"] == summary_of(finished)["base_accuracy"]
    assert max(run.series("policy/rollout_mismatch_max").values()) < 1e-4
    start = LlamaForCausalLM.from_pretrained(run.output / "base").state_dict()
    end = LlamaForCausalLM.from_pretrained(run.output / "model").state_dict()
    assert start.keys() == end.keys()
    for name, tensor in start.items():
        assert not torch.equal(end[name], tensor), name


@pytest.mark.slow
def test_etpo_without_an_actor_leaves_a_model_with_a_q(finished):
    model = str(finished.start)
    run = Run("rl_math", finished.where / "soft", *RL, "--rl.max-steps", "2", "--rl.algorithm", "etpo",
              "--rl.actor-free", "--rl.kl-coef", "0.05", "--model.path", model)  # fmt: skip
    run.finish()
    assert list(run.series("replay/rows").values()) == [64, 128]
    assert run.series("policy/kl")[1] == pytest.approx(0, abs=1e-6), "before the first step rho acts"
    start, end = (CoLAForCausalLM.from_pretrained(path) for path in (model, run.output / "model"))
    assert end.config.soft_q_beta == 0.05
    for name, tensor in start.state_dict().items():
        assert torch.equal(end.state_dict()[name], tensor), name
    assert end.policy.soft_q.layers[-1].weight.abs().max() > 0


def test_an_evaluation_and_its_refusal_to_mix(finished):
    args = ["--model.path", str(finished.output / "model"), "--eval.problems", "16", "--eval.chunk", "8",
            "--eval.ks", "1", "4"]  # fmt: skip
    run = Run("evaluate", finished.where, *args, "--search.simulations", "4", "--eval.ways", "greedy", "sample", "mcts")
    run.finish()
    found = summary_of(run)
    assert 0 <= found["sample"]["pass_at_1"] <= found["sample"]["pass_at_4"] == found["sample"]["best"] <= 1
    assert found["mcts"]["generated_tokens"] > found["greedy"]["generated_tokens"]
    assert (run.output / "accuracy.png").stat().st_size > 5000
    refused = Run("evaluate", finished.where, *args, "--search.simulations", "8", "--resume")
    assert "has another search; give another --output-dir" in refused.finish(code=2)
