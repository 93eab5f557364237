"""Mini-batches as in PPO (Schulman et al. 2017, algorithm 1): several optimizer steps in each pass over a batch.

    permuted(count, parts, passes, seed, step)    the sequences of each mini-batch, a permutation for every pass
    deal(order, passes, num_ranks)                the sequences of each rank, about as many of every mini-batch

Which sequences are in a mini-batch does not depend on the number of ranks. A rank keeps its sequences through all
passes, since the frozen base's results for them are computed only once.
"""

from collections.abc import Sequence

import numpy as np

Passes = Sequence[Sequence[np.ndarray]]
"""For each pass, the places of each mini-batch's sequences in their batch."""


def permuted(count: int, parts: int, passes: int, seed: int, step: int) -> Passes:
    """``count`` sequences in ``parts`` mini-batches, whose sizes differ by at most one; empty if there is only one.

    Every pass has its own permutation, a function of seed, step and pass. With fewer sequences than
    ``parts`` the last mini-batches are empty.
    """
    if parts == 1:
        return ()
    orders = (np.random.default_rng((seed, step, number)).permutation(count) for number in range(passes))
    return [np.array_split(order, parts) for order in orders]


def deal(order: Sequence[int], passes: Passes, num_ranks: int) -> list[list[int]]:
    """The sequences of each rank, in this order: dealt out in turn if there are no mini-batches.

    Else each goes to the rank that has the fewest sequences of the same mini-batch, counted over all passes and in the
    whole batch. For 1024 sequences, 8 mini-batches, 4 passes and 16 ranks, the fullest rank of a mini-batch has 9
    sequences, where 8 would be even; dealt out in turn it would have 13.
    """
    if not passes:
        return [[*order[rank::num_ranks]] for rank in range(num_ranks)]
    mini_batch = np.zeros((1 + len(passes), len(order)), np.int64)  # of each sequence: the whole batch, then every pass
    for number, parts in enumerate(passes, 1):
        for part, places in enumerate(parts):
            mini_batch[number, places] = part
    counts = np.zeros((len(mini_batch), max(len(parts) for parts in passes), num_ranks), np.int64)
    owned: list[list[int]] = [[] for _ in range(num_ranks)]
    kinds = np.arange(len(mini_batch))
    for place in order:
        rank = int(counts[kinds, mini_batch[:, place]].sum(0).argmin())
        counts[kinds, mini_batch[:, place], rank] += 1
        owned[rank].append(place)
    return owned
