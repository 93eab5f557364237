"""Runs programs that nobody has read.

    Sandbox.run(source, files) ─> a scratch folder with program.py and files ─> the server forks: server.py
                                                                                    │ watches its limits
                                                                                    v
                                  Ran(returncode, output, stopped, files)      the folder is gone

Linux only, 5.13 or newer, for Landlock and seccomp; it needs no privileges and no container. A program sees the
interpreter's own libraries and its folder, and nothing of the environment. It cannot start processes or threads, so
that killing one process is killing all of it, and the server kills it when this process ends, however that comes.
docs/reliability.md has what was tried and what held.
"""

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from cola_ray.sandbox import confine
from cola_ray.sandbox import server as sandbox_server

log = logging.getLogger(__name__)

_START_S = 300.0
"""How long the server may take to import what programs need."""
_ANSWER_S = 30.0
"""How long the server may take to prepare a program and to kill one, beside the program's own wall time."""
_NO_MODULES = {"tests", "data", "descr", "images"}
"""Folders of a distribution that hold tables, scikit-learn's among them, and tests on some."""


class NoSandboxError(RuntimeError):
    """This machine's kernel cannot confine a program; nothing was run."""


@dataclass(frozen=True)
class Limits:
    wall_s: float = 60.0
    cpu_s: float = 30.0
    memory_mb: int = 3072
    """Address space; numerical libraries reserve more than they use."""
    file_mb: int = 64
    """Size of one file."""
    folder_mb: int = 256
    """Size of the folder, looked at some twenty times a second."""
    folder_files: int = 256
    """Files in the folder, looked at as often."""
    output_kb: int = 64
    """Standard output and error together; a program that writes more is stopped."""
    result_kb: int = 1024
    """Size of a file that is brought back."""


@dataclass(frozen=True)
class Ran:
    """What became of a program."""

    returncode: int  # negative: the signal that ended it
    output: str  # standard output and error as they came
    stopped: str = ""  # which limit it broke, in words; empty where it ended by itself
    files: Mapping[str, bytes] = field(default_factory=dict)  # those asked for that it left
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def succeeded(self) -> bool:
        return self.returncode == 0 and not self.stopped


class Sandbox:
    """A server that has imported what programs need, so that none waits for it; runs one program at a time.

    Args:
        prepare: Python source that the server executes ahead, with the rights of this process: imports, mostly.
        distributions: installed ones whose modules programs can import, with what these require; beside the standard
            library. Tables that they bring along cannot be read.

    Example: ``Sandbox().run("print(6 * 7)").output == "42\\n"``.
    """

    def __init__(self, limits: Limits | None = None, prepare: str = "", distributions: tuple[str, ...] = ()) -> None:
        self.limits, self.prepare, self.distributions = limits or Limits(), prepare, distributions
        self.lock = threading.Lock()
        self.server: subprocess.Popen[bytes] | None = None
        self.number = 0

    def start(self) -> None:
        """Start the server now, so that the first program does not wait for what is imported.

        Raises NoSandboxError where the kernel offers no confinement.
        """
        with self.lock:
            self._start_if_gone()

    def run(
        self,
        source: str,
        files: Mapping[str, bytes] | None = None,
        wanted: tuple[str, ...] = (),
        limits: Limits | None = None,
    ) -> Ran:
        """Run Python source in a folder of its own. Thread-safe.

        Args:
            files: names and contents to find there.
            wanted: names of files to bring back, as far as the program left them.
            limits: other ones than the sandbox's, for this program.

        Raises NoSandboxError where the kernel offers no confinement; then nothing was run.
        """
        given = (source, files or {}, wanted, limits or self.limits)
        with self.lock:
            try:
                with contextlib.suppress(_ServerGoneError):  # somebody has killed or stopped it, which no program can
                    return self._attempt(*given)
                return self._attempt(*given)
            except _ServerGoneError as error:
                return Ran(-signal.SIGKILL, "", str(error), {}, given[-1].wall_s, given[-1].cpu_s)

    def _attempt(self, source: str, files: Mapping[str, bytes], wanted: tuple[str, ...], limits: Limits) -> Ran:
        """_ServerGoneError where the server did not survive it; the next attempt has a new one."""
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
    ) -> Ran:
        folder, output = place / "folder", place / "output"
        folder.mkdir()
        output.touch()
        for name, content in {sandbox_server.PROGRAM: source.encode(errors="replace"), **files}.items():
            (folder / name).write_bytes(content)
        self.number += 1
        request = {"number": self.number, "folder": str(folder), "output": str(output), **asdict(limits)}
        answer = self._ask(request, limits.wall_s + _ANSWER_S)
        returncode, wall_s, cpu_s = answer["returncode"], answer["wall_s"], answer["cpu_s"]
        stopped = answer["stopped"] or _reason(returncode, cpu_s, limits)
        with output.open("rb") as file:
            text = file.read(limits.output_kb << 10).decode(errors="replace")
        found: dict[str, bytes] = {}
        try:
            found.update(_collect(folder, wanted, limits))
        except _NoResultError as error:
            stopped = stopped or str(error)
        return Ran(returncode, text, stopped, found, wall_s, cpu_s)

    def close(self) -> None:
        """End the server; the next run starts another."""
        if self.server is not None:
            self.finalizer()
            self.server = None

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to it; _ServerGoneError where the server ended, was silent or said something else."""
        self._tell(request)
        answer = self._hear(seconds)
        if answer.get("number") != request["number"]:
            raise _ServerGoneError("the sandbox's server answered another question")
        return answer

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self.server is not None
        assert self.server.stdin is not None
        left = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while left:
                left = left[self.server.stdin.write(left) :]
        except OSError:
            raise _ServerGoneError("the sandbox's server ended") from None

    def _hear(self, seconds: float) -> dict[str, Any]:
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
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start_if_gone(self) -> None:
        if self.server is not None and self.server.poll() is None:
            return
        self.close()
        readable, listable = _libraries_of(self.distributions)
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
            start_new_session=True,  # a terminal's signals are for this process; what it makes of them is seen there
        )
        self.finalizer = weakref.finalize(self, _end, self.server, self.scratch)
        try:
            self._tell(settings)
            ready = self._hear(_START_S)
        except _ServerGoneError as error:
            self.close()
            raise NoSandboxError(f"generated programs are not run: {error} before it was ready") from None
        if ready["problem"]:
            self.close()
            raise NoSandboxError(f"generated programs are not run: {ready['problem']}")
        _say_what_is_missing(ready["landlock"])


class _ServerGoneError(Exception):
    """The sandbox's server does not answer as it should: why."""


class _NoResultError(Exception):
    """A program left something that cannot be brought back: what."""


def _end(server: subprocess.Popen[bytes], scratch: str) -> None:
    server.kill()
    server.communicate()
    shutil.rmtree(scratch, ignore_errors=True)


@functools.cache
def _say_what_is_missing(version: int) -> None:
    if version in confine.MISSING:
        log.warning(
            "this kernel's Landlock (version %d) does not refuse %s: generated programs are kept from them by the "
            "filter over system calls alone",
            version,
            confine.MISSING[version],
        )


def confine_this_process() -> None:
    """No files but libraries to read, and only the calls that computing takes, from here on; see sandbox/confine.py.

    Raises NoSandboxError where the kernel offers no confinement, or this process has more than one thread.
    """
    try:
        confine.bind(confine.readable_files(_libraries()))
    except OSError as error:
        raise NoSandboxError(f"what a model wrote is not executed: {error}") from None
    _say_what_is_missing(confine.landlock_version())


# --- what can be read -----------------------------------------------------------------------------------------------


def _libraries() -> list[str]:
    """The interpreter and what it can import, the system's shared libraries, and sources of chance."""
    own = [sys.prefix, sys.base_prefix, *(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))]
    system = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    return [*sorted({os.path.realpath(path) for path in [*own, *system]} - {"/", "/usr"}), "/dev/urandom"]


@functools.cache
def _libraries_of(distributions: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Of :func:`_libraries`, what a program of these distributions needs; and the folders that it may list alone."""
    hidden = set[str]()
    for root in _libraries():
        for depth in ("*-packages", "*/*-packages", "*/*/*-packages"):
            hidden |= {str(path) for path in Path(root).glob(depth) if path.is_dir() and not path.is_symlink()}
    readable, listable = set[str](), set[str]()
    for root in _libraries():
        _show(root, hidden, readable, listable)
    for path in _modules(distributions):
        tables = {folder for folder, _, _ in os.walk(path) if os.path.basename(folder) in _NO_MODULES}
        _show(path, tables, readable, listable)
    return sorted(readable), sorted(listable | hidden)


def _show(path: str, hidden: set[str], readable: set[str], listable: set[str]) -> None:
    """Adds a folder without what is hidden in it: as a whole, or what lies around that one by one."""
    if path in hidden:
        return
    if not any(one.startswith(f"{path}/") for one in hidden):
        readable.add(path)
        return
    listable.add(path)
    for entry in os.scandir(path):
        _show(os.path.realpath(entry.path), hidden, readable, listable)


def _modules(distributions: Iterable[str]) -> Iterator[str]:
    """Files and folders that a distribution and what it requires brought into the folders for modules."""
    left, seen = list(distributions), set[str]()
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted = (Requirement(text) for text in found.requires or ())
        left += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            yield os.path.realpath(str(found.locate_file(top)))


# --- what a program left --------------------------------------------------------------------------------------------


def _reason(returncode: int, cpu_s: float, limits: Limits) -> str:
    """Which of the kernel's limits ended it."""
    if returncode == -signal.SIGXCPU or (returncode == -signal.SIGKILL and cpu_s > limits.cpu_s / 2):
        return f"it used more than {limits.cpu_s:.3g} CPU seconds"
    if returncode == -signal.SIGKILL:
        return "it was killed: by itself, or because the machine had no memory left"
    if returncode == -signal.SIGXFSZ:
        return f"a file of its became too large: more than {limits.file_mb} MB"
    return ""


def _collect(folder: Path, wanted: tuple[str, ...], limits: Limits) -> Iterator[tuple[str, bytes]]:
    """Plain files of a size that was agreed on; _NoResultError for anything else that has such a name."""
    most = limits.result_kb << 10
    for name in wanted:
        refused = _NoResultError(f"its {name} is no plain file of at most {limits.result_kb} KB")
        try:
            opened = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError:  # a link, or without the right to read it
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
