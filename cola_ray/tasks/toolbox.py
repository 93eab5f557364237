"""Python functions as tools: their descriptions for a model, the checks of a call, and its result.

    --task.tools calculator lookup shop.py:price
         │ registry: built in, or a user's function
         v
    Toolbox ── schemas ──> what the model is told           signature, type hints and docstring, by transformers
            ── run(call, problem, seconds) ──> Result       checked against the schema; users' functions are called in a
                                                            fork that may raise, hang or exit; its result as text

A function with a parameter ``problem`` receives the problem that is being solved; the model does not see this
parameter. The problem's columns may hold the data that a tool looks up. A function's changes in memory are lost after
its call, so calls of different episodes cannot affect each other; state belongs into files or a service.
"""

import asyncio
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cola_ray import registry
from cola_ray.sandbox.execution import call_in_child
from cola_ray.sandbox.programs import Limits, Sandbox
from cola_ray.tasks.calculator import evaluate, in_words
from cola_ray.tasks.protocol import Problem, further
from cola_ray.tasks.tool_calls import Call

Schema = Mapping[str, Any]
PROBLEM = "problem"
"""The parameter that is filled in here and is not part of schemas."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Result:
    """The result of a call: a text for the model."""

    text: str
    failed: bool = False
    fits: bool = True  # the tool exists and takes these arguments


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Args:
        function: has the attribute ``bounded`` if it always ends in time; it is then called in this process.
        schema: of the function, in the form of OpenAI's API.
        takes_problem: whether it has the parameter ``problem``.
    """

    function: Callable[..., Any]
    schema: Schema
    takes_problem: bool

    @classmethod
    def of(cls, path: str) -> "Tool":
        """Find a function in the registry.

        Raises:
            ValueError: the function cannot be a tool; the message says what it lacks.
        """
        function = registry.find("tool", path)
        try:
            takes_problem = PROBLEM in inspect.signature(function).parameters
            schema = getattr(function, "schema", None) or _schema(function)
            name = schema["function"]["name"]
            if not isinstance(schema["function"]["parameters"]["properties"], Mapping) or not _NAME.fullmatch(name):
                raise ValueError(f"{name!r:.80} is no name of letters, digits, _ and -")
        except Exception as error:  # raised for its type hints or its docstring
            why = registry.error_in_a_line(error).partition(": ")[2].partition(" (chat_template")[0]
            raise ValueError(f"task.tools = {path!r}: no schema can be made of it: {why}; give each argument a type "
                             "and, under Args: in the docstring, a line \"name: what it is\"") from None  # fmt: skip
        return cls(function, schema, takes_problem)

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])

    def misfit(self, arguments: Mapping[str, Any]) -> str:
        """Return why the tool does not take these arguments; "" if it does."""
        parameters = self.schema["function"]["parameters"]
        known = parameters["properties"]
        for name, value in arguments.items():
            if name not in known:
                return f"{self.name} takes no {name!r:.40}, but {', '.join(known) or 'nothing'}"
            if not fits(value, known[name]):
                return f"{name} = {_shown(value)} is not {_wanted(known[name])}"
        missing = [name for name in parameters.get("required", ()) if name not in arguments]
        return f"{self.name} needs {' and '.join(missing)}" if missing else ""


def _schema(function: Callable[..., Any]) -> Schema:
    """Return the schema that transformers derives from the function, without the parameter ``problem``."""
    from transformers.utils import get_json_schema  # takes seconds: it imports PyTorch, for types of audio and images

    signature, hints = inspect.signature(function), typing.get_type_hints(function)

    def shown() -> None: ...

    stand_in: Any = types.FunctionType(shown.__code__, {}, getattr(function, "__name__", type(function).__name__))
    stand_in.__doc__ = function.__doc__
    stand_in.__annotations__ = {name: hint for name, hint in hints.items() if name not in (PROBLEM, "return")}
    kept = [one for name, one in signature.parameters.items() if name != PROBLEM]
    if any(one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in kept):
        raise TypeError("arguments are given by name; *args, **kwargs and positional-only ones cannot be")
    for one in kept:
        _check_hint(one.name, hints.get(one.name, Any))
    stand_in.__signature__ = signature.replace(parameters=kept)
    made: Schema = get_json_schema(stand_in)
    return made


def _check_hint(name: str, hint: Any) -> None:
    """Raises TypeError if a type has values that JSON does not have, such as those of a dataclass or an enum."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        parts = parts[:1]
    elif origin is typing.Literal:
        parts = ()
    elif (origin or hint) not in _OF_JSON and not typing.is_typeddict(hint):
        shown = hint if origin else getattr(hint, "__name__", hint)
        raise TypeError(f"{name}: {shown} is not a type of JSON's values; {_JSON_TYPES}")
    for part in parts:
        _check_hint(name, part)


_OF_JSON = (str, int, float, bool, None, types.NoneType, Any, list, tuple, dict, typing.Union, types.UnionType, ...)
_JSON_TYPES = "use str, int, float, bool, None, list, tuple, dict, Literal, or unions of these"


# --- arguments --------------------------------------------------------------------------------------------------------

_KINDS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}


def fits(value: Any, schema: Schema) -> bool:
    """Whether a value matches a schema of ``get_json_schema``; unknown parts of a schema are not checked."""
    if value is None and schema.get("nullable"):
        return True
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_KINDS.get(kind, lambda _: True)(value) for kind in kinds):
        return False
    if "enum" in schema and not any(type(one) is type(value) and one == value for one in schema["enum"]):
        return False
    if isinstance(value, list):
        firsts = schema.get("prefixItems")
        if firsts is not None:
            return len(value) == len(firsts) and all(map(fits, value, firsts))
        return all(fits(one, schema.get("items", {})) for one in value)
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), Mapping):
        return all(fits(one, schema["additionalProperties"]) for one in value.values())
    return True


def _wanted(schema: Schema) -> str:
    if "enum" in schema:
        return f"one of {', '.join(map(_shown, schema['enum']))}"
    kind = schema.get("type", "of the right type")
    return kind if isinstance(kind, str) else " or ".join(kind)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


# --- calls ------------------------------------------------------------------------------------------------------------


class Toolbox:
    """The tools of an environment.

    Args:
        paths: as in ``task.tools``.

    Raises:
        ValueError: one cannot be a tool, or two have the same name.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.tools: dict[str, Tool] = {}
        for path in paths:
            tool = Tool.of(path)
            if tool.name in self.tools:
                raise ValueError(f"task.tools = {path!r}: several are called {tool.name}; rename one")
            self.tools[tool.name] = tool

    @property
    def schemas(self) -> list[Schema]:
        return [tool.schema for tool in self.tools.values()]

    def run(self, call: Call, problem: Problem, seconds: float) -> Result:
        """Make a call; if anything goes wrong, the result's text says so.

        Args:
            problem: for tools that use it.
            seconds: time limit of the call.
        """
        tool = self.tools.get(call.name)
        if tool is None:
            return Result(f"no tool is called {call.name!r:.60}; there are {', '.join(self.tools)}", True, fits=False)
        if why := tool.misfit(call.arguments):
            return Result(why, True, fits=False)
        further_arguments: dict[str, Any] = {PROBLEM: problem} if tool.takes_problem else {}
        if getattr(tool.function, "bounded", False):
            if "seconds" in inspect.signature(tool.function).parameters:
                further_arguments["seconds"] = seconds
            try:
                return Result(str(tool.function(**call.arguments, **further_arguments)))
            except ValueError as error:
                return Result(str(error), True)
        reply = call_in_child(functools.partial(_called, tool.function, call.arguments, further_arguments), seconds)
        failure = reply.get("failure")
        return Result(str(reply["value"])) if failure is None else Result(failure, True)


def _called(function: Callable[..., Any], arguments: Mapping[str, Any], further_arguments: Mapping[str, Any]) -> str:
    value = function(**arguments, **further_arguments)
    if inspect.isawaitable(value):
        value = asyncio.run(_awaited(value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


async def _awaited(value: Any) -> Any:
    return await value


# --- tools that are built in ------------------------------------------------------------------------------------------


def _bounded(name: str, description: str, parameter: str, meaning: str) -> Callable[[Any], Any]:
    """A tool that is called in this process with one text argument. Its schema is as transformers would derive it."""
    parameters = {
        "type": "object", "properties": {parameter: {"type": "string", "description": meaning}},
        "required": [parameter],
    }  # fmt: skip
    schema = {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}

    def put(function: Any) -> Any:
        function.schema, function.bounded = schema, True
        return function

    return put


@_bounded(
    "calculator", "Return the value of an arithmetic expression.", "expression",
    "Numbers, + - * / // % ** and parentheses.",
)  # fmt: skip
def calculator(expression: str) -> str:
    return in_words(evaluate(expression))


@_bounded("lookup", "Return what a table says about a key.", "key", "What to look up, by its exact name.")
def lookup(key: str, problem: Problem) -> str:
    """Look into the column ``table`` of the problem, an object or its JSON; case and surplus space do not count."""
    table = further(problem)[0].get("table")
    if isinstance(table, str):
        try:
            table = json.loads(table)
        except ValueError:
            table = None
    if not isinstance(table, Mapping):
        raise ValueError("there is no table to look into")
    found = {_plain(str(name)): value for name, value in table.items()}
    if _plain(key) not in found:
        raise ValueError(f"the table has nothing about {key!r:.60}")
    value = found[_plain(key)]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _plain(key: str) -> str:
    return " ".join(key.split()).casefold()


@_bounded("python", "Run a Python program and return what it prints.", "code", "The program.")
def python(code: str, seconds: float = 5.0) -> str:
    """Run in the sandbox: without files, sockets and processes, with the standard library."""
    ran = sandbox().run(code, limits=Limits(wall_s=seconds, cpu_s=seconds, memory_mb=1024))
    lines = ran.output.strip()
    if ran.stopped:
        raise ValueError(f"the program was stopped: {ran.stopped}")
    if ran.returncode:
        raise ValueError(lines.splitlines()[-1] if lines else f"the program ended with exit code {ran.returncode}")
    return lines or "(nothing was printed)"


@functools.cache
def sandbox() -> Sandbox:
    """The sandbox of this process, started.

    Raises:
        NoSandboxError: the kernel cannot confine a program.
    """
    made = Sandbox()
    made.start()
    return made
