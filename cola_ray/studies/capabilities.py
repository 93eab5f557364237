"""Which of its base's capabilities a CoLA model has kept: scores of both on tasks of EleutherAI's harness."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import ray

from cola_ray.algorithms.intervals import share_interval
from cola_ray.checks.refusals import check
from cola_ray.cluster import actors
from cola_ray.runs.display import current, shown
from cola_ray.runs.failure import explained_failures
from cola_ray.runs.figures import print_comparison
from cola_ray.runs.run_folder import write_json
from cola_ray.settings.config import Config, ConfigError
from cola_ray.studies.study import open_study


@shown()
@explained_failures()
def capabilities(config: Config) -> dict[str, Any]:
    """Score the model and its bare base with each of ``harness.likelihoods``; writes ``output_dir/harness.json``.

    Returns:
        The summary: by likelihood, scores with intervals.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: the run failed; the message says why.
    """
    check(config, "capabilities")
    harness = config.harness
    current().doing("opening the evaluation harness")
    from lm_eval.tasks import TaskManager

    from cola_ray.studies.harness import score

    known = TaskManager(include_path=harness.include_path or None).all_tasks
    for name in harness.tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or ["lm_eval ls tasks"]
            raise ConfigError(f"harness.tasks = {name!r}: no such task; did you mean {near[0]}?")
    figures: dict[str, dict[str, float]] = {}
    results: dict[str, Any] = {}
    with open_study(config, "capabilities") as study, actors.cluster(config):
        for likelihood in harness.likelihoods:
            current().update(f"capabilities: {likelihood}", len(figures), len(harness.likelihoods))
            results[likelihood] = ray.get(actors.alone(config, score, study.config, likelihood))
            figures[likelihood] = _scores(results[likelihood])
            current().update(f"capabilities: {likelihood}", len(figures), len(harness.likelihoods), milestone=True)
        current().doing("writing the summary")
        write_json(study.output / "harness.json", results)
        study.add(figures)
    print_comparison(f"kept capabilities: {study.output}", figures)
    return study.tracker.summary


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Scores by ``task metric``, or ``task metric (filter)`` if answers were filtered, with 95 % intervals.

    Shares of questions, whose standard error in the harness is sqrt(p (1 - p) / (n - 1)), get Wilson's interval; other
    scores get 1.96 standard errors to both sides.

    Args:
        results: of the harness, as :func:`cola_ray.studies.harness.score` returns them.
    """
    scores: dict[str, float] = {}
    for task, metrics in results["results"].items():
        count = results["n-samples"].get(task, {}).get("effective", 0)
        for name, value in metrics.items():
            metric, _, filter_name = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filter_name:
                continue
            title = f"{task} {metric}" + ("" if filter_name == "none" else f" ({filter_name})")
            scores[title] = float(value)
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            if not isinstance(error, int | float):
                continue
            if count > 1 and 0 <= value <= 1 and math.isclose(
                error, math.sqrt(value * (1 - value) / (count - 1)), rel_tol=1e-6, abs_tol=1e-12
            ):  # fmt: skip
                low, high = share_interval(round(value * count), count)
            else:
                low, high = value - 1.96 * error, value + 1.96 * error
            scores |= {f"{title}_low": float(low), f"{title}_high": float(high)}
    return scores
