"""Packed sequences against the padded arrays that they stand for, bit for bit; their bytes; references to them."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from cola_ray.batch import Held, Picked, Tally, apart, as_groups, collate, together
from cola_ray.experience import Episode, Trajectory, Turn
from cola_ray.learner.micro_batch import MicroBatch
from cola_ray.packing import Ragged, Runs, pack
from cola_ray.replay.transitions import as_completion_rows, as_trajectories

PAD = 7


def completion(draw, num_actions=64, hidden=0, reward=0.0, failure="", longest=40):
    prompt, length = int(draw.integers(1, 30)), int(draw.integers(1, longest))
    states = draw.integers(-999, 999, (prompt + length - 1, hidden)).astype(np.int16) if hidden else None
    return Trajectory(
        draw.integers(1, 128_000, prompt), draw.integers(1, 128_000, length), draw.integers(0, num_actions, length),
        draw.normal(size=length).astype(np.float32), np.full(length, 3), reward, False, "", failure, states,
    )  # fmt: skip


def played(draw, terminated, weighed):
    """An episode of three turns as one sequence; ``weighed``: each turn has its own advantage."""
    ids, turns = draw.integers(1, 99, 4), []
    for _ in range(3):
        said, answer = draw.integers(1, 99, int(draw.integers(1, 6))), draw.integers(1, 99, 3)
        log_probs = -draw.random(len(said)).astype(np.float32)
        turns.append(Turn(ids, said, said % 5, log_probs, said * 0, float(draw.normal()), answer))
        ids = np.concatenate([ids, said, answer])
    (one,) = Episode(0, tuple(turns), terminated, "").as_trajectories(
        0.9, [-0.5, float(draw.normal()), 0.0] if weighed else None
    )
    return one


def kinds(draw):
    """Sequences of every kind together, as replay may mix them."""
    plain = [completion(draw) for _ in range(5)]
    negative = dataclasses.replace(plain[0], actions=plain[0].actions - 1, action_mask=plain[0].actions > 0)
    of_turns = [played(draw, ended, weighed) for ended in (True, False) for weighed in (True, False)]
    return [*plain, negative, *of_turns]


def by_hand(rows, micro_batches, num_rows):
    """What a rank's padded arrays are, position by position.

    Args:
        rows: (trajectory, advantage) of each, longest first.
    """
    shape = num_rows, max(width for _, _, width in micro_batches)
    made = {"input_ids": np.full(shape, PAD, np.int64), "attention_mask": np.zeros(shape, np.int64),
            "actions": np.zeros(shape, np.int64), "action_mask": np.zeros(shape, bool),
            "turn_starts": np.zeros(shape, bool)}  # fmt: skip
    made |= {name: np.zeros(shape, np.float32) for name in ("rollout_log_probs", "advantages", "rewards", "discounts")}
    for row in range(num_rows):
        if row >= len(rows):
            made["attention_mask"][row, 0] = 1
            continue
        one, advantage = rows[row]
        ids = [*one.prompt_ids, *one.token_ids]
        for place, token in enumerate(ids):
            made["input_ids"][row, place], made["attention_mask"][row, place] = token, 1
        for i in range(len(one.token_ids)):
            at, last = row, i == len(one.token_ids) - 1
            place = len(one.prompt_ids) + i - 1
            made["actions"][at, place] = one.actions[i]
            made["action_mask"][at, place] = one.action_mask is None or one.action_mask[i]
            made["rollout_log_probs"][at, place] = one.rollout_log_probs[i]
            made["advantages"][at, place] = advantage if one.advantages is None else one.advantages[i]
            whole = one.rewards is None
            made["rewards"][at, place] = (advantage if last else 0.0) if whole else one.rewards[i]
            made["discounts"][at, place] = (0.0 if last else 1.0) if whole else one.discounts[i]
            first = made["action_mask"][at, place] and not made["action_mask"][at, :place].any()
            made["turn_starts"][at, place] = first if one.turn_starts is None else one.turn_starts[i]
    return made


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def dealt(items, advantages, ranks, rank):
    """A rank's trajectories, longest first."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i].prompt_ids) - len(items[i].token_ids))
    return [(items[i], advantages[i]) for i in order[rank::ranks]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
@pytest.mark.parametrize("seed", range(3))
def test_what_was_packed_is_padded_to_the_same_bits(ranks, seed):
    draw = np.random.default_rng(seed)
    items = kinds(draw)
    advantages = draw.normal(size=len(items)).tolist()
    batches = collate(pack(items), advantages, ranks, PAD, 0, 100)
    for rank, batch in enumerate(batches):
        wanted = by_hand(dealt(items, advantages, ranks, rank), batch.micro_batches, batch.num_rows)
        found = vars(batch.padded())
        assert found.keys() == wanted.keys() | {"hidden_states"}
        for name, array in wanted.items():
            assert same_bits(found[name], array), name
        for start, stop, width in batch.micro_batches:
            cut = MicroBatch.cut(batch, start, stop, width, torch.device("cpu"))
            for name, array in wanted.items():
                assert same_bits(getattr(cut, name).numpy(), np.ascontiguousarray(array[start:stop, :width])), name


def test_bits_that_comparison_does_not_see_are_kept():
    rows = [np.array([0.0, -0.0, -0.0, np.nan, np.nan, 1.0], np.float32), None, np.ones(3, np.float32)]
    runs = Runs.of(rows)
    assert len(runs.values.values) == 5
    assert same_bits(runs[0], rows[0])
    assert runs[1] is None
    assert same_bits(runs[2], rows[2])
    assert Runs.of([None, None]) is None
    empty = Ragged.of([])
    assert len(empty) == 0


@pytest.mark.parametrize(
    ("largest", "kind"), [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.int32)]
)
def test_actions_are_as_wide_as_they_need_to_be(largest, kind):
    one = dataclasses.replace(
        completion(np.random.default_rng(0)), token_ids=np.ones(2, int), actions=np.array([0, largest]),
        rollout_log_probs=np.zeros(2, np.float32),
    )  # fmt: skip
    packed = pack([one])
    assert packed.actions.values.dtype == kind
    assert packed.actions[0].tolist() == [0, largest]


def test_sequences_with_and_without_states_are_not_packed_together():
    draw = np.random.default_rng(0)
    with pytest.raises(ValueError, match="1 of 2 sequences have hidden states"):
        pack([completion(draw, hidden=2), completion(draw)])


class Store:
    """Hands out numbers for what it is given, and counts what it is asked for."""

    def __init__(self):
        self.data, self.asked = [], []

    def put(self, value):
        self.data.append(pickle.dumps(value))
        return Held(value, len(self.data) - 1)

    def get(self, references):
        self.asked += references
        return [pickle.loads(self.data[reference]) for reference in references]


def shares(draw, hidden):
    """Groups of two workers, with rewards that failed and greedy baselines; and the trajectories that were scored."""
    store, groups, scored = Store(), [], []
    for worker in range(2):
        completed = []
        for ticket in range(3):
            made = [
                completion(draw, hidden=hidden, reward=float(i), failure="raised" if (ticket, i) == (1, 1) else "")
                for i in range(4)
            ]
            scored += [one for one in made if not one.failure]
            completed.append((10 * worker + ticket, made, completion(draw, hidden=hidden) if ticket == 2 else None))
        emptied, data = apart(as_groups(completed))
        assert pickle.loads(pickle.dumps(emptied))[0].share.sequences.value is None, "records alone"
        groups += together(emptied, [store.put(part) for part in data])
    return store, groups, scored


@pytest.mark.parametrize("hidden", [0, 5])
def test_a_rank_that_fetches_its_own_part_has_what_it_would_have_been_sent(hidden):
    draw = np.random.default_rng(1)
    store, groups, scored = shares(draw, hidden)
    advantages = draw.normal(size=len(scored)).tolist()
    wanted = collate(pack(scored), advantages, 5, PAD, 2, 64)
    sent = [pickle.loads(pickle.dumps(batch)) for batch in collate(Picked.of_groups(groups), advantages, 5, PAD, 2, 64)]
    for own, batch in zip(wanted, sent, strict=True):
        store.asked = []
        fetched = batch.fetched(store.get)
        assert len(set(store.asked)) == len(store.asked) <= 2 + len(own.sequences) * bool(hidden), (
            "its own states alone"
        )
        for name, array in vars(own.padded()).items():
            other = getattr(fetched.padded(), name)
            assert (array is None and other is None) or same_bits(array, other), name
        same = [dataclasses.replace(one, sequences=None, advantages=None) for one in (own, fetched)]
        assert same[0] == same[1]
        assert own.advantages.tobytes() == fetched.advantages.tobytes()


def test_a_process_that_has_the_data_asks_no_store():
    _, groups, scored = shares(np.random.default_rng(2), 0)
    fetched = Picked.of_groups(groups).fetched()
    assert [ids.tolist() for ids in map(fetched.responses.__getitem__, range(len(fetched)))] == [
        one.token_ids.tolist() for one in scored
    ]


def test_a_groups_records_count_its_scored_completions():
    _, groups, scored = shares(np.random.default_rng(3), 0)
    assert [len(group.scored) for group in groups] == [4, 3, 4] * 2
    assert [len(group.asked) for group in groups] == [4, 4, 5] * 2
    together_ = Tally.over(group.actions for group in groups)
    counts = np.zeros(64, np.int64)
    counts[together_.values] = together_.counts
    assert counts.tolist() == np.bincount(np.concatenate([one.actions for one in scored]), minlength=64).tolist()
    assert [group.rewards.tolist() for group in groups[:2]] == [[0, 1, 2, 3], [0, 2, 3]]
    one = completion(np.random.default_rng(0))
    (twice,) = as_groups([(0, [one, one, dataclasses.replace(one, failure="raised")], None)])
    assert (twice.distinct, len(twice.scored)) == (1, 2)


def test_replay_gives_back_what_was_packed():
    draw = np.random.default_rng(4)
    items = kinds(draw)
    rows = as_completion_rows(range(len(items)), [3] * len(items), pack(items), np.arange(len(items)))
    for one, back in zip(items, as_trajectories(rows), strict=True):
        for name in ("prompt_ids", "token_ids", "actions", "action_mask", "rewards", "discounts"):
            before, after = getattr(one, name), getattr(back, name)
            assert (before is None and after is None) or np.array_equal(before, after), name


def test_a_token_takes_less_than_24_bytes_and_the_loop_holds_none_of_it():
    """64 actions, prompts of 100 tokens and answers of 300 on average, 16 to a prompt, 8 ranks."""
    draw = np.random.default_rng(5)
    completed = [
        (ticket, [
            dataclasses.replace(completion(draw, longest=600), prompt_ids=np.ones(100, np.int64)) for _ in range(16)
        ], None)
        for ticket in range(32)
    ]  # fmt: skip
    tokens = sum(100 + len(one.token_ids) for _, made, _ in completed for one in made)
    groups, (packed,) = apart(as_groups(completed))
    assert len(pickle.dumps(packed)) / tokens < 9
    assert len(pickle.dumps(groups)) / tokens < 0.5
    store = Store()
    batches = collate(Picked.of_groups(together(groups, [store.put(packed)])), [0.5] * 512, 8, PAD, 0, 4096)
    assert sum(len(pickle.dumps(batch)) for batch in batches) / tokens < 0.12, "places, lengths and advantages"
    assert sum(batch.fetched(store.get).sequences.nbytes for batch in batches) / tokens < 9
    episodes = [played(draw, True, True) for _ in range(200)]  # the costliest: six-token turns, each with an advantage
    of_episodes = sum(len(one.prompt_ids) + len(one.token_ids) for one in episodes)
    assert pack(episodes).nbytes / of_episodes < 24
