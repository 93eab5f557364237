"""The replay buffer: what is in it, how it is drawn, what survives on disk."""

import os
import signal
import subprocess
import sys
import textwrap

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ray.replay.buffer import ReplayBuffer, ReplayError


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
    table, drawn, weights = buffer.sample_prioritised(50_000, rng, beta=1.0)
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
    _, drawn, _ = buffer.sample_prioritised(1000, np.random.default_rng(0), beta=0.4)
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
    assert again.restore(tmp_path) == 50
    assert contents(again) == contents(buffer)
    assert again.snapshot(tmp_path) == 0, "what was restored is on disk already"
    shown = datasets.load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train", cache_dir=tmp_path)
    assert set(contents(buffer)) <= set(shown["n"])
    assert len(shown) < 60, "evicted rows leave the disk as well"


def test_a_smaller_buffer_restores_the_newest(tmp_path):
    buffer, total = filled([40])
    buffer.snapshot(tmp_path)
    small = ReplayBuffer(15, 1 << 30)
    small.restore(tmp_path)
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
        ReplayBuffer(50, 1 << 30).restore(tmp_path)
    (tmp_path / "rows-000000000020-000000000025.parquet").unlink()
    with pytest.raises(ReplayError, match="rows 20 to 25 are missing"):
        ReplayBuffer(50, 1 << 30).restore(tmp_path)


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
    assert buffer.restore(tmp_path) >= said
    assert contents(buffer) == list(range(len(buffer)))
