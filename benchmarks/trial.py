"""One run of a job in a folder of its own, made once: a benchmark that was stopped goes on where it was."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import ROOT

from cola_ray.runs.run_folder import summary_of


def trial(where: Path, job: str, *settings: str) -> dict[str, Any]:
    """The summary of ``jobs/<job>.py`` with these settings, run in ``where`` if it has not been before.

    One that was interrupted goes on from where it was.
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
    """A metric of a trial, by step."""
    with sqlite3.connect(where / "outputs" / "mlflow.db") as database:
        query = "select value from metrics where key = ? order by step"
        return [value for (value,) in database.execute(query, [metric])]


def all_of(jobs: Iterable[Callable[[], Any]], parallel: int) -> list[Any]:
    """Results in order, with so many at a time; says how far it is."""
    waiting = list(jobs)
    results = []
    with ThreadPoolExecutor(parallel) as pool:
        for number, future in enumerate([pool.submit(job) for job in waiting]):
            results.append(future.result())
            print(f"{number + 1} of {len(waiting)} runs", flush=True)
    return results
