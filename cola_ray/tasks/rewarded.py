"""A task whose responses are scored by the rewards in ``task.reward`` instead of its verifier.

    task.reward ─┬─ (problem, response) ─> number                    one response at a time
                 ├─ (prompts, completions, **columns) ─> numbers     a batch, called by keywords as TRL calls its own
                 └─ a name of rewards.py
    Rewarded.score_all(items) ─> {"exact": [1.0, 0.0], "mine": [0.3, None]}     None: does not apply to this response
    total(values, weights)    ─> the weighted sum of those that apply

Functions of either form may be ``async``; the calls of a batch then wait concurrently.
"""

import abc
import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cola_ray import registry
from cola_ray.settings.config import TaskConfig
from cola_ray.tasks.chat import Message, Prompt
from cola_ray.tasks.protocol import LARGEST_REWARD, Problem, Prompts, Split, answer_of, further, not_a_reward

REWARD_MODEL = "reward_model"
"""The reward that comes from the model or endpoint at ``task.reward_model``, not from a function."""
Item = tuple[Split, int, str]
"""A split, the index of a problem in it, and a response."""
_NOT_GIVEN = {
    "completion_ids": "rewards get texts, not tokens",
    "completions_ids": "rewards get texts, not tokens",
    "trainer_state": "rewards do not depend on the step",
}

_NEEDS = {
    "exact": "they have no solution; name its column with task.columns solution NAME",
    "math": "they have no solution; name its column with task.columns solution NAME",
    "code": "they have no column tests, of Python that follows the response's",
}


class Rewarded:
    """Another task's problems, with other rewards.

    Args:
        task: has problems and demonstrations; only the reward ``verifier`` uses its verifier, if it has one.
        rewards: by name: functions, or classes with ``of(TaskConfig, task)``. If one has an attribute
            ``executes_responses = True``, each response is scored in a confined process of its own.
        weights: weights of the rewards; 1 if not given.
    """

    def __init__(
        self,
        task: Prompts,
        rewards: Mapping[str, Callable[..., Any]],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.task, self.rewards = task, rewards
        self.weights = {name: 1.0 for name in rewards} | dict(weights or {})
        self.executes_responses = any(getattr(reward, "executes_responses", False) for reward in rewards.values())
        self.batched = not self.executes_responses and any(map(registry.takes_batches, rewards.values()))
        self._runner: asyncio.Runner | None = None

    @classmethod
    def of(cls, config: TaskConfig, task: Prompts) -> "Rewarded":
        found = {name_of(path): registry.find("reward", path) for path in config.reward if path != REWARD_MODEL}
        made = {name: reward.of(config, task) if hasattr(reward, "of") else reward for name, reward in found.items()}
        confined = next((name for name, one in made.items() if getattr(one, "executes_responses", False)), "")
        for name, reward in made.items():
            if confined and (getattr(reward, "starts_programs", False) or inspect.iscoroutinefunction(reward)):
                why = f"with {confined} responses are scored in processes without files and sockets"
                raise ValueError(f"{name} needs programs or an event loop, and {why}; leave one of them out")
        return cls(task, made, weights_of(config))

    def problems(self, split: Split) -> Sequence[Problem]:
        return self.task.problems(split)

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        return self.task.demonstrations()

    def answer_of(self, response: str) -> str:
        """Return the answer as read by the first reward that has an ``answer_of``, else by the task."""
        reading = next((one.answer_of for one in self.rewards.values() if hasattr(one, "answer_of")), None)
        return answer_of(self.task, response) if reading is None else str(reading(response))

    def score(self, split: Split, index: int, response: str) -> float:
        """Return the weighted sum; raises ValueError if no reward applies."""
        found = self.score_all([(split, index, response)])
        worth = total({name: values[0] for name, values in found.items()}, self.weights)
        if worth is None:
            raise ValueError(f"none of {', '.join(found)} applies to this response")
        return worth

    def score_all(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return each reward's value for each item, unchecked; scalars of NumPy and PyTorch become numbers."""
        problems = [self.task.problems(split)[index] for split, index, _ in items]
        responses = [response for *_, response in items]
        said = {name: self._call(reward, items, problems, responses) for name, reward in self.rewards.items()}
        waiting = {name: value for name, value in said.items() if inspect.isawaitable(value)}
        if waiting:
            said |= zip(waiting, self._wait(list(waiting.values())), strict=True)
        return {name: _as_numbers(values) for name, values in said.items()}

    def _call(
        self, reward: Callable[..., Any], items: Sequence[Item], problems: Sequence[Problem], responses: Sequence[str]
    ) -> Any:
        if isinstance(reward, OfItems):
            return reward.score_items(items)
        if registry.takes_batches(reward):
            return reward(**arguments(reward, problems, responses))
        values = [reward(problem, response) for problem, response in zip(problems, responses, strict=True)]
        return _gathered(values) if any(map(inspect.isawaitable, values)) else values

    def _wait(self, awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
        """Run them in one event loop, always the same one, since clients that functions keep are bound to it."""
        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(_gathered(awaitables))


class OfItems(abc.ABC):
    """A reward that is called with split and index, such as a task's verifier."""

    @abc.abstractmethod
    def score_items(self, items: Sequence[Item]) -> list[float]:
        """Return a number for each item."""


async def _gathered(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*awaitables))


def _as_numbers(values: Any) -> Any:
    """A list of rewards as data; anything else is returned unchanged and checked later."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        return values
    return [float(value) if hasattr(value, "__float__") else value for value in values]


def arguments(
    reward: Callable[..., Any], problems: Sequence[Problem], responses: Sequence[str]
) -> dict[str, list[Any]]:
    """Return the arguments of a reward for batches: the lists that its signature names, or all for ``**columns``.

    Prompts and completions are texts, or lists of messages if a prompt is one. If a prompt ends in a message that the
    assistant has begun, this is part of the completion. Columns are those of the data; ``solution`` always exists.

    Raises:
        ValueError: the signature names something that does not exist.
    """
    pairs = [_exchange(problem.question, response) for problem, response in zip(problems, responses, strict=True)]
    rows = [further(problem)[0] for problem in problems]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    given: dict[str, list[Any]] = {"solution": [problem.solution for problem in problems]}
    given |= {name: [row.get(name) for row in rows] for name in columns if name != "prompt"}
    given |= {"prompts": [prompt for prompt, _ in pairs], "completions": [completion for _, completion in pairs]}
    parameters = inspect.signature(reward).parameters.values()
    named = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    for one in named:
        if one.name not in given and one.default is one.empty:
            why = _NOT_GIVEN.get(one.name, f"the rows have {', '.join(columns) or 'no columns'}, and solution")
            raise ValueError(f"wants {one.name}, which there is not: {why}")
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return {name: values for name, values in given.items() if takes_all or name in {one.name for one in named}}


def _exchange(prompt: Prompt, response: str) -> tuple[str | list[Message], str | list[Message]]:
    if isinstance(prompt, str):
        return prompt, response
    begun = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    asked: list[Message] = [dict(message) for message in (prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt)]
    return asked, [{"role": "assistant", "content": begun + response}]


def total(values: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Return the weighted sum of the rewards that apply; None if none does.

    Example:
        >>> total({"exact": 1.0, "length": 0.5, "code": None}, {"exact": 1.0, "length": 0.2, "code": 1.0})
        1.1
    """
    known = {name: value for name, value in values.items() if value is not None}
    return sum(weights[name] * value for name, value in known.items()) if known else None


class _Few:
    """A few problems of a task, all in the training split."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.few = problems

    def problems(self, split: Split) -> Sequence[Problem]:
        return self.few

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        return []


def trial(config: TaskConfig, path: str, problems: Sequence[Problem]) -> str:
    """Try one reward on a batch of solutions and other responses; return why it scores none of them, or "".

    Raises whatever the reward's construction raises.
    """
    one = config.model_copy(update={"reward": (path,), "reward_weights": ()})
    tried, name = Rewarded.of(one, _Few(problems)), name_of(path)
    said = (problem.solution or "yes" for problem in problems)
    items: list[Item] = [
        ("train", place, response) for place, first in enumerate(said) for response in (first, "no idea")
    ]
    values, why = _said(tried, name, items)
    if not why:
        if not isinstance(values, list) or len(values) != len(items):
            what = f"{len(values)} rewards" if isinstance(values, list) else f"{values!r:.60}"
            return f"returned {what} for {len(items)} completions; a list of one number for each is wanted"
        wrong = [why for value in values if value is not None and (why := not_a_reward(value))]
        if len(wrong) == len(values):
            return f"returned {wrong[0]:.90}, not a number of at most {LARGEST_REWARD:g} either way"
        return f"applies to none of the first rows: {_NEEDS[name]}" if set(values) == {None} and name in _NEEDS else ""
    if not all(_said(tried, name, [item])[1] for item in items):  # one failure only costs its own sample, also in a run
        return ""
    if why.startswith("raised ") and registry.takes_batches(tried.rewards[name]):
        alike = "texts here, as prompts are" if isinstance(problems[0].question, str) else "lists of one message here"
        return f"{why}; completions are {alike}"
    return why


def _said(tried: Rewarded, name: str, items: Sequence[Item]) -> tuple[Any, str]:
    """What a reward returned, and what it raised."""
    try:
        return tried.score_all(items)[name], ""
    except Exception as error:
        said = str(error)
        return None, said if said.startswith("wants ") else f"raised {registry.error_in_a_line(error)}"


def name_of(path: str) -> str:
    """Return a reward's name in metrics: that of the function, or the built-in one.

    Example:
        >>> name_of("rewards/mine.py:close"), name_of("exact")
        ('close', 'exact')
    """
    return path.rpartition(":")[2]


def weights_of(config: TaskConfig) -> dict[str, float]:
    """Return the weight of each reward, by its name."""
    names = [name_of(path) for path in config.reward]
    return dict(zip(names, config.reward_weights or (1.0,) * len(names), strict=True))
