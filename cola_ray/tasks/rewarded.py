"""A task whose responses a function of the user's scores: ``task.reward``."""

from collections.abc import Callable, Sequence

from cola_ray.tasks.chat import Prompt
from cola_ray.tasks.protocol import Problem, Prompts, Split, answer_of


class Rewarded:
    """Another task's problems, with a reward of one's own in place of its verifier's.

    Args:
        task: with problems and demonstrations; a verifier that it may have is not asked.
        reward: ``(problem, response) -> number``, see :class:`~cola_ray.tasks.protocol.Problem`. Where it has an
            attribute ``executes_responses = True``, each call runs in a confined process of its own.
    """

    def __init__(self, task: Prompts, reward: Callable[[Problem, str], float]) -> None:
        self.task, self.reward = task, reward
        self.executes_responses = bool(getattr(reward, "executes_responses", False))

    def problems(self, split: Split) -> Sequence[Problem]:
        return self.task.problems(split)

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        return self.task.demonstrations()

    def score(self, split: Split, index: int, response: str) -> float:
        return self.reward(self.task.problems(split)[index], response)

    def answer_of(self, response: str) -> str:
        return answer_of(self.task, response)
