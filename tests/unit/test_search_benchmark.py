"""benchmarks/search.py, and self-consistency: votes by trying all, budgets, who chooses, pairs for the reward model."""

import asyncio
import itertools
import sys
from collections import Counter

import numpy as np
import pytest
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import search

from cola_ray.algorithms.search import majority, pass_at_k, vote_weights
from cola_ray.model.modeling_cola import RANKED
from cola_ray.rollout.engine import Completion, Request
from cola_ray.rollout.search import BeamSearch, SearchProblem
from cola_ray.settings.combinations import refused
from cola_ray.settings.config import EvalConfig, SearchConfig, override
from cola_ray.settings.presets import preset
from cola_ray.settings.relevance import unread
from cola_ray.studies import evaluation

ANSWERS = ("4", "7", "9", None)


def counted(answers, weights=None):
    """The winner by another way: sort all answers by votes, then by where they came first."""
    votes = Counter()
    for answer, weight in zip(answers, weights or itertools.repeat(1.0), strict=False):
        if answer is not None:
            votes[answer] += weight
    ordered = sorted(votes, key=lambda answer: (-votes[answer], answers.index(answer)))
    return ordered[0] if ordered else None


@pytest.mark.parametrize("length", range(6))
def test_self_consistency_by_trying_all_answers(length):
    for answers in itertools.product(ANSWERS, repeat=length):
        assert majority(answers) == counted(answers), answers


def test_weighted_self_consistency_by_trying_all_values():
    for answers in itertools.product(ANSWERS, repeat=3):
        for values in itertools.product((-2.0, 0.0, 2.0), repeat=3):
            weights = vote_weights(values)
            assert majority(answers, weights) == counted(answers, weights), (answers, values)


def write(folder, rows):
    """Predictions of samples: for each problem (answer, reward, value) of its responses."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "sample").mkdir(parents=True)
    table = [
        {"rewards": [reward for _, reward, _ in row], "values": [value for *_, value in row],
         "answers": [answer or "" for answer, *_ in row], "failures": [""] * len(row), "generated_tokens": 5,
         "computed_tokens": 5, "seconds": 0.1}
        for row in rows
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(table), folder / "sample" / "000000.parquet")


def test_what_a_figure_is_follows_from_who_chooses(tmp_path):
    """500 random problems whose right answer is "4", counted by hand: the oracle, the scorer, the vote."""
    draw, rows = np.random.default_rng(0), []
    for _ in range(500):
        answers = [ANSWERS[i] for i in draw.integers(0, len(ANSWERS), 5)]
        rows.append([(answer, float(answer == "4"), float(draw.integers(-3, 3))) for answer in answers])
    config = EvalConfig(ways=("sample",), ks=(5,), problems=500, chunk=500)
    write(tmp_path / "scored", rows)
    by_model = evaluation.figures(config, tmp_path / "scored", 0)["sample"]
    write(tmp_path / "verified", [[(answer, reward, reward) for answer, reward, _ in row] for row in rows])
    by_verifier = evaluation.figures(config, tmp_path / "verified", 0)["sample"]
    any_right = np.mean([any(reward for _, reward, _ in row) for row in rows])
    liked = np.mean([max(row, key=lambda one: one[2])[1] for row in rows])  # max takes the first of equals
    voted = np.mean([counted([answer for answer, *_ in row]) == "4" for row in rows])
    oracle = np.mean([pass_at_k(5, sum(int(reward) for _, reward, _ in row), 5) for row in rows])
    assert by_verifier["best"] == pytest.approx(any_right) == pytest.approx(oracle), "the verifier's choice is pass@n"
    assert by_model["best"] == pytest.approx(liked)
    assert by_model["majority"] == by_verifier["majority"] == pytest.approx(voted)
    assert by_model["responses"] == 5
    assert voted < any_right > liked
    said = evaluation.remarks(config, {"sample": by_verifier})
    assert [line for line in said if "pass@n" in line] == said[:1] != []
    assert not evaluation.remarks(config, {"sample": by_model}), "where a reward model chose, nothing is to be said"


# --- budgets ----------------------------------------------------------------------------------------------------------


def responses_of_a_beam(width, tokens, longest):
    """A beam over a policy with ``BREADTH`` actions and no end; (tokens used, length of what it found)."""

    async def complete(requests):
        actions = [RANKED - request.actions[0] for request in requests]
        return [Completion(np.array([a]), np.array([a]), np.array([-1.0 - a]), np.array([0]), True, None, 1)
                for a in actions]  # fmt: skip

    async def score(responses):
        return [0.0] * len(responses)

    def request(ids, seed, actions, new_tokens, held):
        return Request(ids, seed, 1.0, 0, new_tokens, actions)

    settings = SearchConfig(simulations=width, max_tokens=tokens, root_breadth=search.BREADTH, breadth=search.BREADTH)
    problem = SearchProblem([1], longest, complete, score, request, search.BREADTH)
    found = asyncio.run(BeamSearch(settings, problem).run())
    return found.generated_tokens, max(len(response) for response in found.responses)


@pytest.mark.parametrize(("tokens", "longest"), [(112, 4), (160, 4), (500, 6), (1000, 3), (96, 6)])
def test_the_widest_beam_that_tokens_suffice_for(tokens, longest):
    width = search.beam_width(tokens, longest)
    used, length = responses_of_a_beam(width, tokens, longest)
    assert (used <= tokens, length) == (True, longest)
    _, length = responses_of_a_beam(width + 1, tokens, longest)
    assert length < longest or width + 1 > search.BREADTH, "a wider one runs out of tokens"


def test_a_beam_has_a_width_of_one_at_least():
    assert search.beam_width(8, 6) == 1
    assert search.beam_width(200, 1) == (200 - search.BREADTH) // search.BREADTH


def test_budgets_become_settings_that_are_read():
    for budget in (search.Budget(4, "responses"), search.Budget(64, "tokens")):
        ways = []
        for settings in budget.settings(longest=6).values():
            q = {"q.path": "q"} if "mcts_q" in settings["eval.ways"] else {}
            wide = {"search.root_breadth": 16, "search.breadth": 16}
            config = override(preset("tiny"), {**settings, **q, **wide, "model.path": "model"})
            assert not [*refused(config), *unread(config, "evaluate")]
            limit = (config.search.simulations, 0) if budget.unit == "responses" else (None, config.search.max_tokens)
            assert limit in ((4, 0), (None, 64))
            ways += settings["eval.ways"]
        assert sorted(ways) == ["beam", "mcts", "mcts_q", "sample"], "each once"


def test_samples_keep_a_budget_of_tokens_and_may_be_given_one_alone():
    given = {"model.path": "m", "eval.ways": ("sample",), "search.max_tokens": 8, "search.max_seconds": 9.0}
    assert not unread(override(preset("tiny"), given), "evaluate")
    greedy = override(preset("tiny"), {**given, "eval.ways": ("greedy",)})
    assert [line.split(" = ")[0] for line in unread(greedy, "evaluate")] == ["search.max_tokens", "search.max_seconds"]


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_take_each_figure_from_its_own_run(tmp_path):
    budgets = [search.Budget(4, "responses"), search.Budget(64, "tokens")]
    names = ("best", "majority", "weighted_majority")
    numbers = itertools.count(1)
    summaries = {
        (guide, budget): {
            way: {"responses": 3.5, "generated_tokens": 9.0}
            | {f"{name}{end}": float(next(numbers)) for name in names for end in ("_low", "", "_high")}
            for way in ("sample", "beam", "mcts", "mcts_q")
        }
        for guide in search.GUIDES
        for budget in budgets
    }
    found = search.figures_of(summaries)
    assert len(found) == len(search.METHODS) * len(budgets)
    for budget in budgets:
        verified, scored = (summaries[guide, budget] for guide in search.GUIDES)
        assert found[f"pass@n (oracle), {budget}"]["right"] == verified["sample"]["best"]
        assert found[f"best-of-n, {budget}"]["right"] == scored["sample"]["best"]
        assert found[f"self-consistency, {budget}"]["high"] == verified["sample"]["majority_high"]
        assert found[f"weighted self-consistency, {budget}"]["low"] == scored["sample"]["weighted_majority_low"]
        assert found[f"mcts (oracle), {budget}"]["right"] == verified["mcts"]["best"]
        assert found[f"mcts, {budget}"]["right"] == scored["mcts"]["best"]
    assert {name for name, of in search.METHODS.items() if of.guide == "verifier" and of.figure == "best"} == {
        name for name in search.METHODS if "oracle" in name
    }
    search.plot(found | {"greedy": {"right": 1.0}}, budgets, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_where_nobody_has_two_responses_the_first_counts():
    alone = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "responses": 1.0, "generated_tokens": 2.0}
    ways = dict.fromkeys(("sample", "beam", "mcts", "mcts_q"), alone)
    found = search.figures_of({(guide, search.Budget(1, "responses")): ways for guide in search.GUIDES})
    assert {row["right"] for row in found.values()} == {0.5}


def test_pairs_are_of_one_problem_a_right_and_a_wrong_text():
    rows = [
        {"question": "1 + 1 =", "texts": ["2", "3", "2", "4"], "rewards": [1.0, 0.0, 1.0, 0.0]},
        {"question": "all right", "texts": ["2", "2"], "rewards": [1.0, 1.0]},
        {"question": "none right", "texts": ["5"], "rewards": [0.0]},
    ]
    assert list(search.pairs_of(rows)) == [
        {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"},
        {"prompt": "1 + 1 =", "chosen": "2", "rejected": "4"},
    ]
    assert len(list(search.pairs_of(rows, most=1))) == 1
