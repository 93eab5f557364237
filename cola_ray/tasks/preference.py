"""Prompts without verifiable answers: a reward model scores the responses.

rows of prompt, chosen, rejected ─┬─> pairs to train a reward model on (learner/reward_model.py)
                                  ├─> demonstrations: the chosen responses
                                  └─> prompts for RL, a sixth of them held out
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from cola_ray.settings.config import TaskConfig
from cola_ray.tasks.chat import Prompt, as_prompt, as_question, as_text
from cola_ray.tasks.protocol import Problem, Split, split_of
from cola_ray.tasks.rows import Row, cell, open_rows, read_rows


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse response."""

    prompt: Prompt
    chosen: str
    rejected: str


class Preference:
    """Prompts of a preference data set.

    A prompt is held out, along with all of its pairs, by its checksum: neither reward model nor policy sees it.

    Args:
        path: JSON lines, Parquet, a folder of them, or a hub id. Columns ``prompt`` and, for reward models and
            demonstrations, ``chosen`` and ``rejected``, in any of TRL's forms: text or chat messages, and without a
            column ``prompt`` if both responses begin with it.
        seed: shuffles the rows.

    Raises:
        ValueError: there are no prompts, or a row is in none of these forms; the message names the row.
    """

    @classmethod
    def of(cls, config: TaskConfig, seed: int) -> "Preference":
        return cls(config.path, seed)

    def __init__(self, path: str, seed: int) -> None:
        rows = read_rows(open_rows(path, "task.path"), path, "task.path", read)
        self._pairs: dict[Split, list[Pair]] = {"train": [], "heldout": []}
        self._prompts: dict[Split, list[Prompt]] = {"train": [], "heldout": []}
        random.Random(seed).shuffle(rows)
        seen = set()
        for row in rows:
            prompt = row.prompt if isinstance(row, Pair) else row
            split = split_of(prompt)
            if as_text(prompt) not in seen:
                seen.add(as_text(prompt))
                self._prompts[split].append(prompt)
            if isinstance(row, Pair):
                self._pairs[split].append(row)

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the prompts; solutions are "", since there is no right response."""
        return [Problem(index, prompt, "") for index, prompt in enumerate(self._prompts[split])]

    def pairs(self, split: Split) -> Sequence[Pair]:
        return self._pairs[split]

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        return [(pair.prompt, pair.chosen) for pair in self._pairs["train"]]


def read(row: Row) -> Pair | Prompt:
    """Read a row's pair, or its prompt if it has no responses; ValueError names the field that is wrong."""
    return as_pair(row) if {"chosen", "rejected"} & set(row) else cell(row, "prompt", as_question)


def as_pair(row: Row) -> Pair:
    """Read a row in any of TRL's preference formats.

    Without a column ``prompt``, the common beginning of both responses is the prompt; for text, without the space
    before the first difference. If responses repeat a given prompt of messages, it is removed from them.

    Raises:
        ValueError: there is no prompt, or a response is not one message.
    """
    chosen, rejected = cell(row, "chosen", as_prompt), cell(row, "rejected", as_prompt)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected are not of one form, text or chat messages")
    prompt = cell(row, "prompt", as_question) if row.get("prompt") is not None else None
    if prompt is None:
        shared = sum(
            1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        )
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        if isinstance(chosen, str) and shared and chosen[shared - 1] == " ":
            shared -= 1
        if shared <= 0:
            raise ValueError("no prompt: chosen and rejected begin differently, and there is no column prompt")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return Pair(prompt, _response("chosen", chosen, prompt), _response("rejected", rejected, prompt))


def _response(name: str, value: Prompt, prompt: Prompt) -> str:
    if isinstance(value, str):
        return value
    asked = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
    said = value[len(asked) :] if tuple(value[: len(asked)]) == asked else value
    if len(said) != 1 or said[0]["role"] != "assistant":
        raise ValueError(f"{name} has {len(said)} messages after the prompt; one of the assistant is expected")
    return str(said[0]["content"])
