r"""Rewards by name, for ``task.reward``.

    verifier      the task's own score
    exact         1 if response and solution are the same text, apart from white space
    math          1 if the response commits to the solution's number or expression
    format        1 for <think>thoughts</think><answer>answer</answer>
    regex         1 if ``task.pattern`` is found in the response
    length        1 up to ``task.length`` characters, falling to 0 at twice as many
    code          1 if the response's Python passes the row's ``tests``, in the sandbox
    reward_model  the score of the classifier or endpoint at ``task.reward_model``

The solution is the column that tasks/layouts.py finds, or the task's own. If a reward has an attribute ``right_from``,
responses with at least this reward are right, and evaluations have an accuracy.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from cola_ray.sandbox.programs import Limits, Sandbox
from cola_ray.settings.config import TaskConfig
from cola_ray.tasks.expressions import canonical, final_expression, same_expression
from cola_ray.tasks.final_answer import final_number, last_box
from cola_ray.tasks.numerals import number_in
from cola_ray.tasks.protocol import Problem, Task, further
from cola_ray.tasks.rewarded import Item, OfItems


class Verifier(OfItems):
    """The task's own score.

    Raises:
        ValueError: the task has none.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.executes_responses = bool(getattr(task, "executes_responses", False))

    @classmethod
    def of(cls, config: TaskConfig, task: Task) -> "Verifier":
        if not hasattr(task, "score"):
            raise ValueError(f"{config.name} has no verifier")
        return cls(task)

    def score_items(self, items: Sequence[Item]) -> list[float]:
        return [self.task.score(*item) for item in items]


def _reads(answer_of: Callable[[str], str]) -> Callable[[Callable[[Problem, str], float | None]], Any]:
    """Declare that a reward of 1 means right, and how to read from a response the answer that majority votes count."""

    def put(reward: Any) -> Any:
        reward.right_from, reward.answer_of = 1.0, answer_of
        return reward

    return put


def _stated(response: str) -> str:
    number = final_number(response)
    found = final_expression(response) if number is None else None
    return str(number) if number is not None else "" if found is None else canonical(found)


class ByModel:
    """The score of ``task.reward_model``, which workers request from its actor or endpoint (rollout/worker.py)."""


@_reads(lambda response: " ".join(response.split()))
def exact(problem: Problem, response: str) -> float | None:
    """Compare texts, treating any white space as one space; None if the row has no solution."""
    solution = problem.solution.split()
    return float(response.split() == solution) if solution else None


@_reads(_stated)
def math(problem: Problem, response: str) -> float | None:
    r"""Compare both final answers, numbers exactly and expressions by math-verify; None if the row has no solution.

    A solution is a result by itself ("72", "\\frac{1}{2}"), or a text with one after #### or in \boxed{}.
    """
    solution = problem.solution
    if not solution.strip():
        return None
    gold = last_box(solution) or solution
    number = final_number(solution) if "####" in solution else number_in(gold, latex=True, bare=True)
    if number is not None:
        return float(final_number(response) == number)
    return float(same_expression(gold, final_expression(response)))


def think_and_answer(problem: Problem, response: str) -> float:
    """Whether there are thoughts, then an answer, in tags that appear once each, and nothing else."""
    found = _FORM.fullmatch(response.strip())
    return float(found is not None and not any(tag in found[1] + found[2] for tag in _TAGS))


_FORM = re.compile(r"(?:<think>)?(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)  # a prompt may open the thoughts
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class Regex:
    """Whether a pattern is found in the response.

    Args:
        pattern: a Python regular expression; ``.`` also matches line ends, and ``^`` and ``$`` match at every line.

    Raises:
        ValueError: it cannot be compiled.
    """

    right_from = 1.0

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL | re.MULTILINE)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None

    @classmethod
    def of(cls, config: TaskConfig, task: Task) -> "Regex":
        return cls(config.pattern)

    def __call__(self, problem: Problem, response: str) -> float:
        return float(self.pattern.search(response) is not None)


class Length:
    """1 up to ``length`` characters, falling linearly to 0 at twice as many."""

    def __init__(self, length: int) -> None:
        self.length = length

    @classmethod
    def of(cls, config: TaskConfig, task: Task) -> "Length":
        return cls(config.length)

    def __call__(self, problem: Problem, response: str) -> float:
        return min(max(2.0 - len(response) / self.length, 0.0), 1.0)


class Code:
    """Whether the Python in a response passes the tests of its row, in the sandbox; None if the row has no tests.

    The program is the response's last code block, or the whole response if it has none; the column ``tests``, text or a
    list of texts such as ``assert add(1, 2) == 3``, is executed after it. It passes if it ends without an error. The
    program shares a process with its tests, so a program written to deceive them can do so, but can reach nothing else.

    Args:
        seconds: time limit of a program.
    """

    right_from = 1.0
    starts_programs = True

    def __init__(self, seconds: float) -> None:
        self.sandbox = Sandbox(Limits(wall_s=seconds, cpu_s=seconds))

    @classmethod
    def of(cls, config: TaskConfig, task: Task) -> "Code":
        return cls(config.reward_timeout_s / 2)  # a program that never ends is wrong, not a failure of the reward

    def __call__(self, problem: Problem, response: str) -> float | None:
        tests = further(problem)[0].get("tests") or ""
        whole = "\n".join(map(str, tests)) if isinstance(tests, list | tuple) else str(tests)
        if not whole.strip():
            return None
        blocks = _BLOCK.findall(response)
        token = secrets.token_hex(16)  # so that an exit before the tests does not count as success
        source = f"{blocks[-1] if blocks else response}\n\n{whole}\n\nprint({token!r})\n"
        result = self.sandbox.run(source)
        return float(result.succeeded and result.output.rstrip().endswith(token))


_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
