"""Sweeps: one setting over several values and seeds, each a whole training run, under Ray Tune.

    sweep(config)
      ├─ pretrain, where the preset makes its own start: once, for all runs
      ├─ Tuner: grid of sweep.values x sweep.seeds, as many at a time as the cluster has room for
      │     └─ _trial: run_rl or run_agent in Tune's process; its metrics go to Tune step by step, for ASHA
      └─ a table, summary.json, frontier.png: what was reached against how far the policy went

A sweep that was killed goes on with --resume: runs that ended are not made again, and the others go on from their own
last checkpoints, so the table is that of a sweep that nobody disturbed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cola_ray.checks.refusals import check
from cola_ray.cluster import actors
from cola_ray.runs import ending, launch, provenance
from cola_ray.runs.display import current, shown
from cola_ray.runs.ending import in_words
from cola_ray.runs.run_folder import summary_of
from cola_ray.runs.tracking import Tracker, plot_frontier, print_ways
from cola_ray.settings.config import Config, RunFailedError, is_environment, override
from cola_ray.settings.presets import trial
from cola_ray.train import make_start_model, measured, run_agent, run_rl, tracked

Row = dict[str, Any]
_REPORTED = ("reward/mean", "policy/kl", "policy/entropy")


@shown()
@in_words()
def sweep(config: Config) -> dict[str, Any]:
    """Train ``len(sweep.values) x len(sweep.seeds)`` policies; leaves ``runs/``, ``frontier.png``. Returns the summary.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: some run failed; the others' results are written, and with ``resume`` it is tried again.
        KeyboardInterrupt: stopped; can be resumed.
    """
    check(config, "sweep")
    begun = launch.begin(config, "sweep")
    output, runs = begun.folder.path, config.sweep.parallel or 1
    found: dict[str, Any] = {}
    rows: list[Row] = []

    def summarise(_: Tracker) -> dict[str, Any]:
        return {"preset": config.preset, "task": config.task.name, "field": config.sweep.field, **found}

    def draw(_: Tracker) -> None:
        if rows:
            title = f"{config.task.name}: {config.sweep.field}"
            plot_frontier(output / "frontier.png", title, rows, measured(config))

    with begun.folder.failing(), actors.cluster(config, runs):
        make_start_model(config)
        with tracked(begun, summarise, draw) as tracker:
            config = begun.config if begun.start is None else provenance.starting_from(begun.config, begun.start)
            uri = config.tracking_uri or f"sqlite:///{output.parent / 'mlflow.db'}"
            parent = {"tracking_uri": uri, "tracking_parent": tracker.events.run, "overwrite": False}
            made, failures, unfinished = _fit(override(config, parent))
            rows += made
            found |= {"values": by_value(rows), "runs": rows, "failed": failures}
            if unfinished and not failures:
                raise KeyboardInterrupt
            if failures:
                raise RunFailedError(
                    f"{len(failures)} of {len(grid(config))} runs failed, the first with: {failures[0]}"
                )
    print_ways(f"{config.sweep.field}, {len(rows)} runs: {output}", found["values"])
    return tracker.summary


def grid(config: Config) -> list[Row]:
    """``{"value": ..., "seed": ...}`` of every run."""
    return [{"value": value, "seed": seed} for value in config.sweep.values for seed in config.sweep.seeds]


def by_value(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By the setting's value, means over seeds of what ``runs`` runs reached.

    ``..._low`` and ``..._high`` are the least and the greatest of them. Runs that were stopped early are counted in
    ``stopped_early``; they bring their last reward and nothing else.
    """
    found: dict[str, dict[str, float]] = {}
    for value in dict.fromkeys(row["value"] for row in rows):
        of_value = [row for row in rows if row["value"] == value]
        figures = {"runs": float(len(of_value))}
        stopped = sum("stopped_early" in row for row in of_value)
        if stopped:
            figures["stopped_early"] = float(stopped)
        for name in dict.fromkeys(
            name for row in of_value for name, figure in row.items() if isinstance(figure, float)
        ):
            some = [row[name] for row in of_value if name in row]
            if name != "value":
                figures |= {name: sum(some) / len(some), f"{name}_low": min(some), f"{name}_high": max(some)}
        found[str(value)] = figures
    return found


# --- Ray Tune -----------------------------------------------------------------------------------------------------


def _fit(config: Config) -> tuple[list[Row], list[str], int]:
    """Every run to its end. Rows of what they reached in the grid's order, errors, and how many did not end."""
    settings = config.sweep
    trainable = tune.with_resources(tune.with_parameters(_trial, tree=config.model_dump()), {"CPU": 0.1})
    space = {"value": tune.grid_search(list(settings.values)), "seed": tune.grid_search(list(settings.seeds))}
    folder = Path(config.output_dir) / "tune"
    if config.resume and tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(
            str(folder), trainable=trainable, resume_unfinished=True, resume_errored=True, param_space=space
        )
    else:
        asha = None
        if settings.asha:
            asha = tune.schedulers.ASHAScheduler(grace_period=settings.grace_steps, max_t=config.rl.max_steps)
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="reward/mean",
                mode="max",
                max_concurrent_trials=_room(config),
                scheduler=asha,
            ),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(folder.parent),
                verbose=0,
                log_to_file=True,
                callbacks=[_Progress(len(grid(config)), config.rl.max_steps)],
            ),
        )
    current().doing("starting the runs")
    results = tuner.fit()
    rows, failures, unfinished = [], [], 0
    for settings_of, result in sorted(
        ((result.config, result) for result in results), key=lambda pair: grid(config).index(_plain(pair[0]))
    ):
        if result.error is not None:
            failures.append(ending.explain(result.error)[0])
        elif not (result.metrics or {}).get("ended") and not settings.asha:
            unfinished += 1
        else:
            known = {name: value for name, value in result.metrics.items() if name in _SHOWN}
            if not known:  # stopped by ASHA: what was last said of it
                known = {"steps": result.metrics["step"], "reward_last": result.metrics["reward/mean"],
                         "stopped_early": True}  # fmt: skip
            rows.append({**_plain(settings_of), **known})
    return rows, failures, unfinished


_SHOWN = ("steps", *(f"{when}_{measure}" for measure in ("accuracy", "reward", "return") for when in ("bc", "rl")),
          "reward_last", "kl_last")  # fmt: skip


def _plain(settings: Mapping[str, Any]) -> Row:
    return {"value": settings["value"], "seed": settings["seed"]}


def _trial(settings: dict[str, Any], tree: dict[str, Any]) -> None:
    """One run, in a process of Ray Tune's; what ended before is told again from its summary."""
    config = trial(Config.model_validate(tree), settings["value"], settings["seed"])
    summary = summary_of(Path(config.output_dir))
    if summary is None:
        run = run_agent if is_environment(config.task.name) else run_rl
        summary = run(config, on_step=_tell_tune)
    known = {name: summary[name] for name in _SHOWN if name in summary}
    tune.report({"reward/mean": summary["reward_last"], **known, "ended": True})


def _tell_tune(step: int, metrics: Mapping[str, Any]) -> None:
    if "reward/mean" in metrics:
        tune.report({"step": step, **{name: metrics[name] for name in _REPORTED if name in metrics}})


def _room(config: Config) -> int:
    """How many runs the cluster's free resources hold; no more are started, or some would wait for each other's."""
    free, needs = ray.available_resources(), actors.demand(config)
    holds = min(int(free.get(name, 0.0) // count) for name, count in needs.items() if count)
    if not holds:
        wanted = ", ".join(f"{count:g} {name}" for name, count in needs.items() if count)
        there = ", ".join(f"{free.get(name, 0.0):g} {name}" for name, count in needs.items() if count)
        raise RunFailedError(
            f"a run of this sweep needs {wanted}, and the cluster has {there} free", "make runs smaller"
        )
    return min(holds, config.sweep.parallel or holds, len(grid(config)))


class _Progress(tune.Callback):
    """One line over all runs."""

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
