"""Questions that need one or two tool calls: what a thing weighs, which is only in a table, and arithmetic with it.

    "What does the blue box weigh, plus 17?"     lookup("blue box") ─> 23     calculator("23 + 17") ─> 40     "40"

Problems are generated, one for each seed. The checksum of its question decides a problem's split, so no question is
both trained on and held out.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from cola_ray.tasks.chat import Prompt
from cola_ray.tasks.environment import HELD_OUT
from cola_ray.tasks.protocol import Problem, Split, split_of
from cola_ray.tasks.rewards import math
from cola_ray.tasks.tool_calls import Call

COLOURS = ("red", "blue", "green", "black", "white", "brown")
THINGS = ("box", "cup", "ball", "book", "lamp", "shoe", "bag", "pot")
TOOLS = ("lookup", "calculator")
"""The tools that these questions need."""
NUM_KINDS = 3
"""Kinds of questions: arithmetic only, a thing only, and both."""
_SIGNS = {"plus": "+", "minus": "-"}


@dataclass(frozen=True)
class Asked:
    """What a question asks: a thing's weight or a number, and what is added to it."""

    table: dict[str, int]
    thing: str  # "" if the question gives the number
    number: int
    word: str  # plus or minus; "" if nothing is added
    other: int

    @property
    def question(self) -> str:
        if not self.thing:
            return f"How much is {self.number} {_SIGNS[self.word]} {self.other}?"
        added = f", {self.word} {self.other}" if self.word else ""
        return f"What does the {self.thing} weigh{added}?"

    @property
    def answer(self) -> int:
        return self.number + {"plus": self.other, "minus": -self.other, "": 0}[self.word]

    def lookup(self, _: str = "") -> Call:
        return Call("lookup", {"key": self.thing})

    def sum_of(self, number: str) -> Call:
        return Call("calculator", {"expression": f"{number} {_SIGNS[self.word]} {self.other}"})


class Weighing:
    """Generated problems, as a task with a verifier.

    Args:
        things: number of things to ask about.
        largest: largest number in a question or a table.
    """

    right_from = 1.0

    def __init__(self, things: int, largest: int) -> None:
        names = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS]
        self.names, self.largest = names[:things], largest

    def drawn(self, split: Split, index: int) -> Asked:
        """What problem ``index`` of a split asks."""
        draw = random.Random(f"{split} {index}")
        weights = draw.sample(range(1, self.largest + 1), len(self.names))
        table = dict(zip(self.names, weights, strict=True))
        while True:
            kind, thing, word = draw.randrange(NUM_KINDS), draw.choice(self.names), draw.choice(tuple(_SIGNS))
            number, other = draw.randint(1, self.largest), draw.randint(1, self.largest)
            asked = Asked(table, "", number, word, other)
            if kind:
                asked = Asked(table, thing, table[thing], word if kind == 2 else "", other)
            if split_of(asked.question) == split:
                return asked

    def mistaken(self, call: Call, draw: random.Random) -> Call:
        """Return the same call with another thing, or with another last number."""
        if "key" in call.arguments:
            return Call(call.name, {"key": draw.choice([name for name in self.names if name != call.arguments["key"]])})
        first, other = call.arguments["expression"].rsplit(" ", 1)
        wrong = draw.choice([number for number in range(1, self.largest + 1) if number != int(other)])
        return Call(call.name, {"expression": f"{first} {wrong}"})

    def problems(self, split: Split) -> Sequence[Problem]:
        return _Drawn(self, split)

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        return []

    def score(self, split: Split, index: int, response: str) -> float:
        """1 if the number that the response commits to is the right one."""
        return math(self.problems(split)[index], response)


class _Drawn(Sequence[Problem]):
    """One problem for every seed, drawn when it is asked for."""

    def __init__(self, task: Weighing, split: Split) -> None:
        self.task, self.split = task, split

    def __len__(self) -> int:
        return HELD_OUT

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        asked = self.task.drawn(self.split, index)
        return Problem(index, asked.question, str(asked.answer), {"table": asked.table})
