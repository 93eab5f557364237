"""What a task with verifiable answers offers."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cola_ray.tasks.chat import Prompt, as_text

Split = Literal["train", "heldout"]
_HELD_OUT_OF = 6


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

    A task whose verifier executes what a response says, be it one formula, has ``executes_responses = True``; the
    process that scores then gives up files, sockets and other processes once the task has been built. One whose
    responses hold more than the answer has a method ``answer_of``, see below. A class whose responses are right or
    wrong has ``right_from = 1.0``, the least reward of a right one; without it evaluations give the mean reward and no
    accuracy. Strings at which a response is to end, such as the next question that a base model goes on to write, are
    an attribute ``stop`` of the class.
    """

    def score(self, split: Split, index: int, response: str) -> float:
        """Reward in 0..1 of a response to problem ``index``."""
        ...


def answer_of(task: Prompts, response: str) -> str:
    """The answer that a response commits to, as majorities count it: one text for answers of equal value.

    "" where there is none that can be read. A task says it in a method of this name; without, it is the whole response.
    """
    return getattr(task, "answer_of", str.strip)(response)
