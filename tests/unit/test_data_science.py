"""ETPO's task: rewards against scikit-learn used by hand, errors as observations, labels out of reach."""

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.naive_bayes import GaussianNB

from cola_ray.config import TaskConfig
from cola_ray.tasks import make_environment
from cola_ray.tasks.data_science import DataScience, code_in
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
    order = np.random.default_rng(0).permutation(150)
    x, y = (part[order] for part in load_iris(return_X_y=True))
    scores = []
    for seen, unseen in StratifiedShuffleSplit(5, test_size=0.5, random_state=seed).split(x, y):
        probabilities = GaussianNB().fit(x[seen], y[seen]).predict_proba(x[unseen])
        scores.append(roc_auc_score(y[unseen], probabilities, multi_class="ovr"))
    assert reward == pytest.approx(np.mean(scores), abs=1e-9)
    assert observation == f"\nROC AUC {np.mean(scores):.3f}\n"
    assert (terminated, truncated) == (True, False)


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
    "made_up", ["np.ones((75, 3)) * np.nan", "np.ones((75, 2))", "-np.ones((75, 3))", "np.ones(3)"]
)
def test_made_up_probabilities_win_nothing(iris, made_up):
    """A classifier of the agent's own, which returns what it likes: the labels are not there to be copied."""
    iris.reset(seed=0)
    code = (
        "import numpy as np\nfrom sklearn.base import BaseEstimator\nclass Mine(BaseEstimator):\n"
        f"    def fit(self, x, y): return self\n    def predict_proba(self, x): return {made_up}\nmodel = Mine()"
    )
    observation, reward, *_ = iris.step(code)
    assert reward == -1.0
    assert "no usable probabilities" in observation


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
    assert opening.startswith("Table things: 80 rows, 2 columns (size, colour), 2 classes.")  # one has no target
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
