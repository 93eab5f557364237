"""User code in a separate process, every call with a deadline: it may raise, hang, exit or return nonsense.

    IsolatedObject.call([(method, *args), ...])  ─>  [Reply, ...]     in order, one for every call
        RewardProcess.score                          a task's rewards (reward_process.py)
        EnvironmentProcess.reset / step              many episodes of a multi-turn environment

    this process ── [token, method, *args] ──> child: the object; a verifier that executes responses forks for each
                 <── [token, reply] ──────────        (sandbox/messages.py: a line of JSON, never a pickle)

One call is under way at a time, and its reply carries the call's token, so nothing else that a child sends can be taken
for the reply. If a call takes too long, or the child sends something that is not a reply, the call fails: the process
is killed together with whatever it started, and a new one serves later calls. If the process was killed or stopped from
outside, or the message may belong to the previous call, the call is repeated once. ``signal.alarm`` would not do: it
works only in main threads and does not interrupt C code.
"""

import contextlib
import functools
import gc
import json
import multiprocessing as mp
import multiprocessing.forkserver
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from cola_ray.sandbox.confine import die_with_parent
from cola_ray.sandbox.execution import call_in_fork
from cola_ray.sandbox.messages import (
    BrokenError,
    Channel,
    GoneError,
    LateError,
    as_data,
    as_text,
    error_text,
    is_reply,
    reply_of,
)
from cola_ray.tasks.environment import Chat, Environment
from cola_ray.tasks.protocol import not_a_reward

_GRACE_S = 5.0  # extra time for a child that keeps the deadline itself and must then still clean up its forks
_MAX_FAILURE_LENGTH = 300  # characters
_OF_STEP = ("observation", "reward", "terminated", "truncated", "state")
_OF_INFO = ("metrics", "chat")
_MOST_METRICS = 64
_METRIC = re.compile(r"[A-Za-z0-9_]{1,64}")
_MAX_ENVIRONMENT_BYTES = 4 << 20  # an environment's messages carry its state


@dataclass(frozen=True)
class Reply:
    value: Any = None  # data: numbers, text, lists and dicts
    failure: str = ""  # why there is no value: what was raised, or the time limit


class IsolatedObject:
    """An object that is built in a child process and lives there.

    Args:
        make: builds the object in the child; picklable.
        timeout_s: seconds that a call may take.
        start_timeout_s: seconds that building the object may take.
        max_bytes: size limit of a call, and of its reply.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        timeout_s: float,
        start_timeout_s: float = 300.0,
        max_bytes: int = 1 << 20,
    ) -> None:
        self.make, self.timeout_s, self.start_timeout_s, self.max_bytes = make, timeout_s, start_timeout_s, max_bytes
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        # A fork of this process would inherit the engine's threads and locks, and a spawned process would import
        # everything each time. So a fork server imports the modules once and forks the children.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.connection, theirs = socket.socketpair()
        self.connection.setblocking(False)
        self.channel = Channel(self.connection.fileno(), self.connection.fileno(), self.max_bytes)
        arguments = (self.make, theirs, self.timeout_s, self.max_bytes)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.reply_timeout_s = self.timeout_s

    def call(self, calls: Sequence[tuple[Any, ...]]) -> list[Reply]:
        """Make each (method, *arguments) in turn and return one reply per call; arguments are data. Thread-safe.

        Raises:
            RuntimeError: the object cannot be built.
        """
        with self.lock:
            return [self._call(call) for call in calls]

    def _call(self, call: tuple[Any, ...], retry: bool = True) -> Reply:
        if not self.ready:
            self._finish_start()
        token = secrets.randbits(48)
        try:
            if not self.channel.silent():
                self._restart()  # it sent something unasked, which must not be taken for the reply to this call
                self._finish_start()
            try:
                self.channel.send([token, *call], self.reply_timeout_s)
            except ValueError as error:
                return Reply(failure=f"too much to hand over: {error}")
            reply = self.channel.receive(self.reply_timeout_s)
            if not (isinstance(reply, list) and len(reply) == 2 and reply[0] == token and is_reply(reply[1])):
                raise BrokenError("sent something that is not a reply")
        except BrokenError as error:
            failure = self._why(error)  # before the restart: this waits for the exit code of a process that is ending
            # A malformed reply may be a late message from the previous call.
            not_its_fault = self._was_disturbed() or not isinstance(error, GoneError | LateError)
            self._restart()
            return self._call(call, retry=False) if retry and not_its_fault else Reply(failure=failure)
        if "failure" in reply[1]:
            return Reply(
                failure=as_text(reply[1]["failure"], _MAX_FAILURE_LENGTH) or "raised an error without a message"
            )
        return Reply(**reply[1])

    def _why(self, error: BrokenError) -> str:
        if isinstance(error, LateError):
            return f"took longer than {self.timeout_s:g} s"
        if isinstance(error, GoneError):
            self.process.join(1.0)
            if self.process.exitcode is not None:
                return f"ended its process with exit code {self.process.exitcode}"
        return str(error)

    def _was_disturbed(self) -> bool:
        """Whether the process was killed or stopped from outside."""
        if self.process.exitcode is not None:
            return self.process.exitcode == -signal.SIGKILL
        with contextlib.suppress(psutil.Error):
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)
        return False

    def _finish_start(self) -> None:
        try:
            message = self.channel.receive(self.start_timeout_s)
        except LateError:
            raise RuntimeError(f"the task could not be built: it took longer than {self.start_timeout_s:g} s") from None
        except BrokenError as error:
            raise RuntimeError(f"the task could not be built: it {self._why(error)}") from None
        if not isinstance(message, dict) or not isinstance(message.get("failure"), str):
            raise RuntimeError("the task could not be built: its process sent something that is not a message")
        if message["failure"]:
            raise RuntimeError(f"the task could not be built: {as_text(message['failure'], _MAX_FAILURE_LENGTH)}")
        self.reply_timeout_s = self.timeout_s + (_GRACE_S if message.get("keeps_time") is True else 0.0)
        self.ready = True

    def _restart(self) -> None:
        self.close()
        self.start()

    def close(self) -> None:
        """Kill the process and everything in its process group."""
        self.connection.close()
        pid = self.process.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def _serve(make: Callable[[], Any], connection: socket.socket, timeout_s: float, max_bytes: int) -> None:
    """Build the object and answer calls until the other end is closed; runs in the child."""
    os.setsid()  # its own process group: can be killed as one, and gets no signals that are sent to the owner's group
    die_with_parent()  # the parent is the fork server, which ends with its owner once no other process holds its pipe
    alive: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    os.close(alive._forkserver_alive_fd)
    channel = Channel(connection.fileno(), connection.fileno(), max_bytes)
    try:
        served = make()
        forks = bool(getattr(served, "executes_responses", False))
        keeps_time = forks or getattr(served, "keeps_time", False)
        failure = call_in_fork(int, timeout_s).get("failure", "") if keeps_time else ""
    except Exception as error:
        forks, keeps_time, failure = False, False, f"{type(error).__name__}: {error_text(error)}"
    channel.send({"failure": failure.removeprefix("raised "), "keeps_time": keeps_time})
    gc.freeze()  # otherwise the collector would touch, and so copy, pages that forks share
    while not failure:
        try:
            token, method, *args = channel.receive()
        except GoneError:
            return
        call = functools.partial(getattr(served, method), *args)
        reply = call_in_fork(call, timeout_s) if forks else reply_of(call)
        try:
            channel.send([token, reply])
        except ValueError as error:
            channel.send([token, {"failure": f"returned too much: {error}"}])


# --- environments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """An environment's result for one utterance, and its state afterwards."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    state: Any  # data
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the episode so far
    chat: Chat | None = None  # messages for the chat template, in place of the observation


class EnvironmentProcess(IsolatedObject):
    """Many episodes of one environment in one process; ``make`` builds an environment.

    Every step carries the episode's state, so if a process has to be killed, its other episodes go on in the next one.
    States are data, like everything that crosses the channel; see :meth:`Environment.get_state`.
    """

    def __init__(self, make: Callable[[], Environment], timeout_s: float) -> None:
        super().__init__(_Episodes(make), timeout_s, max_bytes=_MAX_ENVIRONMENT_BYTES)

    def reset(self, episode: int, seed: int) -> Reply:
        """Start an episode; the reply's value is an :class:`Outcome` with reward 0."""
        return _as_outcome(self.call([("reset", episode, seed)])[0])

    def step(self, episode: int, state: Any, utterance: str) -> Reply:
        """Take a turn; the reply's value is an :class:`Outcome`. A reward that is not a valid number is a failure."""
        return _as_outcome(self.call([("step", episode, state, utterance)])[0])

    def forget(self, episode: int) -> None:
        self.call([("forget", episode)])


def _as_outcome(reply: Reply) -> Reply:
    """Turn a reply's value into an :class:`Outcome`, or into a failure if it has the wrong form."""
    if reply.failure:
        return reply
    value = reply.value
    if not (isinstance(value, dict) and value.keys() == {*_OF_STEP, *_OF_INFO}):
        return Reply(failure="returned something that is not an outcome")
    if not is_text(value["observation"]):
        return Reply(
            failure=f"returned the observation {as_text(repr(value['observation']), 100)}, which is not valid text"
        )
    if why := not_a_reward(value["reward"]):
        return Reply(failure=f"returned the reward {why}")
    for name in ("terminated", "truncated"):
        if not isinstance(value[name], bool):
            return Reply(failure=f"returned {name} = {as_text(repr(value[name]), 100)}, not true or false")
    try:
        read = {"metrics": _metrics(value["metrics"]), "chat": _chat(value["chat"])}
    except ValueError as error:
        return Reply(failure=f"returned {error}")
    return Reply(Outcome(**value | read | {"reward": float(value["reward"])}))


def _metrics(value: Any) -> dict[str, float]:
    """Return the metrics; raises ValueError if the value is not a dict of numbers."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MOST_METRICS:
        raise ValueError(f"info['metrics'] = {as_text(repr(value), 100)}; at most {_MOST_METRICS} numbers by name")
    for name, number in value.items():
        if not _METRIC.fullmatch(name):
            raise ValueError(f"the metric {as_text(repr(name), 100)}; names have letters, digits and _")
        if not_a_reward(number):
            raise ValueError(f"the metric {name} = {as_text(not_a_reward(number), 100)}")
    return {name: float(number) for name, number in value.items()}


def _chat(value: Any) -> Chat | None:
    """Return the chat messages; raises ValueError if the value has the wrong form."""
    if value is None:
        return None
    try:
        chat = Chat.of(value)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("info['chat'] with text that is not valid") from None
    except ValueError as error:
        raise ValueError(f"info['chat'] with {as_text(error, 200)}") from None
    return chat


def is_text(value: object) -> bool:
    """Whether this is text that can be tokenised and stored: a string without lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        return bool(value.encode()) or not value
    except UnicodeEncodeError:
        return False


class _Episodes:
    """In the child: one environment per episode, rebuilt from its state if this process does not hold it."""

    def __init__(self, make: Callable[[], Environment]) -> None:
        self.make = make
        self.environments: dict[int, Environment] = {}

    def __call__(self) -> "_Episodes":
        self.make()  # so that an environment that cannot be built fails at the start, not in the first episode
        return self

    def reset(self, episode: int, seed: int) -> Mapping[str, Any]:
        environment = self.environments[episode] = self.make()
        observation, info = environment.reset(seed=seed)
        return self._outcome(environment, observation, 0.0, False, False, info)

    def step(self, episode: int, state: Any, utterance: str) -> Mapping[str, Any]:
        if episode not in self.environments:
            self.environments[episode] = self.make()
            self.environments[episode].set_state(state)
        environment = self.environments[episode]
        observation, reward, terminated, truncated, info = environment.step(utterance)
        if terminated or truncated:
            self.forget(episode)
        return self._outcome(environment, observation, float(reward), bool(terminated), bool(truncated), info)

    def forget(self, episode: int) -> None:
        environment = self.environments.pop(episode, None)
        if callable(close := getattr(environment, "close", None)):
            with contextlib.suppress(Exception):  # the episode is over
                close()

    def _outcome(
        self, environment: Environment, observation: str, reward: float, terminated: bool, truncated: bool, info: Any
    ) -> Mapping[str, Any]:
        """The result of a reset or a step. An episode that is over needs no state."""
        state = None if terminated or truncated else as_data(environment.get_state(), "get_state()")
        told = info if isinstance(info, Mapping) else {}
        return {
            "observation": observation, "reward": reward, "terminated": terminated, "truncated": truncated,
            "state": state, **{name: as_data(told.get(name), f"info[{name!r}]") for name in _OF_INFO},
        }  # fmt: skip
