"""A lock on a run's folder, which the operating system releases however the process ends.

release = acquire(folder)     None if another run holds the folder
is_in_use(folder)             whether any run does
named_holder(folder)          the process that the lock file names, on file systems without locks
"""

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

LOCK = "run.lock"


def acquire(folder: Path) -> Callable[[], object] | None:
    """Keep other runs out of the folder. Returns a function that releases the lock, or None if another run has it."""
    for place in (folder, folder / LOCK):
        handle = _open(place, create=True)
        with contextlib.suppress(OSError):
            if not _lock(handle, fcntl.LOCK_EX):
                os.close(handle)
                return None
            return lambda: os.close(handle)
        os.close(handle)
    # A file system without locks: the file names the process that holds the folder.
    if named_holder(folder):
        return None
    holder = this_process()
    (folder / LOCK).write_text(holder)
    return lambda: _remove_name(folder / LOCK, holder)


def is_in_use(folder: Path) -> bool:
    """Whether a run holds the folder."""
    for place in (folder, folder / LOCK):
        try:
            handle = _open(place)
        except OSError:
            return False
        try:
            return not _lock(handle, fcntl.LOCK_SH)
        except OSError:  # this file system has no locks
            continue
        finally:
            os.close(handle)
    return bool(named_holder(folder))


def named_holder(folder: Path) -> str:
    """Return the process that the lock file names; "" if there is none, or it is known to have ended."""
    try:
        holder = (folder / LOCK).read_text()
    except OSError:
        return ""
    match = re.fullmatch(r"(\d+) on (.+), since (\d+)", holder)
    if match and match[2] == socket.gethostname() and _start_time(int(match[1])) != int(match[3]):
        return ""
    return holder


def this_process() -> str:
    """Return ``PID on HOST, since TICKS``; the ticks tell it from a later process with the same number."""
    return f"{os.getpid()} on {socket.gethostname()}, since {_start_time(os.getpid())}"


def _open(place: Path, create: bool = False) -> int:
    """Open a folder, or the lock file for writing: network file systems lock only files that are open for writing."""
    flags = os.O_RDONLY | os.O_DIRECTORY if place.name != LOCK else os.O_RDWR | (os.O_CREAT if create else 0)
    return os.open(place, flags)


def _lock(handle: int, operation: int) -> bool:
    """Return whether the lock was free; raises OSError if the file system has no locks."""
    try:
        fcntl.flock(handle, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_name(lock: Path, holder: str) -> None:
    with contextlib.suppress(OSError):
        if lock.read_text() == holder:
            lock.unlink()


def _start_time(process: int) -> int:
    """Return when a process of this machine started, in ticks since boot; 0 if there is no such process."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
