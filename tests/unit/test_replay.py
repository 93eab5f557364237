"""The replay buffer: what is in it, how it is drawn, what survives on disk."""

import asyncio
import collections
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cola_ray.experience import Episode, Turn, was_said
from cola_ray.replay.buffer import ReplayBuffer, ReplayError
from cola_ray.replay.critic_service import CriticReplicas, CriticService
from cola_ray.replay.priorities import importance_weights
from cola_ray.replay.service import ReplayShard, Shards
from cola_ray.replay.transitions import TextReader, as_rows, critic_batch, features, read_features
from cola_ray.settings.config import CriticConfig
from cola_ray.weights import Channel


def rows(first, count):
    numbers = np.arange(first, first + count)
    text = pa.array([f"turn {n} " + "x" * (n % 7) for n in numbers], pa.string())
    ids = pa.array([[int(n)] * (n % 3 + 1) for n in numbers], pa.list_(pa.int32()))
    return pa.table({"n": pa.array(numbers), "text": text, "ids": ids})


def filled(sizes, max_rows=50, **more):
    buffer, total = ReplayBuffer(max_rows, more.pop("max_bytes", 1 << 30), **more), 0
    for size in sizes:
        buffer.append(rows(total, size))
        total += size
    return buffer, total


def contents(buffer):
    table, numbers = buffer.take(np.arange(buffer.first, buffer.end))
    assert table["n"].to_pylist() == numbers.tolist(), "a row's number is its place in the order of insertion"
    assert table["text"].to_pylist() == [f"turn {n} " + "x" * (n % 7) for n in numbers]
    assert table["ids"].to_pylist() == [[n] * (n % 3 + 1) for n in numbers]
    return numbers.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=40))
def test_it_holds_exactly_the_newest_rows(sizes):
    buffer, total = filled(sizes)
    if total:
        assert contents(buffer) == list(range(max(0, total - 50), total))
    assert len(buffer.chunks) <= 16, "few chunks, however many appends"


def test_bytes_bound_it_too():
    buffer, total = filled([10] * 100, max_rows=100_000, max_bytes=4000)
    assert buffer.nbytes <= 4000
    assert contents(buffer)[-1] == total - 1
    buffer.append(rows(total, 500))
    assert contents(buffer) == list(range(total, total + 500)), "what was appended last always stays"


def test_uniform_sampling_is_uniform_after_wrapping():
    buffer, total = filled([7] * 30)
    rng = np.random.default_rng(0)
    table, numbers = buffer.sample(20_000, rng)
    assert table["n"].to_pylist() == numbers.tolist()
    counts = np.bincount(numbers - buffer.first, minlength=50)
    assert (numbers >= total - 50).all()
    assert abs(counts - 400).max() < 5 * 20, "within five standard deviations of 400"


def test_prioritised_sampling_follows_the_priorities_and_its_weights_undo_them():
    buffer, _ = filled([7] * 30, alpha=0.5)
    numbers = np.arange(buffer.first, buffer.end)
    priorities = np.linspace(1, 16, 50)
    buffer.set_priorities(numbers, priorities)
    buffer.set_priorities(np.array([0, 1]), np.array([99.0, 99.0]))  # evicted long ago
    rng = np.random.default_rng(0)
    table, drawn, shares = buffer.sample_prioritised(50_000, rng)
    weights = importance_weights(shares / buffer.priority_total, len(buffer), beta=1.0)
    assert table["n"].to_pylist() == drawn.tolist()
    expected = priorities**0.5 / (priorities**0.5).sum()
    found = np.bincount(drawn - buffer.first, minlength=50) / 50_000
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(expected.max() / 50_000))
    # The weighted mean of anything is its plain mean over the buffer.
    value = (drawn - buffer.first).astype(float)
    assert (weights * value).sum() / weights.sum() == pytest.approx(24.5, abs=0.5)


def test_new_rows_are_drawn_as_the_most_urgent():
    buffer, _ = filled([10])
    buffer.set_priorities(np.arange(10), np.full(10, 1e-9))
    buffer.append(rows(10, 1))
    _, drawn, _ = buffer.sample_prioritised(1000, np.random.default_rng(0))
    assert (drawn == 10).mean() > 0.99


def test_errors_say_what_does_not_fit():
    buffer, _ = filled([5])
    with pytest.raises(ReplayError, match=r"another schema: \['other'\]"):
        buffer.append(pa.table({"other": [1]}))
    with pytest.raises(ReplayError, match="51 rows at once into a buffer of 50"):
        buffer.append(rows(5, 51))
    with pytest.raises(ReplayError, match="empty"):
        ReplayBuffer(10, 1 << 20).sample(1, np.random.default_rng(0))


def test_snapshots_add_up_and_restore(tmp_path):
    buffer, total = filled([7] * 3)
    assert buffer.snapshot(tmp_path) == 21
    assert buffer.snapshot(tmp_path) == 0
    for _ in range(9):
        buffer.append(rows(total, 7))
        total += 7
        buffer.snapshot(tmp_path)
    again = ReplayBuffer(50, 1 << 30)
    assert again.load_snapshots(tmp_path) == 50
    assert contents(again) == contents(buffer)
    assert again.snapshot(tmp_path) == 0, "what was restored is on disk already"
    shown = datasets.load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train", cache_dir=tmp_path)
    assert set(contents(buffer)) <= set(shown["n"])
    assert len(shown) < 60, "evicted rows leave the disk as well"


def test_a_smaller_buffer_restores_the_newest(tmp_path):
    buffer, total = filled([40])
    buffer.snapshot(tmp_path)
    small = ReplayBuffer(15, 1 << 30)
    small.load_snapshots(tmp_path)
    assert contents(small) == list(range(total - 15, total))


def test_broken_snapshots_are_named(tmp_path):
    buffer, total = filled([20])
    buffer.snapshot(tmp_path)
    for _ in range(2):
        buffer.append(rows(total, 5))
        total += 5
        buffer.snapshot(tmp_path)
    (tmp_path / "rows-000000000025-000000000030.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ReplayError, match=r"rows-000000000025-000000000030.parquet cannot be read"):
        ReplayBuffer(50, 1 << 30).load_snapshots(tmp_path)
    (tmp_path / "rows-000000000020-000000000025.parquet").unlink()
    with pytest.raises(ReplayError, match="rows 20 to 25 are missing"):
        ReplayBuffer(50, 1 << 30).load_snapshots(tmp_path)


def test_sigkill_while_saving_loses_at_most_what_was_not_saved(tmp_path):
    """A child appends and saves as fast as it can; whenever it is killed, what it had said is there."""
    child = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pathlib import Path
        from test_replay import ReplayBuffer, rows
        buffer, total = ReplayBuffer(100_000, 1 << 30), 0
        while True:
            buffer.append(rows(total, 200)); total += 200
            buffer.snapshot(Path({str(tmp_path)!r}))
            print(total, flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    said = [int(process.stdout.readline()) for _ in range(12)][-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    buffer = ReplayBuffer(100_000, 1 << 30)
    assert buffer.load_snapshots(tmp_path) >= said
    assert contents(buffer) == list(range(len(buffer)))


# --- shards, and episodes as rows -------------------------------------------------------------------------------------


def shards_over(*shards, seed=0):
    async def ask(number, method, *args):
        return await asyncio.to_thread(getattr(shards[number], method), *args)

    return Shards(len(shards), ask, seed)


def test_shards_are_sampled_as_one_buffer(tmp_path):
    parts = [ReplayShard(1000, 1 << 30, str(tmp_path / str(i)), 0) for i in range(3)]
    shards = shards_over(*parts)

    async def fill_and_sample():
        homes = [shards.shard_of(f"episode {n}") for n in range(60)]
        await asyncio.gather(*(shards.insert(home, rows(10 * n, 10)) for n, home in enumerate(homes)))
        return await shards.size(), await shards.sample(30_000, 1)

    size, sample = asyncio.run(fill_and_sample())
    assert size == (600, sum(part.size()[1] for part in parts))
    held = [part.size()[0] for part in parts]
    assert all(count % 10 == 0 for count in held), "an episode stays in one shard"
    assert min(held) > 100
    counts = np.bincount(sample["n"].to_numpy(), minlength=600)
    assert abs(counts - 50).max() < 6 * 50**0.5, "uniform over all rows, whichever shard holds them"


def test_priorities_reach_over_shards(tmp_path):
    shards = [ReplayShard(100, 1 << 20, str(tmp_path / str(i)), 0) for i in range(2)]
    shards[0].insert(rows(0, 30))
    shards[1].insert(rows(100, 10))
    everywhere = shards_over(*shards)

    async def play():
        first = await everywhere.sample_prioritised(4000, beta=1.0)
        drawn = first.rows["n"].to_numpy()
        assert abs((drawn >= 100).mean() - 0.25) < 0.05, "equal at first, so in proportion to what shards hold"
        assert set(first.weights) == {1.0}
        await everywhere.set_priorities(first, np.where(drawn == 100, 64.0, 1.0))
        return await everywhere.sample_prioritised(20_000, beta=1.0)

    draw = asyncio.run(play())
    drawn = draw.rows["n"].to_numpy()
    share = 64**0.6 / (39 + 64**0.6)
    assert abs((drawn == 100).mean() - share) < 0.02
    assert (draw.weights * (drawn >= 100)).sum() / draw.weights.sum() == pytest.approx(0.25, abs=0.02)


def test_a_shard_that_was_started_again_is_noticed_once(tmp_path):
    first = ReplayShard(100, 1 << 20, str(tmp_path / "0"), 0)
    first.insert(rows(0, 10))
    first.snapshot()
    first.insert(rows(10, 10))
    current = first

    async def ask(_, method, *args):
        size = getattr(current, method)(*args)
        return (*size[:3], id(current)) if method == "size" else size

    shards = Shards(1, ask, seed=0)
    assert asyncio.run(shards.restarted()) == []
    current = second = ReplayShard(100, 1 << 20, str(tmp_path / "0"), 0)
    assert asyncio.run(shards.restarted()) == [(0, 10)]
    assert asyncio.run(shards.restarted()) == []
    assert second.size()[0] == 10, "what came after the snapshot is lost, and no more"


def test_an_episode_that_is_played_again_is_kept_once(tmp_path):
    shard = ReplayShard(100, 1 << 20, str(tmp_path / "0"), 0)
    shard.insert(as_rows([episode(3, [-1.0, 0.0], True), episode(4, [-1.0], False)], width=4))
    shard.snapshot()
    shard = ReplayShard(100, 1 << 20, str(tmp_path / "0"), 0)
    shard.insert(as_rows([episode(4, [-1.0], False), episode(5, [-1.0], False)], width=4))
    shard.insert(as_rows([episode(5, [-1.0], False), episode(3, [-1.0, 0.0], True)], width=4))
    assert shard.buffer.column("position").tolist() == [3, 3, 4, 5]


def test_a_shard_saves_by_itself_and_comes_back(tmp_path):
    shard = ReplayShard(1000, 1 << 30, str(tmp_path), 0.05)
    for n in range(20):
        shard.insert(rows(10 * n, 10))
    deadline = time.monotonic() + 20
    while shard.buffer.saved < 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    again = ReplayShard(1000, 1 << 30, str(tmp_path), 0)
    assert again.size()[2] == 200
    assert contents(again.buffer) == list(range(200))


def test_a_full_disk_is_told_to_producers(tmp_path, monkeypatch):
    shard = ReplayShard(1000, 1 << 30, str(tmp_path), 0.02)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cola_ray.replay.buffer.write_atomically", full)
    shard.insert(rows(0, 10))
    deadline = time.monotonic() + 20
    while not shard.failure:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=r"replay snapshots fail: OSError: .*No space left on device"):
        shard.insert(rows(10, 1))


def test_several_producers_and_consumers_at_once(tmp_path):
    shard = ReplayShard(500, 1 << 30, str(tmp_path), 0.01)
    shard.insert(rows(0, 10))
    numbers = itertools.count()

    def produce():
        for _ in range(50):
            shard.insert(rows(100 * next(numbers), 10))

    def consume():
        for _ in range(100):
            table, _ = shard.sample(32, (0,))
            pairs = zip(table["n"].to_pylist(), table["text"].to_pylist(), strict=True)
            assert all(text.startswith(f"turn {n} ") for n, text in pairs)

    with ThreadPoolExecutor() as threads:
        jobs = [threads.submit(produce) for _ in range(3)] + [threads.submit(consume) for _ in range(3)]
        for job in jobs:
            job.result(timeout=60)
    assert shard.size()[0] == 500


def episode(position, rewards, terminated):
    """Opening of 2 ids, then utterances of 3 and observations of 2; features count up."""
    ids = np.arange(2 + 5 * len(rewards))
    turns = tuple(
        Turn(ids[: 2 + 5 * i], ids[2 + 5 * i : 5 + 5 * i], ids[2 + 5 * i : 5 + 5 * i] + 100, np.zeros(3, np.float32),
             np.full(3, 7), r, ids[5 + 5 * i : 7 + 5 * i], *np.float32([[10 * i] * 4, [10 * i + 5] * 4]))
        for i, r in enumerate(rewards)
    )  # fmt: skip
    final = None if terminated else np.full(4, 10 * len(rewards), np.float32)
    return Episode(position, turns, terminated, "", final)


def test_the_best_rows_are_uniform_over_shards_of_unequal_episodes(tmp_path):
    """One shard has a good episode of 20 turns, another four of 1 turn, a third bad ones, a fourth nothing."""
    parts = [ReplayShard(1000, 1 << 24, str(tmp_path / str(i)), 0) for i in range(4)]
    parts[0].insert(as_rows([episode(0, [0.0] * 19 + [1.0], True)], 4))
    parts[1].insert(as_rows([episode(n, [1.0], True) for n in range(1, 5)], 4))
    parts[2].insert(as_rows([episode(n, [-1.0, 0.0], True) for n in range(5, 10)], 4))
    draws = 24_000
    rows_drawn, cutoff = asyncio.run(shards_over(*parts).sample_best(draws, 0.5))
    assert cutoff == 1.0
    drawn = zip(rows_drawn["position"].to_pylist(), rows_drawn["turn"].to_pylist(), strict=True)
    counts = np.array(list(collections.Counter(drawn).values()))
    assert len(counts) == 24, "each row of the good episodes, and no other"
    assert stats.chisquare(counts).pvalue > 1e-4


def test_an_episode_whose_first_turns_are_gone_still_counts_once(tmp_path):
    shard = ReplayShard(5, 1 << 24, str(tmp_path), 0)
    shard.insert(as_rows([episode(0, [1.0, 1.0, 1.0], True)], 4))
    shard.insert(as_rows([episode(1, [0.5, 0.5, 0.5], True), episode(2, [0.0], True)], 4))
    assert len(shard.buffer) == 5
    assert shard.buffer.column("turn")[0] != 0
    assert shard.episode_returns().tolist() == [3.0, 1.5, 0.0]
    assert shard.rows_above(1.5) == 4


def test_shards_without_rows_are_no_error_and_no_shard_with_rows_is_one(tmp_path):
    empty = [ReplayShard(10, 1 << 20, str(tmp_path / str(i)), 0) for i in range(2)]
    everywhere = shards_over(*empty)
    for draw in (everywhere.sample(3), everywhere.sample_prioritised(3, 0.4), everywhere.sample_best(3, 0.1)):
        with pytest.raises(ReplayError, match="no shard holds"):
            asyncio.run(draw)
    assert empty[0].episode_returns().shape == (0,)
    assert asyncio.run(everywhere.size()) == (0, 0)


def test_a_replica_that_is_asked_about_no_row_says_nothing(tmp_path):
    played = as_rows([episode(0, [1.0], True)], 4)
    shard = ReplayShard(10, 1 << 20, str(tmp_path / "0"), 0)
    shard.insert(played)
    services = [CriticService(CriticConfig(steps=1), 4, "", shards_over(shard), str(tmp_path), seed=0) for _ in "ab"]
    for service in services:
        asyncio.run(service.join(Channel("", 0, 1), 0, None))

    async def ask(number, method, *args):
        return await getattr(services[number], method)(*args)

    replicas = CriticReplicas(2, ask)
    replicas.joined = True
    assert asyncio.run(replicas.advantages_and_td_errors(played)).shape == (2, 1)
    assert asyncio.run(replicas.advantages(played)).shape == (1,)


def test_episodes_become_rows_and_rows_a_critics_batch():
    table = as_rows([episode(3, [-1.0, -1.0, 0.0], True), episode(4, [-1.0, -1.0], False)], width=4)
    assert table.num_rows == 5
    assert table["terminated"].to_pylist() == [False, False, True, False, False], "a limit is no end"
    assert table["state_ids"][1].as_py() == list(range(7))
    assert table["utterance_ids"][1].as_py() == [7, 8, 9]
    assert table["actions"][1].as_py() == [107, 108, 109]
    assert features(table, "next_state")[:, 0].tolist() == [10, 20, 0, 10, 20]
    buffer = ReplayBuffer(10, 1 << 20)
    buffer.append(table)
    back, _ = buffer.take(np.array([4, 1]))
    batch = critic_batch(read_features, back, back)
    assert batch.rewards.tolist() == [-1, -1]
    assert batch.utterances[:, 0].tolist() in ([15, 15], [15.0, 15.0])
    assert batch.next_states[:, 0].tolist() == [20, 20]
    assert batch.states[:, -1].tolist() == [1, 1], "the number of the turn"
    assert batch.next_states[:, -1].tolist() == [2, 2]
    assert batch.utterances[:, -1].tolist() == [0, 0], "nothing was said twice"


def test_what_was_said_before_is_found_word_for_word():
    assert was_said([5, 1, 2, 9], np.array([1, 2]))
    assert not was_said([5, 1, 9, 2], [1, 2])
    assert not was_said([70_000, 1], [7, 1]), "ids, not digits"


def test_an_encoder_reads_the_same_rows_as_text(tmp_path):
    """A real encoder and its tokenizer, small; the policy's ids are letters."""
    letters = {"<pad>": 0, "<unk>": 1, **{chr(97 + i): i + 2 for i in range(26)}}
    split = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    split.pre_tokenizer, split.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    policy, encoder = tmp_path / "policy", tmp_path / "encoder"
    for folder in (policy, encoder):
        PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=28, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(encoder)

    rows_of = as_rows([episode(i, [-1.0, -1.0, 0.0], True) for i in range(4)], width=4)
    read = TextReader(str(encoder), str(policy))
    assert read.policy.decode(rows_of["state_ids"][0].as_py(), skip_special_tokens=True) == ""
    tokens = read(rows_of, "next_state")
    wanted = [rows_of["state_ids"][1].as_py(), rows_of["state_ids"][2].as_py()]
    said = [[i for i in ids if i > 1] for ids in wanted]
    pairs = zip(tokens["input_ids"][:2], tokens["attention_mask"][:2], strict=True)
    got = [row[mask.bool()].tolist() for row, mask in pairs]
    assert got == said, "the next state is state, utterance and answer: the state of the next row"

    shard = ReplayShard(100, 1 << 20, str(tmp_path / "0"), 0)
    shard.insert(rows_of)
    config = CriticConfig(encoder=str(encoder), steps=20, batch_size=32, lr=1e-3)
    critic = CriticService(config, 4, str(policy), shards_over(shard), str(tmp_path / "critic"), seed=0)
    asyncio.run(critic.join(Channel("", 0, 1), 0, None))
    before = critic.critic.online.encoder.embeddings.word_embeddings.weight.detach().clone()
    losses = [asyncio.run(critic.fit(rows_of))["critic/loss"] for _ in range(5)]
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(before, critic.critic.online.encoder.embeddings.word_embeddings.weight), "it trains along"
    assert asyncio.run(critic.advantages(rows_of)).shape == (12,)


def test_a_failed_episode_never_enters_replay():
    broken = Episode(9, (), False, "", failure="raised ValueError: no")
    with pytest.raises(ValueError, match="episode 9 has no features to learn from: raised ValueError: no"):
        as_rows([broken], width=4)
