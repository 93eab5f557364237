"""TensorBoard and W&B are copies of a run's log: each step once, and neither holds a run up."""

import importlib.util
import json
import struct
import threading
import time
from pathlib import Path

import pytest

from cola_ray.checks.refusals import check
from cola_ray.runs import event_log, followers
from cola_ray.runs.tracking import Tracker
from cola_ray.settings.config import ConfigError, override
from cola_ray.settings.presets import preset

PARAMS = {"seed": 3, "tracking_uri": "http://ann:hunter2@h/?token=t0ken"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def track(folder, steps, *trackers, state="finished"):
    tracker = Tracker("", "rl_math", folder, PARAMS, report_to=trackers)
    for step in steps:
        tracker.log(step, {"reward/mean": step / 4, "a word": "x"})
    tracker.log(steps[-1], {"eval/accuracy": 0.5})
    tracker.finish(state)
    return tracker


class Sink:
    """Keeps what it is told; of what an earlier one was told from ``first`` on, as TensorBoard does, nothing."""

    points: list

    def __init__(self, folder, job, params, run, first):
        self.first = first
        if first is not None and self.rewinds:
            type(self).points = [point for point in self.points if point[0] < first]

    def write(self, step, metrics):
        self.points.extend((step, name, value) for name, value in metrics.items())

    def flush(self):
        pass

    def close(self, state):
        self.points.append(state)


@pytest.fixture(params=["tensorboard", "wandb"])
def sink(request, monkeypatch):
    kept = type("Kept", (Sink,), {"points": [], "rewinds": request.param == "tensorboard"})
    monkeypatch.setitem(followers._SINKS, request.param, kept)
    kept.name = request.param
    return kept


EXPECTED = [(1, "reward/mean", 0.25), (2, "reward/mean", 0.5), (2, "eval/accuracy", 0.5), (3, "reward/mean", 0.75),
            (3, "eval/accuracy", 0.5)]  # fmt: skip


def test_a_resumed_run_writes_each_step_once(sink, folder):
    track(folder, [1, 2], sink.name, state="stopped")
    assert sink.points == [*EXPECTED[:3], "stopped"]
    sink.points.remove("stopped")
    track(folder, [2, 3], sink.name)  # a kill had lost step 2, which is made again
    assert sink.points == [*EXPECTED, "finished"]
    sent = json.loads((folder / sink.name / "sent.json").read_text())
    assert sent == {"bytes": (folder / "log.jsonl").stat().st_size}


def test_what_a_kill_left_unsaid_is_written_by_the_resumed_run(sink, folder):
    log = event_log.EventLog(folder)
    for step in (1, 2):
        log.append("step", version=step, **{"reward/mean": step / 4})
    log.append("step", version=2, **{"eval/accuracy": 0.5})
    track(folder, [3], sink.name)
    assert sink.points == [*EXPECTED, "finished"]


def test_a_tracker_that_hangs_ends_no_run(sink, folder, monkeypatch, capsys):
    monkeypatch.setattr(followers, "_CLOSING_S", 0.3)
    hung = threading.Event()
    monkeypatch.setattr(sink, "write", lambda *_: hung.wait(30))
    started = time.monotonic()
    track(folder, [1, 2, 3], sink.name)
    assert time.monotonic() - started < 5
    said = capsys.readouterr().out
    assert f"{sink.name} lacks the end of this run (no answer in time); log.jsonl has all of it" in " ".join(
        said.split()
    )
    hung.set()
    assert event_log.history(event_log.read(folder))[3]["reward/mean"] == 0.75


def test_a_tracker_that_fails_is_named_once_and_tried_again(sink, folder, monkeypatch, capsys):
    monkeypatch.setattr(followers, "_PAUSE_S", 0.05)
    broken, write = [OSError("disk full")] * 2, sink.write

    def fails_twice(self, step, metrics):
        if broken:
            raise broken.pop()
        write(self, step, metrics)

    monkeypatch.setattr(sink, "write", fails_twice)
    tracker = Tracker("", "rl_math", folder, PARAMS, report_to=(sink.name,))
    for step in (1, 2, 3):
        tracker.log(step, {"reward/mean": step / 4})
        time.sleep(0.2)
    tracker.finish("finished")
    assert sink.points == [*(point for point in EXPECTED if point[1] == "reward/mean"), "finished"]
    assert capsys.readouterr().out.count("the run goes on without it") == 1


def test_event_files_have_each_step_once(folder):
    pytest.importorskip("tensorboard", reason="the extra tensorboard installs it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(folder, [1, 2], "tensorboard", state="stopped")
    track(folder, [2, 3], "tensorboard")
    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    assert {*read.Tags()["scalars"]} == {"reward/mean", "eval/accuracy"}
    found = [(one.step, one.value) for one in read.Scalars("reward/mean")]
    assert found == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert [(one.step, one.value) for one in read.Scalars("eval/accuracy")] == [(2, 0.5), (3, 0.5)]
    written = b"".join(file.read_bytes() for file in (folder / "tensorboard").glob("events*"))
    assert b"| seed | 3 |" in written
    assert b"hunter2" not in written


def test_an_offline_run_of_wandb_has_each_step_once(folder, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb installs it")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(followers, "_CLOSING_S", 60.0)
    track(folder, [1, 2], "wandb", state="stopped")
    track(folder, [2, 3], "wandb")
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2, "one a process"
    assert {file.stem for file in files} == {f"run-{event_log.EventLog(folder).run}"}
    content = b"".join(file.read_bytes() for file in files)
    assert b"hunter2" not in content
    steps = logged(files)
    assert steps == EXPECTED
    assert not [path for path in folder.rglob("*") if path.is_symlink()], "which a run's folder may not have"


def logged(files: list[Path]):
    """Step, metric and value of each row of ``.wandb`` files."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in files:
        for data in records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found += [(row["train/global_step"], name, value) for name, value in row.items()
                      if not name.startswith(("_", "train/"))]  # fmt: skip
    return found


def records(content: bytes):
    """Of LevelDB's log format, in which W&B writes: blocks of 32 KiB, and pieces behind (checksum, length, kind)."""
    place, record = 7, b""  # after W&B's own header
    while place < len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += 7 + length
        record += content[place - length : place]
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_without_mlflow_nothing_of_it_is_there(folder):
    assert track(folder, [1]).mlflow_run_id is None
    assert [file.name for file in folder.iterdir()] == ["log.jsonl"]
    assert not (folder.parent / "mlflow.db").exists()


@pytest.mark.parametrize("name", followers.TRACKERS)
def test_a_package_that_is_absent_is_refused_before_anything_starts(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # as a run's own folder may be called, which Python would import
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *rest: None if one == name else find(one, *rest))
    config = override(preset("tiny"), {"report_to": ("mlflow", name)})
    with pytest.raises(ConfigError) as refused:
        check(config, "rl_math")
    assert str(refused.value) == (
        f"report_to = ('mlflow', '{name}'): needs the package {name}; `pip install {name}` installs it"
    )
