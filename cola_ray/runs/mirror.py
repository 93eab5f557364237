"""MLflow's copy of a run's ``log.jsonl``, sent by its own thread, which neither delays the run nor ends it.

    mirror = Mirror(uri, folder, MlflowRun("cola_ray/rl_math", params))
    mirror.wake()                      there is more in the log
    line = mirror.finish("FINISHED")   what MLflow still misses after a few seconds, and how to send it; "" if nothing

    RUN/mlflow_run_id      the run's id in MLflow, once it is known
    RUN/mlflow_sent.json   {"bytes": of log.jsonl that MLflow has, "params": ..., "state": ...}

The log is the source of truth, and the mirror sends everything after the bytes that MLflow has. So nothing is lost
while a server is absent, slow or locked: a resumed run sends what an earlier one could not, and ``cola_ray send RUN``
does so without a run. Points have the time of their event, so a point that is sent twice, because a kill came between
sending and recording it, still counts as one.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock

from cola_ray.runs import event_log, explanations, folder_lock, run_folder, samples
from cola_ray.runs.log_copy import LogCopy
from cola_ray.runs.redaction import HIDDEN, redacted, redacted_tree
from cola_ray.runs.run_folder import write_json
from cola_ray.settings.config import Config, ConfigError, RunFailedError, flat

STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""MLflow's names for how a run ended."""
ARTIFACTS = ("summary.json", "reward.png", "losses.png", "accuracy.png", "frontier.png", "log.jsonl", "error.txt")
_OPENING_S = 1.5  # how long a run's start waits for a first answer
_CLOSING_S = 2.0  # how long a run's end waits for the next answer
_MAX_CLOSING_S = 20.0  # how long a run's end waits while answers do come
_PAUSE_S = (1.0, 30.0)  # between attempts; doubled from the first to the second
_MAX_METRICS = 1000  # in one request, MLflow's limit
_MAX_PARAMS = 100
_TAG = "cola_ray.run"
_SWEEPS = "cola_ray/sweep"


@dataclass(frozen=True)
class MlflowRun:
    """What MLflow shows about a run besides its metrics."""

    experiment: str
    params: Mapping[str, Any] = field(default_factory=dict)
    parent: str = ""
    """The parent run, by the id in its log or by MLflow's id."""


class Mirror(LogCopy):
    """Sends the log of one run. ``state`` is MLflow's name for how it ended.

    Args:
        uri: tracking server or database; if empty, a sqlite file beside the folder.
        folder: of the run.
        run: experiment, parameters and parent.
    """

    def __init__(self, uri: str, folder: Path, run: MlflowRun) -> None:
        super().__init__("mlflow")
        self.uses_default_uri, self.uri = not uri, uri or f"sqlite:///{folder.parent / 'mlflow.db'}"
        self.folder, self.run = folder, run
        self.id_file, self.sent_file = folder / "mlflow_run_id", folder / "mlflow_sent.json"
        self.client: Any = None
        self.progress = time.monotonic()

    def open(self) -> None:
        """Start the thread and wait a moment for a first answer, so that a fault is reported early."""
        _load()
        self.wake()
        self.thread.start()
        self.tried.wait(_OPENING_S)

    @property
    def run_id(self) -> str:
        """The run's id in MLflow; "" as long as there is none."""
        return self.id_file.read_text().strip() if self.id_file.exists() else ""

    def finish(self, state: str) -> str:
        """Send the rest for as long as answers come; return a line about what MLflow misses, or "".

        Args:
            state: FINISHED, FAILED or KILLED.
        """
        self.state, self.progress = state, time.monotonic()
        self.wake()
        last = time.monotonic() + _MAX_CLOSING_S
        while not self.done.wait(0.05):
            now = time.monotonic()
            if now > last or now - self.progress > _CLOSING_S:
                break
        return "" if self.done.is_set() and not self.fault else self._missing()

    def send(self) -> None:
        """Send everything that MLflow misses, in the calling thread; raises any error that prevents it."""
        if self.client is None:
            self._connect()
        sent = self._sent()
        run_id = self.run_id or self._make_run()
        if not sent["params"]:
            self._send_params(run_id)
            sent = self._note(sent, params=True)
        if sent["state"] != "RUNNING" and not self.state:
            self.client.update_run(run_id, status="RUNNING")
            sent = self._note(sent, state="RUNNING")
        sent = self._send_metrics(run_id, sent)
        if self.state:
            for name in ARTIFACTS:
                if (self.folder / name).exists():
                    self.client.log_artifact(run_id, str(self.folder / name))
                    self.progress = time.monotonic()
            for file in samples.files(self.folder):
                self.client.log_artifact(run_id, str(file), samples.NAME)
                self.progress = time.monotonic()
            self.client.set_terminated(run_id, status=self.state)
            self._note(sent, state=self.state)

    def _copy(self, last: bool) -> None:
        self.send()
        self.fault_shown = False  # a fault that comes back is reported again

    def _drop(self) -> None:
        self.client = None

    def _pause_s(self) -> float:
        first, longest = _PAUSE_S
        return min(first * 2 ** min(self.failures - 1, 10), longest)

    def _complaint(self) -> str:
        return f"MLflow at {redacted(self.uri)}: {self.fault}; the run goes on, and its log is sent later"

    def _missing(self) -> str:
        try:
            start = self._sent()["bytes"]
            count = sum(1 for _ in event_log.read_from(self.folder, start))
        except OSError:
            count = 0
        why = self.fault or "no answer in time"
        hidden = "" if redacted(self.uri) == self.uri else " --tracking-uri URI"
        return (
            f"MLflow at {redacted(self.uri)} misses {count} events of this run and its files ({why}); log.jsonl has "
            f"them, and `cola_ray send {self.folder}{hidden}` sends them"
        )

    # --- MLflow -------------------------------------------------------------------------------------------------

    @property
    def _is_remote(self) -> bool:
        return urlsplit(self.uri).scheme in ("http", "https", "databricks", "databricks-uc")

    def _connect(self) -> None:
        mlflow = _load()
        with self._database_lock():
            client = mlflow.MlflowClient(tracking_uri=self.uri)
            client.get_experiment_by_name(self.run.experiment)  # opens the store, which may create its tables
        self.client, self.progress = client, time.monotonic()

    @contextlib.contextmanager
    def _database_lock(self) -> Any:
        """Lock out other runs: MLflow creates tables when it first opens a database, which two must not do at once."""
        if not self.uri.startswith("sqlite:///"):
            yield
            return
        folder = Path(self.uri.removeprefix("sqlite:///").partition("?")[0]).absolute().parent
        with filelock.FileLock(folder / ".cola_ray-mlflow.lock", timeout=30.0):
            yield

    def _make_run(self) -> str:
        """Create the run in MLflow, or find the one that an earlier attempt created without seeing the answer."""
        parent = self._parent()
        experiment, own = self._experiment(parent), event_log.EventLog(self.folder).run
        found = self.client.search_runs([experiment], f"tags.`{_TAG}` = '{own}'", max_results=1)
        if found:
            run_id: str = found[0].info.run_id
        else:
            from mlflow.tracking.context.registry import resolve_tags

            tags = {_TAG: own} | ({} if parent is None else {"mlflow.parentRunId": parent.info.run_id})
            made = self.client.create_run(experiment, run_name=self.folder.name, tags=resolve_tags(tags))
            run_id = made.info.run_id
        self.id_file.write_text(run_id)
        self.progress = time.monotonic()
        return run_id

    def _parent(self) -> Any:
        """Return the MLflow run of the sweep that this run belongs to, which another process may be about to create."""
        if not self.run.parent:
            return None
        sweeps = self.client.get_experiment_by_name(_SWEEPS)
        if sweeps is not None:
            own = f"tags.`{_TAG}` = '{self.run.parent}'"
            found = self.client.search_runs([sweeps.experiment_id], own, max_results=1)
            if found:
                return found[0]
        return self.client.get_run(self.run.parent)

    def _experiment(self, parent: Any) -> str:
        if parent is not None:
            return str(parent.info.experiment_id)
        with self._database_lock():
            known = self.client.get_experiment_by_name(self.run.experiment)
            if known is not None:
                if known.lifecycle_stage == "deleted":
                    self.client.restore_experiment(known.experiment_id)
                return str(known.experiment_id)
            # A local store would put its artifacts into the working directory; they belong beside the database.
            beside = (self.folder.parent / "mlartifacts").as_uri() if self.uses_default_uri else None
            return str(self.client.create_experiment(self.run.experiment, artifact_location=beside))

    def _send_params(self, run_id: str) -> None:
        from mlflow.entities import Param

        params = iter([Param(name, str(value)[:500]) for name, value in redacted_tree(self.run.params).items()])
        while piece := list(islice(params, _MAX_PARAMS)):
            self.client.log_batch(run_id, params=piece)
            self.progress = time.monotonic()

    def _send_metrics(self, run_id: str, sent: dict[str, Any]) -> dict[str, Any]:
        from mlflow.entities import Metric

        waiting: list[Any] = []
        upto = sent["bytes"]
        for end, event in event_log.read_from(self.folder, sent["bytes"]):
            points = event_log.history([event])
            when = int(datetime.fromisoformat(event["time"]).timestamp() * 1000)
            some = [Metric(name, value, when, step) for step, of in points.items() for name, value in of.items()]
            if waiting and len(waiting) + len(some) > _MAX_METRICS:
                sent, waiting = self._send_batch(run_id, waiting, sent, upto), []
            waiting, upto = waiting + some, end
        return self._send_batch(run_id, waiting, sent, upto) if upto > sent["bytes"] else sent

    def _send_batch(self, run_id: str, metrics: list[Any], sent: dict[str, Any], upto: int) -> dict[str, Any]:
        for first in range(0, len(metrics), _MAX_METRICS):
            self.client.log_batch(run_id, metrics=metrics[first : first + _MAX_METRICS])
            self.progress = time.monotonic()
        return self._note(sent, bytes=upto)

    def _sent(self) -> dict[str, Any]:
        nothing = {"bytes": 0, "params": False, "state": ""}
        try:
            return nothing | json.loads(self.sent_file.read_text())
        except FileNotFoundError:
            return nothing
        except ValueError:  # cut off by a full disk: everything is sent again, which gives the same points
            return nothing | {"params": bool(self.run_id)}

    def _note(self, sent: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        noted = {**sent, **more}
        write_json(self.sent_file, noted)
        return noted


def send(folder: Path, uri: str = "") -> str:
    """Send what MLflow misses of a run that has ended; return a line about what was sent.

    Args:
        folder: of the run.
        uri: instead of the run's own, whose password is not stored.

    Raises:
        ConfigError: there is no run that has ended, or the password of its address is missing.
        RunFailedError: MLflow did not accept it.
    """
    record, settings = run_folder.read_record(folder), folder / "config.json"
    if record is None or not settings.exists():
        raise ConfigError(f"{folder}: no run there; give a run's --output-dir, e.g. outputs/demo")
    if folder_lock.is_in_use(folder):
        raise ConfigError(f"{folder}: a run is in progress there, which sends its log itself; wait for its end")
    config = Config.model_validate_json(settings.read_text())
    uri = uri or config.tracking_uri
    if HIDDEN in uri:
        raise ConfigError(f"tracking_uri = {uri!r}: its secret is not stored; give the whole address by --tracking-uri")
    run = MlflowRun(f"cola_ray/{record['job']}", flat(config.model_dump()), config.tracking_parent)
    mirror = Mirror(uri, folder, run)
    mirror.state = STATES.get(str(record.get("state")), "KILLED")
    before = mirror._sent()["bytes"]
    count = sum(1 for _ in event_log.read_from(folder, before))
    try:
        mirror.send()
    except Exception as error:
        raise RunFailedError(f"MLflow at {redacted(mirror.uri)}: {explanations.one_line(error)}") from error
    return f"{folder}: {count} events sent to MLflow at {redacted(mirror.uri)}, run {mirror.run_id}"


def _load() -> Any:
    """Import MLflow, reducing its default of seven attempts of two minutes each to one of ten seconds."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    import mlflow

    return mlflow
