"""Responses that `cola_ray evaluate` has logged: one problem per row, with all of its responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cola_ray.tasks.protocol import not_a_reward
from cola_ray.tasks.rows import Row, cell, shown


@dataclass(frozen=True)
class LoggedAnswer:
    """One response of L tokens; an action is -1 if it was chosen in another response's rollout."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]  # (L,)
    actions: Sequence[int]  # (L,)
    reward: float


def logged(row: Row) -> list[LoggedAnswer]:
    """Return a problem's responses, except those whose last action was not recorded or whose scoring failed.

    Raises:
        ValueError: names the field that is missing or wrong.
    """
    prompt = cell(row, "prompt_ids", _ids(0))
    tokens = cell(row, "token_ids", _lists(0))
    actions = cell(row, "actions", _lists(-1))
    rewards = cell(row, "rewards", _list)
    failures = cell(row, "failures", _list) if "failures" in row else [""] * len(rewards)
    for name, found in (("actions", actions), ("rewards", rewards), ("failures", failures)):
        if len(found) != len(tokens):
            raise ValueError(f"field {name}: {len(found)} responses, and token_ids has {len(tokens)}; log them again")
    answers = []
    numbered = enumerate(zip(tokens, actions, rewards, failures, strict=True), 1)
    for number, (ids, taken, reward, failure) in numbered:
        if len(ids) != len(taken):
            raise ValueError(f"field actions: response {number} has {len(taken)}, and {len(ids)} tokens; log it again")
        if failure or not taken or taken[-1] < 0:
            continue
        if why := not_a_reward(reward):
            raise ValueError(f"field rewards: response {number} has {why:.90}; leave it out")
        answers.append(LoggedAnswer(prompt, ids, taken, float(reward)))
    return answers


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{shown(value)}; a list with one entry per response is expected")
    return value


def _ids(least: int) -> Callable[[object], list[int]]:
    def read(value: object) -> list[int]:
        found = _list(value)
        for one in found:
            if not isinstance(one, int) or isinstance(one, bool) or not least <= one < 1 << 31:
                raise ValueError(f"{shown(one)} in a list of ids; whole numbers from {least} on are expected")
        return found

    return read


def _lists(least: int) -> Callable[[object], list[list[int]]]:
    return lambda value: [_ids(least)(one) for one in _list(value)]
