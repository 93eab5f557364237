"""The replay buffer against two alternatives: a Python list of dicts, and a plain Arrow take.

python benchmarks/replay.py [--rows 1000000] [--soak-rows 10000000]

A batch is 256 transitions of Twenty Questions as a critic reads them: token ids of state, utterance and next state as
padded matrices, rewards and flags. The list holds text, as a simple buffer would, so each batch has to be tokenised;
our buffer holds flat token ids and pads them in one operation. A list of token ids, and the lookups alone, are also
timed, to separate the costs of tokenising, lookup and padding.
"""

import argparse
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from record import record

from cola_ray.learner.start_model import make_tokenizer
from cola_ray.replay.buffer import ReplayBuffer
from cola_ray.settings.config import TaskConfig
from cola_ray.tasks import PlayedTask

BATCH, WIDTH, REPEATS = 256, 320, 200
TEXTS = ("state", "utterance", "next")


class Source:
    """Turns from played episodes, as texts and as token ids."""

    def __init__(self, episodes: int = 1000) -> None:
        task = PlayedTask(TaskConfig(name="twenty_questions", num_problems=episodes), seed=0)
        self.tokenizer = make_tokenizer(task)
        self.texts: list[dict[str, Any]] = []
        for dialogue in task.dialogues():
            state = dialogue.opening
            for number, (utterance, answer) in enumerate(dialogue.turns):
                after = state + utterance + answer
                last = number + 1 == len(dialogue.turns)
                self.texts.append({"state": state, "utterance": utterance, "next": after, "reward": -1.0, "last": last})
                state = after
        columns: dict[str, Any] = {
            f"{name}_ids": pa.array(self.ids([row[name] for row in self.texts]), pa.list_(pa.int32())) for name in TEXTS
        }
        columns["reward"] = pa.array([row["reward"] for row in self.texts], pa.float32())
        columns["last"] = pa.array([row["last"] for row in self.texts])
        self.rows = pa.table(columns)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def some(self, count: int, rng: np.random.Generator) -> pa.Table:
        return self.rows.take(pa.array(rng.integers(0, len(self.rows), count))).combine_chunks()


def padded(column: pa.ChunkedArray) -> np.ndarray:
    """Lists of ids as a matrix (rows, WIDTH), padded with 0."""
    out = np.zeros((len(column), WIDTH), np.int64)
    row = 0
    for chunk in column.chunks:
        lengths = np.diff(chunk.offsets.to_numpy())
        where = np.arange(WIDTH) < lengths[:, None]
        out[row : row + len(chunk)][where] = chunk.flatten().to_numpy()
        row += len(chunk)
    return out


def as_matrices(table: pa.Table) -> dict[str, np.ndarray]:
    matrices = {name: padded(table[f"{name}_ids"]) for name in TEXTS}
    return matrices | {name: table[name].to_numpy() for name in ("reward", "last")}


def rows_as_matrices(rows: list[dict], ids: Callable[[list[dict], str], list[list[int]]]) -> dict[str, np.ndarray]:
    out = {}
    for name in TEXTS:
        out[name] = np.zeros((len(rows), WIDTH), np.int64)
        for i, row in enumerate(ids(rows, name)):
            out[name][i, : len(row)] = row
    return out | {name: np.array([row[name] for row in rows]) for name in ("reward", "last")}


def milliseconds(action: Callable[[], object]) -> float:
    action()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def speed(source: Source, num_rows: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(num_rows, 1 << 40)
    for _ in range(0, num_rows, 2000):
        buffer.append(source.some(2000, rng))
    whole = pa.Table.from_batches([pa.concat_batches(buffer.chunks)])
    texts, ready = source.texts, source.rows.to_pylist()  # a list's speed does not depend on its length

    def ours() -> pa.Table:
        return buffer.sample(BATCH, rng)[0]

    def plain() -> pa.Table:
        return whole.take(pa.array(rng.integers(0, num_rows, BATCH)))

    def from_list(rows: list[dict]) -> list[dict]:
        return random.choices(rows, k=BATCH)

    def tokenised(rows: list[dict], name: str) -> list[list[int]]:
        return source.ids([row[name] for row in rows])

    def stored(rows: list[dict], name: str) -> list[list[int]]:
        return [row[f"{name}_ids"] for row in rows]

    lookup = {"ours": milliseconds(ours), "take": milliseconds(plain)}
    batch = {
        "ours": milliseconds(lambda: as_matrices(ours())),
        "take": milliseconds(lambda: as_matrices(plain())),
        "list": milliseconds(lambda: rows_as_matrices(from_list(texts), tokenised)),
        "ready": milliseconds(lambda: rows_as_matrices(from_list(ready), stored)),
    }
    return {
        "rows": num_rows,
        "chunks": len(buffer.chunks),
        "lookup_ms": lookup["ours"],
        "lookup_vs_arrow_take": lookup["take"] / lookup["ours"],
        "batch_ms": batch["ours"],
        "batch_vs_arrow_take": batch["take"] / batch["ours"],
        "batch_vs_python_list": batch["list"] / batch["ours"],
        "batch_vs_python_list_of_ids": batch["ready"] / batch["ours"],
        "prioritised_ms": milliseconds(lambda: buffer.sample_prioritised(BATCH, rng)),
    }


def soak(source: Source, num_rows: int, capacity: int) -> dict[str, float]:
    """Append ``num_rows`` rows to a buffer of ``capacity`` while sampling; measures memory growth once it is full."""
    rng = np.random.default_rng(1)
    buffer, memory, started = ReplayBuffer(capacity, 1 << 40), [], time.perf_counter()
    for first in range(0, num_rows, 5000):
        buffer.append(source.some(5000, rng))
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
    source = Source()
    figures = soak(source, given.soak_rows, 500_000) | speed(source, given.rows)
    record("replay", figures, about="Replay of Twenty Questions turns: 256-row batches, medians of 200.")


if __name__ == "__main__":
    main()
