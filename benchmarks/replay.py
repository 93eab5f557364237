"""The replay buffer against what one would use instead: a Python list of dicts, and a plain Arrow take.

python benchmarks/replay.py [--rows 1000000] [--soak-rows 10000000]

A batch is 256 text transitions as an utterance critic wants them: token ids of state, utterance and next state, padded
to matrices, beside rewards and flags. The list gives Python rows that are padded one by one; Arrow gives flat values
and offsets that are padded at once. All three deliver the same batch, and so do their bare lookups, timed apart.
"""

import argparse
import random
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from record import record

from cola_ray.replay.buffer import ReplayBuffer

BATCH, WIDTH, REPEATS = 256, 256, 200


def transitions(first: int, count: int, rng: np.random.Generator) -> pa.Table:
    """Turns of Twenty Questions as ids: states of up to 20 turns, utterances of about 8 tokens."""

    def ids(lengths: np.ndarray) -> pa.Array:
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rng.integers(0, 512, offsets[-1], dtype=np.int32)))

    turn = rng.integers(0, 20, count)
    return pa.table({
        "state_ids": ids(2 + 11 * turn), "utterance_ids": ids(rng.integers(5, 12, count)),
        "next_ids": ids(13 + 11 * turn), "reward": pa.array(np.full(count, -1.0, np.float32)),
        "terminated": pa.array(turn == 19), "position": pa.array(np.arange(first, first + count)),
    })  # fmt: skip


def padded(column: pa.ChunkedArray) -> np.ndarray:
    """Lists of ids as (rows, WIDTH), padded with 0."""
    out = np.zeros((len(column), WIDTH), np.int64)
    row = 0
    for chunk in column.chunks:
        lengths = np.diff(chunk.offsets.to_numpy())
        where = np.arange(WIDTH) < lengths[:, None]
        out[row : row + len(chunk)][where] = chunk.flatten().to_numpy()
        row += len(chunk)
    return out


def as_matrices(table: pa.Table) -> dict[str, np.ndarray]:
    names = ("state_ids", "utterance_ids", "next_ids")
    return {name: padded(table[name]) for name in names} | {
        name: table[name].to_numpy() for name in ("reward", "terminated")
    }


def rows_as_matrices(rows: list[dict]) -> dict[str, np.ndarray]:
    out = {}
    for name in ("state_ids", "utterance_ids", "next_ids"):
        matrix = np.zeros((len(rows), WIDTH), np.int64)
        for i, row in enumerate(rows):
            matrix[i, : len(row[name])] = row[name]
        out[name] = matrix
    return out | {name: np.array([row[name] for row in rows]) for name in ("reward", "terminated")}


def milliseconds(action: Callable[[], object]) -> float:
    action()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def speed(num_rows: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    buffer, listed = ReplayBuffer(num_rows, 1 << 40), list[dict]()
    for first in range(0, num_rows, 2000):
        table = transitions(first, 2000, rng)
        buffer.append(table)
        if len(listed) < 100_000:  # a list's speed does not depend on its length, its memory does
            listed += table.to_pylist()
    whole = pa.Table.from_batches([pa.concat_batches(buffer.chunks)])

    def ours() -> pa.Table:
        return buffer.sample(BATCH, rng)[0]

    def plain() -> pa.Table:
        return whole.take(pa.array(rng.integers(0, num_rows, BATCH)))

    def from_list() -> list[dict]:
        return random.choices(listed, k=BATCH)

    lookup = {name: milliseconds(action) for name, action in (("ours", ours), ("take", plain), ("list", from_list))}
    batch = {
        "ours": milliseconds(lambda: as_matrices(ours())),
        "take": milliseconds(lambda: as_matrices(plain())),
        "list": milliseconds(lambda: rows_as_matrices(from_list())),
    }
    return {
        "rows": num_rows,
        "chunks": len(buffer.chunks),
        "lookup_ms": lookup["ours"],
        "lookup_vs_arrow_take": lookup["take"] / lookup["ours"],
        "batch_ms": batch["ours"],
        "batch_vs_arrow_take": batch["take"] / batch["ours"],
        "batch_vs_python_list": batch["list"] / batch["ours"],
        "prioritised_ms": milliseconds(lambda: buffer.sample_prioritised(BATCH, rng)),
    }


def soak(num_rows: int, capacity: int) -> dict[str, float]:
    """``num_rows`` through a buffer of ``capacity``, sampled as it goes: memory must stay where it was when full."""
    rng = np.random.default_rng(1)
    buffer, memory, started = ReplayBuffer(capacity, 1 << 40), [], time.perf_counter()
    for first in range(0, num_rows, 5000):
        buffer.append(transitions(first, 5000, rng))
        buffer.sample(BATCH, rng)
        if first >= 2 * capacity and first % capacity < 5000:
            memory.append(_resident())
    assert len(buffer) == capacity
    return {
        "soak_rows": num_rows,
        "soak_capacity": capacity,
        "soak_rows_per_second": num_rows / (time.perf_counter() - started),
        "soak_memory_growth": memory[-1] / memory[0],
        "soak_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--rows", type=int, default=1_000_000)
    arguments.add_argument("--soak-rows", type=int, default=10_000_000)
    given = arguments.parse_args()
    pa.set_cpu_count(1)
    figures = soak(given.soak_rows, 500_000) | speed(given.rows)
    record("replay", figures, about="Replay of Twenty Questions turns: 256-row batches, medians of 200.")


if __name__ == "__main__":
    main()
