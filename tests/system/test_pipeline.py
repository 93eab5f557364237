"""The whole pipeline as a user runs it, cut short: real Ray, vLLM, DeepSpeed ZeRO-3 and MLflow."""

import json
import re
import signal

import pytest
import torch
from runs import SHORT_PRETRAINING, SHORT_RL, Run
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from cola_ray import CoLAForCausalLM
from cola_ray.runs import samples
from cola_ray.training.export import main

pytestmark = pytest.mark.timeout(1200)


def test_summary_plot_and_metrics(finished):
    summary = finished.summary
    assert {"base_accuracy", "bc_accuracy", "rl_accuracy", "wall_seconds", "alive_actions"} <= summary.keys()
    assert summary["steps"] == 5
    assert summary["deepspeed_stage"] == 3
    assert summary["vllm_version"].startswith("0.")
    assert "8 prompts x 8 completions = 64 sequences; 2 ranks" in finished.log
    assert (finished.output / "reward.png").stat().st_size > 5000
    assert list(finished.series("reward/mean")) == [1, 2, 3, 4, 5]
    assert finished.series("actions/reachable_tokens"), "pre-training logs its own metrics"


def test_engine_and_learner_agree_in_the_run(finished):
    assert max(finished.series("policy/rollout_mismatch_max").values()) < 1e-4
    assert set(finished.series("staleness/mean").values()) == {0.0}


def test_rl_changed_the_policy_and_nothing_else(finished):
    start = CoLAForCausalLM.from_pretrained(finished.start).state_dict()
    end = CoLAForCausalLM.from_pretrained(finished.output / "model").state_dict()
    for name, tensor in start.items():
        assert torch.equal(end[name], tensor) != name.startswith("policy."), name


def test_killed_and_resumed_equals_straight_bit_for_bit(finished, model, tmp_path):
    run = Run("rl_math", tmp_path, "--model.path", model, *SHORT_RL)
    run.wait_for_step("reward/mean", 2)
    run.process.send_signal(signal.SIGSTOP)  # the other processes go on, but their messages are not read
    run.wait_for((run.output / "checkpoints" / "step-00000004").exists)
    run.process.kill()
    run.process.wait()
    before = run.series("eval/accuracy")
    resumed = Run("rl_math", tmp_path, "--model.path", model, *SHORT_RL, "--resume")
    resumed.finish()
    for key in ("policy/entropy", "policy/kl", "reward/mean", "rollout/response_length"):
        assert resumed.series(key) == finished.series(key), key
    assert resumed.series("eval/accuracy")[0] == before[0], "one history, one run"
    kept = [{file.name: samples.read(file) for file in samples.files(r.output)} for r in (resumed, finished)]
    assert [*kept[0]] == [
        f"0000000{name}.parquet" for name in ("0-base", "0-eval", "1-train", "2-train", "4-train", "5-eval", "5-train")
    ]
    assert kept[0] == kept[1], "no sample is lost, and none is there twice"
    assert all(len(row["tokens"]) == len(row["actions"] or row["tokens"]) for rows in kept[0].values() for row in rows)
    one, other = (load_file(r.output / "model" / "model.safetensors") for r in (resumed, finished))
    for name, tensor in one.items():
        assert tensor.equal(other[name]), name


def test_an_exported_checkpoint_is_what_the_run_left(finished, tmp_path):
    """Two ranks, whose slices are put together without a process group."""
    assert main([str(finished.output), "--step", "5", "--to", str(tmp_path / "last")]) == 0
    assert main([str(finished.output), "--step", "4", "--to", str(tmp_path / "before")]) == 0
    left, last, before = (
        load_file(folder / "model.safetensors")
        for folder in (finished.output / "model", tmp_path / "last", tmp_path / "before")
    )
    assert left.keys() == last.keys()
    assert all(last[name].equal(tensor) for name, tensor in left.items())
    assert {name for name, tensor in left.items() if not before[name].equal(tensor)} <= {
        name for name in left if name.startswith("policy.")
    }
    assert not all(before[name].equal(tensor) for name, tensor in left.items())


def test_again_without_consent_is_refused_in_one_line(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")}
    again = Run("rl_math", finished.where, *SHORT_PRETRAINING, *SHORT_RL)
    said = again.finish(code=2, timeout=60).splitlines()[-1]
    assert said == (
        f"output_dir = {str(finished.output)!r}: holds a finished run of rl_math, at step 5; use --resume to "
        "continue it, --overwrite to remove it and begin again, or another --output-dir"
    )
    assert {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")} == before


@pytest.mark.slow
def test_a_stopped_run_leaves_model_summary_and_plot(finished):
    """Ctrl-C: the run leaves everything as of its current step."""
    start = ["--model.path", str(finished.start)]
    run = Run("rl_math", finished.where / "stopped", *start, *SHORT_RL, "--rl.max-steps", "500")
    run.wait_for_step("reward/mean", 2)
    run.process.send_signal(signal.SIGINT)
    shown = run.finish(code=130, timeout=120)
    assert f"starts from  {finished.start}" in shown.splitlines()[0]
    assert f"writes to    {run.output}" in shown
    summary, record = run.summary, json.loads((run.output / "run.json").read_text())
    reached = max(run.series("reward/mean"))
    assert (summary["state"], record["state"]) == ("stopped", "stopped")
    assert summary["steps"] == summary["step"] == record["step"] == reached < 500
    assert (run.output / "reward.png").stat().st_size > 5000
    start, end = (CoLAForCausalLM.from_pretrained(path).state_dict() for path in (finished.start, run.output / "model"))
    assert any(not torch.equal(end[name], tensor) for name, tensor in start.items() if name.startswith("policy."))
    made = json.loads((run.output / "model" / "provenance.json").read_text())
    assert (made["made_by"], made["start"]["settings"]["pretrain.steps.base"]) == ("rl_math", 120)


@pytest.mark.slow
def test_staleness_is_used_bounded_and_said(model, tmp_path):
    run = Run("rl_math", tmp_path, "--model.path", model, *SHORT_RL, "--rl.max-staleness", "1", "--rl.update-mode",
              "continue", "--rl.max-steps", "4")  # fmt: skip
    shown = run.finish()
    assert "rollouts up to 1 version(s) behind" in shown
    assert max(run.series("staleness/max").values()) == 1
    assert max(run.series("policy/importance_capped").values()) < 0.2


def test_a_plain_log_tells_every_phase(finished):
    """Each long phase is announced before it starts and ends with its duration."""
    assert "nothing to resume" not in finished.log, "nobody asked for that"
    begun = [
        line.split(maxsplit=1)[1].removesuffix(" ...") for line in finished.log.splitlines() if line[-4:] == " ..."
    ]
    for phase in ("importing", "starting Ray", "opening trackers", "pretrain: starting 2 learner ranks",
                  "pretrain: base: reading the corpus", "pretrain: actions: opening the model",
                  "pretrain: policy: saving the model", "starting 1 engine", "evaluating the bare base",
                  "saving checkpoint and model", "stopping Ray"):  # fmt: skip
        (first, *_) = [one for one in begun if one.startswith(phase)]
        assert re.search(rf"^\d+:\d\d  {re.escape(first)}: [\d.]+ (s|min)", finished.log, re.MULTILINE), first


@pytest.mark.slow
def test_a_sweep_in_short(model, tmp_path):
    sweep = ["--sweep.values", "0.0", "0.1", "--sweep.seeds", "0"]
    run = Run("sweep_kl", tmp_path, "--model.path", model, *SHORT_RL, *sweep, "--rl.max-steps", "2")
    run.finish()
    folder = tmp_path / "outputs" / "sweep-tiny-seed0"
    found = json.loads((folder / "summary.json").read_text())
    assert [(row["value"], row["seed"], row["steps"]) for row in found["runs"]] == [(0.0, 0, 2), (0.1, 0, 2)]
    assert set(found["values"]) == {"0.0", "0.1"}
    assert (folder / "frontier.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("steering", ["off", "all"])
def test_the_same_run_over_tokens(finished, model, steering):
    """The plain base of the same model, in vLLM's own Llama; all of it is trained, or one vector per layer."""
    run = Run("rl_math", finished.where / f"tokens-{steering}", *SHORT_RL, "--rl.max-steps", "2",
              "--rl.action-space", "token", "--rl.steering", steering, "--model.path", model)  # fmt: skip
    run.finish()
    summary = run.summary
    assert summary["base_accuracy"] == summary["bc_accuracy"] == finished.summary["base_accuracy"]
    assert max(run.series("policy/rollout_mismatch_max").values()) < 1e-4
    begun = run.output / ("base" if steering == "off" else "steered")
    start = LlamaForCausalLM.from_pretrained(begun).state_dict()
    end = LlamaForCausalLM.from_pretrained(run.output / "model").state_dict()
    assert start.keys() == end.keys()
    for name, tensor in start.items():
        trains = steering == "off" or name.endswith("down_proj.bias")
        assert torch.equal(end[name], tensor) != trains, name


@pytest.mark.slow
def test_etpo_without_an_actor_leaves_a_model_with_a_q(finished, model):
    run = Run("rl_math", finished.where / "soft", *SHORT_RL, "--rl.max-steps", "2", "--rl.algorithm", "etpo",
              "--rl.actor-free", "--rl.kl-coef", "0.05", "--model.path", model)  # fmt: skip
    run.finish()
    assert list(run.series("replay/rows").values()) == [64, 128]
    assert run.series("policy/kl")[1] == pytest.approx(0, abs=1e-6), "before the first step rho acts"
    start, end = (CoLAForCausalLM.from_pretrained(path) for path in (model, run.output / "model"))
    assert end.config.soft_q_beta == 0.05
    for name, tensor in start.state_dict().items():
        assert torch.equal(end.state_dict()[name], tensor), name
    assert end.policy.soft_q.layers[-1].weight.abs().max() > 0


@pytest.mark.slow
def test_tbrm_starts_from_the_rewards_and_moves_the_policy_alone(finished, model):
    """With rollouts of an older version and repeated updates, which TBRM uses without correction."""
    run = Run("rl_math", finished.where / "tbrm", *SHORT_RL, "--rl.max-steps", "3", "--rl.algorithm", "tbrm",
              "--rl.kl-coef", "0.05", "--rl.updates-per-batch", "2", "--rl.max-staleness", "1",
              "--model.path", model)  # fmt: skip
    run.finish()
    mean, deviation = (run.series(f"reward/{name}")[1] for name in ("mean", "std"))
    assert mean > 0
    assert run.series("tbrm/value")[1] == pytest.approx(0, abs=1e-5), "the policy is the reference"
    assert run.series("tbrm/residual")[1] == pytest.approx(-mean, abs=1e-4)
    assert run.series("policy/loss")[1] == pytest.approx(mean**2 + deviation**2, abs=1e-4)
    assert abs(run.series("tbrm/value")[3]) > 1e-5
    assert max(run.series("staleness/max").values()) == 1
    start, end = (CoLAForCausalLM.from_pretrained(path).state_dict() for path in (model, run.output / "model"))
    for name, tensor in start.items():
        assert torch.equal(end[name], tensor) != name.startswith("policy."), name


def test_an_evaluation_and_its_refusal_to_mix(finished):
    args = ["--model.path", str(finished.output / "model"), "--eval.problems", "16", "--eval.chunk", "8",
            "--eval.ks", "1", "4"]  # fmt: skip
    run = Run("evaluate", finished.where, *args, "--search.simulations", "4", "--eval.ways", "greedy", "sample", "mcts")
    run.finish()
    found = run.summary
    assert 0 <= found["sample"]["pass_at_1"] <= found["sample"]["pass_at_4"] == found["sample"]["best"] <= 1
    assert found["mcts"]["generated_tokens"] > found["greedy"]["generated_tokens"]
    assert (run.output / "accuracy.png").stat().st_size > 5000
    refused = Run("evaluate", finished.where, *args, "--search.simulations", "8", "--resume")
    assert "search.simulations = 8: the run began with 4; " in refused.finish(code=2)
