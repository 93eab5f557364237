"""ETPO's task: write scikit-learn code for a table, see its score or its error, try again (Wen et al. 2024, section 5).

    utterance ─> code ─> sandbox: model = ...; fit on a half, probabilities for the other half, 5 times ─> probabilities
                            │ fails: reward -1, the error is the observation, next turn                        v
                            └──────────────────────────── reward: mean ROC AUC, the episode ends <─── scored out here

The labels of the halves that are predicted never enter the sandbox, so that a score cannot be made up.
"""

import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cola_ray.limits import Count, Seconds, Share
from cola_ray.tasks.csv_table import as_numbers, read_columns
from cola_ray.tasks.environment import Dialogue, Transition
from cola_ray.tasks.sandbox import Limits, Sandbox

Array = np.ndarray
BUNDLED = ("breast_cancer", "wine", "digits", "iris")
"""Classification tables that scikit-learn brings along."""
NUM_SPLITS = 5
FAILED = -1.0
_DISTRIBUTIONS = ("scikit-learn", "pandas")
# Once, before any program: the imports, and what a first prediction asks of the system that programs cannot.
_PREPARE = """
import sklearn.discriminant_analysis, sklearn.ensemble, sklearn.impute, sklearn.naive_bayes, sklearn.neighbors
import sklearn.neural_network, sklearn.pipeline, sklearn.svm
sklearn.neighbors.KNeighborsClassifier(1, algorithm="brute").fit([[0.0], [1.0]], [0, 1]).predict([[0.0]])
"""

# In the sandbox; the answer is a file of its own, so that errors name its lines.
_PROGRAM = """
import numpy as np
from sklearn.base import clone

names = {"__name__": "answer"}
exec(compile(open("answer.py").read(), "answer.py", "exec"), names)
if "model" not in names:
    raise NameError("the code must leave a classifier in a variable named model")
halves = np.load("halves.npz")
for split in range(len(halves.files) // 3):
    fitted = clone(names["model"]).fit(halves[f"seen{split}"], halves[f"labels{split}"])
    np.save(f"{split}.npy", fitted.predict_proba(halves[f"unseen{split}"]))
"""


@dataclass(frozen=True)
class Table:
    """Rows X (N, F) float64 with classes y (N,), 0 to C - 1."""

    name: str
    columns: tuple[str, ...]
    x: Array
    y: Array

    def halves(self, seed: int) -> list[tuple[Array, Array]]:
        """Row numbers to fit on and to predict, ``NUM_SPLITS`` times, every class on both sides."""
        from sklearn.model_selection import StratifiedShuffleSplit

        return list(StratifiedShuffleSplit(NUM_SPLITS, test_size=0.5, random_state=seed).split(self.x, self.y))

    def describe(self) -> str:
        shown = ", ".join(self.columns[:6]) + (", ..." if len(self.columns) > 6 else "")
        size = f"{len(self.x)} rows, {len(self.columns)} columns ({shown}), {self.y.max() + 1} classes"
        return f"Table {self.name}: {size}.\nWrite Python code that sets model to a scikit-learn classifier.\n"


class DataScience:
    """One table an episode.

    Args:
        dataset: one of :data:`BUNDLED`, or "all" for one of them by the episode's seed.
        path: a CSV file instead, with a header.
        target: its column to predict.
        rows: of a table, at most; the first ones of a fixed shuffle.
        seconds: of CPU that an attempt may use; a quarter more of wall time.
        skill: share of the demonstrations' attempts that run.
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
    ) -> None:
        names = BUNDLED if dataset == "all" else (dataset,)
        self.tables = [read_csv(path, target, rows)] if path else [bundled(name, rows) for name in names]
        self.max_turns, self.skill, self.turn, self.seed = max_turns, skill, 0, 0
        # Stopped before an environment's deadline (task.reward_timeout_s): a slow program costs its reward alone.
        self.sandbox = Sandbox(Limits(wall_s=1.25 * seconds, cpu_s=seconds), _PREPARE, _DISTRIBUTIONS)
        self.sandbox.start()

    @property
    def table(self) -> Table:
        return self.tables[self.seed % len(self.tables)]

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        self.seed, self.turn = seed, 0
        return self.table.describe(), {"table": self.table.name}

    def step(self, utterance: str) -> Transition:
        self.turn += 1
        score, told = self.attempt(code_in(utterance))
        ended = score != FAILED
        return f"\n{told}\n", score, ended, self.turn >= self.max_turns and not ended, {"score": score}

    def attempt(self, code: str) -> tuple[float, str]:
        """Reward and what is told of one answer."""
        halves = self.table.halves(self.seed)
        arrays: dict[str, Array] = {}
        for split, (seen, unseen) in enumerate(halves):
            x, y = self.table.x, self.table.y
            arrays |= {f"seen{split}": x[seen], f"labels{split}": y[seen], f"unseen{split}": x[unseen]}
        packed = io.BytesIO()
        np.savez(packed, **arrays)  # type: ignore[arg-type]
        wanted = tuple(f"{split}.npy" for split in range(NUM_SPLITS))
        ran = self.sandbox.run(_PROGRAM, {"answer.py": code.encode(), "halves.npz": packed.getvalue()}, wanted)
        if not ran.succeeded:
            lines = ran.output.strip().splitlines()
            return FAILED, f"Error: {ran.stopped or (lines[-1] if lines else f'exit code {ran.returncode}')}"
        try:
            found = [np.load(io.BytesIO(ran.files[name]), allow_pickle=False) for name in wanted]
            score = float(
                np.mean([_auc(self.table.y[unseen], p) for (_, unseen), p in zip(halves, found, strict=True)])
            )
        except (KeyError, ValueError, OSError, EOFError) as error:
            return FAILED, f"Error: no usable probabilities: {error}"
        return score, f"ROC AUC {score:.3f}"

    def get_state(self) -> tuple[int, int]:
        return self.seed, self.turn

    def set_state(self, state: tuple[int, int]) -> None:
        self.seed, self.turn = state

    def demonstrations(self, count: int, seed: int) -> list[Dialogue]:
        """Attempts by somebody who often forgets an import; each is run once a table, in the sandbox."""
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
                score, told = known[self.seed, code]
                turns.append((code, f"\n{told}\n"))
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
    """The first fenced block, or all of it where there is none.

    Example: "Here:\\n```python\\nx = 1\\n```" -> "x = 1\\n".
    """
    fenced = re.search(r"```[^\n`]*\n(.*?)(?:```|\Z)", utterance, re.DOTALL)
    return fenced[1] if fenced else utterance


def bundled(name: str, rows: int) -> Table:
    """One of scikit-learn's own tables; ValueError for an unknown one."""
    from sklearn import datasets

    if name not in BUNDLED:
        raise ValueError(
            f"task.options.dataset = {name!r}: use all, {', '.join(BUNDLED)}, or give task.path a CSV file"
        )
    loaded = getattr(datasets, f"load_{name}")()
    columns = [str(column).replace(" ", "_") for column in loaded.feature_names]
    return _some_rows(name, columns, np.asarray(loaded.data, float), np.asarray(loaded.target, np.int64), rows)


def read_csv(path: str, target: str, rows: int) -> Table:
    """A CSV file's columns as numbers, text as the number of its value in sorted order; rows without a target left out.

    Raises ValueError where the file is no table, has no such column, or nothing to tell apart.
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


def _auc(y: Array, probabilities: Array) -> float:
    """One against the rest where there are more than two classes; ValueError for what is no distribution."""
    from sklearn.metrics import roc_auc_score

    expected = (len(y), int(y.max()) + 1)
    if probabilities.shape != expected or not np.isfinite(probabilities).all() or (probabilities < 0).any():
        raise ValueError(f"expected finite probabilities of shape {expected}, got {probabilities.shape}")
    if expected[1] == 2:
        return float(roc_auc_score(y, probabilities[:, 1]))
    rows = probabilities / np.maximum(probabilities.sum(1, keepdims=True), 1e-12)
    return float(roc_auc_score(y, rows, multi_class="ovr"))
