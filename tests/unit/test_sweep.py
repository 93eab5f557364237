"""Sweeps: the grid, the settings of one run, what is made of the results. Whole sweeps are in tests/system."""

import json
import pickle
from types import SimpleNamespace

import pytest

from cola_ray.cluster import actors
from cola_ray.settings.config import ConfigError, override
from cola_ray.settings.presets import preset, trial
from cola_ray.studies import sweep


@pytest.fixture
def config(tmp_path):
    return override(preset("tiny"), {"output_dir": str(tmp_path)})


def test_the_default_grid(config):
    runs = sweep.grid(config)
    assert len(runs) == 8
    assert runs[0] == {"value": 0.0, "seed": 0}
    assert runs[-1] == {"value": 0.1, "seed": 1}


def test_each_run_has_its_folder_and_goes_on_where_it_was(config, tmp_path):
    one = trial(config, 0.01, 1)
    assert (one.rl.kl_coef, one.seed, one.resume) == (0.01, 1, True)
    assert one.output_dir == str(tmp_path / "runs" / "rl.kl_coef=0.01-seed1")


def test_any_dotted_field(config):
    swept = override(config, {"sweep.field": "pretrain.adam_betas", "sweep.values": ["0.9,0.95", "0.8,0.9"]})
    assert trial(swept, "0.8,0.9", 0).pretrain.adam_betas == (0.8, 0.9)
    swept = override(config, {"sweep.field": "rl.algorithm", "sweep.values": ["grpo", "rloo"]})
    assert trial(swept, "rloo", 0).rl.algorithm == "rloo"


def test_a_value_that_cannot_run_is_refused_before_anything_starts(config):
    with pytest.raises(ConfigError, match=r"rl.group_size = 1: grpo compares"):
        sweep.sweep(override(config, {"sweep.field": "rl.group_size", "sweep.values": [8, 1]}))
    with pytest.raises(ConfigError, match=r"sweep.field = 'rl.klcoef': no such field; did you mean rl.kl_coef"):
        sweep.sweep(override(config, {"sweep.field": "rl.klcoef"}))
    with pytest.raises(ConfigError, match=r"sweep.grace_steps = 10: .* at most rl.max_steps = 4"):
        sweep.sweep(override(config, {"sweep.asha": True, "rl.max_steps": 4}))
    with pytest.raises(ConfigError, match=r"sweep.values = \[\]: too few; use one or more"):
        sweep.sweep(override(config, {"sweep.values": []}))


def test_means_over_seeds():
    rows = [
        {"value": 0.1, "seed": 0, "rl_accuracy": 0.5, "kl_last": 0.2},
        {"value": 0.1, "seed": 1, "rl_accuracy": 0.7, "kl_last": 0.4},
        {"value": 0.0, "seed": 0, "rl_accuracy": 0.9},
    ]
    found = sweep.by_value(rows)
    assert found["0.1"]["rl_accuracy"] == pytest.approx(0.6)
    assert (found["0.1"]["rl_accuracy_low"], found["0.1"]["rl_accuracy_high"]) == (0.5, 0.7)
    assert found["0.1"]["kl_last"] == pytest.approx(0.3)
    assert found["0.0"] == {"runs": 1.0, "rl_accuracy": 0.9, "rl_accuracy_low": 0.9, "rl_accuracy_high": 0.9}


def test_runs_that_were_stopped_early_are_told_apart():
    rows = [
        {"value": 0.1, "seed": 0, "steps": 3, "reward_last": 0.1, "stopped_early": True},
        {"value": 0.1, "seed": 1, "steps": 9, "reward_last": 0.3, "rl_accuracy": 0.7},
    ]
    found = sweep.by_value(rows)["0.1"]
    assert (found["runs"], found["stopped_early"], found["rl_accuracy"]) == (2, 1, 0.7)


def test_as_many_runs_as_the_cluster_has_room_for(config, monkeypatch):
    needs = actors.demand(config)["CPU"]
    for free, room in ((needs, 1), (3.5 * needs, 3), (100 * needs, 8)):
        monkeypatch.setattr(sweep.ray, "available_resources", lambda free=free: {"CPU": free})
        assert sweep._max_parallel(config) == room
    assert sweep._max_parallel(override(config, {"sweep.parallel": 2})) == 2
    monkeypatch.setattr(sweep.ray, "available_resources", lambda: {"CPU": needs - 1})
    with pytest.raises(RuntimeError, match=rf"needs {needs:g} CPU, and the cluster has {needs - 1:g} CPU free"):
        sweep._max_parallel(config)


def test_a_run_that_ended_is_told_again_from_its_summary(config, monkeypatch):
    folder = sweep.Path(config.output_dir) / "runs" / "rl.kl_coef=0.0-seed0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"rl_accuracy": 0.5, "reward_last": 0.4, "preset": "tiny"}))
    told = []
    monkeypatch.setattr(sweep.tune, "report", told.append)
    sweep._trial({"value": 0.0, "seed": 0}, config.model_dump())
    assert told == [{"rl_accuracy": 0.5, "reward_last": 0.4, "reward/mean": 0.4, "ended": True}]


def test_progress_is_told_and_stored(capsys):
    progress = sweep._Progress(runs=2, steps=10)
    trial = SimpleNamespace(trial_id="a", config={"value": 0.1, "seed": 0})
    progress.on_trial_result(1, [], trial, {"step": 4, "reward/mean": 0.5})
    progress.on_trial_complete(1, [], trial)
    assert "sweep 4/20  1 of 2 runs ended  0.1 seed 0 ended" in capsys.readouterr().out
    assert pickle.loads(pickle.dumps(progress)).reached == {"a": 4}


def test_demand_counts_what_a_run_books(config):
    assert actors.demand(config) == {"CPU": 3.0, "GPU": 0.0}
    agents = override(preset("tiny", agents=True), {"critic.replicas": 2, "cluster.service_group": "service"})
    assert actors.demand(agents) == {"CPU": 5.0, "GPU": 0.0, "service": 0.002}
    shared = override(agents, {"cluster.use_gpu": True, "critic.gpu_share": 0.25})
    assert actors.demand(shared)["GPU"] == agents.cluster.learner_ranks + agents.rollout.num_workers + 2 * 0.25
    paper = preset("llama-3.1-8b")
    assert actors.demand(override(paper, {"rollout.tensor_parallel_size": 2}))["GPU"] == 4 + 4 * 2
