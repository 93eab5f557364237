"""The sandbox's other end: a process that has imported the libraries, and forks one that gives up its rights for good.

    python -I confine.py SETTINGS ─> imports ─> ready ─> request ─> fork ─> child: no rights left, becomes the program
                                                  ^                   └─> its pid, and when it has ended its exit code
                                                  └───────────────────────────┘

    what a program could do                what stops it
    read or write outside its folder       Landlock: only ``readable`` can be read, only the folder can be written
    sockets, processes, threads, signals,  seccomp: the calls fail with EPERM
    limits, owners, modes, mounts
    memory, CPU seconds, size of a file    resource limits

All three bind the child before the program's first line and cannot be undone; as it can start no process, there is no
other that they would have to bind. What cannot be counted in here, wall time, output and the folder's size, is watched
from outside. Standard library only: programs share this interpreter, and find here what they find anywhere.
"""

import ctypes
import importlib
import json
import os
import platform
import resource
import signal
import struct
import sys
import traceback
from typing import Any, NoReturn

PROGRAM = "program.py"

# System call numbers: x86_64, aarch64; None where an architecture has no such call.
_FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "setrlimit": (160, 164), "truncate": (76, 45),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "userfaultfd": (323, 282), "memfd_create": (319, 279), "shmget": (29, 194), "mq_open": (240, 180),
    "kexec_load": (246, 104), "reboot": (169, 142), "init_module": (175, 105), "finit_module": (313, 273),
    "sched_setaffinity": (203, 122), "setpriority": (141, 140), "setsid": (112, 157), "setpgid": (109, 154),
    "personality": (135, 92), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "swapon": (167, 224),
}  # fmt: skip
_TO_ITSELF = {"kill": (62, 129), "tgkill": (234, 131)}  # the first argument may be its own process
_ONLY_TO_ASK = {"prlimit64": (302, 261)}  # the third argument must be NULL
_CLONE3 = 435  # must be unknown rather than forbidden: glibc then falls back on clone

_LANDLOCK = {"create": 444, "add": 445, "restrict": 446}
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _REFER = 1 << 14, 1 << 13


def main() -> None:
    """Serve requests ``{"folder": ..., "output": ...}``, one JSON object a line, until the other end is gone."""
    settings = json.loads(sys.argv[1])
    for name in settings["preload"]:
        importlib.import_module(name)
    problem = _try_out(settings)
    _tell(ready=not problem, problem=problem)
    while not problem and (line := sys.stdin.readline()):
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            _run_program(settings, request["folder"], request["output"])
        _tell(pid=pid)
        _tell(returncode=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _tell(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def _try_out(settings: dict[str, Any]) -> str:
    """Why this kernel cannot confine a process; empty where it can."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.chdir("/")
            _confine(settings, writable="/dev/null")
        except OSError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        problem = pipe.read().decode()
    os.waitpid(pid, 0)
    return problem


def _run_program(settings: dict[str, Any], folder: str, output: str) -> NoReturn:
    """In the child: never returns."""
    code = 1
    try:
        os.chdir(folder)
        _leave_the_server(output)
        with open(PROGRAM) as file:
            source = file.read()
        _confine(settings, writable=".")
        code = _become(source)
    except BaseException:  # whatever it is, the server's loop must not go on in here
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                code = code or 1
        os._exit(code)


def _leave_the_server(output: str) -> None:
    os.setsid()
    for path, mode, target in (("/dev/null", os.O_RDONLY, 0), (output, os.O_WRONLY | os.O_APPEND, 1)):
        opened = os.open(path, mode)
        os.dup2(opened, target)
    os.dup2(1, 2)
    os.closerange(3, 4096)
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]


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


def _confine(settings: dict[str, Any], writable: str) -> None:
    """Raises OSError where the kernel refuses; then nothing may be run."""
    die_with_parent()
    _limit_resources(settings)
    bind(settings["readable"], writable)


def die_with_parent() -> None:
    """From here on the end of the process that forked this one is its own."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def bind(readable: list[str], writable: str) -> None:
    """Give up files and calls, for good: of this thread and of those that it starts. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, without which neither of the next two is allowed
        raise OSError("no_new_privs was refused")
    _confine_files(libc, readable, writable)
    _confine_calls(libc)


def _limit_resources(settings: dict[str, Any]) -> None:
    memory, file = int(settings["memory_mb"]) << 20, int(settings["file_mb"]) << 20
    seconds = max(int(settings["cpu_s"]), 1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # libraries start as many workers as they see cores
    for kind, most in (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, 256), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))


def _confine_files(libc: ctypes.CDLL, readable: list[str], writable: str) -> None:
    version = libc.syscall(_LANDLOCK["create"], None, 0, 1)
    if version < 1:
        raise OSError("this kernel has no Landlock (Linux 5.13 and newer have it, unless it was left out at boot)")
    rights = (1 << {1: 13, 2: 14}.get(version, 15 if version < 5 else 16)) - 1
    ruleset = libc.syscall(_LANDLOCK["create"], struct.pack("Q", rights), 8, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "Landlock refused its rules")
    for path in readable:
        _allow(libc, ruleset, path, (_READ_FILE | _READ_DIR) & rights)
    _allow(libc, ruleset, "/dev/null", (_READ_FILE | _WRITE_FILE) & rights)
    _allow(libc, ruleset, writable, rights & ~_EXECUTE & ~_REFER)
    if libc.syscall(_LANDLOCK["restrict"], ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock refused to bind this process")
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if libc.syscall(_LANDLOCK["add"], ruleset, 1, struct.pack("=Qi", rights, beneath), 0):
        raise OSError(ctypes.get_errno(), f"Landlock refused a rule for {path}")
    os.close(beneath)


def _confine_calls(libc: ctypes.CDLL) -> None:
    """A filter over system calls (classic BPF); everything that it does not name is allowed."""
    architectures = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
    if platform.machine() not in architectures:
        raise OSError(f"no table of system calls for {platform.machine()}")
    column, architecture = architectures[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    eperm, enosys = error | 1, error | 38
    number, first, third = 0, 16, 32  # offsets of the call's number and arguments
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, number)]
    if column == 0:
        program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, eperm)]  # the x32 numbers of the same calls
    program += [(equal, 0, 1, _CLONE3), (give, 0, 0, enosys)]
    for numbers in _FORBIDDEN.values():
        if numbers[column] is not None:
            program += [(equal, 0, 1, numbers[column] or 0), (give, 0, 0, eperm)]
    for numbers in _TO_ITSELF.values():
        program += [
            (equal, 0, 4, numbers[column]), (load, 0, 0, first), (equal, 1, 0, os.getpid()), (give, 0, 0, eperm),
            (give, 0, 0, allow),
        ]  # fmt: skip
    for numbers in _ONLY_TO_ASK.values():
        program += [
            (equal, 0, 6, numbers[column]), (load, 0, 0, third), (equal, 0, 3, 0), (load, 0, 0, third + 4),
            (equal, 0, 1, 0), (give, 0, 0, allow), (give, 0, 0, eperm),
        ]  # fmt: skip
    program.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    if libc.prctl(22, 2, header, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp refused its filter")


if __name__ == "__main__":
    main()
