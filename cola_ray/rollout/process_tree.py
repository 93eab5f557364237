"""Runs a command, and kills everything it has started when it ends, on SIGTERM, or when the owner ends.

    owner ──> python process_tree.py OWNER COMMAND... ──> the command ──> whatever it starts, in any session

A process that loses its parent becomes a child of this process (``PR_SET_CHILD_SUBREAPER``), so it is found however it
was started. No privileges are needed. Standard library only, since each program gets one such process.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from typing import NoReturn

_PDEATHSIG, _SUBREAPER = 1, 36
_REAP_S = 10.0
_GIVEN_UP_S = 10.0  # a process that does not end by then belongs to another user, or hangs in the kernel


def main(owner: int, command: list[str]) -> NoReturn:
    watched = os.pidfd_open(owner)
    if os.getppid() != owner:  # the owner has already ended
        sys.exit(1)
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    here, pid = os.getpid(), os.fork()
    if not pid:
        _become(command, here)
    program = os.pidfd_open(pid)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        while not select.select([watched, program], [], [], _REAP_S)[0]:
            for orphan in set(_children()) - {pid}:
                os.waitpid(orphan, os.WNOHANG)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = _end_children(pid)
    if code < 0:  # end by the same signal
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _become(command: list[str], parent: int) -> NoReturn:
    """Execute the command; called in the fork."""
    try:
        os.setsid()  # signals that the command sends to its own process group do not reach this process
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python had set them to be ignored
                signal.signal(number, signal.SIG_DFL)
            os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)


def _end_children(program: int) -> int:
    """Kill until no child is left, since orphans become children of this process; returns the program's exit code."""
    code, deadline = -signal.SIGKILL, time.monotonic() + _GIVEN_UP_S
    with contextlib.suppress(ChildProcessError):  # no child is left
        while time.monotonic() < deadline:
            for pid in _children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == program:
                    code = os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.005)
    return code


def _children() -> list[int]:
    found, here = list[int](), os.getpid()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[1]) == here:  # a process's name may contain any bytes
                found.append(int(name))
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
