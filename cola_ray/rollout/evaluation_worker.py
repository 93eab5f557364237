"""The rollout actor of evaluations: every way to answer a problem, with the same engine and the same verifier.

    greedy   the policy's most probable action at every step
    base     the bare base, greedily
    sample   search.simulations completions, sampled as in training
    beam     search.simulations completions, the most probable that a beam search finds
    mcts     search.simulations completions from a tree search
    mcts_q   the same from MCTS-Q, which skips states where nothing is decided

A reward model, if there is one, guides searches and chooses among responses; the verifier says which are right.
"""

import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cola_ray.algorithms.double_q import first_decision, square_errors
from cola_ray.model.modeling_cola import QHead
from cola_ray.rollout.engine import Completion, Request, as_float
from cola_ray.rollout.reward_model import RewardFunction, score_with
from cola_ray.rollout.reward_process import Reward
from cola_ray.rollout.search import BeamSearch, BestOf, End, SearchProblem, SearchResult, TreeSearch
from cola_ray.rollout.worker import RolloutWorker
from cola_ray.settings.config import Config, override
from cola_ray.tasks.chat import as_text

Array = np.ndarray
_EVALUATION = 1 << 41  # keeps these draws' seeds apart from training's


@dataclass(frozen=True)
class AnsweredProblem:
    """All responses to one problem in one way of answering; lists have one entry per response."""

    index: int
    question: str
    prompt_ids: list[int]
    texts: list[str]
    token_ids: list[list[int]]
    actions: list[list[int]]  # -1 where another response's rollout chose them
    values: list[float]  # scores by which responses are chosen: the reward model's or the verifier's; -inf if it failed
    rewards: list[float]  # the verifier's; 0 if it failed
    answers: list[str]  # each response's final answer, the same text for equal values; "" where it cannot be read
    generated_tokens: int
    computed_tokens: int
    seconds: float
    failures: list[str] = field(default_factory=list)  # why the verifier failed; "" where it did not
    ended_by: End = "simulations"


class EvaluationWorker(RolloutWorker):
    """Answers problems of ``eval.split``, numbered among those whose prompts fit.

    Args:
        chooser: scores responses within searches, and chooses among them, instead of the verifier.
    """

    def __init__(self, config: Config, model_path: str, chooser: RewardFunction | None = None) -> None:
        with_q = "mcts_q" in config.eval.ways
        super().__init__(override(config, {"rl.cache_hidden_states": with_q}), model_path)
        self.chooser, self.split = chooser, config.eval.split
        self.q = QHead.open(Path(config.q.path) / "q.safetensors") if with_q else None
        self.ways: dict[str, Callable[[int, list[int]], Awaitable[SearchResult]]] = {
            "greedy": self._greedy, "base": self._base, "sample": self._sample, "beam": self._beam, "mcts": self._mcts,
            "mcts_q": self._mcts_q,
        }  # fmt: skip

    async def answer(self, indices: Sequence[int], way: str) -> list[AnsweredProblem]:
        """Answer problems in one of the ways above; results in order. All of them are in the engine at once."""
        return await asyncio.gather(*(self._answer(self.fitting[self.split][place], way) for place in indices))

    async def _answer(self, index: int, way: str) -> AnsweredProblem:
        prompt = self.prompts[self.split][index]
        found = await self.ways[way](index, prompt)
        texts = [self.endings.text(response) for response in found.responses]
        if self.chooser is None:
            scored = [Reward(value) if math.isfinite(value) else Reward(0.0, "not scored") for value in found.rewards]
        else:
            scored = await self._score(self.split, [index] * len(texts), texts)
        return AnsweredProblem(
            index, as_text(self.task.problems(self.split)[index].question), list(prompt), texts,
            [response.tolist() for response in found.responses], [actions.tolist() for actions in found.actions],
            found.rewards, [reward.value for reward in scored], await asyncio.to_thread(self.rewards.answers, texts),
            found.generated_tokens, found.computed_tokens, found.seconds, [reward.failure for reward in scored],
            found.ended_by,
        )  # fmt: skip

    async def _greedy(self, index: int, prompt: list[int]) -> SearchResult:
        return await self._complete(index, self._greedy_request(prompt))

    async def _base(self, index: int, prompt: list[int]) -> SearchResult:
        return await self._complete(index, self._greedy_request(prompt, bare_base=True))

    async def _sample(self, index: int, prompt: list[int]) -> SearchResult:
        return await BestOf(self.config.search, self._problem(index, prompt)).run()

    async def _beam(self, index: int, prompt: list[int]) -> SearchResult:
        return await BeamSearch(self.config.search, self._problem(index, prompt)).run()

    async def _mcts(self, index: int, prompt: list[int]) -> SearchResult:
        return await TreeSearch(self.config.search, self._problem(index, prompt)).run()

    async def _mcts_q(self, index: int, prompt: list[int]) -> SearchResult:
        return await TreeSearch(self.config.search, self._problem(index, prompt), self._first_decision).run()

    @torch.inference_mode()
    def _first_decision(self, made: Completion, prompt_length: int) -> int:
        """Return how many of a rollout's tokens to skip until Q's temporal-difference error shows a decision."""
        assert self.q is not None
        assert made.hidden_states is not None
        config, states = self.config.q, torch.from_numpy(as_float(made.hidden_states))
        errors = square_errors(self.q(states[prompt_length - 1 :]), torch.from_numpy(made.actions), config.gamma)
        return first_decision(errors, config.max_error, config.jump)

    async def _complete(self, index: int, request: Request) -> SearchResult:
        started = time.perf_counter()
        (made,) = await self.batch.complete([request])
        found = SearchResult([made.token_ids], [made.actions], simulations=1)
        found.rewards = await self._values(index, found.responses)
        found.generated_tokens, found.computed_tokens = len(made.token_ids), made.computed_tokens
        found.seconds = time.perf_counter() - started
        return found

    def _problem(self, index: int, prompt: list[int]) -> SearchProblem:
        rollout = self.config.rollout

        def request(ids: Sequence[int], number: int, actions: Sequence[int], new_tokens: int, held: int) -> Request:
            seed = self._seed(_EVALUATION, index, number)
            prefix = len(ids) - len(prompt)
            return self._sampled(
                ids, seed, new_tokens, actions=actions, stop=self.endings.strings, response_prefix=prefix, held=held
            )

        score = functools.partial(self._values, index)
        kept = min(rollout.top_k or self.num_actions, self.num_actions)
        every = self.config.model.action_every
        return SearchProblem(prompt, rollout.max_new_tokens, self.batch.complete, score, request, kept, every)

    async def _values(self, index: int, responses: Sequence[Array]) -> list[float]:
        """Return the values that searches maximise: the chooser's scores or the verifier's rewards; -inf on failure."""
        texts, indices = [self.endings.text(one) for one in responses], [index] * len(responses)
        if self.chooser is None:
            scored = await self._score(self.split, indices, texts)
        else:
            question = self.task.problems(self.split)[index].question
            scored = await score_with(self.chooser, [question] * len(texts), texts)
        return [-math.inf if reward.failure else reward.value for reward in scored]
