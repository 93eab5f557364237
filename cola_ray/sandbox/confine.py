"""Lets a process give up its rights for good: what it may still do is listed here, and the kernel refuses the rest.

    bind(readable_files(libraries), writable_files(folder))
        capabilities       none are left, not even for root, and starting a program cannot bring any back
        Landlock           files: libraries can be read, the folder read and written, nothing else opened; no TCP; on
                           kernels that can refuse them, no signals and abstract sockets (see ``MISSING``)
        seccomp            system calls: those of ``_CALLS``, and those of ``_checked`` with harmless arguments; others
                           fail with EPERM, so that programs see an ordinary permission error

What is left is one process that computes, reads libraries and adds plain files to a flat folder. It cannot start
processes or threads; open sockets; signal or watch other processes; change limits, priorities, owners, modes or times;
remove, rename or link files; or make directories, devices, named pipes, or objects of System V or POSIX.

Standard library only, and no other module of this package: the sandbox's server loads this file in an isolated
interpreter.
"""

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Iterable, Sequence

MISSING = {
    1: "renames into other folders and truncation by path, TCP, ioctl on devices, signals and abstract sockets",
    2: "truncation by path, TCP, ioctl on devices, signals and abstract sockets",
    3: "TCP, ioctl on devices, signals and abstract sockets",
    4: "ioctl on devices, signals and abstract sockets",
    5: "signals and abstract sockets",
}
"""What each version of Landlock cannot refuse; on such kernels only the filter over system calls refuses it."""

_libc = ctypes.CDLL(None, use_errno=True)

# --- system calls ---------------------------------------------------------------------------------------------------

# Numbers on x86_64 and aarch64; None where the architecture has no such call. Allowed with any arguments.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "lseek": (8, 62), "close": (3, 57),
    "close_range": (436, 436), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None),
    "pipe2": (293, 59), "ftruncate": (77, 46), "poll": (7, None), "ppoll": (271, 73), "select": (23, None),
    "pselect6": (270, 72),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50),
    "brk": (12, 214), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "msync": (26, 227),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "pause": (34, None),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "restart_syscall": (219, 128),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "sysinfo": (99, 179),
    "uname": (63, 160), "getrandom": (318, 278), "getcpu": (309, 168), "getpid": (39, 172), "gettid": (186, 178),
    "getppid": (110, 173), "getpgrp": (111, None), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "getrlimit": (97, 163), "futex": (202, 98), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
# Calls that are harmless with some arguments only: see :func:`_checked`.
_SOMETIMES: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None), "openat": (257, 56), "fcntl": (72, 25), "ioctl": (16, 29), "mmap": (9, 222),
    "madvise": (28, 233), "prctl": (157, 167), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "prlimit64": (302, 261),
}  # fmt: skip
# Calls that are reported as unknown rather than forbidden, so that the C library does without them.
_UNKNOWN: dict[str, tuple[int | None, int | None]] = {"clone3": (435, 435), "rseq": (334, 293)}

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_Line = tuple[int, int, int, int]  # of classic BPF: operation, lines to skip if true, lines to skip if false, operand
_LOAD, _AND, _EQUAL, _ANY_BIT, _GIVE = 0x20, 0x54, 0x15, 0x45, 0x06
_ALLOW, _KILL = (_GIVE, 0, 0, 0x7FFF0000), (_GIVE, 0, 0, 0x80000000)
_EPERM, _ENOSYS = (_GIVE, 0, 0, 0x00050000 | 1), (_GIVE, 0, 0, 0x00050000 | 38)


def _filter(machine: str, pid: int) -> list[_Line]:
    """Return the filter for a machine and the one process that it is for; KeyError for a machine without a table."""
    column, architecture = _ARCHITECTURES[machine]
    lines: list[_Line] = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), _KILL, (_LOAD, 0, 0, 0)]

    def on(numbers: tuple[int | None, int | None], answer: Sequence[_Line]) -> None:
        number = numbers[column]
        if number is not None:
            lines.extend([(_EQUAL, 0, len(answer), number), *answer])

    for numbers in _CALLS.values():
        on(numbers, [_ALLOW])
    for name, answer in _checked(pid).items():
        on(_SOMETIMES[name], answer)
    for numbers in _UNKNOWN.values():
        on(numbers, [_ENOSYS])
    return [*lines, _EPERM]


def _checked(pid: int) -> dict[str, list[_Line]]:
    """Return the filter's lines for each call that depends on its arguments; every path ends in a verdict."""

    def argument(index: int, high: bool = False) -> _Line:
        return _LOAD, 0, 0, 16 + 8 * index + 4 * high  # little-endian on both machines

    def one_of(index: int, *values: int) -> list[_Line]:
        return [argument(index), *(line for value in values for line in ((_EQUAL, 0, 1, value), _ALLOW)), _EPERM]

    def without(index: int, bits: int) -> list[_Line]:
        return [argument(index), (_ANY_BIT, 0, 1, bits), _EPERM, _ALLOW]

    def opening(index: int) -> list[_Line]:
        """Refuse O_ASYNC, unnamed files, and O_TRUNC for a file opened for reading."""
        asynchronous, nameless, truncate, mode = 0o20000, 0o20000000, 0o1000, 0o3
        return [
            argument(index), (_ANY_BIT, 0, 1, asynchronous | nameless), _EPERM, (_AND, 0, 0, truncate | mode),
            (_EQUAL, 0, 1, truncate), _EPERM, _ALLOW,
        ]  # fmt: skip

    duplicate, get_descriptor, set_descriptor, get_status, set_status, duplicate_closed = 0, 1, 2, 3, 4, 1030
    status = without(2, 0o20000)  # O_ASYNC: it would send signals to the process that F_SETOWN names
    unqueried = [argument(2), (_EQUAL, 0, 3, 0), argument(2, high=True), (_EQUAL, 0, 1, 0), _ALLOW, _EPERM]
    return {
        "open": opening(1),
        "openat": opening(2),
        "fcntl": [
            argument(1), (_EQUAL, 0, len(status), set_status), *status,
            *one_of(1, duplicate, get_descriptor, set_descriptor, get_status, duplicate_closed),
        ],
        "ioctl": one_of(1, 0x5401, 0x802C542A, 0x5413, 0x5450, 0x5451),  # is it a terminal, its size, close on exec
        "mmap": without(3, 0x40000 | 0x2000),  # MAP_HUGETLB, MAP_LOCKED: pages that other processes would lack
        "madvise": one_of(2, 0, 1, 2, 3, 4, 8, 14, 15, 16, 17),  # advice that allocators give on their own pages
        "prctl": one_of(0, 2, 3, 16, 51),  # queries only: PDEATHSIG, DUMPABLE, NAME, SVE_GET_VL
        "kill": one_of(0, pid),
        "tkill": one_of(0, pid),
        "tgkill": one_of(0, pid),
        "prlimit64": [argument(0), (_EQUAL, 2, 0, 0), (_EQUAL, 1, 0, pid), _EPERM, *unqueried],  # queries of its own
    }  # fmt: skip


def _confine_calls() -> None:
    lines = _filter(platform.machine(), os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    header = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))
    if _libc.prctl(22, 2, header, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp refused its filter")


# --- files ----------------------------------------------------------------------------------------------------------

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # Landlock's calls, on every machine
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _MAKE_FILE, _TRUNCATE = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14
_READING, _WRITING = _EXECUTE | _READ_FILE | _READ_DIR, _WRITE_FILE | _MAKE_FILE | _TRUNCATE


def landlock_version() -> int:
    """Return the version of the kernel's Landlock: 1 from Linux 5.13 on, 7 from 6.15 on; at most 0 if there is none."""
    return int(_libc.syscall(_CREATE, None, 0, 1))


def readable_files(readable: Iterable[str], listable: Iterable[str] = (), writable: str = "/dev/null") -> int:
    """Return rules that refuse everything but these files, as a descriptor for :func:`bind`.

    Args:
        readable: files, and folders with everything in them; those that do not exist are skipped.
        listable: folders whose entries can be listed but not read.
        writable: a folder to which files can be added, and whose files can be read and written.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = landlock_version()
    files = _files(version)
    # Besides files: bind and connect of TCP; abstract sockets and signals. No rule allows any of these.
    handled = struct.pack("QQQ", files, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _rules(handled)
    for path in readable:
        _allow(rules, path, _READ_FILE | _READ_DIR)
    for path in listable:
        _allow(rules, path, _READ_DIR)
    _allow(rules, "/dev/null", _READ_FILE | _WRITE_FILE)
    _allow(rules, writable, (_READ_FILE | _READ_DIR | _WRITING) & files)
    return rules


def writable_files(folder: str) -> int:
    """Return rules that refuse to write outside a folder, as a descriptor for :func:`bind`, along with other rules."""
    files = _files(landlock_version()) & ~_READING
    rules = _rules(struct.pack("Q", files))
    _allow(rules, "/dev/null", _WRITE_FILE)
    _allow(rules, folder, _WRITING & files)
    return rules


def _files(version: int) -> int:
    """Return the rights on files that a version of Landlock knows."""
    if version < 1:
        raise OSError("this kernel has no Landlock; it needs Linux 5.13 or newer with Landlock enabled at boot")
    return int((1 << {1: 13, 2: 14}.get(version, 15 if version < 5 else 16)) - 1)


def _rules(handled: bytes) -> int:
    rules = _libc.syscall(_CREATE, handled, len(handled), 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "Landlock refused its rules")
    return int(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
    if _libc.syscall(_ADD, rules, 1, struct.pack("=Qi", rights, beneath), 0):
        raise OSError(ctypes.get_errno(), f"Landlock refused a rule for {path}")
    os.close(beneath)


# --- a process ------------------------------------------------------------------------------------------------------


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends; ``bind`` makes this irrevocable."""
    at_end_of_parent(signal.SIGKILL)


def at_end_of_parent(number: int) -> None:
    """Have the kernel send this process a signal when the thread that forked it ends."""
    _libc.prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG


def bind(*files: int) -> None:
    """Give up files, system calls and capabilities, for good.

    Args:
        files: rules from :func:`readable_files` and :func:`writable_files`; what any of them refuses is refused.

    Raises:
        OSError: the kernel refuses; the machine has no table of calls; or the process has more than one thread, since
            the others would not be bound.
    """
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(f"no table of system calls for {platform.machine()}")
    if len(os.listdir("/proc/self/task")) > 1:
        raise OSError("this process has more than one thread")
    _drop_capabilities()
    for option, value, what in ((4, 0, "a process without dumps"), (38, 1, "no_new_privs")):
        if _libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"{what} was refused")
    quiet = int(landlock_version() >= 7)  # keeps refusals out of the audit log
    for rules in files:
        if _libc.syscall(_RESTRICT, rules, quiet):
            raise OSError(ctypes.get_errno(), "Landlock refused to bind this process")
        os.close(rules)
    _confine_calls()


def _drop_capabilities() -> None:
    """Drop them from the bounding and ambient sets as far as permitted, and from the other sets in any case."""
    for capability in range(64):
        _libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    _libc.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT_CLEAR_ALL
    if _libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "the capabilities could not be dropped")
