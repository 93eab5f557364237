"""One multi-turn episode between a policy and an environment, ids in, ids out.

    reset ─> ids of the opening ─┐
                                 v
              ┌──> state (ids so far) ─> generate ─> utterance ids ─> text ─> step ─> observation ─> its ids ──┐
              └────────────────────────────────────────────────────────────────────────────────────────────────┘

Each turn is one request whose prompt is the transcript so far, so the engine's prefix cache holds all but the last
observation. What the policy said is never tokenised again; only observations are, each once. An episode is a coroutine,
and hundreds of them share one engine and a few environment processes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cola_ray.experience import Episode, Turn
from cola_ray.rollout.isolation import EnvironmentProcess, Outcome

Array = np.ndarray


@dataclass(frozen=True)
class Utterance:
    """What a generated turn of L tokens in a state of P ids consists of."""

    token_ids: Array  # (L,), the stop token included
    actions: Array  # (L,)
    log_probs: Array  # (L,)
    versions: Array  # (L,)
    hidden_states: Array | None  # (P + L - 1, H) float32, e at all but the last token


Speak = Callable[[Sequence[int], int], Awaitable[Utterance]]
"""(ids of the state, number of the turn) -> an utterance."""


@dataclass(frozen=True)
class Table:
    """Where episodes are played: environment processes, and the words' way to ids and back."""

    environments: Sequence[EnvironmentProcess]
    encode: Callable[[str], list[int]]
    decode: Callable[[Array], str]
    max_state_tokens: int  # a longer transcript cuts the episode


async def play(position: int, seed: int, table: Table, speak: Speak, look: Speak | None = None) -> Episode:
    """An episode to its end; one whose environment fails ends there, with the failure.

    Args:
        position: of the ticket; also the episode's name towards its environment process.
        seed: of the environment.
        look: reads a state without saying anything that counts; asked for the last state of a cut episode.
    """
    home = table.environments[position % len(table.environments)]
    record = _Record(position, table)
    answer = await asyncio.to_thread(home.reset, position, seed)
    while not answer.failure:
        outcome: Outcome = answer.value
        if record.said:
            record.rewards.append(outcome.reward)
        record.observe(outcome.observation)
        if outcome.terminated or outcome.truncated or len(record.ids) > table.max_state_tokens:
            if not (outcome.terminated or outcome.truncated):
                await asyncio.to_thread(home.forget, position)
            final = None if outcome.terminated or look is None else await look(record.ids, len(record.said))
            return record.episode(outcome.terminated, final)
        text = record.say(await speak(record.ids, len(record.said)))
        answer = await asyncio.to_thread(home.step, position, outcome.state, text)
    await asyncio.to_thread(home.forget, position)
    return record.episode(terminated=False, final=None, failure=answer.failure)


class _Record:
    """What has happened so far."""

    def __init__(self, position: int, table: Table) -> None:
        self.position, self.table = position, table
        self.ids: list[int] = []
        self.said: list[tuple[int, Utterance]] = []  # (where it starts, utterance)
        self.rewards: list[float] = []
        self.words: list[str] = []

    def observe(self, observation: str) -> None:
        self.ids = [*self.ids, *self.table.encode(observation)]
        self.words.append(observation)

    def say(self, utterance: Utterance) -> str:
        text = self.table.decode(utterance.token_ids)
        self.said.append((len(self.ids), utterance))
        self.ids = [*self.ids, *(int(token) for token in utterance.token_ids)]
        self.words.append(text)
        return text

    def episode(self, terminated: bool, final: Utterance | None, failure: str = "") -> Episode:
        length = len(self.ids)
        actions, versions = np.zeros(length, np.int64), np.zeros(length, np.int64)
        log_probs = np.zeros(length, np.float32)
        turns = []
        for (start, said), reward in zip(self.said, [*self.rewards, 0.0], strict=False):
            end = start + len(said.token_ids)
            actions[start:end], log_probs[start:end], versions[start:end] = said.actions, said.log_probs, said.versions
            states = said.hidden_states
            features = (None, None) if states is None else (states[start - 1], states[-1])
            turns.append(Turn(start, end, reward, *features))
        last = None if final is None or final.hidden_states is None else final.hidden_states[length - 1]
        return Episode(
            self.position, np.asarray(self.ids, np.int64), actions, log_probs, versions, tuple(turns), terminated,
            "".join(self.words), last, failure,
        )  # fmt: skip
