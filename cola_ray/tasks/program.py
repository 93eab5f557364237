"""A user's agent program as a task: its command, which rollout workers start (rollout/programs.py).

cola_ray agent --task.name program --task.command "python shopper.py" --model.path MODEL
"""

import ast
import importlib.util
import shlex
import shutil
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cola_ray.settings.limits import nearest
from cola_ray.tasks.environment import USUAL_TURNS

NAME = "program"


class Program:
    """The settings of an agent program, checked before it runs.

    Args:
        command: starts the program; split as a shell would.
        tool_parser: one of vLLM's parsers, or "".
        max_turns: how often the model may be called in an episode.

    Raises:
        ValueError: it cannot be started, or there is no such parser.
    """

    def __init__(
        self, command: str, tool_parser: str = "", max_turns: Annotated[int, Field(ge=1)] = USUAL_TURNS
    ) -> None:
        self.max_turns = max_turns
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"task.command = {command!r}: {error}; quote it as a shell wants it") from None
        if not words:
            raise ValueError("task.command = '': program needs one; give e.g. \"python agent.py\"")
        if shutil.which(words[0]) is None:
            raise ValueError(
                f"task.command = {command!r}: there is no program {words[0]}; give one that can be started"
            )
        for word in words[1:]:
            if word.endswith(".py") and not Path(word).is_file():
                raise ValueError(
                    f"task.command = {command!r}: no such file {word}; give its path from where the job starts"
                )
        if tool_parser and tool_parser not in tool_parsers():
            raise ValueError(
                f"task.tool_parser = {tool_parser!r}: {nearest(tool_parser, tool_parsers(), 'unknown parser')}"
            )


def tool_parsers() -> list[str]:
    """Names of vLLM's tool parsers, read from its source because importing it takes seconds."""
    package = importlib.util.find_spec("vllm")
    file = Path(str(package.origin)).parent / "tool_parsers" / "__init__.py" if package else None
    tree = ast.parse(file.read_text() if file and file.is_file() else "")
    tables = (node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
    return sorted(str(key.value) for table in tables for key in table.keys if isinstance(key, ast.Constant))
