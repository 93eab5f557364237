"""Whatever ends a run becomes a line: what it was, and what to do; as the libraries make their errors."""

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import mlflow.exceptions
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.exceptions as re
import sqlalchemy.exc
import torch
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal import exceptions as train
from ray.tune.error import TuneError
from safetensors import safe_open

from cola_ray.cli.arguments import from_command_line
from cola_ray.learner.engine import CheckpointError
from cola_ray.loop.workers import WorkerLostError
from cola_ray.runs import event_log, explanations, failure
from cola_ray.settings.config import ConfigError, RunFailedError

SIGKILLED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. There are some potential root causes. (1) The "
    "process is killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called. (3) The "
    "worker is crashed unexpectedly due to SIGSEGV or other unexpected errors."
)


def died(name, message=SIGKILLED):
    return re.ActorDiedError(
        ActorDiedErrorContext(
            class_name=name, actor_id=b"0" * 16, pid=7, node_ip_address="10.0.0.1", error_message=message
        )
    )


def in_task(cause, function="Controller.start"):
    return re.RayTaskError(function, f"Traceback (most recent call last):\n  File ...\n{_named(cause)}", cause)


def _named(error):
    return f"{type(error).__module__}.{type(error).__qualname__}: {error}"


def could_not_start(cause):
    """As Ray words an actor whose __init__ raised."""
    text = (
        "\x1b[36mray::RolloutWorker.__init__()\x1b[39m (pid=1, ip=10.0.0.1, actor_id=ab, repr=<cola_ray.rollout.worker."
        f'RolloutWorker object at 0x7f>)\n  File "x.py", line 3, in __init__\n    load()\n{cause}'
    )
    return re.ActorDiedError(re.RayTaskError("__init__", text, ValueError("x"), actor_id="ab"))


def caught(work):
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def os_error(code, name=None):
    return OSError(code, os.strerror(code), name)


def cut(path, content):
    path.write_bytes(content)
    return path


def open_json(tmp):
    source = cut(tmp / "config.json", b'{"a": ')
    with source.open() as file:
        return json.load(file)


def open_safetensors(tmp):
    source = str(cut(tmp / "model.safetensors", b"\xff" * 40))
    with safe_open(source, "pt") as file:
        return file.keys()


def open_parquet(tmp):
    source = str(cut(tmp / "rows.parquet", b"PAR1..."))
    return pq.read_table(source)


def open_tensors(tmp):
    source = cut(tmp / "optimizer.pt", b"PK\x03\x04 and no more")
    return torch.load(source)


MEMORY = "use fewer processes, smaller batches or a smaller rollout.kv_cache_mb"
CASES = [
    # Ray's actors
    (
        died("Controller"),
        "the controller died without an error message: it crashed, or was killed, perhaps for lack of memory",
        "",
    ),
    (died("ReplayShard"), "a replay shard died without an error message", ""),
    (died("CriticService"), "a critic died without an error message", ""),
    (died("RewardModel", "The actor died because its node has died."), "the reward model died with its machine", ""),
    (died("AgentWorker", "The actor is dead because it was killed by `ray.kill`."), "a rollout worker was killed", ""),
    (died("Mine"), "the process of Mine died without an error message", ""),
    (
        died("Controller", "Task was killed due to the node running low on memory."),
        "the controller was killed, since the machine ran out of memory",
        MEMORY,
    ),
    (
        died("Evaluator", "The actor is dead because its owner has died. Owner Id: 1"),
        "the controller died with the process that started it",
        "",
    ),
    (re.ActorDiedError(), "a process of the run died without an error message", ""),
    (
        could_not_start("ValueError: max_model_len is 512"),
        "a rollout worker could not start: ValueError: max_model_len is 512",
        "",
    ),
    (
        could_not_start("OSError: [Errno 28] No space left on device"),
        "a rollout worker could not start: OSError: [Errno 28]",
        "make room on it",
    ),
    (
        re.ActorUnavailableError("The actor is temporarily unavailable", b"0" * 16),
        "a process of the run cannot be reached",
        "check the Ray cluster",
    ),
    # Ray itself
    (re.WorkerCrashedError(), "a process of the run crashed, or was killed, perhaps for lack of memory", ""),
    (re.OutOfMemoryError("Memory on the node was 95 %"), "a machine ran out of memory", MEMORY),
    (re.NodeDiedError("Node ab died"), "a machine of the Ray cluster died", "check the Ray cluster"),
    (re.LocalRayletDiedError(), "Ray's process on this machine (raylet) died", "check the Ray cluster"),
    (re.ObjectLostError("ab" * 28, None, ""), "data in Ray's object store was lost", ""),
    (re.OwnerDiedError("ab" * 28, None, ""), "data in Ray's object store died with the process that made it", ""),
    (re.ObjectStoreFullError("full"), "Ray's object store is full", "give it more memory"),
    (re.OutOfDiskError("full"), "the disk that Ray spills to is full", "make room, or set RAY_TMPDIR"),
    (re.GetTimeoutError("Get timed out: some object(s) not ready."), "a process of the run did not answer in time", ""),
    (
        re.RaySystemError("System error: Failed to connect to GCS at address 10.0.0.1:6379"),
        "the Ray cluster's head (GCS) does not answer",
        "check the Ray cluster",
    ),
    (re.RpcError("failed to connect to all addresses"), "the Ray cluster does not answer", "check the Ray cluster"),
    (
        ConnectionError("Failed to connect to GCS within 60 seconds"),
        "the Ray cluster's head (GCS) does not answer",
        "check the Ray cluster",
    ),
    (
        ConnectionError("Failed to connect to Ray at address: http://127.0.0.1:8265."),
        "the Ray cluster does not answer",
        "check the Ray cluster",
    ),
    (re.RuntimeEnvSetupError("pip failed"), "Ray could not set up the environment of the run's processes", ""),
    (re.AuthenticationError("Invalid token"), "the Ray cluster did not accept the token", "set RAY_AUTH_TOKEN"),
    (re.ActorUnschedulableError("infeasible"), "no machine of the Ray cluster can hold a process", "add machines"),
    # tasks: the innermost cause
    (in_task(ValueError("no problem to train on")), "no problem to train on", ""),
    (in_task(ValueError("no problem")).as_instanceof_cause(), "no problem", ""),
    (in_task(in_task(KeyError("answer"))), "KeyError: 'answer'", ""),
    (in_task(died("ReplayShard")), "a replay shard died without an error message", ""),
    (in_task(os_error(errno.ENOSPC, "/data/x")), "no space is left on the disk of /data/x", "make room on it"),
    (in_task(RunFailedError("runs failed", "see them")), "runs failed", "see them"),
    (
        ExceptionGroup("unhandled errors in a TaskGroup", [died("CriticService")]),
        "a critic died without an error message",
        "",
    ),
    # Ray Train
    (
        WorkerGroupError("…", {1: train.WorkerHealthCheckFailedError("failed", died("RayTrainWorker"))}),
        "learner rank 1 died without an error message",
        "",
    ),
    (
        WorkerGroupError(
            "…",
            {
                0: train.UserExceptionWithTraceback(RuntimeError("[gloo] Connection closed by peer"), "tb"),
                1: train.WorkerHealthCheckFailedError("failed", died("RayTrainWorker")),
            },
        ),
        "learner rank 1 died without an error message",
        "",
    ),
    (
        WorkerGroupError("…", {0: train.UserExceptionWithTraceback(CheckpointError("step 4 is damaged"), "tb")}),
        "learner rank 0: step 4 is damaged",
        "",
    ),
    (WorkerGroupError("…", {2: train.WorkerHealthCheckTimeoutError("hangs")}), "learner rank 2 does not answer", ""),
    (
        ControllerError(train.WorkerGroupStartupTimeoutError(2)),
        "the learner could not be started or supervised: the learner's ranks found no place on the cluster in time",
        "add machines",
    ),
    (
        ControllerError(died("RayTrainWorker")),
        "the learner could not be started or supervised: a learner rank died",
        "",
    ),
    (TuneError("a trial vanished"), "the sweep's runs could not be supervised: a trial vanished", ""),
    # the operating system
    (os_error(errno.ENOSPC, "/data/x.pt"), "no space is left on the disk of /data/x.pt", "make room on it"),
    (os_error(errno.ENOSPC), "no space is left on the disk of the run", "make room on it"),
    (os_error(errno.EDQUOT, "/home/x"), "the quota on the disk of /home/x is used up", "make room on it"),
    (os_error(errno.EROFS, "/ro/x"), "/ro/x is on a read-only file system", "mount it read-write"),
    (os_error(errno.EACCES, "/x"), "no permission to read or write /x", "change its permissions"),
    (os_error(errno.EMFILE), "too many files are open", "raise the limit (ulimit -n 65536)"),
    (os_error(errno.ENOENT, "/x/model"), "/x/model is gone", "do not remove files"),
    (os_error(errno.EAGAIN), "the system allows no more processes or memory", "raise the limit (ulimit -u)"),
    (os_error(errno.ENAMETOOLONG, "x" * 9), "the name xxxxxxxxx is too long", "give a shorter --output-dir"),
    (os_error(errno.EIO, "/x"), "the disk of /x reports an I/O error", "check the disk"),
    (MemoryError(), "the machine is out of memory", MEMORY),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
            " to allocate 80 bytes. Error code 12 (Cannot allocate memory)"
        ),
        "the machine is out of memory ([enforce",
        MEMORY,
    ),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "a GPU is out of memory", MEMORY),
    (
        RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
        "no space is left on a disk (unable",
        "make",
    ),
    (
        pa.ArrowException("Error writing bytes to file. Detail: [errno 28] No space left on device"),
        "no space is left on a disk (ArrowException: Error",
        "make room",
    ),
    (
        OSError("It looks like the config file at '/m/config.json' is not a valid JSON file."),
        "/m/config.json is truncated or damaged",
        "copy it again",
    ),
    (subprocess.CalledProcessError(3, ["/usr/bin/nvcc", "x.cu"]), "the command nvcc failed with code 3", ""),
    (RecursionError("maximum recursion depth exceeded"), "something is nested too deeply", "see the traceback"),
    (zipfile.BadZipFile("File is not a zip file"), "a file of tensors is truncated or damaged", "copy it again"),
    # trackers
    (
        mlflow.exceptions.MlflowException("API request to http://h failed"),
        "MLflow failed: API request to http://h failed",
        "check the tracking server",
    ),
    (
        mlflow.exceptions.MlflowException("(sqlite3.OperationalError) database is locked"),
        "MLflow's database is locked",
        "end that program",
    ),
    (
        sqlalchemy.exc.OperationalError("select 1", {}, sqlite3.OperationalError("database is locked")),
        "MLflow's database is locked",
        "end that program",
    ),
    (sqlite3.OperationalError("database or disk is full"), "no space is left on the disk of MLflow's database", "make"),
    (
        mlflow.exceptions.MlflowException(
            "API request to http://h:1/api failed with exception HTTPConnectionPool(host='h', port=1): Max retries "
            "exceeded with url: /api (Caused by NewConnectionError('<x>: Failed to establish a new connection: [Errno "
            "111] Connection refused'))"
        ),
        "MLflow does not answer (connection refused)",
        "check the tracking server",
    ),
    # our own, and what nobody expects
    (RunFailedError("the episodes failed", "look at your class"), "the episodes failed", "look at your class"),
    (WorkerLostError("a worker is gone"), "a worker is gone", ""),
    (SystemExit(3), "a part of the run called sys.exit: 3", ""),
    (KeyError("reward"), "KeyError: 'reward'", ""),
    (AttributeError("'NoneType' object has no attribute 'x'"), "AttributeError: 'NoneType' object has no", ""),
    (TypeError(), "TypeError", ""),
]


@pytest.mark.parametrize(("error", "what", "then"), CASES, ids=lambda case: type(case).__name__)
def test_every_end_has_words(error, what, then):
    said, step = explanations.explain(error)
    assert said.startswith(what)
    assert step.startswith(then) if then else step == ""
    assert "\n" not in said
    assert len(said) <= 400


@pytest.mark.parametrize(
    ("work", "name"),
    [(open_json, "config.json"), (open_safetensors, "model.safetensors"), (open_parquet, "rows.parquet"),
     (open_tensors, "")],
)  # fmt: skip
def test_files_that_were_cut_are_named(tmp_path, work, name):
    said, step = explanations.explain(caught(lambda: work(tmp_path)))
    assert f"{tmp_path / name} is truncated or damaged" in said if name else "tensors is truncated or damaged" in said
    assert step


def test_a_failure_is_one_line_and_leaves_its_traceback_in_folder_and_log(tmp_path):
    def work():
        with failure.explained_failures(tmp_path):
            raise os_error(errno.ENOSPC, "/data/x")

    error = caught(work)
    assert isinstance(error, RunFailedError)
    assert str(error) == (
        "no space is left on the disk of /data/x; make room on it; then the same command with --resume continues from "
        f"the last checkpoint (traceback in {tmp_path / 'error.txt'})"
    )
    told = (tmp_path / "error.txt").read_text()
    assert "Traceback" in told
    assert "in work" in told
    (event,) = event_log.read(tmp_path)
    assert (event["event"], event["reason"]) == ("fail", str(error))
    assert "in work" in event["traceback"]


def test_it_is_told_once_however_many_places_it_passes(tmp_path):
    def work():
        with failure.explained_failures(), failure.explained_failures(tmp_path), failure.explained_failures(tmp_path):
            raise died("Controller")

    assert str(caught(work)).count("traceback in") == 1
    assert len(event_log.read(tmp_path)) == 1


def test_without_a_folder_or_with_a_full_disk_the_traceback_is_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def work(folder):
        with failure.explained_failures(folder):
            raise TypeError("x")

    for folder in (None, tmp_path / "removed"):
        error = caught(lambda folder=folder: work(folder))
        file = Path(error.file)
        assert file.parent == tmp_path
        assert "TypeError: x" in file.read_text()
        file.unlink()


def test_no_disk_at_all_still_leaves_the_line(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))

    def work():
        with failure.explained_failures(tmp_path / "removed"):
            raise TypeError("x")

    assert str(caught(work)) == f"TypeError: x; {failure.RESUME}"


@pytest.mark.parametrize("error", [ConfigError("seed = -1: too small"), KeyboardInterrupt()])
def test_refusals_and_stops_stay_what_they_are(tmp_path, error):
    def work():
        with failure.explained_failures(tmp_path):
            raise error

    assert caught(work) is error
    assert not list(tmp_path.iterdir())


def test_it_passes_through_a_process(tmp_path):
    import pickle

    error = RunFailedError("what", "then", "file")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "what; then (traceback in file)"


JOB = """
import os, signal, sys
sys.path.insert(0, {root!r})
from cola_ray.cli import job, main
from cola_ray.settings.config import ConfigError
def body(config):
    {body}
job.parsed = lambda *_: object()
job._run = lambda config, command: body(config)
main("rl")
"""


def run(body, **options):
    script = JOB.format(root=str(Path(__file__).parents[2]), body=body)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("pass", 0, ""),
        ("raise TypeError('x')", 1, "the run failed: TypeError: x; the same command with --resume continues"),
        ("raise ConfigError('seed = -1: too small; use 0')", 2, "seed = -1: too small; use 0"),
        ("raise KeyboardInterrupt", 130, "stopped; the same command with --resume continues from the last checkpoint"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 130, "stopped; the same command with --resume"),
        ("os.kill(os.getpid(), signal.SIGHUP)", 130, "stopped; the same command with --resume"),
        ("raise SystemExit(5)", 1, "the run failed: a part of the run called sys.exit: 5"),
    ],
)
def test_the_terminal_has_one_line_and_the_code(tmp_path, body, code, line):
    done = run(body, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == bool(line)
    assert "Traceback" not in done.stderr


def test_nohup_is_respected():
    ignored = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    assert run("os.kill(os.getpid(), signal.SIGHUP)", preexec_fn=ignored).returncode == 0


def test_nobody_reads_what_is_printed():
    reader, writer = os.pipe()
    os.close(reader)
    script = JOB.format(root=str(Path(__file__).parents[2]), body="print('x' * 9); raise TypeError('y')")
    done = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 1


def test_help_and_readme_have_the_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        from_command_line("rl_math", ["--help"])
    assert caught.value.code == 0
    (_, foot) = capsys.readouterr().out.split("How it ends, by exit code:")
    assert [line.split()[0] for line in foot.strip().splitlines()] == [str(code) for code in failure.EXIT_CODES]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for code in failure.EXIT_CODES:
        assert f"| {code} |" in readme
