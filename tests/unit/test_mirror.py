"""MLflow is a copy of a run's log: away, slow, locked or full, it neither holds a run up nor loses an event."""

import contextlib
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import free_port

from cola_ray.runs import event_log, mirror, run_folder, status
from cola_ray.runs.tracking import Tracker
from cola_ray.settings.config import ConfigError, RunFailedError, override
from cola_ray.settings.presets import preset

PARAMS = {"seed": 3, "rl.lr": 0.5, "tracking_uri": "http://ann:hunter2@h/?token=t0ken"}


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """With MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("mlflow") / "run"
    folder.mkdir()
    tracker = Tracker("", "rl_math", folder, {})
    with pytest.MonkeyPatch.context() as patch:
        patient(patch)
        tracker.finish("finished")
    assert tracker.mlflow_run_id
    database = folder.parent / "mlflow.db"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for table in ("latest_metrics", "metrics", "params", "tags", "runs"):
            connection.execute(f"delete from {table}")
    return database


@pytest.fixture
def folder(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(mirror, "_OPENING_S", 0.3)
    monkeypatch.setattr(mirror, "_CLOSING_S", 0.5)


def rows(folder, query):
    with contextlib.closing(sqlite3.connect(folder.parent / "mlflow.db")) as connection:
        return connection.execute(query).fetchall()


def metrics(folder):
    return rows(folder, "select key, step, value from metrics order by step, key")


def track(folder, steps, uri="", state="finished"):
    tracker = Tracker(uri, "rl_math", folder, PARAMS)
    for step in steps:
        tracker.log(step, {"reward/mean": step / 4, "a word": "x"})
    tracker.finish(state)
    return tracker


def patient(monkeypatch):
    monkeypatch.setattr(mirror, "_CLOSING_S", 60.0)
    monkeypatch.setattr(mirror, "_MAX_CLOSING_S", 60.0)


def test_a_run_spends_less_than_five_seconds_on_a_server_that_does_not_exist():
    import importlib

    fresh = importlib.util.find_spec("cola_ray.runs.mirror").loader.get_source("cola_ray.runs.mirror")
    named = dict(
        line.split("  #")[0].split(" = ") for line in fresh.splitlines() if line.startswith("_") and " = " in line
    )
    assert float(named["_OPENING_S"]) + float(named["_CLOSING_S"]) < 4


def test_everything_arrives(folder, monkeypatch, capsys):
    patient(monkeypatch)
    (folder / "samples").mkdir()
    (folder / "samples" / "00000001-train.parquet").write_bytes(b"rows")
    tracker = track(folder, range(5))
    assert metrics(folder) == [("reward/mean", step, step / 4) for step in range(5)]
    assert ("seed", "3") in rows(folder, "select key, value from params")
    ((run_id, name, state),) = rows(folder, "select run_uuid, name, status from runs")
    assert (run_id, name, state) == (tracker.mlflow_run_id, "run", "FINISHED")
    ((artifacts,),) = rows(folder, "select artifact_uri from runs")
    assert (Path(artifacts.removeprefix("file://")) / "log.jsonl").exists()
    assert (Path(artifacts.removeprefix("file://")) / "samples" / "00000001-train.parquet").read_bytes() == b"rows"
    assert "misses" not in capsys.readouterr().out


def test_a_resumed_run_is_one_run_with_one_history(folder, monkeypatch):
    patient(monkeypatch)
    track(folder, range(3), state="stopped")
    assert rows(folder, "select status from runs") == [("KILLED",)]
    again = track(folder, [3, 4])
    assert again.series("reward/mean")[0] == [0, 1, 2, 3, 4]
    assert [step for _, step, _ in metrics(folder)] == [0, 1, 2, 3, 4]
    assert rows(folder, "select status from runs") == [("FINISHED",)]
    assert [event["event"] for event in event_log.read(folder)][::6] == ["start", "step"]
    assert len({event["run"] for event in event_log.read(folder)}) == 1


def test_what_was_sent_twice_is_there_once(folder, monkeypatch):
    patient(monkeypatch)
    track(folder, range(3))
    (folder / "mlflow_sent.json").write_text(json.dumps({"bytes": 0, "params": True, "state": "RUNNING"}))
    track(folder, [3])
    assert [step for _, step, _ in metrics(folder)] == [0, 1, 2, 3]


def test_runs_of_a_sweep_stand_below_it_once_it_is_there(folder, monkeypatch):
    patient(monkeypatch)
    monkeypatch.setattr(mirror, "_PAUSE_S", (0.05, 0.05))
    other = folder.parent / "sweep"
    other.mkdir()
    sweep_id = event_log.EventLog(other)
    sweep_id.append("begun")  # its id is in its log before MLflow knows of it
    child = Tracker("", "rl_math", folder, PARAMS, parent=sweep_id.run)
    child.log(1, {"x": 1.0})
    sweep = Tracker("", "sweep", other, {})
    deadline = time.monotonic() + 60
    while not child.mlflow_run_id and time.monotonic() < deadline:
        time.sleep(0.05)
    child.finish("finished")
    sweep.finish("finished")
    parents = rows(folder, "select run_uuid, value from tags where key = 'mlflow.parentRunId'")
    assert parents == [(child.mlflow_run_id, sweep.mlflow_run_id)]
    assert len(rows(folder, "select distinct experiment_id from runs")) == 1
    assert metrics(folder) == [("x", 1, 1.0)]


def test_an_answer_that_was_lost_makes_no_second_run(folder, monkeypatch):
    patient(monkeypatch)
    track(folder, [0])
    (folder / "mlflow_run_id").unlink()
    track(folder, [1])
    assert len(rows(folder, "select 1 from runs")) == 1


@contextlib.contextmanager
def silent_server():
    """Accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        held = []
        thread = threading.Thread(target=lambda: held.extend(_accepted(one)), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{one.getsockname()[1]}"


def _accepted(server):
    with contextlib.suppress(OSError):
        while True:
            yield server.accept()


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("closed", "refused"),
        ("silent", ""),
        ("http://nobody.invalid:5000", ""),
        ("http://192.0.2.1:5000", ""),  # a network for documents, which nobody has
        ("sqlite:////proc/none/mlflow.db", "sqlite:////proc/none/mlflow.db"),
        ("sqlite:////dev/null/mlflow.db", "sqlite:////dev/null/mlflow.db"),
    ],
)
def test_a_tracker_that_is_away_neither_ends_nor_holds_up(folder, uri, why, capsys):
    with silent_server() as silent:
        uri = {"closed": f"http://127.0.0.1:{free_port()}", "silent": silent}.get(uri, uri)
        tracker = track(folder, range(3), uri)
    assert tracker.series("reward/mean")[1] == [0.0, 0.25, 0.5]
    assert [event["event"] for event in event_log.read(folder)] == ["start", "step", "step", "step", "end"]
    said = capsys.readouterr().out
    assert f"MLflow at {uri} misses 5 events of this run and its files" in said
    assert why in said
    assert f"`cola_ray send {folder}` sends them" in said
    assert Tracker(uri, "rl_math", folder, PARAMS).step == 2, "history needs no server"


def test_a_database_that_another_program_locks_is_sent_later(folder, capsys, monkeypatch):
    record(folder)
    locker = sqlite3.connect(folder.parent / "mlflow.db", isolation_level=None)
    locker.execute("begin exclusive")
    tracker = track(folder, range(3))
    assert "misses 5 events" in capsys.readouterr().out
    locker.rollback()
    locker.close()
    tracker.mirror.thread.join(60)  # which has the database's patience still
    assert status.send([str(folder)]) == 0
    assert [step for _, step, _ in metrics(folder)] == [0, 1, 2]
    assert rows(folder, "select status from runs") == [("FINISHED",)]


def record(folder, uri=""):
    """As a run leaves it when it has ended."""
    config = override(preset("tiny"), {"output_dir": str(folder), "tracking_uri": uri})
    run = run_folder.claim(config, "rl_math")
    run.end("finished", 2)


def test_a_server_that_comes_back_gets_the_rest_from_the_run_itself(folder, monkeypatch, capsys):
    patient(monkeypatch)
    monkeypatch.setattr(mirror, "_PAUSE_S", (0.05, 0.05))
    away = threading.Event()
    connect = mirror.Mirror._connect

    def flaky(self):
        if not away.is_set():
            raise ConnectionRefusedError(111, "Connection refused")
        connect(self)

    monkeypatch.setattr(mirror.Mirror, "_connect", flaky)
    tracker = Tracker("", "rl_math", folder, PARAMS)
    tracker.log(0, {"x": 1.0})
    assert "the run goes on, and its log is sent later" in capsys.readouterr().out
    away.set()
    tracker.log(1, {"x": 2.0})
    deadline = time.monotonic() + 60
    while len(metrics(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    tracker.finish("finished")
    assert metrics(folder) == [("x", 0, 1.0), ("x", 1, 2.0)]
    assert "misses" not in capsys.readouterr().out


def test_what_is_sent_after_the_end_keeps_nobody_from_the_folder(folder):
    record(folder)
    for name in ("mlflow_run_id", "mlflow_sent.json"):
        (folder / name).write_text("{}")
    assert run_folder.unknown_files(folder) == run_folder.changed(folder) == []
    run_folder.read_record(folder)
    claimed = run_folder.RunFolder(folder, "rl_math")
    claimed.end("finished")
    (folder / "mlflow_sent.json").write_text('{"bytes": 3}')
    assert run_folder.unknown_files(folder) == run_folder.changed(folder) == []


def test_sending_says_why_it_cannot(folder, tmp_path, capsys):
    with pytest.raises(ConfigError, match="no run there"):
        mirror.send(tmp_path / "none")
    shutil.rmtree(folder)
    record(folder, "http://ann:pw@127.0.0.1:1/?token=t")
    with pytest.raises(ConfigError, match="secret is not stored; give the whole address by --tracking-uri"):
        mirror.send(folder)
    with pytest.raises(RunFailedError, match="does not answer"):
        mirror.send(folder, "http://ann:pw@127.0.0.1:1")
    assert status.send([str(folder)]) == 2
    assert "ann" not in "".join(capsys.readouterr())


def test_a_line_that_a_kill_cut_costs_itself_alone(folder):
    log = event_log.EventLog(folder)
    log.append("start")
    with log.file.open("a") as file:
        file.write('{"time": "2026-01-01T00:00:00", "event": "step", "vers')
    again = event_log.EventLog(folder)
    again.append("step", version=1, x=2.0)
    events = event_log.read(folder)
    assert [event["event"] for event in events] == ["start", "step"]
    assert len({event["run"] for event in events}) == 1
    assert event_log.history(events) == {1: {"x": 2.0}}
    assert status.Status(folder, {}, events).steps[-1]["version"] == 1


def test_no_secret_reaches_log_or_database(folder, monkeypatch):
    patient(monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abcdef0123456789")
    tracker = Tracker("", "rl_math", folder, PARAMS)
    tracker.note("say", text="asked http://ann:hunter2@h with sk-abcdef0123456789")
    tracker.finish("finished")
    for file in folder.parent.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not [one for one in (b"hunter2", b"t0ken", b"sk-abcdef") if one in content], file
    assert ("tracking_uri", "http://***@h/?token=***") in rows(folder, "select key, value from params")


@pytest.mark.slow
def test_a_real_server_gets_everything(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}",
               "--artifacts-destination", str(tmp_path / "artifacts")]  # fmt: skip
    (tmp_path / "run").mkdir()
    uri = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.5)
        time.sleep(5)
        mirror._CLOSING_S = mirror._MAX_CLOSING_S = 60.0
        tracker = track(tmp_path / "run", range(30), uri)
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=uri)
        assert len(client.get_metric_history(tracker.mlflow_run_id, "reward/mean")) == 30
        assert client.get_run(tracker.mlflow_run_id).info.status == "FINISHED"
        assert "log.jsonl" in {file.path for file in client.list_artifacts(tracker.mlflow_run_id)}
    finally:
        import os
        import signal

        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_readme_tells_of_sending():
    assert "cola_ray send" in (Path(__file__).parents[2] / "README.md").read_text()
