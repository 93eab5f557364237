"""Agents as a user runs them: a short ArCHer run, real from end to end, and its services killed."""

import json
import os
import signal
import sys
import time

import datasets
import pytest
from runs import Run

pytestmark = pytest.mark.timeout(1800)
SHORT = ["--pretrain.steps.base", "60", "--pretrain.steps.actions", "20", "--pretrain.steps.policy", "20",
         "--task.num-problems", "300"]  # fmt: skip
SEEDS = 8
FEW = ["--rl.max-steps", "4", "--rl.prompts-per-step", str(SEEDS), "--rl.eval-problems", "8", "--rl.eval-every", "2"]
RL = [*FEW, "--critic.steps", "10", "--critic.batch-size", "64", "--critic.fresh-states", "64",
      "--critic.warmup-iterations", "2", "--replay.snapshot-every-s", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    run = Run("rl_agent", tmp_path_factory.mktemp("agent"), *SHORT, *RL)
    run.finish()
    return run


def test_an_archer_run_end_to_end(played):
    summary = json.loads((played.output / "summary.json").read_text())
    assert {"base_return", "bc_return", "rl_return"} <= summary.keys()
    assert -20 <= summary["rl_return"] <= 0
    assert list(played.series("reward/mean")) == [1, 2, 3, 4]
    rows = played.series("replay/rows")
    turns = played.series("agent/turns")
    assert rows[4] == pytest.approx(sum(SEEDS * value for value in turns.values()))
    assert max(played.series("policy/rollout_mismatch_max").values()) < 1e-4
    rates = played.series("policy/lr")
    assert rates[1] == rates[2] == 0.0, "while the critic warms up nothing moves the actor"
    assert rates[3] > 0
    assert (played.output / "reward.png").stat().st_size > 5000
    saved = str(played.output / "replay" / "0" / "*.parquet")
    shown = datasets.load_dataset("parquet", data_files=saved, split="train", cache_dir=played.where)
    assert {"state_ids", "reward", "terminated", "next_state"} <= set(shown.column_names)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_services_cost_one_snapshot_interval_and_are_told(played, tmp_path, sent):
    model = played.start
    run = Run("rl_agent", tmp_path, "--model.path", str(model), *RL, "--rl.max-steps", "12",
              "--cluster.answer-timeout-s", "20")  # fmt: skip
    run.wait_for_step("replay/rows", 3)
    time.sleep(2)
    for title in ("ray::ReplayShard", "ray::CriticService"):
        (victim,) = run.actors(title)
        os.kill(victim, sent)
    shown = run.finish()
    assert "replay shard 0 was started again and has the" in shown
    assert "the critic was started again from its last save" in shown
    assert run.series("critic/steps")[12] == 12 * 10, "the fit that was cut short was made again"
    rows, turns = run.series("replay/rows"), run.series("agent/turns")
    everything = sum(SEEDS * value for value in turns.values())
    assert everything - rows[12] < 3 * SEEDS * 20, "at most what an interval brought is lost"
    assert list(run.series("reward/mean")) == list(range(1, 13))


@pytest.mark.slow
def test_an_agent_is_evaluated_on_seeds_that_training_never_uses(played, tmp_path):
    args = ["--task.name", "twenty_questions", "--model.path", str(played.output / "model"), "--eval.problems", "8",
            "--eval.chunk", "4", "--search.simulations", "2"]  # fmt: skip
    run = Run("evaluate", tmp_path, *args)
    run.finish()
    summary = json.loads((run.output / "summary.json").read_text())
    for way in ("base", "greedy", "sample"):
        assert summary[way]["problems"] == 8
        assert -20 <= summary[way]["return"] <= summary[way]["best_return"] <= 0
    rows = datasets.load_dataset("parquet", data_files=str(run.output / "predictions" / "sample" / "*.parquet"),
                                 split="train", cache_dir=tmp_path)  # fmt: skip
    assert [len(row["texts"]) for row in rows] == [2] * 8
    assert all(-total <= turns for row in rows for total, turns in zip(row["returns"], row["turns"], strict=True))
    refused = Run("evaluate", tmp_path / "refused", *args, "--eval.ways", "mcts")
    assert "eval.ways = 'mcts': searches answers of one turn" in refused.finish(code=2)


@pytest.mark.slow
def test_ppo_learns_a_value_and_resumes(played, tmp_path):
    model = played.start
    settings = ["--rl.algorithm", "ppo", "--rl.updates-per-batch", "2", "--rl.save-every", "2"]
    run = Run("rl_agent", tmp_path, "--model.path", str(model), *FEW, *settings, "--rl.max-steps", "2")
    run.finish()
    run = Run("rl_agent", tmp_path, "--model.path", str(model), *FEW, *settings, "--rl.max-steps", "4", "--resume")
    run.finish()
    guessed, returned = run.series("value/mean"), run.series("value/returns")
    assert sorted(guessed) == [1, 2, 3, 4]
    assert all(abs(guessed[step] - returned[step]) < abs(returned[step]) / 2 for step in guessed), "questions cost"
    assert max(run.series("policy/grad_norm").values()) > 0
    assert max(run.series("policy/rollout_mismatch_max").values()) < 1e-4


PLAYER = """
import asyncio
from openai import AsyncOpenAI
from cola_ray.tasks import make_environment
from cola_ray.settings.config import TaskConfig

async def play(client):
    while True:
        episode = await client.post("/episodes", body={}, cast_to=object)
        game, policy = make_environment(TASK), AsyncOpenAI(base_url=episode["base_url"])
        observation, done, messages = game.reset(seed=episode["seed"])[0], False, []
        while not done:
            messages.append({"role": "user", "content": observation})
            answer = await policy.chat.completions.create(model="policy", messages=messages)
            messages.append(answer.choices[0].message)
            observation, reward, terminated, truncated, _ = game.step(messages[-1].content)
            done = terminated or truncated
            await policy.post("/reward", body={"reward": reward, "done": done}, cast_to=object)

async def main():
    client = AsyncOpenAI(timeout=None)
    await asyncio.gather(*(play(client) for _ in range(8)))

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_program_trains_the_policy_that_it_talks_to(played, tmp_path):
    """It plays the same environment as the other run, with the same draws, so its first step is the same."""
    task = json.loads((played.output / "config.json").read_text())["task"]
    (tmp_path / "player.py").write_text(PLAYER.replace("TASK)", f"TaskConfig(**{task!r}))"))
    run = Run("rl_agent", tmp_path, "--model.path", str(played.start), *RL, "--task.name", "program",
              "--task.command", f"{sys.executable} player.py",
              "--rollout.environment-processes", "1")  # fmt: skip
    run.finish()
    assert list(run.series("reward/mean")) == [1, 2, 3, 4]
    for metric in ("reward/mean", "agent/turns", "rollout/response_length"):
        assert run.series(metric)[1] == pytest.approx(played.series(metric)[1]), metric
    assert max(run.series("policy/rollout_mismatch_max").values()) < 1e-4
    assert set(run.series("agent/retokenised").values()) == {0.0}
    assert run.series("policy/grad_norm")[4] > 0


@pytest.mark.slow
def test_archer_soft_learns_from_replay_and_resumes(played, tmp_path):
    """Nothing is generated for the critic, and the learner's last message to it is in the checkpoint."""
    settings = [*RL, "--rl.algorithm", "archer_soft", "--rl.kl-coef", "0.1", "--critic.no-chooses",
                "--rl.save-every", "2", "--critic.warmup-iterations", "1"]  # fmt: skip
    run = Run("rl_agent", tmp_path, "--model.path", str(played.start), *settings, "--rl.max-steps", "2")
    run.finish()
    run = Run("rl_agent", tmp_path, "--model.path", str(played.start), *settings, "--rl.max-steps", "4", "--resume")
    run.finish()
    told, errors = run.series("critic/soft_advantage_std"), run.series("q/error")
    assert told[1] == 0.0, "before the first step there is nothing to tell"
    assert all(told[step] > 0 for step in (2, 3, 4)), "the third step is the first one of the resumed run"
    assert sorted(errors) == [1, 2, 3, 4], "Q learns while the critic warms up, too"
    norms, rates = run.series("policy/grad_norm"), run.series("policy/lr")
    assert norms[1] == rates[1] == 0.0
    assert all(norms[step] > 0 and rates[step] > 0 for step in (2, 3, 4))
    assert run.series("critic/steps")[4] == 4 * 10
    assert not run.series("time/fresh")
    assert not run.series("policy/rollout_mismatch")
