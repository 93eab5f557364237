"""The protocol of multi-turn environments: gymnasium's signature with text on both sides, and a state to save.

    observation, info = env.reset(seed=7)
    observation, reward, terminated, truncated, info = env.step("Is it alive?")

These two methods are enough. If a class has no state, its episodes are restored by replaying them (:class:`Replayed`);
if it has no demonstrations, a first policy is cloned from ``data.path``, or comes with ``model.path``.

``info`` may contain, besides entries that are ignored:

- ``metrics``: numbers by name, for the episode so far. Their means over episodes are logged as ``agent/<name>``; an
  episode's last values count, and an episode without a name is left out of that name's mean.
- ``chat``: what a model with a chat template sees instead of the observation, :meth:`Chat.as_data`. Without this entry,
  and without a template, models see the observation itself.

``terminated``: the episode ended by its own rules. ``truncated``: a limit ended it, so the last state still has a
value. ``observation`` contains only what is new since the last utterance; the caller keeps the transcript.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cola_ray.tasks.chat import Message, as_content

HELD_OUT = 1 << 30
"""Evaluation's seeds begin here, training's at 0. Games in C take no seeds from 2^31 on, NumPy none from 2^32 on."""

USUAL_TURNS = 50
"""Limit of an episode's turns if its environment sets none, as in TextWorld and Jericho."""
STATE = ("get_state", "set_state")

Transition = tuple[str, float, bool, bool, dict[str, Any]]


@dataclass(frozen=True)
class Chat:
    """An observation as chat messages, with their roles.

    Args:
        messages: each with a role (system, user or tool) and a text as content; a tool's message may have its name.
        tools: for an episode's first observation: what the model may call, in the form of OpenAI's API.
        tools_text: the same in words, for templates that do not support tools: it becomes a system message.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    tools_text: str = ""

    def as_data(self) -> dict[str, Any]:
        return {"messages": [*self.messages], "tools": [*self.tools], "tools_text": self.tools_text}

    @classmethod
    def of(cls, value: Any) -> "Chat":
        """Read it from an entry of ``info``.

        Raises:
            ValueError: the entry has another form.
        """
        if not isinstance(value, Mapping) or not set(value) <= {"messages", "tools", "tools_text"}:
            raise ValueError(f"{str(value)[:60]!r}; messages, tools and tools_text are expected")
        messages, tools, text = (value.get(name, usual) for name, usual in (("messages", []), ("tools", []),
                                                                          ("tools_text", "")))  # fmt: skip
        if not isinstance(messages, list | tuple) or not isinstance(tools, list | tuple) or not isinstance(text, str):
            raise ValueError(f"{str(value)[:60]!r}; lists of messages and tools, and a text, are expected")
        if not all(isinstance(one, Mapping) and isinstance(one.get("function"), Mapping) for one in tools):
            raise ValueError(f"the tools {str(tools)[:60]!r}; functions in the form of OpenAI's API are expected")
        return cls(tuple(map(_heard, messages)), tuple(tools), text)


def _heard(message: Any) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ("system", "user", "tool"):
        raise ValueError(f"the message {str(message)[:60]!r}; a role (system, user or tool) and a content are expected")
    named = {"name": message["name"]} if isinstance(message.get("name"), str) and message["name"] else {}
    return {"role": message["role"], "content": as_content(message.get("content")), **named}


@dataclass(frozen=True)
class Dialogue:
    """An episode to clone, played by someone else: ``opening``, then (utterance, observation) pairs.

    Args:
        chats: what models with a chat template see instead of the opening and of each observation, if given.
    """

    opening: str
    turns: tuple[tuple[str, str], ...]
    chats: tuple[Chat, ...] = ()


class Environment(Protocol):
    """Plays one episode at a time.

    A class may have an attribute ``stop``: strings that end an utterance, in addition to the end tokens; a method
    ``close()``, called when an episode is over; and ``demonstrations(count, seed)``: dialogues to clone, not
    necessarily played well. ``max_turns`` and the two methods of the state must come together; otherwise
    :func:`completed` adds them.
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
    """Episodes to clone; [] if the environment has none."""
    own = getattr(environment, "demonstrations", None)
    return own(count, seed) if callable(own) else []


def keeps_state(environment: Any) -> bool:
    """Whether a class or an object can save its state and continue from it."""
    return all(callable(getattr(environment, name, None)) for name in STATE)


def completed(environment: Any, max_turns: int = 0) -> Environment:
    """Return an environment with a state, adding one if it has none.

    Args:
        max_turns: turns after which an episode is truncated; 0: the environment's ``max_turns`` or gymnasium's
            ``spec.max_episode_steps``, else :data:`USUAL_TURNS`. An environment with its own state keeps its limit.
    """
    if keeps_state(environment):
        kept: Environment = environment
        return kept
    spec = getattr(environment, "spec", None)
    own = getattr(environment, "max_turns", None) or getattr(spec, "max_episode_steps", None)
    return Replayed(environment, max_turns or own or USUAL_TURNS)


class Replayed:
    """Any gymnasium-style text environment as an :class:`Environment`, whose state is the history of the episode.

    Args:
        env: has gymnasium's ``reset(seed=...)`` and ``step(text)``, and is deterministic given the seed.
        max_turns: turns after which an episode is truncated.
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
            ValueError: the replayed episode came out differently.
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
