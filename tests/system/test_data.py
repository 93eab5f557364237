"""The rows and rewards of docs/data.md in a whole run, from a folder outside the project."""

import re

import pytest
from runs import ROOT, SHORT_PRETRAINING, SHORT_RL, Run

FILES = dict(re.findall(r"```\w+ file=([\w.]+)\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL))
WORDS = ["--task.name", "dataset", "--task.path", "questions.jsonl", "--task.more-paths", "completions.jsonl",
         "--task.weights", "3", "1", "--task.reward", "exact", "near.py:near", "length", "--task.reward-weights", "1",
         "0.5", "0.1", "--task.right-from", "1", "--task.length", "8", "--rollout.max-prompt-tokens", "64",
         *SHORT_PRETRAINING, *SHORT_RL, "--rl.max-steps", "2"]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_rows_of_ones_own_are_trained_on_with_rewards_of_ones_own(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    run = Run("rl_math", tmp_path, *WORDS)
    log = run.finish()
    assert "data     " in log
    assert "read     prompt from question, solution from answer" in log
    assert log.count("as the model gets it") == 3
    assert "reward   exact + 0.5 near + 0.1 length; right from 1" in log
    series = {name: run.series(f"reward/{name}") for name in ("mean", "exact", "near", "length", "failed")}
    for step in (1, 2):
        parts = series["exact"][step] + 0.5 * series["near"][step] + 0.1 * series["length"][step]
        assert series["mean"][step] == pytest.approx(parts)
        assert series["failed"][step] == 0
    assert {*run.series("reward/mean/questions")} == {*run.series("rollout/share/questions")} == {1, 2}
    assert 0.0 <= run.summary["rl_accuracy"] <= 1.0
