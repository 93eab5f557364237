"""The example of one iteration runs without Ray, and its printed statements are true."""

import os
import re
import subprocess
import sys

from runs import ROOT

WITHOUT_RAY = """
import runpy, sys
sys.modules["ray"] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_one_iteration_in_one_process_without_ray(tmp_path):
    command = [sys.executable, "-c", WITHOUT_RAY, str(ROOT / "examples" / "one_iteration.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    del env["OMP_NUM_THREADS"]  # a user's shell does not set it, and no step may depend on it
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "produced 64 sequences" in done.stdout
    advantages = [float(found) for found in re.findall(r"advantage ([+-][0-9.]+)", done.stdout)]
    assert len(advantages) == 3
    assert any(advantages)
    assert float(re.search(r"gradient norm ([0-9.]+)", done.stdout)[1]) > 0
    assert done.stdout.rstrip().endswith("the worker holds version 1")
