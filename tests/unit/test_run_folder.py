"""What a job may write, and that it touches nothing else."""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cola_ray.runs import launch, run_folder
from cola_ray.runs.run_folder import WRITES, claim, read_record, refusals, summary_of, unknown_files, write_json
from cola_ray.settings.config import ConfigError, override
from cola_ray.settings.presets import preset

USERS = (
    "model/model.safetensors", "runs/mine/summary.json", "checkpoints/learner/notes", "stages/a.txt",
    "base/config.json", "replay/0/rows.arrow", "predictions/sample/0.parquet", "tune/tuner.pkl", "critic/critic.pt",
    "sums/sums.jsonl", "report/index.html", "summary.json", "config.json", "log.jsonl", "mlflow_run_id", "reward.png",
    "losses.png", "frontier.png", "accuracy.png", "atlas.html", "harness.json", "continuations.parquet", "head.log",
    "run.json", "model.tmp/x", "config.tmp", "summary.tmp", "run.tmp", "notes.txt",
)  # fmt: skip


def fingerprint(folder):
    """Of every name, content, link and time below a folder."""
    found = {}
    for here, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(here, name)
            content = (
                str(path.readlink()).encode() if path.is_symlink() else path.read_bytes() if name in files else b""
            )
            found[str(path.relative_to(folder))] = (hashlib.sha256(content).hexdigest(), path.lstat().st_mtime_ns)
    return found


def write(folder, *names, content="mine"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def settings(folder, **changes):
    return override(preset("tiny"), {"output_dir": str(folder), **changes})


@pytest.fixture
def ours(tmp_path):
    """A finished run's folder, with files of its own in it."""
    folder = tmp_path / "out"
    run = claim(settings(folder), "rl_math")
    write(folder, "model/model.safetensors", "checkpoints/learner/a/b", "summary.json", "log.jsonl", content="ours")
    run.end("finished", 80)
    return folder


@pytest.mark.parametrize("job", WRITES)
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_users_folder_is_refused_and_untouched(job, how, tmp_path):
    folder = tmp_path / "out"
    write(folder, *USERS)
    (folder / "link").symlink_to(tmp_path)
    before = fingerprint(tmp_path)
    with pytest.raises(ConfigError, match="which no run of this folder wrote; give another --output-dir"):
        claim(settings(folder, **how), job)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("job", WRITES)
def test_each_name_alone_is_enough(job, tmp_path):
    for name in run_folder.written_by(job):
        write(tmp_path / name, name)  # in a folder called as the name
        assert name in refusals(settings(tmp_path / name), job)[0]


def test_other_files_may_stand_beside_a_run_and_stay(tmp_path):
    write(tmp_path, "notes.txt", "data/rows.jsonl")
    run = claim(settings(tmp_path), "rl_math")
    write(tmp_path, "model/config.json", content="ours")
    run.end("finished", 1)
    claim(settings(tmp_path, overwrite=True), "rl_math")
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "data" / "rows.jsonl").read_text() == "mine"


def test_a_finished_run_is_refused_with_the_choices(ours):
    before = fingerprint(ours)
    (line,) = refusals(settings(ours), "rl_math")
    assert line == (
        f"output_dir = {str(ours)!r}: holds a finished run of rl_math, at step 80; use --resume to continue it, "
        "--overwrite to remove it and begin again, or another --output-dir"
    )
    assert "holds a run of rl_math, not of evaluate" in refusals(settings(ours, resume=True), "evaluate")[0]
    assert "contradicts resume = True" in refusals(settings(ours, resume=True, overwrite=True), "rl_math")[0]
    assert refusals(settings(ours, resume=True), "rl_math") == []
    assert fingerprint(ours) == before


def test_an_unfinished_run_is_refused_likewise(tmp_path):
    claim(settings(tmp_path), "pretrain")
    assert "holds an unfinished run of pretrain; use --resume" in refusals(settings(tmp_path), "pretrain")[0]
    assert refusals(settings(tmp_path, resume=True), "pretrain") == []


def test_overwriting_removes_what_the_run_wrote(ours):
    write(ours, "notes.txt")
    claim(settings(ours, overwrite=True), "evaluate")
    assert sorted(os.listdir(ours)) == ["config.json", "notes.txt", "run.json"]
    assert read_record(ours)["job"] == "evaluate"


@pytest.mark.parametrize("how", ["overwrite", "resume"])
@pytest.mark.parametrize("name", ["model/README.md", "checkpoints/learner/a/c", "replay/mine"])
def test_what_somebody_put_among_a_runs_files_is_not_lost(ours, how, name):
    write(ours, name)
    before = fingerprint(ours)
    with pytest.raises(ConfigError, match=f"has {name}, which the run did not write"):
        claim(settings(ours, **{how: True}), "rl_math")
    assert fingerprint(ours) == before


@pytest.mark.parametrize("place", ["model", "replay", "checkpoints/learner/away"])
def test_links_are_not_followed_out(ours, tmp_path, place):
    write(tmp_path / "precious", "data")
    if (ours / place).exists():
        shutil.rmtree(ours / place)
    (ours / place).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match=place):
        claim(settings(ours, overwrite=True), "rl_math")
    assert (tmp_path / "precious" / "data").exists()


def test_a_record_names_nothing_outside(ours, tmp_path):
    write(tmp_path, "precious", "out/notes.txt")
    record = read_record(ours)
    write_json(ours / "run.json", record | {"wrote": [*record["wrote"], "../precious", "notes.txt", str(tmp_path)]})
    claim(settings(ours, overwrite=True), "rl_math")
    assert (tmp_path / "precious").exists()
    assert (ours / "notes.txt").exists()


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize(
    "broken", [{"wrote": None}, {"wrote": 3}, {"wrote": "model"}, {"wrote": ["model", 3]}, {"files": 3}]
)
def test_a_broken_record_is_nobodys(ours, broken, how):
    write_json(ours / "run.json", read_record(ours) | broken)
    before = fingerprint(ours)
    with pytest.raises(ConfigError, match="which no run of this folder wrote"):
        claim(settings(ours, **how), "rl_math")
    assert fingerprint(ours) == before


def test_what_somebody_changed_after_the_run_is_not_removed(ours):
    write(ours, "model/model.safetensors", content="tuned further")
    before = fingerprint(ours)
    with pytest.raises(ConfigError, match=r"has model/model.safetensors, which somebody changed after the run"):
        claim(settings(ours, overwrite=True), "rl_math")
    assert fingerprint(ours) == before
    assert refusals(settings(ours, resume=True), "rl_math") == []


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_run_at_work_is_left_alone(how, tmp_path):
    run = claim(settings(tmp_path), "rl_math")
    write(tmp_path, "checkpoints/learner/a", content="ours")
    before = fingerprint(tmp_path)
    with pytest.raises(ConfigError, match=f"a run of rl_math is in progress there, process {os.getpid()} on "):
        claim(settings(tmp_path, **how), "evaluate")
    assert fingerprint(tmp_path) == before
    run.end("stopped")
    claim(settings(tmp_path, overwrite=True), "evaluate")


def test_a_run_that_was_killed_holds_nothing(tmp_path):
    words = (
        "import sys, os; from cola_ray.settings.config import override; from cola_ray.settings.presets import preset; "
        "from cola_ray.runs.run_folder import claim; "
        "run = claim(override(preset('tiny'), {'output_dir': sys.argv[1]}), 'rl_math'); print(run.job, flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", words, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        assert f"process {process.pid} on" in refusals(settings(tmp_path, resume=True), "rl_math")[0]
        process.kill()
        process.wait()
        assert refusals(settings(tmp_path, resume=True), "rl_math") == []


def test_a_run_that_somebody_put_into_a_sweep_is_not_lost(tmp_path):
    sweep = claim(settings(tmp_path), "sweep")
    claim(settings(tmp_path / "runs" / "a", resume=True), "rl_math").end("finished", 3)
    sweep.end("finished")
    mine = claim(settings(tmp_path / "runs" / "mine"), "rl_math")
    write(tmp_path, "runs/mine/model/weights")
    mine.end("finished", 3)
    assert unknown_files(tmp_path) == ["runs/mine/run.json"]
    with pytest.raises(ConfigError, match=r"has runs/mine/run.json, which the run did not write"):
        claim(settings(tmp_path, overwrite=True), "sweep")


def test_runs_within_a_sweep_have_records_of_their_own(tmp_path):
    sweep = claim(settings(tmp_path), "sweep")
    trial = claim(settings(tmp_path / "runs" / "a", resume=True), "rl_math")
    write(tmp_path, "runs/a/model/weights", content="ours")
    trial.end("finished", 3)
    sweep.end("finished")
    assert unknown_files(tmp_path) == []
    write(tmp_path, "runs/a/model/mine", "runs/a/notes.txt", "runs/mine.txt")
    assert sorted(unknown_files(tmp_path)) == ["runs/a/model/mine", "runs/a/notes.txt", "runs/mine.txt"]


FIELDS = ["model.path", "model.base", "data.path", "task.path", "q.path", "task.reward_model", "critic.encoder",
          "harness.include_path"]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_inputs_lie_apart_from_outputs(field, tmp_path):
    write(tmp_path, "data/rows.jsonl")
    above = settings(tmp_path / "data" / "out", **{field: str(tmp_path / "data")})
    assert f"{field} = " in refusals(above, "rl_math")[0]
    assert "would write into it" in refusals(above, "rl_math")[0]
    same = settings(tmp_path / "data", **{field: str(tmp_path / "data")})
    assert "would write into it" in refusals(same, "rl_math")[0]
    (tmp_path / "link").symlink_to(tmp_path / "data")
    linked = settings(tmp_path / "link" / "out", **{field: str(tmp_path / "data")})
    assert "would write into it" in refusals(linked, "rl_math")[0]
    beside = settings(tmp_path / "out", **{field: str(tmp_path / "data")})
    assert refusals(beside, "rl_math") == []


@pytest.mark.parametrize("field", ["data.more_paths", "task.more_paths"])
def test_further_sources_lie_apart_from_outputs(field, tmp_path):
    write(tmp_path, "data/rows.jsonl")
    above = settings(tmp_path / "data" / "out", **{field: (str(tmp_path / "data"),)})
    (line,) = refusals(above, "rl_math")
    assert line.startswith(f"{field} = ")
    assert "would write into it" in line


def test_a_model_is_not_removed_by_what_reads_it(ours):
    """As `atlas --model.path demo/model --output-dir demo` once did."""
    before = fingerprint(ours)
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ConfigError):
            claim(settings(ours, **{"model.path": str(ours / "model")}, **how), "atlas")
    assert "is among the files that the run writes" in refusals(
        settings(ours, overwrite=True, **{"model.path": str(ours / "model")}), "atlas"
    )[0]  # fmt: skip
    assert fingerprint(ours) == before


def test_another_programs_database_is_not_taken(tmp_path):
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table mine (x)")
    assert "is not a database of MLflow; give --tracking-uri" in refusals(settings(tmp_path / "out"), "rl_math")[0]
    assert refusals(settings(tmp_path / "out", tracking_uri="sqlite:///x.db"), "rl_math") == []
    given = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (line,) = refusals(settings(tmp_path / "out", tracking_uri=given), "rl_math")
    assert line.startswith(f"tracking_uri = {given!r}: ")
    within = f"sqlite:///{tmp_path / 'out' / 'model' / 'runs.db'}"
    assert (
        "is among the files that the run writes"
        in refusals(settings(tmp_path / "out", tracking_uri=within), "rl_math")[0]
    )
    (tmp_path / "mlflow.db").write_text("notes")
    assert "is not a database of MLflow" in refusals(settings(tmp_path / "out"), "rl_math")[0]


def test_a_file_is_no_folder(tmp_path):
    write(tmp_path, "out")
    assert "is a file; give a folder" in refusals(settings(tmp_path / "out"), "rl_math")[0]


def test_writing_leaves_no_other_file_behind(tmp_path):
    write(tmp_path, "config.tmp")
    write_json(tmp_path / "config.json", {"a": 1})
    assert sorted(os.listdir(tmp_path)) == ["config.json", "config.tmp"]
    assert (tmp_path / "config.tmp").read_text() == "mine"


def test_only_a_run_that_came_to_its_end_has_a_summary(tmp_path):
    for state, found in (("finished", True), ("stopped", False), ("failed", False)):
        write_json(tmp_path / "summary.json", {"state": state})
        assert (summary_of(tmp_path) is not None) == found
    assert summary_of(tmp_path / "none") is None


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt, "stopped"), (RuntimeError, "failed")])
def test_how_a_run_ended_is_recorded(error, state, tmp_path):
    run = claim(settings(tmp_path), "rl_math")
    with pytest.raises(error), run.failing():
        raise error
    assert read_record(tmp_path)["state"] == state


def test_nothing_is_touched_when_a_job_is_refused_for_its_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        launch.begin(settings(tmp_path / "out", **{"critic.steps": 3}), "rl_math")
    assert list(tmp_path.iterdir()) == []
    begun = launch.begin(settings("out"), "rl_math")
    assert json.loads((begun.folder.path / "config.json").read_text())["output_dir"] == str(tmp_path / "out")
