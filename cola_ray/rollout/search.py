"""Search over latent actions: PUCT, MCTS-Q; as controls, beam search and samples with the same scores and budget.

    root = prompt
      │ descend by PUCT to a node with an untried action (virtual loss: concurrent searchers avoid each other's paths)
      v
    node ── request: prompt + its tokens; first action forced to the i-th most probable, then the policy to the end
      │        the engine's prefix cache holds all but the node's last token: a child costs only its own tokens
      v
    child = the token that the action gave;  value = reward of the whole response;  back up along the path

A node is a sequence of tokens: actions determine the tokens, and states depend only on tokens. Two actions that give
the same token are one child, which then has two rollouts; where the policy also depends on the last action (learnt
ends), it goes on from the first of the two. If actions last n tokens, a child is all tokens of its action (n, or fewer
at an end), so that each node stands where an action is chosen. All problems, with several searchers each, share the
engine at the same time. The result so far is complete at any moment, so a budget may end a search anywhere.

MCTS-Q (the search that CoLA's authors released): where Q's temporal-difference error along a rollout is small, nothing
is decided, so the child is placed at the next state where the error is not small.

The scorer decides what "best response" means: a reward model's choice (best-of-n), or, if the verifier scores, an
oracle's (pass@n). The answer that most responses give needs no scores (self-consistency).

Every search keeps its :class:`Budget` exactly: the requested number of simulations, and never a token more than
allowed; rollouts under way when the time is up are dropped.
"""

import abc
import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cola_ray.algorithms.search import Value, ValueRange, majority, puct
from cola_ray.model.modeling_cola import RANKED
from cola_ray.rollout.engine import Completion, Request
from cola_ray.settings.config import SearchConfig

Array = np.ndarray
Complete = Callable[[Sequence[Request]], Awaitable[list[Completion]]]
Score = Callable[[Sequence[Array]], Awaitable[list[float]]]
"""(responses to one problem, each (L,) ids) -> their rewards; not finite where scoring failed."""
FirstDecision = Callable[[Completion, int], int]
"""(completion, length of its prompt) -> number of its tokens to skip until something is decided; at least 1."""
End = Literal["simulations", "tokens", "seconds", "exhausted"]
"""What ended a search: which budget ran out, or "exhausted" if nothing was left to try."""


@dataclass
class Node:
    """A prefix of the response, and statistics of the rollouts that went through it."""

    tokens: tuple[int, ...] = ()  # after the prompt
    action: int = -1  # the last one that led here, which may go on if the model's actions have learnt ends
    prior: float = 1.0  # the policy's probability of that action
    ended: bool = False  # by a stop token or the length limit: nothing can follow
    children: list["Node"] = field(default_factory=list)
    tried: int = 0  # number of actions tried, from the most probable on
    visits: int = 0  # rollouts, including those under way
    num_values: int = 0  # rollouts that have a value
    total_value: float = 0.0  # sum of the values


@dataclass
class SearchResult:
    """Results of a search of one problem; complete at any moment; empty if the time was up before any response."""

    responses: list[Array] = field(default_factory=list)  # (L,) ids each, in order of arrival
    actions: list[Array] = field(default_factory=list)  # (L,) each, -1 where an ancestor's rollout chose them
    rewards: list[float] = field(default_factory=list)  # not finite where scoring failed
    simulations: int = 0
    generated_tokens: int = 0  # not counting rollouts that were dropped when the time was up
    computed_tokens: int = 0  # including prompt tokens that no cache held
    seconds: float = 0.0
    ended_by: End = "simulations"

    @property
    def best(self) -> int:
        """Return the index of the best reward, the first of equals. Raises ValueError if nothing was found."""
        return int(np.argmax(self.rewards))

    def majority_answer(self, answer_of: Callable[[Array], Value | None]) -> Value | None:
        """Return the answer that most responses give (self-consistency); None if no answer can be read."""
        return majority([answer_of(response) for response in self.responses])


@dataclass(frozen=True)
class SearchProblem:
    """One prompt to search for responses to, with the engine and the scoring to use.

    Args:
        prompt: ids.
        max_new_tokens: length limit of a whole response.
        complete: runs requests on the engine.
        score: gives the rewards of responses.
        request: (prompt ids, seed, forced actions, new tokens, action before them or -1) -> a request with the run's
            sampling settings.
        num_actions: how many actions a state has; 0 if that is more than any breadth.
        action_every: tokens that an action lasts.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    complete: Complete
    score: Score
    request: Callable[[Sequence[int], int, Sequence[int], int, int], Request]
    num_actions: int = 0
    action_every: int = 1

    def breadth(self, config: SearchConfig, at_root: bool) -> int:
        """Return the number of actions to try in a state."""
        wanted = config.root_breadth if at_root else config.breadth
        return min(wanted, self.num_actions) if self.num_actions else wanted


class Budget:
    """The budget left to the search of one problem, and the share that its running rollouts have reserved.

    A rollout reserves as many tokens as it may generate, until it has ended. If fewer are left than it needs, it waits
    until others release their unused tokens; if no other is under way, it takes what is left and may be cut.

    Example: 100 tokens, responses of at most 40. Two rollouts start and reserve 80; the third waits. They end after 10
    and 15 tokens, so 75 are left: the third and the fourth do not fit together. With 30 left, one starts alone with 30.
    """

    def __init__(self, config: SearchConfig) -> None:
        self.simulations = config.simulations
        self.tokens: float = config.max_tokens or math.inf  # neither generated nor reserved
        self.seconds = config.max_seconds or None
        self.under_way = 0
        self.changed = asyncio.Condition()

    @property
    def spent(self) -> End | None:
        """Which budget has run out, if any, except for time. Reserved tokens count as left: some may be released."""
        if not self.simulations:
            return "simulations"
        return None if self.tokens > 0 or self.under_way else "tokens"

    async def room(self, tokens: int, ready: Callable[[], bool] = lambda: True) -> bool:
        """Wait until a rollout of so many tokens may start and ``ready()``, or until no rollout is under way.

        Returns False if no rollout may start any more. The caller must ``reserve`` before it awaits anything else.
        """
        async with self.changed:
            await self.changed.wait_for(lambda: self.spent or not self.under_way or (self.tokens >= tokens and ready()))
        return not self.spent

    def reserve(self, tokens: int) -> int:
        """Start a simulation with these tokens, or with as many as are left; returns their number."""
        granted = int(min(tokens, self.tokens))
        self.tokens -= granted
        self.simulations -= 1
        self.under_way += 1
        return granted

    async def release(self, tokens: int) -> None:
        """End a simulation that did not use these tokens."""
        async with self.changed:
            self.tokens += tokens
            self.under_way -= 1
            self.changed.notify_all()

    async def run_in_time(self, work: Iterable[Coroutine[Any, Any, None]]) -> bool:
        """Run all of the work; cancel unfinished coroutines when the time is up. Returns whether all were done."""
        tasks = [asyncio.ensure_future(one) for one in work]
        limit = asyncio.timeout(self.seconds)
        try:
            async with limit:
                await asyncio.gather(*tasks)
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return not limit.expired()


class _Search(abc.ABC):
    """A search of one problem under a budget; subclasses define how.

    Args:
        config: breadths and budgets.
    """

    def __init__(self, config: SearchConfig, problem: SearchProblem) -> None:
        self.config, self.problem = config, problem
        self.budget, self.found = Budget(config), SearchResult()

    async def run(self) -> SearchResult:
        """Search until a budget runs out or nothing is left to try; ``SearchResult.ended_by`` says which."""
        started = time.perf_counter()
        in_time = await self.budget.run_in_time(self._work())
        self.found.ended_by = (self.budget.spent or "exhausted") if in_time else "seconds"
        await self._finish()
        self.found.seconds = time.perf_counter() - started
        return self.found

    @abc.abstractmethod
    def _work(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Return the coroutines that run concurrently until the time is up."""

    async def _finish(self) -> None:  # noqa: B027  # a tree has nothing left to do
        """Complete the result, once all work is done or the time is up."""

    def _count(self, made: Completion) -> None:
        self.found.generated_tokens += len(made.token_ids)
        self.found.computed_tokens += made.computed_tokens


class TreeSearch(_Search):
    """PUCT from one prompt.

    Args:
        first_decision: for MCTS-Q; without it, every child is one token long.
    """

    def __init__(
        self, config: SearchConfig, problem: SearchProblem, first_decision: FirstDecision | None = None
    ) -> None:
        super().__init__(config, problem)
        self.first_decision = first_decision
        self.root, self.values = Node(), ValueRange()
        self.num_started = 0  # simulations

    def _work(self) -> Iterable[Coroutine[Any, Any, None]]:
        return (self._searcher() for _ in range(self.config.searchers))

    async def _searcher(self) -> None:
        longest = self.problem.max_new_tokens
        while await self.budget.room(longest, lambda: self._is_open(self.root)):
            path = self._descend()
            if path is None:
                return
            await self._simulate(path)

    async def _simulate(self, path: list[Node]) -> None:
        """Roll out from a new child of the path's last node, and back its value up."""
        node, problem = path[-1], self.problem
        rank, node.tried = node.tried, node.tried + 1
        self.num_started += 1
        for one in path:
            one.visits += 1
        left = problem.max_new_tokens - len(node.tokens)
        granted = self.budget.reserve(left)
        ids = [*problem.prompt, *node.tokens]
        request = problem.request(ids, self.num_started, [RANKED - rank], granted, node.action)
        (made,) = await problem.complete([request])
        self._count(made)
        cut = made.truncated and len(made.token_ids) == granted < left  # by the budget, not by the length limit
        if not cut or not self.found.responses:  # a cut response counts only if there is no other
            await self._back_up(path, made)
        await self.budget.release(granted - len(made.token_ids))

    async def _back_up(self, path: list[Node], made: Completion) -> None:
        """Score a rollout and add its value along the path. A rollout without a value counts as the lowest seen."""
        node = path[-1]
        response = np.array([*node.tokens, *made.token_ids], np.int64)
        (value,) = await self.problem.score([response])
        child = self._place(node, made)
        child.visits += 1
        self.values.add(value)
        if math.isfinite(value):
            for one in (*path, child):
                one.num_values += 1
                one.total_value += value
        found = self.found
        found.responses.append(response)
        found.actions.append(np.concatenate([np.full(len(node.tokens), -1, np.int64), made.actions]))
        found.rewards.append(value)
        found.simulations += 1

    def _descend(self) -> list[Node] | None:
        """Return the path from the root to a node with an untried action; None if there is none."""
        path = [self.root]
        while not self._can_grow(path[-1]):
            node = path[-1]
            open_children = [child for child in node.children if self._is_open(child)]
            if not open_children:
                return None
            path.append(max(open_children, key=lambda child: self._priority(child, node.visits)))
        return path

    def _priority(self, child: Node, parent_visits: int) -> float:
        """Return PUCT's score, rounded so that the last bits of sums do not decide between equals."""
        total = self.values.scaled(child.total_value, child.num_values)
        return round(puct(total, child.visits, child.prior, parent_visits, self.config.c_puct), 9)

    def _can_grow(self, node: Node) -> bool:
        breadth = self.problem.breadth(self.config, at_root=not node.tokens)
        return not node.ended and node.tried < breadth and len(node.tokens) < self._depth()

    def _is_open(self, node: Node) -> bool:
        return self._can_grow(node) or any(self._is_open(child) for child in node.children)

    def _depth(self) -> int:
        return min(self.config.depth, self.problem.max_new_tokens)

    def _place(self, node: Node, made: Completion) -> Node:
        """Return the child with which a rollout began; if a child with its first tokens exists, add the prior to it."""
        length = len(made.token_ids)
        prompt_length = len(self.problem.prompt) + len(node.tokens)
        every = self.problem.action_every
        skipped = 1 if self.first_decision is None else self.first_decision(made, prompt_length)
        skipped = min(max(skipped, every), length)
        prior = float(np.exp(made.log_probs[0]))
        first = tuple(made.token_ids[:every].tolist())
        for child in node.children:
            if child.tokens[len(node.tokens) :][:every] == first:
                child.prior += prior
                return child
        tokens = (*node.tokens, *(int(token) for token in made.token_ids[:skipped]))
        child = Node(tokens, int(made.actions[skipped - 1]), prior, ended=skipped == length)
        node.children.append(child)
        return child


class BestOf(_Search):
    """``simulations`` sampled responses, scored when all have ended, in the order of their seeds.

    Best-of-n, pass@n and self-consistency choose from them.
    """

    def __init__(self, config: SearchConfig, problem: SearchProblem) -> None:
        super().__init__(config, problem)
        self.made: dict[int, Completion] = {}

    def _work(self) -> Iterable[Coroutine[Any, Any, None]]:
        return (self._draw(number) for number in range(self.config.simulations))

    async def _draw(self, number: int) -> None:
        """Sample one response. Draws pass ``room`` in order, so which ones fit depends on lengths alone."""
        problem = self.problem
        if not await self.budget.room(problem.max_new_tokens):
            return
        granted = self.budget.reserve(problem.max_new_tokens)
        (made,) = await problem.complete([problem.request(problem.prompt, number, (), granted, -1)])
        self._count(made)
        cut = made.truncated and len(made.token_ids) == granted < problem.max_new_tokens
        if not cut or not self.made:
            self.made[number] = made
        await self.budget.release(granted - len(made.token_ids))

    async def _finish(self) -> None:
        found, made = self.found, [self.made[number] for number in sorted(self.made)]
        found.responses, found.actions = [one.token_ids for one in made], [one.actions for one in made]
        found.rewards = list(await self.problem.score(found.responses)) if made else []
        found.simulations = len(made)


class BeamSearch(_Search):
    """The ``simulations`` most probable responses that a beam finds, scored when all have ended.

    Each step tries the ``breadth`` most probable actions after every open prefix. A response's probability is summed
    over the tried actions that give its tokens. A step that exceeds the budget is not made, and prefixes still open
    then count as responses only if none has ended.
    """

    def __init__(self, config: SearchConfig, problem: SearchProblem) -> None:
        super().__init__(config, problem)
        self.ended: dict[tuple[int, ...], float] = {}
        self.open: dict[tuple[int, ...], float] = {(): 0.0}
        self.last: dict[tuple[int, ...], int] = {(): -1}  # the action that gave each prefix's last token
        self.out_of_tokens = False

    def _work(self) -> Iterable[Coroutine[Any, Any, None]]:
        return [self._grow()]

    async def _grow(self) -> None:
        at_root = True
        while self.open:
            ranks = range(self.problem.breadth(self.config, at_root))
            tries = [(prefix, rank) for prefix in self.open for rank in ranks]
            # All open prefixes have the same length: each step adds the same number of tokens to all.
            left = int(min(len(tries), self.budget.tokens / self._longest(tries[0][0])))
            if left < len(tries):
                self.out_of_tokens = True
                if not at_root or not left:
                    return
            await self._step(tries[:left])
            at_root = False

    def _longest(self, prefix: tuple[int, ...]) -> int:
        """Most tokens that the next action may give."""
        return min(self.problem.action_every, self.problem.max_new_tokens - len(prefix))

    async def _step(self, tries: Sequence[tuple[tuple[int, ...], int]]) -> None:
        problem = self.problem
        made = await problem.complete([
            problem.request([*problem.prompt, *prefix], 0, [RANKED - rank], self._longest(prefix), self.last[prefix])
            for prefix, rank in tries
        ])  # fmt: skip
        grown: dict[tuple[int, ...], float] = {}
        stopped: dict[tuple[int, ...], float] = dict(self.ended)
        for (prefix, _), one in zip(tries, made, strict=True):
            longer = (*prefix, *one.token_ids.tolist())
            score = self.open[prefix] + float(one.log_probs[0])
            self.last.setdefault(longer, int(one.actions[-1]))
            target = stopped if not one.truncated or len(longer) == problem.max_new_tokens else grown
            target[longer] = float(np.logaddexp(target.get(longer, -np.inf), score))
            self.budget.tokens -= len(one.token_ids)
            self._count(one)
        kept = sorted({**grown, **stopped}.items(), key=lambda item: -item[1])[: self.config.simulations]
        self.ended = {prefix: score for prefix, score in kept if prefix in stopped}
        self.open = {prefix: score for prefix, score in kept if prefix in grown}

    async def _finish(self) -> None:
        found, beam = self.found, self.ended or {prefix: score for prefix, score in self.open.items() if prefix}
        found.responses = [np.array(prefix, np.int64) for prefix, _ in sorted(beam.items(), key=lambda item: -item[1])]
        found.actions = [np.full(len(response), -1, np.int64) for response in found.responses]
        found.rewards = list(await self.problem.score(found.responses)) if found.responses else []
        found.simulations = len(found.responses)
        if found.ended_by != "seconds":
            whole = found.simulations == self.config.simulations
            found.ended_by = "tokens" if self.out_of_tokens else "simulations" if whole else "exhausted"
