"""Records benchmark figures as JSON, and writes them as tables into the documents that discuss them.

record(name, figures) ─> docs/results/<name>.json ─> the table between <!-- name --> and <!-- /name -->
                                                     in the document in docs/ that has these two lines
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = ROOT / "docs"
RESULTS = DOCUMENTS / "results"


def record(name: str, figures: Mapping[str, Any], seeds: Sequence[int] = (), about: str = "") -> Path:
    """Write ``docs/results/<name>.json`` with the command, commit and hardware, and update the tables in docs/.

    Args:
        figures: name -> number, list of numbers or text; or rows, name -> {column: value}, with the same columns.
        seeds: the runs' seeds.
        about: one line describing the measurement.

    Raises:
        ValueError: no document has the markers for this table.
    """
    if not any(f"<!-- {name} -->\n" in document.read_text() for document in DOCUMENTS.glob("*.md")):
        raise ValueError(f"{name}: no document in docs/ has the lines <!-- {name} --> and <!-- /{name} -->; add them")
    content = {
        "about": about,
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "hardware": hardware(),
        "seeds": list(seeds),
        "figures": dict(figures),
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    write_tables()
    return path


def hardware() -> str:
    import torch

    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores {platform.machine()}, {memory_gb:.0f} GB, {', '.join(gpus) or 'no GPU'}"


def write_tables() -> None:
    """Update every table in docs/*.md from docs/results/*.json."""
    for document in DOCUMENTS.glob("*.md"):
        document.write_text(with_tables(document.read_text()))


def with_tables(text: str) -> str:
    """A document's text with all tables between markers brought up to date."""
    for file in sorted(RESULTS.glob("*.json")):
        start, end = f"<!-- {file.stem} -->\n", f"<!-- /{file.stem} -->"
        if start in text:
            before, rest = text.split(start, 1)
            table = "\n".join(_table(json.loads(file.read_text())))
            text = f"{before}{start}{table}\n{end}{rest.split(end, 1)[1]}"
    return text


def _table(result: Mapping[str, Any]) -> list[str]:
    """Lines of a table with one row per figure; if figures are rows themselves, there is a column per name."""
    figures = result["figures"]
    names = {tuple(value) if isinstance(value, Mapping) else () for value in figures.values()}
    if len(names) != 1 or names == {()}:
        figures, names = {name: {"value": value} for name, value in figures.items()}, {("value",)}
    (columns,) = names
    return [
        f"`{result['command']}` at {result['commit'][:10]}, {result['hardware']}, seeds {result['seeds']}",
        "",
        f"| figure | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
        *(f"| `{name}` | {' | '.join(_formatted(row[c]) for c in columns)} |" for name, row in figures.items()),
    ]


def _formatted(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_formatted(item) for item in value)
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or ("unknown" if args[0] == "rev-parse" else "")


if __name__ == "__main__":
    write_tables()
