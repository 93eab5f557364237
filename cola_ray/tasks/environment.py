"""What a multi-turn environment offers: gymnasium's signature with text on both sides, and a state to save.

    observation, info = env.reset(seed=7)
    observation, reward, terminated, truncated, info = env.step("Is it alive?")

``terminated``: the episode ended by its own rules; ``truncated``: a limit cut it, and what would have followed still
has a value. ``observation`` is only what is new since the last utterance; the transcript is kept by whoever plays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

HELD_OUT = 1 << 30
"""Evaluation's seeds start here, training's at 0; NumPy takes none from 2^32 on, and games in C none from 2^31."""

Transition = tuple[str, float, bool, bool, dict[str, Any]]


@dataclass(frozen=True)
class Dialogue:
    """An episode that somebody else played, to clone: ``opening``, then (utterance, observation) in turn."""

    opening: str
    turns: tuple[tuple[str, str], ...]


class Environment(Protocol):
    """One episode at a time; whoever wants several makes several.

    A class may have an attribute ``stop``: strings that end an utterance, beside the end tokens.
    """

    max_turns: int

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """A new episode, which the seed decides wholly."""
        ...

    def step(self, utterance: str) -> Transition:
        """A reward is at most ``protocol.LARGEST_REWARD`` either way; a larger one, or NaN, fails the episode."""
        ...

    def get_state(self) -> Any:
        """Data from which ``set_state`` goes on, in another process too.

        Numbers, text, true, false, None, and lists and dicts of them with text for keys; tuples come back as lists. As
        JSON it has 4 MB at most.
        """
        ...

    def set_state(self, state: Any) -> None: ...

    def demonstrations(self, count: int, seed: int) -> Sequence[Dialogue]:
        """Episodes to clone, not necessarily played well; empty where there are none."""
        ...


class Replayed:
    """Any gymnasium-style text environment as an :class:`Environment`: its state is its seed and what was said.

    Args:
        env: has ``reset(seed=...)`` and ``step(text)`` as gymnasium's environments do, and is deterministic.
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
