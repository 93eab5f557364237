"""What a job file does: read the command line, refuse what cannot run, then import what runs it.

    main("rl_math", __doc__)                       exits with a code of ending.EXIT_CODES
    from_command_line("rl_math", argv)             ``--preset NAME`` and ``--branch.field value``, checked

All mistakes are reported together, one line each, before torch, Ray, vLLM or MLflow are imported. Values go through the
types of config.py; a later flag wins over an earlier one. An option of a dictionary is set by itself
(``--pretrain.steps.base 800``), or all of them by pairs (``--task.options objects 20 skill 0.3``).
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from cola_ray.checks.refusals import check
from cola_ray.runs import launch, provenance
from cola_ray.runs.display import current, shown, wide_console
from cola_ray.runs.ending import EXIT_CODES, RESUME, in_words
from cola_ray.runs.redaction import redacted
from cola_ray.settings import relevance
from cola_ray.settings.config import (
    Config,
    ConfigError,
    RunFailedError,
    is_environment,
    override,
    schemas,
    try_override,
    value_at,
)
from cola_ray.settings.limits import literal, wanted
from cola_ray.settings.presets import expectation, preset


@dataclass(frozen=True)
class _Job:
    """What runs it, as ``module:function`` of a Config, and the defaults that are its own."""

    run: str
    agents: bool = False
    task: str = ""


_JOBS = {
    "atlas": _Job("cola_ray.studies.atlas:atlas"),
    "capabilities": _Job("cola_ray.studies.capabilities:capabilities"),
    "diversity": _Job("cola_ray.studies.diversity:diversity"),
    "evaluate": _Job("cola_ray.studies.evaluation:evaluate"),
    "plan": _Job("cola_ray.studies.plan:show"),
    "pretrain": _Job("cola_ray.train:pretrain"),
    "reproduce": _Job("cola_ray.studies.reproduce:reproduce"),
    "reward_model": _Job("cola_ray.train:train_reward_model", task="preference"),
    "rl_agent": _Job("cola_ray.train:run_agent", agents=True),
    "rl_math": _Job("cola_ray.train:run_rl"),
    "rl_preference": _Job("cola_ray.train:run_rl", task="preference"),
    "sweep": _Job("cola_ray.studies.sweep:sweep"),
    "train_q": _Job("cola_ray.train:train_q"),
}


def main(job: str, description: str | None) -> NoReturn:
    """Parse, check, run, exit; how it ended is one line, and a code of :data:`~cola_ray.runs.ending.EXIT_CODES`."""
    code, line = 0, ""
    try:
        with in_words():
            config = _parsed(job, sys.argv[1:], description or "")
            if config is not None:
                _run(config, job)
    except ConfigError as error:
        code, line = 2, redacted(str(error))
    except RunFailedError as error:
        code, line = 1, f"the run failed: {error}"
    except KeyboardInterrupt:
        code, line = 130, f"stopped; {RESUME}"
    _leave(code, line)


def _run(config: Config, job: str) -> None:
    with shown() as display:
        for line in launch.first_lines(config, job).splitlines():
            display.say(line)
        makes_start_model = provenance.makes_start_model(config) and not provenance.is_made(
            provenance.start_model(config)
        )
        display.say(expectation(config, job, makes_start_model))
        run = _imported(_JOBS[job].run)
        run(config)


def _leave(code: int, line: str) -> NoReturn:
    """Exit, also where nobody reads what is printed any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if line and stream is sys.stderr:
                print(line, file=stream)
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _imported(name: str) -> Callable[[Config], Any]:
    current().doing("importing PyTorch, Ray and vLLM")
    module, _, function = name.partition(":")
    found: Callable[[Config], Any] = getattr(importlib.import_module(module), function)
    return found


def from_command_line(job: str, argv: Sequence[str] | None = None, description: str = "") -> Config:
    """The settings of a job; on a mistake print one line each and exit with 2, for ``--help`` explain and exit."""
    try:
        config = _parsed(job, sys.argv[1:] if argv is None else argv, description)
    except ConfigError as error:
        print(redacted(str(error)), file=sys.stderr)
        raise SystemExit(2) from None
    if config is None:
        raise SystemExit(0)
    return config


def _parsed(job: str, argv: Sequence[str], description: str) -> Config | None:
    """The settings; None where ``--help`` has been answered.

    Raises:
        ConfigError: a line for each mistake.
    """
    words = list(argv)
    given, lines = _read(words)
    defaults = _defaults(_JOBS[job], given, lines)
    if {"-h", "--help"} & set(words):
        _explain(job, description, defaults)
        return None
    config, wrong = try_override(defaults, given)
    lines |= wrong
    try:
        check(config, job)
    except ConfigError as error:
        # Beside a wrong value others are judged with its default: only what was given itself is at fault.
        said = str(error).splitlines()
        further = [line for line in said if line.split(" = ")[0] in {*given} - {*lines}] if lines else said
        raise ConfigError("\n".join([*lines.values(), *further])) from None
    if lines:
        raise ConfigError("\n".join(lines.values()))
    return config


def _defaults(job: _Job, given: Mapping[str, Any], lines: dict[str, str]) -> Config:
    """The preset that is asked for, as the job and the task want it; adds a line where there is no such preset."""
    name, task = given.get("preset", "tiny"), str(given.get("task.name", job.task))
    with contextlib.suppress(ConfigError):
        return _of_preset(name, job, task)
    _, wrong = try_override(preset("tiny"), {"preset": name})
    lines |= wrong
    return _of_preset("tiny", job, task)


def _of_preset(name: str, job: _Job, task: str) -> Config:
    defaults = preset(name, is_environment(task) if task else job.agents, task)
    return override(defaults, {"task.name": job.task}) if job.task else defaults


# --- reading ------------------------------------------------------------------------------------------------------


def _read(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Dotted fields with their values, and a line for each word that is neither."""
    given: dict[str, Any] = {}
    lines: dict[str, str] = {}
    flags = _flags()
    for flag, values in _grouped(words):
        usual = flag.replace(".no-", ".", 1).replace("--no-", "--", 1)
        negated = flag not in flags and schemas().get(flags.get(usual, ""), {}).get("type") == "boolean"
        field = flags.get(usual if negated else flag)
        if any(_is_no_text(word) for word in values):
            lines[field or flag] = f"{field or flag} = {' '.join(values)!a}: not UTF-8; give another name"
        elif not flag:
            lines[" ".join(values)] = f"{' '.join(values)}: belongs to no setting; settings are --branch.field value"
        elif field is None and flag == "--":
            lines[flag] = f"{' '.join([flag, *values])}: belongs to no setting; settings are --branch.field value"
        elif field is None:  # an option of a dictionary, or a mistake
            value = literal(values[0]) if len(values) == 1 else tuple(values)
            given[flag[2:].replace("-", "_")] = value
        else:
            value, line = _value(field, values, negated)
            given |= {} if line else {field: value}
            lines |= {field: line} if line else {}
    return given, lines


def _grouped(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag, with dashes for underscores, and the words up to the next one; first of all, words without a flag."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if word.startswith("--") or word == "-h":
            name, has_value, value = word.partition("=")
            groups.append((name.replace("_", "-"), [value] if has_value else []))
        else:
            groups[-1][1].append(word)
    return [(flag, values) for flag, values in groups if (flag or values) and flag not in ("-h", "--help")]


def _is_no_text(word: str) -> bool:
    """Bytes of a command line that are no UTF-8 come as halves of surrogate pairs, which nothing can write."""
    return any(0xD800 <= ord(character) <= 0xDFFF for character in word)


def _flags() -> dict[str, str]:
    return {"--" + field.replace("_", "-"): field for field in schemas()}


def _value(field: str, values: Sequence[str], negated: bool) -> tuple[Any, str]:
    """What a field is given by the words behind its flag; or a line, where they are too few or too many."""
    schema = schemas()[field]
    kind = schema.get("type")
    if kind == "boolean" and not values:
        return not negated, ""
    if kind == "array":
        return tuple(literal(value) if _takes_numbers(schema) else value for value in values), ""
    if kind == "object" and len(values) % 2 == 0 and values:
        return {name: literal(value) for name, value in zip(values[::2], values[1::2], strict=True)}, ""
    if len(values) == 1 and kind != "object" and not negated:
        return values[0] if kind == "string" and values[0] != "None" else literal(values[0]), ""
    said = " ".join(values) or "''"
    return None, f"{field} = {said}: {len(values)} values given; use {wanted(schema)}"


def _takes_numbers(schema: Mapping[str, Any]) -> bool:
    return "integer" in str(schema) or "number" in str(schema)


# --- explaining ---------------------------------------------------------------------------------------------------


def _explain(job: str, description: str, defaults: Config) -> None:
    """Every setting that the job reads, with its default and meaning, below the job's own words and examples."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = wide_console(log_width=120)
    console.print(Text(description.strip()))
    console.print(Text(f"\nSettings, with the defaults of --preset {defaults.preset}:"))
    fields: dict[str, list[str]] = {}
    for field in schemas():
        if relevance.reads(job, field):
            fields.setdefault(field.rpartition(".")[0], []).append(field)
    for branch, names in fields.items():
        about = type(defaults).model_fields[branch].description if branch else "the run"
        console.print(Text(f"\n{branch}: {about}".removeprefix("\n: ") if branch else "\nthe run", style="bold"))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=44, overflow="fold")
        table.add_column()
        for field in names:
            schema = schemas()[field]
            meaning = " ".join(schema["description"].split())
            limits = "" if schema.get("type") in ("string", "boolean") else f" [{wanted(schema)}]"
            table.add_row(Text(_as_typed(field, defaults), style="cyan"), Text(meaning + limits))
        console.print(Padding(table, (0, 0, 0, 2)))
    others = _of_others(job, fields)
    if others:
        console.print(Text(f"\nOther settings belong to other jobs, whose --help has them: {others}."))
    codes = "\n".join(f"  {code:<3}  {meaning}" for code, meaning in EXIT_CODES.items())
    console.print(Text(f"\nHow it ends, by exit code:\n{codes}"))


def _of_others(job: str, shown: Container[str]) -> str:
    """Branches that the job does not read, or not all of, with the jobs that do: ``search, q (evaluate)``."""
    unread: dict[str, list[str]] = {}
    for field in schemas():
        if not relevance.reads(job, field):
            unread.setdefault(field.partition(".")[0], []).append(field)
    by_readers: dict[str, list[str]] = {}
    for branch, fields in unread.items():
        named = f"more of {branch}" if branch in shown else branch
        by_readers.setdefault(relevance.readers(*fields), []).append(named)
    return "; ".join(f"{', '.join(names)} ({whom})" for whom, names in by_readers.items())


def _as_typed(field: str, defaults: Config) -> str:
    """A flag with its default, as one would type it."""
    value = value_at(defaults, field)
    branch, _, leaf = field.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{branch}{'.' if branch else ''}{'no-' if value else ''}{leaf}"
    if isinstance(value, Mapping):
        value = [word for pair in value.items() for word in pair]
    words = [str(word) for word in value] if isinstance(value, list | tuple) else [str(value)]
    return " ".join([f"--{field.replace('_', '-')}", *(words if any(words) else ["''"])])
