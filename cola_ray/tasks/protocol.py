"""What a task with verifiable answers offers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Problem:
    """``index`` names the problem within its split; ``solution`` is a response worth imitating."""

    index: int
    question: str
    solution: str


class Task(Protocol):
    """Problems of two splits that share no question, and a verifier."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, in an order that only the seed decides."""
        ...

    def score(self, split: Split, index: int, response: str) -> float:
        """Reward in 0..1 of a response to problem ``index``."""
        ...
