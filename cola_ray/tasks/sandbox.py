"""Runs programs that nobody has read.

    Sandbox.run(source, files) ─> a scratch folder with program.py and files ─> the server forks: tasks/confine.py
                                       │ watched from here: wall time, output, size of the folder
                                       v
                                  Ran(returncode, output, stopped, files)      the folder is gone

Linux only, 5.13 or newer, for Landlock and seccomp; it needs no privileges and no container. A program sees the
interpreter's own libraries and its folder, and nothing of the environment. It cannot start processes or threads, so
that killing one process is killing all of it.
"""

import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cola_ray.tasks import confine


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
    """Size of the folder, looked at a few times a second."""
    output_kb: int = 64
    """Standard output and error together; a program that writes more is stopped."""


@dataclass(frozen=True)
class Ran:
    """What became of a program."""

    returncode: int  # negative: the signal that ended it
    output: str  # standard output and error as they came
    stopped: str = ""  # which limit it broke, in words; empty where it ended by itself
    files: Mapping[str, bytes] = field(default_factory=dict)  # those asked for that it left

    @property
    def succeeded(self) -> bool:
        return self.returncode == 0 and not self.stopped


class Sandbox:
    """A server that has imported what programs need, so that none waits for it; runs one program at a time.

    Args:
        preload: modules to import ahead; they are trusted.

    Example: ``Sandbox().run("print(6 * 7)").output == "42\\n"``.
    """

    def __init__(self, limits: Limits | None = None, preload: tuple[str, ...] = ()) -> None:
        self.limits, self.preload = limits or Limits(), preload
        self.lock = threading.Lock()
        self.server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server now, so that the first program does not wait for what is imported.

        Raises NoSandboxError where the kernel offers no confinement.
        """
        with self.lock:
            self._start_if_gone()

    def run(self, source: str, files: Mapping[str, bytes] | None = None, wanted: tuple[str, ...] = ()) -> Ran:
        """Run Python source in a folder of its own. Thread-safe.

        Args:
            files: names and contents to find there.
            wanted: names of files to bring back, as far as the program left them.

        Raises NoSandboxError where the kernel offers no confinement; then nothing was run.
        """
        with self.lock, tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as scratch:
            folder, output = Path(scratch) / "folder", Path(scratch) / "output"
            folder.mkdir()
            output.touch()
            for name, content in {confine.PROGRAM: source.encode(errors="replace"), **(files or {})}.items():
                (folder / name).write_bytes(content)
            pid = self._ask({"folder": str(folder), "output": str(output)})["pid"]
            stopped = self._watch(pid, folder, output)
            returncode = self._hear()["returncode"]
            with output.open("rb") as file:
                text = file.read(self.limits.output_kb << 10).decode(errors="replace")
            return Ran(returncode, text, stopped or _reason(returncode, self.limits), _collect(folder, wanted))

    def close(self) -> None:
        """End the server; the next run starts another."""
        if self.server is not None:
            self.server.kill()
            self.server.communicate()
            self.server = None

    def _watch(self, pid: int, folder: Path, output: Path) -> str:
        """Until it ends or breaks a limit, and then is killed; which one."""
        limits, deadline, stopped = self.limits, time.monotonic() + self.limits.wall_s, ""
        while not (stopped or self._heard(0.1)):
            if time.monotonic() > deadline:
                stopped = f"it ran for more than {limits.wall_s:g} s"
            elif output.stat().st_size > limits.output_kb << 10:
                stopped = f"it wrote more than {limits.output_kb} KB"
            elif _size(folder) > limits.folder_mb << 20:
                stopped = f"its files take more than {limits.folder_mb} MB"
        if stopped:
            os.kill(pid, signal.SIGKILL)  # not reaped before the server says so, hence still this program's
        return stopped

    def _ask(self, request: dict[str, str]) -> dict[str, Any]:
        self._start_if_gone()
        assert self.server is not None
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self.server is not None
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError(f"the sandbox's server ended with exit code {self.server.wait()}")
        message: dict[str, Any] = json.loads(line)
        return message

    def _heard(self, seconds: float) -> bool:
        """Whether the server has something to say: its pipe is not buffered on this side."""
        assert self.server is not None
        assert self.server.stdout is not None
        return bool(select.select([self.server.stdout], [], [], seconds)[0])

    def _start_if_gone(self) -> None:
        if self.server is not None and self.server.poll() is None:
            return
        limits = self.limits
        settings = {
            "cpu_s": limits.cpu_s, "memory_mb": limits.memory_mb, "file_mb": limits.file_mb,
            "readable": _libraries(), "preload": self.preload,
        }  # fmt: skip
        one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        self.server = subprocess.Popen(
            [sys.executable, "-I", confine.__file__, json.dumps(settings)],
            cwd="/",
            env={"PATH": "", "JOBLIB_MULTIPROCESSING": "0", "LOKY_MAX_CPU_COUNT": "1", **one_thread},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        weakref.finalize(self, self.server.kill)
        problem = self._hear()["problem"]
        if problem:
            self.close()
            raise NoSandboxError(f"generated programs are not run: {problem}")


def confine_this_process() -> None:
    """No files but libraries to read, no sockets, processes or threads from here on, for a process that has one thread.

    Raises NoSandboxError where the kernel offers no confinement.
    """
    try:
        confine.bind(_libraries(), "/dev/null")
    except OSError as error:
        raise NoSandboxError(f"what a model wrote is not executed: {error}") from None


def _libraries() -> list[str]:
    """The interpreter and what it can import, the system's shared libraries, and sources of chance."""
    own = [sys.prefix, sys.base_prefix, *(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))]
    system = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    return [*sorted({os.path.realpath(path) for path in [*own, *system]} - {"/", "/usr"}), "/dev/urandom"]


def _reason(returncode: int, limits: Limits) -> str:
    if returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it used more than {limits.cpu_s:g} CPU seconds"
    if returncode == -signal.SIGXFSZ:
        return f"a file of its became too large: more than {limits.file_mb} MB"
    return ""


def _size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except OSError:  # gone meanwhile
                continue
    return total


def _collect(folder: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Plain files only: a link that the program left could lead anywhere."""
    return {
        name: (folder / name).read_bytes()
        for name in wanted
        if (folder / name).is_file() and not (folder / name).is_symlink()
    }
