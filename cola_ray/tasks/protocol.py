"""The protocols of single-turn tasks: prompts of two splits, and problems with a verifier."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cola_ray.tasks.chat import Prompt, as_text

Split = Literal["train", "heldout"]
_HELD_OUT_OF = 6  # one question in so many is held out
LARGEST_REWARD = 1e6
"""Rewards beyond this, positive or negative, count as failed: squares of returns over many turns must fit float32."""


@dataclass(frozen=True)
class Problem:
    """One question.

    Args:
        index: names the problem within its split.
        question: text, or a conversation ``[{"role": "system", "content": ...}, ...]``, whose roles are kept.
        solution: a right response; "" if there is none.
        columns: columns of the row that it was read from, for rewards.
        source: if a task has several sources, the name of the problem's, which keeps metrics apart.
    """

    index: int
    question: Prompt
    solution: str
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    source: str = ""


def further(problem: Problem) -> tuple[Mapping[str, Any], str]:
    """Return columns and source of a problem, also for a user's problem class that has neither."""
    return getattr(problem, "columns", {}), getattr(problem, "source", "")


def split_of(question: Prompt) -> Split:
    """Choose the split by the question's checksum, so that no run trains on questions on which another is tested."""
    return "heldout" if zlib.crc32(as_text(question).encode()) % _HELD_OUT_OF == 0 else "train"


class Prompts(Protocol):
    """Problems of two splits that have no question in common."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of a split, in an order that depends on the seed alone."""
        ...

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        """Return (question, response) pairs to pre-train on: of training problems only, and not necessarily right."""
        ...


class Task(Prompts, Protocol):
    """Problems with a verifier.

    Optional attributes of the class:

    - ``answer_of(response)``, a method: see :func:`answer_of`; needed if responses hold more than the answer.
    - ``right_from = 1.0``: the smallest reward of a right response. Without it, evaluations report the mean reward and
      no accuracy.
    - ``stop``: strings that end a response, such as the next question that a base model would go on to invent.

    A response can contain anything, so a verifier should read it as data where it can (``ast``, not ``eval``). If it
    has to execute any part of a response, even a formula, the class has a static method::

        @staticmethod
        def execute(response: str) -> Any: ...

    and ``score`` calls ``self.execute(response)``. It then runs in a process that holds neither the task nor its
    solutions, has no files, sockets or other processes, and ends with this response. It returns data: numbers, text,
    lists and dicts. If there is no result in time, the call raises ``NotExecutedError`` of
    :mod:`~cola_ray.sandbox.execution`, a ValueError. Whole programs run in :class:`~cola_ray.sandbox.programs.Sandbox`.

    ``executes_responses = True`` is for a verifier that cannot be split like this: all of ``score`` then runs in such a
    process, one per response. That process holds the solutions, so a response that executes code can claim any reward
    for itself, but not for others.
    """

    def score(self, split: Split, index: int, response: str) -> float:
        """Return the reward of a response to problem ``index``: usually in 0..1, at most :data:`LARGEST_REWARD`."""
        ...


def answer_of(task: Prompts, response: str) -> str:
    """Return the answer that a response commits to, with one text for answers of equal value; majorities count these.

    "" if no answer can be read. A task provides it as a method of this name; without one, it is the whole response.
    """
    return getattr(task, "answer_of", str.strip)(response)


def not_a_reward(value: object) -> str:
    """Return, in a few words, what a value is if it is not a valid reward; "" for a number within LARGEST_REWARD."""
    if not isinstance(value, int | float):
        return repr(value)[:300]
    if abs(value) <= LARGEST_REWARD:  # true and false count as 1 and 0; NaN fails the comparison
        return ""
    shown = f"{value:g}" if isinstance(value, float) else str(value)[:40]
    finite = value == value and abs(value) != float("inf")
    return f"{shown}, more than {LARGEST_REWARD:g} either way; rescale it" if finite else shown
