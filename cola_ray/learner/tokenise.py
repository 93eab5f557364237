"""Turns a corpus into shards of token ids, once: in parallel processes, resumable at any point, with a fingerprint.

    sources ──parts_of──> parts ──child processes: read, tokenise, write──> FOLDER/part-*.arrow ──> FOLDER/corpus.json
    shards  ──members of each bundle, packed──> rows-*.npy, the number of rows of each bundle

    folders = tokenise(data, chat, cache, say)                    one folder for each source
    bundles = ...; counts = counted_rows(bundles, cache, processes, say)

A folder's name ends with a digest of the source's files, the tokenizer and the settings that ids depend on, so changed
data is tokenised anew, beside the old. A part either exists or not: after a SIGKILL, the next process makes the missing
parts. Children (:mod:`cola_ray.learner.tokenise_part`) end with the process that started them.
"""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from cola_ray.learner.packed import Bundles, count_rows
from cola_ray.learner.shards import MANIFEST
from cola_ray.learner.tokenise_part import make_shard
from cola_ray.settings.config import DataConfig
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.parts import PART_MB, Part, parts_of
from cola_ray.tasks.rows import files_of, is_local, placed

FORMAT = 1
"""Version of the shards' format, and of their contents."""
_SAID_S = 1.0  # between two lines of progress
_AT_ONCE = 64  # bundles that a child counts in one request

Say = Callable[[str], None]


def tokenise(data: DataConfig, chat: ChatTokenizer, cache: Path, say: Say, part_mb: int = PART_MB) -> list[Path]:
    """Make the shards of every source, unless they exist. Only one process calls.

    Args:
        cache: where folders of shards are; several runs may share it.
        say: receives lines of progress, about once a second.

    Returns:
        a folder for each of ``data.sources``.

    Raises:
        ValueError: a source cannot be read, or more than ``data.max_broken`` of its rows are broken; names the first.
        RuntimeError: a child process died.
    """
    folders = []
    for source in data.sources:
        named = f"{'data.path' if source == data.path else 'data.more_paths'} = {source!r}"
        fingerprint = _fingerprint(source, data, chat)
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(source).name).strip("-.")
        folder = cache / f"{name[:40] or 'corpus'}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, say):
            if not (folder / MANIFEST).exists():
                try:
                    parts = parts_of(source, data.streaming, part_mb)
                    made = _make_parts(parts, data, chat, folder, say)
                except ValueError as error:
                    raise ValueError(f"{named}: {error}") from None
                _write_json(folder / MANIFEST, {"source": source, "fingerprint": digest, "of": fingerprint,
                                                "parts": made})  # fmt: skip
        _check_rows(named, source, json.loads((folder / MANIFEST).read_text())["parts"], data.max_broken, say)
        folders.append(folder)
    return folders


def counted_rows(bundles: Bundles, folders: Sequence[Path], cache: Path, processes: int, say: Say) -> np.ndarray:
    """Rows of each bundle, (len(bundles),) int64: read from ``cache`` if they have been counted before."""
    about = [FORMAT, *bundles.documents.fingerprints, bundles.seed, bundles.length, bundles.size]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    file = cache / f"rows-{digest}.npy"
    if not file.exists():
        spans = [(first, min(first + _AT_ONCE, len(bundles))) for first in range(0, len(bundles), _AT_ONCE)]
        asked = [{"count": {"folders": [str(folder) for folder in folders], "seed": bundles.seed,
                            "length": bundles.length, "first": first, "end": end}} for first, end in spans]  # fmt: skip
        found = [count_rows(bundles, *spans[0])] if len(spans) == 1 else [[] for _ in spans]

        def done(index: int, answer: dict[str, Any]) -> None:
            found[index] = answer["rows"]

        def progress(states: Mapping[int, dict[str, Any]]) -> None:
            say(f"counting rows: bundle {min(len(states) * _AT_ONCE, len(bundles))} of {len(bundles)}")

        if len(spans) > 1:
            _ask_all(asked, {}, processes, done, progress)
        staging = file.with_name(f".{file.stem}-{secrets.token_hex(4)}.npy")
        np.save(staging, np.concatenate([np.array(counts, np.uint32) for counts in found]))
        staging.replace(file)
    return np.load(file).astype(np.int64)


# --- fingerprints of folders ----------------------------------------------------------------------------------------


def _fingerprint(source: str, data: DataConfig, chat: ChatTokenizer) -> dict[str, Any]:
    tokenizer = chat.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = str(tokenizer.chat_template or "")
    return {
        "format": FORMAT,
        "source": _identity(source, data.streaming),
        "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "date": chat.date if "strftime_now" in template else "",  # other templates show no date
        "options": chat.options,
        "fields": [data.prompt_field, data.response_field, data.text_field],
    }


def _identity(source: str, streaming: bool) -> Any:
    """Files by name, size and time; for the hub, the revision that is cached or would be fetched."""
    if is_local(source):
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(source)[1]]
    import datasets
    from huggingface_hub import HfApi

    try:
        return [source, HfApi().dataset_info(source).sha]
    except Exception:  # offline: use what has been fetched; a stream reports missing data itself
        return [source, "" if streaming else datasets.load_dataset(source, split="train")._fingerprint]


@contextlib.contextmanager
def _alone(folder: Path, say: Say) -> Iterator[None]:
    """Wait until no other process makes the same folder; the system frees the lock, however its owner ends."""
    lock = filelock.FileLock(folder / "lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_SAID_S)
        except filelock.Timeout:
            say("waiting for another run, which tokenises this corpus")
    try:
        yield
    finally:
        lock.release()


# --- parts --------------------------------------------------------------------------------------------------------


def _make_parts(
    parts: Sequence[Part], data: DataConfig, chat: ChatTokenizer, folder: Path, say: Say
) -> list[dict[str, Any]]:
    """Descriptions of the parts, in order; parts that exist are not made again."""
    names = [f"part-{number:06d}" for number in range(len(parts))]
    summaries = [folder / f"{name}.json" for name in names]
    missing = [index for index, part in enumerate(parts) if not _is_of(summaries[index], part)]
    for staging in folder.glob(".part-*"):  # of killed processes: we have the lock
        staging.unlink(missing_ok=True)
    asked = [{"part": dataclasses.asdict(parts[index]), "target": str(folder / f"{names[index]}.arrow")}
             for index in missing]  # fmt: skip
    began, kept = time.monotonic(), len(parts) - len(missing)

    def done(index: int, answer: dict[str, Any]) -> None:
        _write_json(summaries[missing[index]], answer | {"part": dataclasses.asdict(parts[missing[index]])})

    def progress(states: Mapping[int, dict[str, Any]]) -> None:
        tokens = sum(state["tokens"] for state in states.values())
        ready = kept + sum("file" in state for state in states.values())
        rate = tokens / max(time.monotonic() - began, 1e-3)
        say(f"tokenising {parts[0].source}: {ready} of {len(parts)} parts, {tokens:.4g} tokens, {rate:.3g} a second")

    if data.processes == 1 or len(missing) == 1:  # a child would take longer to start
        states: dict[int, dict[str, Any]] = {}
        for place, index in enumerate(missing):
            target = folder / f"{names[index]}.arrow"
            states[place] = make_shard(parts[index], data, chat, target, lambda one: progress({**states, -1: one}))
            done(place, states[place])
            progress(states)
    else:
        # The tokenizer is pickled, since transformers' AutoTokenizer would import torch to find its class again.
        setup = {"chat": base64.b64encode(pickle.dumps(chat)).decode(), "data": data.model_dump(mode="json")}
        _ask_all(asked, setup, data.processes, done, progress)
    return [json.loads(summary.read_text()) for summary in summaries]


def _is_of(summary: Path, part: Part) -> bool:
    """Whether this part exists, and was cut in the same way."""
    return summary.exists() and json.loads(summary.read_text())["part"] == dataclasses.asdict(part)


def _check_rows(named: str, source: str, parts: Sequence[Mapping[str, Any]], allowed: float, say: Say) -> None:
    """Raise ValueError if more rows are broken than allowed; otherwise report how many are."""
    rows, broken = (sum(part[what] for part in parts) for what in ("rows", "broken"))
    if not rows:
        raise ValueError(f"{named}: no rows; one or more are needed")
    if not broken:
        return
    first = next(_places(source, parts))
    if broken > allowed * rows:
        count = f" ({broken} of {rows} rows are wrong)" if broken > 1 else ""
        raise ValueError(f"{named}: {first}{count}")
    say(f"{source}: {broken} of {rows} rows are broken and left out, the first: {first}; corpus.json notes more")


def _places(source: str, parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where the broken rows are that the parts have recorded, and what is wrong with them."""
    rows = collections.Counter[str]()
    for part in parts:
        file = part["part"]["file"]
        for number, why in part["first_broken"]:
            yield placed(Path(file or source), rows[file] + number, why, named=bool(file) and file != source)
        rows[file] += part["rows"]


# --- children -----------------------------------------------------------------------------------------------------


def _ask_all(
    asked: Sequence[Mapping[str, Any]], setup: Mapping[str, Any], processes: int,
    done: Callable[[int, dict[str, Any]], None], progress: Callable[[Mapping[int, dict[str, Any]]], None],
) -> None:  # fmt: skip
    """Have child processes answer all requests: ``done`` gets each answer, ``progress`` the latest message on each."""
    if not asked:
        return
    states: dict[int, dict[str, Any]] = {}
    waiting = collections.deque(range(len(asked)))
    stopping = threading.Event()

    def drive() -> None:
        with _Child(setup) as child:
            while waiting and not stopping.is_set():
                try:
                    index = waiting.popleft()
                except IndexError:  # another child was faster
                    return
                for answer in child.ask(asked[index]):
                    states[index] = answer
                done(index, answer)

    with ThreadPoolExecutor(min(processes, len(asked))) as pool:
        running = {pool.submit(drive) for _ in range(min(processes, len(asked)))}
        try:
            while running:
                ended, running = wait(running, _SAID_S, FIRST_COMPLETED)
                for one in ended:
                    one.result()
                progress(dict(states))
        finally:
            stopping.set()


class _Child:
    """A process of ``tokenise_part``: takes a line of JSON and answers with lines, the last of which has ``done``."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
                                    "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        self.process = subprocess.Popen([sys.executable, "-m", "cola_ray.learner.tokenise_part"], env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        self._write(setup)

    def ask(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self._write(request)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise ValueError(answer["error"])
            yield answer
            if answer["done"]:
                return
        raise RuntimeError(f"a process that tokenises died with exit code {self.process.wait()}; see the log above")

    def _write(self, content: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(content) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has died, as the next read will show
            pass

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.process.kill()
        try:
            self.process.communicate()
        except (BrokenPipeError, ValueError):
            self.process.wait()


def _write_json(path: Path, content: Any) -> None:
    staging = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    staging.write_text(json.dumps(content, indent=1) + "\n")
    staging.replace(path)
