"""A user's rows as a task: ``--task.name dataset --task.path FILE``, or a folder, a glob or a hub id.

    task.path and task.more_paths ─> files or tables of each split ─> rows ── layouts.py ──> Examples
                                                                       task.weights ──> problems and demonstrations

Splits are those that the source names: in a folder, files whose names begin with train, and with test, validation or
the like; on the hub, its splits. ``task.splits`` names others. If there is only one split, a sixth of the prompts is
held out by checksum, so that all rows of a prompt are in the same split, whatever the seed. A training row whose prompt
is also held out is left out.
"""

import glob
import itertools
import random
import re
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
"""Names of splits; the first one that exists is used."""
_BOTH: tuple[Split, Split] = ("train", "heldout")


@dataclass(frozen=True)
class Source:
    """What was read from one path."""

    path: str
    name: str  # in metrics
    files: Mapping[str, str]  # by split, or by "" if one source is divided
    left_out: Sequence[str]  # splits that exist but are not read
    examples: Mapping[Split, list[Example]]

    @property
    def all_examples(self) -> list[Example]:
        return [one for some in self.examples.values() for one in some]


class Dataset:
    """Prompts of one data set or several; ``task.reward`` scores the responses.

    Args:
        path: a file, a folder, a glob or a hub id.
        seed: shuffles the rows.
        columns: see :mod:`~cola_ray.tasks.layouts`.
        splits: names of the splits train and heldout, if they are not among :data:`TRAIN` and :data:`HELD_OUT`.
        subset: the configuration of a data set on the hub.
        more_paths: further sources, in the same forms as ``path``.
        weights: each source's share of the prompts in training; a small source is repeated. Without weights, every
            prompt occurs as often as in its source.

    Raises:
        ValueError: a row cannot be read; the message names file, row and field.
    """

    @classmethod
    def of(cls, config: TaskConfig, seed: int) -> "Dataset":
        settings = (config.columns, config.splits, config.subset, config.more_paths, config.weights)
        return cls(config.path, seed, *settings)

    def __init__(
        self,
        path: str,
        seed: int,
        columns: Mapping[Any, str] | None = None,
        splits: Mapping[Any, str] | None = None,
        subset: str = "",
        more_paths: Sequence[str] = (),
        weights: Sequence[float] = (),
    ) -> None:
        self.sources = [_opened(one, columns or {}, splits or {}, subset) for one in (path, *more_paths)]
        asked = {as_text(one.prompt) for source in self.sources for one in source.examples["heldout"]}
        several = len(self.sources) > 1
        self._problems: dict[Split, list[Problem]] = {}
        self._train: list[Example] = []
        for split in _BOTH:
            counted = [source.examples[split] for source in self.sources]
            if split == "train":
                counted = [[one for one in some if as_text(one.prompt) not in asked] for some in counted]
                self.in_both = sum(len(source.examples[split]) for source in self.sources) - sum(map(len, counted))
                self._train = [one for some in counted for one in some]
                counted = _weighed(counted, weights)
            named = [(one, source.name) for source, some in zip(self.sources, counted, strict=True) for one in some]
            random.Random(seed).shuffle(named)
            self._problems[split] = [_problem(i, one, name if several else "") for i, (one, name) in enumerate(named)]

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._problems[split]

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        return [(one.prompt, one.response) for one in self._train if one.response]


def _problem(index: int, one: Example, source: str) -> Problem:
    return Problem(index, one.prompt, one.solution, one.row, source)


def _weighed(sources: Sequence[list[Example]], weights: Sequence[float]) -> list[list[Example]]:
    """Repeat rows so that sources have these shares and each row occurs at least once.

    Example: 2 and 3 rows with weights 1 and 3: rows of the second source are taken twice, which gives 2 and 6.
    """
    filled = [(len(some), weight) for some, weight in zip(sources, weights, strict=False) if some]
    unit = max((count / weight for count, weight in filled), default=0.0)
    if not unit:
        return list(sources)
    return [
        [some[i % len(some)] for i in range(round(unit * weight))] if some else []
        for some, weight in zip(sources, weights, strict=True)
    ]


def _opened(path: str, columns: Mapping[Any, str], splits: Mapping[Any, str], subset: str) -> Source:
    if is_local(path):
        files, left_out = sources_of(path, splits)
        tables = {split: (open_rows(source, "task.path"), source) for split, source in files.items()}
    else:
        files, left_out, tables = _of_hub(path, splits, subset)
    examples = {
        split: read_rows(table, source, "task.path", lambda row: read(row, columns))
        for split, (table, source) in tables.items()
    }
    return Source(path, name_of(path), files, left_out, _cut(examples))


def name_of(path: str) -> str:
    """Return a source's name in metrics.

    Example:
        >>> name_of("data/hard sums.jsonl"), name_of("openai/gsm8k")
        ('hard_sums', 'gsm8k')
    """
    name = Path(path).name
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
    return re.sub(r"\W+", "_", name.removesuffix(ending)).strip("_") or "rows"


def _cut(examples: Mapping[str, list[Example]]) -> dict[Split, list[Example]]:
    if "" not in examples:
        return {split: examples.get(split, []) for split in _BOTH}
    cut: dict[Split, list[Example]] = {"train": [], "heldout": []}
    for one in examples[""]:
        cut[split_of(one.prompt)].append(one)
    return cut


# --- files ------------------------------------------------------------------------------------------------------------


def sources_of(path: str, splits: Mapping[Any, str]) -> tuple[dict[str, str], list[str]]:
    """Return each split's source (a file or a glob), or under "" one that has to be divided; and names of other splits.

    In a folder with none of the usual names, all files are read.

    Raises:
        ValueError: ``task.path = ...``, or ``task.splits = ...``: a named split does not exist.
    """
    folder = Path(path)
    if not folder.is_dir():
        if splits:
            raise ValueError(f"task.splits = {dict(splits)}: {path} is no folder with a file for each; leave it out")
        return {"": path}, []
    there = sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix in ENDINGS)
    files = [name for name in there if not name.endswith(".txt")] or there  # a README beside tables is not data
    stems = list(dict.fromkeys(map(_stem, files)))
    train, heldout = _chosen(stems, splits, f"{path} has files of")
    if not (train or heldout):
        return {"": path}, []
    named = {"train": train, "heldout": heldout} if train and heldout else {"": train or heldout}
    found = {split: _glob(folder, [name for name in files if _stem(name) == stem]) for split, stem in named.items()}
    return found, [stem for stem in stems if stem not in named.values()]


def _stem(name: str) -> str:
    """Return a file's name without its ending, and without a number before that."""
    return re.split(r"[-_.]\d|\.", name)[0]


def _glob(folder: Path, names: Sequence[str]) -> str:
    """Return the one file, or a pattern that matches the files, of a split."""
    if len(names) == 1:
        return str(folder / names[0])
    stem = _stem(names[0])
    numbered = [name for name in names if re.match(r"[-_.]\d", name[len(stem) :])]
    if 0 < len(numbered) < len(names):
        other = next(name for name in names if name not in numbered)
        raise ValueError(f"task.path = {str(folder)!r}: has {other} and {numbered[0]}; number all files of {stem}, or "
                         "none")  # fmt: skip
    ending = "[-_.][0-9]*" if numbered else ".*"
    return str(Path(glob.escape(str(folder))) / f"{glob.escape(stem)}{ending}")


def _chosen(names: Sequence[str], splits: Mapping[Any, str], whose: str) -> tuple[str, str]:
    """Return the names of the splits to train on and to hold out; "" if there is none of the usual names."""
    for name in splits.values():
        if name not in names:
            raise ValueError(f"task.splits = {dict(splits)}: no {name}; {whose} {', '.join(names)}")
    train = splits.get("train") or next((name for name in TRAIN if name in names), "")
    if "heldout" in splits and not train:
        raise ValueError(f"task.splits = {dict(splits)}: nothing to train on; {whose} {', '.join(names)}: name train, "
                         "too")  # fmt: skip
    return train, splits.get("heldout") or next((name for name in HELD_OUT if name in names and name != train), "")


def faults(config: TaskConfig) -> list[str]:
    """Return a line for what is wrong with local files, read as the task will read them; hub ids are not checked."""
    lines = list[str]()
    for path in filter(is_local, (config.path, *config.more_paths)):
        field = "task.path" if path == config.path else "task.more_paths"
        try:
            files, _ = sources_of(path, config.splits)
        except ValueError as error:
            return [*lines, str(error)]
        for source in files.values():
            lines += peek(source, field, lambda row: read(row, config.columns))
    return lines


def first_examples(config: TaskConfig, count: int) -> list[Example]:
    """Return the first rows to train on of each local source, without reading the rest."""
    found = list[Example]()
    for path in filter(is_local, (config.path, *config.more_paths)):
        sources, _ = sources_of(path, config.splits)
        rows: Iterator[Any] = (row for file in files_of(next(iter(sources.values())))[1] for row in rows_in(file))
        found += [read(row, config.columns) for row in itertools.islice(rows, count)]
    return found


def as_problems(examples: Sequence[Example]) -> list[Problem]:
    return [_problem(index, one, "") for index, one in enumerate(examples)]


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
