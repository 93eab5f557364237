"""The comparison with TRL: both trainers get the same settings, and ratios say which is faster."""

import sys

import pytest
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import vs_trl


def a_run(step: float, learn: float, **further) -> dict:
    """Two steps that count after as many as are skipped, twenty times as slow."""
    skipped = 5 * [20 * step]
    return {"step_seconds": [*skipped, step, step], "learn_seconds": [*skipped, learn, learn],
            "rollout_seconds": [*skipped, step - learn, step - learn], "response_length": 7 * [50.0],
            "rewards": 7 * [0.5], "start": 0.25, "accuracy": 0.75} | further  # fmt: skip


def test_ratios_are_of_each_pair_after_the_first_steps():
    runs = {
        "cola_ray_token": [a_run(2.0, 1.0), a_run(4.0, 1.0)],
        "trl": [a_run(3.0, 1.5, version="1"), a_run(3.0, 2.0)],
    }
    figures = vs_trl.figures_of(vs_trl.SETTINGS["tiny"], runs, size=512)
    assert figures["cola_ray_token_samples_per_second_ratio"] == [1.5, 0.75]
    assert figures["cola_ray_token_learn_ratio"] == [1.5, 2.0]
    assert figures["cola_ray_token_samples_per_second"] == [256.0, 128.0]
    assert figures["trl_rollout_seconds"] == [1.5, 1.0]
    assert figures["trl_accuracy"] == [0.75, 0.75]
    assert "start_accuracy" not in vs_trl.figures_of(vs_trl.SETTINGS["smollm2"], runs, size=32)


@pytest.mark.parametrize("name", vs_trl.SETTINGS)
def test_a_step_is_a_whole_number_of_micro_batches(name):
    setting = vs_trl.SETTINGS[name]
    config = vs_trl.config_of(setting, 3, setting.steps, "gsm8k" if name == "smollm2" else "")
    completions = config.rl.prompts_per_step * config.rl.group_size
    assert completions % setting.micro_batch == 0
    assert setting.micro_batch % config.rl.group_size == 0 or config.rl.group_size % setting.micro_batch == 0
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    assert config.rl.micro_batch_tokens <= setting.micro_batch * longest
