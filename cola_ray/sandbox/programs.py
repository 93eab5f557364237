"""Runs untrusted Python programs.

    Sandbox.run(source, files) ─> a scratch folder with program.py and files ─> the server forks: server.py
                                                                                    │ watches its limits
                                                                                    v
                                  ProgramResult(returncode, output, stopped, files);  the folder is removed

Needs Linux 5.13 or newer, for Landlock and seccomp, but no privileges and no container. A program sees the
interpreter's libraries and its own folder, but not the environment. It cannot start processes or threads, so killing
one process is enough, and the server kills it when the process that uses the sandbox ends, for whatever reason.
docs/reliability.md lists the attacks that were tried and what stopped them.
"""

import contextlib
import functools
import json
import logging
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cola_ray.sandbox import confine
from cola_ray.sandbox import server as sandbox_server
from cola_ray.sandbox.libraries import all_libraries, libraries_of

log = logging.getLogger(__name__)

_START_S = 300.0
"""Seconds that the server may take to import what programs need."""
_REPLY_S = 30.0
"""Seconds that the server may take to prepare and to kill a program, in addition to the program's own time."""


class NoSandboxError(RuntimeError):
    """This machine's kernel cannot confine a program; nothing was executed."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_s: float = 60.0
    cpu_s: float = 30.0
    memory_mb: int = 3072
    """Address space; numerical libraries reserve more of it than they use."""
    file_mb: int = 64
    """Size of each file."""
    folder_mb: int = 256
    """Size of the folder, checked some twenty times a second."""
    folder_files: int = 256
    """Number of files in the folder, checked as often."""
    output_kb: int = 64
    """Standard output and error together; a program that writes more is stopped."""
    result_kb: int = 1024
    """Size of each file that is returned."""


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended and what it left."""

    returncode: int  # negative: the signal that ended it
    output: str  # standard output and error, interleaved as they came
    stopped: str = ""  # which limit it broke, in words; "" if it ended by itself
    files: Mapping[str, bytes] = field(default_factory=dict)  # those of the wanted files that it left
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def succeeded(self) -> bool:
        return self.returncode == 0 and not self.stopped


class Sandbox:
    """A server that has imported what programs need, so that they start at once; it runs one program at a time.

    Args:
        limits: for programs that are run without limits of their own.
        prepare: Python source, mostly imports, that the server executes beforehand with the rights of this process.
        distributions: installed distributions whose modules programs can import, along with their requirements and the
            standard library. Tables that come with them cannot be read.

    Example: ``Sandbox().run("print(6 * 7)").output == "42\\n"``.
    """

    def __init__(self, limits: Limits | None = None, prepare: str = "", distributions: tuple[str, ...] = ()) -> None:
        self.limits, self.prepare, self.distributions = limits or Limits(), prepare, distributions
        self.lock = threading.Lock()
        self.server: subprocess.Popen[bytes] | None = None
        self.number = 0

    def start(self) -> None:
        """Start the server now, so that the first program does not wait for the imports.

        Raises:
            NoSandboxError: the kernel offers no confinement.
        """
        with self.lock:
            self._start_if_gone()

    def run(
        self,
        source: str,
        files: Mapping[str, bytes] | None = None,
        wanted: tuple[str, ...] = (),
        limits: Limits | None = None,
    ) -> ProgramResult:
        """Run Python source in a folder of its own. Thread-safe.

        Args:
            source: of the program.
            files: names and contents of files to put into the folder.
            wanted: names of files to return if the program leaves them.
            limits: for this program, instead of the sandbox's.

        Raises:
            NoSandboxError: the kernel offers no confinement; nothing was run.
        """
        given = (source, files or {}, wanted, limits or self.limits)
        with self.lock:
            try:
                with contextlib.suppress(_ServerGoneError):  # it was killed or stopped, which no program can do: retry
                    return self._attempt(*given)
                return self._attempt(*given)
            except _ServerGoneError as error:
                return ProgramResult(-signal.SIGKILL, "", str(error), {}, given[-1].wall_s, given[-1].cpu_s)

    def _attempt(
        self, source: str, files: Mapping[str, bytes], wanted: tuple[str, ...], limits: Limits
    ) -> ProgramResult:
        """Run the program; raises _ServerGoneError if the server dies, after which the next attempt starts another."""
        self._start_if_gone()
        place = Path(tempfile.mkdtemp(dir=self.scratch))
        try:
            return self._run(place, source, files, wanted, limits)
        except _ServerGoneError:
            self.close()
            raise
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _run(
        self, place: Path, source: str, files: Mapping[str, bytes], wanted: tuple[str, ...], limits: Limits
    ) -> ProgramResult:
        folder, output = place / "folder", place / "output"
        folder.mkdir()
        output.touch()
        for name, content in {sandbox_server.PROGRAM: source.encode(errors="replace"), **files}.items():
            (folder / name).write_bytes(content)
        self.number += 1
        request = {"number": self.number, "folder": str(folder), "output": str(output), **asdict(limits)}
        reply = self._request(request, limits.wall_s + _REPLY_S)
        returncode, wall_s, cpu_s = reply["returncode"], reply["wall_s"], reply["cpu_s"]
        stopped = reply["stopped"] or _limit_broken(returncode, cpu_s, limits)
        with output.open("rb") as file:
            text = file.read(limits.output_kb << 10).decode(errors="replace")
        found: dict[str, bytes] = {}
        try:
            found.update(_collect(folder, wanted, limits))
        except _NoResultError as error:
            stopped = stopped or str(error)
        return ProgramResult(returncode, text, stopped, found, wall_s, cpu_s)

    def close(self) -> None:
        """End the server; the next run starts another."""
        if self.server is not None:
            self.finalizer()
            self.server = None

    def _request(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the server's reply; raises _ServerGoneError if it ended, said nothing in time, or replied wrongly."""
        self._send(request)
        reply = self._receive(seconds)
        if reply.get("number") != request["number"]:
            raise _ServerGoneError("the sandbox's server replied to another request")
        return reply

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.server is not None
        assert self.server.stdin is not None
        left = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while left:
                left = left[self.server.stdin.write(left) :]
        except OSError:
            raise _ServerGoneError("the sandbox's server ended") from None

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self.server is not None
        assert self.server.stdout is not None
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left = max(deadline - time.monotonic(), 0.0)
            if not select.select([self.server.stdout], [], [], left)[0]:
                raise _ServerGoneError(f"the sandbox's server said nothing for {seconds:g} s")
            part = os.read(self.server.stdout.fileno(), 1 << 16)
            if not part:
                raise _ServerGoneError("the sandbox's server ended")
            line += part
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _start_if_gone(self) -> None:
        if self.server is not None and self.server.poll() is None:
            return
        self.close()
        readable, listable = libraries_of(self.distributions)
        self.scratch = tempfile.mkdtemp(prefix="sandbox-")
        settings = {
            "scratch": self.scratch, "prepare": self.prepare, "readable": readable, "listable": listable
        }  # fmt: skip
        one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        self.server = subprocess.Popen(
            [sys.executable, "-I", sandbox_server.__file__],
            cwd="/",
            env={"PATH": "", "JOBLIB_MULTIPROCESSING": "0", "LOKY_MAX_CPU_COUNT": "1", **one_thread},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a terminal's signals reach this process alone, which then ends the server
        )
        self.finalizer = weakref.finalize(self, _end, self.server, self.scratch)
        try:
            self._send(settings)
            ready = self._receive(_START_S)
        except _ServerGoneError as error:
            self.close()
            raise NoSandboxError(f"generated programs are not run: {error} before it was ready") from None
        if ready["problem"]:
            self.close()
            raise NoSandboxError(f"generated programs are not run: {ready['problem']}")
        _warn_of_gaps(ready["landlock"])


class _ServerGoneError(Exception):
    """The sandbox's server does not reply as it should; the message says why."""


class _NoResultError(Exception):
    """A program left something that cannot be returned; the message says what."""


def _end(server: subprocess.Popen[bytes], scratch: str) -> None:
    server.kill()
    server.communicate()
    shutil.rmtree(scratch, ignore_errors=True)


@functools.cache
def _warn_of_gaps(version: int) -> None:
    if version in confine.MISSING:
        log.warning(
            "this kernel's Landlock (version %d) does not refuse %s: only the filter over system calls keeps generated "
            "programs from them",
            version,
            confine.MISSING[version],
        )


def confine_this_process() -> None:
    """Restrict this process to reading libraries and to the system calls that computing needs; see sandbox/confine.py.

    Raises:
        NoSandboxError: the kernel offers no confinement, or this process has more than one thread.
    """
    try:
        confine.bind(confine.readable_files(all_libraries()))
    except OSError as error:
        raise NoSandboxError(f"generated code is not executed: {error}") from None
    _warn_of_gaps(confine.landlock_version())


# --- what a program left --------------------------------------------------------------------------------------------


def _limit_broken(returncode: int, cpu_s: float, limits: Limits) -> str:
    """Return which of the kernel's limits ended the program, in words."""
    if returncode == -signal.SIGXCPU or (returncode == -signal.SIGKILL and cpu_s > limits.cpu_s / 2):
        return f"it used more than {limits.cpu_s:.3g} CPU seconds"
    if returncode == -signal.SIGKILL:
        return "it was killed: by itself, or because the machine ran out of memory"
    if returncode == -signal.SIGXFSZ:
        return f"one of its files became larger than {limits.file_mb} MB"
    return ""


def _collect(folder: Path, wanted: tuple[str, ...], limits: Limits) -> Iterator[tuple[str, bytes]]:
    """Yield the wanted files; raises _NoResultError if one is not a plain file within the size limit."""
    most = limits.result_kb << 10
    for name in wanted:
        refused = _NoResultError(f"its {name} is not a plain file of at most {limits.result_kb} KB")
        try:
            opened = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError:  # a link, or a file that cannot be read
            raise refused from None
        try:
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > most:
                raise refused
            yield name, _read(opened, status.st_size)
        finally:
            os.close(opened)


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.read(descriptor, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
