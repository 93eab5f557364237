"""A tool that runs a model's Python in a container, by any engine with docker's command line.

    cola_ray agent --task.name tools --task.tools lookup examples/container_python.py:python --model.path MODEL

The tool ``python`` that is built in needs no container and starts in milliseconds, but its programs have only the
standard library, and neither files nor processes. A container has whatever its image has. Starting one takes a good
part of a second, so raise the limit of a call: ``--task.options seconds 30``. ENGINE, IMAGE and SECONDS in the
environment replace the defaults; rollout workers run on every node, so the engine must be there.
"""

import os
import subprocess

ENGINE = os.environ.get("ENGINE", "docker")
IMAGE = os.environ.get("IMAGE", "python:3.12-slim")
SECONDS = os.environ.get("SECONDS", "20")
LIMITS = ["--network=none", "--read-only", "--memory=1g", "--cpus=1", "--pids-limit=64", "--cap-drop=ALL"]


def python(code: str) -> str:
    """Run a Python program and return what it prints.

    Args:
        code: The program.
    """
    # timeout is inside the container: ending the engine's client would leave the container running.
    command = [ENGINE, "run", "--rm", "-i", *LIMITS, IMAGE, "timeout", "-s", "KILL", SECONDS, "python", "-"]
    ran = subprocess.run(command, input=code, capture_output=True, text=True, errors="replace", check=False)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines()
        raise ValueError(lines[-1] if lines else f"the program ended with exit code {ran.returncode}")
    return ran.stdout.strip() or "(nothing was printed)"
