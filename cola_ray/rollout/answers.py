"""The rollout actor of evaluations: every way to answer a problem, with the same engine and the same verifier.

greedy       the policy's most probable action at every step
base         the bare base, greedily
sample       search.simulations completions, drawn as in training
beam         as many, the most probable that a beam finds
mcts         as many, from a tree search
"""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cola_ray.config import Config
from cola_ray.rollout.engine import Request
from cola_ray.rollout.search import Found, Question, TreeSearch, beam
from cola_ray.rollout.worker import RolloutWorker

Array = np.ndarray
_ANSWERS = 1 << 41  # so that no draw here is one of training


@dataclass(frozen=True)
class Answered:
    """All responses that one way of answering gave to one problem."""

    index: int
    question: str
    texts: list[str]
    token_ids: list[list[int]]
    actions: list[list[int]]  # -1 where another response's rollout chose them
    rewards: list[float]
    answers: list[str]  # what each response commits to, in the task's words
    generated_tokens: int
    computed_tokens: int
    seconds: float


class AnswerWorker(RolloutWorker):
    """Answers held-out problems."""

    def __init__(self, config: Config, model_path: str) -> None:
        super().__init__(config, model_path)
        self.ways: dict[str, Callable[[int, list[int]], Awaitable[Found]]] = {
            "greedy": self._greedy, "base": self._base, "sample": self._sample, "beam": self._beam, "mcts": self._mcts,
        }  # fmt: skip

    async def answer(self, indices: Sequence[int], way: str) -> list[Answered]:
        """Problems by their index, in order; all of them are in the engine at once."""
        return await asyncio.gather(*(self._answer(index, way) for index in indices))

    async def _answer(self, index: int, way: str) -> Answered:
        found = await self.ways[way](index, self._heldout_prompt(index))
        texts = self._texts(found.responses)
        answer_of = getattr(self.task, "answer_of", str.strip)
        return Answered(
            index, self.task.problems("heldout")[index].question, texts,
            [response.tolist() for response in found.responses], [actions.tolist() for actions in found.actions],
            found.rewards, [answer_of(text) for text in texts], found.generated_tokens, found.computed_tokens,
            found.seconds,
        )  # fmt: skip

    async def _greedy(self, index: int, prompt: list[int]) -> Found:
        return await self._complete(index, [self._greedy_request(prompt)])

    async def _base(self, index: int, prompt: list[int]) -> Found:
        return await self._complete(index, [self._greedy_request(prompt, bare_base=True)])

    async def _sample(self, index: int, prompt: list[int]) -> Found:
        count = self.config.search.simulations
        seeds = [self._seed(_ANSWERS, index, sample) for sample in range(count)]
        return await self._complete(index, [self._request(prompt, seed, greedy=False) for seed in seeds])

    async def _beam(self, index: int, prompt: list[int]) -> Found:
        return await beam(self.config.search, self._question(index, prompt))

    async def _mcts(self, index: int, prompt: list[int]) -> Found:
        return await TreeSearch(self.config.search, self._question(index, prompt)).run()

    async def _complete(self, index: int, requests: Sequence[Request]) -> Found:
        started = time.perf_counter()
        made = await self.batch.complete(requests)
        found = Found([one.token_ids for one in made], [one.actions for one in made], simulations=len(made))
        found.rewards = await self._judge(index, found.responses)
        found.generated_tokens = sum(len(one.token_ids) for one in made)
        found.computed_tokens = sum(one.computed_tokens for one in made)
        found.seconds = time.perf_counter() - started
        return found

    def _question(self, index: int, prompt: list[int]) -> Question:
        rollout = self.config.rollout

        def request(ids: Sequence[int], number: int, actions: Sequence[int], new_tokens: int) -> Request:
            seed = self._seed(_ANSWERS, index, number)
            return Request(ids, seed, rollout.temperature, rollout.top_k, new_tokens, actions)

        judge = functools.partial(self._judge, index)
        return Question(prompt, rollout.max_new_tokens, self.batch.complete, judge, request)

    async def _judge(self, index: int, responses: Sequence[Array]) -> list[float]:
        scored = await self._score("heldout", [index] * len(responses), self._texts(responses))
        return [reward.value for reward in scored]
