"""What people see of a run afterwards: its log, MLflow, the summary, the plots."""

import contextlib
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cola_ray.runs import event_log
from cola_ray.runs.display import current, wide_console
from cola_ray.runs.mirror import STATES, Mirror, Run
from cola_ray.runs.run_folder import State


class Tracker:
    """One metrics history of a run: in memory, in ``log.jsonl``, and in MLflow as far as that answers.

    A resumed run takes its history up from ``log.jsonl``, and continues the same MLflow run.

    Args:
        uri: tracking server or database; empty for a sqlite file beside ``output_dir``.
        job: becomes the experiment's name.
        params: flat settings.
        parent: the MLflow run that this one is shown below, in its experiment.
        on_step: is told what is logged.
    """

    def __init__(
        self,
        uri: str,
        job: str,
        output_dir: Path,
        params: Mapping[str, Any],
        parent: str = "",
        on_step: Callable[[int, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.on_step = on_step
        events = event_log.read(output_dir)
        self.history = event_log.history(events)
        self.summary: dict[str, Any] = {}
        """What the run left as summary.json, once it has ended."""
        self.events = event_log.EventLog(output_dir)
        self.mirror = Mirror(uri, output_dir, Run(f"cola_ray/{job}", params, parent))
        self.note("resume" if events else "start", job=job)
        self.mirror.open()

    @property
    def mlflow_run_id(self) -> str | None:
        """None as long as MLflow has not answered."""
        return self.mirror.run_id or None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers under their names; a step seen before is merged, never moved back."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}
        self.history.setdefault(step, {}).update(numbers)
        self.note("step", version=step, **numbers)
        if self.on_step is not None:
            self.on_step(step, metrics)

    def note(self, event: str, **facts: Any) -> None:
        """A line of ``log.jsonl``: when, which run, what happened, and what there is to say of it."""
        self.events.append(event, **facts)
        self.mirror.wake()

    @property
    def step(self) -> int:
        """The last one that was logged."""
        return max(self.history, default=0)

    def first(self, name: str) -> float | None:
        return next(iter(self.series(name)[1]), None)

    def latest(self, name: str) -> float | None:
        return next(reversed(self.series(name)[1]), None)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        steps = [step for step in sorted(self.history) if name in self.history[step]]
        return steps, [self.history[step][name] for step in steps]

    def finish(self, state: State) -> None:
        """The last event, but for a failure's, which ending.py has written; says what MLflow lacks."""
        if state != "failed":
            self.note("stop" if state == "stopped" else "end")
        missing = self.mirror.finish(STATES[state])
        if missing:
            current().say(missing)


def print_summary(title: str, rows: Mapping[str, Any]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    wide_console(log_width=200).print(table)


def plot(
    path: Path, title: str, series: Mapping[str, tuple[list[int], list[float]]], levels: Mapping[str, float]
) -> None:
    """Lines over steps, and dashed levels, as one PNG."""
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
    """To draw on; what was drawn is a PNG then."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    yield axes
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_ways(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """Figures of several ways of answering, a column each; in brackets ``<name>_low`` and ``<name>_high``."""
    names = list(dict.fromkeys(name for figures in found.values() for name in figures if not _is_end(name, figures)))
    table = Table(title=title)
    for heading in ("", *found):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading, overflow="fold")
    for name in names:
        table.add_row(name, *(_with_interval(figures, name) for figures in found.values()))
    wide_console(log_width=200).print(table)


def _is_end(name: str, figures: Mapping[str, float]) -> bool:
    """Whether this is an end of another figure's interval."""
    return any(name.endswith(end) and name.removesuffix(end) in figures for end in ("_low", "_high"))


def _with_interval(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return ""
    ends = [figures[f"{name}{end}"] for end in ("_low", "_high") if f"{name}{end}" in figures]
    return f"{figures[name]:.3g}" + (f" ({ends[0]:.3g}..{ends[1]:.3g})" if len(ends) == 2 else "")


def plot_against_tokens(path: Path, found: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    """Figures of these names over generated tokens a problem, with their intervals."""
    with _axes(path) as axes:
        for index, (way, figures) in enumerate(found.items()):
            for name, marker in zip(names, "os^", strict=False):
                if name in figures and figures["generated_tokens"] > 0:  # on a logarithmic scale
                    value = figures[name]
                    below = value - figures.get(f"{name}_low", value)
                    above = figures.get(f"{name}_high", value) - value
                    axes.errorbar(
                        figures["generated_tokens"], value, [[max(below, 0.0)], [max(above, 0.0)]], fmt=marker,
                        color=f"C{index}", label=f"{way}: {name}",
                    )  # fmt: skip
        axes.set(xscale="log", xlabel="tokens generated a problem", ylabel=", ".join(names))


def plot_frontier(path: Path, title: str, rows: Sequence[Mapping[str, Any]], measure: str) -> None:
    """What a sweep's runs reached over how far from the reference they went, a colour for each value.

    A line joins the values' means over seeds, in the order they are given.
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
        axes.set(xlabel="KL from the reference, an action", ylabel=f"{measure} (held out)", title=title)


def peak_memory_gb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
