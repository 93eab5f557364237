"""The matrix as jobs of a real head: stopped half-way, it leaves no process, and continues from its checkpoint."""

import contextlib
import json
import os
import signal
import socket
import time

import pytest
from runs import Run, descendants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def events(run):
    log = run.output / "stages" / "pretrain-seed0" / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def steps(seen):
    return [event["version"] for event in seen if event["event"] == "step"]


def until(run, happened):
    deadline = time.monotonic() + 400
    while not happened(events(run)):
        assert run.process.poll() is None, run.log
        assert time.monotonic() < deadline, run.log
        time.sleep(0.5)


def stop(run):
    """Like Ctrl-C or a scheduler; all of its child processes must have ended when it has."""
    below = [pid for pid, _, _ in descendants(run.process.pid)]
    assert len(below) > 10, "head, workers, job"
    run.process.send_signal(signal.SIGTERM)
    run.finish(code=130, timeout=150)
    time.sleep(2)
    assert [pid for pid in below if os.path.exists(f"/proc/{pid}")] == []


@pytest.fixture(autouse=True)
def another_ray():
    """Another Ray cluster on this machine uses the default port of Ray's agents."""
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # another process really has it
            taken.bind(("", 52365))
            taken.listen()
        yield


def test_stopped_and_started_again(tmp_path):
    only = ["--reproduce.stages", "pretrain"]
    run = Run("reproduce", tmp_path, *only)
    until(run, lambda seen: steps(seen)[-1:] >= [110])
    stop(run)
    before = steps(events(run))

    again = Run("reproduce", tmp_path, *only)
    until(again, lambda seen: seen[-1]["event"] == "step" and any(event["event"] == "resume" for event in seen))
    stop(again)
    seen = events(again)
    resumed = next(place for place, event in enumerate(seen) if event["event"] == "resume")
    assert steps(seen[:resumed]) == before
    assert before[-1] < steps(seen[resumed:])[0] <= before[-1] + 10, (
        "it goes on where it stopped; steps are told by tens"
    )
