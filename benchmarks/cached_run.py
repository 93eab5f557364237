"""Runs of jobs whose results are kept, so that a benchmark that was stopped continues where it was."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import ROOT

from cola_ray.runs.run_folder import summary_of


def run_once(where: Path, job: str, *settings: str) -> dict[str, Any]:
    """Run ``jobs/<job>.py`` with these settings in ``where``, unless it finished there before; returns its summary.

    An interrupted run is resumed.
    """
    run = where / "outputs" / "run"
    if summary_of(run) is None:
        where.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *settings, "--output-dir", "outputs/run"]
        if run.exists():
            command.append("--resume")
        with (where / "log.txt").open("a") as log:
            subprocess.run(command, cwd=where, check=True, stdout=log, stderr=subprocess.STDOUT)
    return summary_of(run) or {}


def series(where: Path, metric: str) -> list[float]:
    """The values of a metric of a run, sorted by step."""
    with sqlite3.connect(where / "outputs" / "mlflow.db") as database:
        query = "select value from metrics where key = ? order by step"
        return [value for (value,) in database.execute(query, [metric])]


def run_all(jobs: Iterable[Callable[[], Any]], parallel: int) -> list[Any]:
    """Results of all jobs in order, computed ``parallel`` at a time; prints progress."""
    waiting = list(jobs)
    results = []
    with ThreadPoolExecutor(parallel) as pool:
        for number, future in enumerate([pool.submit(job) for job in waiting]):
            results.append(future.result())
            print(f"{number + 1} of {len(waiting)} runs", flush=True)
    return results
