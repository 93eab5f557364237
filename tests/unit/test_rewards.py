"""Rewards that settings name: functions of one response, functions of TRL's signature, and those by name."""

import asyncio
import functools
import json
import math
import os
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from cola_ray import registry
from cola_ray.checks.refusals import check
from cola_ray.loop.problems import _by_source, _parts
from cola_ray.rollout.reward_process import _BATCH, Reward, RewardProcess, _batches
from cola_ray.rollout.worker import EngineWorker, RolloutWorker
from cola_ray.settings.config import ConfigError, TaskConfig, override
from cola_ray.settings.presets import preset
from cola_ray.tasks import least_right_reward, make_task, rewards
from cola_ray.tasks.protocol import Problem
from cola_ray.tasks.rewarded import Rewarded, arguments, weights_of

ROWS = [
    Problem(0, "What is 2+2?", "4", {"answer": "4", "kind": "math"}),
    Problem(1, "Write a haiku.", "", {"answer": None, "kind": "art"}),
    Problem(2, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "Hello"),
    Problem(3, [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "1 "}], "1 2"),
]


class Rows:
    """Problems without a verifier."""

    def problems(self, split):
        return ROWS

    def demonstrations(self):
        return []


# In the forms of TRL's documentation of custom reward functions.


def long(completions, **columns):
    return [float(len(completion)) for completion in completions]


def tagged(completions, **columns):
    return [1.0 if completion[0]["content"].startswith("<think>") else 0.0 for completion in completions]


def truth(prompts, completions, answer):
    return [float(said == right) for said, right in zip(completions, answer, strict=True)]


def of_math(prompts, completions, kind, **columns):
    return [1.0 if one == "math" else None for one in kind]


WAITING = [0, 0]  # now, and at most


async def asked():
    WAITING[0] += 1
    WAITING[1] = max(WAITING)
    await asyncio.sleep(0.05)
    WAITING[0] -= 1


async def slow(prompts, completions, **columns):
    await asked()
    return [0.5 for _ in completions]


async def slow_alone(problem, response):
    await asked()
    return len(response)


def moody(completions, **columns):
    """Does what one of the completions says, to all of them."""
    for said in completions:
        if said == "raise":
            raise ValueError("what is this")
        if said == "hang":
            time.sleep(60)
        if said == "exit":
            os._exit(3)
    return [float(said) for said in completions]


def seen(*problems):
    return [("train", index, "x") for index in problems]


def test_the_form_is_told_by_the_names_in_a_signature():
    batched = (long, tagged, truth, slow, lambda **columns: [], lambda prompts, **columns: [])
    single = (slow_alone, rewards.exact, lambda problem, response: 0, lambda a, b: 0, lambda prompts, said: 0, len)
    assert all(map(registry.takes_batches, batched))
    assert not any(map(registry.takes_batches, single))


def test_a_function_gets_the_columns_that_it_names():
    given = arguments(truth, ROWS[:2], ["4", "x"])
    assert given == {"prompts": ["What is 2+2?", "Write a haiku."], "completions": ["4", "x"], "answer": ["4", None]}
    whole = arguments(long, ROWS[:2], ["4", "x"])
    assert whole == given | {"solution": ["4", ""], "kind": ["math", "art"]}
    with pytest.raises(ValueError, match="wants label, which there is not: the rows have answer, kind, and solution"):
        arguments(lambda completions, label: 0, ROWS[:2], ["", ""])
    with pytest.raises(ValueError, match="wants completion_ids, which there is not: rewards get texts, not tokens"):
        arguments(lambda completions, completion_ids: 0, ROWS[:2], ["", ""])


def test_prompts_of_messages_have_completions_of_messages():
    given = arguments(tagged, ROWS[2:], ["<think>", "2"])
    assert given["prompts"][0] == ROWS[2].question
    assert given["completions"][0] == [{"role": "assistant", "content": "<think>"}]
    assert given["prompts"][1] == [{"role": "user", "content": "Count"}]
    assert given["completions"][1] == [{"role": "assistant", "content": "1 2"}], "what was begun is part of it"


def test_several_are_summed_with_weights_and_none_does_not_apply():
    task = Rewarded(Rows(), {"truth": truth, "of_math": of_math}, {"truth": 2.0, "of_math": 0.5})
    assert task.score_all([("train", 0, "4"), ("train", 1, "4")]) == {"truth": [1.0, 0.0], "of_math": [1.0, None]}
    assert task.score("train", 0, "4") == 2.5
    assert task.score("train", 1, "4") == 0.0
    with pytest.raises(ValueError, match="none of of_math applies"):
        Rewarded(Rows(), {"of_math": of_math}).score("train", 1, "4")


def test_asynchronous_functions_wait_at_the_same_time_in_one_loop():
    task, WAITING[1] = Rewarded(Rows(), {"slow": slow, "slow_alone": slow_alone}), 0
    assert task.score_all(seen(0, 1, 0, 1)) == {"slow": [0.5] * 4, "slow_alone": [1.0] * 4}
    assert WAITING[1] == 1 + 4, "a call for the batch, and one for each response"
    runner = task._runner
    task.score("train", 0, "x")
    assert task._runner is runner


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_arrays_and_tensors_are_lists(kind):
    found = Rewarded(Rows(), {"f": lambda completions: kind([0.5, 1.0])}).score_all(seen(0, 0))
    assert found == {"f": [0.5, 1.0]}
    assert all(type(value) is float for value in found["f"])


# --- in the process ---------------------------------------------------------------------------------------------------


def process(functions, batched=True, weights=None, timeout_s=1.0, **more):
    weights = weights or {name: 1.0 for name in functions}
    made = functools.partial(Rewarded, Rows(), functions, weights)
    return RewardProcess(made, timeout_s, weights, batched=batched, **more)


def test_a_batch_is_one_call_and_a_failure_costs_its_own_sample():
    calls = process({"moody": moody})
    try:
        whole = calls.score([("train", 0, str(number)) for number in range(5)])
        assert whole == [Reward(float(number), "", {"moody": float(number)}) for number in range(5)]
        mixed = calls.score([("train", 0, said) for said in ("1", "raise", "nan", "exit", "2")])
    finally:
        calls.close()
    assert [one.value for one in mixed] == [1.0, 0.0, 0.0, 0.0, 2.0]
    assert [one.failure for one in mixed] == [
        "", "raised ValueError: what is this", "moody returned nan", "ended its process with exit code 3", "",
    ]  # fmt: skip


def test_what_hangs_costs_its_own_sample_and_three_in_a_row_all_that_follow(monkeypatch):
    calls, restarts = process({"moody": moody}), []
    restart = calls._restart
    monkeypatch.setattr(calls, "_restart", lambda: restarts.append(restart()))
    try:
        once = calls.score([("train", 0, said) for said in ("1", "hang", "2")])
        assert [one.failure for one in once] == ["", "took longer than 1 s", ""]
        restarts.clear()
        always = calls.score([("train", 0, "hang")] * 40)
    finally:
        calls.close()
    assert [one.failure for one in always] == ["took longer than 1 s"] * 40
    assert len(restarts) == 1 + 3, "of the batch, and of three by themselves"


WRONG = {
    "three": (lambda completions: [1.0, 2.0, 3.0], "f returned 3 rewards for 2 completions"),
    "none": (lambda completions: [], "f returned 0 rewards for 2 completions"),
    "a number": (lambda completions: 0.5, "f returned 0.5 for 2 completions"),
    "nothing": (lambda completions: None, "f returned None for 2 completions"),
    "text": (lambda completions: "ab", "f returned 'ab' for 2 completions"),
    "by name": (lambda completions: {"a": 1, "b": 2}, "f returned {'a': 1, 'b': 2} for 2 completions"),
    "NaN": (lambda completions: [math.nan, math.nan], "f returned nan"),
    "None": (lambda completions: [None, None], "no reward applies: f returned None"),
    "words": (lambda completions: ["good", "good"], "f returned 'good'"),
    "too much": (lambda completions: [1e9, -1e9], "1e+09, more than 1e+06 either way"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_reward_is_a_failure_of_its_samples(name, monkeypatch):
    function, why = WRONG[name]
    calls = object.__new__(RewardProcess)
    calls.weights, calls.beside = {"f": 1.0}, False
    values = json.loads(json.dumps(Rewarded(Rows(), {"f": function}).score_all(seen(0, 0))))
    found = calls._rewards(values, 2)
    assert len(found) == 2
    assert all(why.removeprefix("-") in one.failure.replace("-1e+09", "1e+09") for one in found), found
    assert all(one.value == 0.0 and not one.parts for one in found)


def test_a_sum_beyond_the_limit_is_a_failure():
    calls = object.__new__(RewardProcess)
    calls.weights, calls.beside = {"f": 10.0}, False
    assert "more than 1e+06" in calls._reward({"f": 9e5}).failure
    assert calls._reward({"f": 9e4}) == Reward(9e5, "", {"f": 9e4})


def test_calls_hold_whole_groups_within_the_limits_of_a_message():
    items = [("train", index, "x") for index in range(20) for _ in range(10)]
    sizes = [len(batch) for batch in _batches(items)]
    assert sizes == [60, 60, 60, 20]
    assert [item for batch in _batches(items) for item in batch] == items
    assert [len(batch) for batch in _batches(items[:10] * 8)] == [80], "one problem's stay together"
    heavy = [("train", index, "x" * 200_000) for index in range(7)]
    assert [len(batch) for batch in _batches(heavy)] == [2, 2, 2, 1]
    assert [len(batch) for batch in _batches([("train", 0, "x" * 900_000)] * 2)] == [1, 1]
    assert _BATCH == 64


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solution", "response", "worth"),
    [
        ("72", "so 48 + 24 = 72", 1.0),
        ("72", "#### 72.0", 1.0),
        ("72", r"\boxed{71}", 0.0),
        ("He has 5.\n#### 1,234", "in all 1234", 1.0),
        (r"\frac{1}{2}", r"it is \boxed{0.5}", 1.0),
        (r"so \boxed{x^2 + 2x + 1}", r"\boxed{(x + 1)^2}", 1.0),
        (r"\boxed{x}", "no idea", 0.0),
    ],
)
def test_math_compares_what_both_commit_to(solution, response, worth):
    assert rewards.math(Problem(0, "q", solution), response) == worth


def test_majorities_vote_by_what_a_reward_reads():
    said = ["so 48 + 24 = 72", "#### 72.0", r"\boxed{x^2 + 2x + 1}", r"\boxed{(x + 1)^2}", "no idea"]
    task = Rewarded(Rows(), {"length": rewards.Length(9), "math": rewards.math})
    found = list(map(task.answer_of, said))
    assert found[:2] == ["72", "72"]
    assert found[2] == found[3] != ""
    assert found[4] == ""
    assert Rewarded(Rows(), {"exact": rewards.exact}).answer_of(" a\n b ") == "a b"
    assert Rewarded(Rows(), {"length": rewards.Length(9)}).answer_of(" a  b ") == "a  b", "the task's own"


def test_exact_and_format_and_regex_and_length():
    assert [rewards.exact(ROWS[2], said) for said in ("Hello", " Hello\n", "hello")] == [1.0, 1.0, 0.0]
    assert rewards.exact(ROWS[1], "x") is rewards.math(ROWS[1], "4") is None, "there is no solution"
    said = ("<think>a</think> <answer>b</answer>", "a</think><answer>b</answer>", "<answer>b</answer>",
            "<think>a</think><answer>b</answer> so", "<think><think></think><answer></answer>")  # fmt: skip
    assert [rewards.think_and_answer(ROWS[0], one) for one in said] == [1.0, 1.0, 0.0, 0.0, 0.0]
    config = TaskConfig(name="dataset", pattern=r"^ANSWER: \d+$", length=100)
    assert [rewards.Regex.of(config, None)(ROWS[0], one) for one in ("so\nANSWER: 4", "ANSWER: x")] == [1.0, 0.0]
    assert [rewards.Length.of(config, None)(ROWS[0], "x" * n) for n in (0, 100, 150, 200, 999)] == [1, 1, 0.5, 0, 0]
    with pytest.raises(ValueError, match="not a regular expression"):
        rewards.Regex("(")


def test_code_is_run_against_the_tests_of_its_row():
    code = rewards.Code(5.0)
    row = Problem(0, "Add.", "", {"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]})
    right = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    said = {
        right: 1.0, right.replace("+", "-"): 0.0, "def add(a, b): return a + b": 1.0, "def add(": 0.0,
        "import os\nos._exit(0)": 0.0, "import sys\nsys.exit()": 0.0, "open('/etc/passwd').read()": 0.0,
    }  # fmt: skip
    assert {response: code(row, response) for response in said} == said
    assert rewards.Code(1.0)(row, "while True: pass") == 0.0, "what never ends is wrong"
    assert code(ROWS[0], right) is None, "there are no tests"


def test_the_verifier_is_one_of_several():
    config = TaskConfig(name="arithmetic", num_problems=64, reward=("verifier", "length"), reward_weights=(1.0, 0.1),
                        length=4)  # fmt: skip
    task = make_task(config, 0)
    first = task.problems("train")[0]
    assert not task.executes_responses
    assert not task.batched
    assert task.score("train", 0, first.solution) == 1.1
    assert task.score_all([("train", 0, "x" * 6)]) == {"verifier": [0.0], "length": [0.5]}
    with pytest.raises(ValueError, match="preference has no verifier"):
        rewards.Verifier.of(TaskConfig(name="preference"), Rows())
    confined = config.model_copy(update={"name": "chain_sum", "reward_weights": ()})
    assert make_task(confined, 0).executes_responses, "as its verifier does"
    with pytest.raises(ValueError, match="code needs programs or an event loop"):
        make_task(confined.model_copy(update={"reward": ("verifier", "code")}), 0)


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"reward": ("exact",)}, 1.0),
        ({"reward": ("exact",), "reward_weights": (0.5,)}, 0.5),
        ({"reward": ("length",)}, None),
        ({"reward": ("verifier",)}, 1.0),
        ({"reward": ("exact", "length")}, None),
        ({"reward": ("exact", "length"), "right_from": 1.0}, 1.0),
        ({"right_from": 0.5}, 0.5),
        ({}, 1.0),
    ],
)
def test_what_is_right_is_stated(changes, least):
    assert least_right_reward(TaskConfig(name="arithmetic", **changes)) == least


# --- in a worker, and in metrics --------------------------------------------------------------------------------------


@pytest.fixture
def worker(monkeypatch):
    """Makes workers with these rewards, and a reward model that likes long responses; without engines."""

    async def model(prompts, responses):
        return [float(len(response)) for response in responses]

    def serve(self, config, *_):
        self.config, self.chat = config, types.SimpleNamespace(prompt_ids=lambda question: [1])

    monkeypatch.setattr(EngineWorker, "__init__", serve)
    made = []

    def make(**changes):
        task = {"num_problems": 64, **changes}
        config = override(preset("tiny"), {f"task.{name}": value for name, value in task.items()})
        made.append(RolloutWorker(config, "", model if config.task.reward_model else None))
        return made[-1]

    yield make
    for one in made:
        if hasattr(one, "rewards"):
            one.rewards.close()


def test_a_reward_model_is_one_of_several(worker):
    both = worker(reward=("exact", "reward_model"), reward_weights=(1.0, 0.1), reward_model="http://x/")
    right = both.task.problems("train")[0].solution
    found = asyncio.run(both._score("train", [0, 0], [right, right + "00"]))
    length = float(len(right))
    assert [one.value for one in found] == [1.0 + 0.1 * length, 0.1 * (length + 2)]
    assert found[0].parts == {"exact": 1.0, "reward_model": length}
    alone = worker(reward=("reward_model",), reward_weights=(2.0,), reward_model="http://x/")
    assert asyncio.run(alone._score("train", [0], ["abc"])) == [Reward(6.0, "", {"reward_model": 3.0})]


def test_metrics_of_each_source():
    said = [types.SimpleNamespace(source=source, reward=reward) for source, reward in (("a", 1), ("b", 0), ("a", 0))]
    assert _by_source(said) == {
        "reward/mean/a": 0.5, "rollout/share/a": 2 / 3, "reward/mean/b": 0.0, "rollout/share/b": 1 / 3,
    }  # fmt: skip
    assert _by_source([types.SimpleNamespace(source="", reward=1.0)]) == {}


def test_metrics_are_means_over_what_a_reward_applies_to():
    said = [types.SimpleNamespace(parts=parts) for parts in ({"a": 1.0, "b": 0.0}, {"a": 0.0}, {})]
    assert _parts(said) == {"reward/a": 0.5, "reward/b": 0.0}


# --- before a run -----------------------------------------------------------------------------------------------------

FILE = """
def good(completions, **columns):
    return [0.5] * len(completions)

def short(completions, **columns):
    return [0.5]

def column(completions, level):
    return [float(one) for one in level]

def broken(completions, **columns):
    return [columns["difficulty"] for _ in completions]

def words(completions, **columns):
    return ["good"] * len(completions)

def mean(completions, **columns):
    return [0.5] * len(completions)

def late(completions, trainer_state):
    return [0.5] * len(completions)

async def waits(prompts, completions, solution, **columns):
    return [float(said == right) for said, right in zip(completions, solution)]

def one(problem):
    return 0.5

def chats(completions, **columns):
    return [float(len(said[0]["content"])) for said in completions]
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_own_rewards.py:"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"reward": ("short",)}, "short returned 1 rewards for 4 completions; a list of one number"),
        ({"reward": ("column",)}, "column wants level, which there is not: the rows have no columns, and solution"),
        ({"reward": ("late",)}, "late wants trainer_state, which there is not: rewards do not depend"),
        ({"reward": ("broken",)}, "broken raised KeyError: 'difficulty' (my_own_rewards.py:12)"),
        ({"reward": ("chats",)}, "; completions are texts here, as prompts are"),
        ({"reward": ("words",)}, "words returned 'good', not a number"),
        ({"reward": ("mean",)}, "reward/mean is a metric already; rename the function"),
        ({"reward": ("one",)}, "one is called with (problem, response), and too many positional"),
        ({"reward": ("good", "other.py:good")}, "several rewards are called good"),
        ({"reward": ("good",), "reward_weights": (1.0, 2.0)}, "reward_weights = (1.0, 2.0): not one for each"),
        ({"reward": ("good",), "reward_weights": (0.0,)}, "reward_weights = (0.0,): no reward counts"),
        ({"reward": ("good",), "thinking": True}, "thinking = True: hands the answer alone to one reward"),
        ({"reward": ("regex",)}, "pattern = '': the reward regex searches for it"),
        ({"reward": ("regex",), "pattern": "("}, "regex raised ValueError: not a regular expression"),
        ({"reward": ("code",)}, "code applies to none of the first rows: they have no column tests"),
        ({"reward": ("reward_model",)}, "reward_model = '': the reward reward_model asks it"),
        ({"reward": ("good",), "reward_model": "http://x/"}, "task.reward_model scores responses, too; leave one"),
        ({"reward": ("exat",)}, "reward = 'exat': unknown reward; did you mean exact?"),
        ({"pattern": "x"}, "pattern = 'x': has no effect here; of task.reward, regex does"),
        ({"reward_weights": (1.0,)}, "reward_weights = (1.0,): not one for each reward; give 0"),
    ],
)
def test_mistakes_are_one_line(changes, line, outside):
    Path("other.py").write_text(FILE)
    given = changes.get("reward", ())
    own = [outside + name if f"def {name}(" in FILE else name for name in given]
    changes = changes | ({"reward": tuple(own)} if own else {})
    with pytest.raises(ConfigError) as caught:
        check(override(preset("tiny"), {f"task.{name}": value for name, value in changes.items()}), "rl_math")
    assert any(said.startswith("task.") and line in said for said in str(caught.value).splitlines()), caught.value


@pytest.mark.parametrize("names", [("good",), ("waits",), ("good", "waits")])
def test_what_can_score_the_first_problems_is_taken(names, outside):
    config = override(preset("tiny"), {"task.reward": tuple(outside + name for name in names)})
    check(config, "rl_math")
    assert weights_of(config.task) == dict.fromkeys(names, 1.0)
