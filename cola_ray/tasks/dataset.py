"""Rows of one's own as a task: ``--task.name dataset --task.path FILE``, a folder, a glob or a hub id.

    task.path ─> files or tables of each split ─> rows ── layouts.py ──> Examples ─> problems and demonstrations

Splits are those that the source names: of a folder, files whose names begin with train, and with test, validation or
the like; of the hub, splits. ``task.splits`` names others. Where there is one split only, a sixth of the prompts is
held out by checksum, so that rows of one prompt are on one side, whatever the seed. A training row whose prompt is held
out, too, is left out.
"""

import glob
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_ray.settings.config import TaskConfig
from cola_ray.tasks.chat import Prompt, as_text
from cola_ray.tasks.layouts import Example, read
from cola_ray.tasks.protocol import Problem, Split, split_of
from cola_ray.tasks.rows import ENDINGS, files_of, is_local, open_rows, peek, read_rows, rows_in

TRAIN = ("train", "training")
HELD_OUT = ("test", "heldout", "held_out", "validation", "valid", "val", "dev", "eval")
"""Names of splits, the first that is there counts."""
_BOTH: tuple[Split, Split] = ("train", "heldout")


@dataclass(frozen=True)
class Facts:
    """What was read, for people."""

    sources: Mapping[str, str]  # by split, or by "" if one source is cut
    left_out: Sequence[str]  # splits that are there and not read
    rows: int
    in_both: int  # training rows whose prompt is held out
    without_solution: int
    found_in: Counter[str]  # "prompt from question, solution from answer", and how many rows
    columns: Sequence[str]


class Dataset:
    """Prompts of a data set; ``task.reward`` says what responses are worth.

    Args:
        path: a file, a folder, a glob or a hub id.
        seed: shuffles the rows.
        columns: see :mod:`~cola_ray.tasks.layouts`.
        splits: names of the splits train and heldout, where they are others than :data:`TRAIN` and :data:`HELD_OUT`.
        subset: of a data set on the hub.

    Raises:
        ValueError: a row cannot be read; the message names file, row and field.
    """

    @classmethod
    def of(cls, config: TaskConfig, seed: int) -> "Dataset":
        return cls(config.path, seed, config.columns, config.splits, config.subset)

    def __init__(
        self,
        path: str,
        seed: int,
        columns: Mapping[Any, str] | None = None,
        splits: Mapping[Any, str] | None = None,
        subset: str = "",
    ) -> None:
        named = splits or {}
        if is_local(path):
            sources, left_out = sources_of(path, named)
            tables = {split: (open_rows(source, "task.path"), source) for split, source in sources.items()}
        else:
            sources, left_out, tables = _of_hub(path, named, subset)
        examples = {
            split: read_rows(table, source, "task.path", lambda row: read(row, columns or {}))
            for split, (table, source) in tables.items()
        }
        self._splits = _cut(examples)
        whole = [one for some in self._splits.values() for one in some]
        asked = {as_text(one.prompt) for one in self._splits["heldout"]}
        train = [one for one in self._splits["train"] if as_text(one.prompt) not in asked]
        in_both = len(self._splits["train"]) - len(train)
        self._splits["train"] = train
        for some in self._splits.values():
            random.Random(seed).shuffle(some)
        self.facts = Facts(
            sources, left_out, len(whole), in_both, sum(not one.solution for one in whole),
            Counter(_found(one) for one in whole), list(dict.fromkeys(name for one in whole for name in one.row)),
        )  # fmt: skip
        self._problems = {split: as_problems(self._splits[split]) for split in _BOTH}

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._problems[split]

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        return [(one.prompt, one.response) for one in self._splits["train"] if one.response]


def _found(one: Example) -> str:
    return ", ".join(f"{what} from {name}" for what, name in one.found_in.items())


def _cut(examples: Mapping[str, list[Example]]) -> dict[Split, list[Example]]:
    if "" not in examples:
        return {split: examples.get(split, []) for split in _BOTH}
    cut: dict[Split, list[Example]] = {"train": [], "heldout": []}
    for one in examples[""]:
        cut[split_of(one.prompt)].append(one)
    return cut


# --- files ------------------------------------------------------------------------------------------------------------


def sources_of(path: str, splits: Mapping[Any, str]) -> tuple[dict[str, str], list[str]]:
    """Return the source of each split, a file or a glob, or one for "" that is to be cut; and names of other splits.

    Raises:
        ValueError: ``task.path = ...``, or ``task.splits = ...``: there is nothing of a split that is named.
    """
    folder = Path(path)
    if not folder.is_dir():
        if splits:
            raise ValueError(f"task.splits = {dict(splits)}: {path} is no folder with a file for each; leave it out")
        return {"": path}, []
    files = sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix in ENDINGS)
    stems = list(dict.fromkeys(re.split(r"[-_.]\d|\.", name)[0] for name in files))
    train, heldout = _chosen(stems, splits, f"{path} has files of")
    if not (train and heldout):
        return {"": path}, []
    return (
        {split: _glob(folder, [name for name in files if re.split(r"[-_.]\d|\.", name)[0] == stem])
         for split, stem in (("train", train), ("heldout", heldout))},
        [stem for stem in stems if stem not in (train, heldout)],
    )  # fmt: skip


def _glob(folder: Path, names: Sequence[str]) -> str:
    """One file, or a pattern for several of one split."""
    if len(names) == 1:
        return str(folder / names[0])
    stem = re.split(r"[-_.]\d|\.", names[0])[0]
    return str(Path(glob.escape(str(folder))) / f"{glob.escape(stem)}[-_.]*")


def _chosen(names: Sequence[str], splits: Mapping[Any, str], whose: str) -> tuple[str, str]:
    """Return the names of the splits to train on and to hold out; "" if there is none of the usual names."""
    for name in splits.values():
        if name not in names:
            raise ValueError(f"task.splits = {dict(splits)}: no {name}; {whose} {', '.join(names)}")
    train = splits.get("train") or next((name for name in TRAIN if name in names), "")
    return train, splits.get("heldout") or next((name for name in HELD_OUT if name in names and name != train), "")


def faults(config: TaskConfig) -> list[str]:
    """Return a line for what is wrong with local files, read as the task will read them; [] for hub ids."""
    try:
        sources, _ = sources_of(config.path, config.splits)
    except ValueError as error:
        return [str(error)]
    return [
        line for source in sources.values() for line in peek(source, "task.path", lambda row: read(row, config.columns))
    ]


def first_examples(config: TaskConfig, count: int) -> list[Example]:
    """Return the first rows of local files to train on, without reading the rest."""
    sources, _ = sources_of(config.path, config.splits)
    rows: Iterator[Any] = (row for file in files_of(next(iter(sources.values())))[1] for row in rows_in(file))
    return [read(row, config.columns) for row in itertools.islice(rows, count)]


def as_problems(examples: Sequence[Example]) -> list[Problem]:
    return [Problem(index, one.prompt, one.solution, one.row) for index, one in enumerate(examples)]


# --- the hub ----------------------------------------------------------------------------------------------------------


def _of_hub(
    path: str, splits: Mapping[Any, str], subset: str
) -> tuple[dict[str, str], list[str], dict[str, tuple[Any, str]]]:
    import datasets

    try:
        tables = datasets.load_dataset(path, subset or None)
    except ValueError as error:
        said = " ".join(str(error).split())
        more = "; name one with task.subset" if "onfig" in said else ""
        raise ValueError(f"task.path = {path!r}: {said[:300]}{more}") from None
    names = [str(name) for name in tables]
    train, heldout = _chosen(names, splits, f"{path} has")
    if not (train and heldout):
        only = train or heldout or names[0]
        return {"": only}, [name for name in names if name != only], {"": (tables[only], path)}
    found = {"train": train, "heldout": heldout}
    return (
        dict(found), [name for name in names if name not in found.values()],
        {split: (tables[name], path) for split, name in found.items()},
    )  # fmt: skip
