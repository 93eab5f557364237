"""Figures of a finished run: tables on the terminal, and plots as PNG files.

print_summary, print_comparison                 one column of values; one column per way of answering
plot, plot_against_tokens, plot_frontier        over steps; over generated tokens; reward over KL for a sweep
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cola_ray.runs.display import wide_console


def print_summary(title: str, rows: Mapping[str, Any]) -> None:
    """Print names and values as a table."""
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    wide_console(log_width=200).print(table)


def plot(
    path: Path, title: str, series: Mapping[str, tuple[list[int], list[float]]], levels: Mapping[str, float]
) -> None:
    """Plot each series of (steps, values) as a line, and each level as a dashed horizontal line."""
    with _axes(path) as axes:
        for label, (steps, values) in series.items():
            if steps:
                axes.plot(steps, values, label=label, marker="o" if len(steps) < 30 else None, markersize=3)
        for index, (label, level) in enumerate(levels.items()):
            color = f"C{index + len(series)}"
            axes.axhline(level, linestyle="--", linewidth=1, color=color, label=f"{label} {level:.3f}")
        axes.set(xlabel="step", title=title)


@contextlib.contextmanager
def _axes(path: Path) -> Iterator[Any]:
    """Yield axes to draw on, and write them to a PNG file at the end of the block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    yield axes
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_comparison(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """Print a column of figures for each way of answering, with ``<name>_low`` and ``<name>_high`` as intervals."""
    names = list(dict.fromkeys(name for figures in found.values() for name in figures if not _is_bound(name, figures)))
    table = Table(title=title)
    for heading in ("", *found):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading, overflow="fold")
    for name in names:
        table.add_row(name, *(_with_interval(figures, name) for figures in found.values()))
    wide_console(log_width=200).print(table)


def _is_bound(name: str, figures: Mapping[str, float]) -> bool:
    """Whether this figure is a bound of another figure's interval."""
    return any(name.endswith(end) and name.removesuffix(end) in figures for end in ("_low", "_high"))


def _with_interval(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return ""
    ends = [figures[f"{name}{end}"] for end in ("_low", "_high") if f"{name}{end}" in figures]
    return f"{figures[name]:.3g}" + (f" ({ends[0]:.3g}..{ends[1]:.3g})" if len(ends) == 2 else "")


def plot_against_tokens(path: Path, found: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    """Plot the figures of these names over the generated tokens per problem, with their intervals."""
    with _axes(path) as axes:
        for index, (way, figures) in enumerate(found.items()):
            for name, marker in zip(names, "os^", strict=False):
                if name in figures and figures["generated_tokens"] > 0:  # the axis is logarithmic
                    value = figures[name]
                    below = value - figures.get(f"{name}_low", value)
                    above = figures.get(f"{name}_high", value) - value
                    axes.errorbar(
                        figures["generated_tokens"], value, [[max(below, 0.0)], [max(above, 0.0)]], fmt=marker,
                        color=f"C{index}", label=f"{way}: {name}",
                    )  # fmt: skip
        axes.set(xscale="log", xlabel="generated tokens per problem", ylabel=", ".join(names))


def plot_frontier(path: Path, title: str, rows: Sequence[Mapping[str, Any]], measure: str) -> None:
    """Plot what a sweep's runs reached over their KL divergence from the reference, one colour per value.

    A line joins the means over seeds, in the order in which the values were given.
    """
    values = list(dict.fromkeys(row["value"] for row in rows))
    reached, spent = f"rl_{measure}", "kl_last"
    ended = [row for row in rows if {reached, spent} <= set(row)]
    groups = [[(row[spent], row[reached]) for row in ended if row["value"] == value] for value in values]
    with _axes(path) as axes:
        means = [np.mean(points, axis=0) for points in groups if points]
        axes.plot(*zip(*means, strict=True) if means else ([], []), "-", color="0.8", label="mean over seeds")
        for index, (value, points) in enumerate(zip(values, groups, strict=True)):
            axes.plot(*zip(*points, strict=True) if points else ([], []), "o", color=f"C{index}", label=str(value))
        axes.set(xlabel="KL from the reference, per action", ylabel=f"{measure} (held out)", title=title)
