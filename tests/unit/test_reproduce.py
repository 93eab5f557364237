"""The matrix as a graph, and the report, in a browser where there is one."""

import json
import shutil
import subprocess

import pytest
from matplotlib.image import imread

from cola_ray.checks import preflight
from cola_ray.checks.refusals import check
from cola_ray.cli import arguments
from cola_ray.cli.arguments import from_command_line
from cola_ray.cli.commands import OF_JOB
from cola_ray.settings import matrix
from cola_ray.settings.config import ConfigError, override
from cola_ray.settings.matrix import Stage
from cola_ray.settings.presets import preset
from cola_ray.settings.relevance import unread
from cola_ray.studies import reproduce
from cola_ray.studies.report import FIGURES, Claim, row_of, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


@pytest.fixture
def config(tmp_path):
    return override(preset("tiny"), {"output_dir": str(tmp_path)})


class Jobs:
    """In a cluster's place for the graph alone: a stage succeeds unless it is named."""

    def __init__(self, fails=()):
        self.fails, self.submitted = fails, []

    def submit(self, stage, folder):
        self.submitted.append(stage.name)
        (folder / stage.folder).mkdir(parents=True, exist_ok=True)
        if stage.name not in self.fails:
            (folder / stage.folder / "summary.json").write_text('{"wall_seconds": 130.0}')
        return stage.name

    def ended(self, job):
        return job not in self.fails


MATRIX = [
    Stage("a", "pretrain"),
    Stage("b", "rl_math", ["--model.path", "{a}/model"]),
    Stage("c", "evaluate", ["--model.path", "{b}/model", "--q.path", "{a}/q"]),
    Stage("d", "atlas"),
]


def test_what_a_stage_waits_for():
    assert [stage.names for stage in MATRIX] == [[], ["a"], ["b", "a"], []]
    assert MATRIX[2].needs == ["b-seed0", "a-seed0"]


def test_all_run_in_order_of_their_needs(tmp_path):
    jobs = Jobs()
    states = reproduce.run(MATRIX[::-1], tmp_path, jobs, parallel=1)
    assert set(states.values()) == {"done"}
    assert [name for name in jobs.submitted if name != "d"] == ["a", "b", "c"]


def test_a_failed_stage_takes_along_only_those_that_need_it(tmp_path):
    assert reproduce.run(MATRIX, tmp_path, Jobs(fails=["a"]), parallel=2) == {
        "a-seed0": "failed", "b-seed0": "needs a-seed0", "c-seed0": "needs b-seed0", "d-seed0": "done"
    }  # fmt: skip
    again = Jobs()
    assert set(reproduce.run(MATRIX, tmp_path, again, parallel=2).values()) == {"done"}
    assert again.submitted == ["a", "b", "c"], "d was done"


def test_some_stages_bring_what_they_need(config):
    names = [stage.name for stage in matrix.chosen(override(config, {"reproduce.stages": ("q", "atlas")}))]
    assert names == ["pretrain", "rl_latent", "answers", "q", "atlas"]
    assert matrix.chosen(config) == matrix.stages(config)
    with pytest.raises(ConfigError, match=r"reproduce.stages = 'archer': no such stage; did you mean agent_archer"):
        matrix.chosen(override(config, {"reproduce.stages": ("archer",)}))


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m", "llama-3.1-8b"])
def test_every_stage_has_a_job_and_a_command_line_that_it_takes(name, config, tmp_path, monkeypatch):
    changes = {"output_dir": str(tmp_path), "task.path": preset(name).task.path}
    stages = matrix.stages(override(preset(name), changes))
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    monkeypatch.setattr(arguments, "check", lambda config, job: check(config))
    monkeypatch.setattr(preflight, "faults", lambda config, job: [])  # no model is there yet
    for stage in stages:
        assert stage.job in OF_JOB
        assert set(stage.names) <= set(names)
        for name_of_need in stage.names:
            for sub in ("model", "predictions/sample"):
                (tmp_path / name_of_need / sub).mkdir(parents=True, exist_ok=True)
        words = [word.format(**{need: str(tmp_path / need) for need in stage.names}) for word in stage.settings]
        from_command_line(stage.job, ["--preset", name, *words, "--resume"])


@pytest.fixture
def page(config, tmp_path):
    """A report of two stages."""
    (tmp_path / "config.json").write_text(config.model_dump_json())
    for name, accuracy in (("rl_latent", 0.75), ("rl_token", 0.5)):
        folder = tmp_path / "stages" / f"{name}-seed0"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"rl_accuracy": accuracy, "wall_seconds": 90.0}))
        (folder / "log.txt").write_text("")
        (folder / "config.json").write_text(config.model_dump_json())
        lines = [json.dumps({"event": "step", "version": v, "eval/accuracy": accuracy * v / 4}) for v in range(5)]
        (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return write_report(tmp_path)


def test_the_report_names_what_is_missing_and_shows_what_is_there(page, tmp_path):
    text = page.read_text()
    assert "latent 75.0 / token 50.0" in text
    assert text.count("not there yet: ") == len(FIGURES) - 1
    assert text.count("data:image/png;base64,") == 1
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| latent 42.4 / token 38.2 | latent 75.0 / token 50.0 | RL over latent actions ends higher" in text
    assert "**cannot be said with one seed** (+25.0)" in text
    assert "![latent_and_token](latent_and_token.png)" in text


@pytest.mark.parametrize(
    ("differences", "above", "verdict"),
    [
        ([1.0, 2.0, 3.0], 0.0, "cannot be said at this scale"),  # 2 +- 4.30 / sqrt(3)
        ([1.0, 2.0, 3.0], -0.5, "holds"),  # from -0.48
        ([1.0, 2.0, 3.0], 4.5, "does not hold"),  # to 4.48
        ([5.0], 0.0, "cannot be said with one seed"),
    ],
)
def test_a_claim_holds_if_its_interval_over_seeds_is_above_the_threshold(differences, above, verdict):
    assert Claim("", lambda values: 0.0, above).verdict(differences) == verdict


def summaries(accuracies):
    """Of one seed's stages: accuracy over latent actions and over tokens."""
    return {f"rl_{name}": {"rl_accuracy": one} for name, one in zip(("latent", "token"), accuracies, strict=True)}


def test_a_row_has_means_and_paired_differences_over_the_seeds_that_are_done():
    pairs = {0: (0.8, 0.7), 1: (0.6, 0.5), 2: (0.7, 0.62)}
    of_seeds = {seed: summaries(pair) for seed, pair in pairs.items()} | {3: {"rl_latent": {"rl_accuracy": 0.9}}}
    row = row_of(FIGURES[0], of_seeds)
    assert row["seeds"] == [0, 1, 2]
    assert row["values"]["token"] == pytest.approx([70.0, 50.0, 62.0])
    assert row["ours"].startswith("latent 70.0 [45.2, 94.8] / token 60.7 [")
    (claim,) = row["claims"]
    assert claim["verdict"] == "holds", "a difference varies less between seeds than the values do"
    assert claim["found"] == "+9.3 [+6.5, +12.2]"  # 28/3 +- 4.303 * 1.1547 / sqrt(3)


def test_every_claim_reads_values_that_its_figure_has(found):
    for figure in FIGURES:
        values = figure.values(found)
        for claim in figure.claims:
            assert isinstance(claim.difference(values), float), claim.says


@pytest.fixture
def found():
    """Summaries of all stages that figures read, with the fields that these stages write."""
    accuracy = {"rl_accuracy": 0.8, "bc_accuracy": 0.5, "base_accuracy": 0.4, "reward_last": -3.0,
                "seconds_per_step": 2.0, "kl_last": 0.1}  # fmt: skip
    rl = ("rl_latent", "rl_token", "rl_fta", "countdown_latent", "countdown_token", "agent_archer", "agent_ppo", "etpo")
    ways = {way: {"accuracy": 0.5, "best": 0.6, "pass_at_1": 0.5, "pass_at_16": 0.7, "pass_at_4": 0.6}
            for way in ("greedy", "sample", "mcts", "mcts_q")}  # fmt: skip
    return {name: accuracy for name in rl} | {
        "search": ways,
        "kl_sweep": {"values": {value: accuracy for value in ("0.0", "0.001", "0.01", "0.1")}},
        "diversity": {name: {"diversity": 1.5} for name in ("random_actions", "base", "random_tokens")},
        "capabilities": {"base": {"sums": 0.9, "sums_low": 0.8}, "marginal": {"sums": 0.85, "sums_low": 0.7}},
    }


def test_seeds_repeat_the_matrix_each_with_its_own_models(config):
    both = matrix.chosen(override(config, {"reproduce.seeds": (3, 4), "reproduce.stages": ("kl_sweep",)}))
    assert [stage.folder for stage in both] == ["pretrain-seed3", "kl_sweep-seed3", "pretrain-seed4", "kl_sweep-seed4"]
    assert both[3].needs == ["pretrain-seed4"]
    words = list(both[3].settings)
    assert words[words.index("--sweep.seeds") + 1] == "4"


def test_a_stage_is_expected_to_take_as_long_as_with_other_seeds(tmp_path):
    assert reproduce._expected(Stage("a", "pretrain", seed=1), tmp_path) == ""
    reproduce.run(MATRIX[:1], tmp_path, Jobs(), parallel=1)
    assert reproduce._expected(Stage("a", "pretrain", seed=1), tmp_path) == ", about 2 min"


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_with_its_pictures(page, tmp_path):
    # A picture that does not load has no width; scripts of the page itself there are none.
    probe = "<script>document.title = [...document.images].map(i => i.naturalWidth > 100).join()</script></html>"
    (page.parent / "probe.html").write_text(page.read_text().replace("</html>", probe))
    shot = tmp_path / "page.png"
    browser = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1280,1600", "--virtual-time-budget=2000"]  # fmt: skip
    done = subprocess.run(
        [*browser, "--dump-dom", (page.parent / "probe.html").as_uri()], capture_output=True, text=True
    )
    assert "<title>true</title>" in done.stdout, done.stderr[-2000:]
    subprocess.run([*browser, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True)
    pixels = imread(shot)
    assert pixels.shape[:2] == (1600, 1280)
    assert 0.01 < (pixels[..., :3].min(axis=-1) < 0.5).mean() < 0.5, "text and lines on a light page"


def test_the_sums_of_the_tiny_preset(tmp_path):
    reproduce.write_sums(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    assert len(rows) == 81
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert eval(row["question"].removesuffix("=")) == int(row["choices"][row["label"]])


def test_what_is_said_of_machines_holds_for_every_stage(config):
    said = {"cluster.use_gpu": True, "cluster.address": "http://head:8265", "rollout.num_workers": 3,
            "tracking_uri": "http://mlflow:5000"}  # fmt: skip
    words = matrix.machines(override(config, said), "rl_math")
    assert not any(word.startswith("--cluster.address") for word in words), "Ray tells a job of its cluster"
    stage = from_command_line("plan", ["--preset", "tiny", *words, "--rollout.num-workers", "2"])
    assert (stage.cluster.learner_ranks, stage.rollout.num_workers, stage.cluster.use_gpu) == (1, 2, True)
    assert stage.tracking_uri == said["tracking_uri"]
    assert "--rollout.num-workers" not in matrix.machines(override(config, said), "pretrain"), "which has no engines"


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m"])
def test_stages_are_told_nothing_in_vain(name, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "check", lambda *_: None)
    said = {"output_dir": str(tmp_path), "rollout.num_workers": 3, "cluster.learner_ranks": 4, "data.path": "x.jsonl",
            "data.text_field": "t", "harness.limit": 3, "data.more_paths": ("y.jsonl",), "data.processes": 1,
            "data.weights": (1.0, 2.0), "data.chat_options": {"enable_thinking": False}, "data.max_broken": 0.5,
            "task.reward_timeout_s": 21.0, "task.max_failed_rewards": 0.5}  # fmt: skip
    config = override(preset(name), said)
    told = {}
    for stage in matrix.stages(config):
        settings = [word.format_map(_Anywhere()) for word in stage.settings]
        words = ["--preset", name, *matrix.machines(config, stage.job), *settings]
        told[stage.name] = from_command_line(stage.job, words)
        assert unread(told[stage.name], stage.job) == [], stage.name
    assert told["pretrain"].data.chat_options == {"enable_thinking": False}
    assert told["pretrain"].data.more_paths == ("y.jsonl",)
    assert told["rl_latent"].task.max_failed_rewards == 0.5


class _Anywhere(dict):
    def __missing__(self, name):
        return f"/stages/{name}"


def test_the_report_leaves_out_what_a_preset_has_no_stages_for(tmp_path):
    (tmp_path / "stages" / "q-seed0").mkdir(parents=True)
    (tmp_path / "stages" / "q-seed0" / "summary.json").write_text("{}")
    for name, countdowns in (("tiny", 2), ("smollm2-135m", 0)):
        (tmp_path / "config.json").write_text(preset(name).model_dump_json())
        write_report(tmp_path)
        figures = json.loads((tmp_path / "report" / "report.json").read_text())["figures"]
        assert sum("Countdown" in one["title"] for one in figures) == countdowns


def test_answers_of_the_base_need_a_base():
    with pytest.raises(ConfigError, match="learnt from a base's answers, and this preset has no base"):
        check(override(preset("tiny"), {"task.name": "instructions"}), "reproduce")
