"""Sequences as they travel from a worker to a learner rank: end to end, without padding.

    Trajectories ──pack──> Packed ──of──> Packed: some of them, in another order

Legend: N sequences, P tokens of a prompt, L of a response, S of all sequences, H width of the model.

A token of a response takes 9 to 12 bytes, one of a prompt 4: ids and log-probabilities have 32 bits, actions 8 to 32.
Masks, rewards, discounts and advantages change only where turns begin or end, and are stored as runs of equal
values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cola_ray.algorithms.dealing import Sizes
from cola_ray.experience import Trajectory

Array = np.ndarray
_ACTION_TYPES = (np.uint8, np.uint16, np.int32)
_SELDOM = ("action_mask", "rewards", "discounts", "advantages", "turn_starts")
"""Fields that seldom change within a sequence."""


@dataclass(frozen=True)
class Ragged:
    """N rows of different lengths, end to end."""

    values: Array  # (S,)
    ends: Array  # (N,) int64

    @classmethod
    def of(cls, rows: Sequence[Array], dtype: Any = None) -> "Ragged":
        """Args: dtype: None for the rows' own."""
        values = np.concatenate(rows, dtype=dtype, casting="unsafe") if rows else np.empty(0, dtype)
        return cls(values, np.cumsum([len(row) for row in rows], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> Array:
        return self.values[self.ends[row - 1] if row else 0 : self.ends[row]]

    @property
    def lengths(self) -> Array:
        """(N,) int64."""
        return np.diff(self.ends, prepend=0)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.ends.nbytes


@dataclass(frozen=True)
class Runs:
    """N rows that seldom change, as runs of equal values; a sequence may have no row."""

    values: Ragged  # one per run
    lengths: Ragged  # int32

    @classmethod
    def of(cls, rows: Sequence[Array | None]) -> "Runs | None":
        """None if no sequence has a row."""
        if all(row is None for row in rows):
            return None
        starts = [np.empty(0, np.int64) if row is None else _starts(row) for row in rows]
        values = [start if row is None else row[start] for row, start in zip(rows, starts, strict=True)]
        kind = next(row.dtype for row in rows if row is not None)
        lengths = [
            start if row is None else np.diff(start, append=len(row)) for row, start in zip(rows, starts, strict=True)
        ]
        return cls(Ragged.of(values, kind), Ragged.of(lengths, np.int32))

    def __getitem__(self, row: int) -> Array | None:
        values = self.values[row]
        return np.repeat(values, self.lengths[row]) if len(values) else None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.lengths.nbytes


def _starts(row: Array) -> Array:
    """Where a row (of at least one element) changes, compared by its bits."""
    bits = row.view(np.dtype(f"u{row.itemsize}"))  # so that -0.0 is not 0.0, and NaN is itself
    return np.concatenate([[0], np.flatnonzero(bits[1:] != bits[:-1]) + 1])


@dataclass(frozen=True)
class Packed:
    """N sequences end to end. Fields that are None have no row in any sequence, see :class:`Trajectory`."""

    prompts: Ragged  # int32
    responses: Ragged  # int32; this and what follows have L values a sequence
    actions: Ragged  # uint8, uint16 or int32, whatever holds them
    log_probs: Ragged  # float32, of the distribution that was sampled
    action_mask: Runs | None = None  # bool
    rewards: Runs | None = None  # float32
    discounts: Runs | None = None  # float32
    advantages: Runs | None = None  # float32
    turn_starts: Runs | None = None  # bool
    hidden_states: tuple[Array, ...] | None = None  # (P + L - 1, H) for each sequence, if the engine sends them
    states_like: Array | None = None  # (0, H), of their type

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_tokens(self) -> Array:
        """(N,), of each sequence."""
        return self.prompts.lengths + self.responses.lengths

    @property
    def sizes(self) -> Sizes:
        """The sequences' lengths, and which of them have the same prompt."""
        numbers = dict[bytes, int]()
        prompts = [numbers.setdefault(self.prompts[row].tobytes(), len(numbers)) for row in range(len(self))]
        return Sizes(self.num_tokens, self.prompts.lengths, np.array(prompts, np.int64))

    @property
    def num_actions(self) -> Array:
        """(N,), of each sequence: all of its response, or where its mask is true."""
        counts = self.responses.lengths
        if self.action_mask is not None:
            for row in range(len(self)):
                mask = self.action_mask[row]
                counts[row] = len(self.responses[row]) if mask is None else mask.sum()
        return counts

    @property
    def nbytes(self) -> int:
        """Size without hidden states."""
        columns = (getattr(self, field.name) for field in fields(self))
        return sum(column.nbytes for column in columns if isinstance(column, Ragged | Runs))

    def of(self, rows: Sequence[int]) -> "Packed":
        """These sequences, in this order; a copy."""
        states = None if self.hidden_states is None else tuple(self.hidden_states[row] for row in rows)
        return taken_from([(self, row) for row in rows], states, self.states_like)


def pack(trajectories: Sequence[Trajectory]) -> Packed:
    """Pack sequences, in order.

    Raises:
        ValueError: only some of them have hidden states.
    """
    states = [one.hidden_states for one in trajectories]
    held = [one for one in states if one is not None]
    if held and len(held) < len(states):
        raise ValueError(f"{len(held)} of {len(states)} sequences have hidden states")
    return Packed(
        Ragged.of([one.prompt_ids for one in trajectories], np.int32),
        Ragged.of([one.token_ids for one in trajectories], np.int32),
        _narrow(Ragged.of([one.actions for one in trajectories])),
        Ragged.of([one.rollout_log_probs for one in trajectories], np.float32),
        **{name: Runs.of([getattr(one, name) for one in trajectories]) for name in _SELDOM},
        hidden_states=tuple(held) if held else None,
        states_like=held[0][:0].copy() if held else None,
    )


def _narrow(actions: Ragged) -> Ragged:
    """In the narrowest type that holds all actions."""
    if not len(actions.values):
        return actions
    low, high = int(actions.values.min()), int(actions.values.max())
    kind = next(one for one in _ACTION_TYPES if np.iinfo(one).min <= low and high <= np.iinfo(one).max)
    return Ragged(actions.values.astype(kind), actions.ends)


def taken_from(
    places: Sequence[tuple[Packed, int]], states: tuple[Array, ...] | None, states_like: Array | None
) -> Packed:
    """A copy of the sequences at these places."""

    def ragged(name: str) -> Ragged:
        return Ragged.of([getattr(source, name)[row] for source, row in places])

    def runs(name: str) -> Runs | None:
        columns = [(getattr(source, name), row) for source, row in places]
        if all(column is None for column, _ in columns):
            return None
        return Runs.of([None if column is None else column[row] for column, row in columns])

    return Packed(
        ragged("prompts"),
        ragged("responses"),
        ragged("actions"),
        ragged("log_probs"),
        **{name: runs(name) for name in _SELDOM},
        hidden_states=states,
        states_like=states_like,
    )
