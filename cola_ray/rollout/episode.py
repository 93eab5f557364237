"""One multi-turn episode between a policy and an environment, ids in, ids out.

    reset ─> ids of the opening ─┐
                                 v
              ┌──> state (ids so far) ─> generate ─> utterance ids ─> text ─> step ─> observation ─> its ids ──┐
              └────────────────────────────────────────────────────────────────────────────────────────────────┘

Each turn is one request whose prompt is the transcript so far, so the engine's prefix cache holds all but the last
observation. A transcript that no longer fits loses its oldest turns, never its opening. What the policy said is never
tokenised again; only observations are, each once. An episode is a coroutine, and hundreds of them share one engine and
a few environment processes.
"""

import asyncio
import itertools
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
    hidden_states: Array  # (P + L - 1, H) float32, e at all but the last token

    def features(self) -> tuple[Array, Array]:
        """What a critic reads, (H,) each: e at the state's last token, and the mean of e over the utterance.

        Not e at the utterance's last token: there the base only has to know that the sentence ends, and of what was
        said less is left.
        """
        start = len(self.hidden_states) - len(self.token_ids)
        state = self.hidden_states[start]
        said = self.hidden_states[start + 1 :]
        return state, said.mean(0) if len(said) else state


Speak = Callable[[Sequence[int], int], Awaitable[Utterance]]
"""(ids of the state, number of the turn) -> an utterance."""


@dataclass(frozen=True)
class Table:
    """Where episodes are played: environment processes, and the words' way to ids and back."""

    environments: Sequence[EnvironmentProcess]
    encode: Callable[[str], list[int]]
    decode: Callable[[Array], str]
    max_state_tokens: int
    begin: Sequence[int] = ()
    """What every transcript begins with: the tokenizer's BOS, where it has one."""


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
        if outcome.terminated or outcome.truncated:
            final = None if outcome.terminated or look is None else await look(record.state(), len(record.said))
            return record.episode(outcome.terminated, final)
        state = record.state()
        text = record.say(state, await speak(state, len(record.said)))
        answer = await asyncio.to_thread(home.step, position, outcome.state, text)
    await asyncio.to_thread(home.forget, position)
    return record.episode(terminated=False, final=None, failure=answer.failure)


class _Record:
    """What has happened so far."""

    def __init__(self, position: int, table: Table) -> None:
        self.position, self.table = position, table
        self.segments: list[list[int]] = []  # opening, utterance, observation, utterance, ...
        self.said: list[tuple[list[int], Utterance]] = []  # (state, utterance)
        self.rewards: list[float] = []
        self.words: list[str] = []

    def state(self) -> list[int]:
        """The opening and as many of the last turns as fit; at the very least the end of the last observation."""
        opening, *rest = self.segments
        limit, kept = self.table.max_state_tokens - len(self.table.begin), list(rest)
        while kept and len(opening) + sum(map(len, kept)) > limit:
            del kept[:2]
        ids = [*opening, *itertools.chain(*kept)] if kept or not rest else rest[-1]
        return [*self.table.begin, *ids[-limit:]]

    def observe(self, observation: str) -> None:
        self.segments.append(self.table.encode(observation))
        self.words.append(observation)

    def say(self, state: list[int], utterance: Utterance) -> str:
        text = self.table.decode(utterance.token_ids)
        self.said.append((state, utterance))
        self.segments.append([int(token) for token in utterance.token_ids])
        self.words.append(text)
        return text

    def episode(self, terminated: bool, final: Utterance | None, failure: str = "") -> Episode:
        turns = []
        # The last utterance has neither reward nor answer where the environment failed at it.
        answers = [*self.segments[2::2], []]
        for (state, said), reward, answer in zip(self.said, [*self.rewards, 0.0], answers, strict=False):
            turns.append(
                Turn(
                    np.asarray(state, np.int64), said.token_ids, said.actions, said.log_probs, said.versions, reward,
                    np.asarray(answer, np.int64), *said.features(),
                )
            )  # fmt: skip
        last = None if final is None else final.features()[0]
        return Episode(self.position, tuple(turns), terminated, "".join(self.words), last, failure)
