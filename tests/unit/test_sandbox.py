"""Programs that try to get out, take everything, or never end. Each runs for real."""

import os
import threading
from pathlib import Path

import pytest

from cola_ray.sandbox.programs import Limits, NoSandboxError, Sandbox


@pytest.fixture(scope="module")
def sandbox():
    """Limits on all but time, which a busy machine needs."""
    box = Sandbox(Limits(wall_s=60, cpu_s=30, memory_mb=512, file_mb=8, folder_mb=16, output_kb=16))
    yield box
    box.close()


def test_a_program_runs_with_its_files_and_leaves_some(sandbox):
    ran = sandbox.run("print(open('in').read() * 2); open('out', 'w').write('7')", {"in": b"21"}, wanted=("out", "no"))
    assert (ran.returncode, ran.output, ran.stopped, ran.files) == (0, "2121\n", "", {"out": b"7"})
    assert ran.succeeded


def test_an_error_is_told_as_if_the_program_had_been_started_alone(sandbox):
    ran = sandbox.run("def f():\n    return 1 / 0\nf()")
    assert ran.returncode == 1
    lines = ran.output.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "confine.py" not in ran.output
    assert sandbox.run("raise SystemExit(3)").returncode == 3
    assert sandbox.run("def").output.splitlines()[-1].startswith("SyntaxError")


def test_programs_do_not_meet(sandbox):
    sandbox.run("import json; json.loads = None; open('left', 'w').write('x')")
    ran = sandbox.run("import json, os; print(json.loads('1'), os.path.exists('left'))")
    assert ran.output == "1 False\n"


ESCAPES = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb by processes": "import multiprocessing as m\nwhile True: m.Process(target=print).start()",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
    "shell": "import subprocess; subprocess.run(['/bin/sh', '-c', 'echo out'])",
    "another program": "import os; os.execv('/bin/true', ['true'])",
    "10 GB": "x = bytearray(10 << 30)",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "read a file": "print(open('/etc/passwd').read())",
    "read through a link": "import os; os.symlink('/etc/passwd', 'p'); print(open('p').read())",
    "list a folder": "import os; print(os.listdir('/'))",
    "look at a process": "import os; print(open(f'/proc/{os.getppid()}/environ').read())",
    "write a file": "open('/tmp/escaped', 'w').write('x')",
    "climb out": "open('../escaped', 'w').write('x')",
    "hard link": "import os; os.link('/etc/passwd', 'p')",
    "rename outwards": "import os; open('x', 'w'); os.rename('x', '../escaped')",
    "change modes": "import os; os.chmod('/etc/passwd', 0o777)",
    "socket": "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
    "local socket": "import socket; socket.socketpair()",
    "download": "import urllib.request; urllib.request.urlopen('http://example.org', timeout=1)",
    "signal to all": "import os; os.kill(-1, 9)",
    "signal to its parent": "import os; os.kill(os.getppid(), 9)",
    "signal to its group": "import os; os.killpg(0, 9)",
    "raise a limit": "import resource as r; r.setrlimit(r.RLIMIT_CPU, (r.RLIM_INFINITY, r.RLIM_INFINITY))",
    "shared memory": "from multiprocessing import shared_memory as s; s.SharedMemory(create=True, size=1 << 20)",
    "raw system call": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.syscall(57 if __import__('platform').machine() == 'x86_64' else 220, 17, 0, 0, 0, 0) >= 0"
    ),
    "another's memory": "import ctypes, os; assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_no_way_out(sandbox, name):
    """Each fails with an error of its own; the server lives on, and outside nothing has changed."""
    before = {path: os.stat(path) for path in ("/etc/passwd", "/tmp")}
    ran = sandbox.run(ESCAPES[name])
    assert not ran.succeeded
    assert ran.returncode == 1, ran.output
    assert "root:" not in ran.output
    assert not Path("/tmp/escaped").exists()
    assert os.stat("/etc/passwd").st_mode == before["/etc/passwd"].st_mode
    assert sandbox.run("print('alive')").output == "alive\n"


ENDLESS = {
    "sleeps": ("import time; time.sleep(600)", Limits(wall_s=2), "for more than 2 s"),
    "hides in an endless handler": (
        "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass", Limits(wall_s=2),
        "for more than 2 s",
    ),
    "computes": ("while True: pass", Limits(cpu_s=1), "1 CPU seconds"),
    "computes and will not be asked": (
        "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", Limits(cpu_s=1),
        "1 CPU seconds",
    ),
    "prints": ("while True: print('x' * 999)", Limits(output_kb=16), "more than 16 KB"),
    "writes one file": ("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))", Limits(file_mb=8), "too large"),
    "writes many files": (
        "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(1 << 20))", Limits(folder_mb=16),
        "more than 16 MB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_ended(name):
    source, limits, why = ENDLESS[name]
    box = Sandbox(limits)
    ran = box.run(source)
    assert why in ran.stopped + ran.output
    assert not ran.succeeded
    assert len(ran.output) <= limits.output_kb << 10
    assert box.run("print('alive')").output == "alive\n"
    box.close()


def test_the_environment_is_not_handed_on(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    box = Sandbox()
    ran = box.run("import os, sys; print(dict(os.environ), sys.argv, open('/dev/urandom', 'rb').read(1) and 1)")
    box.close()
    assert ran.succeeded, ran.output
    assert "secret" not in ran.output


def test_a_kernel_that_cannot_confine_runs_nothing(monkeypatch, tmp_path):
    from cola_ray.sandbox import programs as module

    server = tmp_path / "server.py"
    server.write_text("""print('{"problem": "this kernel has no Landlock"}')""")
    monkeypatch.setattr(module.sandbox_server, "__file__", str(server))
    with pytest.raises(module.NoSandboxError, match="generated programs are not run: this kernel has no Landlock"):
        Sandbox().run("print('ran')")


def test_what_cannot_be_prepared_is_said():
    with pytest.raises(NoSandboxError, match="not run: the sandbox's imports failed: ModuleNotFoundError"):
        Sandbox(prepare="import nothing_of_that_name").start()


def test_a_server_that_died_is_started_again(sandbox):
    sandbox.run("1")
    sandbox.server.kill()
    sandbox.server.wait()
    assert sandbox.run("print('again')").output == "again\n"


def test_a_server_that_is_killed_costs_no_program(sandbox):
    sandbox.start()
    threading.Timer(0.5, sandbox.server.kill).start()
    ran = sandbox.run("import time\ntime.sleep(1.5)\nprint('whole')")
    assert ran.succeeded
    assert ran.output == "whole\n"
