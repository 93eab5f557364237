"""Checkpoints: folders of files that are either complete or ignored.

    RUN/checkpoints/step-00000020/...             what ranks, controller and critic saved
                                 /manifest.json   {"step", "ranks", "settings", "files", "outside", "checksum"}
                   /step-00000040.tmp/...         one that is being written, or that a kill interrupted

    seal(staging, ...)        writes the manifest, last of all files; then one rename makes the folder a checkpoint
    newest(RUN)               the newest complete checkpoint, and a line for each newer one that is damaged
    remove_unfinished(RUN)    removes what a kill left behind

``files`` has the size and checksum (xxh3, 64 bits) of every file in the folder; ``outside`` has the same for files
elsewhere in the run that the checkpoint needs, such as rows of replay; and ``checksum`` is that of the manifest itself.
All files are synced to disk before the manifest is written, and the manifest before the folder gets its name.
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
RAY_NOTES = "ray-"
"""Prefix of the folders, beside the checkpoints, in which Ray Train keeps its own records while it runs."""
NUM_KEPT = 2
"""Checkpoints that are kept: the newest, and the one to fall back on if that is damaged."""
Checksums = dict[str, tuple[int, str]]
"""Size in bytes and checksum of files, by their relative paths."""


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete or damaged and must not be loaded."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been verified."""

    folder: Path
    step: int
    ranks: int  # over which the optimizer's state is sharded
    settings: str  # digest of the settings that must not change
    outside: Mapping[str, tuple[int, str]]  # checksums of files of the run outside the folder


@dataclass(frozen=True)
class Newest:
    """The newest complete checkpoint of a run, if any, and what is wrong with newer ones."""

    checkpoint: Checkpoint | None
    damaged: tuple[str, ...] = ()  # e.g. "step 40: zero/... has 5 bytes, not 9"


# --- writing ------------------------------------------------------------------------------------------------------


def path_of(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}"


def staging_path(run: Path, step: int) -> Path:
    """Return the folder in which a checkpoint is written until it is complete."""
    return path_of(run, step).with_suffix(".tmp")


def make_empty(folder: Path) -> None:
    """Create the folder, or remove all that it holds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def checksums(root: Path, files: Iterable[Path]) -> Checksums:
    """Return sizes and checksums of files, which are synced to disk when this returns."""
    return {str(file.relative_to(root)): _checksums_of(file) for file in files}


def seal(folder: Path, step: int, ranks: int, settings: str, files: Checksums, outside: Checksums) -> Path:
    """Make a folder of :func:`staging_path` the run's checkpoint at ``step``; remove all but the last two."""
    target = folder.with_suffix("")
    content = {"step": step, "ranks": ranks, "settings": settings, "files": files, "outside": outside}
    _write_sealed(folder / MANIFEST, content)
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(inner)
    if target.exists():  # a damaged one of the same step; the run would have resumed from an intact one
        shutil.rmtree(target)
    folder.rename(target)
    _sync(target.parent)
    known = sorted(_steps(target.parent))
    for other in [one for one in known if one > step] + [one for one in known if one <= step][:-NUM_KEPT]:
        shutil.rmtree(path_of(target.parent.parent, other))
    return target


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write all of a file or none of it, even if the power fails."""
    staging = path.with_suffix(".tmp")
    with staging.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    staging.rename(path)
    _sync(path.parent)


def checksum(path: Path) -> str:
    """Return the xxh3 checksum of a file, as hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest(content: Any) -> str:
    """Return a checksum of JSON data."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


# --- finding ------------------------------------------------------------------------------------------------------


def newest(run: Path) -> Newest:
    """Find the newest complete checkpoint; reads all bytes of the checkpoints that it looks at."""
    damaged: list[str] = []
    for step in sorted(_steps(run / FOLDER), reverse=True):
        try:
            return Newest(read(path_of(run, step)), tuple(damaged))
        except CheckpointError as error:
            damaged.append(f"step {step}: {error}")
    return Newest(None, tuple(damaged))


def read(folder: Path) -> Checkpoint:
    """Verify a checkpoint.

    Raises:
        CheckpointError: it is incomplete or damaged; the message names the file.
    """
    run, content = folder.parent.parent, _read_sealed(folder / MANIFEST)
    if path_of(run, content["step"]) != folder:
        raise CheckpointError(f"{MANIFEST} is that of step {content['step']}")
    _verify(folder, content["files"])
    _verify(run, content["outside"])
    return Checkpoint(folder, content["step"], content["ranks"], content["settings"], content["outside"])


def steps_of(run: Path) -> list[int]:
    """Steps of the checkpoints that are kept, in order; nothing is verified."""
    return sorted(_steps(run / FOLDER))


def remove_unfinished(run: Path) -> None:
    """Remove checkpoints that were never sealed, and Ray Train's records. No other process may be using the folder."""
    for folder in (run / FOLDER).glob("*"):
        unsealed = folder.suffix == ".tmp" and _step_of(folder.with_suffix("")) is not None
        if unsealed or re.fullmatch(rf"{RAY_NOTES}[0-9a-f]{{8}}", folder.name):
            shutil.rmtree(folder)


# --- a folder that one process writes, such as a stage's model -------------------------------------------------------


def seal_stage(folder: Path, done: str, facts: Mapping[str, Any]) -> None:
    """Write the file ``done``, last of the folder's files: the facts, and checksums of the other files."""
    files = checksums(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    _write_sealed(folder / done, {**facts, "files": files})


def fault_of_stage(folder: Path, done: str) -> str:
    """Return what is wrong with a sealed folder; "" if it is intact."""
    try:
        _verify(folder, _read_sealed(folder / done)["files"])
    except CheckpointError as error:
        return str(error)
    return ""


# --- parts --------------------------------------------------------------------------------------------------------


def _write_sealed(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content | {"checksum": digest(content)}, indent=1, sort_keys=True)
    write_atomically(file, lambda opened: opened.write(text.encode()))


def _read_sealed(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        recorded = content.pop("checksum")
    except OSError as error:
        raise CheckpointError(f"{file.name} {_reason(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        recorded = None
    if recorded is None or digest(content) != recorded:
        raise CheckpointError(f"{file.name} has changed since it was written")
    return content


def _verify(root: Path, files: Mapping[str, Sequence[Any]]) -> None:
    for name, (size, content) in files.items():
        file = root / name
        try:
            if file.stat().st_size != size:
                raise CheckpointError(f"{name} has {file.stat().st_size} bytes, not {size}")
            if checksum(file) != content:
                raise CheckpointError(f"{name} has changed since it was written")
        except OSError as error:
            raise CheckpointError(f"{name} {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def _steps(folder: Path) -> Iterator[int]:
    for entry in folder.glob("step-*"):
        step = _step_of(entry)
        if step is not None:
            yield step


def _step_of(folder: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", folder.name)
    return int(match[1]) if match else None


def _checksums_of(file: Path) -> tuple[int, str]:
    _sync(file)
    return file.stat().st_size, checksum(file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
