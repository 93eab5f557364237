"""The protocol of multi-turn environments: gymnasium's signature with text on both sides, and a state to save.

    observation, info = env.reset(seed=7)
    observation, reward, terminated, truncated, info = env.step("Is it alive?")

That much is enough. Where a class has no state, its episodes are played again to the same place (:class:`Replayed`);
where it has no demonstrations, a first policy is cloned from ``data.path``, or comes with ``model.path``.

``terminated``: the episode ended by its own rules. ``truncated``: a limit cut it, and what would have followed still
has a value. ``observation`` holds only what is new since the last utterance; the caller keeps the transcript.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

HELD_OUT = 1 << 30
"""Evaluation's seeds begin here, training's at 0. Games in C take no seeds from 2^31 on, NumPy none from 2^32 on."""

USUAL_TURNS = 50
"""After which an episode ends whose environment sets no limit, as in TextWorld and Jericho."""
STATE = ("get_state", "set_state")

Transition = tuple[str, float, bool, bool, dict[str, Any]]


@dataclass(frozen=True)
class Dialogue:
    """An episode to clone, played by someone else: ``opening``, then (utterance, observation) pairs."""

    opening: str
    turns: tuple[tuple[str, str], ...]


class Environment(Protocol):
    """Plays one episode at a time.

    A class may have an attribute ``stop``: strings that end an utterance, in addition to the end tokens; a method
    ``close()``, called when an episode is over; and ``demonstrations(count, seed)``: dialogues to clone, not
    necessarily played well. ``max_turns`` and the two methods of the state come together, or :func:`completed` adds
    them.
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


def demonstrated(environment: Any, count: int, seed: int) -> Sequence[Dialogue]:
    """Episodes to clone; [] where the environment has none."""
    own = getattr(environment, "demonstrations", None)
    return own(count, seed) if callable(own) else []


def keeps_state(environment: Any) -> bool:
    """Whether a class or an object can be continued from a state of its own."""
    return all(callable(getattr(environment, name, None)) for name in STATE)


def completed(environment: Any, max_turns: int = 0) -> Environment:
    """An environment with a state, whatever it has itself.

    Args:
        max_turns: after which an episode is truncated; 0: as the environment says by ``max_turns`` or gymnasium's
            ``spec.max_episode_steps``, else :data:`USUAL_TURNS`. One with a state of its own keeps its own limit.
    """
    if keeps_state(environment):
        kept: Environment = environment
        return kept
    spec = getattr(environment, "spec", None)
    own = getattr(environment, "max_turns", None) or getattr(spec, "max_episode_steps", None)
    return Replayed(environment, max_turns or own or USUAL_TURNS)


class Replayed:
    """Any gymnasium-style text environment as an :class:`Environment`, whose state is what happened so far.

    Args:
        env: has gymnasium's ``reset(seed=...)`` and ``step(text)``, and is deterministic given the seed.
        max_turns: after which an episode is truncated.
    """

    def __init__(self, env: Any, max_turns: int) -> None:
        self.env, self.max_turns = env, max_turns
        self.seed, self.said, self.seen = 0, list[str](), ""

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        self.seed, self.said = seed, []
        self.seen, info = self.env.reset(seed=seed)
        return self.seen, info

    def step(self, utterance: str) -> Transition:
        self.said.append(utterance)
        self.seen, reward, terminated, truncated, info = self.env.step(utterance)
        cut = truncated or (len(self.said) >= self.max_turns and not terminated)
        return self.seen, float(reward), terminated, cut, info

    def get_state(self) -> list[Any]:
        return [self.seed, list(self.said), self.seen]

    def set_state(self, state: Sequence[Any]) -> None:
        """Play the episode again.

        Raises:
            ValueError: it came out otherwise.
        """
        seed, said, seen = state
        self.reset(seed=seed)
        for utterance in said:
            self.step(utterance)
        if self.seen != seen:
            raise ValueError(
                f"played again from seed {seed} it shows {self.seen!r:.60} and not {seen!r:.60}; draw from the seed "
                "alone, or give the class get_state and set_state"
            )

    def demonstrations(self, count: int, seed: int) -> Sequence[Dialogue]:
        return demonstrated(self.env, count, seed)

    def close(self) -> None:
        if callable(close := getattr(self.env, "close", None)):
            close()
