"""Tasks with verifiable answers: GSM8K, MATH-500, all of reasoning-gym, and the tiny preset's arithmetic."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cola_ray.settings.config import TaskConfig
from cola_ray.tasks.chat import Prompt, as_question, as_text, followed_by
from cola_ray.tasks.expressions import canonical, final_expression, same_expression
from cola_ray.tasks.final_answer import final_number
from cola_ray.tasks.formulas import read_instead_of_executing
from cola_ray.tasks.numerals import number_in
from cola_ray.tasks.protocol import Problem, Split, Task, answer_of, further, split_of
from cola_ray.tasks.rows import Row, cell, open_rows, plain_text, read_rows, shown


class ReasoningGym:
    """A procedural generator by its reasoning-gym name, scored by the generator's own verifier.

    Where such a verifier would call ``eval`` on the answer, as countdown's would, it gets a parser of data instead
    (:mod:`~cola_ray.tasks.formulas`), so nothing in an answer is executed. Each answer is scored in a confined process
    of its own all the same, since some answers keep SymPy busy forever, and verifiers may keep state. An answer that
    makes its verifier raise is wrong, and so is one that a lenient verifier accepts although it contradicts the
    solution: see :func:`contradicts`.

    Questions are distinct. A question is held out if its checksum says so, whatever the seed, so no run trains on a
    problem that another run is tested on.

    Args:
        name: of the generator.
        options: of the generator.
        num_problems: to generate, of both splits together.
        seed: of the generator.
        bare: ask only what follows the question's last colon ("... problem: 4 + 3 ="), and give reward 1 or 0 only,
            where the generator would give part marks for a near miss.
    """

    executes_responses = True
    right_from = 1.0

    def __init__(self, name: str, options: Mapping[str, Any], num_problems: int, seed: int, bare: bool = False) -> None:
        import reasoning_gym

        read_instead_of_executing()
        self.bare = bare
        self.dataset = reasoning_gym.create_dataset(name, size=num_problems, seed=seed, **options)
        self._splits: dict[Split, list[Problem]] = {"train": [], "heldout": []}
        self._entries: dict[Split, list[dict]] = {"train": [], "heldout": []}
        seen = set()
        for entry in self.dataset:
            question = entry["question"].rsplit(":", 1)[-1].strip() if bare else entry["question"]
            if question in seen or _UNSOLVED in str(entry["answer"]):
                continue
            seen.add(question)
            split = split_of(question)
            self._splits[split].append(Problem(len(self._splits[split]), question, _solution(entry)))
            self._entries[split].append(entry)

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._splits[split]

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        """Return problems with their solutions; [] if the generator gives no solutions."""
        return [(problem.question, problem.solution) for problem in self._splits["train"] if problem.solution]

    def score(self, split: Split, index: int, response: str) -> float:
        answer, entry = response.strip(), self._entries[split][index]
        try:
            score = float(self.dataset.score_answer(answer, entry))
        except Exception:  # of the generator's own classes, for an answer that it cannot parse
            self.dataset.score_answer(entry["answer"], entry)  # raises if the verifier itself is broken
            return 0.0
        if score >= 1.0 and (contradicts(str(entry["answer"]), answer) or _uses_other_numbers(entry, answer)):
            return 0.0
        return float(score >= 1.0) if self.bare else score


def contradicts(solution: str, response: str) -> bool:
    """Whether a response cannot be right, even if a lenient verifier accepts it.

    These are: if the solution is true or false, any response other than that word; if it is a number, a number more
    than 1 % away, or a text that is not a number and does not contain it; if it is any kind of number, "nan".
    """
    wanted, found = solution.strip().lower(), response.strip().lower()
    if wanted in ("true", "false"):
        return found != wanted
    if "nan" in found and not re.search("[a-hk-z]", wanted):  # including complex numbers
        return True
    number, value = number_in(wanted), number_in(found)
    if number is None:
        return False
    return wanted not in found if value is None else 100 * abs(value - number) > max(abs(number), Fraction(1, 100))


_UNSOLVED = "Integral("  # marks an integral that SymPy could not solve; repeating the question would count as right


def _uses_other_numbers(entry: Mapping[str, Any], response: str) -> bool:
    """Whether a solution of the Game of 24 uses other numbers than those given, which its verifier does not check."""
    if entry["metadata"].get("source_dataset") != "puzzle24":
        return False
    return sorted(map(int, re.findall(r"[0-9]+", response))) != sorted(entry["metadata"]["numbers"])


def _solution(entry: Mapping[str, Any]) -> str:
    """Return a right response; "" if there are many and the generator shows none."""
    examples = ("possible_answer", "example_answer", "example_correct_answer")
    shown = (entry["metadata"].get(name) for name in examples)
    found = next((one for one in (entry["answer"], *shown) if one is not None), "")
    return found if isinstance(found, str) else json.dumps(found)


class Arithmetic(ReasoningGym):
    """Sums and differences of two or three one-digit numbers (reasoning-gym's chain_sum), with wrong demonstrations.

    Like a web corpus, this task's corpus has errors: for problems with three numbers, :data:`SLIP_SHARE` of the
    demonstrations add instead of doing the last subtraction ("9 - 4 + 1 = 14"). A base trained on it answers such
    problems wrongly when decoding greedily, and sometimes correctly when sampling, which gives RL something to find.
    Rewards always use the true result.
    """

    OPTIONS: ClassVar[dict[str, int]] = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    SLIP_SHARE = 0.6
    COPIES = 8  # of every training problem; whether a copy has the error is drawn independently
    executes_responses = False  # chain_sum only compares text

    @classmethod
    def of(cls, config: TaskConfig, seed: int) -> "Arithmetic":
        return cls(config.options, config.num_problems, seed)

    def __init__(self, options: Mapping[str, Any], num_problems: int, seed: int) -> None:
        super().__init__("chain_sum", {**self.OPTIONS, **options}, num_problems, seed, bare=True)
        self.seed = seed

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        draw = random.Random(self.seed)
        pairs = []
        for problem in self._splits["train"]:
            slipped = _slip(problem)
            for _ in range(self.COPIES):
                pairs.append((problem.question, slipped if draw.random() < self.SLIP_SHARE else problem.solution))
        draw.shuffle(pairs)
        return pairs


def _slip(problem: Problem) -> str:
    """Return the answer with the last subtraction as an addition; the right one without any, or with two numbers."""
    _, *rest = as_text(problem.question).removesuffix("=").split()
    subtracted = [number for operator, number in zip(rest[::2], rest[1::2], strict=True) if operator == "-"]
    if len(rest) == 2 or not subtracted:
        return problem.solution
    return str(int(problem.solution) + 2 * int(subtracted[-1]))


class Thinking:
    """Another task, answered in two parts: thoughts, then the answer alone (the prompt of TinyZero's Countdown).

    The form by itself has reward :data:`FORM`; a right answer in this form has the task's reward. Thoughts may be as
    long as the token budget; the metric ``rollout/response_length`` shows how long they get.
    """

    FORM = 0.1
    INSTRUCTION = (
        "\nShow your work in <think> </think> tags, and return the final answer in <answer> </answer> tags, "
        "for example <answer> (1 + 2) / 3 </answer>."
    )
    _TAGS = ("<think>", "</think>", "<answer>", "</answer>")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.executes_responses = getattr(task, "executes_responses", False)

    def problems(self, split: Split) -> Sequence[Problem]:
        return [
            Problem(p.index, followed_by(p.question, self.INSTRUCTION), p.solution, *further(p))
            for p in self.task.problems(split)
        ]

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        """Return demonstrations with empty thoughts; a corpus with thoughts is given as ``data.path``."""
        return [
            (followed_by(q, self.INSTRUCTION), f"<think></think><answer>{a}</answer>")
            for q, a in self.task.demonstrations()
        ]

    def score(self, split: Split, index: int, response: str) -> float:
        """Return 0 without the form. The prompt may end in an opening <think>, which the response then lacks."""
        answer = self._answer(response)
        return 0.0 if answer is None else max(self.FORM, self.task.score(split, index, answer))

    def answer_of(self, response: str) -> str:
        answer = self._answer(response)
        return answer_of(self.task, answer) if answer is not None else ""

    def _answer(self, response: str) -> str | None:
        """Return what the answer tags hold; None without the form: thoughts, then the answer, each tag once."""
        thoughts, _, rest = response.strip().removeprefix("<think>").partition("</think>")
        opening, _, tagged = rest.strip().partition("<answer>")
        answer, closing, trailing = tagged.partition("</answer>")
        whole = closing and not opening and not trailing
        return answer.strip() if whole and not any(tag in thoughts + answer for tag in self._TAGS) else None


class Gsm8k:
    """Grade-school word problems (Cobbe et al. 2021): the number that a response commits to must equal the answer.

    Numbers are found by ``final_answer.py`` and read by ``numerals.py``, in solutions too, and compared exactly.

    Raises:
        ValueError: a solution has no number that can be read.
    """

    INSTRUCTION = "\nThink step by step, then give the result after ####."
    right_from = 1.0
    stop = ("\nQuestion:",)

    @classmethod
    def of(cls, config: TaskConfig, seed: int) -> "Gsm8k":
        return cls(config.path, seed)

    def __init__(self, path: str, seed: int) -> None:
        self._splits: dict[Split, list[Problem]] = {}
        self._answers: dict[Split, list[Fraction]] = {}
        files: dict[Split, str] = {"train": "train", "heldout": "test"}
        for split, name in files.items():
            source = str(Path(path) / f"{name}.jsonl") if Path(path).is_dir() else path
            table = open_rows(source, "task.path", name="main", split=name)
            rows = read_rows(table, source, "task.path", self.read)
            random.Random(seed).shuffle(rows)
            self._splits[split] = [
                Problem(index, followed_by(question, self.INSTRUCTION), solution, {"answer": solution})
                for index, (question, solution, _) in enumerate(rows)
            ]
            self._answers[split] = [answer for *_, answer in rows]

    @staticmethod
    def read(row: Row) -> tuple[Prompt, str, Fraction]:
        """Return question, solution and its number; ValueError names the field that is wrong."""
        solution = cell(row, "answer", plain_text)
        answer = final_number(solution)
        if answer is None:
            raise ValueError(f"field answer: no number in {shown(solution[-60:])}; one after #### is expected")
        return cell(row, "question", as_question), solution, answer

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._splits[split]

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        return [(problem.question, problem.solution) for problem in self._splits["train"]]

    def score(self, split: Split, index: int, response: str) -> float:
        return float(final_number(response) == self._answers[split][index])

    def answer_of(self, response: str) -> str:
        found = final_number(response)
        return "" if found is None else str(found)


class Math500:
    """Competition problems (Hendrycks et al. 2021; the 500 of Lightman et al. 2023), whose answers are expressions.

    Args:
        path: a hub id, whose split ``test`` is used; a file; or a folder with test.jsonl and, to train on, train.jsonl.
            Columns problem, solution and answer.
        seed: shuffles the rows.
    """

    INSTRUCTION = "\nThink step by step, then give the result in \\boxed{}."
    right_from = 1.0
    stop = ("\nProblem:",)

    @classmethod
    def of(cls, config: TaskConfig, seed: int) -> "Math500":
        return cls(config.path, seed)

    def __init__(self, path: str, seed: int) -> None:
        self._splits: dict[Split, list[Problem]] = {"train": [], "heldout": []}
        self._answers: dict[Split, list[str]] = {"train": [], "heldout": []}
        files: dict[Split, Path] = {"train": Path(path) / "train.jsonl", "heldout": Path(path) / "test.jsonl"}
        if not Path(path).is_dir():
            self._load("heldout", path, seed)
            return
        for split, file in files.items():
            if file.exists():
                self._load(split, str(file), seed)

    def _load(self, split: Split, path: str, seed: int) -> None:
        table = open_rows(path, "task.path", split="test")
        rows = read_rows(table, path, "task.path", self.read)
        for index, row in enumerate(np.random.default_rng(seed).permutation(len(rows))):
            question, solution, answer = rows[row]
            columns = {"solution": solution, "answer": answer}
            self._splits[split].append(Problem(index, followed_by(question, self.INSTRUCTION), solution, columns))
            self._answers[split].append(answer)

    @staticmethod
    def read(row: Row) -> tuple[Prompt, str, str]:
        """Return problem, solution and answer; ValueError names the field that is wrong."""
        problem, solution = cell(row, "problem", as_question), cell(row, "solution", plain_text)
        return problem, solution, cell(row, "answer", plain_text)

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._splits[split]

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        return [(problem.question, problem.solution) for problem in self._splits["train"]]

    def score(self, split: Split, index: int, response: str) -> float:
        """Compare numbers exactly, and other expressions with math-verify: (x + 1)^2 equals x^2 + 2x + 1."""
        return float(same_expression(self._answers[split][index], final_expression(response)))

    def answer_of(self, response: str) -> str:
        found = final_expression(response)
        return "" if found is None else canonical(found)
