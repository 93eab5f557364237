"""Learning rates over a run, against transformers' schedulers, which TRL's settings name."""

from types import SimpleNamespace

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup

from cola_ray.algorithms.schedules import lr_factor
from cola_ray.learner import sums
from cola_ray.learner.rl import RLLearner, learning_rate
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset


def of_transformers(make, warmup, total, **given):
    """Factors of all steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer, num_warmup_steps=warmup, num_training_steps=total, **given), []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 20), (5, 6)])
def test_rates_fall_as_transformers_do(warmup, total):
    """After the warm-up, whose first step is 0 there, and 1 / warmup here."""
    steps = range(total)
    linear = [lr_factor("linear", step, total, warmup, 0.0) for step in steps]
    assert linear[warmup:] == pytest.approx(of_transformers(get_linear_schedule_with_warmup, warmup, total)[warmup:])
    for ratio in (0.0, 0.3):
        cosine = [lr_factor("cosine", step, total, warmup, ratio) for step in steps]
        wanted = of_transformers(get_cosine_with_min_lr_schedule_with_warmup, warmup, total, min_lr_rate=ratio)
        assert cosine[warmup:] == pytest.approx(wanted[warmup:])
    for schedule in ("constant", "linear", "cosine"):
        rising = [lr_factor(schedule, step, total, warmup, 0.1) for step in range(warmup)]
        assert rising == [(step + 1) / warmup for step in range(warmup)]


@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_a_line_is_a_line_that_ends_at_its_ratio(ratio):
    found = [lr_factor("linear", step, 12, 2, ratio) for step in range(2, 15)]
    assert found == pytest.approx([max(1 - (1 - ratio) * i / 10, ratio) for i in range(13)])


def test_a_constant_rate_is_what_it_was_to_the_bit():
    for warmup in (0, 3, 7):
        found = [lr_factor("constant", step, 9, warmup, 0.0) for step in range(20)]
        assert found == [min(1.0, (step + 1) / max(warmup, 1)) for step in range(20)]


def test_the_learners_rate_counts_the_steps_that_train():
    """With an utterance critic, the steps after it has warmed up."""
    falls = {"rl.lr_scheduler_type": "linear", "rl.max_steps": 10, "rl.warmup_steps": 2}
    config = override(preset("tiny"), falls)
    assert [learning_rate(config, 4.0, step) for step in (0, 1, 2, 6, 10)] == [2.0, 4.0, 4.0, 2.0, 0.0]
    agent = override(preset("tiny", agents=True), falls | {
        "task.name": "twenty_questions", "rl.algorithm": "archer", "critic.warmup_iterations": 4,
    })  # fmt: skip
    assert [learning_rate(agent, 4.0, step) for step in (0, 1, 2, 4, 6)] == [2.0, 4.0, 4.0, 2.0, 0.0]


class Zero:
    """What a step asks of the engine beside an update, and a checkpoint's notes."""

    world_size, rank = 1, 0

    def trained_parameters(self):
        return 1

    def optimizer_mb(self):
        return 0.0

    def save(self, folder, notes):
        self.notes = dict(notes)

    def load(self, folder):
        return self.notes


def learner_of(config, zero):
    """A learner without a model, whose update tells the rate that it is given."""
    made, rates = object.__new__(RLLearner), []

    def improve(batch, lr, kl_coef):
        rates.append(lr)
        return {}, 0.0

    made.config, made.zero, made.version, made.trained_steps, made.kl_coef = config, zero, 0, 0, 0.0
    made.update = SimpleNamespace(
        lr=4.0, heads={}, shares_prompts=False, improve=improve, measure=lambda batch, kl_coef: {}
    )
    return made, rates


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_resumed_run_goes_on_at_the_rate_that_it_would_have_had(schedule, monkeypatch, tmp_path):
    """Whichever steps trained: what comes before a step is in its number alone."""
    monkeypatch.setattr(sums, "means", lambda found, _: found)
    config = override(preset("tiny"), {"rl.lr_scheduler_type": schedule, "rl.max_steps": 9, "rl.warmup_steps": 2})
    trains = [True, False, True, True, False, True, True, True]
    batches = [SimpleNamespace(trains=one, num_actions_global=1, num_tokens_global=1, computed_share=lambda _: 1.0)
               for one in trains]  # fmt: skip
    whole, rates = learner_of(config, Zero())
    for batch in batches:
        whole.step(batch)
    assert len(rates) == sum(trains)
    for stop in range(len(batches)):
        before, first = learner_of(config, zero := Zero())
        for batch in batches[:stop]:
            before.step(batch)
        before.save(tmp_path)
        after, then = learner_of(config, zero)
        after.load(tmp_path)
        for batch in batches[stop:]:
            after.step(batch)
        assert first + then == rates
