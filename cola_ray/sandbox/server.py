"""The sandbox's server: a process that has imported the libraries and forks a child for each program.

    python -I sandbox/server.py ─> settings, prepare ─> ready ─> request ─> fork ─> child: confine.py, the program
                                                        ^                   └─> watched from here, and killed when it
                                                        └─ how it ended ──────  breaks a limit or the owner has ended

    memory, CPU seconds, size of a file            limited by the kernel (resource limits of the child)
    wall time, output, number and size of files    checked from here, some twenty times a second

A program cannot start processes, so killing it is enough. Standard library only: programs run in this interpreter,
which should look to them like any other.
"""

import contextlib
import importlib.util
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

PROGRAM = "program.py"
CHECK_S = 0.05
"""Seconds between two checks of what a program has written."""


def _confine() -> Any:
    """Load the file beside this one, which an isolated interpreter does not find by import."""
    spec = importlib.util.spec_from_file_location("confine", os.path.join(os.path.dirname(__file__), "confine.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


confine = _confine()


def main() -> None:
    """Serve requests, one JSON object a line, until the owner has ended or closed its end; then clean up."""
    owner = os.pidfd_open(os.getppid())  # if the owner ended before this line, its end of the pipe is closed
    confine.at_end_of_parent(signal.SIGCONT)  # so that the owner's death is noticed even if this process is stopped
    scratch = ""
    try:
        settings = _receive(owner)
        scratch = settings["scratch"]
        rules, problem = _try_out(settings)
        _send(problem=problem, landlock=confine.landlock_version())
        while not problem:
            request = _receive(owner)
            _send(number=request["number"], **_run(rules, request, owner))
    except _OwnerGoneError:
        shutil.rmtree(scratch, ignore_errors=True)


def _send(**message: Any) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


class _OwnerGoneError(Exception):
    """The owner has ended, or has closed its end of the pipe."""


def _receive(owner: int) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([0, owner], [], [])
        part = os.read(0, 1 << 16) if 0 in ready else b""
        if owner in ready or not part:
            raise _OwnerGoneError
        line += part
    message: dict[str, Any] = json.loads(line)
    return message


def _run(rules: int, request: dict[str, Any], owner: int) -> dict[str, Any]:
    """Run a program; return its exit code and the limit that it broke, in words. Raises _OwnerGoneError."""
    server, began, pid = os.getpid(), time.monotonic(), os.fork()
    if not pid:
        _run_program(rules, request, server)
    program = os.pidfd_open(pid)
    try:
        stopped = _watch(request, program, owner)
    finally:
        if not _ended(program):
            signal.pidfd_send_signal(program, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
        os.close(program)
    return {
        "returncode": os.waitstatus_to_exitcode(status),
        "stopped": stopped or _limit_broken(request),  # perhaps by output after the last check
        "wall_s": time.monotonic() - began,
        "cpu_s": used.ru_utime + used.ru_stime,
    }


def _ended(program: int) -> bool:
    return bool(select.select([program], [], [], 0)[0])


def _watch(request: dict[str, Any], program: int, owner: int) -> str:
    """Wait until the program ends (return "") or breaks a limit (return which). Raises _OwnerGoneError."""
    deadline = time.monotonic() + request["wall_s"]
    while True:
        ready, _, _ = select.select([program, owner], [], [], CHECK_S)
        if owner in ready:
            raise _OwnerGoneError
        if program in ready:
            return ""
        if time.monotonic() > deadline:
            return f"it ran for more than {request['wall_s']:.3g} s"
        if stopped := _limit_broken(request):
            return stopped


def _limit_broken(request: dict[str, Any]) -> str:
    """Return which limit on output and files is broken, in words; a program can write only into its flat folder."""
    if os.stat(request["output"]).st_size > request["output_kb"] << 10:
        return f"it wrote more than {request['output_kb']} KB"
    blocks = 0
    with os.scandir(request["folder"]) as entries:
        for count, entry in enumerate(entries, 1):
            if count > request["folder_files"]:
                return f"it left more than {request['folder_files']} files"
            blocks += entry.stat(follow_symlinks=False).st_blocks
    return f"its files take more than {request['folder_mb']} MB" if blocks > request["folder_mb"] << 11 else ""


# --- in the child ---------------------------------------------------------------------------------------------------


def _try_out(settings: dict[str, Any]) -> tuple[int, str]:
    """Prepare, and try to confine a process. Return the rules for files, and why no program can run here, or ""."""
    try:
        exec(settings["prepare"], {})
        rules = confine.readable_files(settings["readable"], settings["listable"], settings["scratch"])
    except OSError as error:
        return -1, str(error)
    except Exception as error:
        return -1, f"the sandbox's imports failed: {type(error).__name__}: {error}"
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            confine.bind(rules, confine.writable_files(settings["scratch"]))
        except OSError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        problem = pipe.read().decode()
    os.waitpid(pid, 0)
    return rules, problem


def _run_program(rules: int, request: dict[str, Any], server: int) -> NoReturn:
    """Run the program in the child; never returns."""
    code, end = 1, os._exit
    try:
        confine.die_with_parent()
        if os.getppid() != server:  # the server has ended already
            end(1)
        os.chdir(request["folder"])
        _leave_the_server(request["output"], rules)
        with open(PROGRAM) as file:
            source = file.read()
        _limit_resources(request)
        confine.bind(rules, confine.writable_files("."))
        code = _become(source)
    except BaseException:  # of any kind: the server's loop must not continue in the child
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BaseException:
                code = code or 1
        end(code)


def _leave_the_server(output: str, rules: int) -> None:
    os.setsid()
    for path, mode, target in (("/dev/null", os.O_RDONLY, 0), (output, os.O_WRONLY | os.O_APPEND, 1)):
        opened = os.open(path, mode)
        os.dup2(opened, target)
    os.dup2(1, 2)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != rules:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed by now
                os.close(int(name))
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # read-only in some containers
        file.write("1000")  # if memory runs out, the kernel kills this process first


def _limit_resources(request: dict[str, Any]) -> None:
    memory, file = int(request["memory_mb"]) << 20, int(request["file_mb"]) << 20
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # libraries start as many threads as they see cores
    for kind, most in (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, max(math.ceil(request["cpu_s"]), 1)),
        (resource.RLIMIT_FSIZE, file), (resource.RLIMIT_NOFILE, 256), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))


def _become(source: str) -> int:
    sys.argv = [PROGRAM]
    sys.path.insert(0, os.getcwd())
    spare = bytearray(16 << 20)  # freed to report an error after the program has used up all memory
    try:
        exec(compile(source, PROGRAM, "exec"), {"__name__": "__main__", "__file__": PROGRAM})
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        del spare
        # Print the traceback as if the program had been started alone, without the frame above.
        here = error.__traceback__
        traceback.print_exception(error.with_traceback(here.tb_next if here else None))
        return 1
    return 0


if __name__ == "__main__":
    main()
