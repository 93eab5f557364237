"""The CPU image's recipe without a container engine: its steps in a clean folder, in order, then its command.

Steps that need their own operating system are left out: the packages and the user of the second stage. If wheels come
from a folder (UV_FIND_LINKS, see the Makefile), PyTorch's own index is not used.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def instructions():
    """(keyword, rest) of each instruction, without comments and with continued lines joined."""
    lines = [line for line in (ROOT / "docker" / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def test_the_steps_make_an_environment_that_runs(tmp_path):
    def inside(text):
        return re.sub(r"(?<![\w./])/opt\b", str(tmp_path / "opt"), text)

    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"  # this environment's uv, in place of the image's
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"PATH": path, "EXTRA": "cpu"}
    here = tmp_path
    for word, rest in instructions():
        if word == "ENV":
            for setting in shlex.split(inside(rest)):
                name, value = setting.split("=", 1)
                variables[name] = value.replace("$PATH", variables["PATH"])
        elif word == "WORKDIR":
            here = Path(inside(rest))
            here.mkdir(parents=True, exist_ok=True)
        elif word == "COPY" and not rest.startswith("--from"):
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, here / target)
                else:
                    shutil.copy(ROOT / source, here / target)
        elif word == "RUN" and "apt-get" not in rest:
            command = inside(re.sub(r"--mount=\S+", "", rest))
            if "UV_FIND_LINKS" in os.environ:
                command = command.replace("export UV_TORCH_BACKEND=cpu", ":")
            subprocess.run(["sh", "-ec", command], cwd=here, env=variables, check=True)
        elif word == "CMD":
            said = subprocess.run(json.loads(rest), cwd=here, env=variables, check=True, capture_output=True, text=True)
    assert "--rl.kl-coef" in said.stdout
    where = "import cola_ray, deepspeed, vllm; print(cola_ray.__file__, vllm.__version__)"
    found = subprocess.run(
        ["python", "-c", where], cwd=tmp_path, env=variables, check=True, capture_output=True, text=True
    )
    assert str(tmp_path / "opt" / "cola_ray") in found.stdout
