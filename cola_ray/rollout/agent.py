"""The rollout actor of multi-turn tasks: an engine, environment processes, and episodes between them.

play_episodes(tickets) ─> Episodes, sampled       hundreds at once: each turn joins the engine's running batch
evaluate(seeds)        ─> returns on seeds of their own
answer(seeds, way)     ─> all that happened there, for `cola_ray evaluate`
speak(states)          ─> one fresh utterance for each state, with the base's features: what the critic asks for
"""

import asyncio
import functools
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from cola_ray.algorithms.archer import TwinHeads
from cola_ray.experience import Episode, Ticket, Trajectory, was_said
from cola_ray.model.action_columns import BASE_TOKENS
from cola_ray.rollout.engine import Completion, Request, as_float
from cola_ray.rollout.episode import Speak, Table, Utterance, play
from cola_ray.rollout.isolation import EnvironmentProcess
from cola_ray.rollout.worker import EngineWorker
from cola_ray.settings.config import Config
from cola_ray.tasks import make_environment
from cola_ray.tasks.environment import HELD_OUT

Array = np.ndarray
Weights = Mapping[str, Array]
_FRESH = 1 << 40  # so that fresh utterances never share a seed with an episode's
_AGAIN = 1 << 42  # between the positions of one seed's episodes


@dataclass(frozen=True)
class Played:
    """All episodes that one way of playing made of one environment seed."""

    index: int
    texts: list[str]
    returns: list[float]
    solved: list[bool]  # ended by the environment's own rules, not by a limit
    turns: list[int]
    token_ids: list[list[int]]
    actions: list[list[int]]
    failures: list[str]  # of the environment; such an episode does not count
    generated_tokens: int
    seconds: float


T = TypeVar("T")
Made = TypeVar("Made")
Submit = Callable[[Sequence[Request]], Awaitable[list[Utterance]]]
"""Requests of one episode to the engine, and what comes of them."""


class Rounds:
    """Episodes that take their turns together: who shares a batch with whom does not depend on how fast a game answers.

    Args:
        count: of the episodes.
        submit: all requests of a round, in the episodes' order.
    """

    def __init__(self, count: int, submit: Submit) -> None:
        self.playing, self.all_at_once = count, submit
        self.waiting: dict[int, tuple[Sequence[Request], asyncio.Future[list[Utterance]]]] = {}
        self.round: asyncio.Task[None] | None = None

    async def submit(self, episode: int, requests: Sequence[Request]) -> list[Utterance]:
        """Waits until all that still play have asked."""
        answer = asyncio.get_running_loop().create_future()
        self.waiting[episode] = requests, answer
        self._begin_if_all_have_come()
        return await answer

    def leave(self) -> None:
        """An episode has ended."""
        self.playing -= 1
        self._begin_if_all_have_come()

    def _begin_if_all_have_come(self) -> None:
        if self.waiting and len(self.waiting) == self.playing:
            asked = [self.waiting[episode] for episode in sorted(self.waiting)]
            self.waiting = {}
            self.round = asyncio.create_task(self._play(asked))

    async def _play(self, asked: Sequence[tuple[Sequence[Request], asyncio.Future[list[Utterance]]]]) -> None:
        try:
            spoken = iter(await self.all_at_once([request for requests, _ in asked for request in requests]))
        except Exception as error:
            for _, answer in asked:
                if not answer.done():
                    answer.set_exception(error)
            return
        for requests, answer in asked:
            said = list(itertools.islice(spoken, len(requests)))
            if not answer.done():  # whoever asked may have been cancelled
                answer.set_result(said)


class AgentWorker(EngineWorker):
    """Plays episodes of the task's environment."""

    def __init__(self, config: Config, model_path: str) -> None:
        make = functools.partial(make_environment, config.task)
        seconds = config.task.reward_timeout_s
        processes = [EnvironmentProcess(make, seconds) for _ in range(config.rollout.environment_processes)]
        super().__init__(config, model_path, keep_hidden_states=True)
        width = self.engine.llm.llm_engine.model_config.get_hidden_size()
        self.feature_width = width if self.latent else 1
        self.table = Table(
            processes, self.chat.text_ids, self.endings.text, config.rollout.max_prompt_tokens, tuple(self.chat.begin)
        )

    async def facts(self) -> dict[str, object]:
        facts = {"num_train": HELD_OUT, "num_heldout": HELD_OUT, "feature_width": self.feature_width}
        return await super().facts() | facts

    async def play_episodes(self, tickets: Sequence[Ticket], judge: Weights | None = None) -> list[Episode]:
        """One sampled episode a ticket, in order; draws depend on (run seed, ticket, turn) alone."""
        heads = self._heads(judge)

        def one(ticket: Ticket, submit: Submit) -> Coroutine[Any, Any, Episode]:
            speak, look = self._voice("sample", ticket.position, submit, heads), self._look(submit)
            return play(ticket.position, ticket.problem, self.table, speak, look)

        return await self._side_by_side(one, tickets)

    async def _side_by_side(
        self, one: Callable[[T, Submit], Coroutine[Any, Any, Made]], items: Sequence[T]
    ) -> list[Made]:
        """Of each item, in order; ``one`` is handed the way to the engine."""
        if not self.config.rollout.in_rounds:
            return await asyncio.gather(*(one(item, self._submit) for item in items))
        rounds = Rounds(len(items), self._submit)

        async def to_its_end(place: int, item: T) -> Made:
            try:
                return await one(item, functools.partial(rounds.submit, place))
            finally:
                rounds.leave()

        return await asyncio.gather(*(to_its_end(*numbered) for numbered in enumerate(items)))

    async def evaluate(self, indices: Sequence[int], bare_base: bool, judge: Weights | None = None) -> list[float]:
        """Returns of episodes on environment seeds that training never uses; -inf where one failed.

        The policy samples, as it does in training: a greedy player that gets no new answer asks the same again for
        ever. The bare base can only be greedy.
        """
        heads, way = self._heads(judge), "base" if bare_base else "sample"

        async def one(place: int, submit: Submit) -> float:
            episode = await play(place, place, self.table, self._voice(way, place, submit, heads))
            return float("-inf") if episode.failure else episode.total_reward

        return await self._side_by_side(one, [HELD_OUT + index for index in indices])

    async def answer(self, indices: Sequence[int], way: str) -> list[Played]:
        """Episodes on seeds of ``eval.split``: one each, of ``sample`` as many as ``search.simulations``."""
        first = HELD_OUT if self.config.eval.split == "heldout" else 0
        return await asyncio.gather(*(self._play_all(index, first + index, way) for index in indices))

    async def _play_all(self, index: int, seed: int, way: str) -> Played:
        started = time.perf_counter()
        places = [seed + again * _AGAIN for again in range(self.config.search.simulations if way == "sample" else 1)]
        voices = [(place, self._voice(way, place, self._submit)) for place in places]
        episodes = await asyncio.gather(*(play(place, seed, self.table, voice) for place, voice in voices))
        said = [[turn.token_ids.tolist() for turn in episode.turns] for episode in episodes]
        acted = [[turn.actions.tolist() for turn in episode.turns] for episode in episodes]
        return Played(
            index, [one.text for one in episodes], [one.total_reward for one in episodes],
            [one.terminated for one in episodes], [len(one.turns) for one in episodes],
            [list(itertools.chain(*turns)) for turns in said], [list(itertools.chain(*turns)) for turns in acted],
            [one.failure for one in episodes], sum(len(turn) for turns in said for turn in turns),
            time.perf_counter() - started,
        )  # fmt: skip

    def _voice(self, way: str, place: int, submit: Submit, judge: TwinHeads | None = None) -> Speak:
        """sample, greedy, or base: the bare base, which can only be greedy."""

        async def speak(ids: Sequence[int], turn: int) -> Utterance:
            if way == "sample":
                return await self._say(ids, (place, turn), submit, judge)
            forced = [BASE_TOKENS] * self.config.rollout.max_new_tokens if way == "base" and self.latent else []
            return (await submit([self._request(ids, 0, 0.0, actions=forced)]))[0]

        return speak

    async def speak(self, states: Sequence[tuple[int, Sequence[int]]], draw: int) -> list[tuple[Trajectory, Array]]:
        """A sampled utterance in each state, and its features, (H,) float32.

        Args:
            states: (place, ids) each.
            draw: number of this call in the run; with a state's place it seeds the draws.
        """
        temperature = self.config.rollout.temperature
        requests = [self._request(ids, self._seed(_FRESH + draw, place), temperature) for place, ids in states]
        completions = await self.batch.complete(requests)
        return [
            (
                Trajectory(
                    np.asarray(ids, np.int64), c.token_ids, c.actions, c.log_probs, c.versions, 0.0, c.truncated, ""
                ),
                _utterance(c).features()[1],
            )
            for (_, ids), c in zip(states, completions, strict=True)
        ]

    async def _say(
        self, ids: Sequence[int], place: tuple[int, int], submit: Submit, judge: TwinHeads | None
    ) -> Utterance:
        """A sampled utterance; with a judge the best of ``critic.candidates`` by the smaller of its two Q.

        Args:
            place: (of the episode, number of the turn).
        """
        count = 1 if judge is None else self.config.critic.candidates
        seeds = [self._seed(*place, *((candidate,) if candidate else ())) for candidate in range(count)]
        spoken = await submit([self._request(ids, seed, self.config.rollout.temperature) for seed in seeds])
        if judge is None:
            return spoken[0]
        with torch.no_grad():
            features = [one.features() for one in spoken]
            states, utterances = (torch.tensor(np.stack(part)) for part in zip(*features, strict=True))
            before = [float(was_said(ids, one.token_ids)) for one in spoken]
            states = torch.cat([states, torch.full((count, 1), float(place[1]))], 1)
            utterances = torch.cat([utterances, torch.tensor(before)[:, None]], 1)
            return spoken[int(judge.q_values(states, utterances).min(0).values.argmax())]

    def _look(self, submit: Submit) -> Speak:
        """Reads a state: its features come with a completion of one token that nobody uses."""

        async def look(ids: Sequence[int], _: int) -> Utterance:
            return (await submit([self._request(ids, 0, 0.0, max_new_tokens=1)]))[0]

        return look

    async def _submit(self, requests: Sequence[Request]) -> list[Utterance]:
        return [_utterance(completion) for completion in await self.batch.complete(requests)]

    def _heads(self, judge: Weights | None) -> TwinHeads | None:
        if judge is None:
            return None
        heads = TwinHeads(len(judge["states.mean"]), len(judge["utterances.mean"]))
        heads.load_state_dict({name: torch.tensor(array) for name, array in judge.items()})
        return heads

    def _request(
        self,
        ids: Sequence[int] | Array,
        seed: int,
        temperature: float,
        *,
        max_new_tokens: int = 0,
        actions: Sequence[int] = (),
    ) -> Request:
        rollout = self.config.rollout
        top_k = rollout.top_k if temperature else 0
        limit = max_new_tokens or rollout.max_new_tokens
        return Request(list(ids), seed, temperature, top_k, limit, actions, self.endings.strings)


def _utterance(c: Completion) -> Utterance:
    # A base that trains has no states worth keeping: its critic reads text, and one zero holds the features' place.
    states = np.zeros((len(c.token_ids), 1), np.float32) if c.hidden_states is None else as_float(c.hidden_states)
    return Utterance(c.token_ids, c.actions, c.log_probs, c.versions, states)
