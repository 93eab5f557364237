"""What a task with verifiable answers offers."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cola_ray.tasks.chat import Prompt, as_text

Split = Literal["train", "heldout"]
_HELD_OUT_OF = 6
LARGEST_REWARD = 1e6
"""Larger ones, either way, count as failed: squares of returns of many turns, and of their gradients, fit float32."""


@dataclass(frozen=True)
class Problem:
    """``index`` names the problem within its split; ``solution`` is a right response.

    The question is text or a conversation, ``[{"role": "system", "content": ...}, ...]``, whose roles are kept.
    """

    index: int
    question: Prompt
    solution: str


def split_of(question: Prompt) -> Split:
    """A sixth is held out, by the question's checksum: no run, of any seed, trains on what another is tested on."""
    return "heldout" if zlib.crc32(as_text(question).encode()) % _HELD_OUT_OF == 0 else "train"


class Prompts(Protocol):
    """Problems of two splits that share no question."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, in an order that only the seed decides."""
        ...

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        """(question, response) pairs to pre-train on: of training problems only, not necessarily all right."""
        ...


class Task(Prompts, Protocol):
    """Problems with a verifier.

    One whose responses hold more than the answer has a method ``answer_of``, see below. A class whose responses are
    right or wrong has ``right_from = 1.0``, the least reward of a right one; without it evaluations give the mean
    reward and no accuracy. Strings at which a response is to end, such as the next question that a base model goes on
    to write, are an attribute ``stop`` of the class.

    A response can say anything. A verifier reads it as data where it can (``ast``, not ``eval``). Where it has to run
    what a response says, be it one formula, the class has a static method::

        @staticmethod
        def execute(response: str) -> Any: ...

    and ``score`` calls ``self.execute(response)``. It runs in a process that has neither the task nor its solutions,
    nor files, sockets or other processes, and that ends with this response; what it returns is data: numbers, text,
    lists and dicts. It raises ``NotExecutedError`` of :mod:`~cola_ray.sandbox.execution`, a ValueError, where there is
    nothing, or not in time. Whole programs run in :class:`~cola_ray.sandbox.programs.Sandbox`.

    ``executes_responses = True`` is for a verifier that cannot be taken apart like this: all of ``score`` then runs in
    such a process of one response. Solutions are there, so a response that runs code can claim any reward for itself,
    and for no other.
    """

    def score(self, split: Split, index: int, response: str) -> float:
        """Reward of a response to problem ``index``, usually in 0..1 and at most :data:`LARGEST_REWARD` either way."""
        ...


def answer_of(task: Prompts, response: str) -> str:
    """The answer that a response commits to, as majorities count it: one text for answers of equal value.

    "" where there is none that can be read. A task says it in a method of this name; without, it is the whole response.
    """
    return getattr(task, "answer_of", str.strip)(response)


def not_a_reward(value: object) -> str:
    """What it is instead, in a few words; empty for a number of at most :data:`LARGEST_REWARD` either way."""
    if not isinstance(value, int | float):
        return repr(value)[:300]
    if abs(value) <= LARGEST_REWARD:  # true and false are 1 and 0; not-a-number is not at most anything
        return ""
    shown = f"{value:g}" if isinstance(value, float) else str(value)[:40]
    finite = value == value and abs(value) != float("inf")
    return f"{shown}, more than {LARGEST_REWARD:g} either way; rescale it" if finite else shown
