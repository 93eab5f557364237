"""Tokenisation and reading of a corpus: tokens per second and resident memory, at given sizes.

python benchmarks/corpus.py --folder outputs/corpus --text DATA/gsm8k/train.jsonl [--text-mb 1000]
                            [--shards-mb 100 1000 10000]

    rows of --text, varied ──> --text-mb of JSON lines ──tokenise──> shards ──linked──> --shards-mb of shards
    ranks read steps of them, each in its own process

Existing files are not made again, so a stopped benchmark continues. Rates are tokens per second of CPU time, over all
processes, so they do not depend on the machine's other load. The memory of a reading rank is the peak increase of its
resident memory since before the corpus was opened, including pages of mapped files; the memory of tokenisation is that
of the largest process, including tokenizer and libraries.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import ROOT, record

from cola_ray.learner.packed import Bundles, Pool, ShardedRows
from cola_ray.learner.shards import MANIFEST, Documents, read_manifest
from cola_ray.learner.tokenise import counted_rows, tokenise
from cola_ray.settings.config import DataConfig
from cola_ray.settings.presets import preset
from cola_ray.tasks.chat import ChatTokenizer

FILE_MB = 16
LENGTH, ROWS = 2048, 64  # row length and rows of a step
STATE = "seconds.json"


def varied(file: Path, seed: int) -> Iterator[dict[str, str]]:
    """Endless rows: the file's rows with their numbers replaced and their sentences shuffled."""
    draw = random.Random(seed)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    while True:
        row = draw.choice(rows)
        texts = [re.sub(r"\d+", lambda _: str(draw.randrange(1, 1000)), str(text)) for text in row.values()]
        sentences = [sentence for text in texts for sentence in re.split(r"(?<=[.?!\n])\s*", text) if sentence]
        draw.shuffle(sentences)
        yield {"text": " ".join(sentences)}


def make_text(source: Path, folder: Path, megabytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(-(-megabytes // FILE_MB)):
        target = folder / f"{number:05d}.jsonl"
        if target.exists():
            continue
        staging, size = target.with_suffix(".tmp"), 0
        with staging.open("w") as file:
            for row in varied(source, number):
                size += file.write(json.dumps(row) + "\n")
                if size >= FILE_MB * 1_000_000:
                    break
        staging.rename(target)


def tokenizer_in(folder: Path) -> Path:
    """SmolLM2's tokenizer, read from the preset's weights."""
    if not folder.exists():
        from cola_ray.model.conversion import load_tokenizer

        staging = folder.with_suffix(".tmp")
        load_tokenizer(preset("smollm2-135m").model.base).save_pretrained(staging)
        staging.rename(folder)
    return folder


def measure_tokenisation(folder: Path, processes: int) -> dict[str, Any]:
    """Start or continue tokenisation; CPU seconds of stopped runs are kept in a file and added."""
    from transformers import AutoTokenizer

    where = tokenizer_in(folder / "tokenizer")
    data = DataConfig(path=str(folder / "text"), processes=processes)
    state = json.loads((folder / STATE).read_text()) if (folder / STATE).exists() else {"cpu": 0.0, "peak": 0.0}
    began = _cpu_seconds()

    def keep(line: str) -> None:
        whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        peak = max(resource.getrusage(one).ru_maxrss for one in whose) * 1024 / 1e6
        now = {"cpu": state["cpu"] + _cpu_seconds() - began, "peak": max(state["peak"], peak)}
        (folder / STATE).write_text(json.dumps(now))
        print(line, flush=True)

    chat = ChatTokenizer(AutoTokenizer.from_pretrained(where), "2026-01-01")
    (made,) = tokenise(data, chat, folder / "cache", keep, part_mb=FILE_MB)
    spent = json.loads((folder / STATE).read_text())
    parts = read_manifest(made)["parts"]
    tokens, size = sum(part["tokens"] for part in parts), sum(file.stat().st_size for file in made.glob("*.arrow"))
    return {
        "text_mb": sum(file.stat().st_size for file in (folder / "text").glob("*.jsonl")) / 1e6,
        "tokens": tokens,
        "documents": sum(part["documents"] for part in parts),
        "bytes_per_token_on_disk": size / tokens,
        "tokenised_tokens_per_cpu_second": tokens / spent["cpu"],
        "tokenising_process_peak_mb": spent["peak"],
        "folder": str(made),
    }


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def enlarge(made: Path, target: Path, megabytes: int) -> Path:
    """A folder with this many megabytes of shards, which are hard links to those in ``made``.

    A process maps each link separately, so its resident memory is that of different files; the page cache holds the
    data once, so disk reads are not measured.
    """
    if (target / MANIFEST).exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    manifest, parts, size = read_manifest(made), list[dict[str, Any]](), 0
    for number, part in enumerate(itertools.cycle([part for part in manifest["parts"] if part["documents"]])):
        if size >= megabytes * 1_000_000:
            break
        link = target / f"part-{number:06d}.arrow"
        if not link.exists():
            link.hardlink_to(made / part["file"])
        size += link.stat().st_size
        parts.append(part | {"file": link.name})
    (target / MANIFEST).write_text(json.dumps(manifest | {"fingerprint": target.name, "parts": parts}))
    return target


def read(folder: Path, cache: Path, rank: int, ranks: int, steps: int) -> dict[str, Any]:
    """What a rank does, without a model: open the corpus and read its rows of each step."""
    before = _memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    bundles = Bundles(Documents([folder]), 0, LENGTH)
    rows = ShardedRows([Pool(bundles, counted_rows(bundles, [folder], cache, 1, print))], (1.0,), 0, False)
    began, digests, learned = time.process_time(), list[str](), 0
    for step in range(steps):
        mine = rows.read(rows.step_indices(0, step, ROWS)[rank::ranks])
        learned += int(mine.loss_mask.sum())
        digests += [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in mine.input_ids]
    seconds = time.process_time() - began
    return {"peak_mb": _memory_mb("VmHWM") - before, "tokens_per_second": len(digests) * LENGTH / seconds,
            "fill": learned / (len(digests) * LENGTH), "digests": digests}  # fmt: skip


def _memory_mb(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e6


def measure_reading(folder: Path, cache: Path, steps: int) -> dict[str, Any]:
    """Reading by two ranks and by three, which read the same rows; the ranks run one after another."""
    by_ranks = {ranks: [_read_apart(rank, ranks, steps, folder, cache) for rank in range(ranks)] for ranks in (2, 3)}
    orders = [_in_order([one["digests"] for one in of], steps) for of in by_ranks.values()]
    if orders[0] != orders[1]:
        raise ValueError(f"{folder}: three ranks read other rows than two")
    found = by_ranks[2]
    return {
        "shards_mb": sum(file.stat().st_size for file in folder.glob("*.arrow")) / 1e6,
        "documents": len(Documents([folder])),
        "peak_mb_of_each_rank": [round(one["peak_mb"], 1) for one in found],
        "tokens_per_cpu_second": min(one["tokens_per_second"] for one in found),
        "share_of_positions_learned": float(np.mean([one["fill"] for one in found])),
    }


def _read_apart(rank: int, ranks: int, steps: int, folder: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--rank", str(rank), str(ranks), str(steps), str(folder), str(cache)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {
        "PYTHONPATH": str(ROOT)})  # fmt: skip
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def _in_order(of_ranks: Sequence[Sequence[str]], steps: int) -> list[str]:
    """The rows of all steps in the order of the corpus, from the rows that each rank read in each step."""
    ranks, each = len(of_ranks), [iter(digests) for digests in of_ranks]
    return [next(each[row % ranks]) for _ in range(steps) for row in range(ROWS)]


def main() -> None:
    if "--rank" in sys.argv:
        rank, ranks, steps = map(int, sys.argv[2:5])
        print(json.dumps(read(Path(sys.argv[5]), Path(sys.argv[6]), rank, ranks, steps)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines; the columns are joined")
    parser.add_argument("--text-mb", type=int, default=1000)
    parser.add_argument("--shards-mb", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    folder = args.folder.resolve()
    make_text(args.text, folder / "text", args.text_mb)
    made = measure_tokenisation(folder, args.processes)
    print(json.dumps(made, indent=2), flush=True)
    figures: dict[str, Any] = {name: value for name, value in made.items() if name != "folder"}
    for megabytes in args.shards_mb:
        larger = enlarge(Path(made["folder"]), folder / f"shards-{megabytes}", megabytes)
        file = folder / f"reading-{megabytes}.json"
        if not file.exists():
            file.write_text(json.dumps(measure_reading(larger, folder / "cache", args.steps)))
        found = json.loads(file.read_text())
        print(json.dumps(found, indent=2), flush=True)
        figures |= {f"reading_{megabytes}_mb_{name}": value for name, value in found.items()}
    record("corpus", figures, [0], "Tokens per second of processor time, and resident memory, of a corpus on disk")


if __name__ == "__main__":
    main()
