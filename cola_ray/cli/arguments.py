"""From words to checked settings: ``--preset NAME`` and ``--branch.field value``.

    from_command_line("rl_math", argv)             the settings of a job, or exit with its mistakes

All mistakes are reported together, one line each. Values are converted by the types of the settings; a later flag
overrides an earlier one. A dictionary's entries are set one by one (``--pretrain.steps.base 800``) or all together as
pairs (``--task.options objects 20 skill 0.3``).
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cola_ray.checks.refusals import check
from cola_ray.cli.commands import COMMANDS, OF_JOB, Command
from cola_ray.runs.redaction import redacted
from cola_ray.settings.config import Config, ConfigError, is_environment, override, schemas, try_override
from cola_ray.settings.limits import literal, wanted
from cola_ray.settings.presets import corpus, preset


def from_command_line(job: str, argv: Sequence[str] | None = None) -> Config:
    """The settings of a job; prints one line per mistake and exits with 2; prints the help and exits for ``--help``."""
    try:
        config = parsed(COMMANDS[OF_JOB[job]], sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(redacted(str(error)), file=sys.stderr)
        raise SystemExit(2) from None
    if config is None:
        raise SystemExit(0)
    return config


def parsed(command: Command, argv: Sequence[str]) -> Config | None:
    """The settings; None if ``--help`` was given and printed.

    Raises:
        ConfigError: a line for each mistake.
    """
    words = list(argv)
    given, lines = _read(words)
    defaults = _defaults(command, given, lines)
    if {"-h", "--help"} & set(words):
        from cola_ray.cli.explain import explain

        explain(command, defaults)
        return None
    config, wrong = try_override(defaults, given)
    lines |= wrong
    try:
        check(config, command.job)
    except ConfigError as error:
        # Other settings are checked with the default in place of a wrong value; only given settings are at fault.
        said = str(error).splitlines()
        further = [line for line in said if line.split(" = ")[0] in {*given} - {*lines}] if lines else said
        raise ConfigError("\n".join([*lines.values(), *further])) from None
    if lines:
        raise ConfigError("\n".join(lines.values()))
    return config


def _defaults(command: Command, given: Mapping[str, Any], lines: dict[str, str]) -> Config:
    """The requested preset, adapted to the job and the task; adds a line if there is no such preset."""
    name, task = given.get("preset", "tiny"), str(given.get("task.name", command.task))
    with contextlib.suppress(ConfigError):
        usual = _of_preset(name, command, task)
        return override(usual, corpus(name, given)) if command.job == "pretrain" else usual
    _, wrong = try_override(preset("tiny"), {"preset": name})
    lines |= wrong
    return _of_preset("tiny", command, task)


def _of_preset(name: str, command: Command, task: str) -> Config:
    defaults = preset(name, is_environment(task) if task else command.agents, task)
    return override(defaults, {"task.name": command.task}) if command.task else defaults


# --- reading ------------------------------------------------------------------------------------------------------


def _read(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Dotted fields with their values, and a line for each word that is neither field nor value."""
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
            value = literal(values[0]) if len(values) == 1 else tuple(values) or True
            given[flag[2:].replace("-", "_")] = value
        else:
            value, line = _value(field, values, negated)
            given |= {} if line else {field: value}
            lines |= {field: line} if line else {}
    return given, lines


def _grouped(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag, with dashes for underscores, and the words up to the next flag; words without a flag come first."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if word.startswith("--") or word == "-h":
            name, has_value, value = word.partition("=")
            groups.append((name.replace("_", "-"), [value] if has_value else []))
        else:
            groups[-1][1].append(word)
    return [(flag, values) for flag, values in groups if (flag or values) and flag not in ("-h", "--help")]


def _is_no_text(word: str) -> bool:
    """Whether a word was not UTF-8: its bytes then appear as halves of surrogate pairs, which cannot be printed."""
    return any(0xD800 <= ord(character) <= 0xDFFF for character in word)


def _flags() -> dict[str, str]:
    return {"--" + field.replace("_", "-"): field for field in schemas()}


def _value(field: str, values: Sequence[str], negated: bool) -> tuple[Any, str]:
    """The value that the words after a flag give a field; or a line, if they are too few or too many."""
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
