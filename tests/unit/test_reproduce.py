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
from cola_ray.studies.report import FIGURES, write_report

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
        (folder / stage.name).mkdir(parents=True, exist_ok=True)
        if stage.name not in self.fails:
            (folder / stage.name / "summary.json").write_text("{}")
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
    assert [stage.needs for stage in MATRIX] == [[], ["a"], ["b", "a"], []]


def test_all_run_in_order_of_their_needs(tmp_path):
    jobs = Jobs()
    states = reproduce.run(MATRIX[::-1], tmp_path, jobs, parallel=1)
    assert set(states.values()) == {"done"}
    assert [name for name in jobs.submitted if name != "d"] == ["a", "b", "c"]


def test_a_failed_stage_takes_along_only_those_that_need_it(tmp_path):
    assert reproduce.run(MATRIX, tmp_path, Jobs(fails=["a"]), parallel=2) == {
        "a": "failed", "b": "needs a", "c": "needs b", "d": "done"
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
        assert set(stage.needs) <= set(names)
        for need in stage.needs:
            for sub in ("model", "predictions/sample"):
                (tmp_path / need / sub).mkdir(parents=True, exist_ok=True)
        words = [word.format(**{need: str(tmp_path / need) for need in stage.needs}) for word in stage.settings]
        from_command_line(stage.job, ["--preset", name, *words, "--resume"])


@pytest.fixture
def page(config, tmp_path):
    """A report of two stages."""
    (tmp_path / "config.json").write_text(config.model_dump_json())
    for name, accuracy in (("rl_latent", 0.75), ("rl_token", 0.5)):
        folder = tmp_path / "stages" / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"rl_accuracy": accuracy, "wall_seconds": 90.0}))
        (folder / "log.txt").write_text("")
        (folder / "config.json").write_text(config.model_dump_json())
        lines = [json.dumps({"event": "step", "version": v, "eval/accuracy": accuracy * v / 4}) for v in range(5)]
        (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return write_report(tmp_path)


def test_the_report_names_what_is_missing_and_shows_what_is_there(page, tmp_path):
    text = page.read_text()
    assert "75.0 / 50.0" in text
    assert text.count("not there yet: ") == len(FIGURES) - 1
    assert text.count("data:image/png;base64,") == 1
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| 42.4 / 38.2 | 75.0 / 50.0 |" in text
    assert "![latent_and_token](latent_and_token.png)" in text


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
            "data.text_field": "t", "harness.limit": 3}  # fmt: skip
    config = override(preset(name), said)
    for stage in matrix.stages(config):
        settings = [word.format_map(_Anywhere()) for word in stage.settings]
        words = ["--preset", name, *matrix.machines(config, stage.job), *settings]
        assert unread(from_command_line(stage.job, words), stage.job) == [], stage.name


class _Anywhere(dict):
    def __missing__(self, name):
        return f"/stages/{name}"
