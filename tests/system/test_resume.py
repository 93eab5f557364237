"""Runs that are killed and resumed equal undisturbed ones bit for bit, including replay and critic."""

import pickle
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import Run, kill, metrics

from cola_ray.runs import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STEPS, HALF = 10, 5
BOTH = ["--rl.max-steps", str(STEPS), "--rl.save-every", "2", "--rl.eval-every", "4", "--rl.eval-problems", "16"]
PROBLEMS = [*BOTH, "--rl.prompts-per-step", "8", "--rl.group-size", "4"]
EPISODES = [*BOTH, "--task.name", "twenty_questions", "--rl.prompts-per-step", "8", "--critic.steps", "10",
            "--critic.batch-size", "64", "--critic.fresh-states", "64", "--critic.warmup-iterations", "2",
            "--replay.max-rows", "700"]  # fmt: skip
SHORT = ["--pretrain.steps.base", "60", "--pretrain.steps.actions", "20", "--pretrain.steps.policy", "20",
         "--task.num-problems", "300"]  # fmt: skip
RUNS = {
    "grpo": ("rl_math", PROBLEMS),
    "ppo": ("rl_math", [*PROBLEMS, "--rl.algorithm", "ppo", "--rl.kl-target", "0.02"]),
    "etpo": ("rl_math", [*PROBLEMS, "--rl.algorithm", "etpo", "--rl.kl-coef", "0.05"]),
    "actor_free": ("rl_math", [*PROBLEMS, "--rl.algorithm", "etpo", "--rl.kl-coef", "0.05", "--rl.actor-free"]),
    "archer": ("rl_agent", EPISODES),
    "archer_replayed": ("rl_agent", [*EPISODES, "--critic.actor-states", "replayed", "--critic.td-share", "0",
                                     "--critic.priority-beta", "0.4", "--replay.shards", "2"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def player(tmp_path_factory):
    """The model that agents start from: a short pre-training and one step of RL."""
    run = Run("rl_agent", tmp_path_factory.mktemp("player"), *SHORT, *EPISODES, "--rl.max-steps", "1")
    run.finish()
    return str(run.start)


@pytest.fixture(scope="module")
def start_of(model, request):
    return lambda job: model if job == "rl_math" else request.getfixturevalue("player")


def assert_same(one, other, where="") -> None:
    """Compare tensors, arrays, their containers and all types."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    elif hasattr(one, "__dict__") and not isinstance(one, type):
        assert_same(vars(one), vars(other), where)
    else:
        assert one == other or one is other, where


def services(folder):
    state = pickle.loads((folder / "services.pkl").read_bytes())
    state.pop("unread")  # events with times; compared in the log instead
    for shard in state["shards"]:
        shard["files"] = sorted(shard["files"])  # their bytes contain the version of the writing library
    return state | ({"critic": Path(state["critic"]).name} if state.get("critic") else {})


def assert_same_run(one, other):
    assert metrics(one.output) == metrics(other.output)
    assert sorted(metrics(one.output)) == list(range(STEPS + 1))
    folders = [checkpoints.newest(run.output).checkpoint.folder for run in (one, other)]
    assert [folder.name for folder in folders] == [f"step-{STEPS:08d}"] * 2
    names = [
        sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) for folder in folders
    ]
    assert names[0] == names[1]
    assert "zero/zero_pp_rank_1_mp_rank_00_optim_states.pt" in names[0]
    for name in names[0]:
        if name.endswith(".pt"):
            files = [torch.load(folder / name, weights_only=False, map_location="cpu") for folder in folders]
            assert_same(*files, name)
    states = [services(folder) for folder in folders]
    assert_same(*states, "services")
    assert (one.output / "model" / "model.safetensors").read_bytes() == (
        other.output / "model" / "model.safetensors"
    ).read_bytes()
    # Row files that no checkpoint needs are removed occasionally, depending on time.
    for shard, state in enumerate(states[0]["shards"]):
        for name in state["files"]:
            mine, others = (pq.read_table(run.output / "replay" / str(shard) / name) for run in (one, other))
            assert mine.equals(others), f"{shard}/{name}"


@pytest.mark.parametrize("name", RUNS)
def test_five_steps_a_kill_and_five_more_equal_ten(name, start_of, tmp_path):
    job, settings = RUNS[name]
    start = ["--model.path", start_of(job), *settings]
    straight = Run(job, tmp_path / "straight", *start)
    straight.finish()
    killed = Run(job, tmp_path / "killed", *start)
    try:
        killed.wait_for_step("reward/mean", HALF)
    finally:
        kill(killed)
    reached = checkpoints.newest(killed.output).checkpoint.step
    assert reached in (4, 6, 8)
    resumed = Run(job, tmp_path / "killed", *start, "--resume")
    shown = resumed.finish()
    assert f"resuming from the checkpoint of step {reached}" in shown
    assert_same_run(straight, resumed)


def test_kills_while_checkpoints_are_written(start_of, tmp_path):
    """Killed twice, as soon as a checkpoint is begun; then Ray Train's notes are deleted, the newest checkpoint cut."""
    start = ["--model.path", start_of("rl_math"), *PROBLEMS, "--rl.save-every", "1"]
    straight = Run("rl_math", tmp_path / "straight", *start)
    straight.finish()
    folder = tmp_path / "killed" / "outputs" / "rl_math-tiny-seed0" / "checkpoints"
    for step in (2, 5):
        run = Run("rl_math", tmp_path / "killed", *start, *(["--resume"] if folder.exists() else []))
        deadline = time.monotonic() + 900
        while not (folder / f"step-{step:08d}.tmp").exists():
            assert run.process.poll() is None, run.log
            assert time.monotonic() < deadline
            time.sleep(0.001)
        kill(run)
        assert checkpoints.newest(run.output).checkpoint.step in (step - 1, step)
    for notes in folder.glob("ray-*"):
        subprocess.run(["rm", "-r", str(notes)], check=True)
    newest = checkpoints.newest(run.output).checkpoint
    shard = next(newest.folder.rglob("*pp_rank_1_mp_rank*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    resumed = Run("rl_math", tmp_path / "killed", *start, "--resume")
    shown = resumed.finish()
    assert f"step {newest.step}: zero/{shard.name} has" in shown
    assert f"resuming from the checkpoint of step {newest.step - 1}" in shown
    assert not list(folder.glob("*.tmp"))
    assert_same_run(straight, resumed)


def test_another_task_is_refused_before_anything_starts(start_of, tmp_path):
    start = ["--model.path", start_of("rl_math"), *PROBLEMS, "--rl.max-steps", "2"]
    Run("rl_math", tmp_path, *start).finish()
    began = time.monotonic()
    shown = Run("rl_math", tmp_path, *start, "--resume", "--seed", "0", "--rl.algorithm", "rloo").finish(code=2)
    assert "rl.algorithm = 'rloo': the run began with 'grpo'; use that to continue it" in shown
    assert time.monotonic() - began < 60
