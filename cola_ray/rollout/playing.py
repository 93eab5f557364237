"""An episode that an agent program is playing: its turns so far, their rewards, and how it ended.

turns(2) ─> numbers 3, 4 ─> generate ─> said(...)      numbers of turns that fail are free again
                                          └─> reward(...) ─> end() ─> Episode
"""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cola_ray.experience import Episode, Turn
from cola_ray.rollout.conversation import Conversation, State
from cola_ray.rollout.episode import Generate, Utterance
from cola_ray.rollout.program_requests import RefusedError, Reward
from cola_ray.tasks.protocol import not_a_reward

Array = np.ndarray


@dataclass(eq=False)
class Playing:
    """An episode that is under way.

    Args:
        read_state: reads the state in which a limit cut the episode, which stands for the rest; None if not needed.
    """

    position: int
    seed: int
    generate: Generate
    read_state: Generate | None
    conversation: Conversation
    ended: asyncio.Future[Episode]
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    taken: set[int] = field(default_factory=set)  # numbers of turns so far, including those being generated
    made: dict[int, Turn] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)  # completion id -> the turns that are its choices
    num_retokenised: int = 0
    ends: dict[int, Mapping[int, int]] = field(default_factory=dict)  # of each turn's state: where earlier turns end
    left_in: State | None = None  # state of a refused turn, unless a turn was made since
    busy: int = 0  # requests that are being answered
    heard: bool = False
    quiet_since: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While a request is being answered, the program does not count as quiet."""
        self.heard, self.busy = True, self.busy + 1
        try:
            yield
        finally:
            self.busy, self.quiet_since = self.busy - 1, time.monotonic()

    @contextlib.contextmanager
    def turns(self, count: int) -> Iterator[list[int]]:
        """Numbers in a row for further turns. If the program does not receive these turns, they are dropped."""
        rows = ([*range(first, first + count)] for first in itertools.count())
        numbers = next(row for row in rows if self.taken.isdisjoint(row))
        self.taken.update(numbers)
        self.left_in = None
        try:
            yield numbers
        except BaseException:
            self.taken.difference_update(numbers)
            self.answers = {name: one for name, one in self.answers.items() if one != numbers}
            for number in numbers:
                self.made.pop(number, None)
                self.ends.pop(number, None)
            raise

    def said(self, state: State, numbers: list[int], utterances: Sequence[Utterance], answer: str) -> None:
        """Record turns that were generated; of their hidden states only a critic's features are kept."""
        self.made.update(zip(numbers, (one.as_turn(state.ids) for one in utterances), strict=True))
        self.ends.update(dict.fromkeys(numbers, state.ends))
        self.answers[answer] = numbers
        self.num_retokenised += state.retokenised

    def rewarded(self, given: Reward) -> int:
        """Return the number of the turn that a reward is for.

        Raises:
            RefusedError: there is no such turn.
        """
        if not self.answers:
            raise RefusedError("there is nothing to reward: the model has not been asked anything yet")
        name = next(reversed(self.answers)) if given.answer is None else given.answer
        if name not in self.answers:
            raise RefusedError(f"id = {name!r:.60}: this episode has no such answer; give the id of a completion")
        turns = self.answers[name]
        if given.choice is None:
            return turns[-1]
        if not 0 <= given.choice < len(turns):
            raise RefusedError(f"index = {given.choice}: {name} has {len(turns)} choices, counted from 0")
        return turns[given.choice]

    def reward(self, number: int, value: float) -> None:
        together = self.made[number].reward + value
        if why := not_a_reward(together):
            raise RefusedError(f"reward: with those before it, {why}")
        self.made[number] = replace(self.made[number], reward=together)

    @property
    def total_reward(self) -> float:
        return sum(turn.reward for turn in self.made.values())

    def last_state(self) -> State:
        """The state in which a turn was refused; else everything that the model read and said up to its last turn."""
        if self.left_in is not None:
            return self.left_in
        number, last = max(self.made.items())
        ids = [*last.state_ids.tolist(), *last.token_ids.tolist()]
        return State(ids, ends={number: len(ids)})

    def end(self, failure: str = "", *, cut_in: State | None = None, final: Array | None = None) -> None:
        """End the episode, unless it has already ended.

        Args:
            cut_in: the state in which a limit cut it; None: it ended by itself, or failed.
            final: features of that state, (H,).
        """
        if not self.ended.done():
            turns, text = self._in_order(cut_in or State([]))
            terminated = not failure and cut_in is None
            self.ended.set_result(
                Episode(self.position, turns, terminated, text, final, failure, retokenised=self.num_retokenised)
            )

    def _in_order(self, last: State) -> tuple[tuple[Turn, ...], str]:
        """The turns, each with the observation after it, and everything as text."""
        answers = sorted(self.answers.values())
        text, before, turns = "", list[int](), list[Turn]()
        decode: Any = self.conversation.chat.tokenizer.decode
        for index, numbers in enumerate(answers):
            is_last = index == len(answers) - 1
            follows = None if is_last else answers[index + 1][0]
            ids, ends = (last.ids, last.ends) if follows is None else (self.made[follows].state_ids, self.ends[follows])
            for number in numbers:
                turn = self.made[number]
                state, said = turn.state_ids.tolist(), turn.token_ids.tolist()
                text += decode(state[len(before) :] if state[: len(before)] == before else state) + decode(said)
                before = [*state, *said]
                seen = np.asarray(ids[ends.get(number, len(ids)) :], np.int64)
                left = number not in ends and not is_last
                own = index if len(numbers) > 1 else -1
                turns.append(replace(turn, observation_ids=seen, left=left, answer=own))
        return tuple(turns), text
