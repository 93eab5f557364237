"""Rows of whole documents side by side, from memory or made on the fly from shards.

    PackedRows(...)                          R rows in memory
    ShardedRows([Pool(documents, ...)], ...) rows of pools of shards, which are not held in memory

Both say which rows a step trains on (``step_indices``, a pure function of seed and step) and read given rows
(``read``). A pool's documents are shuffled as a whole; each bundle of neighbours in this order is packed separately:

    documents ──shuffled by seed──> bundles of a few hundred rows ──shuffled by seed and epoch──> rows

The rows of each bundle are counted once (:func:`count_rows`), so that a row is found without packing those before
it: best fit, longest first, depends only on lengths, so every epoch has the same number of rows.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from cola_ray.learner.shards import TEXT, Documents
from cola_ray.learner.shuffle import dealt, shuffled

_BUNDLE_ROWS = 512  # approximate rows in a bundle: then its last rows leave little empty
_PLANS = 4  # packed bundles that are kept
_LOOKED_UP = 1 << 16  # documents whose lengths are looked up together


class Piece(NamedTuple):
    """Tokens of a row that are also consecutive in the corpus."""

    row: int  # index among the rows asked for
    start: int
    length: int
    pool: int
    address: int  # of the first token, counted over all tokens of the pool in the order of documents


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """R rows of T tokens.

    ``position_ids`` restart at each document, which also keeps their attention apart. ``loss_mask[r, t]`` is true where
    position t predicts a token to be learnt, namely the one at t + 1: never across documents, never in a row's padding,
    and only response tokens if ``response_only``.
    """

    input_ids: np.ndarray  # (R, T) int64
    position_ids: np.ndarray  # (R, T) int64
    loss_mask: np.ndarray  # (R, T) bool
    steps: np.ndarray | None = None  # (R, T) int64, see steps_of; None: every document is a text

    @classmethod
    def empty(cls, rows: int, length: int, pad_id: int) -> "PackedRows":
        """Rows of padding, to be filled by :meth:`place` and :meth:`close`."""
        shape = (rows, length)
        return cls(np.full(shape, pad_id, np.int64), *(np.zeros(shape, kind) for kind in (np.int64, bool, np.int64)))

    def place(
        self, row: int, start: int, ids: np.ndarray | Sequence[int], learned: np.ndarray | bool,
        responses: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Put a document at ``start`` of a row.

        Args:
            learned: (len(ids) - 1,), which of the tokens after the first are to be learnt, or all of them.
            responses: where the document's responses begin; empty: it is a text.
        """
        end = start + len(ids)
        self.input_ids[row, start:end] = ids
        self.position_ids[row, start:end] = np.arange(len(ids))
        self.loss_mask[row, start : end - 1] = learned
        if self.steps is not None:
            self.steps[row, start:end] = steps_of(len(ids), responses)

    def close(self, row: int, end: int) -> None:
        """Number the padding from ``end`` on, as a separate document."""
        self.position_ids[row, end:] = np.arange(self.width - end)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def width(self) -> int:
        return self.input_ids.shape[1]

    def step_indices(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Rows of a step: each epoch is a new permutation; the last short batch runs into the next epoch."""
        first = step * batch_size
        epochs = range(first // len(self), (first + batch_size - 1) // len(self) + 1)
        order = np.concatenate([np.random.default_rng((seed, epoch)).permutation(len(self)) for epoch in epochs])
        offset = first - epochs.start * len(self)
        return order[offset : offset + batch_size]

    def read(self, indices: np.ndarray) -> "PackedRows":
        steps = None if self.steps is None else self.steps[indices]
        return PackedRows(self.input_ids[indices], self.position_ids[indices], self.loss_mask[indices], steps)

    def pieces(self, indices: np.ndarray) -> list[Piece]:
        return [Piece(row, 0, self.width, 0, int(index) * self.width) for row, index in enumerate(indices)]

    @property
    def fingerprints(self) -> list[str]:
        digest = hashlib.sha256()
        for array in (self.input_ids, self.position_ids):
            digest.update(np.ascontiguousarray(array).data)
        return [digest.hexdigest()]

    @property
    def tokens(self) -> int:
        return self.input_ids.size


def steps_of(length: int, responses: Sequence[int]) -> np.ndarray:
    """For each position of a document, which step of its response is taken there, (length,) int64.

    The step that gives a response's first token is 0; steps before it, in the prompt, are negative. A text is counted
    from its first token, where the first step is taken.

    Example: 5 tokens, a response from the third on -> -1, 0, 1, 2, 3.
    """
    first = np.maximum(np.asarray(responses or (1,), np.int64), 1)
    given = np.arange(1, length + 1)  # the token that each position gives
    return given - first[np.maximum(np.searchsorted(first, given, "right") - 1, 0)]


class Rows(Protocol):
    """The interface of a corpus for pre-training."""

    @property
    def width(self) -> int:
        """T."""
        ...

    def step_indices(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """The rows that all ranks together train on in a step, (batch_size,) int64."""
        ...

    def read(self, indices: np.ndarray) -> PackedRows:
        """The rows at these indices."""
        ...

    def pieces(self, indices: np.ndarray) -> list[Piece]:
        """Where in the corpus their tokens are; padding may be left out."""
        ...

    @property
    def fingerprints(self) -> list[str]:
        """For each pool, a fingerprint of which tokens have which addresses."""
        ...

    @property
    def tokens(self) -> int:
        """The number of tokens of all pools."""
        ...


# --- packing ------------------------------------------------------------------------------------------------------


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Pack pieces into rows, the longest first, each where it leaves the least space; returns each row's pieces."""
    rows, spaces, free = list[list[int]](), collections.defaultdict[int, list[int]](list), 0
    for piece in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[piece]
        fitting = free >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = spaces[space].pop()
            rows[row].append(piece)
            if not spaces[space]:
                free ^= 1 << space
        else:
            row, space = len(rows), size
            rows.append([piece])
        if space > length:
            spaces[space - length].append(row)
            free |= 1 << (space - length)
    return rows


def pieces_of(lengths: np.ndarray, prompts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents to rows of ``size``: (N,), (N,) -> the document, start and length of each of P pieces, (P,) int64.

    A text is cut as often as necessary; a pair is cut at its end, and left out if its prompt alone fills a row. Pieces
    of one token are dropped, since they predict nothing.
    """
    counts = np.where(prompts == TEXT, -(-lengths // size), prompts < size)
    documents = np.repeat(np.arange(len(lengths)), counts)
    starts = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    pieces = np.minimum(lengths[documents] - starts, size)
    keep = pieces > 1
    return documents[keep], starts[keep], pieces[keep]


# --- pools --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bundles:
    """Neighbours in the shuffled order of a pool's documents, ``size`` per bundle, fewer in the last one."""

    documents: Documents
    seed: int
    length: int  # tokens of a row

    @property
    def size(self) -> int:
        mean = max(self.documents.tokens / len(self.documents), 1.0)
        return 1 << min(max(round(np.log2(_BUNDLE_ROWS * self.length / mean)), 6), 16)

    def __len__(self) -> int:
        return -(-len(self.documents) // self.size)

    def members(self, bundle: int) -> np.ndarray:
        """Numbers of the bundle's documents."""
        places = np.arange(bundle * self.size, min((bundle + 1) * self.size, len(self.documents)))
        return shuffled(places, len(self.documents), self.seed)


def count_rows(bundles: Bundles, first: int, end: int) -> list[int]:
    """Row counts of the bundles from ``first`` to ``end``."""
    counts, several = list[int](), max(1, _LOOKED_UP // bundles.size)
    for start in range(first, end, several):
        members = [bundles.members(bundle) for bundle in range(start, min(start + several, end))]
        lengths, prompts = bundles.documents.lengths(np.concatenate(members))
        cuts = np.cumsum([len(one) for one in members])[:-1]
        for one in zip(np.split(lengths, cuts), np.split(prompts, cuts), strict=True):
            counts.append(len(best_fit(pieces_of(*one, bundles.length)[2].tolist(), bundles.length)))
    return counts


class Pool:
    """Documents that are shuffled together, as an endless sequence of rows, epoch after epoch.

    Args:
        bundles: the documents, in bundles.
        counts: rows of each bundle, (len(bundles),).

    Raises:
        ValueError: there is no row at all.
    """

    def __init__(self, bundles: Bundles, counts: np.ndarray) -> None:
        self.bundles, self.counts = bundles, counts
        self.rows = int(counts.sum())  # per epoch
        if not self.rows:
            raise ValueError("no document has two tokens, or a prompt that leaves room for a response; raise "
                             "pretrain.sequence_length")  # fmt: skip
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._plans: collections.OrderedDict[tuple[int, int], _Plan] = collections.OrderedDict()

    def read(self, numbers: np.ndarray, into: PackedRows, at: np.ndarray, response_only: bool) -> None:
        """Fill rows ``at`` of ``into`` with these rows of the sequence, (N,) each."""
        for plan, rows, here in self._planned(numbers):
            plan.fill(self.bundles.documents, rows, into, at[here], response_only)

    def pieces(self, numbers: np.ndarray, at: np.ndarray, pool: int) -> list[Piece]:
        """Pieces of these rows of the sequence, which have the indices ``at`` among the rows asked for."""
        found = list[Piece]()
        for plan, rows, here in self._planned(numbers):
            places = plan.placed(rows, at[here])
            documents = self.bundles.documents.addresses(np.array([one.document for one in places], np.int64))
            found += [Piece(one.row, one.start, one.length, pool, int(first) + one.cut)
                      for one, first in zip(places, documents, strict=True)]  # fmt: skip
        return found

    def _planned(self, numbers: np.ndarray) -> "Iterator[tuple[_Plan, np.ndarray, np.ndarray]]":
        """The bundles that contain these rows of the sequence: each plan, its rows, and their places in ``numbers``."""
        epochs, places = numbers // self.rows, numbers % self.rows
        for epoch in np.unique(epochs):
            order, ends = self._order(int(epoch))
            found = np.searchsorted(ends, places, "right")
            for which in np.unique(found[epochs == epoch]):
                here = np.flatnonzero((epochs == epoch) & (found == which))
                bundle = int(order[which])
                rows = places[here] - (ends[which] - self.counts[bundle])
                yield self._plan(int(epoch), bundle), rows, here

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's order of bundles, and for each the number of the row after its last."""
        if epoch not in self._orders:
            order = shuffled(np.arange(len(self.counts)), len(self.counts), self.bundles.seed, epoch)
            self._orders = {epoch: (order, np.cumsum(self.counts[order], dtype=np.int64))}
        return self._orders[epoch]

    def _plan(self, epoch: int, bundle: int) -> "_Plan":
        key = (epoch, bundle)
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self._plans.popitem(last=False)
            self._plans[key] = _Plan.of(self.bundles, epoch, bundle)
        self._plans.move_to_end(key)
        return self._plans[key]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A bundle packed for an epoch: each row's documents, and for each document its prompt and where it is cut."""

    rows: list[list[tuple[int, int, int, int]]]  # (document, prompt, start, length) side by side

    @classmethod
    def of(cls, bundles: Bundles, epoch: int, bundle: int) -> "_Plan":
        random = np.random.default_rng((bundles.seed, epoch, bundle))
        members = random.permutation(bundles.members(bundle))
        lengths, prompts = bundles.documents.lengths(members)
        inside, starts, pieces = pieces_of(lengths, prompts, bundles.length)
        described = list(zip(members[inside].tolist(), prompts[inside].tolist(), starts.tolist(), pieces.tolist(),
                             strict=True))  # fmt: skip
        packed = best_fit(pieces.tolist(), bundles.length)
        return cls([[described[piece] for piece in packed[row]] for row in random.permutation(len(packed))])

    def placed(self, rows: np.ndarray, at: np.ndarray) -> "list[_Place]":
        """The pieces of these rows, (N,), which have the indices ``at`` among the rows to be filled."""
        found = list["_Place"]()
        for row, number in zip(at.tolist(), rows.tolist(), strict=True):
            start = 0
            for document, prompt, cut, length in self.rows[number]:
                found.append(_Place(row, start, document, prompt, cut, length))
                start += length
        return found

    def fill(
        self, documents: Documents, rows: np.ndarray, into: PackedRows, at: np.ndarray, response_only: bool
    ) -> None:
        places = self.placed(rows, at)
        ends = {one.row: one.start + one.length for one in places}
        for index, ids in documents.read(np.array([one.document for one in places], np.int64)):
            one = places[index]
            learned: np.ndarray | bool = True
            if response_only and one.prompt > 1:
                learned = np.arange(1, one.length) >= one.prompt
            responses = () if one.prompt == TEXT else (one.prompt,)
            into.place(one.row, one.start, ids[one.cut : one.cut + one.length], learned, responses)
        for row in at.tolist():
            into.close(row, ends.get(row, 0))


class _Place(NamedTuple):
    row: int
    start: int
    document: int
    prompt: int
    cut: int
    length: int


class ShardedRows:
    """Rows of several pools of shards, mixed by their shares: :class:`Rows` that are made on demand.

    Args:
        pools: built for one seed and one length.
        shares: of all rows, in any unit; for a single pool, anything.
        response_only: learn only response tokens in documents that have a prompt.
    """

    def __init__(self, pools: Sequence[Pool], shares: Sequence[float], pad_id: int, response_only: bool) -> None:
        self.pools, self.shares, self.pad_id, self.response_only = pools, shares, pad_id, response_only

    @property
    def width(self) -> int:
        return self.pools[0].bundles.length

    def step_indices(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """The next ``batch_size`` of all rows; ``seed`` must be that of the pools, in which rows are shuffled."""
        return step * batch_size + np.arange(batch_size, dtype=np.int64)

    def read(self, indices: np.ndarray) -> PackedRows:
        rows = PackedRows.empty(len(indices), self.width, self.pad_id)
        owners, numbers = dealt(indices, self.shares)
        for owner, pool in enumerate(self.pools):
            here = np.flatnonzero(owners == owner)
            if len(here):
                pool.read(numbers[here], rows, here, self.response_only)
        return rows

    def pieces(self, indices: np.ndarray) -> list[Piece]:
        owners, numbers = dealt(indices, self.shares)
        found = list[Piece]()
        for owner, pool in enumerate(self.pools):
            here = np.flatnonzero(owners == owner)
            if len(here):
                found += pool.pieces(numbers[here], here, owner)
        return found

    @property
    def fingerprints(self) -> list[str]:
        return ["-".join(pool.bundles.documents.fingerprints) for pool in self.pools]

    @property
    def tokens(self) -> int:
        return sum(pool.bundles.documents.tokens for pool in self.pools)
