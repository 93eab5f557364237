"""Search over latent actions: PUCT, MCTS-Q, and beam and best-of-n with the same verifier and budget as controls.

    root = prompt
      │ descend by PUCT to a node with an action not tried yet (virtual loss: the next searcher goes elsewhere)
      v
    node ── request: prompt + its tokens, first action forced to the i-th most probable, then the policy to the end
      │        the engine's prefix cache holds all but the node's last token: a child costs its own tokens
      v
    child = the token that the action gave;  value = reward of the whole response;  back up along the path

A node is a sequence of tokens: given its actions they are certain, and states depend on tokens alone. Two actions that
give the same token are one child, which then has two rollouts. All problems and several searchers a problem are in the
engine at the same time. What has been found at any moment is an answer: budgets may end a search anywhere.

MCTS-Q (CoLA's released search): where Q's temporal-difference error along the rollout is small nothing is decided, and
the child is put where it next is not.

Budgets (:class:`Budget`) are kept exactly, whoever searches: as many simulations as asked for, never a token more than
allowed, and what is under way when the time is up is dropped.
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
Judge = Callable[[Sequence[Array]], Awaitable[list[float]]]
"""(responses of one problem, each (L,) ids) -> their rewards; not finite where there is none."""
Forks = Callable[[Completion, int], int]
"""(completion, length of its prompt) -> how many of its tokens to pass before something is decided; at least 1."""
End = Literal["simulations", "tokens", "seconds", "exhausted"]
"""What ended a search: a budget, or there was nothing left to try."""


@dataclass
class Node:
    """A prefix of the response, and what is known of what follows it."""

    tokens: tuple[int, ...] = ()  # after the prompt
    prior: float = 1.0  # of the action that led here, under the policy
    ended: bool = False  # by a stop token or the budget: nothing follows
    children: list["Node"] = field(default_factory=list)
    tried: int = 0  # actions, from the most probable on
    visits: int = 0  # with those under way
    judged: int = 0  # those with a value
    total: float = 0.0  # of the values


@dataclass
class Found:
    """What a search of one problem came to; complete at any moment. Empty where the time was up before any answer."""

    responses: list[Array] = field(default_factory=list)  # (L,) ids each, in order of arrival
    actions: list[Array] = field(default_factory=list)  # (L,) each, -1 where an ancestor's rollout chose them
    rewards: list[float] = field(default_factory=list)  # not finite where there is none
    simulations: int = 0
    generated_tokens: int = 0  # without those of rollouts that were dropped when the time was up
    computed_tokens: int = 0  # with prompts, as far as no cache held them
    seconds: float = 0.0
    ended_by: End = "simulations"

    @property
    def best(self) -> int:
        """Of the best reward; of equals, the first that was found. ValueError where nothing was found."""
        return int(np.argmax(self.rewards))

    def voted(self, answer_of: Callable[[Array], Value | None]) -> Value | None:
        """The answer that most responses give; None where none can be read."""
        return majority([answer_of(response) for response in self.responses])


@dataclass(frozen=True)
class Question:
    """What is to be answered, and by whom.

    Args:
        max_new_tokens: of a whole response.
        complete: the engine.
        judge: a response's value.
        request: (prompt ids, seed, forced actions, new tokens) -> a request of the run's sampling.
        num_actions: that there are to try in a state; 0 where that is more than any breadth.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    complete: Complete
    judge: Judge
    request: Callable[[Sequence[int], int, Sequence[int], int], Request]
    num_actions: int = 0

    def breadth(self, config: SearchConfig, at_root: bool) -> int:
        """Actions to try in a state."""
        wanted = config.root_breadth if at_root else config.breadth
        return min(wanted, self.num_actions) if self.num_actions else wanted


class Budget:
    """What the search of one problem may still use, and what its rollouts under way hold of that.

    A rollout holds as many tokens as it may generate until it has ended. Where fewer are left than it wants, it waits
    until others give back what they did not need; when no other is under way it gets what there is, and may be cut.

    Example, 100 tokens, responses of at most 40: two rollouts start and hold 80, the third waits. They end after 10 and
    15 tokens: 75 are left, and the third and the fourth do not fit together. With 30 left one starts alone, with 30.
    """

    def __init__(self, config: SearchConfig) -> None:
        self.simulations = config.simulations
        self.tokens: float = config.max_tokens or math.inf  # not generated yet, and held by nobody
        self.seconds = config.max_seconds or None
        self.under_way = 0
        self.changed = asyncio.Condition()

    @property
    def spent(self) -> End | None:
        """What is used up, of that which can be before the time is; tokens that are held may come back."""
        if not self.simulations:
            return "simulations"
        return None if self.tokens > 0 or self.under_way else "tokens"

    async def room(self, tokens: int, ready: Callable[[], bool] = lambda: True) -> bool:
        """Wait until a rollout of so many tokens may start and ``ready``, or nothing under way can bring that about.

        False where no rollout may start any more. What follows must ``hold`` before it awaits anything.
        """
        async with self.changed:
            await self.changed.wait_for(lambda: self.spent or not self.under_way or (self.tokens >= tokens and ready()))
        return not self.spent

    def hold(self, tokens: int) -> int:
        """Start a simulation with these tokens, or with what there is."""
        granted = int(min(tokens, self.tokens))
        self.tokens -= granted
        self.simulations -= 1
        self.under_way += 1
        return granted

    async def give_back(self, tokens: int) -> None:
        """One has ended and did not need these tokens."""
        async with self.changed:
            self.tokens += tokens
            self.under_way -= 1
            self.changed.notify_all()

    async def while_time_lasts(self, work: Iterable[Coroutine[Any, Any, None]]) -> bool:
        """Run all of it, and drop what is not done when the time is up; whether it was done in time."""
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
    """What all ways have in common: a question, a budget, and what was found.

    Args:
        config: breadths and budgets.
    """

    def __init__(self, config: SearchConfig, question: Question) -> None:
        self.config, self.question = config, question
        self.budget, self.found = Budget(config), Found()

    async def run(self) -> Found:
        """Search until a budget is used up, or nothing is left to try; ``Found.ended_by`` says which."""
        started = time.perf_counter()
        in_time = await self.budget.while_time_lasts(self._work())
        self.found.ended_by = (self.budget.spent or "exhausted") if in_time else "seconds"
        await self._finish()
        self.found.seconds = time.perf_counter() - started
        return self.found

    @abc.abstractmethod
    def _work(self) -> Iterable[Coroutine[Any, Any, None]]:
        """What runs at the same time, until the time is up."""

    async def _finish(self) -> None:  # noqa: B027  # a tree has nothing left to do
        """What comes after that."""

    def _count(self, made: Completion) -> None:
        self.found.generated_tokens += len(made.token_ids)
        self.found.computed_tokens += made.computed_tokens


class TreeSearch(_Search):
    """PUCT from one prompt.

    Args:
        forks: for MCTS-Q; without, every child is one token long.
    """

    def __init__(self, config: SearchConfig, question: Question, forks: Forks | None = None) -> None:
        super().__init__(config, question)
        self.forks = forks
        self.root, self.values = Node(), ValueRange()
        self.begun = 0  # simulations

    def _work(self) -> Iterable[Coroutine[Any, Any, None]]:
        return (self._searcher() for _ in range(self.config.searchers))

    async def _searcher(self) -> None:
        longest = self.question.max_new_tokens
        while await self.budget.room(longest, lambda: self._is_open(self.root)):
            path = self._descend()
            if path is None:
                return
            await self._simulate(path)

    async def _simulate(self, path: list[Node]) -> None:
        """One rollout from a new child of the path's end, backed up."""
        node, asked = path[-1], self.question
        rank, node.tried = node.tried, node.tried + 1
        self.begun += 1
        for one in path:
            one.visits += 1
        left = asked.max_new_tokens - len(node.tokens)
        granted = self.budget.hold(left)
        ids = [*asked.prompt, *node.tokens]
        (made,) = await asked.complete([asked.request(ids, self.begun, [RANKED - rank], granted)])
        self._count(made)
        cut = made.truncated and len(made.token_ids) == granted < left  # by the budget, before its end
        if not cut or not self.found.responses:  # half an answer counts where there is no other
            await self._value(path, made)
        await self.budget.give_back(granted - len(made.token_ids))

    async def _value(self, path: list[Node], made: Completion) -> None:
        """Judge a rollout and back its value up; one without a value counts as the least."""
        node = path[-1]
        response = np.array([*node.tokens, *made.token_ids], np.int64)
        (value,) = await self.question.judge([response])
        child = self._place(node, made)
        child.visits += 1
        self.values.add(value)
        if math.isfinite(value):
            for one in (*path, child):
                one.judged += 1
                one.total += value
        found = self.found
        found.responses.append(response)
        found.actions.append(np.concatenate([np.full(len(node.tokens), -1, np.int64), made.actions]))
        found.rewards.append(value)
        found.simulations += 1

    def _descend(self) -> list[Node] | None:
        """From the root to a node with an action to try; None where no path leads to one."""
        path = [self.root]
        while not self._can_grow(path[-1]):
            node = path[-1]
            open_children = [child for child in node.children if self._is_open(child)]
            if not open_children:
                return None
            path.append(max(open_children, key=lambda child: self._score(child, node.visits)))
        return path

    def _score(self, child: Node, parent_visits: int) -> float:
        """Rounded, so that the last bits of sums do not decide between equals."""
        total = self.values.scaled(child.total, child.judged)
        return round(puct(total, child.visits, child.prior, parent_visits, self.config.c_puct), 9)

    def _can_grow(self, node: Node) -> bool:
        breadth = self.question.breadth(self.config, at_root=not node.tokens)
        return not node.ended and node.tried < breadth and len(node.tokens) < self._depth()

    def _is_open(self, node: Node) -> bool:
        return self._can_grow(node) or any(self._is_open(child) for child in node.children)

    def _depth(self) -> int:
        return min(self.config.depth, self.question.max_new_tokens)

    def _place(self, node: Node, made: Completion) -> Node:
        """The child that a rollout began with; an action that gives a known child's token adds to that one."""
        length = len(made.token_ids)
        passed = 1 if self.forks is None else self.forks(made, len(self.question.prompt) + len(node.tokens))
        passed = min(max(passed, 1), length)
        prior = float(np.exp(made.log_probs[0]))
        first = int(made.token_ids[0])
        for child in node.children:
            if child.tokens[len(node.tokens)] == first:
                child.prior += prior
                return child
        tokens = (*node.tokens, *(int(token) for token in made.token_ids[:passed]))
        child = Node(tokens, prior, ended=passed == length)
        node.children.append(child)
        return child


class BestOf(_Search):
    """As many responses as ``simulations``, drawn by chance; judged at their end, in the order of their seeds."""

    def __init__(self, config: SearchConfig, question: Question) -> None:
        super().__init__(config, question)
        self.made: dict[int, Completion] = {}

    def _work(self) -> Iterable[Coroutine[Any, Any, None]]:
        return (self._draw(number) for number in range(self.config.simulations))

    async def _draw(self, number: int) -> None:
        """They come to ``room`` in their order, and leave it so: which ones fit depends on their lengths alone."""
        if not await self.budget.room(self.question.max_new_tokens):
            return
        granted = self.budget.hold(self.question.max_new_tokens)
        asked = self.question
        (made,) = await asked.complete([asked.request(asked.prompt, number, (), granted)])
        self._count(made)
        cut = made.truncated and len(made.token_ids) == granted < asked.max_new_tokens
        if not cut or not self.made:
            self.made[number] = made
        await self.budget.give_back(granted - len(made.token_ids))

    async def _finish(self) -> None:
        found, made = self.found, [self.made[number] for number in sorted(self.made)]
        found.responses, found.actions = [one.token_ids for one in made], [one.actions for one in made]
        found.rewards = list(await self.question.judge(found.responses)) if made else []
        found.simulations = len(made)


class BeamSearch(_Search):
    """As many responses as ``simulations``, the most probable that a beam finds; judged at their end.

    Each step tries the ``breadth`` most probable actions after every open prefix. A response's probability is the sum
    over the actions that give its tokens, of those that were tried. A step that the budget does not hold is not made,
    and prefixes that are still open then are answers only where nothing has ended.
    """

    def __init__(self, config: SearchConfig, question: Question) -> None:
        super().__init__(config, question)
        self.ended: dict[tuple[int, ...], float] = {}
        self.open: dict[tuple[int, ...], float] = {(): 0.0}
        self.out_of_tokens = False

    def _work(self) -> Iterable[Coroutine[Any, Any, None]]:
        return [self._grow()]

    async def _grow(self) -> None:
        at_root = True
        while self.open:
            ranks = range(self.question.breadth(self.config, at_root))
            tries = [(prefix, rank) for prefix in self.open for rank in ranks]
            left = int(min(len(tries), self.budget.tokens))
            if left < len(tries):
                self.out_of_tokens = True
                if not at_root or not left:
                    return
            await self._step(tries[:left])
            at_root = False

    async def _step(self, tries: Sequence[tuple[tuple[int, ...], int]]) -> None:
        asked = self.question
        made = await asked.complete(
            [asked.request([*asked.prompt, *prefix], 0, [RANKED - rank], 1) for prefix, rank in tries]
        )
        grown: dict[tuple[int, ...], float] = {}
        stopped: dict[tuple[int, ...], float] = dict(self.ended)
        for (prefix, _), one in zip(tries, made, strict=True):
            longer = (*prefix, int(one.token_ids[0]))
            score = self.open[prefix] + float(one.log_probs[0])
            home = stopped if not one.truncated or len(longer) == asked.max_new_tokens else grown
            home[longer] = float(np.logaddexp(home.get(longer, -np.inf), score))
            self.budget.tokens -= 1
            self._count(one)
        kept = sorted({**grown, **stopped}.items(), key=lambda item: -item[1])[: self.config.simulations]
        self.ended = {prefix: score for prefix, score in kept if prefix in stopped}
        self.open = {prefix: score for prefix, score in kept if prefix in grown}

    async def _finish(self) -> None:
        found, said = self.found, self.ended or {prefix: score for prefix, score in self.open.items() if prefix}
        found.responses = [np.array(prefix, np.int64) for prefix, _ in sorted(said.items(), key=lambda item: -item[1])]
        found.actions = [np.full(len(response), -1, np.int64) for response in found.responses]
        found.rewards = list(await self.question.judge(found.responses)) if found.responses else []
        found.simulations = len(found.responses)
        if found.ended_by != "seconds":
            whole = found.simulations == self.config.simulations
            found.ended_by = "tokens" if self.out_of_tokens else "simulations" if whole else "exhausted"
