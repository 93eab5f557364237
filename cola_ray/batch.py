"""From a worker's share of rollouts to a learner rank's batch; the only place where positions shift.

    Trajectories ──as_groups──> Groups, small records ──Picked──> scored ones ──────────collate──> one Batch per rank
                        └─────> their Share, Packed ─────────────────────────────────┐                │
                                in a store                                           └──── fetched: its own rows
                                                                                                      │ padded
                                                                                                      v
                                                                                    rows of one micro-batch, Padded

The loop holds records and references; the tokens go from the store to the ranks. Sequences that the loop makes itself,
from episodes or replay, are Packed all the way.

Legend: N sequences, P tokens of a prompt, L of a response; B rows of a micro-batch, T its width, H width of the model.

Alignment, by example: prompt tokens p0 p1 p2, response x3 x4. Action a2, chosen at position 2, produced x3; a3
produced x4. Packed data hold what happened: ``responses [x3 x4]``, ``actions [a2 a3]``, log-probabilities of the same
length. Only :meth:`Batch.padded` places them at positions 2 and 3 of a (B, T) array:

    position        0    1    2    3    4
    input_ids       p0   p1   p2   x3   x4
    actions         0    0    a2   a3   0
    action_mask     -    -    1    1    -        (the last position acts on nothing; padding is on the right)
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from cola_ray.algorithms.dealing import Sizes, cut, dealt
from cola_ray.algorithms.mini_batches import Passes
from cola_ray.experience import Trajectory
from cola_ray.packing import Packed, pack, taken_from

Array = np.ndarray
T = TypeVar("T")


# --- references ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held(Generic[T]):
    """Data of this process; or data in a store: then only the reference travels to other processes."""

    value: T | None
    reference: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, (self.value if self.reference is None else None, self.reference)


Fetch = Callable[[list[Any]], list[Any]]
"""From references to the data that they stand for."""


def _opened(held: Sequence[Held[Any]], get: Fetch | None) -> list[Any]:
    """The values; those known only by reference are fetched in one call."""
    missing = {place: one.reference for place, one in enumerate(held) if one.value is None}
    found: dict[int, Any] = {}
    if missing:
        assert get is not None, "what was sent by reference needs the store that it is in"
        found = dict(zip(missing, get([*missing.values()]), strict=True))
    return [found[place] if one.value is None else one.value for place, one in enumerate(held)]


@dataclass(frozen=True)
class Share:
    """The result of one call of a worker: the tokens of its groups' completions, one after the other."""

    sequences: Held[Packed]  # without their states
    states: tuple[Held[Array], ...] | None = None  # (P + L - 1, H) for each sequence, if the engine sends them
    states_like: Array | None = None  # (0, H)


@dataclass(frozen=True)
class Sample:
    """The loop's record of a completion."""

    prompt_length: int
    length: int  # of the response
    reward: float
    truncated: bool  # ended by the token budget, not by a stop token
    version: int  # the policy version that chose its first action
    failure: str = ""  # why there is no reward; such a completion is counted and not trained on
    parts: Mapping[str, float] = field(default_factory=dict)  # each reward of ``task.reward`` that applies
    source: str = ""  # the problem's, if the task has several
    num_chosen: int | None = None  # actions that the policy chose; None: one for each token


@dataclass(frozen=True)
class Tally:
    """How often each value occurs."""

    values: Array  # (V,) int32, sorted
    counts: Array  # (V,) int64

    @classmethod
    def of(cls, columns: Sequence[Array]) -> "Tally":
        values, counts = np.unique(np.concatenate([np.empty(0, np.int64), *columns]), return_counts=True)
        return cls(values.astype(np.int32), counts)

    @classmethod
    def over(cls, tallies: Iterable["Tally"]) -> "Tally":
        """The sum of several tallies."""
        together = [(one.values, one.counts) for one in tallies]
        values, places = np.unique(np.concatenate([of for of, _ in together]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, places, np.concatenate([of for _, of in together]))
        return cls(values, counts)


@dataclass(frozen=True)
class Group:
    """All completions of one ticket's prompt: records, and where their tokens are."""

    position: int
    samples: tuple[Sample, ...]
    greedy: Sample | None  # a baseline that is not trained on, if the algorithm wants one
    # Of the scored completions:
    actions: Tally
    versions: Tally  # of the policies that chose the actions
    distinct: int  # number of different responses
    # The tokens of sample i are the share's sequence first + i; the baseline's are not kept.
    first: int
    share: Share
    read: tuple[Trajectory, ...] = ()  # all completions, if the group is kept to be read

    @property
    def asked(self) -> tuple[Sample, ...]:
        """All that were generated to be scored, including the baseline."""
        return self.samples if self.greedy is None else (*self.samples, self.greedy)

    @functools.cached_property
    def scored(self) -> tuple[Sample, ...]:
        """Completions with a reward."""
        return tuple(sample for sample in self.samples if not sample.failure)

    @property
    def rewards(self) -> Array:
        """Of the scored completions, float32."""
        return np.array([sample.reward for sample in self.scored], np.float32)


Completed = tuple[int, Sequence[Trajectory], Trajectory | None]
"""A ticket's position, its completions and the greedy one."""


def as_groups(completed: Sequence[Completed]) -> list[Group]:
    """One group per ticket; all groups have one share."""
    everything = [trajectory for _, trajectories, _ in completed for trajectory in trajectories]
    packed = pack(everything)
    states = packed.hidden_states
    share = Share(
        Held(replace(packed, hidden_states=None, states_like=None)),
        None if states is None else tuple(Held(of) for of in states),
        packed.states_like,
    )
    groups, first = [], 0
    for position, trajectories, greedy in completed:
        scored = [one for one in trajectories if not one.failure]
        groups.append(
            Group(
                position,
                tuple(_sample(one) for one in trajectories),
                None if greedy is None else _sample(greedy),
                Tally.of([_chosen(one, one.actions) for one in scored]),
                Tally.of([_chosen(one, one.versions) for one in scored]),
                len({one.token_ids.tobytes() for one in scored}),
                first,
                share,
            )
        )
        first += len(trajectories)
    return groups


def apart(groups: Sequence[Group]) -> tuple[list[Group], list[Any]]:
    """A share's groups without its data, and the data: the sequences, then each sequence's states."""
    share = groups[0].share
    states = share.states or ()
    emptied = replace(share, sequences=Held(None), states=None if share.states is None else ())
    data = [share.sequences.value, *(of.value for of in states)]
    return [replace(group, share=emptied) for group in groups], data


def together(groups: Sequence[Group], data: Sequence[Held[Any]]) -> list[Group]:
    """Groups from :func:`apart`, with the data put back."""
    share = groups[0].share
    share = replace(share, sequences=data[0], states=None if share.states is None else tuple(data[1:]))
    return [replace(group, share=share) for group in groups]


def _chosen(one: Trajectory, values: Array) -> Array:
    """The values at the actions that the policy chose."""
    return values if one.action_mask is None else values[one.action_mask]


def _sample(one: Trajectory) -> Sample:
    return Sample(
        len(one.prompt_ids), len(one.token_ids), one.reward, one.truncated, int(one.versions[0]), one.failure,
        one.parts, one.source, None if one.action_mask is None else int(one.action_mask.sum()),
    )  # fmt: skip


@dataclass(frozen=True)
class Picked:
    """N sequences out of several shares, by reference; each response is the policy's from its first token on."""

    sources: tuple[Held[Packed], ...]
    places: Array  # (N, 2) int32: for each sequence its source, and its index there
    num_actions: Array  # (N,)
    sizes: Sizes
    states: tuple[Held[Array], ...] | None = None
    states_like: Array | None = None

    @classmethod
    def of_groups(cls, groups: Sequence[Group]) -> "Picked":
        """The scored completions, in order."""
        shares = {id(group.share): group.share for group in groups}
        numbers = {share: number for number, share in enumerate(shares)}
        scored = [
            (number, group, group.first + i, sample)
            for number, group in enumerate(groups)
            for i, sample in enumerate(group.samples)
            if not sample.failure
        ]
        like = next((share.states_like for share in shares.values()), None)
        return cls(
            tuple(share.sequences for share in shares.values()),
            np.array([(numbers[id(group.share)], place) for _, group, place, _ in scored], np.int32).reshape(-1, 2),
            np.array(
                [sample.length if sample.num_chosen is None else sample.num_chosen for *_, sample in scored], np.int64
            ),
            Sizes(
                np.array([sample.prompt_length + sample.length for *_, sample in scored], np.int32),
                np.array([sample.prompt_length for *_, sample in scored], np.int32),
                np.array([number for number, *_ in scored], np.int32),
            ),
            None if like is None else tuple(_state(group, place) for _, group, place, _ in scored),
            like,
        )

    def __len__(self) -> int:
        return len(self.places)

    def of(self, rows: Sequence[int]) -> "Picked":
        """These sequences, in this order, with only the sources that they need."""
        rows = [*rows]
        used, renamed = np.unique(self.places[rows, 0], return_inverse=True)
        return Picked(
            tuple(self.sources[source] for source in used),
            np.column_stack([renamed, self.places[rows, 1]]).astype(np.int32),
            self.num_actions[rows],
            self.sizes.of(rows),
            None if self.states is None else tuple(self.states[row] for row in rows),
            self.states_like,
        )

    def fetched(self, get: Fetch | None = None) -> Packed:
        """A copy of these sequences.

        Args:
            get: reads a store, for what was sent by reference.
        """
        found = _opened([*self.sources, *(self.states or ())], get)
        sources = found[: len(self.sources)]
        return taken_from(
            [(sources[source], row) for source, row in self.places.tolist()],
            None if self.states is None else tuple(found[len(self.sources) :]),
            self.states_like,
        )


def _state(group: Group, place: int) -> Held[Array]:
    assert group.share.states is not None, "an engine sends the states of all completions"
    return group.share.states[place]


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Padded:
    """Rows of a batch, right-padded."""

    input_ids: Array  # (B, T) int64
    attention_mask: Array  # (B, T) int64
    actions: Array  # (B, T) int64, 0 where masked
    action_mask: Array  # (B, T) bool
    rollout_log_probs: Array  # (B, T) float32, 0 where masked
    advantages: Array  # (B, T) float32, of the outcome; the same at every action of a sequence
    rewards: Array  # (B, T) float32, of each action; all of these three are 0 where masked
    discounts: Array  # (B, T) float32, of the value after each action
    turn_starts: Array  # (B, T) bool, the first action of each turn
    hidden_states: Array | None  # (B, T, H), where the engine sends them; bfloat16 as int16


@dataclass(frozen=True)
class MiniBatch:
    """A rank's rows of one mini-batch; the other fields are as in a Batch of these rows alone."""

    rows: tuple[int, ...]
    num_rows: int
    micro_batches: tuple[tuple[int, int, int], ...]
    num_actions_global: int
    num_sequences_global: int
    num_tokens_global: int


@dataclass(frozen=True)
class Batch:
    """One learner rank's share of a step, cut into micro-batches at the same rows on every rank."""

    sequences: Packed | Picked  # in the order of the rows; Packed where it is trained on
    advantages: Array  # (N,) float32, of the outcome
    num_rows: int  # on every rank; a rank with fewer sequences has rows of one token and no action
    micro_batches: tuple[tuple[int, int, int], ...]  # (first row, end row, width) of each
    num_actions_global: int  # over all ranks: what a loss sum is divided by
    num_sequences_global: int  # over all ranks: those with an action
    num_tokens_global: int  # over all ranks, prompts and observations included
    policy_version: int  # the version the learner holds when it trains on this
    pad_id: int
    trains: bool = True  # else the learner only measures, and the policy is left unchanged
    mini_batches: tuple[tuple[MiniBatch, ...], ...] = ()  # for each pass; empty: the whole batch is its only one
    # (N,) int64, the sequences' indices in the order that they were given for all ranks; for algorithms that need it
    places: Array | None = None

    def prompts(self, start: int, stop: int) -> tuple[list[Hashable], list[tuple[int, int]]]:
        """For rows ``start`` to ``stop``: a key, the same for the same prompt; the lengths of prompt and response."""
        packed = self.sequences
        assert isinstance(packed, Packed), "fetched() comes first"
        rows = range(start, min(stop, len(packed)))
        missing = range(len(rows), stop - start)  # rows without a sequence have one token
        lengths = [(len(packed.prompts[row]), len(packed.responses[row])) for row in rows]
        return [*(packed.prompts[row].tobytes() for row in rows), *missing], [*lengths, *[(1, 0) for _ in missing]]

    def computed_share(self, shares_prompts: bool) -> float:
        """Positions that this rank computes, divided by its tokens; a row without a sequence counts as one token.

        Args:
            shares_prompts: a micro-batch in which a prompt is repeated computes each prompt once, and no padding.
        """
        computed = tokens = 0
        for start, stop, width in self.micro_batches:
            names, lengths = self.prompts(start, stop)
            own = sum(map(sum, lengths))
            once = dict(zip(names, (prompt for prompt, _ in lengths), strict=True))
            if shares_prompts and len(once) < len(names):
                computed += sum(once.values()) + sum(response for _, response in lengths)
            else:
                computed += (stop - start) * width
            tokens += own
        return computed / tokens

    def fetched(self, get: Fetch | None = None) -> "Batch":
        """The batch with the sequences themselves, see :meth:`Picked.fetched`."""
        if isinstance(self.sequences, Packed):
            return self
        return replace(self, sequences=self.sequences.fetched(get))

    def part(self, mini_batch: MiniBatch) -> "Batch":
        """One of the mini-batches as a batch; sequences must have been fetched."""
        assert isinstance(self.sequences, Packed), "fetched() comes first"
        rows, fields = [*mini_batch.rows], dict(vars(mini_batch))
        del fields["rows"]
        sequences, advantages = self.sequences.of(rows), self.advantages[rows]
        return replace(self, sequences=sequences, advantages=advantages, mini_batches=(), places=None, **fields)

    def padded(self, start: int = 0, stop: int | None = None, width: int | None = None) -> Padded:
        """Rows ``start`` to ``stop``, by default all, as wide as the widest; sequences must have been fetched."""
        packed = self.sequences
        assert isinstance(packed, Packed), "fetched() comes first"
        stop = self.num_rows if stop is None else stop
        shape = (stop - start, max(of for _, _, of in self.micro_batches) if width is None else width)
        input_ids = np.full(shape, self.pad_id, np.int64)
        attention_mask, actions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        attention_mask[max(len(packed) - start, 0) :, 0] = 1  # a row without a sequence: one token, no action
        action_mask, turn_starts = np.zeros(shape, bool), np.zeros(shape, bool)
        log_probs, advantages, rewards, discounts = (np.zeros(shape, np.float32) for _ in range(4))
        like = packed.states_like
        hidden = None if like is None else np.zeros((*shape, like.shape[-1]), like.dtype)
        for row in range(start, min(stop, len(packed))):
            at, prompt, response = row - start, packed.prompts[row], packed.responses[row]
            first, end = len(prompt), len(prompt) + len(response)
            input_ids[at, :first], input_ids[at, first:end] = prompt, response
            attention_mask[at, :end] = 1
            acting = slice(first - 1, end - 1)  # the shift: an action sits where it was chosen
            actions[at, acting], log_probs[at, acting] = packed.actions[row], packed.log_probs[row]
            outcome, columns = (
                self.advantages[row],
                (packed.action_mask, packed.advantages, packed.rewards, packed.discounts, packed.turn_starts),
            )
            mask, own, gains, factors, starts = (None if column is None else column[row] for column in columns)
            action_mask[at, acting] = taken = np.ones(end - first, bool) if mask is None else mask
            turn_starts[at, acting] = taken & (taken.cumsum() == 1) if starts is None else starts
            advantages[at, acting] = outcome if own is None else own
            if gains is None or factors is None:
                # The reward belongs to the last action; where an action is held, this is earlier than the last token.
                last = first - 1 + int(np.flatnonzero(taken)[-1]) if taken.any() else end - 2
                rewards[at, last], discounts[at, first - 1 : last] = outcome, 1.0
            else:
                rewards[at, acting], discounts[at, acting] = gains, factors
            if hidden is not None and packed.hidden_states is not None:
                hidden[at, : end - 1] = packed.hidden_states[row]
        return Padded(
            input_ids, attention_mask, actions, action_mask, log_probs, advantages, rewards, discounts, turn_starts,
            hidden,
        )  # fmt: skip


def collate(
    sequences: Packed | Picked,
    advantages: Sequence[float],
    num_ranks: int,
    pad_id: int,
    policy_version: int,
    micro_batch_tokens: int,
    passes: Passes = (),
    keep_places: bool = False,
    shares_prompts: bool = False,
) -> list[Batch]:
    """Sequences and their outcome advantages -> one batch per rank, see :mod:`~cola_ray.algorithms.dealing`.

    Ranks with fewer sequences than others also get rows without actions.

    Args:
        passes: the sequences of each mini-batch. They are cut in the same way; those without any action are left out.
        keep_places: batches record which of the sequences they have.
        shares_prompts: ranks compute a prompt once for all of its rows in a micro-batch.
    """
    sizes, num_actions = sequences.sizes, sequences.num_actions
    owned = dealt(sizes, num_ranks, micro_batch_tokens, passes, shares_prompts)
    outcomes = np.asarray(advantages, np.float32)
    rows = np.zeros((len(sequences), 2), np.int64)  # for each sequence: its rank, and its row there
    for rank, mine in enumerate(owned):
        rows[mine, 0], rows[mine, 1] = rank, np.arange(len(mine))

    def shape(owned: Sequence[Array]) -> tuple[int, tuple[tuple[int, int, int], ...], int, int, int]:
        """For these sequences of each rank: number of rows, micro-batches, totals."""
        cuts, together = cut(sizes, owned, micro_batch_tokens, shares_prompts), np.concatenate(owned)
        acting = num_actions[together]
        totals = int(acting.sum()), int((acting > 0).sum()), int(sizes.tokens[together].sum())
        return cuts.rows, cuts.micro_batches, *totals

    def mini_batch(places: Array) -> list[MiniBatch]:
        """One per rank."""
        chosen = [np.sort(rows[places][rows[places, 0] == rank, 1]) for rank in range(num_ranks)]
        whole = shape([mine[own] for mine, own in zip(owned, chosen, strict=True)])
        return [MiniBatch(tuple(own.tolist()), *whole) for own in chosen]

    whole = shape(owned)
    made = [[mini_batch(places) for places in parts if num_actions[places].any()] for parts in passes]
    return [
        Batch(
            sequences.of(mine.tolist()), outcomes[mine], *whole, policy_version, pad_id,
            mini_batches=tuple(tuple(part[rank] for part in parts) for parts in made),
            places=mine if keep_places else None,
        )
        for rank, mine in enumerate(owned)
    ]  # fmt: skip
