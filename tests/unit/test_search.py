"""Search on small trees whose values are known: the optimum, visits worked by hand, shared leaves, budgets.

Budgets are tried over random trees and any number of searchers: as many simulations as were asked for or as the tree
has, never a token too many, and the same choice whatever the rewards' unit and zero.
"""

import asyncio
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ray.algorithms.search import ValueRange, majority, pass_at_k, puct, vote_weights
from cola_ray.model.modeling_cola import RANKED
from cola_ray.rollout.engine import Completion, Request
from cola_ray.rollout.search import BeamSearch, BestOf, SearchProblem, TreeSearch
from cola_ray.settings.config import SearchConfig

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
        whole = [*(RANKED - action for action in request.actions), *[0] * self.depth][: self.depth - len(prefix)]
        actions = whole[: request.max_new_tokens]
        tokens = np.array([self.tokens[a] for a in actions])
        log_probs = np.log([self.priors[a] for a in actions])
        cut = len(actions) < len(whole)
        return Completion(tokens, np.array(actions), log_probs, tokens * 0, cut, None, computed_tokens=len(tokens))

    async def score(self, responses):
        return [float(self.value(tuple(int(token) for token in response))) for response in responses]

    def search(self, forks=None, **settings):
        fixed = {"root_breadth": len(self.priors), "breadth": len(self.priors), "simulations": 10**6, "searchers": 1}
        tree = TreeSearch(SearchConfig(**(fixed | settings)), self.problem(), forks)
        return tree, asyncio.run(tree.run())

    def problem(self, budget=0):
        return SearchProblem(PROMPT, budget or self.depth, self.complete, self.score, _request, len(self.priors))


def _request(ids, seed, actions, new_tokens, held):
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
    assert (a.total_value, b.total_value, tree.root.total_value) == (1.0, 0.0, 1.0)
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


@pytest.mark.parametrize(
    ("budget", "simulations"),
    [({"simulations": 3}, 3), ({"max_tokens": 14}, 3), ({"max_tokens": 11}, 2), ({"max_tokens": 3}, 1)],
)
def test_budgets_end_a_search_with_what_it_has(budget, simulations):
    game = Game([0.6, 0.4], 5, sum)  # the first rollouts have 5 tokens, a child's 4
    _, found = game.search(**budget)
    assert found.simulations == simulations == len(found.responses)
    assert found.generated_tokens <= budget.get("max_tokens", math.inf)
    assert [found.ended_by] == list(budget) or (found.ended_by, list(budget)) == ("tokens", ["max_tokens"])
    assert [len(response) for response in found.responses] == [5] * simulations or budget == {"max_tokens": 3}


class Wild(Game):
    """Rollouts that take a random while and end where chance says; the same for the same prefix and actions."""

    def __init__(self, seed, priors, depth, value, failing=()):
        super().__init__(priors, depth, value)
        self.seed, self.failing = seed, failing

    async def complete(self, requests):
        self.asked += requests
        draw = np.random.default_rng((self.seed, len(self.asked)))
        for _ in range(draw.integers(1, 6)):
            await asyncio.sleep(0)
        return [self.follow(request) for request in requests]

    def follow(self, request):
        whole = super().follow(request)
        prefix = [int(token) for token in request.prompt_ids[len(PROMPT) :]]
        for length in range(1, len(whole.token_ids) + 1):
            said = (*prefix, *(int(token) for token in whole.token_ids[:length]))
            if self.ends(said):
                pieces = (array[:length] for array in (whole.token_ids, whole.actions, whole.log_probs, whole.versions))
                return Completion(*pieces, False, None, computed_tokens=length)
        return whole

    def ends(self, said):
        return hash((self.seed, said)) % 5 == 0


def places_to_try(game, root_breadth, breadth, depth):
    """Every (prefix, action) that a search may ask for, by brute force."""
    count, prefixes = 0, [()]
    while prefixes:
        grown = set()
        for prefix in prefixes:
            tried = min(breadth if prefix else root_breadth, len(game.priors))
            count += tried
            grown |= {(*prefix, action) for action in range(tried)}
        prefixes = [one for one in grown if not game.ends(one) and len(one) < min(depth, game.depth)]
    return count


WILD = {
    "seed": st.integers(0, 1000), "root": st.integers(1, 5), "breadth": st.integers(1, 5), "depth": st.integers(1, 3),
    "searchers": st.integers(1, 16), "simulations": st.integers(1, 40),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(**WILD)
def test_exactly_as_many_simulations_as_asked_for_or_as_the_tree_has(
    seed, root, breadth, depth, searchers, simulations
):
    game = Wild(seed, [0.4, 0.3, 0.2, 0.1], 4, sum)
    _, found = game.search(
        root_breadth=root, breadth=breadth, depth=depth, searchers=searchers, simulations=simulations
    )
    there_are = places_to_try(game, root, breadth, depth)
    assert found.simulations == len(game.asked) == min(simulations, there_are)
    assert len({(*request.prompt_ids, *request.actions) for request in game.asked}) == found.simulations
    assert found.ended_by == ("simulations" if simulations <= there_are else "exhausted")


def test_many_searchers_at_a_narrow_root_give_nothing_up():
    game = Wild(0, [0.3, 0.25, 0.2, 0.15, 0.1], 8, sum)
    game.ends = lambda said: False
    _, found = game.search(root_breadth=5, breadth=4, searchers=16, simulations=32)
    assert (found.simulations, found.ended_by) == (32, "simulations")


@settings(max_examples=150, deadline=None)
@given(tokens=st.integers(1, 60), way=st.sampled_from(["tree", "best", "beam"]), **WILD)
def test_never_a_token_more_than_allowed(tokens, way, seed, root, breadth, depth, searchers, simulations):
    game = Wild(seed, [0.4, 0.3, 0.2, 0.1], 6, sum)
    settings = SearchConfig(root_breadth=root, breadth=breadth, depth=depth, searchers=searchers,
                            simulations=simulations, max_tokens=tokens)  # fmt: skip
    search = {"tree": TreeSearch, "best": BestOf, "beam": BeamSearch}[way](settings, game.problem())
    found = asyncio.run(search.run())
    assert 0 < found.generated_tokens <= tokens
    assert 0 < len(found.responses) == found.simulations <= simulations
    finished = [len(r) == game.depth or game.ends(tuple(int(t) for t in r)) for r in found.responses]
    assert all(finished) or len(found.responses) == 1 or (way == "beam" and not any(finished)), "half an answer is none"
    if found.ended_by == "tokens" and way != "beam":
        assert found.generated_tokens == tokens


@pytest.mark.parametrize("way", [TreeSearch, BestOf, BeamSearch])
def test_what_is_under_way_when_the_time_is_up_is_dropped(way):
    class Slow(Game):
        async def complete(self, requests):
            if len(self.asked) >= 3:
                await asyncio.Event().wait()
            return await super().complete(requests)

    game = Slow([0.6, 0.4], 3, sum)
    settings = SearchConfig(root_breadth=2, breadth=1, max_seconds=0.2, simulations=8, searchers=2)
    found = asyncio.run(way(settings, game.problem()).run())
    assert found.ended_by == "seconds"
    assert len(found.responses) == len(found.rewards) == {TreeSearch: 3, BestOf: 3, BeamSearch: 2}[way]


@pytest.mark.parametrize("way", [TreeSearch, BestOf, BeamSearch])
def test_an_engines_error_is_the_searchs_and_nobody_waits_on(way):
    class Broken(Wild):
        async def complete(self, requests):
            made = await super().complete(requests)
            if len(self.asked) > 5:
                raise ValueError("no KV cache left")
            return made

    game = Broken(0, [0.4, 0.3, 0.2, 0.1], 4, sum)
    settings = SearchConfig(root_breadth=4, breadth=4, searchers=3, simulations=20, max_tokens=1000)

    async def whole():
        with pytest.raises(ValueError, match="no KV cache left"):
            await asyncio.wait_for(way(settings, game.problem()).run(), 10)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(whole())


def test_best_of_n_keeps_the_first_draws_that_fit_whatever_their_order_of_arrival():
    """Lengths are 3, and 5 of the second. Of 12 tokens 3 + 5 + 3 fit, and one is left for the fourth, which is cut."""

    class Lengths(Wild):
        def follow(self, request):
            length = min(5 if request.seed == 1 else 3, request.max_new_tokens)
            tokens = np.full(length, request.seed)
            return Completion(tokens, tokens, tokens * 0.0, tokens * 0, length == request.max_new_tokens, None, length)

    for seed in range(5):
        game = Lengths(seed, [1.0], 5, sum)
        found = asyncio.run(BestOf(SearchConfig(simulations=9, max_tokens=12), game.problem(6)).run())
        assert [response.tolist() for response in found.responses] == [[0] * 3, [1] * 5, [2] * 3]
        assert (found.generated_tokens, found.ended_by) == (12, "tokens")


@settings(max_examples=100, deadline=None)
@given(
    scale=st.sampled_from([1e-3, 0.1, 1.0, 3.0, 1e3]), shift=st.sampled_from([-1e3, -7.0, -1.0, 0.0, 0.3, 1e3]),
    levels=st.sampled_from([2, 3, 1000]), **WILD,
)  # fmt: skip
def test_the_unit_and_the_zero_of_rewards_change_nothing(
    scale, shift, levels, seed, root, breadth, depth, searchers, simulations
):
    def plain(response):
        return (hash((seed, 7, response)) % levels) / levels

    def asked_of(value):
        game = Wild(seed, [0.4, 0.3, 0.2, 0.1], 4, value)
        _, found = game.search(
            root_breadth=root, breadth=breadth, depth=depth, searchers=searchers, simulations=simulations
        )
        return [(*request.prompt_ids, *request.actions) for request in game.asked], found.best

    assert asked_of(plain) == asked_of(lambda response: scale * plain(response) + shift)


@given(
    others=st.lists(st.floats(-10, 10), min_size=1, max_size=6), mine=st.lists(st.floats(-10, 10), max_size=6),
    under_way=st.integers(1, 4),
)  # fmt: skip
def test_a_visit_under_way_is_a_loss_for_values_of_any_sign(others, mine, under_way):
    values = ValueRange()
    for value in (*others, *mine):
        values.add(value)
    total, visits = values.scaled(sum(mine), len(mine)), len(mine)
    scores = [puct(total, visits + more, 0.5, 20, 0.7) for more in (0, under_way)]
    assert scores[1] < scores[0]
    assert -1e-9 <= total <= len(mine) + 1e-9


def test_rounding_of_rewards_is_no_difference():
    values = ValueRange()
    for value in np.float32([0.3, 0.30000001, 0.29999998]):  # as float32 has them, one bit apart
        values.add(float(value))
    assert values.scaled(0.3, 1) == 0.5
    values.add(0.301)
    assert values.scaled(0.301, 1) == pytest.approx(1.0)


def test_a_response_without_a_value_is_nobodys_choice():
    game = Game([0.6, 0.4], 1, lambda response: -math.inf if response == (0,) else -5.0)
    tree, found = game.search()
    assert found.responses[found.best].tolist() == [1]
    assert [(child.visits, child.num_values, child.total_value) for child in tree.root.children] == [
        (1, 0, 0.0),
        (1, 1, -5.0),
    ]
    assert found.majority_answer(lambda response: None if response[0] == 0 else "one") == "one"


def test_no_more_actions_are_tried_than_there_are():
    game = Game([0.6, 0.4], 1, sum)
    _, found = game.search(root_breadth=7)
    assert (found.simulations, found.ended_by) == (2, "exhausted")


def test_a_child_is_put_where_something_is_decided():
    game = Game([0.6, 0.4], 6, sum)
    tree, _ = game.search(forks=lambda made, prompt_length: 3, simulations=3)
    assert [child.tokens for child in tree.root.children] == [(0, 0, 0), (1, 0, 0)]
    (last,) = tree.root.children[1].children  # worth more than its sibling, so searched first
    assert (last.tokens, last.ended) == ((1, 0, 0, 0, 0, 0), True)


@settings(deadline=None)
@given(n=st.integers(1, 8), c=st.integers(0, 8), k=st.integers(1, 8))
def test_pass_at_k_is_the_share_of_samples_with_a_right_one(n, c, k):
    c, k = min(c, n), min(k, n)
    picks = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(i < c for i in pick) for pick in picks]))


@pytest.mark.parametrize(("n", "c", "k"), [(2, 0, 4), (2, 3, 1), (4, 1, 0), (0, 0, 1)])
def test_pass_at_more_than_there_are_is_refused(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {n} samples"):
        pass_at_k(n, c, k)


def test_votes():
    assert majority(["4", "7", "7"]) == "7"
    assert majority(["4", "7", "7"], [3.0, 1.0, 1.0]) == "4"
    assert majority(["b", "a"]) == "b", "of equals the first"
    assert majority([]) is None
    assert majority([None, None, None, "7"]) == "7", "what cannot be read has no vote"
    assert majority([None, None]) is None


@settings(deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=1), st.sampled_from([0.25, 1, 16]), st.integers(-64, 64))
def test_votes_by_values_have_no_unit(values, scale, shift):
    weights = vote_weights(values)
    assert weights == vote_weights([scale * value + shift for value in values])
    assert all(0 <= weight <= 1 for weight in weights)
    assert vote_weights([-math.inf, 1.0, 3.0]) == [0.0, 0.0, 1.0]


class Lasting(Game):
    """Each action lasts ``every`` tokens: action a gives a, a + 10, a + 20, ...; the last may be cut by the length."""

    def __init__(self, priors, depth, value, every):
        super().__init__(priors, depth, value)
        self.every = every

    def follow(self, request):
        prefix = list(request.prompt_ids)[len(PROMPT) :]
        assert len(prefix) % self.every == 0, "a rollout begins where an action is chosen"
        left = min(self.depth - len(prefix), request.max_new_tokens)
        chosen = [*(RANKED - action for action in request.actions), *[0] * self.depth]
        actions = np.array([chosen[place // self.every] for place in range(left)])
        places = np.arange(left) % self.every
        log_probs = np.where(places == 0, np.log([self.priors[a] for a in actions]), 0.0)
        cut = left < self.depth - len(prefix)
        return Completion(actions + 10 * places, actions, log_probs, actions * 0, cut, None, computed_tokens=left)

    def problem(self, budget=0):
        given = PROMPT, budget or self.depth, self.complete, self.score, _request, len(self.priors)
        return SearchProblem(*given, self.every)


def decided(response, every):
    return tuple(int(token) for token in response[::every])


@pytest.mark.parametrize(("every", "depth"), [(1, 3), (2, 6), (2, 5), (3, 7)])
@pytest.mark.parametrize("searchers", [1, 4])
def test_a_tree_branches_where_actions_begin(every, depth, searchers):
    """It is the tree of decisions: visits, values and priors are those of a game whose actions last a token."""
    values = dict(zip(itertools.product(range(3), repeat=3), np.random.default_rng(0).random(27), strict=True))
    lasting = Lasting([0.5, 0.3, 0.2], depth, lambda response: values[decided(response, every)], every)
    plain = Game([0.5, 0.3, 0.2], 3, values.__getitem__)
    settings = {"simulations": 20, "searchers": searchers, "depth": 12}
    (tree, found), (other, wanted) = lasting.search(**settings), plain.search(**settings)
    assert found.rewards == wanted.rewards
    assert [decided(one, every) for one in found.responses] == [decided(one, 1) for one in wanted.responses]

    def shape(node, n):
        below = [shape(child, n) for child in node.children]
        return decided(node.tokens, n), node.visits, round(node.prior, 9), round(node.total_value, 9), node.ended, below

    assert shape(tree.root, every) == shape(other.root, 1)
    for request in lasting.asked:
        assert (len(request.prompt_ids) - len(PROMPT)) % every == 0


@pytest.mark.parametrize(("every", "depth"), [(1, 3), (2, 6), (2, 5), (3, 8)])
def test_a_beam_grows_by_actions(every, depth):
    priors, settings = [0.5, 0.3, 0.2], SearchConfig(root_breadth=3, breadth=2, simulations=4)
    lasting = Lasting(priors, depth, lambda response: response[0], every)
    beam, plain = BeamSearch(settings, lasting.problem()), BeamSearch(settings, Game(priors, 3, sum).problem())
    found, wanted = asyncio.run(beam.run()), asyncio.run(plain.run())
    assert [decided(one, every) for one in found.responses] == [decided(one, 1) for one in wanted.responses]
    assert {len(one) for one in found.responses} == {depth}
    assert {decided(one, every): score for one, score in beam.ended.items()} == pytest.approx(plain.ended)


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(1, 60), way=st.sampled_from(["tree", "beam"]), every=st.integers(2, 3),
       simulations=st.integers(1, 40), searchers=st.integers(1, 8))  # fmt: skip
def test_actions_that_last_keep_to_a_budget_of_tokens(tokens, way, every, simulations, searchers):
    game = Lasting([0.4, 0.3, 0.2, 0.1], 7, sum, every)
    settings = SearchConfig(root_breadth=4, breadth=3, searchers=searchers, simulations=simulations, max_tokens=tokens)
    search = {"tree": TreeSearch, "beam": BeamSearch}[way](settings, game.problem())
    found = asyncio.run(search.run())
    assert found.generated_tokens <= tokens
    assert len(found.responses) == found.simulations <= simulations
