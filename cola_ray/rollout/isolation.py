"""User code in a process of its own, every call with a deadline: it may raise, hang, exit or return nonsense.

    Isolated.call([(method, *args), ...])  ─>  [Answer, ...]     in order, always complete
        RewardProcess.score                    a task's rewards
        EnvironmentProcess.reset / step        many episodes of a multi-turn environment

A call that takes longer than ``timeout_s`` costs its own answer: the process is killed, a new one does the rest.
``signal.alarm`` would not do; it works in main threads only and does not stop C code.
"""

import functools
import math
import multiprocessing as mp
import multiprocessing.connection
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cola_ray.tasks import Task, answer_of
from cola_ray.tasks.confine import die_with_parent
from cola_ray.tasks.environment import Environment
from cola_ray.tasks.protocol import Split
from cola_ray.tasks.sandbox import confine_this_process


@dataclass(frozen=True)
class Answer:
    value: Any = None
    failure: str = ""  # why there is none: what was raised, or the time limit


class Isolated:
    """An object that lives in a child process, where it is made.

    Args:
        make: picklable, builds the object in the child.
        timeout_s: seconds a call may take.
        start_timeout_s: seconds the child may take to build it.
    """

    def __init__(self, make: Callable[[], Any], timeout_s: float, start_timeout_s: float = 300.0) -> None:
        self.make, self.timeout_s, self.start_timeout_s = make, timeout_s, start_timeout_s
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        # A fork would inherit the engine's threads and locks, and a spawned process pays for all imports each time: a
        # server that has imported them, and nothing else, forks instead.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.make, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def call(self, calls: Sequence[tuple[Any, ...]]) -> list[Answer]:
        """One answer for every (method, *arguments), in order. Thread-safe.

        Raises RuntimeError if the object cannot be built.
        """
        with self.lock:
            answers: list[Answer] = []
            while len(answers) < len(calls):
                self._wait_until_ready()
                self.connection.send(calls[len(answers) :])
                answers += self._receive(len(calls) - len(answers))
            return answers

    def _receive(self, count: int) -> list[Answer]:
        """Replies until all are there, or one is overdue; then that one failed, and the process is a new one."""
        answers: list[Answer] = []
        for _ in range(count):
            failure = f"took longer than {self.timeout_s:g} s"
            try:
                if self.connection.poll(self.timeout_s):
                    answers.append(self.connection.recv())
                    continue
            except (EOFError, OSError):
                self.process.join()
                failure = f"ended its process with exit code {self.process.exitcode}"
            self.close()
            self.start()
            return [*answers, Answer(failure=failure)]
        return answers

    def _wait_until_ready(self) -> None:
        if self.ready:
            return
        if not self.connection.poll(self.start_timeout_s):
            raise RuntimeError(f"the task was not built within {self.start_timeout_s:g} s")
        try:
            error = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the task's process ended with exit code {self.process.exitcode}") from None
        if error:
            raise RuntimeError(f"the task could not be built: {error}")
        self.ready = True

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(make: Callable[[], Any], connection: multiprocessing.connection.Connection) -> None:
    die_with_parent()  # a worker that was killed cannot kill its child, which may hang in user code
    try:
        served = make()
        if getattr(served, "executes_responses", False):
            confine_this_process()
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send("")
    while True:
        try:
            calls = connection.recv()
        except EOFError:
            return
        for method, *args in calls:
            try:
                answer = Answer(getattr(served, method)(*args))
            except Exception as error:
                answer = Answer(failure=f"raised {type(error).__name__}: {error}"[:300])
            connection.send(answer)


# --- rewards --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reward:
    value: float  # 0 where there is none
    failure: str = ""


class RewardProcess(Isolated):
    """A task's verifier; ``make`` builds the task."""

    def __init__(self, make: Callable[[], Task], timeout_s: float) -> None:
        super().__init__(functools.partial(_Verifier, make), timeout_s)

    def score(self, items: Sequence[tuple[Split, int, str]]) -> list[Reward]:
        """A reward for each (split, problem's index, response), in order."""
        return [as_reward(answer) for answer in self.call([("score", *item) for item in items])]

    def answers(self, responses: Sequence[str]) -> list[str]:
        """What each response commits to; "" where that cannot be read, or not in time."""
        found = self.call([("answer_of", response) for response in responses])
        return [answer.value if isinstance(answer.value, str) else "" for answer in found]


class _Verifier:
    """In the child."""

    def __init__(self, make: Callable[[], Task]) -> None:
        self.task = make()
        self.executes_responses = getattr(self.task, "executes_responses", False)

    def score(self, split: Split, index: int, response: str) -> float:
        return self.task.score(split, index, response)

    def answer_of(self, response: str) -> str:
        return answer_of(self.task, response)


def as_reward(answer: Answer) -> Reward:
    """What is no finite number is a failure that says so."""
    if answer.failure:
        return Reward(0.0, answer.failure)
    try:
        value = float(answer.value)
    except (TypeError, ValueError):
        return Reward(0.0, f"returned {answer.value!r}"[:300])
    return Reward(value) if math.isfinite(value) else Reward(0.0, f"returned {value}")


# --- environments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What an environment said to one utterance, and its state after it."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    state: Any


class EnvironmentProcess(Isolated):
    """Many episodes of one environment; ``make`` builds an environment.

    Every step brings the episode's state along, so that the other episodes of a process that had to be killed go on in
    the next one.
    """

    def __init__(self, make: Callable[[], Environment], timeout_s: float) -> None:
        super().__init__(_Episodes(make), timeout_s)

    def reset(self, episode: int, seed: int) -> Answer:
        """An :class:`Outcome` whose reward is 0, or why there is none."""
        return self.call([("reset", episode, seed)])[0]

    def step(self, episode: int, state: Any, utterance: str) -> Answer:
        """An :class:`Outcome`; a reward that is not finite is a failure."""
        answer = self.call([("step", episode, state, utterance)])[0]
        if answer.failure or math.isfinite(answer.value.reward):
            return answer
        return Answer(failure=f"returned the reward {answer.value.reward}")

    def forget(self, episode: int) -> None:
        self.call([("forget", episode)])


class _Episodes:
    """In the child: one environment an episode, made again from its state where this process does not have it."""

    def __init__(self, make: Callable[[], Environment]) -> None:
        self.make = make
        self.environments: dict[int, Environment] = {}

    def __call__(self) -> "_Episodes":
        self.make()  # fails here, where the cause is told, rather than in the first episode
        return self

    def reset(self, episode: int, seed: int) -> Outcome:
        environment = self.environments[episode] = self.make()
        observation, _ = environment.reset(seed=seed)
        return Outcome(observation, 0.0, False, False, environment.get_state())

    def step(self, episode: int, state: Any, utterance: str) -> Outcome:
        if episode not in self.environments:
            self.environments[episode] = self.make()
            self.environments[episode].set_state(state)
        environment = self.environments[episode]
        observation, reward, terminated, truncated, _ = environment.step(utterance)
        if terminated or truncated:
            self.forget(episode)
        return Outcome(observation, float(reward), terminated, truncated, environment.get_state())

    def forget(self, episode: int) -> None:
        self.environments.pop(episode, None)
