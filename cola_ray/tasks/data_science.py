"""ETPO's task: write scikit-learn code for a table, see its score or error, try again (Wen et al. 2024, section 5).

    utterance ─> code ─> 5 splits, each in a sandbox run of its own:
                             model = ...; fit on one half, probabilities for the other half ─> plain numbers
                            │ fails: reward -1, the error is the observation, next turn            v
                            └─────────────── reward: mean ROC AUC, the episode ends <─── scored outside the sandbox

The labels of the half to predict never enter the sandbox, nor do those of other splits, so a program cannot look up its
score. Knowing a bundled table by heart does not help either, because its rows are drawn anew (:meth:`Table.splits`).
"""

import hashlib
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cola_ray.sandbox.programs import Limits, ProgramResult, Sandbox
from cola_ray.settings.limits import Count, Seconds, Share
from cola_ray.tasks.csv_table import as_numbers, read_columns
from cola_ray.tasks.environment import Dialogue, Transition

Array = np.ndarray
BUNDLED = ("breast_cancer", "wine", "digits", "iris")
"""Classification tables that come with scikit-learn."""
NUM_SPLITS = 5
FAILED = -1.0
_DISTRIBUTIONS = ("scikit-learn", "pandas", "pyarrow")
# Runs once, before any program: the imports, and a first prediction, which makes system calls forbidden to programs.
_PREPARE = """
import sklearn.discriminant_analysis, sklearn.ensemble, sklearn.impute, sklearn.naive_bayes, sklearn.neighbors
import pandas, sklearn.neural_network, sklearn.pipeline, sklearn.svm
sklearn.neighbors.KNeighborsClassifier(1, algorithm="brute").fit([[0.0], [1.0]], [0, 1]).predict([[0.0]])
"""

# Runs in the sandbox. The answer is a separate file, so that errors name its lines. Generators are seeded, so that a
# classifier without a seed of its own has the same score each time.
_PROGRAM = """
import random
import numpy as np
from sklearn.base import clone

random.seed(0)
np.random.seed(0)
names = {"__name__": "answer"}
exec(compile(open("answer.py", "rb").read(), "answer.py", "exec"), names)
if "model" not in names:
    raise NameError("the code must leave a classifier in a variable named model")
labels, unseen = np.load("labels.npy"), np.load("unseen.npy")
found = np.asarray(clone(names["model"]).fit(np.load("seen.npy"), labels).predict_proba(unseen))
shape = len(unseen), int(labels.max()) + 1
if found.shape != shape:
    raise ValueError(f"expected probabilities of shape {shape}, got {found.shape}")
found.astype("<f8").tofile("probabilities")
"""
_MAX_ERROR_LENGTH = 300
"""Number of characters of an error message that the agent sees."""


@dataclass(frozen=True)
class Split:
    """Half of a table's rows to fit on, (n, F) with classes (n,), and half to predict, (m, F) with classes (m,)."""

    seen: Array
    labels: Array
    unseen: Array
    gold: Array


@dataclass(frozen=True)
class Table:
    """Rows X (N, F) float64 with classes y (N,), 0 to C - 1."""

    name: str
    columns: tuple[str, ...]
    x: Array
    y: Array
    public: bool = False
    """Whether rows and labels are publicly known, so that rows must be drawn anew to have unknown labels."""

    def shuffled(self, seed: int, key: str = "") -> "Table":
        """Return the table with its columns in another order."""
        order = _chance(key, self.name, seed, "columns").permutation(len(self.columns))
        return replace(self, columns=tuple(self.columns[i] for i in order), x=self.x[:, order])

    def splits(self, seed: int, key: str = "") -> list[Split]:
        """Return ``NUM_SPLITS`` random halvings, every class on both sides; for public tables, of newly drawn rows.

        A drawn row of class c is ``mu_c + (r_i + g) / sqrt(2)``: r_i is the difference between the i-th row of that
        class and the class's mean mu_c, and g is Gaussian with the covariance of all rows' r. So means, and the
        covariance within classes, are the table's own, while no row equals one of the table's or of another split's.
        """
        from sklearn.model_selection import StratifiedShuffleSplit

        splits = []
        for number in range(NUM_SPLITS):
            chance = _chance(key, self.name, seed, number)
            x = self._drawn_rows(chance) if self.public else self.x
            halves = StratifiedShuffleSplit(1, test_size=0.5, random_state=int(chance.integers(2**32)))
            ((seen, unseen),) = halves.split(x, self.y)
            splits.append(Split(x[seen], self.y[seen], x[unseen], self.y[unseen]))
        return splits

    def _drawn_rows(self, chance: np.random.Generator) -> Array:
        means = np.stack([self.x[self.y == label].mean(0) for label in range(self.y.max() + 1)])[self.y]
        residuals = self.x - means
        gaussian = chance.normal(size=(len(residuals), len(residuals))) @ residuals / np.sqrt(len(residuals))
        return means + (residuals + gaussian) / np.sqrt(2)

    def describe(self) -> str:
        """Return the opening observation."""
        shown = ", ".join(self.columns[:6]) + (", ..." if len(self.columns) > 6 else "")
        size = f"{len(self.x)} rows, {len(self.columns)} columns ({shown}), {self.y.max() + 1} classes"
        return f"Table {self.name}: {size}.\nWrite Python code that sets model to a scikit-learn classifier.\n"


def _chance(*of: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(of).encode()).digest()))


class DataScience:
    """One table per episode.

    Args:
        dataset: one of :data:`BUNDLED`, or "all", from which the episode's seed chooses one.
        path: a CSV file with a header, instead of a bundled table.
        target: the file's column to predict.
        max_turns: attempts per episode.
        rows: largest number of rows of a table; the first ones of a fixed shuffle are used.
        seconds: CPU seconds of an attempt; its wall time may be a quarter longer.
        skill: share of the demonstrations' attempts that run without an error.
        key: mixed into all random draws. A program that knows this file and the table could repeat the draws of an
            episode's seed, labels included; with a key of the run's own it cannot.
    """

    def __init__(
        self,
        dataset: str = "all",
        path: str = "",
        target: str = "",
        max_turns: Count = 5,
        rows: Count = 600,
        seconds: Seconds = 20.0,
        skill: Share = 0.5,
        key: str = "",
    ) -> None:
        names = BUNDLED if dataset == "all" else (dataset,)
        self.tables = [read_csv(path, target, rows)] if path else [bundled(name, rows) for name in names]
        self.max_turns, self.skill, self.key, self.turn, self.seed = max_turns, skill, key, 0, 0
        # Below an environment's deadline (task.reward_timeout_s), so that a slow program costs only its own reward.
        self.sandbox = Sandbox(Limits(wall_s=1.25 * seconds, cpu_s=seconds), _PREPARE, _DISTRIBUTIONS)
        self.sandbox.start()

    @property
    def table(self) -> Table:
        """The episode's table."""
        return self.tables[self.seed % len(self.tables)].shuffled(self.seed, self.key)

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        self.seed, self.turn = seed, 0
        return self.table.describe(), {"table": self.table.name}

    def step(self, utterance: str) -> Transition:
        self.turn += 1
        score, message = self.attempt(code_in(utterance))
        ended = score != FAILED
        return f"\n{message}\n", score, ended, self.turn >= self.max_turns and not ended, {"score": score}

    def attempt(self, code: str) -> tuple[float, str]:
        """Return the reward of an attempt, and the message that the agent sees."""
        left, scores = self.sandbox.limits, []
        for split in self.table.splits(self.seed, self.key):
            ran = self.sandbox.run(_PROGRAM, _files(code, split), ("probabilities",), left)
            left = replace(left, wall_s=max(left.wall_s - ran.wall_s, 0.0), cpu_s=max(left.cpu_s - ran.cpu_s, 0.0))
            try:
                scores.append(_auc(split.gold, _probabilities(ran, split)))
            except _NoScoreError as error:
                return FAILED, _printable(f"Error: {error}")
        return float(np.mean(scores)), f"ROC AUC {np.mean(scores):.3f}"

    def get_state(self) -> tuple[int, int]:
        return self.seed, self.turn

    def set_state(self, state: tuple[int, int]) -> None:
        self.seed, self.turn = state

    def demonstrations(self, count: int, seed: int) -> list[Dialogue]:
        """Return attempts by a player who often forgets an import; each distinct one is run once per table."""
        draw, known = random.Random(seed), dict[tuple[int, str], tuple[float, str]]()
        dialogues = []
        for _ in range(count):
            opening, _ = self.reset(seed=draw.randrange(len(self.tables)))
            turns = list[tuple[str, str]]()
            while len(turns) < self.max_turns:
                module, call = draw.choice(_CLASSIFIERS)
                imported = draw.random() < self.skill
                code = (
                    f"from {module} import {call.partition('(')[0]}\nmodel = {call}" if imported else f"model = {call}"
                )
                if (self.seed, code) not in known:
                    known[self.seed, code] = self.attempt(code)
                score, message = known[self.seed, code]
                turns.append((code, f"\n{message}\n"))
                if score != FAILED:
                    break
            dialogues.append(Dialogue(opening, tuple(turns)))
        return dialogues


_CLASSIFIERS = (
    ("sklearn.tree", "DecisionTreeClassifier(max_depth=1)"),
    ("sklearn.tree", "DecisionTreeClassifier()"),
    ("sklearn.dummy", "DummyClassifier()"),
    ("sklearn.naive_bayes", "GaussianNB()"),
    ("sklearn.neighbors", "KNeighborsClassifier(3)"),
    ("sklearn.ensemble", "RandomForestClassifier(10)"),
    ("sklearn.ensemble", "ExtraTreesClassifier(50)"),
    ("sklearn.linear_model", "LogisticRegression(max_iter=500)"),
)


def code_in(utterance: str) -> str:
    """Return the first fenced block, or the whole utterance if there is none.

    Example: "Here:\\n```python\\nx = 1\\n```" -> "x = 1\\n".
    """
    fenced = re.search(r"```[^\n`]*\n(.*?)(?:```|\Z)", utterance, re.DOTALL)
    return fenced[1] if fenced else utterance


def bundled(name: str, rows: int) -> Table:
    """Load one of scikit-learn's own tables; ValueError for an unknown one."""
    from sklearn import datasets

    if name not in BUNDLED:
        raise ValueError(
            f"task.options.dataset = {name!r}: use all, {', '.join(BUNDLED)}, or give task.path a CSV file"
        )
    loaded = getattr(datasets, f"load_{name}")()
    columns = [str(column).replace(" ", "_") for column in loaded.feature_names]
    x, y = np.asarray(loaded.data, float), np.asarray(loaded.target, np.int64)
    return replace(_some_rows(name, columns, x, y, rows), public=True)


def read_csv(path: str, target: str, rows: int) -> Table:
    """Read a CSV file's columns as numbers, text as the index of its value in sorted order; drop rows without a target.

    Raises:
        ValueError: the file is not a table, has no such column, or has no classes to tell apart.
    """
    table = read_columns(path, "task.path")
    if target not in table:
        raise ValueError(f"task.options.target = {target!r}: {path} has the columns {', '.join(table)}")
    numbers = dict[str, Array]()
    for name, cells in table.items():
        try:
            numbers[name] = as_numbers(cells, name)
        except ValueError as error:
            raise ValueError(f"task.path = {path!r}: {error}") from None
    given = np.array([bool(cell) for cell in table[target]])
    classes, y = np.unique(numbers[target][given], return_inverse=True)
    columns = [name for name in table if name != target]
    if len(classes) < 2 or np.bincount(y).min() < 2 or not columns:
        raise ValueError(
            f"task.options.target = {target!r}: needs two classes or more, with two rows or more each, and another "
            f"column; {path} has {len(classes)} classes and {len(columns)} other columns"
        )
    x = np.stack([numbers[name][given] for name in columns], 1)
    return _some_rows(Path(path).stem, columns, x, y.astype(np.int64), rows)


def _some_rows(name: str, columns: Sequence[str], x: Array, y: Array, rows: int) -> Table:
    order = np.random.default_rng(0).permutation(len(x))[:rows]
    return Table(name, tuple(columns), x[order], y[order])


class _NoScoreError(Exception):
    """An attempt has no score; the message for the agent says why."""


def _files(code: str, split: Split) -> dict[str, bytes]:
    files = {"answer.py": code.encode(errors="replace")}
    for name in ("seen", "labels", "unseen"):
        packed = io.BytesIO()
        np.save(packed, getattr(split, name))
        files[f"{name}.npy"] = packed.getvalue()
    return files


def _probabilities(ran: ProgramResult, split: Split) -> Array:
    """Return a program's probabilities for the unseen rows, (m, C); _NoScoreError if they are not a distribution."""
    if not ran.succeeded:
        lines = ran.output.strip().splitlines()
        raise _NoScoreError(ran.stopped or (lines[-1] if lines else f"exit code {ran.returncode}"))
    shape = len(split.gold), int(split.gold.max()) + 1
    content = ran.files.get("probabilities", b"")
    if len(content) != 8 * shape[0] * shape[1]:
        raise _NoScoreError(f"no usable probabilities: expected numbers of shape {shape}, got {len(content)} bytes")
    found = np.frombuffer(content, "<f8").reshape(shape)
    if not ((found >= 0) & (found < 1e6)).all() or not (found.sum(1) > 0).all():
        raise _NoScoreError("no usable probabilities: not finite, negative, too large, or all 0 for a row")
    return found / found.sum(1, keepdims=True)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:_MAX_ERROR_LENGTH]


def _auc(y: Array, probabilities: Array) -> float:
    """Return the ROC AUC; with more than two classes, the mean over one class against the rest."""
    from sklearn.metrics import roc_auc_score

    if probabilities.shape[1] == 2:
        return float(roc_auc_score(y, probabilities[:, 1]))
    return float(roc_auc_score(y, probabilities, multi_class="ovr"))
