"""Benchmarks that compare runs, such as algorithms.py: what they run, and the figures that they make of it."""

import itertools
import json
import sys

import numpy as np
import pytest
from runs import ROOT

from cola_ray import registry
from cola_ray.algorithms.intervals import share_interval
from cola_ray.settings.algorithms import Algorithm

sys.path.insert(0, str(ROOT / "benchmarks"))
import again
import agents
import algorithms
import cached_run
import claims
import language
import options
import search
import trained_agents
import trained_parts
from cached_run import KeptRun
from uncertainty import over_seeds


@pytest.fixture
def another_algorithm(monkeypatch):
    monkeypatch.setitem(registry._REGISTERED, ("algorithm", "median"), Algorithm(advantage="rloo", groups=True))


def kept(where, job, settings):
    return KeptRun(where, job, {**settings, "model.path": "start", "seed": 1})


# --- what is run ------------------------------------------------------------------------------------------------------


def test_every_algorithm_and_loss_of_the_registry_has_a_row():
    of_problems, of_agents = algorithms.rows(), agents.methods()
    for name in registry.names("algorithm"):
        assert name in of_problems or name in of_agents, name
    assert {f"loss {name}" for name in registry.names("loss")} <= {*of_problems}
    assert {"gspo", "cispo"} <= {settings.get("rl.loss") for settings in of_problems.values()}
    assert not {"archer", "chai", "filtered_bc", "gigpo"} & {*of_problems}, "which need turns"
    assert "remax" not in of_agents, "which needs a greedy completion"


def test_one_that_is_added_has_a_row_without_being_listed(another_algorithm):
    assert algorithms.rows()["median"] == {"rl.algorithm": "median"}
    assert agents.methods()["median"]["rl.group_size"] > 1, "it compares episodes of a group"


def test_no_run_is_refused_and_every_setting_has_an_effect(tmp_path):
    for name, settings in algorithms.rows().items():
        assert not kept(tmp_path, "rl_math", {**algorithms.COMMON, **settings}).faults(), name
    for name, settings in agents.methods().items():
        assert not kept(tmp_path, "rl_agent", {**agents.COMMON, **settings}).faults(), name
    (start,) = trained_parts.starts_of(tmp_path, [1])
    assert not start.faults()
    for part, rate in trained_parts.RATES.items():
        assert not trained_parts.run_of(tmp_path, part, rate, start, 20, 64).faults(), part


def test_no_run_of_other_environments_or_of_the_language_model_is_refused(tmp_path):
    for environment in trained_agents.ENVIRONMENTS:
        start = trained_agents.start_of(tmp_path, "tiny", environment)
        assert not start.faults()
        for method in trained_agents.METHODS:
            run = trained_agents.run_of(tmp_path, environment, method, start, 20, 1)
            assert not run.faults(), (environment, method)
    start = trained_agents.start_of(tmp_path, "smollm2-135m", "tools")
    run = trained_agents.run_of(tmp_path, "tools", "gigpo", start, 15, 1)
    assert not start.faults()
    assert not run.faults()
    assert run.config.rl.prompts_per_step * run.config.rl.group_size == 16, "the preset's own sizes"
    assert not language.asked(tmp_path, "rates", 8, **{"eval.ways": ("base", "sample")}).faults()
    assert not KeptRun(tmp_path, "pretrain", {**language.TASK, **language.PRETRAINING, "data.path": "a.jsonl"}).faults()
    for settings in language.ROWS.values():
        assert not kept(tmp_path, "rl_math", {**language.TASK, **language.RL, **settings}).faults()


def test_methods_of_agents_play_equally_many_episodes(tmp_path):
    for name, settings in agents.methods().items():
        rl = kept(tmp_path, "rl_agent", {**agents.COMMON, **settings}).config.rl
        assert rl.prompts_per_step * rl.group_size == agents.EPISODES, name


def test_rows_of_problems_learn_from_equally_many_completions(tmp_path):
    for name, settings in algorithms.rows().items():
        rl = kept(tmp_path, "rl_math", {**algorithms.COMMON, **settings}).config.rl
        assert rl.prompts_per_step * rl.group_size == 512, name


def test_parts_differ_in_what_trains_alone(tmp_path):
    (start,) = trained_parts.starts_of(tmp_path, [0])
    configs = [trained_parts.run_of(tmp_path, part, 1e-3, start, 20, 64).config for part in trained_parts.PARTS]
    trained = [(one.rl.action_space, one.rl.lora_rank > 0, one.rl.steering) for one in configs]
    assert len({*trained}) == len(trained)
    changes = {"action_space": "latent", "lora_rank": 0, "steering": "off"}
    rest = [one.model_copy(update={"rl": one.rl.model_copy(update=changes), "output_dir": ""}) for one in configs]
    assert all(one == rest[0] for one in rest)


def test_rates_of_parts():
    found = trained_parts.rates(["lora=3e-4"])
    assert found == {**trained_parts.RATES, "lora": 3e-4}
    with pytest.raises(SystemExit, match="no such part; PART=RATE, with one of latent, token, lora"):
        trained_parts.rates(["adapters=1"])
    with pytest.raises(SystemExit, match="'fast' is no number"):
        trained_parts.rates(["lora=fast"])
    assert trained_parts.bytes_of(1000, "bfloat16") == 2000


SCRIPTS = agents, algorithms, language, options, search, trained_agents, trained_parts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda one: one.__name__)
def test_help_teaches(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"python benchmarks/{script.__name__}.py --folder" in said, "how to call it"
    assert "continues" in said, "that it may be stopped"
    assert f"benchmarks/{script.__name__}.py" in (ROOT / "docs" / "benchmarks.md").read_text()


# --- figures ----------------------------------------------------------------------------------------------------------


def test_an_interval_over_seeds_by_hand():
    """Student's t with 2 degrees of freedom: its distribution is 1/2 + t / (2 sqrt(2 + t^2)), and 0.975 gives t."""
    values = [0.7, 0.9, 0.8]
    t = 0.95 * np.sqrt(2 / (1 - 0.95**2))
    half = t * np.sqrt(((np.array(values) - 0.8) ** 2).sum() / 2 / 3)
    found = over_seeds("end", values)
    assert found == {"end": pytest.approx(0.8), "end_low": pytest.approx(0.8 - half),
                     "end_high": pytest.approx(0.8 + half)}  # fmt: skip
    assert over_seeds("end", [0.7]) == {"end": 0.7, "end_low": None, "end_high": None}


def test_a_gain_is_that_of_each_seed():
    """Seeds that start apart and gain alike leave no doubt of the gain."""
    row = algorithms.figures_of([0.4, 0.5, 0.6], [0.6, 0.7, 0.8], {"kl": 0.1})
    assert (row["gain_points"], row["gain_points_low"], row["gain_points_high"]) == pytest.approx((20.0, 20.0, 20.0))
    assert row["end_low"] < 0.7 < row["end_high"]
    assert (row["ends"], row["kl"]) == ([0.6, 0.7, 0.8], 0.1)


def test_episodes_to_a_threshold_by_trying_all():
    draw, width = np.random.default_rng(0), agents.WINDOW // agents.EPISODES
    for _ in range(20):
        returns = draw.normal(size=24).cumsum() - 9
        curve = agents.smoothed(returns)
        assert curve == pytest.approx([returns[max(0, i - width + 1) : i + 1].mean() for i in range(24)])
        for threshold in agents.THRESHOLDS:
            reached = [(i + 1) * agents.EPISODES for i in range(width - 1, 24) if curve[i] >= threshold]
            assert agents.episodes_to(curve, threshold) == (reached[0] if reached else None)


def test_the_row_of_a_method():
    returns = np.array([[-12.0] + [-8.0] * 15, [-10.0] * 16])
    row = agents.figures_of(returns)
    assert row["episodes"] == 16 * agents.EPISODES
    assert row["first"] == [-12.0, -10.0]
    assert row["each_last"] == [-8.0, -10.0]
    assert row["last"] == -9.0
    assert row["to -9"] == [agents.WINDOW, None]
    json.dumps(row, allow_nan=False)


# --- runs that are kept -----------------------------------------------------------------------------------------------


def test_what_has_finished_is_not_run_again_and_the_time_is_said_before(tmp_path, monkeypatch, capsys):
    asked = []

    def run_once(where, job, *words):
        asked.append((where.name, job, words))
        return {"made": where.name}

    monkeypatch.setattr(cached_run, "run_once", run_once)
    runs = [KeptRun(tmp_path / name, "rl_math", {"preset": "tiny", "rl.max_steps": 100}) for name in "abc"]
    runs[0].output.mkdir(parents=True)
    (runs[0].output / "summary.json").write_text('{"state": "finished"}')
    # By the preset's own figures: 35 s to start and 1.4 s a step, so 175 s for each of two runs.
    assert cached_run.say_time(runs, 1).startswith("2 of 3 runs to make, 1 at a time: about 6 minutes")
    assert cached_run.say_time(runs, 2).startswith("2 of 3 runs to make, 2 at a time: about 3 minutes")
    assert cached_run.run_kept(runs, 2) == [{"made": name} for name in "abc"]
    assert sorted(asked)[1] == ("b", "rl_math", ("--preset", "tiny", "--rl.max-steps", "100"))
    assert capsys.readouterr().out.splitlines()[0].startswith("2 of 3 runs")
    other = KeptRun(tmp_path / "d", "rl_math", {"preset": "smollm2-135m"})
    assert "how long they take is seen after the first, about 6 minutes for 2" in cached_run.say_time([*runs, other], 1)
    assert cached_run.say_time(runs[:1], 1) == "all 1 runs have been made"


def test_runs_that_would_be_refused_are_said_before_any_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(cached_run, "run_once", lambda *_: pytest.fail("a run was started"))
    good, bad = ({"preset": "tiny", "rl.algorithm": name} for name in ("grpo", "archer"))
    runs = [KeptRun(tmp_path / "good", "rl_math", good), KeptRun(tmp_path / "bad", "rl_math", bad)]
    with pytest.raises(SystemExit, match=r"bad: rl\.algorithm = 'archer': learns from turns"):
        cached_run.run_kept(runs, 1)


def test_a_run_is_repeated_with_its_settings_and_held_against_its_rows_interval(tmp_path, monkeypatch, capsys):
    made = []
    for seed, accuracy in enumerate([0.80, 0.84, 0.82]):
        run = KeptRun(tmp_path / f"loss-ppo-{seed}", "rl_math", {"preset": "tiny", "rl.lr": 1e-3, "seed": seed})
        run.output.mkdir(parents=True)
        (run.output / "summary.json").write_text(json.dumps({"state": "finished", "rl_accuracy": accuracy}))
        (run.output / "run.json").write_text(json.dumps({"tool": "cola_ray", "job": "rl_math", "wrote": []}))
        (run.output / "config.json").write_text(run.config.model_dump_json())
    (tmp_path / "start-0").mkdir()
    assert list(again.rows_of(tmp_path)) == ["loss-ppo"]
    runs = again.rows_of(tmp_path)["loss-ppo"]
    for accuracy, inside in ((0.85, True), (0.90, False)):  # the interval is 0.82 +- 4.3 * 0.02 / sqrt(3) = 0.05
        monkeypatch.setattr(again, "run_once", lambda *words, a=accuracy: made.append(words) or {"rl_accuracy": a})
        assert again.repeat(tmp_path, "loss-ppo", runs, "2") == inside
    where, job, *words = made[0]
    assert (where, job) == (tmp_path / "again" / "loss-ppo-2", "rl_math")
    asked = " ".join(words)
    assert all(setting in asked for setting in ("--preset tiny", "--rl.lr 0.001", "--seed 2"))
    assert "output" not in asked
    assert "rl_accuracy was 0.82, is 0.9: OUTSIDE [0.7703, 0.8697]" in capsys.readouterr().out


# --- claims -----------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_difference_of_shares_is_newcombes():
    """His table II (a): 56 of 70 against 48 of 80; method 10 gives 0.0524 to 0.3339."""
    shares = {"a": (56, 70), "b": (48, 80)}
    figures = {
        name: dict(zip(("right", "low", "high"), (x / n, *share_interval(x, n)), strict=True))
        for name, (x, n) in shares.items()
    }
    difference, (low, high) = claims.newcombe("a", "b")(figures)
    assert (difference, low, high) == (pytest.approx(20), pytest.approx(5.24, abs=0.01), pytest.approx(33.39, abs=0.01))


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: f"{claim.model}: {claim.says}")
def test_a_claim_is_about_what_its_table_has(claim):
    row = claims.row_of(claim)
    file = claims.RESULTS / f"{claim.table}.json"
    if row["verdict"] == "not measured":
        assert not file.exists() or claim.table == "language", "whose rows are measured one after the other"
        return
    low, high = map(float, row["interval"].split(" to ")) if " to " in row["interval"] else (-np.inf, np.inf)
    assert low <= float(row["found"].split()[0]) <= high
    if row["verdict"] == "holds":
        assert low >= claim.above


def test_a_claim_without_its_table_is_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert {claims.row_of(claim)["verdict"] for claim in claims.CLAIMS} == {"not measured"}


def test_time_left_follows_from_what_was_made():
    assert cached_run._left([60.0, 60.0], 4, 1) == ", about 2 minutes left"
    assert cached_run._left([0.0, 0.0, 120.0], 5, 2) == ", about 2 minutes left", "what was there took no time"
    assert cached_run._left([0.0], 5, 2) == ""
    assert cached_run._minutes(3 * 3600) == "about 3.0 hours"


@pytest.mark.parametrize("parallel", [1, 3])
def test_results_come_in_order(parallel):
    jobs = [lambda number=number: number for number in range(7)]
    assert cached_run.run_all(jobs, parallel) == [*range(7)]
    assert list(itertools.accumulate(cached_run.run_all(jobs, parallel)))[-1] == 21


def test_the_row_of_a_part(tmp_path, monkeypatch):
    """Bytes of the optimizer come from the metric: a summary rounds to 0 what steering vectors need."""
    summary = {"bc_accuracy": 0.4, "rl_accuracy": 0.5, "kl_last": 0.02, "trained_parameters": 128, "optimizer_mb": 0.0}
    metrics = {"memory/optimizer_mb": [0.0, 1536 / 2**20], "time/step": [9.0, 1.0, 2.0], "time/learn": [5.0, 0.5, 0.7]}
    monkeypatch.setattr(KeptRun, "summary", lambda run: summary)
    for module in (trained_parts, algorithms):
        monkeypatch.setattr(module, "series", lambda where, metric: metrics[metric])
    (start,) = trained_parts.starts_of(tmp_path, [0])
    run = trained_parts.run_of(tmp_path, "steering_last", 1e-2, start, 3, 16)
    row = trained_parts.row_of([run], 1e-2)
    assert (row["start"], row["end"], row["gain_points"]) == (0.4, 0.5, pytest.approx(10))
    assert (row["trained_bytes"], row["optimizer_bytes"]) == (128 * 4, 128 * 4 * 3), "float32: a weight, two moments"
    assert (row["step_seconds"], row["learn_seconds"]) == (1.5, 0.6), "of the later half"
