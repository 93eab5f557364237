"""A run's folder: what a job may write there, and the record of what it wrote.

    RUN/run.json    {"tool": "cola_ray", "job": ..., "state": ..., "step": ..., "process": "PID on HOST",
                     "wrote": [names], "files": {path: [bytes, time in ns]}}

    lines = refusals(config, "rl_math")      # why the job may not write there; [] if it may
    folder = claim(config, "rl_math")        # writes the record; with --overwrite, removes an earlier run's files first
    folder.end("finished", step=80)

A job takes only names that did not exist before, so files with these names belong to the run; ``--overwrite`` removes
these and nothing else. If a user has since added a file among them, which is then missing in the record, or changed
one, which then differs in size or time, nothing is removed.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import sqlite3
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cola_ray.runs import failure, folder_lock
from cola_ray.runs.folder_lock import LOCK
from cola_ray.runs.redaction import redacted_tree
from cola_ray.settings.config import Config, ConfigError, is_endpoint

State = Literal["running", "finished", "stopped", "failed"]
RECORD = "run.json"
_TOOL = "cola_ray"
_LATE = ("mlflow_run_id", "mlflow_sent.json")  # also written after a run's end, when MLflow is sent what it missed
_EVERY_RUN = (RECORD, LOCK, "config.json", "summary.json", "log.jsonl", "error.txt", "tensorboard", "wandb", *_LATE)
_RL = ("checkpoints", "base", "model", "replay", "critic", "samples", "reward.png")
WRITES: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("checkpoints", "stages", "model", "model.tmp", "losses.png"),
    "reward_model": ("checkpoints", "base", "model", "losses.png"),
    "train_q": ("checkpoints", "model", "losses.png"),
    "rl_math": _RL,
    "rl_agent": _RL,
    "rl_preference": _RL,
    "evaluate": ("base", "predictions", "answers.jsonl", "accuracy.png"),
    "diversity": ("base", "continuations.parquet"),
    "atlas": ("atlas.html",),
    "capabilities": ("harness.json",),
    "sweep": ("runs", "tune", "frontier.png"),
    "reproduce": ("stages", "sums", "report", "head.log"),
}
"""What each job may write in its folder, in addition to what every run writes."""
_BY_LAUNCHER = ("log.txt",)  # written into a stage's folder by the process that started it


def written_by(job: str) -> tuple[str, ...]:
    """Return all names that a job may write in its folder."""
    return (*_EVERY_RUN, *WRITES[job])


_KNOWN = frozenset(name for job in WRITES for name in written_by(job))


@dataclass(eq=False)
class RunFolder:
    """A folder that a job has claimed."""

    path: Path
    job: str
    release: Callable[[], object] = lambda: None
    """Releases the lock; so does the deletion of this object."""
    ended: bool = False

    def lock(self) -> bool:
        """Keep other runs out until this one ends; returns False if another run has the folder."""
        release = folder_lock.acquire(self.path)
        if release is None:
            return False
        self.release = weakref.finalize(self, release)
        return True

    def end(self, state: State, step: int | None = None) -> None:
        """Record how the run ended and which files it wrote, and release the folder."""
        record = read_record(self.path) or {}
        files = {file: _stamp(self.path / file) for file in _files(self.path, record.get("wrote", ()))}
        write_json(self.path / RECORD, record | {"state": state, "step": step, "files": files})
        self.ended = True
        self.release()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Record any exception within the block as the run's end, and raise it with its explanation (failure.py)."""
        try:
            with failure.explained_failures(self.path):
                yield
        except BaseException as error:
            if not self.ended:
                with contextlib.suppress(OSError):  # on a full disk the record stays at "running"
                    self.end("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
            self.release()
            raise


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of the run in this folder; None if no run has written one, or it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("tool") != _TOOL:
        return None
    names, files = record.get("wrote"), record.get("files", {})
    whole = isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(files, dict)
    return record if whole else None


def summary_of(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run that finished; None if it did not."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if summary.get("state", "finished") == "finished" else None


def is_finished(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and record.get("state") == "finished"


def _in_use_message(folder: Path) -> str:
    record = read_record(folder) or {}
    stale = ""
    if folder_lock.named_holder(folder):
        stale = f"; if that process is gone, remove {folder / LOCK}, since this file system has no locks"
    return (
        f"output_dir = {str(folder)!r}: a run of {record.get('job')} is in progress there, process "
        f"{record.get('process')}; wait for its end or stop it, or give another --output-dir{stale}"
    )


def refusals(config: Config, job: str, start: Path | None = None) -> list[str]:
    """Return why the job may not write into ``output_dir``, one line per reason. Changes nothing.

    Args:
        config: with absolute paths.
        job: the job that wants to write.
        start: the model that the run starts from.
    """
    folder = Path(config.output_dir)
    field = f"output_dir = {config.output_dir!r}"
    if config.resume and config.overwrite:
        return ["overwrite = True: contradicts resume = True; leave out --resume or --overwrite"]
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        return [f"{field}: {folder} is a file; give a folder"]
    if folder_lock.is_in_use(folder):
        return [_in_use_message(folder)]
    record, names = read_record(folder), written_by(job)
    ours = [] if record is None else [name for name in record["wrote"] if name in _KNOWN]
    lines = _database_refusals(config, {*names, *ours})
    foreign = [name for name in names if os.path.lexists(folder / name) and name not in ours]
    unknown = [] if record is None else unknown_files(folder)
    away = "give another --output-dir, or move them away"
    if foreign:
        lines.append(f"{field}: has {_listed(foreign)}, which no run of this folder wrote; {away}")
    elif record is not None and config.resume and record.get("job") != job:
        lines.append(f"{field}: holds a run of {record.get('job')}, not of {job}; give another --output-dir")
    elif record is not None and not (config.resume or config.overwrite):
        how = "a finished run" if record.get("state") == "finished" else "an unfinished run"
        at = "" if record.get("step") is None else f", at step {record['step']}"
        lines.append(
            f"{field}: holds {how} of {record.get('job')}{at}; use --resume to continue it, --overwrite to remove it "
            "and begin again, or another --output-dir"
        )
    elif config.overwrite and record is not None and (edited := changed(folder)):
        lines.append(f"{field}: has {_listed(edited)}, which somebody changed after the run; {away}")
    elif unknown:
        fate = "resumed over" if config.resume else "removed with the run"
        lines.append(f"{field}: has {_listed(unknown)}, which the run did not write and which would be {fate}; {away}")
    removed = ours if config.overwrite else []
    return lines + _input_refusals(config, folder, {*names, *removed}, start)


def claim(config: Config, job: str, start: Path | None = None) -> RunFolder:
    """Claim the folder for a job: create it, remove an earlier run if ``overwrite`` is set, write record and settings.

    Raises:
        ConfigError: it may not be claimed, see :func:`refusals`; then nothing has been changed.
    """
    folder = Path(config.output_dir)
    record = read_record(folder)
    lines = refusals(config, job, start)
    if lines:
        raise ConfigError("\n".join(lines))
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder, job)
    if not run.lock():
        raise ConfigError(_in_use_message(folder))
    if read_record(folder) != record:  # the record changed after the refusals had been decided
        run.release()
        raise ConfigError(f"output_dir = {config.output_dir!r}: another run used it a moment ago; try again")
    if record is not None and config.overwrite:
        # The record is removed last, so that after a kill the remaining files still count as the run's; the lock stays.
        for name in sorted({*record["wrote"]} & _KNOWN - {LOCK}, key=lambda name: name == RECORD):
            _remove(folder / name)
        record = None
    (folder / failure.ERROR_FILE).unlink(missing_ok=True)  # from an earlier failure
    begun = {"tool": _TOOL, "job": job, "state": "running", "step": None, "wrote": written_by(job)}
    if record is not None and "inputs" in record:
        begun["inputs"] = record["inputs"]
    write_json(folder / RECORD, begun | {"process": f"{os.getpid()} on {socket.gethostname()}"})
    write_json(folder / "config.json", config.model_dump())
    return run


def unknown_files(folder: Path) -> list[str]:
    """Return files and links below a run's names that it did not write; for a run that was killed, only links."""
    record = read_record(folder) or {}
    names = [name for name in record.get("wrote", ()) if name in _KNOWN]
    found = [name for name in names if (folder / name).is_symlink()]
    if "files" in record:
        known = set(record["files"])
        late = (file for file in _files(folder, names) if file not in known and file not in _LATE)
        found += [file for file in late if file not in found]
    for below in _runs_below(folder, names):
        own = {*(read_record(below) or {}).get("wrote", ()), *_BY_LAUNCHER}
        beside = [str(entry.relative_to(folder)) for entry in sorted(below.iterdir()) if entry.name not in own]
        found += beside + [str((below / file).relative_to(folder)) for file in unknown_files(below)]
    return found


def changed(folder: Path) -> list[str]:
    """Return files of a run that ended, and of runs within it, that have changed since its end."""
    record = read_record(folder) or {}
    files = record.get("files", {})
    now = {file: _stamp(folder / file) for file in files if os.path.lexists(folder / file)}
    found = [file for file, stamp in now.items() if stamp and stamp != files[file]]
    for below in _runs_below(folder, [name for name in record.get("wrote", ()) if name in _KNOWN]):
        found += [str((below / file).relative_to(folder)) for file in changed(below)]
    return found


def _stamp(file: Path) -> list[int] | None:
    """Return size and time; None for a file that is still written to while, or after, the end is recorded."""
    seen = file.lstat()
    late = (RECORD, LOCK, "log.jsonl", *_LATE, *_BY_LAUNCHER)
    return None if file.name in late else [seen.st_size, seen.st_mtime_ns]


def _files(folder: Path, names: Sequence[str]) -> list[str]:
    """Return relative paths of files and links below these names; for runs below them, only the record."""
    found = []
    for name in names:
        place = folder / name
        if place.is_symlink() or place.is_file():
            found.append(name)
            continue
        for here, folders, files in os.walk(place):
            runs = {one for one in folders if read_record(Path(here, one)) is not None}
            folders[:] = sorted({*folders} - runs)
            links = [one for one in folders if Path(here, one).is_symlink()]
            records = [os.path.join(one, RECORD) for one in runs]
            found += [os.path.relpath(Path(here, one), folder) for one in sorted([*files, *links, *records])]
    return found


def _runs_below(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        for here, folders, _ in os.walk(folder / name):
            runs = [one for one in sorted(folders) if read_record(Path(here, one)) is not None]
            yield from (Path(here, one) for one in runs)
            folders[:] = [one for one in folders if one not in runs]


def _remove(path: Path) -> None:
    """Remove a file or a folder; links are removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _input_refusals(config: Config, folder: Path, written: set[str], start: Path | None) -> list[str]:
    """Refuse to overwrite inputs of the run, and to write into them."""
    inputs = [
        ("model.path", config.model.path), ("model.base", config.model.base), ("data.path", config.data.path),
        ("task.path", config.task.path), ("task.game", config.task.game), ("q.path", config.q.path),
        ("task.reward_model", "" if is_endpoint(config.task.reward_model) else config.task.reward_model),
        ("critic.encoder", config.critic.encoder), ("diversity.encoder", config.diversity.encoder),
        ("harness.include_path", config.harness.include_path),
        *(("data.more_paths", path) for path in config.data.more_paths),
        *(("task.more_paths", path) for path in config.task.more_paths),
    ]  # fmt: skip
    lines = []
    folder = folder.resolve()
    for field, value in inputs:
        place = Path(value).expanduser()
        if not value or not place.exists():
            continue
        place = place.resolve()
        if any(place == folder / name or folder / name in place.parents for name in written):
            lines.append(f"{field} = {value!r}: is among the files that the run writes to {folder}; give another "
                         "--output-dir")  # fmt: skip
        elif place == folder or place in folder.parents:
            lines.append(f"{field} = {value!r}: the run would write into it, to {folder}; give another --output-dir")
    if start is not None and not config.model.path and (start == folder or folder in start.resolve().parents):
        lines.append(f"output_dir = {config.output_dir!r}: holds the model that the run starts from; give another one")
    return lines


def _database_refusals(config: Config, written: set[str]) -> list[str]:
    """Refuse another program's database, or one among the files that the run writes; default: beside its folder."""
    folder, given = Path(config.output_dir), config.tracking_uri
    if given and not given.startswith("sqlite:///"):
        return []
    file = Path(given.removeprefix("sqlite:///")) if given else folder.parent / "mlflow.db"
    named = f"tracking_uri = {given!r}" if given else f"output_dir = {config.output_dir!r}"
    fix = "give --tracking-uri, e.g. sqlite:///runs.db"
    place = file.resolve()
    if any(folder / name in (place, *place.parents) for name in written):
        return [f"{named}: is among the files that the run writes to {folder}; {fix}"]
    if not file.exists() or not file.stat().st_size:
        return []
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db,
    ):
        tables = {name for (name,) in db.execute("select name from sqlite_master where type = 'table'")}
        if not tables or "experiments" in tables:
            return []
    return [f"{named}: {file} is not a database of MLflow; {fix}{'' if given else ', or a folder elsewhere'}"]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON to a temporary file with a unique name and rename it, so that a reader never sees half a file.

    Secrets are hidden (redaction.py); to compare current settings with written ones, apply ``redacted_tree`` first.
    """
    staging = path.with_name(f".{path.stem}-{secrets.token_hex(8)}.tmp")
    with staging.open("x") as file:
        file.write(json.dumps(redacted_tree(content), indent=2, default=str) + "\n")
    staging.replace(path)
