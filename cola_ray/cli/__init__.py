"""The command ``cola_ray``: parse the words, refuse settings that cannot run, then import the code that runs.

    cola_ray COMMAND ...          commands.py: all of them
    main("rl")                    like `cola_ray rl`, with this process's further arguments; jobs/*.py do this

    commands.py ─> arguments.py ─> checks/refusals.py ─> module:function of the command
                   (explain.py for --help)

Nothing heavy (PyTorch, Ray, vLLM or MLflow) is imported before the settings have been checked.
"""

import difflib
import os
import sys
from typing import Any, NoReturn

from cola_ray.cli.commands import COMMANDS, Command, overview


def main(*words: str) -> NoReturn:
    """Run the command that this process's arguments name, and exit.

    Args:
        words: put before those of ``sys.argv``, e.g. the command, in a file of jobs/.

    The end of a run is reported by one line and an exit code, see :data:`~cola_ray.runs.failure.EXIT_CODES`.
    """
    name, *rest = [*words, *sys.argv[1:]] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        sys.exit(0)
    if name == "--version":
        from cola_ray import __version__

        print(__version__)
        sys.exit(0)
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}"
        print(f"{name}: no such command; {fix}", file=sys.stderr)
        sys.exit(2)
    if not command.computes:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for GPUs, nor report what it finds
    if not command.job:
        sys.exit(command.function()(rest))
    from cola_ray.cli import job

    job.run(command, rest)


def run(command: str, config: Any) -> Any:
    """Run a command of ``cola_ray`` with these settings.

    The command is "rl", "agent", "pretrain", "evaluate", or any other of ``cola_ray --help`` that takes settings.

    Args:
        command: the word after ``cola_ray``.
        config: e.g. a preset with changes; the preset of "agent" is ``preset(name, agents=True)``.

    Returns:
        the summary that the run wrote to ``output_dir/summary.json``; None for "plan" and "data".

    Raises:
        ConfigError: the settings are refused, a line for each reason; nothing has been started.
        RunFailedError: the run failed; the message says why and what to do.
        ValueError: there is no such command, or it takes no settings.

    Example:
        >>> import cola_ray
        >>> config = cola_ray.override(cola_ray.preset("tiny"), {"rl.group_size": 4, "cluster.learner_ranks": 1})
        >>> cola_ray.run("plan", config)  # doctest: +ELLIPSIS
        tiny: ... M parameters, ...
        it fits
    """
    found = COMMANDS.get(command, Command("", ""))
    if not found.job:
        jobs = ", ".join(name for name, one in COMMANDS.items() if one.job)
        raise ValueError(f"command = {command!r}: runs no settings; use one of {jobs}")
    return found.function()(config)
