"""Which rank trains on which sequences, and where the rows of all ranks are cut into micro-batches.

    longest first, dealt out in turn ──────────────┬── cut ──> whichever makes ranks compute fewer positions
    completions of a prompt side by side on a rank ┘

With ZeRO-3 every rank must run the same number of micro-batches, and ranks wait for one another in each. So all ranks
are cut at the same rows, and a micro-batch takes as long as the rank that computes most in it. A rank with several
completions of a prompt in a micro-batch can compute the prompt once; it then computes no padding either.

Legend: N sequences.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cola_ray.algorithms.mini_batches import Passes, deal

Array = np.ndarray
_KEYS = 2
"""In packed rows, the most attention keys that a micro-batch may have for each token of its budget."""


@dataclass(frozen=True)
class Sizes:
    """Lengths of N sequences, and their prompts; (N,) each."""

    tokens: Array  # of prompt and response together
    before: Array  # tokens of the prompt
    prompts: Array  # a number for each prompt, the same for all of its completions

    def of(self, places: Sequence[int]) -> "Sizes":
        """The sizes of these sequences."""
        return Sizes(self.tokens[places], self.before[places], self.prompts[places])


@dataclass(frozen=True)
class Cuts:
    """Where the rows of all ranks are cut."""

    rows: int  # on every rank; the last ones of a rank with fewer sequences have one token each
    micro_batches: tuple[tuple[int, int, int], ...]  # (first row, end row, width) of each
    positions: int  # the sum over micro-batches, each counted on the rank that computes most in it


def dealt(sizes: Sizes, num_ranks: int, budget: int, passes: Passes = (), shares_prompts: bool = False) -> list[Array]:
    """The sequences of each rank, in the order of its rows.

    Args:
        budget: tokens that a rank computes in a micro-batch at most, with padding.
        passes: the mini-batches of each pass, dealt out evenly; completions of a prompt are then not kept together.
        shares_prompts: ranks compute a prompt once for all of its rows in a micro-batch.
    """
    longest_first = sorted(range(len(sizes.tokens)), key=lambda i: -sizes.tokens[i])
    apart = [np.array(mine, np.int64) for mine in deal(longest_first, passes, num_ranks)]
    if passes or not shares_prompts or len(np.unique(sizes.prompts)) == len(sizes.prompts):
        return apart
    together = _together(sizes, longest_first, num_ranks)
    return min(apart, together, key=lambda owned: cut(sizes, owned, budget, shares_prompts=True).positions)


def _together(sizes: Sizes, longest_first: Sequence[int], num_ranks: int) -> list[Array]:
    """Completions of a prompt go to the rank with the fewest tokens so far; more than a rank's share go in parts."""
    groups: dict[int, list[int]] = {}
    for place in longest_first:
        groups.setdefault(int(sizes.prompts[place]), []).append(place)
    most = max(1, len(longest_first) // num_ranks)
    parts = [group[first : first + most] for group in groups.values() for first in range(0, len(group), most)]
    tokens = [int(sizes.tokens[part].sum()) for part in parts]
    fewest = [(0, rank) for rank in range(num_ranks)]
    given: list[list[list[int]]] = [[] for _ in fewest]
    for index in sorted(range(len(parts)), key=lambda i: -tokens[i]):
        sum_of, rank = heapq.heappop(fewest)
        given[rank].append(parts[index])
        heapq.heappush(fewest, (sum_of + tokens[index], rank))
    ordered = (sorted(of_rank, key=lambda part: -sizes.tokens[part[0]]) for of_rank in given)
    return [np.array([place for part in of_rank for place in part], np.int64) for of_rank in ordered]


def cut(sizes: Sizes, owned: Sequence[Array], budget: int, shares_prompts: bool = False) -> Cuts:
    """Cut the rows of all ranks: a micro-batch has as many as ``budget`` tokens allow, but at least one."""
    rows = max(map(len, owned))
    shape = len(owned), rows
    tokens, before = np.ones(shape, np.int64), np.ones(shape, np.int64)
    last = np.full(shape, -1)  # the rank's previous row with the same prompt; -1: none
    for rank, mine in enumerate(owned):
        tokens[rank, : len(mine)], before[rank, : len(mine)] = sizes.tokens[mine], sizes.before[mine]
        rows_of: dict[int, int] = {}
        for row, prompt in enumerate(sizes.prompts[mine].tolist()):
            last[rank, row] = rows_of.get(prompt, -1)
            rows_of[prompt] = row
    cuts, positions, start = list[tuple[int, int, int]](), 0, 0
    while start < rows:
        packed, longest = np.zeros(len(owned), np.int64), np.zeros((2, len(owned)), np.int64)
        repeats, width, computed = np.zeros(len(owned), bool), 0, 0
        for stop in range(start + 1, rows + 1):
            row = stop - 1
            again = (last[:, row] >= start) & shares_prompts
            repeats = repeats | again
            packed = packed + tokens[:, row] - np.where(again, before[:, row], 0)
            longest = np.maximum(longest, [before[:, row], tokens[:, row] - before[:, row]])
            wider = max(width, int(tokens[:, row].max()))
            keys, padded = (stop - start) * longest.sum(0), (stop - start) * wider
            if stop > start + 1 and np.where(repeats, np.maximum(packed, keys / _KEYS), padded).max() > budget:
                stop = row
                break
            width, computed = wider, int(np.where(repeats, packed, padded).max())
        cuts.append((start, stop, width))
        positions, start = positions + computed, stop
    return Cuts(rows, tuple(cuts), positions)
