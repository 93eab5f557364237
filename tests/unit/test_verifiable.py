"""Tasks with answers: forms of a response, and what they are worth."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest

from cola_ray.settings.config import TaskConfig
from cola_ray.tasks import make_task
from cola_ray.tasks.expressions import same_expression
from cola_ray.tasks.final_answer import final_number
from cola_ray.tasks.verifiable import contradicts


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


# --- reasoning-gym --------------------------------------------------------------------------------------------------

NONSENSE = ["nan", "inf", "(", "1/0", "[1,2", "{}", "import os", "9" * 50, "=", "abc", "[[1]]", '{"a": 1}', "None", ""]


@pytest.mark.parametrize(
    "name",
    ["coin_flip", "complex_arithmetic", "game_of_life", "game_of_life_halting", "prime_factorization", "graph_color",
     "rubiks_cube", "propositional_logic", "boxnet", "chain_sum", "countdown", "leg_counting"],
)  # fmt: skip
def test_generators_take_their_solutions_and_no_nonsense(name):
    task = make_task(TaskConfig(name=name, num_problems=4), 0)
    problems = task.problems("train")
    assert len(task.demonstrations()) == (0 if name == "boxnet" else len(problems)), "boxnet shows no solution"
    for index, problem in enumerate(problems):
        if problem.solution:
            assert task.score("train", index, problem.solution) == 1.0
        for nonsense in NONSENSE:
            assert task.score("train", index, nonsense) < 1.0


@pytest.mark.parametrize(
    ("solution", "response", "expected"),
    [
        ("False", "True", True), ("False", "abc", True), ("False", "false", False), ("0.375", "0", True),
        ("5", "nan", True), ("3 + 2i", "nan", True), ("banana", "banana", False),
        ("0.375", "3/8", False), ("0.375", "0.3751", False), ("5", "so 5 it is", False), ("0", "0.0", False),
        ("0", "0.01", True), ("1 + 2", "2 + 1", False), ("yes", "no", False),
    ],
)  # fmt: skip
def test_what_cannot_be_right(solution, response, expected):
    assert contradicts(solution, response) is expected


# --- GSM8K ----------------------------------------------------------------------------------------------------------

GSM8K_SOLUTION = """Natalia sold 48/2 = <<48/2=24>>24 clips in May.
Natalia sold 48+1024 = <<48+1024=1072>>1072 clips altogether.
#### 1,072"""


@pytest.fixture(scope="module")
def gsm8k_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = [{"question": f"How many clips? ({i})", "answer": GSM8K_SOLUTION} for i in range(2)]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_gsm8k_compares_values(gsm8k_folder):
    task = make_task(TaskConfig(name="gsm8k", path=str(gsm8k_folder)), 0)
    for right in ("#### 1072", "\\boxed{1{,}072}", "The answer is $1,072.00.", "so 2144/2", "#### 1 072 clips"):
        assert task.score("heldout", 0, right) == 1.0
        assert task.answer_of(right) == "1072"
    for wrong in (
        "#### 1",
        "#### 1,072,000",
        "\\boxed{\\frac{1072}{3}}",
        "#### 1072 or 1073",
        "1072 #### ",
        "#### 107.2e2",
        "",
    ):
        assert task.score("heldout", 0, wrong) == 0.0
    assert task.answer_of("#### 1072 or 1073") == "", "unreadable"


def test_a_fraction_is_not_its_denominator(tmp_path):
    for name, gold in (("train", "2"), ("test", "3.5")):
        row = {"question": "q", "answer": f"so\n#### {gold}"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    task = make_task(TaskConfig(name="gsm8k", path=str(tmp_path)), 0)
    assert task.score("train", 0, r"\boxed{\frac{7}{2}}") == 0.0
    assert task.score("heldout", 0, r"\boxed{\frac{7}{2}}") == 1.0


def test_a_solution_without_a_number_is_named(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "q", "answer": "so\n#### many"}))
    with pytest.raises(
        ValueError, match=r"task.path = .*train.jsonl': row 1, field answer: no number in .*; one after ####"
    ):
        make_task(TaskConfig(name="gsm8k", path=str(tmp_path)), 0)


def test_every_gold_answer_of_gsm8k_is_read():
    """Where COLA_RAY_GSM8K names a folder with it; each against the form that the data set's authors describe."""
    folder = Path(os.environ.get("COLA_RAY_GSM8K", "nowhere"))
    if not (folder / "test.jsonl").exists():
        pytest.skip("COLA_RAY_GSM8K names no folder with GSM8K")
    count = 0
    for name in ("train", "test"):
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            solution = json.loads(line)["answer"]
            gold = Fraction(solution.split("#### ")[1].replace(",", ""))
            assert final_number(solution) == gold
            assert final_number(solution + "\n\nQuestion: And 5 more?\n#### 5") == gold
            count += 1
    assert count == 8792


# --- expressions ----------------------------------------------------------------------------------------------------

SAME = [
    (r"\frac{1}{2}", "0.5"), (r"\frac12", r"\dfrac{1}{2}"), ("x^2+2x+1", "(x+1)^2"), (r"\sqrt{16}", "4"),
    ("2^{10}", "1024"), (r"\{1,2\}", r"\{2, 1\}"), ("3, 4", "4,3"), ("(3,4)", r"\left(3, 4\right)"),
    ("10000", "10{,}000"), (r"11,\!111", "11111"), (r"90^\circ", "90"), (r"10\%", "10"), (r"\$5", "5"),
    (r"\text{Evelyn}", r"\text{Evelyn}"), ("p - q", "p-q"), ("5", "x=5"), (r"6\text{ inches}", "6"),
    (r"3\frac{1}{2}", r"\frac{7}{2}"), ("x > 2", "x>2"), (r"9^{9^{9}}", r"9^{9^{9}}"), ("1+i", "i + 1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), ("7" * 80, "7" * 80),
]  # fmt: skip
DIFFERENT = [
    ("0,5", "0.5"), ("12,34,567", "1234567"),
    (r"\frac{7}{2}", "2"), ("3,4", "3.4"), ("3,4", "34"), ("(3,4)", "[3,4]"), ("5", "5x"), (r"\frac13", "0.333"),
    ("7" * 80, "7" * 79 + "8"), ("5", r"9^{9^{9}}"), ("5", r"10^{10^{10}}"), ("5", "9999999!"),
    ("5", "9^{9 \\cdot 10^9}"), ("5", "(" * 5000), ("5", ""), ("", ""), (r"0.5", r"50\%"), ("x+1", "x+2"),
    ("5", "\\binom{999999999}{9999999}"), ("5", "1e999999999"),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("gold", "answer", "same"), [(*one, True) for one in SAME] + [(*one, False) for one in DIFFERENT]
)
def test_expressions_of_the_same_value(gold, answer, same):
    assert same_expression(gold, answer) is same
    assert not same_expression(gold, None)


def test_expressions_in_responses(tmp_path):
    rows = [{"problem": "q", "solution": r"\boxed{\frac{\sqrt{3}}{2}}", "answer": r"\frac{\sqrt{3}}{2}"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = make_task(TaskConfig(name="math500", path=str(tmp_path)), 0)
    right = r"so \boxed{\frac{\sqrt{3}}{2}}"
    assert task.score("heldout", 0, right) == 1.0
    assert task.score("heldout", 0, r"\boxed{1} " + right) == 1.0, "the last box"
    assert task.score("heldout", 0, right + "\n\nProblem: 1 + 1?\n" + r"\boxed{2}") == 1.0, "not an invented one's"
    assert task.score("heldout", 0, right + r" \boxed{}") == 0.0, "an empty box is no answer"
    assert task.score("heldout", 0, r"so $\frac{\sqrt{3}}{2}$") == 1.0
    assert task.score("heldout", 0, "no idea") == 0.0
    assert task.answer_of(right) == task.answer_of(r"\boxed{\dfrac{\sqrt 3}{2}}") != ""
    assert task.answer_of(r"\boxed{(x+1)^2}") == task.answer_of(r"\boxed{x^2 + 2x + 1}")
    assert task.answer_of(r"\boxed{0.5}") == task.answer_of(r"\boxed{\frac12}") == "1/2"
    assert task.answer_of(r"\boxed{}") == task.answer_of("") == ""


# --- thoughts -------------------------------------------------------------------------------------------------------


def test_demonstrations_of_wrapped_tasks_are_right(gsm8k_folder, tmp_path):
    row = {"problem": "q", "solution": r"as $1 < 2$, \boxed{\frac{7}{2}}", "answer": r"\frac{7}{2}"}
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    settings = (
        TaskConfig(name="gsm8k", path=str(gsm8k_folder), thinking=True),
        TaskConfig(name="math500", path=str(tmp_path), thinking=True),
        TaskConfig(name="countdown", num_problems=20, thinking=True),
        TaskConfig(name="simple_equations", num_problems=20, thinking=True),
    )
    for config in settings:
        task = make_task(config, 0)
        for index, (_, response) in enumerate(task.demonstrations()):
            assert task.score("train", index, response) == 1.0
            assert task.answer_of(response) != ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "response", ["<think>" * 100_000, " " * 1_000_000, "<think>" + " </think>" * 100_000, "<answer>" * 100_000]
)
def test_long_thoughts_are_read_in_linear_time(countdown, response):
    assert countdown.score("train", 0, response) == 0.0
