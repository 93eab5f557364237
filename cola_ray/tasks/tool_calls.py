"""How models write tool calls: a table of formats, each of which can be parsed, described to a model, and written.

    hermes        <tool_call>{"name": "lookup", "arguments": {"key": "x"}}</tool_call>     Hermes, Qwen
    llama3_json   <|python_tag|>{"name": "lookup", "parameters": {"key": "x"}}; {...}      Llama 3, with the tag or not
    json          {"name": "lookup", "arguments": {"key": "x"}}                            alone, in lines, or a list

    calls_in(text, format) ─> [Call("lookup", {"key": "x"}), Malformed("not JSON: ..."), ...];  []: there is no call

A text that begins like a call but cannot be parsed becomes :class:`Malformed`, which says what is wrong. Only strict
JSON is accepted: no NaN, no name twice in one object. The formats have the names of vLLM's parsers. Those cannot be
used here: importing one imports vLLM into every environment process, and they do not report calls that they cannot
parse.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ANY = ""
"""Stands for any format: the first one found, in the order of :data:`FORMATS`."""


@dataclass(frozen=True)
class Call:
    """A call that could be parsed; whether the tool exists and takes these arguments is checked elsewhere."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Malformed:
    """A text that begins like a call but is not a valid one."""

    why: str


@dataclass(frozen=True)
class Format:
    """One way of writing calls.

    Args:
        finds: matches each stretch of JSON, as group 1.
        arguments: the name of the arguments' field in written calls; when reading, any of :data:`_ARGUMENTS`.
        template: one written call, with {} for the JSON.
        between: the text between several calls.
    """

    finds: re.Pattern[str]
    arguments: str
    template: str
    between: str

    def write(self, calls: Sequence[Call]) -> str:
        written = (json.dumps({"name": one.name, self.arguments: one.arguments}, ensure_ascii=False) for one in calls)
        return self.between.join(self.template.replace("{}", one) for one in written)

    @property
    def instruction(self) -> str:
        """One line on how to write a call."""
        return self.template.replace("{}", f'{{"name": <name>, "{self.arguments}": <object of arguments>}}')


FORMATS: dict[str, Format] = {
    "hermes": Format(
        re.compile(r"<tool_call>(.*?)(?=</tool_call>|<tool_call>|\Z)", re.DOTALL),
        "arguments", "<tool_call>{}</tool_call>", "\n",
    ),
    "llama3_json": Format(
        re.compile(r"\A\s*(?:<\|python_tag\|>(.*)|(?=\{)(.*))", re.DOTALL), "parameters", "{}", "; "
    ),
    "json": Format(re.compile(r"\A\s*(?=\{|\[\s*\{)(.*)", re.DOTALL), "arguments", "{}", "\n"),
}  # fmt: skip
_ARGUMENTS = ("arguments", "parameters")
_BETWEEN = re.compile(r"[\s;]*")


def without_thoughts(text: str) -> str:
    """What a model says after its thoughts; nothing if they do not end: "<think>2 + 2?</think>4" -> "4"."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def calls_in(text: str, format_name: str = ANY) -> list[Call | Malformed]:
    """Return the calls in a text in their order; [] if there are none.

    Args:
        text: what a model has said; its thoughts are not searched.
        format_name: one of :data:`FORMATS`, or :data:`ANY`.
    """
    said = without_thoughts(text)
    for one in [FORMATS[format_name]] if format_name else FORMATS.values():
        pieces = [next(group for group in found.groups() if group is not None) for found in one.finds.finditer(said)]
        if pieces:
            return [call for piece in pieces for call in _read(piece)]
    return []


def _read(piece: str) -> list[Call | Malformed]:
    """Read one stretch of JSON: an object, a list of objects, or several with space or semicolons between them."""
    found: list[Call | Malformed] = []
    place = _BETWEEN.match(piece).end()  # type: ignore[union-attr]  # it matches anything
    while place < len(piece):
        try:
            value, place = _DECODER.raw_decode(piece, place)
        except json.JSONDecodeError as error:
            return [*found, Malformed(f"not JSON: {error.msg} at character {error.pos}")]
        except RecursionError:
            return [*found, Malformed("not JSON that can be read: nested too deeply")]
        except ValueError as error:  # from the decoder's hooks, or for a number with too many digits
            return [*found, Malformed(f"not JSON that can be read: {str(error)[:100]}")]
        found += [_call(one) for one in (value if isinstance(value, list) else [value])]
        place = _BETWEEN.match(piece, place).end()  # type: ignore[union-attr]
    return found or [Malformed("empty; an object with name and arguments is expected")]


def _call(value: Any) -> Call | Malformed:
    if not isinstance(value, dict):
        return Malformed(f"{json.dumps(value)[:40]} is not an object with name and arguments")
    name = value.get("name")
    if not isinstance(name, str):
        return Malformed("the call has no name" if name is None else "the call's name is not text")
    arguments: Any = next((value[field] for field in _ARGUMENTS if field in value), {})
    if not isinstance(arguments, dict):
        return Malformed("the call's arguments are not an object")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return Malformed("the call holds half a character, or is nested too deeply")
    return Call(name, arguments)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice in one object")
    return found


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite, parse_constant=_no_constant)


# --- telling a model --------------------------------------------------------------------------------------------------


def told(tools: Sequence[Mapping[str, Any]], format_name: str = ANY) -> str:
    """Return a plain-text description of tools for a model, used if no chat template describes them.

    Args:
        tools: schemas in the form of OpenAI's API.
        format_name: of the calls; :data:`ANY` describes the last of :data:`FORMATS`, bare JSON.
    """
    functions = (tool["function"] for tool in tools)
    lines = [f"{_signature(one)}: {' '.join(str(one.get('description', '')).split())}" for one in functions]
    form: Callable[[str], Format] = FORMATS.__getitem__
    how = form(format_name or "json").instruction
    return "\n".join(
        ["You can call these tools:", *lines, f"To call one, write {how}", "Anything else is your answer."]
    )


def _signature(function: Mapping[str, Any]) -> str:
    """A function as ``lookup(key: string)``."""
    shown = (f"{name}: {_type(schema)}" for name, schema in function["parameters"]["properties"].items())
    return f"{function['name']}({', '.join(shown)})"


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(json.dumps(one, ensure_ascii=False) for one in schema["enum"])
    kind = schema.get("type", "any")
    return kind if isinstance(kind, str) else " | ".join(kind)
