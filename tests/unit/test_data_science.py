"""ETPO's task: rewards against scikit-learn used by hand, errors as observations, labels out of reach."""

import io
import json
import textwrap
from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from sklearn.utils import all_estimators

from cola_ray.sandbox.programs import ProgramResult
from cola_ray.settings.config import TaskConfig
from cola_ray.tasks import make_environment
from cola_ray.tasks.data_science import DataScience, _auc, _files, bundled, code_in
from cola_ray.tasks.environment import HELD_OUT

GOOD = "Try this:\n```python\nfrom sklearn.naive_bayes import GaussianNB\nmodel = GaussianNB()\n```\nIt is simple."


@pytest.fixture(scope="module")
def iris():
    environment = DataScience("iris", seconds=60)
    yield environment
    environment.sandbox.close()


@pytest.mark.parametrize("seed", [3, HELD_OUT + 3])
def test_the_reward_is_the_mean_auc_of_five_random_halves(iris, seed):
    iris.reset(seed=seed)
    observation, reward, terminated, truncated, _ = iris.step(GOOD)
    scores = []
    for split in iris.table.splits(seed):
        assert np.bincount(split.labels).tolist() == np.bincount(split.gold).tolist() == [25, 25, 25]
        probabilities = GaussianNB().fit(split.seen, split.labels).predict_proba(split.unseen)
        scores.append(roc_auc_score(split.gold, probabilities, multi_class="ovr"))
    assert len(scores) == 5
    assert reward == pytest.approx(np.mean(scores), abs=1e-9)
    assert observation == f"\nROC AUC {np.mean(scores):.3f}\n"
    assert (terminated, truncated) == (True, False)


def _all_rows(split):
    return np.concatenate([split.seen, split.unseen]), np.concatenate([split.labels, split.gold])


def test_drawn_rows_have_the_tables_moments_and_none_of_its_rows():
    """Class means, and the covariance within classes, over many draws; no row is the table's or another split's."""
    x, y = load_iris(return_X_y=True)
    table = bundled("iris", 600)
    drawn = [_all_rows(split) for seed in range(40) for split in table.splits(seed)]
    rows, labels = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    assert len(np.unique(rows, axis=0)) == len(rows) == 40 * 5 * 150
    nearest = np.abs(rows[:750, None] - x[None]).max(2).min(1)
    assert np.median(nearest) > 0.1, "of a table in centimetres, to one digit behind the point"
    within = 0
    for label in range(3):
        mine, own = rows[labels == label], x[y == label]
        standard_error = own.std(0) / np.sqrt(len(mine))
        assert (np.abs(mine.mean(0) - own.mean(0)) < 5 * standard_error).all()
        within += np.cov(mine.T) / 3
    expected = np.mean([np.cov(x[y == label].T, bias=True) for label in range(3)], 0)
    spread = np.sqrt(np.diag(expected))
    # A covariance's standard error is at most sqrt(2 / n) of the product of deviations.
    assert (np.abs(within - expected) < 5 * np.sqrt(2 / len(rows)) * np.outer(spread, spread)).all()


def test_what_is_drawn_is_the_seeds_the_tables_and_the_keys():
    table = bundled("wine", 600)
    first = table.splits(1)[0].seen
    assert (table.splits(1)[0].seen == first).all()
    others = [table.splits(2)[0].seen, table.splits(1)[1].seen, table.splits(1, key="mine")[0].seen]
    assert not any((other == first).any() for other in others)
    assert table.shuffled(1).columns != table.columns
    assert sorted(table.shuffled(1).columns) == sorted(table.columns)
    column = table.shuffled(1).columns.index("alcohol")
    assert (table.shuffled(1).x[:, column] == table.x[:, 0]).all(), "names go with their columns"


# What honest programs do, all of it in one.
HONEST = """
import importlib, io, json, os, time
import joblib, numpy as np, pandas as pd
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC
x = np.random.default_rng(0).normal(size=(60, 5))
y = (x[:, 0] > 0).astype(int)
fitted = {}
for module, name in json.load(open("classifiers.json")):
    classifier = getattr(importlib.import_module(module), name)()
    rows = abs(x) if name in ("CategoricalNB", "ComplementNB", "MultinomialNB") else x
    fitted[name] = classifier.fit(rows, y).predict(rows).tolist()
GridSearchCV(SVC(), {"C": [1, 2]}).fit(x, y)
assert len(cross_val_score(SVC(), x, y)) == 5
table = pd.DataFrame(x, columns=list("abcde")).assign(y=y)
table.to_csv("table.csv")
assert pd.read_csv("table.csv").groupby("y")["a"].mean().diff().iloc[1] > 0
assert "count" in str(table.describe())
np.save("rows.npy", x)
np.savez_compressed("rows.npz", x=x)
kept = np.load("rows.npy", mmap_mode="r+")
kept.flush()
assert (np.load("rows.npz")["x"] == kept).all()
joblib.dump(classifier, "model.joblib")
joblib.load("model.joblib")
time.sleep(0.01)
json.dump(fitted, open("fitted.json", "w"))
"""


def test_honest_programs_have_what_they_need(iris):
    """Every classifier of scikit-learn that needs no arguments, with what it predicts outside; pandas; files."""
    needy = ("SelfTrainingClassifier", "VotingClassifier", "StackingClassifier", "ClassifierChain",
             "FixedThresholdClassifier", "TunedThresholdClassifierCV", "MultiOutputClassifier", "OneVsOneClassifier",
             "OneVsRestClassifier", "OutputCodeClassifier")  # fmt: skip
    classifiers = [(one.__module__, name) for name, one in all_estimators("classifier") if name not in needy]
    assert len(classifiers) > 25
    files = {"classifiers.json": json.dumps(classifiers).encode()}
    ran = iris.sandbox.run(HONEST, files, ("fitted.json",))
    assert ran.succeeded, ran.output
    fitted = json.loads(ran.files["fitted.json"])
    x = np.random.default_rng(0).normal(size=(60, 5))
    y = (x[:, 0] > 0).astype(int)
    for one in (GaussianNB, KNeighborsClassifier, LogisticRegression, SVC):
        assert fitted[one.__name__] == one().fit(x, y).predict(x).tolist()


# --- labels ---------------------------------------------------------------------------------------------------------

# In the sandbox: all that can be read or reached, searched for labels of the unseen rows and for the bundled tables.
SEARCH = r"""
import ctypes, gc, glob, importlib, os, sys
import numpy as np
found = []
seen, labels, unseen = (np.load(f"{name}.npy") for name in ("seen", "labels", "unseen"))

def table(name, rows):
    rows = np.asarray(rows)
    if rows.ndim and len(rows) >= len(unseen) and rows is not seen and rows is not unseen and rows is not labels:
        found.append((name, rows.shape))

try:  # what scikit-learn brings along
    from sklearn import datasets
    for name in ("load_iris", "load_wine", "load_digits", "load_breast_cancer"):
        try: table(name, getattr(datasets, name)().data)
        except OSError: pass
except OSError: pass
known = ("iris", "wine_data", "breast_cancer", "digits.csv", "halves", "gold")
folders = {os.getcwd(), os.path.dirname(os.getcwd()), "/proc/self", "/proc", "/tmp", os.path.expanduser("~"), *sys.path}
for top in folders:  # every file that bears a table's name, there and below libraries' folders
    for folder, _, names in os.walk(top):
        for name in names:
            if any(word in name for word in known) and not name.endswith((".py", ".pyc", ".so")):
                try: found.append((name, len(open(os.path.join(folder, name), "rb").read())))
                except OSError: pass
for name in ("environ", "maps", "mem", "cmdline", "fd", "stat"):  # about itself and who started it
    for pid in ("self", os.getppid()):
        try: found.append((name, open(f"/proc/{pid}/{name}", "rb").read(1)))
        except OSError: pass
for descriptor in range(3, 300):  # what was left open
    try: found.append((descriptor, os.fstat(descriptor)))
    except OSError: pass
mine = {id(seen), id(labels), id(unseen)}
for holder in gc.get_objects():  # what the server had in its memory when it forked, frames and modules among it
    for thing in (holder, *gc.get_referents(holder)):
        if isinstance(thing, np.ndarray) and id(thing) not in mine and len(thing.shape) in (1, 2):
            integers = thing.dtype.kind in "iu" and thing.ndim == 1 and thing.max(initial=0) < 10
            if len(thing) in (len(unseen), 2 * len(unseen)) and (integers or thing.ndim == 2):
                found.append(("array", thing.shape))
        if isinstance(thing, (list, tuple)) and len(thing) in (len(unseen), 2 * len(unseen)):
            if all(isinstance(value, (int, float, np.number)) for value in thing): found.append(("sequence", thing[:9]))
print(found)
"""


def test_a_program_that_reads_everything_finds_no_label(iris):
    split = bundled("breast_cancer", 600).splits(0)[0]
    ran = iris.sandbox.run(SEARCH, _files("", split))
    assert ran.succeeded, ran.output
    assert ran.output == "[]\n"


def test_a_run_has_the_labels_of_one_split(iris, monkeypatch):
    """Five runs, each with the rows of its own split and the labels of the half that it fits on, and no file more."""
    given = []
    monkeypatch.setattr(
        iris.sandbox,
        "run",
        lambda source, files, *rest: given.append(files) or ProgramResult(0, "", "", {"probabilities": UNIFORM}),
    )
    iris.reset(seed=5)
    assert iris.attempt("model = 1")[0] == pytest.approx(0.5)
    for files, split in zip(given, iris.table.splits(5), strict=True):
        assert set(files) == {"answer.py", "seen.npy", "labels.npy", "unseen.npy"}
        for part in ("seen", "labels", "unseen"):
            np.testing.assert_array_equal(np.load(io.BytesIO(files[f"{part}.npy"])), getattr(split, part))


UNIFORM = np.full((75, 3), 1 / 3).tobytes()


def _looked_up(table, split):
    """By the label of the row that looks most like it, as by a program that carries a bundled table in its source."""
    far = (((split.unseen[:, None] - table.x) / (table.x.std(0) + 1e-9)) ** 2).sum(2)
    nearest = np.stack([far[:, table.y == label].min(1) for label in range(table.y.max() + 1)], 1)
    weights = np.exp(nearest.min(1, keepdims=True) - nearest)
    return weights / weights.sum(1, keepdims=True)


def _learnt(split, *more):
    x, y = (np.concatenate(parts) for parts in zip((split.seen, split.labels), *more, strict=True))
    return ExtraTreesClassifier(25, random_state=0).fit(x, y).predict_proba(split.unseen)


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer"])
def test_to_know_a_table_by_heart_is_worth_no_more_than_noise(name):
    """Labels, order of columns and all; against the same learner on the half that it is given.

    Noise is the deviation of an honest score between splits. Where rows are the table's own, whoever knows it is right.
    """
    table, scores = bundled(name, 600).shuffled(0), {"honest": [], "looked up": [], "more to learn from": []}
    for split in [split for seed in range(3) for split in table.splits(seed)]:
        scores["honest"].append(_auc(split.gold, _learnt(split)))
        scores["looked up"].append(_auc(split.gold, _looked_up(table, split)))
        scores["more to learn from"].append(_auc(split.gold, _learnt(split, (table.x, table.y))))
    gain = {way: np.mean(found) - np.mean(scores["honest"]) for way, found in scores.items()}
    noise = np.std(scores["honest"], ddof=1)
    assert np.mean(scores["honest"]) > 0.97
    assert gain["looked up"] < noise
    assert gain["more to learn from"] < noise
    own = replace(table, public=False).splits(0)
    assert [_auc(split.gold, _looked_up(table, split)) for split in own] == [1.0] * 5


def test_a_program_that_draws_without_a_seed_has_the_same_score_each_time(iris):
    """Also in another process, as after a restart; by numpy's generator and by Python's, which a fork seeds anew."""
    code = """
        import random
        from sklearn.ensemble import RandomForestClassifier
        model = RandomForestClassifier(random.randrange(2, 9))
    """
    iris.reset(seed=4)
    scores = {iris.attempt(textwrap.dedent(code))[0] for _ in range(2)}
    another = DataScience("iris", seconds=60)
    another.reset(seed=4)
    scores.add(another.attempt(textwrap.dedent(code))[0])
    another.sandbox.close()
    assert len(scores) == 1
    assert scores.pop() > 0.9


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("model = GaussianNB()", "NameError: name 'GaussianNB' is not defined"),
        ("model = (", "SyntaxError"),
        ("x = 1", "the code must leave a classifier in a variable named model"),
        ("model = 3", "Cannot clone object"),
        ("from sklearn.linear_model import Ridge\nmodel = Ridge()", "predict_proba"),
        ("open('/etc/passwd')", "PermissionError"),
    ],
)
def test_an_error_costs_and_is_told(iris, code, told):
    iris.reset(seed=0)
    observation, reward, terminated, truncated, _ = iris.step(code)
    assert told in observation
    assert observation.startswith("\nError: ")
    assert (reward, terminated, truncated) == (-1.0, False, False)


@pytest.mark.parametrize(
    ("made_up", "told"),
    [
        ("np.ones((75, 3)) * np.nan", "no usable probabilities"), ("-np.ones((75, 3))", "no usable probabilities"),
        ("np.zeros((75, 3))", "no usable probabilities"), ("np.full((75, 3), 1e308)", "no usable probabilities"),
        ("np.ones((75, 2))", "expected probabilities of shape (75, 3)"),
        ("np.ones(3)", "expected probabilities of shape (75, 3)"),
        ("[['a'] * 3] * 75", "could not convert string to float"), ("np.ones((75, 3)) * 1j", "no usable probabilities"),
    ],
)  # fmt: skip
def test_made_up_probabilities_win_nothing(iris, made_up, told):
    """A classifier of the agent's own, which returns what it likes: the labels are not there to be copied."""
    iris.reset(seed=0)
    code = (
        "import numpy as np\nfrom sklearn.base import BaseEstimator\nclass Mine(BaseEstimator):\n"
        f"    def fit(self, x, y): return self\n    def predict_proba(self, x): return {made_up}\nmodel = Mine()"
    )
    observation, reward, *_ = iris.step(code)
    assert reward == -1.0
    assert told in observation


def test_five_attempts_and_a_state_that_goes_on(iris):
    iris.reset(seed=0)
    ends = [iris.step("x = 1")[2:4] for _ in range(4)]
    state = iris.get_state()
    iris.reset(seed=7)
    iris.set_state(state)
    assert [*ends, iris.step("x = 1")[2:4]] == [(False, False)] * 4 + [(False, True)]


def test_a_csv_file_with_words_and_gaps(tmp_path):
    draw = np.random.default_rng(0)
    rows = ["size,colour,kind"]
    for _ in range(80):
        kind = draw.integers(2)
        rows.append(f"{draw.normal() + 3 * kind:.3f},{'red' if draw.random() < 0.5 else ''},{'ab'[kind]}")
    rows.append("1.0,red,")
    file = tmp_path / "things.csv"
    file.write_text("\n".join(rows))
    environment = make_environment(
        TaskConfig(name="data_science", path=str(file), options={"target": "kind", "seconds": 60.0})
    )
    opening, _ = environment.reset(seed=0)
    assert opening.startswith("Table things: 80 rows, 2 columns (colour, size), 2 classes.")  # one has no target
    assert environment.step(GOOD)[1] > 0.9
    environment.sandbox.close()
    with pytest.raises(ValueError, match=r"task.options.target = 'sort': .* has the columns size, colour, kind"):
        make_environment(TaskConfig(name="data_science", path=str(file), options={"target": "sort"}))


def test_demonstrations_are_real_attempts(iris):
    dialogues = iris.demonstrations(12, seed=0)
    assert dialogues == iris.demonstrations(12, seed=0)
    told = [observation for dialogue in dialogues for _, observation in dialogue.turns]
    assert any("ROC AUC" in one for one in told)
    assert any("NameError" in one for one in told)
    assert all("ROC AUC" not in observation for dialogue in dialogues for _, observation in dialogue.turns[:-1])


def test_code_is_found_in_and_without_fences():
    assert code_in("a\n```py\nx = 1\n```\nb") == "x = 1\n"
    assert code_in("```\nx = 1") == "x = 1"
    assert code_in("x = 1") == "x = 1"
