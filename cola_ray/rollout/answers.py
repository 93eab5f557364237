"""The rollout actor of evaluations: every way to answer a problem, with the same engine and the same verifier.

greedy       the policy's most probable action at every step
base         the bare base, greedily
sample       search.simulations completions, drawn as in training
beam         as many, the most probable that a beam finds
mcts         as many, from a tree search
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cola_ray.config import Config
from cola_ray.model.action_columns import BASE_TOKENS
from cola_ray.rollout.engine import Request
from cola_ray.rollout.search import Found, TreeSearch, beam
from cola_ray.rollout.worker import RolloutWorker
from cola_ray.tasks import render_prompt

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
        question = self.task.problems("heldout")[index].question
        prompt = render_prompt(self.tokenizer, question)[-self.config.rollout.max_prompt_tokens :]
        found = await self.ways[way](index, prompt)
        texts = self._decoded(found.responses)
        answer_of = getattr(self.task, "answer_of", str.strip)
        return Answered(
            index, question, texts, [response.tolist() for response in found.responses],
            [actions.tolist() for actions in found.actions], found.rewards, [answer_of(text) for text in texts],
            found.generated_tokens, found.computed_tokens, found.seconds,
        )  # fmt: skip

    async def _greedy(self, index: int, prompt: list[int]) -> Found:
        return await self._complete(index, [self._asked(prompt, 0.0)])

    async def _base(self, index: int, prompt: list[int]) -> Found:
        limit = self.config.rollout.max_new_tokens
        actions = [BASE_TOKENS] * limit if self.latent else []
        return await self._complete(index, [Request(prompt, 0, 0.0, 0, limit, actions)])

    async def _sample(self, index: int, prompt: list[int]) -> Found:
        temperature = self.config.rollout.temperature
        count = self.config.search.simulations
        seeds = [self._seed(_ANSWERS, index, sample) for sample in range(count)]
        return await self._complete(index, [self._asked(prompt, temperature, seed) for seed in seeds])

    async def _beam(self, index: int, prompt: list[int]) -> Found:
        return await beam(
            self.config.search, prompt, self.batch.complete, self._judge_of(index), self._request_of(index),
            self.config.rollout.max_new_tokens,
        )  # fmt: skip

    async def _mcts(self, index: int, prompt: list[int]) -> Found:
        search = TreeSearch(
            self.config.search, prompt, self.batch.complete, self._judge_of(index), self._request_of(index),
            self.config.rollout.max_new_tokens,
        )  # fmt: skip
        return await search.run()

    async def _complete(self, index: int, requests: Sequence[Request]) -> Found:
        started = asyncio.get_running_loop().time()
        made = await self.batch.complete(requests)
        found = Found([one.token_ids for one in made], [one.actions for one in made], simulations=len(made))
        found.rewards = await self._judge_of(index)(found.responses)
        found.generated_tokens = sum(len(one.token_ids) for one in made)
        found.computed_tokens = sum(one.computed_tokens for one in made)
        found.seconds = asyncio.get_running_loop().time() - started
        return found

    def _asked(self, prompt: list[int], temperature: float, seed: int = 0) -> Request:
        top_k = self.config.rollout.top_k if temperature else 0
        return Request(prompt, seed, temperature, top_k, self.config.rollout.max_new_tokens)

    def _request_of(self, index: int) -> Callable[[Sequence[int], int, Sequence[int], int], Request]:
        rollout = self.config.rollout

        def request(ids: Sequence[int], number: int, actions: Sequence[int], new_tokens: int) -> Request:
            seed = self._seed(_ANSWERS, index, number)
            return Request(ids, seed, rollout.temperature, rollout.top_k, new_tokens, actions)

        return request

    def _judge_of(self, index: int) -> Callable[[Sequence[Array]], Awaitable[list[float]]]:
        async def judge(responses: Sequence[Array]) -> list[float]:
            scored = await self._score("heldout", [index] * len(responses), self._decoded(responses))
            return [reward.value for reward in scored]

        return judge

    def _decoded(self, responses: Sequence[Array]) -> list[str]:
        return [self.tokenizer.decode(response, skip_special_tokens=True) for response in responses]
