"""The examples of docs/extending.md, end to end: files outside the project, with real engines, ranks and processes."""

import re
from pathlib import Path

import pytest
from runs import ROOT, SHORT_PRETRAINING, SHORT_RL, Run

EXAMPLES = dict(re.findall(r"```python file=(\w+\.py)\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL))
RL = ["--task.name", "doubling.py:Doubling", "--task.reward", "close.py:close", "--rl.algorithm", "max_rl.py:MAX_RL",
      "--rl.loss", "sapo.py:sapo", "--rl.updates-per-batch", "2", *SHORT_PRETRAINING, *SHORT_RL,
      "--rl.eval-problems", "2", "--rl.max-steps", "2"]  # fmt: skip
AGENT = ["--task.name", "countdown_game.py:Countdown", "--rl.algorithm", "grpo", "--rl.advantage", "median.py:median",
         *SHORT_PRETRAINING, *SHORT_RL, "--rl.eval-problems", "8", "--rl.max-steps", "2"]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def write_examples(folder: Path) -> None:
    for name, text in EXAMPLES.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize(("job", "words"), [("rl_math", RL), ("rl_agent", AGENT)])
def test_files_outside_the_project_are_run(job, words, tmp_path):
    write_examples(tmp_path)
    run = Run(job, tmp_path, *words)
    run.finish()
    rewards = run.series("reward/mean")
    assert list(rewards) == [1, 2]
    assert all(0.0 <= reward <= 6.0 for reward in rewards.values())
    assert run.summary["steps"] == 2
    if job == "rl_math":
        assert run.series("reward/failed")[2] == 0
