"""The rollout actor of multi-turn tasks: an engine, environment processes, and the episodes between them.

play_episodes(tickets) ─> Episodes, sampled         hundreds at once: each turn joins the engine's running batch;
                                                    or agent programs play them (programs.py)
evaluate(seeds)        ─> returns on held-out environment seeds
answer(seeds, way)     ─> everything that happened on those seeds, for `cola_ray evaluate`
speak(states)          ─> one fresh utterance per state, with the base's features, for the critic
"""

import asyncio
import functools
import itertools
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from cola_ray.algorithms.archer import TwinHeads
from cola_ray.experience import Answer, Episode, Ticket, Trajectory, was_said
from cola_ray.model.action_requests import BASE_TOKENS
from cola_ray.rollout.batching import Rounds
from cola_ray.rollout.conversation import Conversation
from cola_ray.rollout.engine import Completion, Request, as_float
from cola_ray.rollout.episode import EpisodeSetting, Generate, Submit, Utterance, play
from cola_ray.rollout.isolation import EnvironmentProcess
from cola_ray.rollout.programs import Limits, Programs
from cola_ray.rollout.tool_parser import ToolCalls
from cola_ray.rollout.worker import EngineWorker
from cola_ray.settings.config import Config
from cola_ray.tasks import make_environment
from cola_ray.tasks.environment import HELD_OUT

Array = np.ndarray
Weights = Mapping[str, Array]
# Offsets that keep the seeds of different kinds of draws apart.
_FRESH = 1 << 40  # fresh utterances for the critic
_REPEAT = 1 << 42  # between the episodes that ``answer`` plays on one environment seed


@dataclass(frozen=True)
class PlayedSeed:
    """All episodes played in one way on one environment seed; lists have one entry per episode."""

    index: int
    texts: list[str]
    returns: list[float]
    terminated: list[bool]  # the environment itself ended the episode, rather than a limit
    turns: list[int]
    token_ids: list[list[int]]
    actions: list[list[int]]
    failures: list[str]  # why each episode failed, "" if it did not; a failed episode does not count
    generated_tokens: int
    seconds: float


T = TypeVar("T")
Made = TypeVar("Made")


class AgentWorker(EngineWorker):
    """Plays episodes of the task's environment.

    Features are the base's hidden states, H wide. With ``rl.action_space token`` the base itself trains, so its states
    would go stale, and the features are a single zero instead.
    """

    def __init__(self, config: Config, model_path: str) -> None:
        make, seconds = functools.partial(make_environment, config.task), config.task.reward_timeout_s
        of_program = config.task.name == "program"
        count = 0 if of_program else config.rollout.environment_processes
        processes = [EnvironmentProcess(make, seconds) for _ in range(count)]
        super().__init__(config, model_path, keep_hidden_states=True)
        width = self.engine.llm.llm_engine.model_config.get_hidden_size()
        self.feature_width = width if self.latent else 1
        self.setting = EpisodeSetting(
            processes, self.chat.text_ids, self.endings.text, config.rollout.max_prompt_tokens, tuple(self.chat.begin),
            self.chat if self.tokenizer.chat_template else None, self.endings.token_ids,
        )  # fmt: skip
        self.programs = self._programs(make().max_turns) if of_program else None

    async def facts(self) -> dict[str, object]:
        facts = {"num_train": HELD_OUT, "num_heldout": HELD_OUT, "feature_width": self.feature_width}
        return await super().facts() | facts

    async def play_episodes(self, tickets: Sequence[Ticket], critic: Weights | None = None) -> list[Episode]:
        """Return one sampled episode per ticket, in order; draws depend on (run seed, ticket, turn) alone.

        Args:
            critic: weights of ArCHer's twin heads, which then choose each utterance from ``critic.candidates`` samples.
        """
        heads = self._heads(critic)

        def one(ticket: Ticket, submit: Submit) -> Coroutine[Any, Any, Episode]:
            generate, read = self._generate("sample", ticket.position, submit, heads), self._read_state(submit)
            return self._play(ticket.position, ticket.problem, generate, read)

        return await self._concurrently(one, tickets)

    def _programs(self, max_turns: int) -> Programs:
        task, rollout = self.config.task, self.config.rollout
        calls = ToolCalls(self.chat.tokenizer, task.tool_parser) if task.tool_parser else None
        converse = functools.partial(Conversation, self.chat, self.endings, calls)
        limits = Limits(rollout.environment_processes, task.reward_timeout_s, max_turns, rollout.max_prompt_tokens)
        return Programs(task.command, converse, limits)

    async def _play(self, place: int, seed: int, generate: Generate, read_state: Generate | None = None) -> Episode:
        """Play an episode with the environment, or have an agent program play it."""
        if self.programs is not None:
            return await self.programs.play(place, seed, generate, read_state)
        return await play(place, seed, self.setting, generate, read_state)

    async def _concurrently(
        self, one: Callable[[T, Submit], Coroutine[Any, Any, Made]], items: Sequence[T]
    ) -> list[Made]:
        """Run ``one(item, submit)`` for all items at once; results in order. ``submit`` leads to the engine."""
        if self.programs is not None or not self.config.rollout.in_rounds:
            return await asyncio.gather(*(one(item, self._submit) for item in items))
        rounds = Rounds(len(items), self._submit)

        async def in_rounds(place: int, item: T) -> Made:
            try:
                return await one(item, functools.partial(rounds.submit, place))
            finally:
                rounds.leave()

        return await asyncio.gather(*(in_rounds(*numbered) for numbered in enumerate(items)))

    async def evaluate(self, indices: Sequence[int], bare_base: bool, critic: Weights | None = None) -> list[Answer]:
        """Play episodes on environment seeds that training never uses; rewards are returns, -inf where one failed.

        The policy samples, as in training: a greedy player that learns nothing new from an observation would repeat its
        question forever. The bare base is always greedy.
        """
        heads, way = self._heads(critic), "base" if bare_base else "sample"

        async def one(place: int, submit: Submit) -> Answer:
            episode = await self._play(place, place, self._generate(way, place, submit, heads))
            kept = episode.as_trajectories() if place - HELD_OUT < self.config.samples.prompts else ()
            return Answer(-math.inf if episode.failure else episode.total_reward, tuple(kept))

        return await self._concurrently(one, [HELD_OUT + index for index in indices])

    async def answer(self, indices: Sequence[int], way: str) -> list[PlayedSeed]:
        """Play on seeds of ``eval.split``: one episode each, or ``search.simulations`` if ``way`` is "sample"."""
        first = HELD_OUT if self.config.eval.split == "heldout" else 0
        return await asyncio.gather(*(self._play_all(index, first + index, way) for index in indices))

    async def _play_all(self, index: int, seed: int, way: str) -> PlayedSeed:
        started = time.perf_counter()
        repeats = self.config.search.simulations if way == "sample" else 1
        places = [seed + repeat * _REPEAT for repeat in range(repeats)]
        players = [(place, self._generate(way, place, self._submit)) for place in places]
        episodes = await asyncio.gather(*(self._play(place, seed, player) for place, player in players))
        said = [[turn.token_ids.tolist() for turn in episode.turns] for episode in episodes]
        acted = [[turn.actions.tolist() for turn in episode.turns] for episode in episodes]
        return PlayedSeed(
            index, [one.text for one in episodes], [one.total_reward for one in episodes],
            [one.terminated for one in episodes], [len(one.turns) for one in episodes],
            [list(itertools.chain(*turns)) for turns in said], [list(itertools.chain(*turns)) for turns in acted],
            [one.failure for one in episodes], sum(len(turn) for turns in said for turn in turns),
            time.perf_counter() - started,
        )  # fmt: skip

    def _generate(self, way: str, place: int, submit: Submit, critic: TwinHeads | None = None) -> Generate:
        """Return the function that generates the turns of the episode at ``place``; ``way``: sample, greedy or base."""

        async def generate(ids: Sequence[int], turn: int, longest: int = 0) -> Utterance:
            if way == "sample":
                return await self._sample(ids, (place, turn), submit, critic, longest)
            forced = [BASE_TOKENS] * self.config.rollout.max_new_tokens if way == "base" and self.latent else []
            return (await submit([self._request(ids, 0, 0.0, max_new_tokens=longest, actions=forced)]))[0]

        return generate

    async def speak(self, states: Sequence[tuple[int, Sequence[int]]], draw: int) -> list[tuple[Trajectory, Array]]:
        """Return a sampled utterance in each state, and its features, (H,) float32.

        Args:
            states: (place, ids) of each state.
            draw: number of this call in the run; it seeds the draws together with the state's place.
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

    async def _sample(
        self, ids: Sequence[int], place: tuple[int, int], submit: Submit, critic: TwinHeads | None, longest: int
    ) -> Utterance:
        """Sample an utterance; with a critic, sample ``critic.candidates`` and return the one with the largest min(Q).

        The minimum is over the critic's twins.

        Args:
            place: (the episode's place, number of the turn).
            longest: most tokens of the utterance; 0: the run's limit.
        """
        count = 1 if critic is None else self.config.critic.candidates
        seeds = [self._seed(*place, *((candidate,) if candidate else ())) for candidate in range(count)]
        temperature = self.config.rollout.temperature
        spoken = await submit([self._request(ids, seed, temperature, max_new_tokens=longest) for seed in seeds])
        if critic is None:
            return spoken[0]
        with torch.no_grad():
            features = [one.features() for one in spoken]
            states, utterances = (torch.tensor(np.stack(part)) for part in zip(*features, strict=True))
            repeated = [float(was_said(ids, one.token_ids)) for one in spoken]
            states = torch.cat([states, torch.full((count, 1), float(place[1]))], 1)
            utterances = torch.cat([utterances, torch.tensor(repeated)[:, None]], 1)
            return spoken[int(critic.q_values(states, utterances).min(0).values.argmax())]

    def _read_state(self, submit: Submit) -> Generate:
        """Return a function that reads a state's features, by a completion of one token that is not used otherwise."""

        async def read(ids: Sequence[int], _: int, longest: int = 1) -> Utterance:
            return (await submit([self._request(ids, 0, 0.0, max_new_tokens=longest)]))[0]

        return read

    async def _submit(self, requests: Sequence[Request]) -> list[Utterance]:
        return [_utterance(completion) for completion in await self.batch.complete(requests)]

    def _heads(self, critic: Weights | None) -> TwinHeads | None:
        if critic is None:
            return None
        heads = TwinHeads(len(critic["states.mean"]), len(critic["utterances.mean"]))
        heads.load_state_dict({name: torch.tensor(array) for name, array in critic.items()})
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
        most = self.config.rollout.max_new_tokens
        limit = min(max_new_tokens or most, most)
        return self._sampled(list(ids), seed, limit, temperature, actions=actions, stop=self.endings.strings)


def _utterance(c: Completion) -> Utterance:
    # Where the base trains, the critic reads text instead of hidden states, and a single zero takes their place.
    states = np.zeros((len(c.token_ids), 1), np.float32) if c.hidden_states is None else as_float(c.hidden_states)
    return Utterance(c.token_ids, c.actions, c.log_probs, c.versions, states)
