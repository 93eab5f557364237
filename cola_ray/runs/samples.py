"""Samples of a run for people to read: prompts, completions, rewards, advantages, actions and probabilities.

    RUN/samples/00000010-train.parquet    completions of the step that made version 10, a row each
    RUN/samples/00000010-eval.parquet     version 10's answers in evaluation; -base: the bare base's, before training

    folder = SampleFolder(RUN, max_mb, open_tokenizer)
    folder.keep(samples)           one file, by one rename, and a table in a terminal; a fault is printed, never raised
    folder.forget_after(version)   the run continues from there, and repeats later steps
    files(RUN), read(file)         the files; a file's rows, a dictionary each

A repeated step replaces its file, so no row exists twice. Texts are untrusted: code that shows them removes control
characters and markup (display.py, studies/view.py).
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.table import Table
from rich.text import Text

from cola_ray.runs.display import current, plain
from cola_ray.runs.redaction import redacted

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["train", "eval", "base"]
NAME = "samples"
_SHOWN = 3  # rows of the terminal's table
_BEFORE = 4  # last tokens of a prompt, which tell a decoder whether the completion begins within a word


@dataclass(frozen=True)
class Sample:
    """One completion, or one sequence of an episode, of L tokens; the fields are also the files' columns."""

    step: int  # as in log.jsonl: the version that a step made, or that was evaluated
    kind: Kind
    group: int  # same prompt: the ticket's position in the run, or the number of the held-out problem
    sibling: int  # within the group
    prompt_ids: np.ndarray  # (P,)
    token_ids: np.ndarray  # (L,)
    completion: str  # the text that was scored; empty: the tokens' text
    reward: float | None  # None if scoring failed
    failure: str  # why scoring failed; empty if it did not
    truncated: bool  # by the token limit
    by_policy: np.ndarray | None  # (L,) bool, false for an environment's tokens; None: the policy generated all tokens
    actions: np.ndarray | None  # (L,); None if none were chosen, as with the bare base
    log_probs: np.ndarray | None  # (L,), of the actions under the distribution that they were drawn from
    versions: np.ndarray  # (L,), of the policy that chose each action
    advantages: np.ndarray | None  # (L,); None if only the learner knows them, or nothing is learnt
    parts: Mapping[str, float] = field(default_factory=dict)  # each reward of ``task.reward``, without its weight


def _schema() -> "pa.Schema":
    import pyarrow as pa

    whole, real = pa.list_(pa.int32()), pa.list_(pa.float32())
    named = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))
    return pa.schema(
        [
            ("step", pa.int64()), ("kind", pa.string()), ("group", pa.int64()), ("sibling", pa.int32()),
            ("prompt", pa.string()), ("completion", pa.string()), ("reward", pa.float64()), ("failure", pa.string()),
            ("truncated", pa.bool_()), ("prompt_ids", whole), ("token_ids", whole), ("tokens", pa.list_(pa.string())),
            ("by_policy", pa.list_(pa.bool_())), ("actions", whole), ("log_probs", real), ("versions", whole),
            ("advantages", real), ("parts", named),
        ]
    )  # fmt: skip


class SampleFolder:
    """Writes one run's samples, in the run's own process.

    Args:
        run: the run's folder.
        max_mb: the most that all files together may take.
        open_tokenizer: returns the tokenizer of the run's model; called when there is something to write.
    """

    def __init__(self, run: Path, max_mb: int, open_tokenizer: Callable[[], Any]) -> None:
        self.folder, self.max_bytes, self.open_tokenizer = run / NAME, max_mb << 20, open_tokenizer
        self.tokenizer: Any = None
        self.fault = ""
        with contextlib.suppress(OSError):
            for file in self.folder.glob(".*.tmp"):  # of a run that was killed
                file.unlink()

    def keep(self, samples: Sequence[Sample]) -> None:
        """Write samples of one step and kind, and show some in a terminal; an error is printed once, not raised."""
        if not samples:
            return
        try:
            self.tokenizer = self.tokenizer or self.open_tokenizer()
            rows = [row_of(sample, self.tokenizer) for sample in samples]
            current().show(lambda: table(rows))
            self._write(f"{samples[0].step:08d}-{samples[0].kind}.parquet", rows)
            self._thin_out()
        except Exception as error:  # a fault with samples is no reason to end a run
            self._say(redacted(f"{type(error).__name__}: {error}"))

    def forget_after(self, version: int) -> None:
        """Remove the samples of steps after ``version``, since the run continues from there."""
        with contextlib.suppress(OSError):
            for file in files(self.folder.parent):
                if step_of(file) > version:
                    file.unlink(missing_ok=True)

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder.mkdir(exist_ok=True)
        staging = self.folder / f".{name}.tmp"
        try:
            pq.write_table(pa.Table.from_pylist(list(rows), _schema()), staging, compression="zstd")
            os.replace(staging, self.folder / name)
        except BaseException:
            with contextlib.suppress(OSError):
                staging.unlink()
            raise

    def _thin_out(self) -> None:
        """Remove files until the rest fits, first those whose neighbours of the same kind are closest."""
        sizes = {file: file.stat().st_size for file in files(self.folder.parent)}
        while sizes and sum(sizes.values()) > self.max_bytes:
            gone = _least_missed(list(sizes))
            if len(sizes) == 1:
                self._say(f"one step's take more than samples.max_mb = {self.max_bytes >> 20}")
            gone.unlink(missing_ok=True)
            del sizes[gone]

    def _say(self, why: str) -> None:
        if not self.fault:
            current().say(plain(f"samples: {why}; the run goes on without those"))
        self.fault = self.fault or why


def _least_missed(kept: Sequence[Path]) -> Path:
    """The file whose neighbours of the same kind are closest to each other; the oldest if none has two neighbours."""
    gaps: dict[Path, int] = {}
    for kind in {kind_of(file) for file in kept}:
        same = [file for file in kept if kind_of(file) == kind]
        for before, file, after in zip(same, same[1:], same[2:], strict=False):
            gaps[file] = step_of(after) - step_of(before)
    return min(gaps, key=lambda file: (gaps[file], file.name)) if gaps else kept[0]


def files(run: Path) -> list[Path]:
    """A run's files of samples, in order of their steps."""
    return sorted((run / NAME).glob("[0-9]*-*.parquet"))


def step_of(file: Path) -> int:
    return int(file.stem.partition("-")[0])


def kind_of(file: Path) -> str:
    return file.stem.partition("-")[2]


def read(file: Path, most: int = 0) -> list[dict[str, Any]]:
    """A file's rows, by the names of :class:`Sample`, with the texts ``prompt`` and ``tokens``.

    Args:
        most: largest number of rows, but the last group is completed; 0: all.

    Raises:
        ValueError: the file is damaged, or not a file of samples.
    """
    import pyarrow.parquet as pq

    try:
        found = pq.ParquetFile(file).read().select(_schema().names)
        if 0 < most < len(found):
            groups = found["group"].to_numpy()
            found = found.slice(0, most + int(np.argmin(np.append(groups[most:] == groups[most - 1], False))))
        rows: list[dict[str, Any]] = found.to_pylist()
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"{file}: not readable as samples ({error})") from error
    return rows


# --- texts --------------------------------------------------------------------------------------------------------


def row_of(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    """A sample as a row of the files."""
    tokens = token_texts(tokenizer, sample.prompt_ids, sample.token_ids)
    prompt = tokenizer.decode(sample.prompt_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {
        "step": sample.step, "kind": sample.kind, "group": sample.group, "sibling": sample.sibling,
        "prompt": _valid(prompt), "completion": _valid(sample.completion or "".join(tokens)), "reward": sample.reward,
        "failure": _valid(redacted(sample.failure)) if sample.failure else "", "truncated": bool(sample.truncated),
        "tokens": tokens, "parts": [{"name": name, "value": value} for name, value in sample.parts.items()],
    } | {
        name: None if (array := getattr(sample, name)) is None else array.tolist()
        for name in ("prompt_ids", "token_ids", "by_policy", "actions", "log_probs", "versions", "advantages")
    }  # fmt: skip


def token_texts(tokenizer: Any, prompt_ids: np.ndarray, token_ids: np.ndarray) -> list[str]:
    """The text of each token; if a token ends within a character, its text is empty and the next has the character."""
    if not len(token_ids):
        return []
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(prompt_ids[-_BEFORE:].tolist(), skip_special_tokens=False)
    backend, ids = tokenizer.backend_tokenizer, token_ids.tolist()
    texts = [_valid(stream.step(backend, token) or "") for token in ids]
    complete = max((place + 1 for place, text in enumerate(texts) if text), default=0)
    if complete < len(texts):  # the completion was cut off within a character
        texts[-1] = _valid(tokenizer.decode(ids[complete:], skip_special_tokens=False))
    return texts


def _valid(text: str) -> str:
    """Remove halves of surrogate pairs, which cannot be written to a file."""
    return text.encode(errors="replace").decode()


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of a few of a step's rows, for a terminal: different prompts, each with its first completion."""
    names = {"train": "step", "eval": "evaluation of version", "base": "the bare base at version"}
    found = Table(title=f"{names[rows[0]['kind']]} {rows[0]['step']}", title_justify="left", expand=True)
    for heading, ratio in (("prompt", 5), ("completion", 5), ("reward", None), ("advantage", None), ("actions", 4)):
        found.add_column(heading, ratio=ratio, justify="left" if ratio else "right", no_wrap=True, overflow="ellipsis")
    of_prompts = [next(group) for _, group in itertools.groupby(rows, lambda row: row["group"])]
    for row in of_prompts[:_SHOWN]:
        cells = (_end(row["prompt"]), row["completion"], _number(row["reward"]), _mean(row["advantages"]), _acts(row))
        found.add_row(*(Text(plain(redacted(cell))) for cell in cells))
    return found


def _end(prompt: str) -> str:
    """The end of the prompt, which is nearest to the answer."""
    return prompt if len(prompt) <= 60 else f"…{prompt[-60:]}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _mean(values: Sequence[float] | None) -> str:
    return _number(float(np.mean(values))) if values else ""


def _acts(row: Mapping[str, Any]) -> str:
    """Actions with their probabilities: ``3 (0.91) 14 (0.40)``."""
    if not row["actions"]:
        return ""
    said = row["by_policy"] or [True] * len(row["actions"])
    taken = zip(row["actions"], row["log_probs"], said, strict=True)
    return " ".join(
        f"{action} ({np.exp(log_prob):.2f})" for action, log_prob, own in itertools.islice(taken, 16) if own
    )
