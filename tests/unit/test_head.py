"""Ray's own processes under a run, by stand-ins that live, die and are stopped."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import ray
from ray._private import services

from cola_ray.cluster import head
from cola_ray.runs import event_log
from cola_ray.runs.failure import explained_failures
from cola_ray.settings.config import RunFailedError


@pytest.fixture
def process():
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield started
    started.kill()
    started.wait()


@pytest.fixture
def watch(process, monkeypatch):
    """Of a process that stands for GCS, by nobody's thread."""
    monkeypatch.setattr(head._Watch, "_work", lambda self: None)
    made = head._Watch(SimpleNamespace(all_processes={"gcs_server": [SimpleNamespace(process=process)]}))
    monkeypatch.setattr(head, "_WATCHES", [made])
    return made


def test_one_that_lives_is_left_alone(watch):
    assert watch.look() is None
    head.raise_if_lost()
    with pytest.raises(KeyError, match="x"), head.blamed():
        raise KeyError("x")


def test_one_that_died_is_what_ended_the_run(watch, process):
    process.kill()
    process.wait()
    with pytest.raises(RunFailedError, match=r"the Ray cluster's head \(GCS\) died"):
        head.raise_if_lost()
    for error in (KeyboardInterrupt(), ValueError("the controller died")):
        with pytest.raises(RunFailedError, match="GCS"), head.blamed():
            raise error
    with pytest.raises(RunFailedError, match="worded before"), head.blamed():
        raise RunFailedError("worded before")


def test_cleaning_up_that_is_interrupted_is_no_second_failure(watch, process, tmp_path):
    def interrupted():
        try:
            with explained_failures(tmp_path):
                head.raise_if_lost()
        finally:
            raise KeyboardInterrupt

    process.kill()
    process.wait()
    with pytest.raises(RunFailedError, match="GCS") as told, explained_failures(tmp_path), head.blamed():
        interrupted()
    assert told.value.file == str(tmp_path / "error.txt")
    assert [event["event"] for event in event_log.read(tmp_path)] == ["fail"]


def test_one_that_is_stopped_is_waited_for_a_while(watch, process, monkeypatch):
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while not head._is_stopped(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.look() is None
    os.kill(process.pid, signal.SIGCONT)
    while head._is_stopped(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.look() is None
    assert not watch.since
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(head, "_STOPPED_S", 0.0)
    while watch.look() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert str(watch.lost).startswith("the Ray cluster's head (GCS) is stopped")


def test_a_cluster_that_was_there_is_asked_whether_it_answers(watch, monkeypatch):
    def asked(key, namespace, timeout):
        if said:
            raise said[0]
        return False

    said = []
    monkeypatch.setattr(
        head.worker.global_worker, "gcs_client", SimpleNamespace(internal_kv_exists=asked), raising=False
    )
    assert watch._answers()
    for error in (ray.exceptions.RpcError("unavailable"), ray.exceptions.GetTimeoutError("late"), ConnectionError()):
        said[:] = [error]
        assert not watch._answers()
    assert not watch._lasts("silence", True, 1e6)
    time.sleep(0.01)
    assert watch._lasts("silence", True, 0.001)
    assert not watch._lasts("silence", False, 0.001)


def test_what_ray_starts_is_apart_from_the_runs_group():
    with head._apart():
        started = services.ConsolePopen(
            [sys.executable, "-c", "import os; print(os.getsid(0))"], stdout=subprocess.PIPE
        )
    told = int(started.communicate()[0])
    assert told == started.pid != os.getsid(0)
    assert services.ConsolePopen.__name__ == "ConsolePopen"


def test_a_folder_that_the_user_has_named_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    head.remove_own_folder()
    assert tmp_path.exists()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(head, "own_folder", lambda: {"RAY_TMPDIR": str(tmp_path)})
    head.remove_own_folder()
    assert not tmp_path.exists()


def test_after_a_failure_rays_logs_alone_stay(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(head, "own_folder", lambda: {"RAY_TMPDIR": str(tmp_path / "run")})
    session = tmp_path / "run" / "ray" / "session_1"
    for file in ("logs/gcs_server.out", "logs/events/one.log", "sockets/raylet", "artifacts/tune/stdout", "gcs_port"):
        (session / file).parent.mkdir(parents=True, exist_ok=True)
        (session / file).write_text("x")
    (tmp_path / "run" / "ray" / "session_latest").symlink_to(session)
    head.remove_own_folder(but_logs=True)
    kept = {str(path.relative_to(session)) for path in session.rglob("*") if path.is_file()}
    assert kept == {"logs/gcs_server.out", "logs/events/one.log"}
    assert {path.name for path in session.iterdir()} == {"logs"}
    assert (tmp_path / "run" / "ray" / "session_latest" / "logs" / "gcs_server.out").exists()
    head.remove_own_folder()
    assert not (tmp_path / "run").exists()


def test_old_folders_go_and_those_in_use_stay(tmp_path, monkeypatch):
    import fcntl

    pid = subprocess.Popen(["true"])
    pid.wait()
    names = {"dead": pid.pid, "alive": os.getpid(), "locked": 2**22 - 3, "young": 2**22 - 2,
             "killed": 2**22 - 1}  # fmt: skip
    folders = {name: tmp_path / f"cola_ray-{number}" for name, number in names.items()}
    others = [tmp_path / "cola_ray-notes", tmp_path / "mine"]
    for folder in (*folders.values(), *others):
        (folder / "ray").mkdir(parents=True)
        os.utime(folder, (0, 0))
    os.utime(folders["young"])
    (folders["killed"] / f"tmp-{names['killed']}").mkdir()
    held = os.open(folders["locked"], os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    head._remove_old(tmp_path / "cola_ray-1")
    os.close(held)
    kept = [*(folders[name] for name in ("alive", "locked", "young")), *others]
    assert {folder.name for folder in tmp_path.iterdir()} == {folder.name for folder in kept}
