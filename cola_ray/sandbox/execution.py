"""Executes code from a response in a forked process that has given up its rights and ends with that response.

    call_in_fork(call, seconds) ─> fork: no files, sockets, processes; call() ─> one line of data ─> killed ─> its reply
    SeparateExecutor()(response) ─> a process from before the task was built ─> the same ─> the result of ``execute``

A fork's memory is a copy, so changes to it do not reach the next response, and only a message of bounded size leaves
it. A fork of the scoring process has that process's memory, including solutions; a fork of :class:`SeparateExecutor`
has only the function and the response.
"""

import contextlib
import functools
import gc
import importlib
import math
import os
import resource
import signal
from collections.abc import Callable
from typing import Any, NoReturn

from cola_ray.sandbox.confine import die_with_parent
from cola_ray.sandbox.messages import BrokenError, Channel, GoneError, LateError, error_text, is_reply, reply_of
from cola_ray.sandbox.programs import confine_this_process

MAX_BYTES = 1 << 20
"""Size limit of a response, and of the result of executing it."""
_MEMORY_MB = 1024  # in addition to what the process uses when it forks


class NotExecutedError(ValueError):
    """Executing a response gave no result; the message says why, in one line."""


def call_in_fork(call: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Return the reply of a call that may do anything; the fork is gone on return, however it ended.

    Only for the main thread of a process that has no other threads. If the kernel offers no confinement, nothing is
    executed and the reply's failure is that of NoSandboxError.
    """
    return _reply_of_fork(call, seconds, confined=True)


def call_in_child(call: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Like :func:`call_in_fork`, for code that is trusted and may still hang, crash or leave processes behind.

    The fork keeps all rights, files and memory of this process. It is gone on return, but not processes that it has
    started in a session of their own.
    """
    return _reply_of_fork(call, seconds, confined=False)


def _reply_of_fork(call: Callable[[], Any], seconds: float, confined: bool) -> dict[str, Any]:
    reading, writing = os.pipe()
    owner = os.getpid()
    pid = os.fork()
    if not pid:
        _serve_call(call, writing, owner, seconds, confined)
    os.close(writing)
    failure = ""
    try:
        reply = Channel(reading, -1, MAX_BYTES).receive(seconds)
        return reply if is_reply(reply) else {"failure": "sent something that is not a reply"}
    except LateError:
        failure = f"took longer than {seconds:g} s"
    except GoneError:
        pass
    except BrokenError as error:
        failure = str(error)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has no group of its own
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)  # a process that has already ended keeps its exit code
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"failure": failure or f"ended its process with exit code {code}"}


def _serve_call(call: Callable[[], Any], writing: int, owner: int, seconds: float, confined: bool) -> NoReturn:
    """Make the call and send its reply; runs in the fork."""
    try:
        die_with_parent()
        if os.getppid() != owner:  # the owner had died before die_with_parent took effect
            os._exit(1)
        if confined:
            _close_all_but(writing)
            _limit_resources(seconds)
            confine_this_process()
        else:
            os.setpgid(0, 0)  # so that the group can be killed together
        reply = reply_of(call)
    except BaseException as error:  # including sys.exit: the owner's loop must not continue in the fork
        reply = {"failure": f"raised {type(error).__name__}: {error_text(error)}"}
    try:
        Channel(-1, writing, MAX_BYTES).send(reply)
    except ValueError as error:
        Channel(-1, writing, MAX_BYTES).send({"failure": f"returned too much: {error}"})
    finally:
        os._exit(0)


def _close_all_but(kept: int) -> None:
    """Close all the owner's other descriptors, including its connection and its output."""
    null = os.open("/dev/null", os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.closerange(3, kept)
    os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _limit_resources(seconds: float) -> None:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    memory = pages * resource.getpagesize() + (_MEMORY_MB << 20)
    for kind, most in (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, math.ceil(seconds) + 1), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))


class SeparateExecutor:
    """A process that never saw the task: it knows a function by name, and calls it in its own forks.

    Create it before the task is built, in the process that will build it; then name the function with :meth:`use`.
    """

    def __init__(self, seconds: float) -> None:
        requests, self.requests = os.pipe()
        self.replies, replies = os.pipe()
        owner = os.getpid()
        self.seconds = seconds
        self.pid = os.fork()
        if not self.pid:
            try:
                die_with_parent()
                if os.getppid() == owner:
                    os.close(self.requests)
                    os.close(self.replies)
                    _serve(Channel(requests, replies, MAX_BYTES), seconds)
            finally:
                os._exit(0)
        os.close(requests)
        os.close(replies)
        self.channel = Channel(self.replies, self.requests, MAX_BYTES)

    def use(self, function: Callable[..., Any]) -> None:
        """Choose the function to call.

        Raises:
            ValueError: it cannot be imported by its module and name.
        """
        self.channel.send([function.__module__, function.__qualname__])
        failure = self.channel.receive()
        if failure:
            raise ValueError(f"{function.__qualname__} cannot be called in a process of its own: {failure}")

    def __call__(self, response: str) -> Any:
        """Return the function's result for a response, as data.

        Raises:
            NotExecutedError: there is none.
        """
        self.channel.send(response)
        reply = self.channel.receive()  # without a deadline: the process enforces that of its forks
        if "failure" in reply:
            raise NotExecutedError(reply["failure"])
        return reply["value"]

    def close(self) -> None:
        os.close(self.requests)
        os.close(self.replies)
        os.waitpid(self.pid, 0)


def _serve(channel: Channel, seconds: float) -> None:
    module, name = channel.receive()
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:
        channel.send(f"{type(error).__name__}: {error_text(error)}")
        return
    channel.send("")
    gc.freeze()
    while True:
        response = channel.receive()
        channel.send(call_in_fork(functools.partial(function, response), seconds))
