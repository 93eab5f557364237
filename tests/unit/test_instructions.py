"""Instructions that a rule can check."""

import pytest

from cola_ray.checks.refusals import check
from cola_ray.settings.config import ConfigError, TaskConfig
from cola_ray.settings.presets import preset
from cola_ray.tasks import inspection, least_right_reward, make_task
from cola_ray.tasks.instructions import KINDS, at_most, ends_with, first_letter, nouns, words


def _task(**options):
    return make_task(TaskConfig(name="instructions", options=options), 0)


@pytest.mark.parametrize(("rule", "followed", "not_followed"), [
    (ends_with("headline", "river"), ["Ship Runs Aground in River", "go to the river.", '"By the\nRiver!"'],
     ["River", "a river", "River floods town", "Down by the rivers", "by the river-bank", "", "river, river, river",
      "ends with the word river", "Write one short headline that ends with the word river.", "so " * 19 + "the river"]),
    (first_letter("animal", "b"), ["bear", " Bear.\n", "**Bear**", "bull's", "2 bears", "b\u00e9b\u00e9"],
     ["a bear", "Bear, bull", "cat", "", "b c", "5", "b", "begins", "brand-new"]),
    (at_most("headline", "river", 4), ["River floods old town", "the River rises.", "By 3 the river rose"],
     ["River floods the old town", "river rises", "Rivers flood the town", "The lake rises", "", "river river river",
      "with the word river", "the-river-in-the-town"]),
])  # fmt: skip
def test_a_rule_tells_which_responses_follow_it(rule, followed, not_followed):
    assert [text for text in followed if not rule[1](text)] == []
    assert [text for text in not_followed if rule[1](text)] == []


def test_words_are_letters_with_apostrophes_inside():
    assert words("It's 5 o\u2019clock -- Ünder-way, 'now'!") == ["it's", "o\u2019clock", "under", "way", "now"]


def test_instructions_are_distinct_split_by_kind_and_the_same_for_all_seeds():
    task = _task()
    train, heldout = task.problems("train"), task.problems("heldout")
    questions = [problem.question for problem in (*train, *heldout)]
    assert len({*questions}) == len(questions) == 2 * 10 * len(nouns()) + 34 * 18
    for kind in KINDS:
        shares = [sum(one.source == kind for one in split) / len(split) for split in (train, heldout)]
        assert min(shares) > 0.15
        assert abs(shares[0] - shares[1]) < 0.06
    other = make_task(TaskConfig(name="instructions"), 1)
    assert {one.question for one in other.problems("heldout")} == {one.question for one in heldout}
    assert [one.question for one in other.problems("heldout")] != [one.question for one in heldout]


def test_each_problem_has_its_own_rule():
    task = _task(kinds="ends_with")
    for split in ("train", "heldout"):
        for problem in task.problems(split):
            last = problem.question.removesuffix(".").split()[-1]
            assert problem.source == "ends_with"
            assert task.score(split, problem.index, f"Here is my {last}.") == 1.0
            assert task.score(split, problem.index, f"Here is my {last} again.") == 0.0
    assert len(make_task(TaskConfig(name="instructions", num_problems=50), 0).problems("train")) < 50
    assert least_right_reward(TaskConfig(name="instructions")) == 1.0


@pytest.mark.parametrize(("options", "said"), [
    ({"kinds": "rhymes"},
     "task.options.kinds = 'rhymes': one or more of ends_with, first_letter, at_most, separated by spaces"),
    ({"kinds": 3}, "task.options.kinds = '3': one or more of ends_with, first_letter, at_most, separated by spaces"),
    ({"length": 3}, "task.options.length = 3: instructions takes kinds"),
])  # fmt: skip
def test_options_that_are_wrong(options, said):
    assert inspection.faults(TaskConfig(name="instructions", options=options)) == [said]


def test_there_is_nothing_to_clone_a_first_policy_from():
    said = "has no demonstrations to clone a first policy from; give the base's own answers .answers.jsonl of .cola_ray"
    with pytest.raises(ConfigError, match=f"{said}.* as --data.path, or the model to start from as --model.path"):
        check(preset("smollm2-135m"), "pretrain")
