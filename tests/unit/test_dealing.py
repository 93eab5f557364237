"""Which rank gets which sequences, and where rows are cut, compared with a plain count of positions."""

import itertools

import numpy as np
import pytest

from cola_ray.algorithms.dealing import Sizes, cut, dealt
from cola_ray.algorithms.mini_batches import permuted


def sizes_of(groups):
    """The sizes of groups of completions, given as (tokens of the prompt, tokens of each response)."""
    rows = [(number, prompt, prompt + said) for number, (prompt, of) in enumerate(groups) for said in of]
    prompts, before, tokens = np.array(rows).T
    return Sizes(tokens, before, prompts)


def drawn(seed, groups=16, size=8, prompt=100, response=300, spread=0.6):
    draw = np.random.default_rng(seed)
    return sizes_of([
        (int(draw.integers(prompt // 2, 3 * prompt // 2 + 1)),
         np.maximum(draw.lognormal(np.log(response), spread, size).astype(int), 1).tolist())
        for _ in range(groups)
    ])  # fmt: skip


def counted(sizes, owned, cuts, shares_prompts):
    """Positions on the rank that computes most, summed over micro-batches; and those of each micro-batch."""
    total, loads = 0, []
    for start, stop, width in cuts.micro_batches:
        of_ranks = []
        for mine in owned:
            rows = mine[start:stop]
            numbers = sizes.prompts[rows].tolist()
            missing = stop - start - len(rows)
            if shares_prompts and len({*numbers}) < len(numbers):
                once = {number: int(sizes.before[row]) for number, row in zip(numbers, rows, strict=True)}
                of_ranks.append(sum(once.values()) + int((sizes.tokens - sizes.before)[rows].sum()) + missing)
            else:
                of_ranks.append((stop - start) * width)
        total += max(of_ranks)
        loads.append(max(of_ranks))
    return total, loads


@pytest.mark.parametrize("shares_prompts", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_cuts_are_within_the_budget_and_positions_are_counted(ranks, shares_prompts):
    for seed in range(5):
        sizes = drawn(seed)
        owned = dealt(sizes, ranks, 4096, shares_prompts=shares_prompts)
        assert sorted(np.concatenate(owned).tolist()) == list(range(len(sizes.tokens)))
        cuts = cut(sizes, owned, 4096, shares_prompts)
        assert cuts.rows == max(map(len, owned))
        assert [start for start, *_ in cuts.micro_batches] == [0, *[stop for _, stop, _ in cuts.micro_batches[:-1]]]
        assert cuts.micro_batches[-1][1] == cuts.rows
        total, loads = counted(sizes, owned, cuts, shares_prompts)
        assert cuts.positions == total
        for load, (start, stop, width) in zip(loads, cuts.micro_batches, strict=True):
            assert load <= 4096 or stop - start == 1
            assert width == max(int(sizes.tokens[mine[start:stop]].max(initial=1)) for mine in owned)


def test_without_shared_prompts_the_longest_come_first_in_turn():
    sizes = sizes_of([(2, [5, 2, 9]), (2, [9, 4, 7, 1])])
    owned = dealt(sizes, 2, 22)
    assert [sizes.tokens[mine].tolist() for mine in owned] == [[11, 9, 6, 3], [11, 7, 4]]
    assert cut(sizes, owned, 22).micro_batches == ((0, 2, 11), (2, 4, 6))


@pytest.mark.parametrize(("prompt", "response", "ranks"), [
    (100, 300, 1), (100, 300, 8), (200, 2000, 8), (200, 4000, 8), (300, 6000, 4), (2000, 300, 8), (300, 700, 1),
])  # fmt: skip
def test_sharing_never_makes_ranks_compute_more(prompt, response, ranks):
    for seed in range(3):
        sizes = drawn(seed, 64, 8, prompt, response)
        apart = cut(sizes, dealt(sizes, ranks, 16_384), 16_384).positions
        shared = cut(sizes, dealt(sizes, ranks, 16_384, shares_prompts=True), 16_384, shares_prompts=True).positions
        assert shared <= apart
        if prompt > response:
            assert shared < 0.6 * apart


@pytest.mark.parametrize("failed", [[], [3], [3, 12, 40, 41, 77]])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_completions_of_long_prompts_stay_together_even_if_some_are_missing(ranks, failed):
    whole = drawn(0, 16, 8, 1000, 100)
    sizes = whole.of([place for place in range(128) if place not in failed])
    for mine in dealt(sizes, ranks, 16_384, shares_prompts=True):
        runs = [number for number, _ in itertools.groupby(sizes.prompts[mine].tolist())]
        assert len(runs) == len({*runs}), "side by side"
        assert len(runs) <= 16 // ranks + 1


def test_a_group_larger_than_a_ranks_share_is_divided():
    sizes = sizes_of([(500, [10] * 16)])
    owned = dealt(sizes, 4, 16_384, shares_prompts=True)
    assert [len(mine) for mine in owned] == [4] * 4


def test_mini_batches_are_dealt_evenly_whoever_shares_prompts():
    sizes = drawn(0, 8, 8)
    passes = permuted(64, 4, 2, 0, 0)
    for shared, apart in zip(dealt(sizes, 4, 4096, passes, True), dealt(sizes, 4, 4096, passes), strict=True):
        assert shared.tolist() == apart.tolist()
