"""Orders that are computed where needed and never stored: shuffles of any size, and mixtures.

    shuffled(places, count, seed, epoch)     the elements at these places of a permutation of ``count``
    dealt(slots, shares)                     the owner of each slot, and the slot's index among its owner's

Both are pure functions of their arguments, so a run resumes anywhere, on any number of ranks, without a cursor.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_ROUNDS = 8
_LEAST_BITS = 4  # bits of a half: with fewer, a network reaches too few of the permutations
_FINEST = 1_000_000  # the largest denominator of a share


def shuffled(places: np.ndarray, count: int, *key: int) -> np.ndarray:
    """The elements at ``places`` of a permutation of 0 .. count - 1 that ``key`` chooses: (N,) -> (N,) int64.

    A balanced Feistel network over the next power of four, whose round function is splitmix64; results outside the
    range are encrypted again until they fall inside, which keeps it a bijection. Sources: Luby and Rackoff 1988 for the
    network, Black and Rogaway 2002, section 4, for the cycle walking.

    Args:
        places: 0 <= place < count, any integer type.
        key: numbers of at least 0.
    """
    half = np.uint64(max(_LEAST_BITS, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    # The key's length comes first: otherwise a key and the same key followed by zeros would give the same seed.
    keys = np.random.SeedSequence((len(key), *key)).generate_state(_ROUNDS, np.uint64)

    def encrypted(numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> half, numbers & mask
        for of_round in keys:
            left, right = right, left ^ (_mixed(right + of_round) & mask)
        return (left << half) | right

    found = encrypted(np.asarray(places).astype(np.uint64))
    while len(outside := np.flatnonzero(found >= count)):
        found[outside] = encrypted(found[outside])
    return found.astype(np.int64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def dealt(slots: np.ndarray, shares: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The owner of each slot, and the slot's index among its owner's, from 0: (N,) -> (N,), (N,) int64.

    The first owner takes its share of all slots, evenly spaced; the second takes its share of the remaining ones, and
    so on. Of the first n slots, each of K owners has n times its share, give or take K.

    Args:
        slots: at least 0, below 9e12.
        shares: of the K owners, above 0, in any unit; their ratios are kept to 1e-6.
    """
    owner, number = np.zeros(len(slots), np.int64), np.asarray(slots).astype(np.int64)
    left = np.ones(len(slots), bool)  # slots without an owner so far
    for index, share in enumerate(shares):
        part = Fraction(share / sum(shares[index:])).limit_denominator(_FINEST)
        before = number * part.numerator // part.denominator
        takes = left & ((number + 1) * part.numerator // part.denominator > before)
        owner[takes] = index
        number = np.where(takes, before, np.where(left, number - before, number))
        left &= ~takes
    return owner, number
