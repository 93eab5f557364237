"""Studies as a user runs them, one or two minutes each: search with a learnt Q, diversity, atlas, kept capabilities."""

import json

import pytest
from runs import Run

from cola_ray.studies.reproduce import write_choices

pytestmark = pytest.mark.slow


def run_study(job, model, where, *args):
    run = Run(job, where, "--model.path", model, *args)
    run.finish()
    return run, json.loads((run.output / "summary.json").read_text())


def test_search_with_a_q_from_logged_answers(model, tmp_path):
    few = ["--eval.problems", "64", "--search.simulations", "4"]
    log, _ = run_study("evaluate", model, tmp_path / "log", *few, "--eval.split", "train", "--eval.ways", "sample")
    predictions = str(log.output / "predictions" / "sample")
    short = ["--pretrain.steps.q", "40", "--pretrain.save-every", "20"]
    learnt, summary = run_study("train_q", model, tmp_path / "q", "--data.path", predictions, *short)
    assert learnt.series("q/loss")[40] < learnt.series("q/loss")[10]
    assert -1 <= summary["q_heldout_correlation"] <= 1
    q = str(learnt.output / "model")
    _, found = run_study("evaluate", model, tmp_path / "found", *few, "--eval.ways", "mcts", "mcts_q", "--q.path", q)
    assert found["mcts_q"]["problems"] == found["mcts"]["problems"] == 64
    assert found["mcts_q"]["best"] >= found["mcts_q"]["accuracy"]


def test_diversity_orders_random_tokens_above_the_policy(model, tmp_path):
    pytest.importorskip("sentence_transformers", reason="make evals installs it")
    _, found = run_study("diversity", model, tmp_path, "--diversity.prefixes", "8", "--diversity.continuations", "4")
    assert found["random_tokens"]["distinct_1"] > found["policy"]["distinct_1"]
    assert 0 < found["base"]["similarity"] <= 1


def test_the_atlas_is_a_page_with_every_action(model, tmp_path):
    run, summary = run_study("atlas", model, tmp_path, "--diversity.prefixes", "16")
    page = (run.output / "atlas.html").read_text()
    assert page.count("<tr><td>") == 16
    assert "data:image/png;base64," in page
    assert 1 <= summary["alive"] <= 16


def test_both_models_are_scored_by_the_harness(model, tmp_path):
    pytest.importorskip("lm_eval", reason="make evals installs it")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_choices(tasks, "sums", [(f"{a} + {b} =", [str(a + b), "99"]) for a in range(4) for b in range(4)])
    _, found = run_study("capabilities", model, tmp_path / "run", "--harness.include-path", str(tasks),
                         "--harness.tasks", "sums")  # fmt: skip
    assert found["base"]["sums acc"] > 0.5 < found["marginal"]["sums acc"]
