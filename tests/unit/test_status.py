"""What ``cola_ray status`` makes of a run's folder."""

import json
import os
import time

import pytest
from rich.console import Console

from cola_ray.runs import status


def write(folder, *events, steps=10):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"rl": {"max_steps": steps}}))
    lines = [json.dumps({"run": "r", **event}) for event in events]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def event(name, second, **facts):
    return {"time": f"2026-01-01T00:00:{second:02d}.000+00:00", "event": name, **facts}


START = event("start", 0, job="rl_math")
STEPS = [event("step", 2 * i, version=i, **{"reward/mean": i / 10, "policy/kl": 0.01 * i}) for i in (1, 2, 3)]


def test_a_running_run(tmp_path):
    run = status.read(write(tmp_path, START, *STEPS))
    assert run.state == "running"
    assert run.seconds_per_step == pytest.approx(2.0)
    assert run.latest("policy/kl") == pytest.approx(0.03)
    assert run.latest("eval/accuracy", "reward/mean") == pytest.approx(0.3)


@pytest.mark.parametrize(("last", "state"), [("end", "ended"), ("stop", "stopped"), ("fail", "failed")])
def test_how_runs_end(tmp_path, last, state):
    assert status.read(write(tmp_path, START, *STEPS, event(last, 9))).state == state


def test_a_killed_run_is_silent(tmp_path):
    write(tmp_path, START, *STEPS)
    long_ago = time.time() - 3600
    os.utime(tmp_path / "log.jsonl", (long_ago, long_ago))
    assert status.read(tmp_path).state == "silent for 1:00:00"


def test_half_a_line_is_left_out(tmp_path):
    write(tmp_path, START, *STEPS)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "ste')
    assert status.read(tmp_path).steps[-1]["version"] == 3


def test_a_sweeps_runs_and_what_they_said(tmp_path):
    write(tmp_path, START)
    write(tmp_path / "runs" / "a", START, *STEPS, event("fail", 9, reason="a reward is NaN"))
    write(tmp_path / "runs" / "b", START, event("step", 0, version=0, **{"eval/accuracy": 0.5}), *STEPS)
    console = Console(width=160, record=True)
    console.print(status.overview([status.read(folder) for folder in status.runs_of(tmp_path)]))
    text = console.export_text()
    assert "a: a reward is NaN" in text
    assert "3/10" in text
    assert "▁▄█" in text
    assert "0.5" in text


def test_a_pause_is_no_step_and_a_step_made_again_counts_once(tmp_path):
    """A step took 2 s; the run stood still for 30 s, went back to version 2 and made 3 once more."""
    again = [event("step", 42, version=3, **{"reward/mean": 0.9}), event("step", 44, version=4, **{"reward/mean": 0.4})]
    run = status.read(write(tmp_path, START, *STEPS, event("resume", 40, job="rl_math"), *again))
    assert run.seconds_per_step == pytest.approx(2.0)
    assert [step["reward/mean"] for step in run.steps] == [0.1, 0.2, 0.9, 0.4]


def test_steps_that_are_told_by_tens_are_ten(tmp_path):
    some = [event("step", 5 * i, version=10 * i, **{"base/loss": 1.0}) for i in (1, 2, 3)]
    run = status.read(write(tmp_path, START, *some))
    assert run.seconds_per_step == pytest.approx(0.5)
    console = Console(width=160, record=True)
    console.print(status.overview([run]))
    assert "day" not in console.export_text(), "pre-training has no RL steps left"


def test_a_sparkline_has_its_width():
    assert status._sparkline([float(i) for i in range(1000)]) == status._sparkline([float(i) for i in range(24)])
