"""Search over latent actions: PUCT, MCTS-Q, and beam and best-of-n with the same verifier as controls.

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
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cola_ray.algorithms.latent_actions import RANKED
from cola_ray.algorithms.search import majority, puct
from cola_ray.config import SearchConfig
from cola_ray.rollout.engine import Completion, Request

Array = np.ndarray
Complete = Callable[[Sequence[Request]], Awaitable[list[Completion]]]
Judge = Callable[[Sequence[Array]], Awaitable[list[float]]]
"""(responses of one problem, each (L,) ids) -> their rewards."""
Forks = Callable[[Completion, int], int]
"""(completion, length of its prompt) -> how many of its tokens to pass before something is decided; at least 1."""


@dataclass
class Node:
    """A prefix of the response, and what is known of what follows it."""

    tokens: tuple[int, ...] = ()  # after the prompt
    prior: float = 1.0  # of the action that led here, under the policy
    ended: bool = False  # by a stop token or the budget: nothing follows
    children: list["Node"] = field(default_factory=list)
    tried: int = 0  # actions, from the most probable on
    visits: int = 0  # with those under way
    total: float = 0.0


@dataclass
class Found:
    """What a search of one problem came to; complete at any moment."""

    responses: list[Array] = field(default_factory=list)  # (L,) ids each, in order of arrival
    actions: list[Array] = field(default_factory=list)  # (L,) each, -1 where an ancestor's rollout chose them
    rewards: list[float] = field(default_factory=list)
    simulations: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0  # with prompts, as far as no cache held them
    seconds: float = 0.0

    @property
    def best(self) -> int:
        """Of the best reward; of equals, the first that was found."""
        return int(np.argmax(self.rewards))

    def voted(self, answer_of: Callable[[Array], str]) -> str:
        """The answer that most responses give."""
        return majority([answer_of(response) for response in self.responses])


@dataclass(frozen=True)
class Question:
    """What is to be answered, and by whom.

    Args:
        max_new_tokens: of a whole response.
        complete: the engine.
        judge: a response's value.
        request: (prompt ids, seed, forced actions, new tokens) -> a request of the run's sampling.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    complete: Complete
    judge: Judge
    request: Callable[[Sequence[int], int, Sequence[int], int], Request]


def _over(config: SearchConfig, found: Found) -> bool:
    """Whether the tokens or the time of ``found`` use up what there is of them; 0 is no limit."""
    out_of_tokens = bool(config.max_tokens) and found.generated_tokens >= config.max_tokens
    return out_of_tokens or (bool(config.max_seconds) and found.seconds >= config.max_seconds)


class TreeSearch:
    """PUCT from one prompt.

    Args:
        forks: for MCTS-Q; without, every child is one token long.
    """

    def __init__(self, config: SearchConfig, question: Question, forks: Forks | None = None) -> None:
        self.config, self.question, self.forks = config, question, forks
        self.root, self.found = Node(), Found()
        self.begun = 0  # simulations

    async def run(self) -> Found:
        """Simulate until the budget is used up, or nothing is left to try."""
        started = time.perf_counter()

        async def searcher() -> None:
            while self.begun < self.config.simulations and not _over(self.config, self.found):
                self.begun += 1
                if not await self._simulate(self.begun):
                    return
                self.found.seconds = time.perf_counter() - started

        await asyncio.gather(*(searcher() for _ in range(self.config.searchers)))
        return self.found

    async def _simulate(self, number: int) -> bool:
        """One rollout from a new child, backed up; False where the whole tree is known."""
        path = self._descend()
        if path is None:
            return False
        node = path[-1]
        rank, node.tried = node.tried, node.tried + 1
        for one in path:
            one.visits += 1
        asked = self.question
        left = asked.max_new_tokens - len(node.tokens)
        (made,) = await asked.complete([asked.request([*asked.prompt, *node.tokens], number, [RANKED - rank], left)])
        response = np.array([*node.tokens, *made.token_ids], np.int64)
        (value,) = await asked.judge([response])
        child = self._place(node, made)
        child.visits += 1
        for one in (*path, child):
            one.total += value
        self._record(made, response, value, len(node.tokens))
        return True

    def _descend(self) -> list[Node] | None:
        """From the root to a node with an action to try; None where no path leads to one."""
        path = [self.root]
        while not self._can_grow(path[-1]):
            node = path[-1]
            open_children = [child for child in node.children if self._is_open(child)]
            if not open_children:
                return None
            c = self.config.c_puct
            path.append(
                max(open_children, key=lambda child: puct(child.total, child.visits, child.prior, node.visits, c))
            )
        return path

    def _can_grow(self, node: Node) -> bool:
        breadth = self.config.breadth if node.tokens else self.config.root_breadth
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

    def _record(self, made: Completion, response: Array, value: float, inherited: int) -> None:
        found = self.found
        found.responses.append(response)
        found.actions.append(np.concatenate([np.full(inherited, -1, np.int64), made.actions]))
        found.rewards.append(value)
        found.simulations += 1
        found.generated_tokens += len(made.token_ids)
        found.computed_tokens += made.computed_tokens


async def beam(config: SearchConfig, question: Question) -> Found:
    """As many responses as ``simulations``, the most probable that a beam finds; judged at their end.

    Each step tries the ``breadth`` most probable actions after every open prefix. A response's probability is the sum
    over the actions that give its tokens, of those that were tried.
    """
    found, started = Found(), time.perf_counter()
    ended: dict[tuple[int, ...], float] = {}
    open_prefixes: dict[tuple[int, ...], float] = {(): 0.0}
    while open_prefixes:
        breadth = config.breadth if () not in open_prefixes else config.root_breadth
        asked = [(prefix, rank) for prefix in open_prefixes for rank in range(breadth)]
        made = await question.complete(
            [question.request([*question.prompt, *prefix], 0, [RANKED - rank], 1) for prefix, rank in asked]
        )
        grown: dict[tuple[int, ...], float] = {}
        stopped: dict[tuple[int, ...], float] = dict(ended)
        for (prefix, _), one in zip(asked, made, strict=True):
            longer = (*prefix, int(one.token_ids[0]))
            score = open_prefixes[prefix] + float(one.log_probs[0])
            home = stopped if not one.truncated or len(longer) == question.max_new_tokens else grown
            home[longer] = float(np.logaddexp(home.get(longer, -np.inf), score))
            found.generated_tokens += 1
            found.computed_tokens += one.computed_tokens
        kept = sorted({**grown, **stopped}.items(), key=lambda item: -item[1])[: config.simulations]
        ended = {prefix: score for prefix, score in kept if prefix in stopped}
        open_prefixes = {prefix: score for prefix, score in kept if prefix in grown}
        found.seconds = time.perf_counter() - started
        if _over(config, found):
            ended |= open_prefixes
            break
    found.responses = [np.array(prefix, np.int64) for prefix, _ in sorted(ended.items(), key=lambda item: -item[1])]
    found.actions = [np.full(len(response), -1, np.int64) for response in found.responses]
    found.rewards = list(await question.judge(found.responses))
    found.simulations, found.seconds = len(found.responses), time.perf_counter() - started
    return found
