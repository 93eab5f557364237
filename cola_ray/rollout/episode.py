"""One multi-turn episode between a policy and an environment, in token ids.

    reset ─> opening's ids ─┐
                            v
         ┌──> state (ids so far) ─> generate ─> utterance's ids ─> text ─> step ─> observation ─> its ids ──┐
         └──────────────────────────────────────────────────────────────────────────────────────────────────┘

Each turn is one request whose prompt is the transcript so far, so the engine's prefix cache holds all but the last
observation. A transcript that no longer fits loses its oldest turns, but never its opening. The policy's utterances are
never tokenised again; each observation is tokenised once. If observations have roles and the model has a chat template,
the transcript is a conversation in this template (tasks/transcript.py). An episode is a coroutine, and hundreds of them
share one engine and a few environment processes.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
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

        The mean is used because e at the utterance's last token mostly says that the sentence ends, and little of what
        was said. Both are copies, so other tokens' e need not stay in memory.
        """
        start = len(self.hidden_states) - len(self.token_ids)
        state = self.hidden_states[start].copy()
        said = self.hidden_states[start + 1 :]
        return state, said.mean(0) if len(said) else state

    def as_turn(self, state: Sequence[int]) -> Turn:
        """This utterance as a turn in ``state``; its reward and the observation after it are not known yet."""
        return Turn(
            np.asarray(state, np.int64), self.token_ids, self.actions, self.log_probs, self.versions, 0.0,
            np.zeros(0, np.int64), *self.features(),
        )  # fmt: skip


class Generate(Protocol):
    def __call__(self, ids: Sequence[int], turn: int, longest: int = 0, /) -> Awaitable[Utterance]:
        """Generate the utterance of a turn.

        Args:
            ids: of the turn's state.
            turn: its number in the episode.
            longest: most tokens that it may have; 0: the run's limit.
        """
        ...


Submit = Callable[[Sequence[Request]], Awaitable[list[Utterance]]]
"""Requests of one episode -> an utterance for each."""


@dataclass(frozen=True)
class EpisodeSetting:
    """Shared by all episodes of a worker: environment processes, tokenisation, and the limit on a state's length."""

    environments: Sequence[EnvironmentProcess]
    encode: Callable[[str], list[int]]
    decode: Callable[[Array], str]
    max_state_tokens: int
    begin: Sequence[int] = ()
    """Ids that every transcript begins with: the tokenizer's BOS, if it has one."""
    chat: ChatTokenizer | None = None
    """Set if the model has a chat template; used by environments whose observations have roles."""
    end_ids: Sequence[int] = ()
    """Ids that end an utterance."""


async def play(
    position: int, seed: int, setting: EpisodeSetting, generate: Generate, read_state: Generate | None = None
) -> Episode:
    """Play an episode to its end. If the environment fails, the episode ends there and carries the failure.

    Args:
        position: of the ticket; also the episode's id in its environment process.
        seed: of the environment.
        read_state: called for the last state of an episode that a limit cut; its features stand for the rest.
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
        self.said: list[Turn] = []  # without rewards and observations
        self.rewards: list[float] = []
        self.texts: list[str] = []
        self.metrics: dict[str, float] = {}
        self.transcript: Transcript | None = None  # if observations have roles and the model has a chat template
        self.heard: dict[int, list[int]] = {}  # what the template wrote after each utterance

    def state(self) -> list[int]:
        """Return the opening and as many of the last turns as fit; if none fits, the end of the last observation."""
        if self.transcript is not None:
            ids = self.transcript.ids(self.setting.max_state_tokens)
            if self.said:
                self.heard[len(self.said) - 1] = self.transcript.heard
            return ids
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
        self.said.append(utterance.as_turn(state))  # without its hidden states, which are not needed any longer
        if self.transcript is not None:
            self.transcript.say(utterance.token_ids.tolist())
        self.segments.append([int(token) for token in utterance.token_ids])
        self.texts.append(text)
        return text

    def episode(self, terminated: bool, final: Utterance | None, failure: str = "") -> Episode:
        turns = []
        if self.transcript is not None and self.said and not failure:
            self.state()  # with what was heard last
        heard = [self.heard.get(number, []) for number in range(len(self.said))]
        # If the environment failed at the last utterance, that utterance has no reward and no observation.
        observations = [*(self.segments[2::2] if self.transcript is None else heard), []]
        for said, reward, observation in zip(self.said, [*self.rewards, 0.0], observations, strict=False):
            turns.append(replace(said, reward=reward, observation_ids=np.asarray(observation, np.int64)))
        last = None if final is None else final.features()[0]
        return Episode(self.position, tuple(turns), terminated, "".join(self.texts), last, failure, self.metrics)
