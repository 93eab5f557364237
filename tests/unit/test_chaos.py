"""The bookkeeping of benchmarks/chaos.py: which trials are missing, what counts as the same curve, the table."""

import json
import subprocess
import sys

import pytest
from runs import ROOT

from cola_ray.runs import event_log

sys.path.insert(0, str(ROOT / "benchmarks"))
import chaos
from chaos_trials import SAME

CURVE = {step: dict.fromkeys(SAME, step / 8) for step in (1, 2, 3)}


def a_trial(kind="worker", sent="SIGKILL", setting="arithmetic", outcome="went on", seconds=9.6):
    job = chaos.SETTINGS[setting].job
    return {"job": job, "setting": setting, "kind": kind, "signal": sent, "outcome": outcome, "seconds": seconds}


def test_trials_add_up_over_calls_and_lossy_kinds_come_last_of_a_round():
    made = [a_trial("rank"), a_trial("rank"), a_trial("worker")]
    left = list(chaos.missing(made, ["arithmetic"], ["worker", "rank"], ["SIGKILL"], 3))
    assert left == [("arithmetic", kind, "SIGKILL", n) for kind, n in (("worker", 1), ("worker", 2), ("rank", 2))]
    agents = chaos.missing([], ["twenty_questions"], ["replay shard", "worker"], ["SIGKILL", "SIGSTOP"], 3)
    a_round = ["worker", "replay shard"]
    assert [kind for _, kind, _, _ in agents] == a_round * 3
    agents = chaos.missing([], ["twenty_questions"], ["worker"], ["SIGKILL", "SIGSTOP"], 3)
    assert [signal for _, _, signal, _ in agents] == ["SIGKILL", "SIGSTOP", "SIGKILL"]


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [({}, "exact"), ({"reward/mean": 0.25 + 1e-6}, "within 0.0001"), ({"reward/mean": 0.26}, "other")],
)
def test_curves_are_compared_on_the_steps_that_both_have(changed, verdict):
    found = CURVE | {2: CURVE[2] | changed, 9: {}}
    assert chaos.compare(found, CURVE)[0] == verdict


def test_a_metric_that_one_run_lacks_is_another_curve():
    assert chaos.compare({1: {}}, CURVE) == ("other", "step 1: policy/loss None for 0.125")
    assert chaos.compare({}, CURVE) == ("", "")


def test_missing_steps_and_prompts_are_found():
    whole = {step: {"rollout/last_position": 4 * step - 1} for step in (1, 2, 3)}
    assert not chaos.gaps(whole | {0: {}}, 4)
    assert chaos.gaps({1: whole[1], 3: whole[3]}, 4) == ["step 2 is missing"]
    assert chaos.gaps(whole | {2: {"rollout/last_position": 8}}, 4) == ["step 2 ended with prompt 8"]


def test_a_log_is_read_up_to_the_line_that_is_being_written(tmp_path):
    lines = [
        {"event": "step", "version": 1, "reward/mean": 0.1},
        {"event": "say"},
        {"event": "step", "version": 1, "x": 2},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "st')
    steps = event_log.history(event_log.read(tmp_path))
    assert steps[1]["reward/mean"] == 0.1
    assert steps[1]["x"] == 2


def test_the_table_has_a_row_for_each_kind_and_signal():
    trials = [a_trial(), a_trial(outcome="fault", seconds=180.0), a_trial(sent="SIGSTOP", outcome="ended and resumed")]
    rows = chaos.table(trials)
    assert rows["rl_math: worker, SIGKILL"] == {
        "tried": 2, "went on": 1, "went on with a loss": 0, "ended and resumed": 0, "fault": 1, "seconds": 180,
    }  # fmt: skip
    assert rows["rl_math: worker, SIGSTOP"]["ended and resumed"] == 1


def test_a_record_has_no_folders_of_the_machine():
    trial = {
        "said": "the run failed: it; --resume (traceback in /a/b-1/error.txt)",
        "faults": ["/tmp/ray-1"],
        "step": 3,
    }
    assert chaos.without_folders(trial) == {
        "said": "the run failed: it; --resume (traceback in error.txt)", "faults": ["ray-1"], "step": 3,
    }  # fmt: skip
    assert (
        chaos.without_folders("cluster.stall_timeout_s = 2 s and/or 1/2") == "cluster.stall_timeout_s = 2 s and/or 1/2"
    )


def test_memory_that_grows_is_told_of_processes_that_stay():
    before = {"driver": 400, "controller": 400, "worker": 400}
    assert chaos.grown(before, {"driver": 499, "worker": 4000}) == []
    assert chaos.grown(before, {"controller": 501}) == ["the controller grew from 400 MB to 501"]
    assert chaos.grown({}, before) == []


def test_what_is_left_below_tmp_is_told_and_removed(tmp_path):
    ray, kernels, pipe = tmp_path / "ray-1", tmp_path / "torchinductor_me", tmp_path / "pipe"
    for folder in (ray / "session" / "logs", kernels):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    assert chaos.left_files([ray, kernels, tmp_path / "gone"], failed=True) == []
    assert not list(tmp_path.iterdir())
    ray.mkdir()
    pipe.touch()
    assert chaos.left_files([ray, pipe]) == [f"left below /tmp: {pipe}, {ray}"]


def test_a_process_whose_parent_has_died_is_still_seen():
    """In a process of its own, since one that adopts orphans goes on doing so."""
    script = """
import subprocess, sys, time
sys.path[:0] = [{benchmarks!r}]
import chaos
from chaos_trials import SAME
chaos.adopt_orphans()
parent = subprocess.Popen([sys.executable, "-c", "import subprocess; subprocess.Popen(['sleep', '60'])"])
parent.wait()
found = [one.title for one in chaos.processes()]
print(found)
for one in chaos.processes(): chaos.os.kill(one.pid, 9)
time.sleep(0.2)
print(chaos.processes())
"""
    done = subprocess.run([sys.executable, "-c", script.format(benchmarks=str(ROOT / "benchmarks"))],
                          capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["['sleep 60']", "[]"]
