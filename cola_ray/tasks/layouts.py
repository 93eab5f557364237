"""Reads prompt and solution from a row of data: the layouts that are known without a mapping.

    read(row, columns) ─> Example(prompt, solution, response, columns of the row)

    | columns                                            | layout                              |
    | -------------------------------------------------- | ----------------------------------- |
    | prompt, with completion or without                 | TRL's, text or chat messages        |
    | prompt, reward_model.ground_truth                  | verl's                              |
    | prompt, completion, label                          | TRL's unpaired preferences          |
    | chosen, rejected, with prompt or without           | TRL's preferences                   |
    | messages, or conversations (from, value)           | chats; last message is the response |
    | question, answer; problem, solution, answer        | GSM8K's and MATH's                  |
    | instruction, input, output                         | Alpaca's                            |

If a row has several of these names, the first one in :data:`PROMPTS` or :data:`SOLUTIONS` counts. ``columns`` maps
prompt, solution, response and system to other names; a dot selects a field of an object. Roles, system prompts and
few-shot turns are kept.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cola_ray.tasks.chat import Prompt, as_prompt, as_question
from cola_ray.tasks.preference import as_pair
from cola_ray.tasks.rows import Row, plain_text, shown

PROMPTS = ("prompt", "messages", "conversations", "question", "problem", "instruction", "query")
SOLUTIONS = ("reward_model.ground_truth", "ground_truth", "answer", "solution", "target", "completion", "response",
             "output")  # fmt: skip
RESPONSES = ("response", "completion", "output", "solution")
SYSTEM = ("system", "system_prompt")
_SAID = ("messages", "conversations")  # whole conversations
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
_READ = TypeVar("_READ")


@dataclass(frozen=True)
class Example:
    """What was read from a row."""

    prompt: Prompt
    solution: str  # the right answer, for rewards; "" if the row has none
    response: str  # a first policy is cloned from it; "" if there is none
    row: Row
    found_in: Mapping[str, str]  # the columns of prompt, solution, response and system, if they exist


def read(row: Row, columns: Mapping[Any, str]) -> Example:
    """Read a row.

    Args:
        row: a row of the data.
        columns: names of the columns of prompt, solution, response and system that are not recognised.

    Raises:
        ValueError: names the field that is missing or wrong.
    """
    found = dict(columns)
    prompt, said = _asked(row, found)
    system = _system(row, found)
    if system and not (not isinstance(prompt, str) and prompt[0]["role"] == "system"):
        asked = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
        prompt = ({"role": "system", "content": system}, *asked)
    wrong = row.get("label") is False and "completion" in row
    solution, response = _solution(row, found, wrong), _response(row, found, wrong)
    response = response or said or solution
    if not solution and said and "rejected" not in row:
        solution, found["solution"] = said, found["prompt"]
    return Example(prompt, solution, response, row, found)


def _asked(row: Row, found: dict[str, str]) -> tuple[Prompt, str]:
    """Return the prompt, and the response to it that the same columns contain."""
    if "prompt" not in found and "chosen" in row and "rejected" in row:
        pair = as_pair(row)
        found["prompt"] = "prompt" if row.get("prompt") is not None else "chosen and rejected"
        return pair.prompt, pair.chosen
    name = found.get("prompt") or _first(row, PROMPTS)
    empty = next((one for one in PROMPTS if one in row), None) if name is None else None
    if empty is not None:
        raise ValueError(f"field {empty}: null; text or chat messages are expected")
    if name is None:
        raise ValueError(f"no prompt: the row has {', '.join(row) or 'nothing'}; name its column with task.columns "
                         "prompt NAME")  # fmt: skip
    found["prompt"] = name
    if name in _SAID or (name != "prompt" and _is_conversation(_value(row, name))):
        return _cell(row, name, _conversation)
    prompt = _cell(row, name, as_question)
    if name == "instruction" and isinstance(prompt, str) and isinstance(row.get("input"), str) and row["input"].strip():
        prompt = f"{prompt}\n\n{row['input']}"
    return prompt, ""


def _is_conversation(value: Any) -> bool:
    last = value[-1] if isinstance(value, list | tuple) and value else None
    return isinstance(last, Mapping) and last.get("role", last.get("from")) in ("assistant", "gpt")


def _conversation(value: object) -> tuple[Prompt, str]:
    """Return the messages before the assistant's final one, and its text; all and "" if the assistant is not last."""
    messages = value if not isinstance(value, list | tuple) else [_as_message(one) for one in value]
    read = as_prompt(messages)
    if isinstance(read, str):
        raise ValueError(f"{shown(value)}; a list of chat messages is expected")
    if read[-1]["role"] != "assistant":
        return as_question(read), ""
    if len(read) == 1:
        raise ValueError("there is no message before the assistant's")
    return as_question(read[:-1]), read[-1]["content"]


def _as_message(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("role") is None and "from" in value:
        return {"role": _ROLES.get(value["from"], value["from"]), "content": value.get("value")}
    return value


def _system(row: Row, found: dict[str, str]) -> str:
    name = found.get("system") or _first(row, SYSTEM)
    if name is None:
        return ""
    found["system"] = name
    return _cell(row, name, _text)


def _solution(row: Row, found: dict[str, str], wrong: bool) -> str:
    name = found.get("solution") or _first(row, SOLUTIONS if not wrong else SOLUTIONS[:5])
    if name is None:
        return ""
    found["solution"] = name
    return _cell(row, name, _text if name != "completion" else _message)


def _response(row: Row, found: dict[str, str], wrong: bool) -> str:
    name = found.get("response") or _first(row, () if wrong else RESPONSES)
    if name is None:
        return ""
    found["response"] = name
    return _cell(row, name, _message)


def _text(value: object) -> str:
    """Text, a number as text, or other data as JSON; "" for null."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else plain_text(value)


def _message(value: object) -> str:
    """Text, or the text of a list with one message of the assistant; "" for null."""
    said = _text(value) if value is None or isinstance(value, str | int | float) else as_prompt(value)
    if isinstance(said, str):
        return said
    if len(said) != 1 or said[0]["role"] != "assistant":
        raise ValueError(f"{len(said)} messages; one of the assistant is expected")
    return str(said[0]["content"])


def _first(row: Row, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if _value(row, name) is not None), None)


def _value(row: Row, name: str) -> Any:
    """The value of a column, or of a field of an object in a column; None if there is none."""
    value: Any = row
    for part in [name] if name in row else name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _cell(row: Row, name: str, read: Callable[[Any], _READ]) -> _READ:
    value = _value(row, name)
    if value is None and name not in row and name.split(".")[0] not in row:
        raise ValueError(f"field {name}: missing; the row has {', '.join(row) or 'nothing'}")
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"field {name}: {error}") from None
