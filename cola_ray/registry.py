"""Everything that a setting can name, built in or your own: one registry, by kind.

    @cola_ray.register("advantage", "median")        # in a file of your own, median.py
    def over_the_median(prompts): ...

    cola_ray rl --rl.advantage median.py:median      # a name that the file registers, or an attribute of it
    cola_ray rl --rl.advantage my.package:median     # the same in a module that can be imported

    find("advantage", "grpo")                        # the function, from any of these places

A name is looked up in this order: registrations in this process; the project's own (``BUILT_IN``, in the same notation,
imported on first use); entry points of installed packages, in the group ``cola_ray.tasks``, ``cola_ray.advantages`` and
so on; and ``package.module:name`` or ``file.py:name``. ``gymnasium:ID`` is an environment that is registered with
gymnasium.

A file is imported as a module with the file's name, with its folder on ``sys.path``. On a cluster Ray copies the file
to every node (:func:`files`), where it has the same module name; what it imports must be installed there, so a file
either stands alone or belongs to a package.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

Kind = Literal["algorithm", "advantage", "loss", "task", "environment", "reward", "tool", "base"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Found = TypeVar("Found")

BUILT_IN: dict[Kind, dict[str, str]] = {
    "algorithm": {
        name: f"cola_ray.settings.algorithms:{name.upper()}"
        for name in ("grpo", "rloo", "remax", "reinforce", "gigpo", "ppo", "etpo", "tbrm", "archer", "archer_soft",
                     "chai", "filtered_bc")
    },
    "advantage": {
        name: f"cola_ray.algorithms.{name}:advantages" for name in ("grpo", "rloo", "remax", "reinforce")
    },
    "loss": {
        "ppo": "cola_ray.algorithms.policy_loss:clipped_policy_gradient",
        "gspo": "cola_ray.algorithms.gspo:sequence_policy_gradient",
        "cispo": "cola_ray.algorithms.cispo:clipped_weight_policy_gradient",
    },
    "task": {
        "arithmetic": "cola_ray.tasks.verifiable:Arithmetic",
        "gsm8k": "cola_ray.tasks.verifiable:Gsm8k",
        "math500": "cola_ray.tasks.verifiable:Math500",
        "instructions": "cola_ray.tasks.instructions:Instructions",
        "preference": "cola_ray.tasks.preference:Preference",
        "dataset": "cola_ray.tasks.dataset:Dataset",
    },
    "environment": {
        "twenty_questions": "cola_ray.tasks.guessing:TwentyQuestions",
        "guess_city": "cola_ray.tasks.guessing:GuessCity",
        "textworld": "cola_ray.tasks.adventures:TextWorld",
        "jericho": "cola_ray.tasks.adventures:Jericho",
        "data_science": "cola_ray.tasks.data_science:DataScience",
        "shop": "cola_ray.tasks.shop:Shop",
        "household": "cola_ray.tasks.household:Household",
        "program": "cola_ray.tasks.program:Program",
        "tools": "cola_ray.tasks.tools:Tools",
    },
    "reward": {
        "verifier": "cola_ray.tasks.rewards:Verifier",
        "reward_model": "cola_ray.tasks.rewards:ByModel",
        "exact": "cola_ray.tasks.rewards:exact",
        "math": "cola_ray.tasks.rewards:math",
        "format": "cola_ray.tasks.rewards:think_and_answer",
        "regex": "cola_ray.tasks.rewards:Regex",
        "length": "cola_ray.tasks.rewards:Length",
        "code": "cola_ray.tasks.rewards:Code",
    },
    "tool": {name: f"cola_ray.tasks.toolbox:{name}" for name in ("calculator", "lookup", "python")},
    "base": {
        name: f"cola_ray.model.families:{name.upper()}"
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "smollm3")
    },
}  # fmt: skip
"""By kind and name, the place as ``module:name``."""


GYMNASIUM = "gymnasium:"


class NotFoundError(LookupError):
    """There is nothing under a name; the message is ``why; fix``."""


@dataclass(frozen=True)
class _Call:
    """How the project calls a kind: the arguments' names, and the page that explains them."""

    arguments: tuple[str, ...]
    page: str = "docs/extending.md"


_CALLS: dict[Kind, _Call] = {
    "advantage": _Call(("prompts",)),
    "loss": _Call(("log_probs", "old_log_probs", "advantages", "mask")),
    "task": _Call(("config", "seed")),
    "reward": _Call(("problem", "response"), "docs/data.md"),
}
_BATCH_ONLY = ("completions", "completion_ids", "completions_ids")
_REGISTERED: dict[tuple[Kind, str], Any] = {}
_MODULE_OF: dict[tuple[Kind, str], str] = {}


def register(kind: Kind, name: str) -> Callable[[Found], Found]:
    """Put a function, a class or an instance into the registry; returns it unchanged.

    Args:
        kind: algorithm, advantage, loss, task, environment, reward, tool or base.
        name: the name in settings, after ``file.py:`` or ``package.module:`` if the file has not been imported before.

    Raises:
        ValueError: there is no such kind, the name has a colon, or the project itself has something of this name.

    Example:
        >>> from cola_ray.registry import find, register
        >>> @register("reward", "short")
        ... def short(problem, response):
        ...     return 1.0 if len(response) < 20 else 0.0
        >>> find("reward", "short")("How long?", "Not long.")
        1.0
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: unknown; use one of {', '.join(KINDS)}")
    if ":" in name or not name:
        raise ValueError(f"name = {name!r}: a plain name is wanted, without a colon")
    if name in BUILT_IN[kind]:
        raise ValueError(f"name = {name!r}: the project has {_a(kind)} of this name; choose another")

    module = str(sys._getframe(1).f_globals.get("__name__", ""))

    def put(found: Found) -> Found:
        _REGISTERED[kind, name] = found
        _MODULE_OF[kind, name] = module
        return found

    return put


def find(kind: Kind, name: str) -> Any:
    """Return what settings name. Built-in objects are imported now, with their dependencies.

    Raises:
        NotFoundError: there is nothing of this name, or importing it failed.
    """
    if (kind, name) in _REGISTERED:
        return _REGISTERED[kind, name]
    if name in BUILT_IN[kind]:
        module, _, attribute = BUILT_IN[kind][name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if kind in ("task", "environment") and name.startswith(GYMNASIUM):
        return importlib.import_module("cola_ray.tasks.gymnasium_ids").registered(name.removeprefix(GYMNASIUM))
    if ":" in name:
        return _imported(kind, name)
    entry = _entry_points(kind).get(name)
    if entry is None:
        raise NotFoundError(_unknown(kind, name))
    try:
        return entry.load()
    except (Exception, SystemExit) as error:  # raised by the package's own code
        raise NotFoundError(f"importing {entry.value} raised {error_in_a_line(error)}; fix it there") from None


def names(kind: Kind) -> list[str]:
    """All names of a kind that need no import path, the project's own first."""
    registered = [name for of, name in _REGISTERED if of == kind]
    return list(dict.fromkeys([*BUILT_IN[kind], *registered, *_entry_points(kind)]))


def why_not(kind: Kind, name: str) -> str:
    """Why nothing of this kind can be called under this name, as ``why; fix``; empty if it can.

    Finds (and so imports) it, and reads its signature; nothing is called.
    """
    try:
        found = find(kind, name)
    except NotFoundError as error:
        return str(error)
    call = _CALLS.get(kind)
    if not callable(found):
        kind_of = type(found).__name__
        return "" if call is None else f"{_last(name)} is {kind_of}, not a function or a class; name one that is called"
    if call is None or name in BUILT_IN[kind] or (kind == "reward" and takes_batches(found)):
        return ""
    try:
        inspect.signature(found).bind(*call.arguments)
    except TypeError as error:
        wanted = ", ".join(call.arguments)
        return f"{_last(name)} is called with ({wanted}), and {error}; {call.page} has an example"
    except ValueError:  # no signature to read
        pass
    return ""


def takes_batches(reward: Callable[..., Any]) -> bool:
    """Whether a reward function takes prompts, completions and columns as lists, as TRL's do.

    The names in its signature decide: ``completions``, or only ``**columns``, with or without ``prompts``. All other
    functions are called with one problem and one response.

    Example:
        >>> takes_batches(lambda completions, **columns: [0.0] * len(completions))
        True
        >>> takes_batches(lambda problem, response: 0.0)
        False
    """
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # no signature to read
        return False
    if any(name in parameters for name in _BATCH_ONLY):
        return True
    others = [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD]
    return len(others) < len(parameters) and set(others) <= {"prompts"}


def is_path(name: str) -> bool:
    """Whether a name gives its place: ``package.module:name`` or ``file.py:name``."""
    return ":" in name


def files(given: Iterable[str]) -> list[str]:
    """Files among names, as absolute paths: those that the nodes of a cluster need a copy of.

    Example:
        >>> files(["grpo", "json:loads"])
        []
    """
    paths = (Path(name.rpartition(":")[0]) for name in given if _is_file(name))
    return list(dict.fromkeys(str(path.resolve()) for path in paths if path.is_file()))


def error_in_a_line(error: BaseException) -> str:
    """Type, message and place of an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}{where}"


def _is_file(name: str) -> bool:
    return is_path(name) and name.rpartition(":")[0].endswith(".py")


def _last(name: str) -> str:
    return name.rpartition(":")[2]


def _imported(kind: Kind, name: str) -> Any:
    where, _, attribute = name.rpartition(":") if _is_file(name) else name.partition(":")
    module = _module_of_file(Path(where)) if _is_file(name) else where
    try:
        there = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise NotFoundError(f"{error}; the module must be importable from where the job starts") from None
    except (Exception, SystemExit) as error:  # raised by the module's own code
        raise NotFoundError(f"importing {where} raised {error_in_a_line(error)}; fix it there") from None
    if _MODULE_OF.get((kind, attribute)) == module:
        return _REGISTERED[kind, attribute]
    found = getattr(there, attribute, None)
    if found is None:
        raise NotFoundError(f"{where} has no {attribute}")
    return found


def _module_of_file(path: Path) -> str:
    """Put the file's folder on ``sys.path`` unless Ray has put a copy there; returns the module's name."""
    name = path.stem
    if not name.isidentifier():
        raise NotFoundError(f"{path.name} cannot be imported, for {name!r} is no name in Python; rename the file")
    known = sys.modules.get(name)
    spec = getattr(known, "__spec__", None) if known is not None else importlib.util.find_spec(name)
    if not path.is_file():
        if spec is None:
            raise NotFoundError(f"no such file {path}; give its path from where the job starts")
        return name
    if spec is None:
        sys.path.append(str(path.resolve().parent))
        importlib.invalidate_caches()
    elif not _is_copy(Path(spec.origin or ""), path):
        raise NotFoundError(f"Python has another module {name!r} ({spec.origin}); rename the file {path}")
    return name


def _is_copy(known: Path, path: Path) -> bool:
    """Whether a module's file is this one, or Ray's copy of it."""
    return known.is_file() and (known.resolve() == path.resolve() or known.read_bytes() == path.read_bytes())


@functools.cache
def _entry_points(kind: Kind) -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=f"cola_ray.{kind}s")}


def _unknown(kind: Kind, name: str) -> str:
    if name.endswith(".py"):
        return f"a file; name what in it is meant, as {name}:NAME"
    near = difflib.get_close_matches(name, names(kind), 1)
    if near:
        return f"unknown {kind}; did you mean {near[0]}?"
    known = ", ".join(names(kind))
    own = f"your own as package.module:name or file.py:name, see {_CALLS.get(kind, _Call(())).page}"
    return f"unknown {kind}; use one of {known}, or {own}" if known else f"unknown {kind}; use {own}"


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
