"""Checkpoints: folders of files that are whole, or do not count.

    RUN/checkpoints/step-00000020/...             what ranks, controller and critic saved
                                 /manifest.json   {"step", "ranks", "settings", "files", "beside", "checksum"}
                   /step-00000040.tmp/...         one that is being written, or that a kill cut short

    seal(staging, ...)        the manifest, last of all files; then one rename makes the folder a checkpoint
    found = newest(RUN)       the newest that is whole, and a line for each newer one that is not
    tidy(RUN)                 what a kill left behind

``files`` has the size and checksum (xxh3, 64 bits) of every file of the folder, ``beside`` of files elsewhere in the
run that the checkpoint needs, e.g. the rows of replay, and ``checksum`` that of the manifest itself. Everything is
synced to disk before the manifest is written, and the manifest before the folder gets its name.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

FOLDER, MANIFEST = "checkpoints", "manifest.json"
NOTES = "ray-"
"""Begins the names of folders beside checkpoints in which Ray Train notes what it does while it runs."""
KEPT = 2
"""Whole checkpoints that stay: the newest, and the one to go on from should it be damaged."""
Described = dict[str, tuple[int, str]]
"""Of files by their relative path: bytes and checksum."""


class CheckpointError(RuntimeError):
    """A checkpoint that must not be loaded."""


@dataclass(frozen=True)
class Checkpoint:
    """One that has been found whole."""

    folder: Path
    step: int
    ranks: int  # over which the optimizer's state is cut
    settings: str  # digest of those that must not change
    beside: Mapping[str, tuple[int, str]]


@dataclass(frozen=True)
class Found:
    """Of all checkpoints of a run: the newest whole one, if any, and what is wrong with those that are newer."""

    checkpoint: Checkpoint | None
    damaged: tuple[str, ...] = ()  # "step 40: zero/... has 5 bytes, not 9"


# --- writing ------------------------------------------------------------------------------------------------------


def place(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}"


def staged(run: Path, step: int) -> Path:
    """Where a checkpoint is written before it is one."""
    return place(run, step).with_suffix(".tmp")


def clear(folder: Path) -> None:
    """Make it an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def describe(root: Path, files: Iterable[Path]) -> Described:
    """Sizes and checksums; on disk for good when this returns."""
    return {str(file.relative_to(root)): _described(file) for file in files}


def seal(folder: Path, step: int, ranks: int, settings: str, files: Described, beside: Described) -> Path:
    """Make a folder of :func:`staged` the run's checkpoint at ``step``; older ones than the last two go then."""
    target = folder.with_suffix("")
    content = {"step": step, "ranks": ranks, "settings": settings, "files": files, "beside": beside}
    _write_sealed(folder / MANIFEST, content)
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(inner)
    if target.exists():  # of the same step, damaged, or it would have been gone on from
        shutil.rmtree(target)
    folder.rename(target)
    _sync(target.parent)
    known = sorted(_steps(target.parent))
    for other in [one for one in known if one > step] + [one for one in known if one <= step][:-KEPT]:
        shutil.rmtree(place(target.parent.parent, other))
    return target


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """All of the file or none of it, also across a power cut."""
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    _sync(path.parent)


def checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest(content: Any) -> str:
    """Of what JSON can say."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


# --- finding ------------------------------------------------------------------------------------------------------


def newest(run: Path) -> Found:
    """All bytes of the checkpoints that are looked at are read."""
    damaged: list[str] = []
    for step in sorted(_steps(run / FOLDER), reverse=True):
        try:
            return Found(read(place(run, step)), tuple(damaged))
        except CheckpointError as error:
            damaged.append(f"step {step}: {error}")
    return Found(None, tuple(damaged))


def read(folder: Path) -> Checkpoint:
    """Raises CheckpointError where it is not whole; the message names the file."""
    run, content = folder.parent.parent, _read_sealed(folder / MANIFEST)
    if place(run, content["step"]) != folder:
        raise CheckpointError(f"{MANIFEST} is that of step {content['step']}")
    _check(folder, content["files"])
    _check(run, content["beside"])
    return Checkpoint(folder, content["step"], content["ranks"], content["settings"], content["beside"])


def tidy(run: Path) -> None:
    """Remove checkpoints that were never sealed, and Ray Train's notes. Nobody else may be at work in the folder."""
    for folder in (run / FOLDER).glob("*"):
        unsealed = folder.suffix == ".tmp" and _step_of(folder.with_suffix("")) is not None
        if unsealed or re.fullmatch(rf"{NOTES}[0-9a-f]{{8}}", folder.name):
            shutil.rmtree(folder)


# --- a folder that one process writes, a stage's model say -----------------------------------------------------------


def seal_stage(folder: Path, done: str, facts: Mapping[str, Any]) -> None:
    """Write ``done``, last of the folder's files: the facts, and what the others are."""
    files = describe(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    _write_sealed(folder / done, {**facts, "files": files})


def fault_of_stage(folder: Path, done: str) -> str:
    """Why a sealed folder is not whole; empty where it is."""
    try:
        _check(folder, _read_sealed(folder / done)["files"])
    except CheckpointError as error:
        return str(error)
    return ""


# --- parts --------------------------------------------------------------------------------------------------------


def _write_sealed(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content | {"checksum": digest(content)}, indent=1, sort_keys=True)
    write_whole(file, lambda opened: opened.write(text.encode()))


def _read_sealed(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        said = content.pop("checksum")
    except OSError as error:
        raise CheckpointError(f"{file.name} {_unread(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        said = None
    if said is None or digest(content) != said:
        raise CheckpointError(f"{file.name} is not as it was written")
    return content


def _check(root: Path, files: Mapping[str, Sequence[Any]]) -> None:
    for name, (size, content) in files.items():
        file = root / name
        try:
            if file.stat().st_size != size:
                raise CheckpointError(f"{name} has {file.stat().st_size} bytes, not {size}")
            if checksum(file) != content:
                raise CheckpointError(f"{name} is not as it was written")
        except OSError as error:
            raise CheckpointError(f"{name} {_unread(error)}") from None


def _unread(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def _steps(folder: Path) -> Iterator[int]:
    for entry in folder.glob("step-*"):
        step = _step_of(entry)
        if step is not None:
            yield step


def _step_of(folder: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", folder.name)
    return int(match[1]) if match else None


def _described(file: Path) -> tuple[int, str]:
    _sync(file)
    return file.stat().st_size, checksum(file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
