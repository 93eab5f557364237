"""Search on small trees whose values are known: the optimum, visits worked by hand, shared leaves, budgets."""

import asyncio
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_ray.algorithms.latent_actions import RANKED
from cola_ray.algorithms.search import majority, pass_at_k, puct
from cola_ray.config import SearchConfig
from cola_ray.rollout.engine import Completion, Request
from cola_ray.rollout.search import Question, TreeSearch

PROMPT = [100, 101]


class Game:
    """Responses of ``depth`` tokens; the policy prefers small actions, and action a gives token a (or an alias's)."""

    def __init__(self, priors, depth, value, tokens=None):
        self.priors, self.depth, self.value, self.asked = priors, depth, value, []
        self.tokens = tokens or range(len(priors))
        self.at_once = 0

    async def complete(self, requests):
        self.asked += requests
        before = len(self.asked)
        await asyncio.sleep(0)
        self.at_once = max(self.at_once, len(self.asked) - before + len(requests))
        return [self.follow(request) for request in requests]

    def follow(self, request):
        prefix = list(request.prompt_ids)[len(PROMPT) :]
        actions = [RANKED - request.actions[0], *[0] * (self.depth - len(prefix) - 1)]
        tokens = np.array([self.tokens[a] for a in actions])
        log_probs = np.log([self.priors[a] for a in actions])
        return Completion(tokens, np.array(actions), log_probs, tokens * 0, False, None, computed_tokens=len(tokens))

    async def judge(self, responses):
        return [float(self.value(tuple(int(token) for token in response))) for response in responses]

    def search(self, forks=None, **settings):
        fixed = {"root_breadth": len(self.priors), "breadth": len(self.priors), "simulations": 10**6, "searchers": 1}
        question = Question(PROMPT, self.depth, self.complete, self.judge, _request)
        tree = TreeSearch(SearchConfig(**(fixed | settings)), question, forks)
        return tree, asyncio.run(tree.run())


def _request(ids, seed, actions, new_tokens):
    return Request(ids, seed, 1.0, 0, new_tokens, actions)


@pytest.mark.parametrize("searchers", [1, 5])
def test_the_optimum_of_a_known_tree_and_an_end_when_all_is_known(searchers):
    values = dict(zip(itertools.product(range(3), repeat=3), np.random.default_rng(0).random(27), strict=True))
    game = Game([0.5, 0.3, 0.2], 3, values.__getitem__)
    _, found = game.search(searchers=searchers)
    assert {tuple(int(t) for t in response) for response in found.responses} == set(values)
    assert found.rewards[found.best] == max(values.values())
    assert found.simulations == 3 + 9 + 27, "each node once"


def test_visits_by_hand():
    """Priors 0.7 and 0.3, c 0.7; root's children a, b are tried first (values 0 at aa, 0 at ba). Then

    N = 2: a 0.49 sqrt(2) / 2 = 0.35 > b 0.21 sqrt(2) / 2 = 0.15   -> aa (0)
    N = 3: a 0.49 sqrt(3) / 3 = 0.28 > b 0.21 sqrt(3) / 2 = 0.18   -> ab (1), and all below a is known
    """
    value = {(0, 0): 0, (0, 1): 1, (1, 0): 0, (1, 1): 0.5}.__getitem__
    game = Game([0.7, 0.3], 2, value)
    tree, found = game.search(simulations=4)
    a, b = tree.root.children
    assert (tree.root.visits, a.visits, b.visits) == (4, 3, 1)
    assert [child.visits for child in a.children] == [1, 1]
    assert (a.total, b.total, tree.root.total) == (1.0, 0.0, 1.0)
    assert found.responses[found.best].tolist() == [0, 1]
    assert puct(1.5, 2, 0.5, 9, 0.7) == pytest.approx(1.1)
    tree, found = game.search(simulations=50)
    assert found.simulations == 6
    assert [child.visits for child in tree.root.children] == [3, 3]


def test_a_child_costs_its_own_tokens_and_searchers_take_different_leaves():
    game = Game([0.4, 0.3, 0.2, 0.1], 4, sum)
    _, found = game.search(simulations=12, searchers=4)
    assert game.at_once == 4
    assert len({(*r.prompt_ids, *r.actions) for r in game.asked}) == 12, "no leaf twice"
    assert all(list(r.prompt_ids[:2]) == PROMPT for r in game.asked)
    assert found.generated_tokens == sum(r.max_new_tokens for r in game.asked)


def test_two_actions_with_the_same_token_are_one_child():
    game = Game([0.5, 0.3, 0.2], 1, float_of, tokens=[7, 9, 7])
    tree, _ = game.search()
    first, second = tree.root.children
    assert (first.tokens, first.visits) == ((7,), 2)
    assert first.prior == pytest.approx(0.7)
    assert (second.tokens, second.visits) == ((9,), 1)


def float_of(response):
    return response[0] / 10


@pytest.mark.parametrize(("budget", "simulations"), [({"simulations": 3}, 3), ({"max_tokens": 11}, 3)])
def test_budgets_end_a_search_with_what_it_has(budget, simulations):
    game = Game([0.6, 0.4], 5, sum)  # the first rollouts have 5 tokens, a child's 4
    _, found = game.search(**budget)
    assert found.simulations == simulations == len(found.responses)
    assert found.voted(lambda response: str(response[0])) == "1"


def test_a_child_is_put_where_something_is_decided():
    game = Game([0.6, 0.4], 6, sum)
    tree, _ = game.search(forks=lambda made, prompt_length: 3, simulations=3)
    assert [child.tokens for child in tree.root.children] == [(0, 0, 0), (1, 0, 0)]
    (last,) = tree.root.children[1].children  # worth more than its sibling, so searched first
    assert (last.tokens, last.ended) == ((1, 0, 0, 0, 0, 0), True)


@given(n=st.integers(1, 8), c=st.integers(0, 8), k=st.integers(1, 8))
def test_pass_at_k_is_the_share_of_samples_with_a_right_one(n, c, k):
    c, k = min(c, n), min(k, n)
    picks = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(i < c for i in pick) for pick in picks]))


def test_votes():
    assert majority(["4", "7", "7"]) == "7"
    assert majority(["4", "7", "7"], [3.0, 1.0, 1.0]) == "4"
    assert majority(["b", "a"]) == "b", "of equals the first"
    assert majority([]) == ""
