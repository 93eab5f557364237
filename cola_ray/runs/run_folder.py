"""A run's folder: what a job may write there, and the record of what it did.

    RUN/run.json    {"tool": "cola_ray", "job": ..., "state": ..., "step": ..., "process": "PID on HOST",
                     "wrote": [names], "files": {path: [bytes, time in ns]}}

    lines = refusals(config, "rl_math")      # why the job may not write there; empty: it may
    folder = claim(config, "rl_math")        # removes an earlier run's names, with consent alone, and writes the record
    folder.end("finished", step=80)

A job takes names that nothing had before, so whatever bears them later is the run's: that, and nothing else, is what
``--overwrite`` removes. Files that somebody put among them meanwhile are known by not being in the record, files that
somebody changed by their size and time. A run at work holds a lock on its folder, which ends with the process.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import sqlite3
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cola_ray.runs import ending
from cola_ray.runs.redaction import redacted_tree
from cola_ray.settings.config import Config, ConfigError, is_endpoint

State = Literal["running", "finished", "stopped", "failed"]
RECORD = "run.json"
_TOOL = "cola_ray"
_LATE = ("mlflow_run_id", "mlflow_sent.json")  # what is sent to MLflow after a run's end is noted there
LOCK = "run.lock"
_EVERY_RUN = (RECORD, LOCK, "config.json", "summary.json", "log.jsonl", "error.txt", *_LATE)
_RL = ("checkpoints", "base", "model", "replay", "critic", "reward.png")
WRITES: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("checkpoints", "stages", "model", "model.tmp", "losses.png"),
    "reward_model": ("checkpoints", "base", "model", "losses.png"),
    "train_q": ("checkpoints", "model", "losses.png"),
    "rl_math": _RL,
    "rl_agent": _RL,
    "rl_preference": _RL,
    "evaluate": ("base", "predictions", "accuracy.png"),
    "diversity": ("base", "continuations.parquet"),
    "atlas": ("atlas.html",),
    "capabilities": ("harness.json",),
    "sweep": ("runs", "tune", "frontier.png"),
    "reproduce": ("stages", "sums", "report", "head.log"),
}
"""What each job may write in its folder, beside the names of every run."""
_BESIDE = ("log.txt",)  # written into a stage's folder by whoever started it


def written_by(job: str) -> tuple[str, ...]:
    return (*_EVERY_RUN, *WRITES[job])


_KNOWN = frozenset(name for job in WRITES for name in written_by(job))


@dataclass(eq=False)
class RunFolder:
    """One that a job has claimed."""

    path: Path
    job: str
    release: Callable[[], object] = lambda: None
    """Ends the lock; so does the end of this object."""
    ended: bool = False

    def lock(self) -> bool:
        """Keep other runs away until this one ends; false where another has done so."""
        for place in (self.path, self.path / LOCK):
            handle = _opened(place, create=True)
            with contextlib.suppress(OSError):
                if not _locked(handle, fcntl.LOCK_EX):
                    os.close(handle)
                    return False
                self.release = weakref.finalize(self, os.close, handle)
                return True
            os.close(handle)
        # A file system without locks: the file says who is at work.
        if _named_in(self.path / LOCK):
            return False
        (self.path / LOCK).write_text(this_process())
        self.release = weakref.finalize(self, _unname, self.path / LOCK, this_process())
        return True

    def end(self, state: State, step: int | None = None) -> None:
        """Record how the run ended, and which files are its own; others may have the folder then."""
        record = read_record(self.path) or {}
        files = {file: _stamp(self.path / file) for file in _files(self.path, record.get("wrote", ()))}
        write_json(self.path / RECORD, record | {"state": state, "step": step, "files": files})
        self.ended = True
        self.release()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Whatever ends the run in here is recorded as its end, and raised in words (ending.py)."""
        try:
            with ending.in_words(self.path):
                yield
        except BaseException as error:
            if not self.ended:
                with contextlib.suppress(OSError):  # a disk that takes no more leaves the record at "running"
                    self.end("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
            self.release()
            raise


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run in this folder; None where no run of ours has written, or it is not whole."""
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
    """Of a run that came to its end; None where it did not."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if summary.get("state", "finished") == "finished" else None


def is_finished(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and record.get("state") == "finished"


def is_at_work(folder: Path) -> bool:
    """Whether a run holds the folder."""
    for place in (folder, folder / LOCK):
        try:
            handle = _opened(place)
        except OSError:
            return False
        try:
            return not _locked(handle, fcntl.LOCK_SH)
        except OSError:  # this cannot be locked
            continue
        finally:
            os.close(handle)
    return bool(_named_in(folder / LOCK))


def this_process() -> str:
    """``PID on HOST, since TICKS``, the last of which tells it from a later process of the same number."""
    return f"{os.getpid()} on {socket.gethostname()}, since {_began(os.getpid())}"


def _opened(place: Path, create: bool = False) -> int:
    """A folder, or the file beside: network file systems lock files that are open for writing, and no folders."""
    how = os.O_RDONLY | os.O_DIRECTORY if place.name != LOCK else os.O_RDWR | (os.O_CREAT if create else 0)
    return os.open(place, how)


def _locked(handle: int, how: int) -> bool:
    """False where another has it; raises OSError where it cannot be locked."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _named_in(lock: Path) -> str:
    """The process that a lock file names; empty where there is none, or it is known to be gone."""
    try:
        holder = lock.read_text()
    except OSError:
        return ""
    match = re.fullmatch(r"(\d+) on (.+), since (\d+)", holder)
    if match and match[2] == socket.gethostname() and _began(int(match[1])) != int(match[3]):
        return ""
    return holder


def _unname(lock: Path, holder: str) -> None:
    with contextlib.suppress(OSError):
        if lock.read_text() == holder:
            lock.unlink()


def _began(process: int) -> int:
    """When a process of this machine was started, in ticks since boot; 0 where there is none."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _at_work(folder: Path) -> str:
    record = read_record(folder) or {}
    gone = ""
    if _named_in(folder / LOCK):
        gone = f"; if it is gone, remove {folder / LOCK}, since this file system keeps no locks"
    return (
        f"output_dir = {str(folder)!r}: a run of {record.get('job')} is at work there, process "
        f"{record.get('process')}; wait for its end or stop it, or give another --output-dir{gone}"
    )


def refusals(config: Config, job: str, start: Path | None = None) -> list[str]:
    """Why the job may not write into ``output_dir``, a line each. Changes nothing.

    Args:
        config: with absolute paths.
        start: the model that the run starts from.
    """
    folder = Path(config.output_dir)
    said = f"output_dir = {config.output_dir!r}"
    if config.resume and config.overwrite:
        return ["overwrite = True: a run is either resumed or begun anew; leave --resume or --overwrite out"]
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        return [f"{said}: {folder} is a file; give a folder"]
    if is_at_work(folder):
        return [_at_work(folder)]
    record, names = read_record(folder), written_by(job)
    ours = [] if record is None else [name for name in record["wrote"] if name in _KNOWN]
    lines = _no_database(config, {*names, *ours})
    foreign = [name for name in names if os.path.lexists(folder / name) and name not in ours]
    strange = [] if record is None else strangers(folder)
    away = "give another --output-dir, or move them away"
    if foreign:
        lines.append(f"{said}: has {_listed(foreign)}, which no run of this folder wrote; {away}")
    elif record is not None and config.resume and record.get("job") != job:
        lines.append(f"{said}: holds a run of {record.get('job')}, not of {job}; give another --output-dir")
    elif record is not None and not (config.resume or config.overwrite):
        how = "a finished run" if record.get("state") == "finished" else "an unfinished run"
        at = "" if record.get("step") is None else f", at step {record['step']}"
        lines.append(
            f"{said}: holds {how} of {record.get('job')}{at}; use --resume to go on with it, --overwrite to remove it "
            "and begin anew, or another --output-dir"
        )
    elif config.overwrite and record is not None and (edited := changed(folder)):
        lines.append(f"{said}: has {_listed(edited)}, which somebody changed after the run; {away}")
    elif strange:
        verb = "resumed over" if config.resume else "removed with the run"
        lines.append(f"{said}: has {_listed(strange)}, which the run did not write and which would be {verb}; {away}")
    removed = ours if config.overwrite else []
    return lines + _inputs_within(config, folder, {*names, *removed}, start)


def claim(config: Config, job: str, start: Path | None = None) -> RunFolder:
    """Take the folder for a job: make it, remove an earlier run with ``overwrite``, write record and settings.

    Raises:
        ConfigError: it may not be taken, see :func:`refusals`; then nothing has been touched.
    """
    folder = Path(config.output_dir)
    record = read_record(folder)
    lines = refusals(config, job, start)
    if lines:
        raise ConfigError("\n".join(lines))
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder, job)
    if not run.lock():
        raise ConfigError(_at_work(folder))
    if read_record(folder) != record:  # judged by what is no longer there
        run.release()
        raise ConfigError(f"output_dir = {config.output_dir!r}: another run was there a moment ago; try again")
    if record is not None and config.overwrite:
        # The record goes last: what a kill leaves behind is still known to be the run's. The lock stays.
        for name in sorted({*record["wrote"]} & _KNOWN - {LOCK}, key=lambda name: name == RECORD):
            _remove(folder / name)
        record = None
    (folder / ending.FILE).unlink(missing_ok=True)  # of an earlier end
    begun = {"tool": _TOOL, "job": job, "state": "running", "step": None, "wrote": written_by(job)}
    if record is not None and "inputs" in record:
        begun["inputs"] = record["inputs"]
    write_json(folder / RECORD, begun | {"process": f"{os.getpid()} on {socket.gethostname()}"})
    write_json(folder / "config.json", config.model_dump())
    return run


def strangers(folder: Path) -> list[str]:
    """Files and links among a run's own that it did not write; of a run that was killed, links alone."""
    record = read_record(folder) or {}
    names = [name for name in record.get("wrote", ()) if name in _KNOWN]
    found = [name for name in names if (folder / name).is_symlink()]
    if "files" in record:
        known = set(record["files"])
        late = (file for file in _files(folder, names) if file not in known and file not in _LATE)
        found += [file for file in late if file not in found]
    for below in _runs_below(folder, names):
        own = {*(read_record(below) or {}).get("wrote", ()), *_BESIDE}
        beside = [str(entry.relative_to(folder)) for entry in sorted(below.iterdir()) if entry.name not in own]
        found += beside + [str((below / file).relative_to(folder)) for file in strangers(below)]
    return found


def changed(folder: Path) -> list[str]:
    """Files of a run that ended, and of runs within it, that are no longer as they were at its end."""
    record = read_record(folder) or {}
    files = record.get("files", {})
    now = {file: _stamp(folder / file) for file in files if os.path.lexists(folder / file)}
    found = [file for file, stamp in now.items() if stamp and stamp != files[file]]
    for below in _runs_below(folder, [name for name in record.get("wrote", ()) if name in _KNOWN]):
        found += [str((below / file).relative_to(folder)) for file in changed(below)]
    return found


def _stamp(file: Path) -> list[int] | None:
    """Size and time; None of what a run still writes to while and after it says how it ended."""
    seen = file.lstat()
    return None if file.name in (RECORD, LOCK, "log.jsonl", *_LATE, *_BESIDE) else [seen.st_size, seen.st_mtime_ns]


def _files(folder: Path, names: Sequence[str]) -> list[str]:
    """Relative paths of files and links below these names; of folders of runs their records, which name the rest."""
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
    """A file or a folder; of links below it, the links alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _inputs_within(config: Config, folder: Path, written: set[str], start: Path | None) -> list[str]:
    """What is read may not be written over, and nothing is written into what is read."""
    inputs = {
        "model.path": config.model.path, "model.base": config.model.base, "data.path": config.data.path,
        "task.path": config.task.path, "task.game": config.task.game, "q.path": config.q.path,
        "task.reward_model": "" if is_endpoint(config.task.reward_model) else config.task.reward_model,
        "critic.encoder": config.critic.encoder, "diversity.encoder": config.diversity.encoder,
        "harness.include_path": config.harness.include_path,
    }  # fmt: skip
    lines = []
    folder = folder.resolve()
    for field, value in inputs.items():
        place = Path(value).expanduser()
        if not value or not place.exists():
            continue
        place = place.resolve()
        if any(place == folder / name or folder / name in place.parents for name in written):
            lines.append(f"{field} = {value!r}: lies in what the run writes to {folder}; give another --output-dir")
        elif place == folder or place in folder.parents:
            lines.append(f"{field} = {value!r}: the run would write into it, to {folder}; give another --output-dir")
    if start is not None and not config.model.path and (start == folder or folder in start.resolve().parents):
        lines.append(f"output_dir = {config.output_dir!r}: holds the model that the run starts from; give another")
    return lines


def _no_database(config: Config, written: set[str]) -> list[str]:
    """Another program's database is not taken for runs, nor one among what a run writes; by default it lies beside."""
    folder, given = Path(config.output_dir), config.tracking_uri
    if given and not given.startswith("sqlite:///"):
        return []
    file = Path(given.removeprefix("sqlite:///")) if given else folder.parent / "mlflow.db"
    named = f"tracking_uri = {given!r}" if given else f"output_dir = {config.output_dir!r}"
    another = "give --tracking-uri, e.g. sqlite:///runs.db"
    place = file.resolve()
    if any(folder / name in (place, *place.parents) for name in written):
        return [f"{named}: lies in what the run writes to {folder}; {another}"]
    if not file.exists() or not file.stat().st_size:
        return []
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db,
    ):
        tables = {name for (name,) in db.execute("select name from sqlite_master where type = 'table'")}
        if not tables or "experiments" in tables:
            return []
    return [f"{named}: {file} is no database of MLflow; {another}{'' if given else ', or a folder elsewhere'}"]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """In one rename, so that a reader never sees half a file; through a file whose name nobody else has.

    Secrets in it are hidden, see redaction.py: settings of now are compared with written ones by ``redacted_tree``.
    """
    staging = path.with_name(f".{path.stem}-{secrets.token_hex(8)}.tmp")
    with staging.open("x") as file:
        file.write(json.dumps(redacted_tree(content), indent=2, default=str) + "\n")
    staging.replace(path)
