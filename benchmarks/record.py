"""Where figures come from: a command writes them to docs/results/<name>.json, and documents are made from that."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def record(name: str, figures: Mapping[str, Any], seeds: Sequence[int] = (), about: str = "") -> Path:
    """Write ``docs/results/<name>.json`` and rewrite the tables made from such files."""
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
    """docs/results.md, whole, from docs/results/*.json; in other documents what stands between a result's marks."""
    lines = [
        "# Results",
        "",
        "Made by `make results` from `docs/results/*.json`; the commands there write the figures.",
        "",
    ]
    results = {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}
    for name, result in results.items():
        lines += [f"## {name}", "", result["about"], "", *_table(result), ""]
    (ROOT / "docs" / "results.md").write_text("\n".join(lines))
    for document in (ROOT / "docs").glob("*.md"):
        text = document.read_text()
        for name, result in results.items():
            start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            if start in text:
                before, rest = text.split(start, 1)
                text = before + start + "\n".join(_table(result)) + "\n" + end + rest.split(end, 1)[1]
        document.write_text(text)


def _table(result: Mapping[str, Any]) -> list[str]:
    """Of figures, or where each is a row of figures of the same names, with a column for each name."""
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
        *(f"| `{name}` | {' | '.join(_shown(row[c]) for c in columns)} |" for name, row in figures.items()),
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or ("unknown" if args[0] == "rev-parse" else "")


if __name__ == "__main__":
    write_tables()
