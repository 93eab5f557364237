"""Prompts that no verifier can score: what a response is worth, a reward model says.

rows of prompt, chosen, rejected ─┬─> pairs to train a reward model on (learner/reward_model.py)
                                  ├─> demonstrations: the chosen responses
                                  └─> prompts for RL, a sixth of them held out
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cola_ray.tasks.protocol import Problem, Split, render_prompt, split_of
from cola_ray.tasks.rows import open_rows


@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: str
    rejected: str


class Preference:
    """Prompts of a preference data set.

    A prompt is held out when its checksum says so, with all of its pairs: neither reward model nor policy sees it.

    Args:
        path: JSON lines, Parquet, a folder of them, or a hub id. Columns ``prompt`` and, for reward models and
            demonstrations, ``chosen`` and ``rejected``; text, or chat messages whose last one counts.

    Raises:
        ValueError: there is no column of prompts.
    """

    def __init__(self, path: str, seed: int) -> None:
        rows = open_rows(path, "task.path")
        if "prompt" not in rows.column_names:
            raise ValueError(f"task.path = {path!r}: has columns {rows.column_names}; one named prompt is needed")
        self._pairs: dict[Split, list[Pair]] = {"train": [], "heldout": []}
        self._prompts: dict[Split, list[str]] = {"train": [], "heldout": []}
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        paired, seen = {"chosen", "rejected"} <= set(rows.column_names), set()
        for index in order:
            row = rows[index]
            prompt = _text(row["prompt"])
            split = split_of(prompt)
            if prompt not in seen:
                seen.add(prompt)
                self._prompts[split].append(prompt)
            if paired:
                self._pairs[split].append(Pair(prompt, _text(row["chosen"]), _text(row["rejected"])))

    def problems(self, split: Split) -> Sequence[Problem]:
        """Without solutions: there is no right response."""
        return [Problem(index, prompt, "") for index, prompt in enumerate(self._prompts[split])]

    def pairs(self, split: Split) -> Sequence[Pair]:
        return self._pairs[split]

    def demonstrations(self) -> Sequence[tuple[str, str]]:
        return [(pair.prompt, pair.chosen) for pair in self._pairs["train"]]


def _text(value: object) -> str:
    return value if isinstance(value, str) else value[-1]["content"]  # type: ignore[index]


def judged_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_tokens: int) -> list[int]:
    """What a reward model reads, in training and in use: the conversation, its beginning cut where it is too long."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids: list[int] = tokenizer.apply_chat_template(turns, return_dict=False)
    else:
        ids = [*render_prompt(tokenizer, prompt), *tokenizer(response, add_special_tokens=False)["input_ids"]]
        ids.append(tokenizer.eos_token_id)
    return ids[-max_tokens:]
