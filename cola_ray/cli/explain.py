"""``cola_ray COMMAND --help``."""

from collections.abc import Container, Mapping

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cola_ray.cli.commands import OF_JOB, Command
from cola_ray.runs.display import wide_console
from cola_ray.runs.failure import EXIT_CODES
from cola_ray.settings import relevance
from cola_ray.settings.config import Config, schemas, value_at
from cola_ray.settings.limits import wanted


def explain(command: Command, defaults: Config) -> None:
    """Print what a command does, examples, and every setting that it reads, with its default and meaning."""
    job, console = command.job, wide_console(log_width=120)
    console.print(Text(f"cola_ray {OF_JOB[job]}: {command.about}"))
    examples = command.examples.strip().replace("\n", "\n    ")
    console.print(Text(f"\nExamples:\n    {examples}" + (f"\n\n{command.notes}" if command.notes else "")))
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
    """Branches that the job does not read, or not completely, with the jobs that do: ``search, q (evaluate)``."""
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
