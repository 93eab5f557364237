"""Tasks with answers: forms of a response, and what they are worth."""

import pytest

from cola_ray.config import TaskConfig
from cola_ray.tasks import make_task
from cola_ray.tasks.verifiable import final_number, numbers_equal


@pytest.fixture(scope="module")
def countdown():
    return make_task(TaskConfig(name="countdown", num_problems=20, thinking=True), 0)


def test_thinking_asks_for_tags_and_is_worth_what_the_answer_is(countdown):
    problem = countdown.problems("train")[0]
    assert problem.question.startswith("Calculate")
    assert "<think> </think>" in problem.question
    right = f"<think>6 * 44 is 264, and\nso on</think>\n<answer> {problem.solution} </answer>"
    assert countdown.score("train", 0, right) == 1.0
    assert countdown.score("train", 0, right.removeprefix("<think>")) == 1.0, "the prompt may have opened it"


@pytest.mark.parametrize(
    "response",
    [
        "<think>a</think><answer>1 + 1</answer>",
        "<think></think> <answer></answer>",
        "<think>x</think><answer>no</answer>\n",
    ],
)
def test_the_form_alone_is_worth_a_tenth(countdown, response):
    assert countdown.score("train", 0, response) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "response",
    [
        "{solution}",
        "<answer>{solution}</answer>",
        "<think>a<answer>{solution}</answer>",
        "<think>a</think><answer>{solution}</answer> and more",
        "<think>a</think><think>b</think><answer>{solution}</answer>",
        "<think>a</think><answer>1</answer><answer>{solution}</answer>",
    ],
)
def test_without_the_form_there_is_nothing(countdown, response):
    solution = countdown.problems("train")[0].solution
    assert countdown.score("train", 0, response.format(solution=solution)) == 0.0


def test_a_demonstration_has_the_form(countdown):
    question, response = countdown.demonstrations()[0]
    assert question == countdown.problems("train")[0].question
    assert countdown.score("train", 0, response) == 1.0


def test_the_number_that_a_response_commits_to():
    assert final_number("3 and 4, so #### 1,234 dollars") == "1234"
    assert final_number("either 2 or \\boxed{7}") == "7"
    assert final_number("first 2, then 5.") == "5"
    assert final_number("none") is None
    assert numbers_equal("0.5", "1/2")
    assert not numbers_equal("0.5", "2")
