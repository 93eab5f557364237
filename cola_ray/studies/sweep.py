"""Sweeps: one setting over several values and seeds, where each trial is a whole training run under Ray Tune.

    sweep(config)
      ├─ pre-train once for all trials, if the preset makes its own start model
      ├─ Tuner: grid of sweep.values x sweep.seeds, as many trials at a time as the cluster has room for
      │     └─ _trial: run_rl or run_agent in a process of Tune, which reports metrics step by step, for ASHA
      └─ a table, summary.json, and frontier.png: the results against the KL from the reference

A sweep that was killed continues with --resume: finished trials are not repeated, and the others continue from their
last checkpoints, so the table equals that of an uninterrupted sweep. Trials place their own actors: Ray Tune reserves a
tenth of a CPU for the driver of each trial, and engines, services and learner are placed outside Tune's group, because
Ray Train makes its own placement group, which cannot be nested in Tune's. No more trials start than the cluster's free
resources can hold at once, so that trials do not wait for parts of each other's resources.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cola_ray.checks.refusals import check
from cola_ray.cluster import actors
from cola_ray.runs import explanations, launch, provenance
from cola_ray.runs.display import current, shown
from cola_ray.runs.failure import explained_failures
from cola_ray.runs.figures import plot_frontier, print_comparison
from cola_ray.runs.run_folder import summary_of
from cola_ray.runs.tracking import Tracker
from cola_ray.settings.config import Config, RunFailedError, is_environment, override
from cola_ray.settings.presets import trial
from cola_ray.training.rl import make_start_model, measured, run_agent, run_rl
from cola_ray.training.tracked_run import tracked

Row = dict[str, Any]
_REPORTED = ("reward/mean", "policy/kl", "policy/entropy")  # metrics that a trial reports to Tune at every step


@shown()
@explained_failures()
def sweep(config: Config) -> dict[str, Any]:
    """Train ``len(sweep.values) * len(sweep.seeds)`` policies; writes ``runs/`` and ``frontier.png``.

    Returns:
        The summary: rows of all trials, and their means by value.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: a trial failed; the results of the others are written, and ``resume`` runs it again.
        KeyboardInterrupt: the sweep was stopped; ``resume`` continues it.
    """
    check(config, "sweep")
    begun = launch.begin(config, "sweep")
    output, runs = begun.folder.path, config.sweep.parallel or 1
    results: dict[str, Any] = {}
    rows: list[Row] = []

    def summarise(_: Tracker) -> dict[str, Any]:
        return {"preset": config.preset, "task": config.task.name, "field": config.sweep.field, **results}

    def draw(_: Tracker) -> None:
        if rows:
            title = f"{config.task.name}: {config.sweep.field}"
            plot_frontier(output / "frontier.png", title, rows, measured(config))

    with begun.folder.failing(), actors.cluster(config, runs):
        make_start_model(config)
        with tracked(begun, summarise, draw) as tracker:
            config = begun.config if begun.start is None else provenance.starting_from(begun.config, begun.start)
            parent: dict[str, Any] = {"overwrite": False}
            if "mlflow" in config.report_to:
                uri = config.tracking_uri or f"sqlite:///{output.parent / 'mlflow.db'}"
                parent |= {"tracking_uri": uri, "tracking_parent": tracker.events.run}
            finished, failures, unfinished = _run_trials(override(config, parent))
            rows += finished
            results |= {"values": by_value(rows), "runs": rows, "failed": failures}
            if unfinished and not failures:
                raise KeyboardInterrupt
            if failures:
                raise RunFailedError(
                    f"{len(failures)} of {len(grid(config))} runs failed, the first with: {failures[0]}"
                )
    print_comparison(f"{config.sweep.field}, {len(rows)} runs: {output}", results["values"])
    return tracker.summary


def grid(config: Config) -> list[Row]:
    """``{"value": ..., "seed": ...}`` of every trial."""
    return [{"value": value, "seed": seed} for value in config.sweep.values for seed in config.sweep.seeds]


def by_value(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Results by value of the setting: means over seeds, and the number of ``runs``.

    ``<name>_low`` and ``<name>_high`` are the lowest and the highest over seeds. Trials that were stopped early are
    counted in ``stopped_early`` and contribute only their last reward.
    """
    results: dict[str, dict[str, float]] = {}
    for value in dict.fromkeys(row["value"] for row in rows):
        of_value = [row for row in rows if row["value"] == value]
        figures = {"runs": float(len(of_value))}
        stopped = sum("stopped_early" in row for row in of_value)
        if stopped:
            figures["stopped_early"] = float(stopped)
        for name in dict.fromkeys(
            name for row in of_value for name, figure in row.items() if isinstance(figure, float)
        ):
            by_seed = [row[name] for row in of_value if name in row]
            if name != "value":
                mean = sum(by_seed) / len(by_seed)
                figures |= {name: mean, f"{name}_low": min(by_seed), f"{name}_high": max(by_seed)}
        results[str(value)] = figures
    return results


# --- Ray Tune -----------------------------------------------------------------------------------------------------


def _run_trials(config: Config) -> tuple[list[Row], list[str], int]:
    """Run all trials; return rows of results in the order of the grid, errors, and the number of unfinished trials."""
    current().doing("starting the runs")
    results = _tuner(config).fit()
    rows, failures, unfinished = [], [], 0
    for settings, result in sorted(
        ((result.config, result) for result in results), key=lambda pair: grid(config).index(_value_and_seed(pair[0]))
    ):
        if result.error is not None:
            failures.append(explanations.explain(result.error)[0])
        elif not (result.metrics or {}).get("ended") and not config.sweep.asha:
            unfinished += 1
        else:
            known = {name: value for name, value in result.metrics.items() if name in _RESULTS}
            if not known:  # stopped by ASHA: use what it reported last
                known = {"steps": result.metrics["step"], "reward_last": result.metrics["reward/mean"],
                         "stopped_early": True}  # fmt: skip
            rows.append({**_value_and_seed(settings), **known})
    return rows, failures, unfinished


def _tuner(config: Config) -> tune.Tuner:
    """A new tuner over the grid, or the one of the interrupted sweep."""
    settings = config.sweep
    trainable = tune.with_resources(tune.with_parameters(_trial, tree=config.model_dump()), {"CPU": 0.1})
    space = {"value": tune.grid_search(list(settings.values)), "seed": tune.grid_search(list(settings.seeds))}
    folder = Path(config.output_dir) / "tune"
    if config.resume and tune.Tuner.can_restore(str(folder)):
        return tune.Tuner.restore(
            str(folder), trainable=trainable, resume_unfinished=True, resume_errored=True, param_space=space
        )
    asha = None
    if settings.asha:
        asha = tune.schedulers.ASHAScheduler(grace_period=settings.grace_steps, max_t=config.rl.max_steps)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="reward/mean", mode="max", max_concurrent_trials=_max_parallel(config), scheduler=asha
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            verbose=0,
            log_to_file=True,
            callbacks=[_Progress(len(grid(config)), config.rl.max_steps)],
        ),
    )


_RESULTS = ("steps", *(f"{when}_{measure}" for measure in ("accuracy", "reward", "return") for when in ("bc", "rl")),
          "reward_last", "kl_last")  # fmt: skip


def _value_and_seed(settings: Mapping[str, Any]) -> Row:
    return {"value": settings["value"], "seed": settings["seed"]}


def _trial(settings: dict[str, Any], tree: dict[str, Any]) -> None:
    """One trial, in a process of Ray Tune; the results of a finished one are reported from its summary."""
    config = trial(Config.model_validate(tree), settings["value"], settings["seed"])
    summary = summary_of(Path(config.output_dir))
    if summary is None:
        run = run_agent if is_environment(config.task.name) else run_rl
        summary = run(config, on_step=_report_to_tune)
    known = {name: summary[name] for name in _RESULTS if name in summary}
    tune.report({"reward/mean": summary["reward_last"], **known, "ended": True})


def _report_to_tune(step: int, metrics: Mapping[str, Any]) -> None:
    if "reward/mean" in metrics:
        tune.report({"step": step, **{name: metrics[name] for name in _REPORTED if name in metrics}})


def _max_parallel(config: Config) -> int:
    """How many trials may run at a time: as many as the cluster's free resources hold.

    Raises:
        RunFailedError: they do not hold a single trial.
    """
    free, needs = ray.available_resources(), actors.demand(config)
    holds = min(int(free.get(name, 0.0) // count) for name, count in needs.items() if count)
    if not holds:
        needed = ", ".join(f"{count:g} {name}" for name, count in needs.items() if count)
        available = ", ".join(f"{free.get(name, 0.0):g} {name}" for name, count in needs.items() if count)
        raise RunFailedError(
            f"a run of this sweep needs {needed}, and the cluster has {available} free", "make runs smaller"
        )
    return min(holds, config.sweep.parallel or holds, len(grid(config)))


class _Progress(tune.Callback):
    """Shows the progress of all trials on one line."""

    def __init__(self, runs: int, steps: int) -> None:
        self.runs, self.steps, self.ended = runs, steps, 0
        self.reached: dict[str, int] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.reached[trial.trial_id] = self.steps if result.get("ended") else result.get("step", 0)
        self._show(f"{_title(trial)}: reward {result.get('reward/mean', result.get('reward_last', 0.0)):.3f}", False)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.ended += 1
        self._show(f"{_title(trial)} ended", True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.ended += 1
        self._show(f"{_title(trial)} failed", True)

    def _show(self, note: str, milestone: bool) -> None:
        steps = sum(self.reached.values()), self.runs * self.steps
        current().update("sweep", *steps, f"{self.ended} of {self.runs} runs ended  {note}", milestone)


def _title(trial: Any) -> str:
    return f"{trial.config['value']} seed {trial.config['seed']}"
