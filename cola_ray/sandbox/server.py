"""The sandbox's other end: a process that has imported the libraries, and forks one that gives up its rights for good.

    python -I sandbox/server.py ─> settings, prepare ─> ready ─> request ─> fork ─> child: confine.py, the program
                                                        ^                   └─> watched from here, and killed where it
                                                        └─ how it ended ──────  breaks a limit or the owner has ended

    memory, CPU seconds, size of a file            the child's resource limits
    wall time, output, number and size of files    looked at from here, some twenty times a second

As a program can start no process, killing it is killing all of it. Standard library only: programs share this
interpreter, and find here what they find anywhere.
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
LOOK_S = 0.05
"""Between two looks at what a program has written."""


def _confine() -> Any:
    """The file beside this one, which an isolated interpreter does not look for."""
    spec = importlib.util.spec_from_file_location("confine", os.path.join(os.path.dirname(__file__), "confine.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


confine = _confine()


def main() -> None:
    """Serve requests, one JSON object a line, until the owner has ended or closed its end; then leave nothing."""
    owner = os.pidfd_open(os.getppid())  # one that ended before now has closed its end of the pipe
    confine.at_end_of_parent(signal.SIGCONT)  # somebody who stopped this process would keep it from seeing that
    scratch = ""
    try:
        settings = _hear(owner)
        scratch = settings["scratch"]
        rules, problem = _try_out(settings)
        _tell(problem=problem, landlock=confine.landlock_version())
        while not problem:
            request = _hear(owner)
            _tell(number=request["number"], **_run(rules, request, owner))
    except _OwnerGoneError:
        shutil.rmtree(scratch, ignore_errors=True)


def _tell(**message: Any) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


class _OwnerGoneError(Exception):
    """It has ended, or has closed its end."""


def _hear(owner: int) -> dict[str, Any]:
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
    """Its exit code, and which limit it broke, in words; _OwnerGoneError where there is nobody to tell."""
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
        "stopped": stopped or _broken(request),  # by what it wrote in its last moments, after the last look
        "wall_s": time.monotonic() - began,
        "cpu_s": used.ru_utime + used.ru_stime,
    }


def _ended(program: int) -> bool:
    return bool(select.select([program], [], [], 0)[0])


def _watch(request: dict[str, Any], program: int, owner: int) -> str:
    deadline = time.monotonic() + request["wall_s"]
    while True:
        ready, _, _ = select.select([program, owner], [], [], LOOK_S)
        if owner in ready:
            raise _OwnerGoneError
        if program in ready:
            return ""
        if time.monotonic() > deadline:
            return f"it ran for more than {request['wall_s']:.3g} s"
        if stopped := _broken(request):
            return stopped


def _broken(request: dict[str, Any]) -> str:
    """Which limit on what it writes is broken: all that it has written is in its flat folder and its output."""
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
    """The rules for files that every program is bound by, and why none can be run here: empty where it can."""
    try:
        exec(settings["prepare"], {})
        rules = confine.readable_files(settings["readable"], settings["listable"], settings["scratch"])
    except OSError as error:
        return -1, str(error)
    except Exception as error:
        return -1, f"what they need could not be prepared: {type(error).__name__}: {error}"
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
    """Never returns."""
    code, end = 1, os._exit
    try:
        confine.die_with_parent()
        if os.getppid() != server:  # it has ended already
            end(1)
        os.chdir(request["folder"])
        _leave_the_server(request["output"], rules)
        with open(PROGRAM) as file:
            source = file.read()
        _limit_resources(request)
        confine.bind(rules, confine.writable_files("."))
        code = _become(source)
    except BaseException:  # whatever it is, the server's loop must not go on in here
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
            with contextlib.suppress(OSError):  # of the listing itself
                os.close(int(name))
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # read-only in some containers
        file.write("1000")  # where memory runs out, this goes first


def _limit_resources(request: dict[str, Any]) -> None:
    memory, file = int(request["memory_mb"]) << 20, int(request["file_mb"]) << 20
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # libraries start as many workers as they see cores
    for kind, most in (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, max(math.ceil(request["cpu_s"]), 1)),
        (resource.RLIMIT_FSIZE, file), (resource.RLIMIT_NOFILE, 256), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))


def _become(source: str) -> int:
    sys.argv = [PROGRAM]
    sys.path.insert(0, os.getcwd())
    spare = bytearray(16 << 20)  # where a program has taken all there is, telling so takes some more
    try:
        exec(compile(source, PROGRAM, "exec"), {"__name__": "__main__", "__file__": PROGRAM})
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        del spare
        # As if it had been started alone: without the frame above.
        here = error.__traceback__
        traceback.print_exception(error.with_traceback(here.tb_next if here else None))
        return 1
    return 0


if __name__ == "__main__":
    main()
