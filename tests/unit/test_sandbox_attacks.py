"""What programs may try, by category; each is refused, or costs that program alone. docs/reliability.md has the table.

One server runs them all. After a program it is still the same one, the next two programs are right, and outside nothing
has changed: not a process of the same user beside it, nor a file that can be read, nor the system's shared objects.
"""

import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cola_ray.sandbox import confine
from cola_ray.sandbox.programs import Limits, Sandbox, _collect, _NoResultError

# What every program begins with: calls by their C names that raise, and whom to attack.
PRELUDE = """
import ctypes, fcntl, mmap, os, resource, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def raw(x86_64, aarch64, *arguments):
    call("syscall", x86_64 if os.uname().machine == "x86_64" else aarch64, *arguments)
library, folder, room = os.open(os.__file__, os.O_RDONLY), os.getcwd(), ctypes.create_string_buffer(1 << 20)
victim, server = {victim}, os.getppid()
"""

REFUSED = {
    "files": {
        "empty a library on opening": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
        "append to a library": "open(os.__file__, 'a')",
        "times of a library": "os.utime(os.__file__)",
        "times by descriptor": "os.utime(library)",
        "mode by descriptor": "os.fchmod(library, 0o777)",
        "owner by descriptor": "os.fchown(library, 1, 1)",
        "attribute by descriptor": "os.setxattr(library, 'user.escaped', b'')",
        "flags of an inode": "fcntl.ioctl(library, 0x40086602, (8).to_bytes(8, 'little'))",
        "lock a library": "fcntl.flock(library, fcntl.LOCK_EX)",
        "lock a part of one": "fcntl.lockf(library, fcntl.LOCK_SH)",
        "lease": "fcntl.fcntl(library, fcntl.F_SETLEASE, fcntl.F_RDLCK)",
        "watch a folder by signals": "fcntl.fcntl(os.open('.', 0), fcntl.F_NOTIFY, fcntl.DN_CREATE)",
        "watch a folder": "call('inotify_init')",
        "from the root down": "os.open('etc/passwd', os.O_RDONLY, dir_fd=os.open('/', os.O_PATH))",
        "from the root's folder": "os.chdir('/'); open('etc/passwd')",
        "root by another name": "open('/proc/self/root/etc/passwd')",
        "a process's folder": "os.listdir(f'/proc/{server}/cwd/')",
        "own environment": "open('/proc/self/environ')",
        "another's descriptors": "os.listdir(f'/proc/{server}/fd')",
        "own output, anew": "open('../output', 'w')",
        "beside the folder": "open('../escaped', 'w')",
        "the folder of all programs": "open('../../escaped', 'w')",
        "shared memory's folder": "open('/dev/shm/escaped', 'w')",
        "a terminal": "os.open('/dev/ptmx', os.O_RDWR)",
        "handle of a file": "raw(303, 264, -100, b'/etc/passwd', room, room, 0)",
        "another root": "os.chroot('.')",
        "mount": "call('mount', b'none', b'.', b'tmpfs', 0, None)",
        "named pipe": "os.mkfifo('x')",
        "device": "os.mknod('x', 0o20600, os.makedev(1, 3))",
        "symbolic link": "os.symlink('/etc/passwd', 'x')",
        "hard link": "os.link('program.py', 'x')",
        "rename": "os.rename('program.py', 'x')",
        "remove": "os.unlink('program.py')",
    },
    "processes": {
        "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
        "start with clone3": "raw(435, 435, room, 88)",
        "start with vfork": "raw(58, 220, 0, 0, 0, 0, 0)",
        "execute from memory": "os.memfd_create('x')",
        "session of its own": "os.setsid()",
        "group of its own": "os.setpgid(0, 0)",
        "live on after the server": "call('prctl', 1, 0, 0, 0, 0)",
        "adopt orphans": "call('prctl', 36, 1, 0, 0, 0)",
        "another name": "call('prctl', 15, b'sshd', 0, 0, 0)",
        "dumps again": "call('prctl', 4, 1, 0, 0, 0)",
        "let itself be traced": "call('prctl', 0x59616D61, victim, 0, 0, 0)",
        "another user": "os.setuid(65534)",
        "another user id in the file system": "raw(122, 151, 0); raise OSError('it returns the old one, always')",
        "capabilities": "call('capset', bytes([0x22, 5, 8, 0x20, 0, 0, 0, 0]), b'\\xff' * 24)",
        "user namespace": "call('unshare', 0x10000000)",
        "namespace of another": "call('setns', library, 0)",
        "personality": "call('personality', 0x0040000)",
    },
    "signals": {
        "kill": "os.kill(victim, 9)",
        "kill the server": "os.kill(server, 9)",
        "stop": "os.kill(victim, signal.SIGSTOP)",
        "is it there": "os.kill(victim, 0)",
        "to a thread": "raw(234, 131, victim, victim, 9)",
        "to a thread, the old way": "raw(200, 130, victim, 9)",
        "queued": "raw(129, 138, victim, 9, room)",
        "by descriptor of a process": "os.pidfd_open(victim)",
        "by a descriptor's owner": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, victim)",
        "by a descriptor's owner, extended": "fcntl.fcntl(os.pipe()[0], 15, bytes(8))",
        "which one a descriptor sends": "fcntl.fcntl(os.pipe()[0], 10, signal.SIGKILL)",
        "asynchronous descriptor": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETFL, 0o20000)",
        "asynchronous by ioctl": "fcntl.ioctl(os.pipe()[0], 0x5452, (1).to_bytes(4, 'little'))",
        "owner by ioctl": "fcntl.ioctl(os.pipe()[0], 0x8901, victim.to_bytes(4, 'little'))",
        "asynchronous on opening": "os.open('x', os.O_CREAT | os.O_RDWR | 0o20000)",
        "by a timer": "call('timer_create', 0, None, room)",
        "typed into a terminal": "fcntl.ioctl(0, 0x5412, b'x')",
    },
    "communication": {
        "System V memory": "call('shmget', 0x5EC, 4096, 0o1600)",
        "System V queue": "call('msgget', 0x5EC, 0o1600)",
        "System V semaphore": "call('semget', 0x5EC, 1, 0o1600)",
        "POSIX queue": "raw(240, 180, b'escaped', 0o102, 0o600, None)",
        "POSIX memory": "call('shm_open', b'/escaped', 0o102, 0o600)",
        "pair of sockets": "socket.socketpair()",
        "abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0escaped')",
        "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "virtual socket": "socket.socket(40)",
        "kernel's ciphers": "socket.socket(38, 5)",
        "datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "keyring": "raw(248, 217, b'user', b'escaped', b'x', 1, -5)",
        "event counter": "call('eventfd', 0, 0)",
        "rings": "raw(425, 425, 8, room)",
    },
    "memory of others": {
        "read": "raw(310, 270, server, room, 1, room, 1, 0)",
        "write": "raw(311, 271, server, room, 1, room, 1, 0)",
        "as a file": "open(f'/proc/{server}/mem', 'rb')",
        "own memory as a file": "open('/proc/self/mem', 'r+b')",
        "trace": "call('ptrace', 16, server, 0, 0)",
        "be traced": "call('ptrace', 0, 0, 0, 0)",
        "a descriptor of another": "raw(438, 438, library, 0, 0)",
        "compare": "raw(312, 272, server, victim, 1, 0, 0)",
        "page faults": "raw(323, 282, 0)",
        "counters": "raw(298, 241, room, 0, -1, -1, 0)",
        "programs in the kernel": "raw(321, 280, 0, room, 128)",
        "kernel's log": "raw(103, 116, 2, room, 99)",
    },
    "resources": {
        "priority": "os.nice(-5)",
        "another's priority": "os.setpriority(os.PRIO_PROCESS, victim, 19)",
        "scheduling": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
        "another's scheduling": "os.sched_setscheduler(victim, os.SCHED_IDLE, os.sched_param(0))",
        "another's processors": "os.sched_setaffinity(victim, {0})",
        "own processors": "os.sched_setaffinity(0, range(os.cpu_count()))",
        "priority on disks": "raw(251, 30, 1, 0, 0)",
        "another's limits": "resource.prlimit(victim, resource.RLIMIT_NOFILE, (3, 3))",
        "look at another's limits": "resource.prlimit(victim, resource.RLIMIT_NOFILE)",
        "own limits": "call('setrlimit', resource.RLIMIT_CPU, room)",
        "memory that stays": "call('mlock', room, 4096)",
        "huge pages": "mmap.mmap(-1, 1 << 21, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)",
        "file without a name": "os.open('.', os.O_TMPFILE | os.O_RDWR)",
        "space beyond a file's end": "raw(285, 47, os.open('x', os.O_CREAT | os.O_RDWR), 1, 0, 1 << 40)",
        "large pipe": "fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
        "folders": "i = 0\nwhile True: os.mkdir(str(i)); i += 1",
        "deep folders": "while True: os.mkdir('x'); os.chdir('x')",
        "files that are removed and held open": "f = open('x', 'wb'); os.unlink('x'); f.write(bytes(1 << 20))",
        "flush all disks": "raw(162, 81)",
        "a clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0)",
        "the machine's name": "socket.sethostname('escaped')",
    },
}


# Tries all of a category in turn, and says what became of each: the error, or "" where there was none.
TRIES = """
import json, os
said = {}
for name, source in json.load(open("attacks.json")).items():
    os.chdir(folder)
    try:
        exec(source)
        said[name] = ""
    except BaseException as error:
        said[name] = type(error).__name__
os.chdir(folder)
json.dump(said, open("said.json", "w"))
"""


@pytest.fixture(scope="module")
def sandbox():
    limits = Limits(wall_s=60, cpu_s=30, memory_mb=512, file_mb=8, folder_mb=16, folder_files=64, output_kb=16,
                    result_kb=64)  # fmt: skip
    box = Sandbox(limits)
    box.start()
    yield box
    box.close()


@pytest.fixture(scope="module")
def victim():
    with subprocess.Popen(["sleep", "900"]) as process:
        yield process.pid
        process.kill()


def _outside(victim):
    """What no program may change."""
    file = os.stat(os.__file__)
    of_victim = Path(f"/proc/{victim}/stat").read_text().split()
    shared = [line.split()[0] for kind in ("shm", "msg", "sem") for line in _lines(f"/proc/sysvipc/{kind}")]
    names = [
        name for folder in ("/dev/shm", "/dev/mqueue", "/tmp") if os.path.isdir(folder) for name in os.listdir(folder)
    ]
    return (
        [file.st_mode, file.st_uid, file.st_gid, file.st_size, file.st_nlink, file.st_mtime_ns, file.st_ctime_ns],
        [of_victim[2] in "TtZX", *of_victim[15:20], os.sched_getscheduler(victim), os.sched_getaffinity(victim)],
        resource.prlimit(victim, resource.RLIMIT_NOFILE),
        str(0x5EC) in shared,
        [name for name in names if "escaped" in name],
        os.uname().nodename,
    )


def _lines(path):
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def _attack(sandbox, victim, source, **options):
    """What became of it, after a look at everything that it must not have touched."""
    before, server = _outside(victim), sandbox.server.pid
    ran = sandbox.run(PRELUDE.format(victim=victim) + source, **options)
    assert _outside(victim) == before
    assert [sandbox.run(f"print({i} * 7)").output for i in (5, 6)] == ["35\n", "42\n"]
    assert sandbox.server.pid == server
    assert list(Path(sandbox.scratch).iterdir()) == []
    return ran


@pytest.fixture(scope="module")
def refusals(sandbox, victim):
    """By category and name, the error with which it ended."""
    found = {}
    for category, attacks in REFUSED.items():
        ran = _attack(
            sandbox, victim, TRIES, files={"attacks.json": json.dumps(attacks).encode()}, wanted=("said.json",)
        )
        assert ran.succeeded, ran
        found[category] = json.loads(ran.files["said.json"])
    return found


@pytest.mark.parametrize(("category", "name"), [(category, name) for category in REFUSED for name in REFUSED[category]])
def test_it_is_refused(refusals, category, name):
    unknown = {"start with clone3": "OSError"}  # the C library takes that for an old kernel, and goes on with clone
    assert refusals[category][name] == unknown.get(name, "PermissionError")


# --- what is not refused, and costs the program alone ---------------------------------------------------------------

IGNORE = """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
"""
# Source, what came of it in words (of the limit, or of the output), files wanted.
COSTS = {
    "many files": ("i = 0\nwhile True: open(str(i), 'w'); i += 1", "more than 64 files"),
    "many long names": ("i = 0\nwhile True: open(f'{i:0250}', 'w'); i += 1", "more than 64 files"),
    "many files at once": ("kept = []\nwhile True: kept.append(open(str(len(kept)), 'w'))", "more than 64 files"),
    "one large file": ("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))", "File too large"),
    "large files through memory": (
        "for i in range(9):\n    f = open(str(i), 'w+b'); f.truncate(4 << 20); m = mmap.mmap(f.fileno(), 4 << 20)\n"
        "    m[:] = b'x' * (4 << 20); m.flush()\nwhile True: pass", "more than 16 MB",
    ),
    "sparse files": ("open('x', 'wb').truncate(1 << 40)", "File too large"),
    "output": ("while True: os.write(1, bytes(4096))", "more than 16 KB"),
    "output by error": ("while True: print('x' * 999, file=sys.stderr)", "more than 16 KB"),
    "output in its last moment": ("os.write(1, bytes(1 << 16)); os._exit(0)", "more than 16 KB"),
    "memory": ("kept = []\nwhile True: kept.append(bytearray(1 << 24))", "MemoryError"),
    "memory at once": ("bytearray(1 << 40)", "MemoryError"),
    "memory through maps": ("kept = []\nwhile True: kept.append(mmap.mmap(-1, 1 << 26))", "Cannot allocate memory"),
    "descriptors": ("while True: os.dup(0)", "Too many open files"),
    "pipes": ("while True: os.pipe()", "Too many open files"),
    "parser": ("exec('(' * 100000)", ""),
    "killed by itself": ("os.kill(os.getpid(), 9)", "it was killed"),
    "foreign calls": ("ctypes.string_at(8)", ""),
    "calls of another architecture": (
        "m = mmap.mmap(-1, 4096, prot=7); m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()", "",
    ),
    "words to the server": (
        "for i in range(3, 300):\n    try: os.write(i, b'{}\\n')\n    except OSError: pass\nsys.exit(9)", "",
    ),
    "reads the server's questions": ("assert sys.stdin.read()", "AssertionError"),
    "no way out": ("os._exit = sys.exit = None\nraise SystemExit('stays')", ""),
    "output that is none": ("sys.stdout = sys.stderr = 3; raise SystemExit(2)", ""),
    "closes everything": ("os.closerange(0, 300); raise SystemExit(2)", ""),
    "goes on where the server would": ("sys._getframe(1).f_globals['os']._exit = print; raise SystemExit(2)", ""),
    "result that is too large": ("open('result', 'wb').write(bytes(1 << 17))", "its result is not a plain file of"),
    "result that is sparse": ("open('result', 'wb').truncate(8 << 20)", "its result is not a plain file of"),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTS)
def test_it_costs_that_program_alone(sandbox, victim, name):
    source, why = COSTS[name]
    ran = _attack(sandbox, victim, source, wanted=("result",))
    assert not ran.succeeded
    assert why in ran.stopped + ran.output
    assert len(ran.output) <= 16 << 10
    assert ran.files == {}


ENDLESS = {
    "sleeps": "import time; time.sleep(900)",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "ignores all signals": IGNORE + "while True: signal.pause()",
    "in an endless handler": "while True:\n    try: signal.pause()\n    except BaseException: pass",
    "is woken for ever": (
        "signal.signal(signal.SIGALRM, lambda *_: signal.setitimer(0, 1e-3))\nsignal.setitimer(0, 1e-3)\n"
        "while True: signal.pause()"
    ),
    "in a call that takes no signals": "hash(10 ** 10 ** 8)",
    "waits for what does not come": "os.read(os.pipe()[0], 1)",
    "in its last moment": (
        "import time\nclass Late:\n    def flush(self): time.sleep(900)\n    write = print\nsys.stdout = Late()"
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_it_takes_no_longer_than_it_may(sandbox, victim, name):
    ran = _attack(sandbox, victim, ENDLESS[name], limits=replace(sandbox.limits, wall_s=0.3))
    assert ran.stopped == "it ran for more than 0.3 s"
    assert ran.returncode == -signal.SIGKILL


def test_processor_time_is_counted_and_given_back(sandbox, victim):
    ran = _attack(sandbox, victim, IGNORE + "while True: pass", limits=replace(sandbox.limits, cpu_s=1.0))
    assert ran.stopped == "it used more than 1 CPU seconds"
    assert 0.5 < ran.cpu_s < 3.0  # the limit counts ticks of the clock, this the time itself


def test_output_need_not_be_text(sandbox):
    ran = sandbox.run("import os; os.write(1, bytes(range(256)) * 2)")
    assert ran.succeeded
    assert ran.output == (bytes(range(256)) * 2).decode(errors="replace")
    assert sandbox.run("print('\udc80')").output.splitlines()[-1].startswith(("UnicodeEncodeError", "?"))
    assert sandbox.run("x = '\0'").returncode == 1


@pytest.mark.parametrize("kind", ["folder", "link", "fifo", "socket", "unreadable", "hard link"])
def test_results_of_odd_kinds_are_not_opened(tmp_path, kind):
    """A program cannot make most of them; where it could, reading would hang, or read elsewhere."""
    path, limits = tmp_path / "result", Limits()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, 0o140600)
    else:
        path.write_bytes(b"1")
        if kind == "hard link":
            os.link(path, tmp_path / "other")
        elif os.getuid():
            path.chmod(0)
        else:
            limits = replace(limits, result_kb=0)  # root reads everything; this is refused as well
    with pytest.raises(_NoResultError, match="its result is not a plain file of at most"):
        list(_collect(tmp_path, ("result",), limits))


# --- owners and servers that end ------------------------------------------------------------------------------------

OWNER = """
import sys
from cola_ray.sandbox.programs import Limits, Sandbox
box = Sandbox(Limits(wall_s=10))
box.start()
print(box.server.pid, box.scratch, flush=True)
box.run(sys.argv[1])
"""
DETACH = """
import ctypes, os, signal, time
libc = ctypes.CDLL(None)
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
for attempt in (
    os.fork, os.setsid, os.setpgrp, lambda: libc.prctl(1, 0, 0, 0, 0), lambda: libc.prctl(36, 1, 0, 0, 0),
    lambda: os.setuid(65534), lambda: os.execv("/bin/sleep", ["sleep", "9"]), lambda: os.kill(os.getppid(), 19),
):
    try: attempt()
    except OSError: pass
open("tried", "w")
"""


@pytest.mark.parametrize("then", ["time.sleep(900)", "while True: pass"])
@pytest.mark.parametrize("who", ["owner", "server", "owner of a server that is stopped"])
def test_a_program_ends_with_its_owner_and_with_its_server(tmp_path, who, then):
    """Killed in the middle, with nothing to hand on: the program ends, and so does the server; no folder stays."""
    command = [sys.executable, "-c", OWNER, DETACH + then]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(tmp_path)}) as owner:
        server, scratch = owner.stdout.readline().decode().split()
        children = Path(f"/proc/{server}/task/{server}/children")
        _wait(lambda: children.read_text().strip(), "the program has begun")
        program = children.read_text().strip()
        _wait(lambda: list(Path(scratch).glob("*/folder/tried")), "it has tried to detach itself")
        if "stopped" in who:
            os.kill(int(server), signal.SIGSTOP)
        os.kill(int(server) if who == "server" else owner.pid, signal.SIGKILL)
        _wait(lambda: not _runs(program), "the program has ended")
        _wait(lambda: not _runs(server), "its server has ended")
        if who != "server":
            _wait(lambda: not os.path.exists(scratch), "its folder is gone")
    assert not os.path.exists(scratch)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait(until, what):
    for _ in range(600):
        if until():
            return
        time.sleep(0.05)
    raise AssertionError(f"not within 30 s: {what}")


def test_a_server_that_answers_another_question_is_replaced(sandbox):
    """As it would be after a program that made it lose step: that program has no result, the next one its own."""
    sandbox.server.stdin.write(b'{"number": 0}\n')  # not a question; the server ends at it
    ran = sandbox.run("print(1)")
    assert "the sandbox's server ended" in ran.stopped or ran.output == "1\n", "or it had ended before"
    assert sandbox.run("print(2)").output == "2\n"


# --- what is given up -----------------------------------------------------------------------------------------------


def test_a_program_has_no_rights_left(sandbox, victim):
    """As it stands in /proc, seen from outside: capabilities, no_new_privs, a filter, one thread; no dumps."""
    thread = threading.Thread(
        target=sandbox.run, args=("import time; time.sleep(900)",), kwargs={"limits": replace(sandbox.limits, wall_s=2)}
    )
    thread.start()
    children = Path(f"/proc/{sandbox.server.pid}/task/{sandbox.server.pid}/children")
    _wait(lambda: children.read_text().strip(), "the program has begun")
    path = Path(f"/proc/{children.read_text().strip()}/status")
    _wait(lambda: "Seccomp:\t2" in path.read_text(), "it is bound")
    status = dict(line.split(":\t") for line in path.read_text().splitlines() if ":\t" in line)
    thread.join()
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert os.getuid() or status["CapBnd"] == "0" * 16
    assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")


# Bound as under each version of Landlock in turn; says what could be done nevertheless.
VERSIONS = """
import importlib.util, json, os, signal, socket, sys
spec = importlib.util.spec_from_file_location("confine", sys.argv[1])
confine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(confine)
os.chdir(sys.argv[2])
attempts = {
    "read": lambda: open("/etc/passwd"), "write": lambda: open("../x", "w"), "list": lambda: os.listdir("/"),
    "empty": lambda: os.open(os.__file__, os.O_RDONLY | os.O_TRUNC), "truncate": lambda: os.truncate("/etc/passwd", 1),
    "rename": lambda: os.rename("y", "z"), "signal": lambda: os.kill(os.getppid(), 0), "fork": os.fork,
    "socket": lambda: socket.socket(socket.AF_UNIX), "connect": lambda: socket.create_connection(("127.0.0.1", 1)),
    "terminal": lambda: os.open("/dev/ptmx", os.O_RDWR), "wanted": lambda: open("y", "w"),
}
for version in range(1, confine.landlock_version() + 1):
    if not os.fork():
        confine.landlock_version = lambda: version
        confine.bind(confine.readable_files([os.path.dirname(os.__file__)], (), "."), confine.writable_files("."))
        done = []
        for name, attempt in attempts.items():
            try: attempt(); done.append(name)
            except PermissionError: pass
        print(version, *done, flush=True)
        os._exit(0)
    os.wait()
"""


def test_older_versions_of_landlock_lose_nothing_but_the_second_lock(tmp_path):
    """With the rights that each version knows; ``confine.MISSING`` says which of them the filter has to guard alone."""
    command = [sys.executable, "-I", "-c", VERSIONS, confine.__file__, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [f"{version} wanted" for version in range(1, confine.landlock_version() + 1)]


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_are_the_kernels(machine):
    """Against the kernel's own headers, where they are installed."""
    if not HEADERS[machine].exists():
        pytest.skip(f"no {HEADERS[machine]}")
    text = HEADERS[machine].read_text()
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    numbers |= {"newfstatat": numbers["fstatat" if machine == "aarch64" else "newfstatat"]}
    column = confine._ARCHITECTURES[machine][0]
    tables = confine._CALLS | confine._SOMETIMES | confine._UNKNOWN
    assert {name: row[column] for name, row in tables.items()} == {name: numbers.get(name) for name in tables}


@pytest.mark.parametrize("machine", HEADERS)
def test_every_call_outside_the_table_is_refused(machine):
    """The filter, executed line by line, for all numbers and for those that other architectures use."""
    lines = confine._filter(machine, 4711)
    column, architecture = confine._ARCHITECTURES[machine]
    named = {row[column] for row in confine._CALLS.values()}
    checked = {row[column] for row in confine._SOMETIMES.values()}
    unknown = {row[column] for row in confine._UNKNOWN.values()}
    for number in [*range(1024), 0x40000000, 0x40000001, 0xFFFFFFFF]:
        answer = _answer(lines, architecture, number, [0] * 6)
        if number in named:
            assert answer == confine._ALLOW[3]
        elif number in unknown:
            assert answer == confine._ENOSYS[3]
        elif number not in checked:
            assert answer == confine._EPERM[3]
    assert _answer(lines, 0x40000003, 20, [0] * 6) == confine._KILL[3]


def test_arguments_are_looked_at():
    cases = {
        "open": [([0, os.O_RDONLY], True), ([0, os.O_WRONLY | os.O_TRUNC | os.O_CREAT], True), ([0, os.O_TRUNC], False),
                 ([0, os.O_RDWR | 0o20000], False), ([0, os.O_TMPFILE | os.O_RDWR], False)],
        "openat": [([-100 & 0xFFFFFFFFFFFFFFFF, 0, os.O_TRUNC], False), ([0, 0, os.O_CLOEXEC], True)],
        "fcntl": [([1, 1], True), ([1, 4, os.O_NONBLOCK], True), ([1, 4, 0o20000], False), ([1, 8], False),
                  ([1, 10], False), ([1, 15], False), ([1, 1024], False), ([1, 1026], False), ([1, 1031], False)],
        "ioctl": [([0, 0x5401], True), ([0, 0x5412], False), ([0, 0x5452], False), ([0, 0x8901], False)],
        "kill": [([4711, 9], True), ([4712, 9], False), ([0, 9], False), ([0xFFFFFFFF, 9], False)],
        "tgkill": [([4711, 4711, 9], True), ([1, 4711, 9], False)],
        "prlimit64": [([0, 1, 0, 1], True), ([4711, 1, 0, 1], True), ([0, 1, 1], False), ([0, 1, 1 << 32], False),
                      ([4712, 1, 0], False)],
        "prctl": [([2], True), ([1], False), ([4], False), ([15], False), ([22], False), ([38], False)],
        "mmap": [([0, 9, 7, 0x22], True), ([0, 9, 7, 0x40022], False), ([0, 9, 7, 0x2022], False)],
        "madvise": [([0, 9, 14], True), ([0, 9, 12], False), ([0, 9, 100], False)],
    }  # fmt: skip
    lines = confine._filter("x86_64", 4711)
    for name, calls in cases.items():
        for arguments, allowed in calls:
            answer = _answer(lines, 0xC000003E, confine._SOMETIMES[name][0], arguments + [0] * 6)
            assert answer == (confine._ALLOW if allowed else confine._EPERM)[3], (name, arguments)


def _answer(lines, architecture, number, arguments):
    """What classic BPF says; the instructions that the filter uses, after the kernel's own interpreter."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments[:6])
    at, value = 0, 0
    while True:
        operation, if_true, if_false, operand = lines[at]
        at += 1
        if operation == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
        elif operation == 0x54:
            value &= operand
        elif operation in (0x15, 0x45):
            at += if_true if (value == operand if operation == 0x15 else value & operand) else if_false
        else:
            assert operation == 0x06
            return operand
