"""Types of settings with their limits, and the lines that refuse wrong values.

    lr: Rate = 1e-4                         # above 0 and at most 1; never NaN or infinite
    refusals(error, schemas, values)        # {"rl.lr": "rl.lr = -1: out of range; use a number above 0 and at most 1"}

Numbers are strict: text and True are not accepted as numbers.
"""

import contextlib
import difflib
from collections.abc import Hashable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)


class Branch(BaseModel):
    """A group of settings; frozen, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


MOST = 2**31 - 1
"""The largest whole number that a setting may have: the largest int of the C libraries underneath."""
_ITEM = TypeVar("_ITEM", bound=Hashable)


def _different(items: tuple[_ITEM, ...]) -> tuple[_ITEM, ...]:
    twice = [item for index, item in enumerate(items) if item in items[:index]]
    if twice:
        raise ValueError(f"{twice[0]!r} twice; give each once")
    return items


def _as_names(value: Any) -> Any:
    return ((value,) if value else ()) if isinstance(value, str) else value


Count = Annotated[int, Field(strict=True, ge=1, le=MOST)]
Whole = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Seed = Whole
Layers = Annotated[int, Field(strict=True, ge=1, le=1024)]
Tokens = Annotated[int, Field(strict=True, ge=1, le=2**24)]
Processes = Annotated[int, Field(strict=True, ge=1, le=65_536)]
"""A number of processes, of threads, or of one process's GPUs."""

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Finite, Field(gt=0)]
NonNegative = Annotated[Finite, Field(ge=0)]
Rate = Annotated[Finite, Field(gt=0, le=1)]
"""A learning rate."""
Temperature = Annotated[Finite, Field(ge=0.01, le=100)]
"""The lower limit is vLLM's; logits divided by a much smaller temperature would overflow."""
Share = Annotated[Finite, Field(ge=0, le=1)]
Worth = Annotated[Finite, Field(ge=-1e6, le=1e6)]
"""A reward, or the weight of a reward."""
PositiveShare = Annotated[Finite, Field(gt=0, le=1)]
Decay = Annotated[Finite, Field(ge=0, lt=1)]
"""The decay of a running mean; with 1 it would never forget."""
Seconds = Annotated[Finite, Field(gt=0, le=1e8)]
"""A waiting time that operating systems accept: up to three years."""

Name = Annotated[str, Field(min_length=1)]
Unique = Annotated[tuple[_ITEM, ...], AfterValidator(_different)]
Names = Annotated[Unique[Name], BeforeValidator(_as_names)]
"""Names; a single name needs no list, and "" means none."""
Trackers = Annotated[Unique[Literal["mlflow", "tensorboard", "wandb"]], BeforeValidator(_as_names)]
Some = Annotated[tuple[_ITEM, ...], Field(min_length=1), AfterValidator(_different)]


def wanted(schema: Mapping[str, Any]) -> str:
    """A field's JSON schema in words: "a number above 0", "one of reward, loss"."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(wanted(option) for option in schema["anyOf"]))
    choices = _choices(schema)
    kind = schema.get("type")
    if kind == "array" and "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} values, each {wanted(schema['prefixItems'][0])}"
    if kind == "array":
        each = f"{', '.join(choices)}" if choices else wanted(schema["items"])
        return f"{'one or more' if schema.get('minItems') else 'none or more'} of: {each}"
    if choices:
        return f"one of {', '.join(choices)}"
    if kind == "object":
        named = _choices(schema.get("propertyNames", {}))
        each = wanted(schema["additionalProperties"])
        return f"{each} for each of {', '.join(named)}" if named else f"pairs of a name and {each}"
    if kind in ("integer", "number"):
        return _number(schema, "a whole number" if kind == "integer" else "a number")
    return {"boolean": "True or False", "null": "None"}.get(str(kind), "a name" if "minLength" in schema else "text")


def _number(schema: Mapping[str, Any], noun: str) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high not in (None, MOST):
        return f"{noun} from {low:.9g} to {high:.9g}"
    words = [f"of at least {low:.9g}"] if low is not None else [f"above {above:.9g}"] if above is not None else []
    words += [f"at most {high:.9g}"] if high not in (None, MOST) else [f"below {below:g}"] if below is not None else []
    return " ".join([noun, " and ".join(words)]).strip()


def _choices(schema: Mapping[str, Any]) -> list[str]:
    inner = schema.get("items", {}) if schema.get("type") == "array" else schema
    return [str(choice) for choice in inner.get("enum", [inner["const"]] if "const" in inner else [])]


_WHY = {
    "finite_number": "not finite",
    "greater_than": "out of range",
    "greater_than_equal": "out of range",
    "less_than": "out of range",
    "less_than_equal": "out of range",
    "literal_error": "unknown",
    "too_short": "too few",
    "too_long": "too many",
    "missing": "too few",
    "string_too_short": "empty",
}
"""pydantic's types of errors in words, the most telling first; all others are values of the wrong kind."""


def refusals(error: ValidationError, schemas: Mapping[str, Mapping[str, Any]], tree: Any) -> dict[str, str]:
    """A line for each wrong field: ``field = value: why; fix``.

    Args:
        schemas: JSON schemas of all dotted fields.
        tree: the settings that were validated, whose values are quoted.
    """
    found: dict[str, list[Any]] = {}
    for one in error.errors():
        found.setdefault(_field(one["loc"], schemas), []).append(one)
    return {field: _line(field, ones, schemas, tree) for field, ones in found.items()}


def refusal(field: str, value: object, annotation: Any) -> str:
    """The refusal of a value that does not fit a type and its limits; empty if it fits."""
    try:
        adapter = TypeAdapter(annotation)
    except PydanticUserError:  # a user's own class: nothing is known about its values
        return ""
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        why = _WHY.get(error.errors()[0]["type"], "of the wrong kind")
        return f"{field} = {value!r}: {why}; use {wanted(adapter.json_schema())}"
    return ""


def _field(loc: tuple[int | str, ...], schemas: Mapping[str, Any]) -> str:
    """The dotted field at an error's location, with the key if the field is a dictionary."""
    names = [".".join(map(str, loc[:length])) for length in range(len(loc), 0, -1)]
    field = next((name for name in names if name in schemas), names[0])
    rest = loc[field.count(".") + 1 :]
    return f"{field}.{rest[0]}" if rest and schemas.get(field, {}).get("type") == "object" else field


def _line(field: str, errors: list[Any], schemas: Mapping[str, Mapping[str, Any]], tree: Any) -> str:
    order = list(_WHY)
    error = min(errors, key=lambda one: order.index(one["type"]) if one["type"] in order else len(order))
    schema = schemas.get(field) or schemas[field.rpartition(".")[0]]
    if field not in schemas:  # one entry of a dictionary
        names = _choices(schema.get("propertyNames", {}))
        schema = schema["additionalProperties"]
        if error["loc"][-1] == "[key]":
            given = str(error["loc"][-2])
            return f"{field} = {_at(tree, field)!r}: {nearest(given, names, 'no such name')}"
    value = _at(tree, field)
    if error["type"] == "value_error":
        return f"{field} = {value!r}: {error['ctx']['error']}"
    if error["type"] in ("literal_error", "enum") and isinstance(error["input"], str):
        return f"{field} = {value!r}: {nearest(error['input'], _choices(schema), 'unknown')}"
    return f"{field} = {value!r}: {_WHY.get(error['type'], 'of the wrong kind')}; use {wanted(schema)}"


def literal(word: str) -> int | float | str | bool | None:
    """Convert a word to the number, truth value or None that it spells; any other word is returned unchanged."""
    known: dict[str, bool | None] = {"True": True, "true": True, "False": False, "false": False, "None": None}
    if word in known:
        return known[word]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(word)
    return word


def nearest(given: str, known: list[str], why: str) -> str:
    """``why; fix`` for a name that is not among the known ones."""
    near = [name for name in known if given and given in name] or difflib.get_close_matches(given, known, cutoff=0.5)
    return f"{why}; did you mean {near[0]}?" if near else f"{why}; use one of {', '.join(known)}"


def _at(tree: Any, field: str) -> Any:
    for name in field.split("."):
        tree = tree[name]
    return tree
