"""The rollout actor of multi-turn tasks: an engine, environment processes, and episodes between them.

play_episodes(tickets) ─> Episodes, sampled       hundreds at once: each turn joins the engine's running batch
evaluate(seeds)        ─> returns, greedy
speak(states)          ─> one fresh utterance for each state, with the base's features: what the critic asks for
"""

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cola_ray.config import Config
from cola_ray.experience import Episode, Ticket, Trajectory
from cola_ray.model.action_columns import BASE_TOKENS
from cola_ray.rollout.engine import Request
from cola_ray.rollout.episode import Table, Utterance, play
from cola_ray.rollout.isolation import EnvironmentProcess
from cola_ray.rollout.worker import EngineWorker
from cola_ray.tasks import make_environment

Array = np.ndarray
_HELD_OUT = 1 << 32  # evaluation's environment seeds start here, training's at 0
_FRESH = 1 << 40  # so that fresh utterances never share a seed with an episode's


class AgentWorker(EngineWorker):
    """Plays episodes of the task's environment."""

    def __init__(self, config: Config, model_path: str) -> None:
        make = functools.partial(make_environment, config.task)
        seconds = config.task.reward_timeout_s
        processes = [EnvironmentProcess(make, seconds) for _ in range(config.rollout.environment_processes)]
        super().__init__(config, model_path, keep_hidden_states=True)
        self.table = Table(processes, self._encode, self._decode, config.rollout.max_prompt_tokens)

    async def facts(self) -> dict[str, object]:
        width = self.engine.llm.llm_engine.model_config.get_hidden_size()
        return {**await super().facts(), "num_train": _HELD_OUT, "num_heldout": _HELD_OUT, "feature_width": width}

    async def play_episodes(self, tickets: Sequence[Ticket]) -> list[Episode]:
        """One sampled episode a ticket, in order; draws depend on (run seed, ticket, turn) alone."""

        def player(ticket: Ticket):
            async def speak(ids: Sequence[int], turn: int) -> Utterance:
                return await self._say(ids, self._seed(ticket.position, turn))

            return speak

        return await asyncio.gather(
            *(play(t.position, t.problem, self.table, player(t), self._look) for t in tickets)
        )  # fmt: skip

    async def evaluate(self, indices: Sequence[int], bare_base: bool) -> list[float]:
        """Returns of greedy episodes on environment seeds that training never uses; -inf where one failed."""

        async def speak(ids: Sequence[int], _: int) -> Utterance:
            actions = [BASE_TOKENS] * self.config.rollout.max_new_tokens if bare_base else []
            return await self._submit(ids, 0, 0.0, actions=actions)

        places = [_HELD_OUT + index for index in indices]
        episodes = await asyncio.gather(*(play(place, place, self.table, speak) for place in places))
        return [float("-inf") if episode.failure else episode.total_reward for episode in episodes]

    async def speak(self, states: Sequence[tuple[int, Sequence[int]]], draw: int) -> list[tuple[Trajectory, Array]]:
        """A sampled utterance in each state, and e at its last token that was read, (H,) float32.

        Args:
            states: (place, ids) each.
            draw: number of this call in the run; with a state's place it seeds the draws.
        """
        temperature = self.config.rollout.temperature
        requests = [self._request(ids, self._seed(_FRESH + draw, place), temperature) for place, ids in states]
        completions = await self._complete(requests)
        return [
            (
                Trajectory(
                    np.asarray(ids, np.int64), c.token_ids, c.actions, c.log_probs, c.versions, 0.0, c.truncated, ""
                ),
                _as_float(c.hidden_states)[-1],
            )
            for (_, ids), c in zip(states, completions, strict=True)
        ]

    async def _say(self, ids: Sequence[int], seed: int) -> Utterance:
        return await self._submit(ids, seed, self.config.rollout.temperature)

    async def _look(self, ids: Sequence[int], _: int) -> Utterance:
        """Reads a state: its features come with a completion of one token that nobody uses."""
        return await self._submit(ids, 0, 0.0, max_new_tokens=1)

    async def _submit(self, ids: Sequence[int], seed: int, temperature: float, **more: Any) -> Utterance:
        (completion,) = await self._complete([self._request(ids, seed, temperature, **more)])
        return Utterance(
            completion.token_ids, completion.actions, completion.log_probs, completion.versions,
            _as_float(completion.hidden_states),
        )  # fmt: skip

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
        return Request(list(ids), seed, temperature, top_k, max_new_tokens or rollout.max_new_tokens, actions)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, ids: Array) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _as_float(states: Array | None) -> Array:
    assert states is not None, "the engine was asked to keep them"
    if states.dtype == np.int16:  # bfloat16, which NumPy does not know
        return torch.from_numpy(states).view(torch.bfloat16).float().numpy()
    return states.astype(np.float32, copy=False)
