"""A run's metrics: in memory, in its log, and in the trackers that copy it."""

import resource
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from cola_ray.runs import event_log
from cola_ray.runs.display import current
from cola_ray.runs.followers import Follower
from cola_ray.runs.mirror import STATES, Mirror, MlflowRun
from cola_ray.runs.run_folder import State


class Tracker:
    """The metrics of one run: in memory, in ``log.jsonl``, and in trackers as long as those answer.

    A resumed run reads its history from ``log.jsonl`` and continues the same MLflow run.

    Args:
        uri: tracking server or database; if empty, a sqlite file beside ``output_dir``.
        job: gives the experiment its name.
        output_dir: the run's folder.
        params: settings, by dotted field.
        parent: the parent run in MLflow; this run belongs to its experiment.
        on_step: called with (step, metrics) after each log.
        report_to: the trackers, of mlflow, tensorboard and wandb.
    """

    def __init__(
        self,
        uri: str,
        job: str,
        output_dir: Path,
        params: Mapping[str, Any],
        parent: str = "",
        on_step: Callable[[int, Mapping[str, Any]], None] | None = None,
        report_to: Sequence[str] = ("mlflow",),
    ) -> None:
        self.on_step = on_step
        events = event_log.read(output_dir)
        self.history = event_log.history(events)
        self.summary: dict[str, Any] = {}
        """The content of summary.json, once the run has ended."""
        self.events = event_log.EventLog(output_dir)
        self.mirror = None
        if "mlflow" in report_to:
            self.mirror = Mirror(uri, output_dir, MlflowRun(f"cola_ray/{job}", params, parent))
        self.followers = [Follower(name, output_dir, job, params) for name in report_to if name != "mlflow"]
        self.note("resume" if events else "start", job=job)
        if self.mirror is not None:
            self.mirror.open()

    @property
    def mlflow_run_id(self) -> str | None:
        """The run's id in MLflow; None as long as MLflow has not answered."""
        return (self.mirror.run_id or None) if self.mirror is not None else None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the metrics that are numbers; a second call for a step adds to the first."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}
        self.history.setdefault(step, {}).update(numbers)
        self.note("step", version=step, **numbers)
        if self.on_step is not None:
            self.on_step(step, metrics)

    def note(self, event: str, **facts: Any) -> None:
        """Append an event to ``log.jsonl`` and wake the threads that copy it."""
        self.events.append(event, **facts)
        for copy in (self.mirror, *self.followers):
            if copy is not None:
                copy.wake()

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max(self.history, default=0)

    def first(self, name: str) -> float | None:
        return next(iter(self.series(name)[1]), None)

    def latest(self, name: str) -> float | None:
        return next(reversed(self.series(name)[1]), None)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric was logged, and its values there."""
        steps = [step for step in sorted(self.history) if name in self.history[step]]
        return steps, [self.history[step][name] for step in steps]

    def finish(self, state: State) -> None:
        """Log the last event, except a failure, which failure.py has logged already; print what trackers lack."""
        if state != "failed":
            self.note("stop" if state == "stopped" else "end")
        for follower in self.followers:  # they then finish in parallel with MLflow's copy
            follower.end(state)
        lines = [] if self.mirror is None else [self.mirror.finish(STATES[state])]
        for line in [*lines, *(follower.finish(state) for follower in self.followers)]:
            if line:
                current().say(line)


def peak_memory_gb() -> float:
    """Return this process's peak resident memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
