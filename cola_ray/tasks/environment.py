"""The protocol of multi-turn environments: gymnasium's signature with text on both sides, and a state to save.

    observation, info = env.reset(seed=7)
    observation, reward, terminated, truncated, info = env.step("Is it alive?")

``terminated``: the episode ended by its own rules. ``truncated``: a limit cut it, and what would have followed still
has a value. ``observation`` holds only what is new since the last utterance; the caller keeps the transcript.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

HELD_OUT = 1 << 30
"""Evaluation's seeds begin here, training's at 0. Games in C take no seeds from 2^31 on, NumPy none from 2^32 on."""

Transition = tuple[str, float, bool, bool, dict[str, Any]]


@dataclass(frozen=True)
class Dialogue:
    """An episode to clone, played by someone else: ``opening``, then (utterance, observation) pairs."""

    opening: str
    turns: tuple[tuple[str, str], ...]


class Environment(Protocol):
    """Plays one episode at a time.

    A class may have an attribute ``stop``: strings that end an utterance, in addition to the end tokens.
    """

    max_turns: int

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Begin an episode that the seed determines entirely; return (observation, info)."""
        ...

    def step(self, utterance: str) -> Transition:
        """Take a turn. A reward beyond ``protocol.LARGEST_REWARD``, either way, or NaN fails the episode."""
        ...

    def get_state(self) -> Any:
        """Return data from which ``set_state`` can continue, also in another process.

        Numbers, text, true, false, None, and lists and dicts of these with text as keys; tuples come back as lists. At
        most 4 MB as JSON.
        """
        ...

    def set_state(self, state: Any) -> None: ...

    def demonstrations(self, count: int, seed: int) -> Sequence[Dialogue]:
        """Return episodes to clone, not necessarily played well; [] if there are none."""
        ...


class Replayed:
    """Any gymnasium-style text environment as an :class:`Environment`, whose state is the seed and the utterances.

    Args:
        env: has gymnasium's ``reset(seed=...)`` and ``step(text)``, and is deterministic.
        max_turns: after which an episode is truncated.
    """

    def __init__(self, env: Any, max_turns: int) -> None:
        self.env, self.max_turns = env, max_turns
        self.seed, self.said = 0, list[str]()

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        self.seed, self.said = seed, []
        observation, info = self.env.reset(seed=seed)
        return observation, info

    def step(self, utterance: str) -> Transition:
        self.said.append(utterance)
        observation, reward, terminated, truncated, info = self.env.step(utterance)
        cut = truncated or (len(self.said) >= self.max_turns and not terminated)
        return observation, float(reward), terminated, cut, info

    def get_state(self) -> list[Any]:
        return [self.seed, list(self.said)]

    def set_state(self, state: Sequence[Any]) -> None:
        seed, said = state
        self.reset(seed=seed)
        for utterance in said:
            self.step(utterance)

    def demonstrations(self, count: int, seed: int) -> Sequence[Dialogue]:
        return []
