"""A step's batch from workers to learner ranks: bytes per token, seconds, memory; by reference and as padded arrays.

python benchmarks/rl_batch.py [--tokens 8000000] [--ranks 32] [--workers 16]

Lengths follow a heavy-tailed distribution: prompts of 64 to 256 tokens with 16 answers each, lognormal with median 400
and sigma 1, cut at 8192. "Packed" is the form in a run: each worker packs its share, the loop distributes references,
and a rank copies its own rows out of the shares. "Padded" is what the loop would hold and send if it collated all rows
of all ranks; a rank pads one micro-batch at a time in the same way. Seconds are CPU time, without Ray. Only about a
gigabyte of padded arrays is made, and the figures for all of them are extrapolated.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import time

import numpy as np
from record import record

from cola_ray.batch import Batch, Group, Padded, Picked, apart, as_groups, collate
from cola_ray.experience import Trajectory

VOCABULARY, ACTIONS, PER_PROMPT, MICRO_BATCH, LONGEST = 128_000, 64, 16, 16_384, 8192
AT_ONCE = 1 << 30
"""No further batch is padded after this number of bytes."""


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shares(tokens: int, workers: int) -> tuple[list[list[Group]], int, float]:
    """Each worker's groups, the total number of tokens, and the packing seconds of the slowest worker."""
    draw, made, slowest = np.random.default_rng(0), 0, 0.0
    of_workers = []
    for worker in range(workers):
        completed = []
        while made < tokens * (worker + 1) // workers:
            prompt = draw.integers(1, VOCABULARY, int(draw.integers(64, 257)))
            lengths = np.clip(draw.lognormal(np.log(400), 1.0, PER_PROMPT), 1, LONGEST).astype(int)
            made += sum(len(prompt) + int(length) for length in lengths)
            completed.append((len(completed), [_completion(draw, prompt, length) for length in lengths], None))
        started = time.process_time()
        of_workers.append(as_groups(completed))
        slowest = max(slowest, time.process_time() - started)
    return of_workers, made, slowest


def _completion(draw: np.random.Generator, prompt: np.ndarray, length: int) -> Trajectory:
    return Trajectory(
        prompt, draw.integers(1, VOCABULARY, length), draw.integers(0, ACTIONS, length),
        np.full(length, -4.0, np.float32), np.zeros(length, np.int64), 0.0, False, "",
    )  # fmt: skip


def dealt(of_workers: list[list[Group]], ranks: int) -> list[Batch]:
    groups = [group for share in of_workers for group in share]
    picked = Picked.of_groups(groups)
    return collate(picked, [0.5] * len(picked), ranks, 0, 0, MICRO_BATCH)


def packed(tokens: int, ranks: int, workers: int) -> dict[str, float]:
    of_workers, made, packing = shares(tokens, workers)
    records = sum(len(pickle.dumps(apart(groups)[0])) for groups in of_workers)
    columns = sum(apart(groups)[1][0].nbytes for groups in of_workers)
    before, started = peak_bytes(), time.process_time()
    batches = dealt(of_workers, ranks)
    dealing, held = time.process_time() - started, peak_bytes() - before
    fetching, own = 0.0, 0
    for batch in batches:  # ranks do this in parallel
        started = time.process_time()
        own = max(own, batch.fetched().sequences.nbytes)
        fetching = max(fetching, time.process_time() - started)
    return {
        "tokens": made,
        "sequences": sum(len(batch.advantages) for batch in batches),
        "packed_bytes_a_token": columns / made,
        "packed_mb": columns / 1e6,
        "packing_seconds_of_a_worker": packing,
        "loop_bytes_a_token": records / made,
        "loop_seconds": dealing,
        "loop_peak_mb": held / 1e6,
        "rank_seconds": fetching,
        "rank_mb": own / 1e6,
    }


def padded(tokens: int, ranks: int, workers: int) -> dict[str, float]:
    of_workers, made, _ = shares(tokens, workers)
    batches = [batch.fetched() for batch in dealt(of_workers, ranks)]
    kept, nbytes, started = list[Padded](), 0, time.process_time()
    for batch in batches:
        kept.append(batch.padded())
        nbytes += sum(array.nbytes for array in vars(kept[-1]).values() if array is not None)
        if nbytes > AT_ONCE:
            break
    share = len(kept) / ranks
    return {
        "padded_bytes_a_token": nbytes / share / made,
        "padded_mb": nbytes / share / 1e6,
        "padded_seconds": (time.process_time() - started) / share,
    }


def isolated(form: str, *args: int) -> dict[str, float]:
    """Measure a form in its own process, so that none inherits another's memory."""
    code = f"import json, rl_batch; print(json.dumps(rl_batch.{form}(*{args!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--workers", type=int, default=16)
    args = parser.parse_args()
    figures = {"ranks": args.ranks, "workers": args.workers}
    for form in ("packed", "padded"):
        figures |= isolated(form, args.tokens, args.ranks, args.workers)
    print(json.dumps(figures, indent=2))
    record("rl_batch", figures, [0], "A step's batch, packed and by reference, beside padded arrays")


if __name__ == "__main__":
    main()
