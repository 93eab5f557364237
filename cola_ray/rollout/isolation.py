"""User code in a process of its own, every call with a deadline: it may raise, hang, exit or return nonsense.

    Isolated.call([(method, *args), ...])  ─>  [Answer, ...]     in order, always complete
        RewardProcess.score                    a task's rewards
        EnvironmentProcess.reset / step        many episodes of a multi-turn environment

    this process ── [token, method, *args] ──> child: the object; a verifier that executes responses forks for each
                 <── [token, reply] ──────────        (sandbox/messages.py: a line of JSON, never a pickle)

One call is under way at a time, and its reply bears its token, so nothing that a child sends can be taken for the
answer to another call. A call that takes too long, or whose reply is none, costs its own answer: the process is killed
with whatever it started, a new one does the rest. Where somebody has killed or stopped the process, or what came may
belong to the call before, the call is made once more. ``signal.alarm`` would not do; it works in main threads only and
does not stop C code.
"""

import contextlib
import functools
import gc
import inspect
import multiprocessing as mp
import multiprocessing.forkserver
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from cola_ray.sandbox.confine import die_with_parent
from cola_ray.sandbox.execution import Apart, error_text, in_a_fork, is_reply, reply_of
from cola_ray.sandbox.messages import BrokenError, Channel, GoneError, LateError, as_data, as_text
from cola_ray.tasks import Task, answer_of
from cola_ray.tasks.environment import Environment
from cola_ray.tasks.protocol import Split, not_a_reward

_GRACE_S = 5.0  # for what a child does around a fork that keeps the deadline itself
_SHOWN = 300
_MOST_OF_A_STATE = 4 << 20


@dataclass(frozen=True)
class Answer:
    value: Any = None  # data: numbers, text, lists and dicts
    failure: str = ""  # why there is none: what was raised, or the time limit


class Isolated:
    """An object that lives in a child process, where it is made.

    Args:
        make: picklable, builds the object in the child.
        timeout_s: seconds a call may take.
        start_timeout_s: seconds the child may take to build it.
        most_bytes: of a call, and of its reply.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        timeout_s: float,
        start_timeout_s: float = 300.0,
        most_bytes: int = 1 << 20,
    ) -> None:
        self.make, self.timeout_s, self.start_timeout_s, self.most_bytes = make, timeout_s, start_timeout_s, most_bytes
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        # A fork would inherit the engine's threads and locks, and a spawned process pays for all imports each time: a
        # server that has imported them, and nothing else, forks instead.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.connection, theirs = socket.socketpair()
        self.connection.setblocking(False)
        self.channel = Channel(self.connection.fileno(), self.connection.fileno(), self.most_bytes)
        arguments = (self.make, theirs, self.timeout_s, self.most_bytes)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.patience = self.timeout_s

    def call(self, calls: Sequence[tuple[Any, ...]]) -> list[Answer]:
        """One answer for every (method, *arguments), in order; arguments are data. Thread-safe.

        Raises RuntimeError if the object cannot be built.
        """
        with self.lock:
            return [self._ask(call) for call in calls]

    def _ask(self, call: tuple[Any, ...], again: bool = True) -> Answer:
        self._wait_until_ready()
        token = secrets.randbits(48)
        try:
            if not self.channel.silent():
                self._restart()  # somebody speaks unasked: not in answer to this call, which is not to pay for it
                self._wait_until_ready()
            try:
                self.channel.send([token, *call], self.patience)
            except ValueError as error:
                return Answer(failure=f"too much to hand over: {error}")
            reply = self.channel.receive(self.patience)
            if not (isinstance(reply, list) and len(reply) == 2 and reply[0] == token and is_reply(reply[1])):
                raise BrokenError("sent what is no reply")
        except BrokenError as error:
            failure = self._why(error)  # which waits for the end of a process that is ending
            # What is no reply may be what the call before has sent late.
            elsewhere = self._was_disturbed() or not isinstance(error, GoneError | LateError)
            self._restart()
            return self._ask(call, again=False) if again and elsewhere else Answer(failure=failure)
        failure = as_text(reply[1].get("failure", ""), _SHOWN)
        return Answer(failure=failure or "raised without a word") if "failure" in reply[1] else Answer(**reply[1])

    def _why(self, error: BrokenError) -> str:
        if isinstance(error, LateError):
            return f"took longer than {self.timeout_s:g} s"
        if isinstance(error, GoneError):
            self.process.join(1.0)
            if self.process.exitcode is not None:
                return f"ended its process with exit code {self.process.exitcode}"
        return str(error)

    def _was_disturbed(self) -> bool:
        """Whether somebody has killed or stopped the process."""
        if self.process.exitcode is not None:
            return self.process.exitcode == -signal.SIGKILL
        with contextlib.suppress(psutil.Error):
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)
        return False

    def _wait_until_ready(self) -> None:
        if self.ready:
            return
        try:
            said = self.channel.receive(self.start_timeout_s)
        except LateError:
            raise RuntimeError(f"the task was not built within {self.start_timeout_s:g} s") from None
        except BrokenError as error:
            raise RuntimeError(f"the task's process {self._why(error)}".replace("process ended its ", "")) from None
        if not isinstance(said, dict) or not isinstance(said.get("failure"), str):
            raise RuntimeError("the task's process sent what is no message")
        if said["failure"]:
            raise RuntimeError(f"the task could not be built: {as_text(said['failure'], _SHOWN)}")
        self.patience = self.timeout_s + (_GRACE_S if said.get("keeps_time") is True else 0.0)
        self.ready = True

    def _restart(self) -> None:
        self.close()
        self.start()

    def close(self) -> None:
        """End the process and those of its group."""
        self.connection.close()
        pid = self.process.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def _serve(make: Callable[[], Any], connection: socket.socket, timeout_s: float, most_bytes: int) -> None:
    os.setsid()  # a group of its own: killed as one, and not meant by a signal to the owner's
    die_with_parent()  # the server; it ends when its own owner does, unless somebody holds the other end of its pipe
    alive: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    os.close(alive._forkserver_alive_fd)
    channel = Channel(connection.fileno(), connection.fileno(), most_bytes)
    try:
        served = make()
        forks = bool(getattr(served, "executes_responses", False))
        keeps_time = forks or getattr(served, "keeps_time", False)
        failure = in_a_fork(int, timeout_s).get("failure", "") if keeps_time else ""
    except Exception as error:
        forks, keeps_time, failure = False, False, f"{type(error).__name__}: {error_text(error)}"
    channel.send({"failure": failure.removeprefix("raised "), "keeps_time": keeps_time})
    gc.freeze()  # what a fork would copy because the collector looked at it
    while not failure:
        try:
            token, method, *args = channel.receive()
        except GoneError:
            return
        call = functools.partial(getattr(served, method), *args)
        reply = in_a_fork(call, timeout_s) if forks else reply_of(call)
        try:
            channel.send([token, reply])
        except ValueError as error:
            channel.send([token, {"failure": f"returned too much: {error}"}])


# --- rewards --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reward:
    value: float  # 0 where there is none
    failure: str = ""


class RewardProcess(Isolated):
    """A task's verifier; ``make`` builds the task."""

    def __init__(self, make: Callable[[], Task], timeout_s: float) -> None:
        super().__init__(functools.partial(_Verifier, make, timeout_s), timeout_s)

    def score(self, items: Sequence[tuple[Split, int, str]]) -> list[Reward]:
        """A reward for each (split, problem's index, response), in order."""
        return [as_reward(answer) for answer in self.call([("score", *item) for item in items])]

    def answers(self, responses: Sequence[str]) -> list[str]:
        """What each response commits to; "" where that cannot be read, or not in time."""
        found = self.call([("answer_of", response) for response in responses])
        return [answer.value if _is_text(answer.value) else "" for answer in found]


class _Verifier:
    """In the child."""

    def __init__(self, make: Callable[[], Task], seconds: float) -> None:
        apart = Apart(seconds)  # forked from here, where no solution is known yet
        self.task = make()
        self.executes_responses = getattr(self.task, "executes_responses", False)
        tasks: tuple[Any, ...] = (self.task, getattr(self.task, "task", None))
        owner = next((one for one in tasks if _executes_apart(one)), None)
        self.keeps_time = self.executes_responses or owner is not None
        if owner is None:
            apart.close()
            return
        apart.take(owner.execute)
        owner.execute = apart

    def score(self, split: Split, index: int, response: str) -> Any:
        reward: Any = self.task.score(split, index, response)
        return float(reward) if hasattr(reward, "__float__") else reward

    def answer_of(self, response: str) -> str:
        return answer_of(self.task, response)


def _executes_apart(task: object) -> bool:
    return isinstance(inspect.getattr_static(task, "execute", None), staticmethod)


def as_reward(answer: Answer) -> Reward:
    """What is no number of at most ``protocol.LARGEST_REWARD`` either way is a failure that says so."""
    if answer.failure:
        return Reward(0.0, answer.failure)
    why = not_a_reward(answer.value)
    return Reward(0.0, f"returned {why}") if why else Reward(float(answer.value))


# --- environments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What an environment said to one utterance, and its state after it."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    state: Any  # data


class EnvironmentProcess(Isolated):
    """Many episodes of one environment; ``make`` builds an environment.

    Every step brings the episode's state along, so that the other episodes of a process that had to be killed go on in
    the next one. States are data, like all that crosses; :meth:`Environment.get_state` says what that is.
    """

    def __init__(self, make: Callable[[], Environment], timeout_s: float) -> None:
        super().__init__(_Episodes(make), timeout_s, most_bytes=_MOST_OF_A_STATE)

    def reset(self, episode: int, seed: int) -> Answer:
        """An :class:`Outcome` whose reward is 0, or why there is none."""
        return _as_outcome(self.call([("reset", episode, seed)])[0])

    def step(self, episode: int, state: Any, utterance: str) -> Answer:
        """An :class:`Outcome`; one whose reward is none is a failure."""
        return _as_outcome(self.call([("step", episode, state, utterance)])[0])

    def forget(self, episode: int) -> None:
        self.call([("forget", episode)])


def _as_outcome(answer: Answer) -> Answer:
    """With an :class:`Outcome` for its value; a failure where that has another form."""
    if answer.failure:
        return answer
    value = answer.value
    if not (isinstance(value, dict) and value.keys() == {"observation", "reward", "terminated", "truncated", "state"}):
        return Answer(failure="returned what is no outcome")
    if not _is_text(value["observation"]):
        return Answer(failure=f"returned the observation {as_text(repr(value['observation']), 100)}, which is no text")
    if why := not_a_reward(value["reward"]):
        return Answer(failure=f"returned the reward {why}")
    for name in ("terminated", "truncated"):
        if not isinstance(value[name], bool):
            return Answer(failure=f"returned {name} = {as_text(repr(value[name]), 100)}, not true or false")
    return Answer(Outcome(**value | {"reward": float(value["reward"])}))


def _is_text(value: object) -> bool:
    """Text that can be tokenised and stored: without halves of Unicode's surrogate pairs."""
    if not isinstance(value, str):
        return False
    try:
        return bool(value.encode()) or not value
    except UnicodeEncodeError:
        return False


class _Episodes:
    """In the child: one environment an episode, made again from its state where this process does not have it."""

    def __init__(self, make: Callable[[], Environment]) -> None:
        self.make = make
        self.environments: dict[int, Environment] = {}

    def __call__(self) -> "_Episodes":
        self.make()  # fails here, where the cause is told, rather than in the first episode
        return self

    def reset(self, episode: int, seed: int) -> Mapping[str, Any]:
        environment = self.environments[episode] = self.make()
        observation, _ = environment.reset(seed=seed)
        return self._outcome(environment, observation, 0.0, False, False)

    def step(self, episode: int, state: Any, utterance: str) -> Mapping[str, Any]:
        if episode not in self.environments:
            self.environments[episode] = self.make()
            self.environments[episode].set_state(state)
        environment = self.environments[episode]
        observation, reward, terminated, truncated, _ = environment.step(utterance)
        if terminated or truncated:
            self.forget(episode)
        return self._outcome(environment, observation, float(reward), bool(terminated), bool(truncated))

    def forget(self, episode: int) -> None:
        self.environments.pop(episode, None)

    def _outcome(
        self, environment: Environment, observation: str, reward: float, terminated: bool, truncated: bool
    ) -> Mapping[str, Any]:
        """The state of an episode that is over is nobody's."""
        state = None if terminated or truncated else as_data(environment.get_state(), "get_state()")
        return {
            "observation": observation, "reward": reward, "terminated": terminated, "truncated": truncated,
            "state": state,
        }  # fmt: skip
