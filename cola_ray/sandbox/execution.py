"""What a response makes run, in a forked process that has given up its rights and ends with that response.

    in_a_fork(call, seconds) ─> fork: no files, sockets, processes; call() ─> one line of data ─> killed ─> its reply
    Apart()(response) ─> a process from before the task was built ─> the same ─> what ``execute`` made of the response

The fork's memory is a copy, so nothing that is done to it is there for the next response, and the only thing that
leaves it is a message of bounded size. A fork of the process that scores has what that process knows, solutions too;
one of :class:`Apart` has nothing but the function and the response.
"""

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
from cola_ray.sandbox.messages import BrokenError, Channel, GoneError, LateError, as_data, as_text
from cola_ray.sandbox.programs import confine_this_process

MOST_BYTES = 1 << 20
"""Of a response, and of what is made of it."""
_MEMORY_MB = 1024  # beside what the process has when it forks


class NotExecutedError(ValueError):
    """A response made nothing: why, in a line."""


def reply_of(call: Callable[[], Any]) -> dict[str, Any]:
    """``{"value": ...}`` of a call, as data, or ``{"failure": why}``."""
    try:
        return {"value": as_data(call())}
    except Exception as error:
        return {"failure": f"raised {type(error).__name__}: {error_text(error)}"}


def error_text(error: BaseException) -> str:
    """Its message, also where its own ``__str__`` raises."""
    try:
        return as_text(error, 300)
    except Exception:
        return "no message"


def is_reply(reply: Any) -> bool:
    """Whether it has the form of :func:`reply_of`."""
    if not isinstance(reply, dict) or len(reply) != 1:
        return False
    return "value" in reply or isinstance(reply.get("failure"), str)


def in_a_fork(call: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """The reply of a call that may do anything; the fork is gone on return, however it ended.

    Of the main thread of a process that has no other. Raises NoSandboxError, in the reply's words, where the kernel
    offers no confinement; then nothing was executed.
    """
    reading, writing = os.pipe()
    owner = os.getpid()
    pid = os.fork()
    if not pid:
        _in_the_fork(call, writing, owner, seconds)
    os.close(writing)
    failure = ""
    try:
        reply = Channel(reading, -1, MOST_BYTES).receive(seconds)
        return reply if is_reply(reply) else {"failure": "sent what is no reply"}
    except LateError:
        failure = f"took longer than {seconds:g} s"
    except GoneError:
        pass
    except BrokenError as error:
        failure = str(error)
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)  # one that ended by itself keeps its exit code
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"failure": failure or f"ended its process with exit code {code}"}


def _in_the_fork(call: Callable[[], Any], writing: int, owner: int, seconds: float) -> NoReturn:
    try:
        die_with_parent()
        if os.getppid() != owner:  # it died before that
            os._exit(1)
        _leave_everything_but(writing)
        _limit_resources(seconds)
        confine_this_process()
        reply = reply_of(call)
    except BaseException as error:  # sys.exit included: the owner's loop must not go on in here
        reply = {"failure": f"raised {type(error).__name__}: {error_text(error)}"}
    try:
        Channel(-1, writing, MOST_BYTES).send(reply)
    except ValueError as error:
        Channel(-1, writing, MOST_BYTES).send({"failure": f"gave too much: {error}"})
    finally:
        os._exit(0)


def _leave_everything_but(kept: int) -> None:
    """No descriptor of the owner's, its connection and its output among them, is open in here."""
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


class Apart:
    """A process that never saw the task: it knows a function by its name, and calls it in forks of its own.

    Made before the task is built, in the process that will build it; :meth:`take` then says which function it is.
    """

    def __init__(self, seconds: float) -> None:
        asked, self.asks = os.pipe()
        self.told, tells = os.pipe()
        owner = os.getpid()
        self.seconds = seconds
        self.pid = os.fork()
        if not self.pid:
            try:
                die_with_parent()
                if os.getppid() == owner:
                    os.close(self.asks)
                    os.close(self.told)
                    _serve(Channel(asked, tells, MOST_BYTES), seconds)
            finally:
                os._exit(0)
        os.close(asked)
        os.close(tells)
        self.channel = Channel(self.told, self.asks, MOST_BYTES)

    def take(self, function: Callable[..., Any]) -> None:
        """Raises ValueError where the function cannot be had by its module and name."""
        self.channel.send([function.__module__, function.__qualname__])
        failure = self.channel.receive()
        if failure:
            raise ValueError(f"{function.__qualname__} cannot be called apart from its task: {failure}")

    def __call__(self, response: str) -> Any:
        """What the function makes of a response, as data. Raises NotExecutedError."""
        self.channel.send(response)
        reply = self.channel.receive()  # of the process, not of its fork: it keeps the deadline
        if "failure" in reply:
            raise NotExecutedError(reply["failure"])
        return reply["value"]

    def close(self) -> None:
        os.close(self.asks)
        os.close(self.told)
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
        channel.send(in_a_fork(functools.partial(function, response), seconds))
