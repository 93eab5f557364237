"""Runs a command with settings, from its arguments to its exit code."""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cola_ray.cli.arguments import parsed
from cola_ray.cli.commands import Command
from cola_ray.runs import launch, provenance
from cola_ray.runs.display import current, shown
from cola_ray.runs.failure import RESUME, explained_failures
from cola_ray.runs.redaction import redacted
from cola_ray.settings.config import Config, ConfigError, RunFailedError
from cola_ray.settings.presets import expectation


def run(command: Command, argv: Sequence[str]) -> NoReturn:
    """Parse, check, run, exit."""
    code, line = 0, ""
    try:
        with explained_failures():
            config = parsed(command, argv)
            if config is not None:
                _run(config, command)
    except ConfigError as error:
        code, line = 2, redacted(str(error))
    except RunFailedError as error:
        code, line = 1, f"the run failed: {error}"
    except KeyboardInterrupt:
        code, line = 130, f"stopped; {RESUME}"
    _leave(code, line)


def _run(config: Config, command: Command) -> None:
    if not command.computes:
        command.function()(config)
        return
    with shown() as display:
        for line in launch.first_lines(config, command.job).splitlines():
            display.say(line)
        makes_start_model = provenance.makes_start_model(config) and not provenance.is_made(
            provenance.start_model(config)
        )
        display.say(expectation(config, command.job, makes_start_model))
        current().doing("importing PyTorch, Ray and vLLM")
        command.function()(config)


def _leave(code: int, line: str) -> NoReturn:
    """Print a line and exit, even if the output can no longer be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if line and stream is sys.stderr:
                print(line, file=stream)
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
