"""One multi-turn episode between a policy and an environment, in token ids.

    reset ─> opening's ids ─┐
                            v
         ┌──> state (ids so far) ─> generate ─> utterance's ids ─> text ─> step ─> observation ─> its ids ──┐
         └──────────────────────────────────────────────────────────────────────────────────────────────────┘

Each turn is one request whose prompt is the transcript so far, so the engine's prefix cache holds all but the last
observation. A transcript that no longer fits loses its oldest turns, but never its opening. What the policy said is
never tokenised again; each observation is tokenised once. Where observations have roles and the model a chat template,
the transcript is a conversation in that (tasks/transcript.py). An episode is a coroutine, and hundreds of them share
one engine and a few environment processes.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cola_ray.experience import Episode, Turn
from cola_ray.rollout.engine import Request
from cola_ray.rollout.isolation import EnvironmentProcess, Outcome
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.environment import Chat
from cola_ray.tasks.transcript import Transcript

Array = np.ndarray


@dataclass(frozen=True)
class Utterance:
    """One generated turn: L tokens in a state of P ids."""

    token_ids: Array  # (L,), including the stop token
    actions: Array  # (L,)
    log_probs: Array  # (L,)
    versions: Array  # (L,)
    hidden_states: Array  # (P + L - 1, H) float32, e at every token but the last

    def features(self) -> tuple[Array, Array]:
        """Return what a critic reads, (H,) each: e at the state's last token, and the mean of e over the utterance.

        The mean, rather than e at the utterance's last token: there the base only needs to know that the sentence
        ends, and little is left of what was said.
        """
        start = len(self.hidden_states) - len(self.token_ids)
        state = self.hidden_states[start]
        said = self.hidden_states[start + 1 :]
        return state, said.mean(0) if len(said) else state

    def as_turn(self, state: Sequence[int], reward: float, observation: Sequence[int]) -> Turn:
        """With the ids that it was said in, what it brought, and the ids of what it was answered."""
        return Turn(
            np.asarray(state, np.int64), self.token_ids, self.actions, self.log_probs, self.versions, reward,
            np.asarray(observation, np.int64), *self.features(),
        )  # fmt: skip


class Generate(Protocol):
    def __call__(self, ids: Sequence[int], turn: int, longest: int = 0, /) -> Awaitable[Utterance]:
        """The utterance of a turn.

        Args:
            ids: of the state that it is said in.
            turn: its number in the episode.
            longest: most tokens that it may have; 0: the run's limit.
        """
        ...


Submit = Callable[[Sequence[Request]], Awaitable[list[Utterance]]]
"""Requests of one episode -> an utterance for each."""


@dataclass(frozen=True)
class EpisodeSetting:
    """What all episodes of a worker share: environment processes, tokenisation, and the limit on a state's length."""

    environments: Sequence[EnvironmentProcess]
    encode: Callable[[str], list[int]]
    decode: Callable[[Array], str]
    max_state_tokens: int
    begin: Sequence[int] = ()
    """Ids that every transcript begins with: the tokenizer's BOS, if it has one."""
    chat: ChatTokenizer | None = None
    """Of a model with a chat template, for environments whose observations have roles."""
    end_ids: Sequence[int] = ()
    """Ids that end an utterance."""


async def play(
    position: int, seed: int, setting: EpisodeSetting, generate: Generate, read_state: Generate | None = None
) -> Episode:
    """Play an episode to its end. If the environment fails, the episode ends there and carries the failure.

    Args:
        position: of the ticket; also the episode's id in its environment process.
        seed: of the environment.
        read_state: called for the last state of an episode that a limit cut, whose features stand for the rest.
    """
    home = setting.environments[position % len(setting.environments)]
    record = _Record(position, setting)
    reply = await asyncio.to_thread(home.reset, position, seed)
    while not reply.failure:
        outcome: Outcome = reply.value
        if record.said:
            record.rewards.append(outcome.reward)
        record.observe(outcome.observation, outcome.chat)
        record.metrics |= outcome.metrics
        if outcome.terminated or outcome.truncated:
            cut = not outcome.terminated
            final = await read_state(record.state(), len(record.said)) if cut and read_state else None
            return record.episode(outcome.terminated, final)
        state = record.state()
        text = record.say(state, await generate(state, len(record.said)))
        reply = await asyncio.to_thread(home.step, position, outcome.state, text)
    await asyncio.to_thread(home.forget, position)
    return record.episode(terminated=False, final=None, failure=reply.failure)


class _Record:
    """The transcript so far, as ids, texts and rewards."""

    def __init__(self, position: int, setting: EpisodeSetting) -> None:
        self.position, self.setting = position, setting
        self.segments: list[list[int]] = []  # opening, utterance, observation, utterance, ...
        self.said: list[tuple[list[int], Utterance]] = []  # (state, utterance)
        self.rewards: list[float] = []
        self.texts: list[str] = []
        self.metrics: dict[str, float] = {}
        self.transcript: Transcript | None = None  # where observations have roles, and the model a chat template

    def state(self) -> list[int]:
        """Return the opening and as many of the last turns as fit, or at least the end of the last observation."""
        if self.transcript is not None:
            return self.transcript.ids(self.setting.max_state_tokens)
        opening, *rest = self.segments
        limit, kept = self.setting.max_state_tokens - len(self.setting.begin), list(rest)
        while kept and len(opening) + sum(map(len, kept)) > limit:
            del kept[:2]
        ids = [*opening, *itertools.chain(*kept)] if kept or not rest else rest[-1]
        return [*self.setting.begin, *ids[-limit:]]

    def observe(self, observation: str, chat: Chat | None = None) -> None:
        if not self.segments and chat is not None and self.setting.chat is not None:
            self.transcript = Transcript(self.setting.chat, self.setting.end_ids, chat)
        elif self.transcript is not None:
            self.transcript.hear(chat or Chat(({"role": "user", "content": observation},)))
        self.segments.append(self.setting.encode(observation))
        self.texts.append(observation)

    def say(self, state: list[int], utterance: Utterance) -> str:
        text = self.setting.decode(utterance.token_ids)
        self.said.append((state, utterance))
        if self.transcript is not None:
            self.transcript.say(utterance.token_ids.tolist())
        self.segments.append([int(token) for token in utterance.token_ids])
        self.texts.append(text)
        return text

    def episode(self, terminated: bool, final: Utterance | None, failure: str = "") -> Episode:
        turns = []
        # Where the environment failed at the last utterance, that has neither a reward nor an observation after it.
        observations = [*(self.segments[2::2] if self.transcript is None else self._answers()), []]
        for (state, said), reward, observation in zip(self.said, [*self.rewards, 0.0], observations, strict=False):
            turns.append(said.as_turn(state, reward, observation))
        last = None if final is None else final.features()[0]
        return Episode(self.position, tuple(turns), terminated, "".join(self.texts), last, failure, self.metrics)

    def _answers(self) -> list[list[int]]:
        """Return what the state after each utterance adds to it; nothing where it does not continue it."""
        states = [state for state, _ in self.said]
        before = [[*state, *map(int, said.token_ids)] for state, said in self.said]
        after = [*states[1:], self.state()][: len(before)]
        return [
            ids[len(whole) :] if ids[: len(whole)] == whole else [] for whole, ids in zip(before, after, strict=True)
        ]
