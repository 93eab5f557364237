"""A task's verifier, or the rewards named in the settings, in a separate process (isolation.py).

RewardProcess.score(items) ─┬─ a call for each item ─> _Verifier.score      the task's own score
                            └─ a call for a batch ──> _Verifier.score_all   task.reward, see tasks/rewarded.py
"""

import dataclasses
import functools
import inspect
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cola_ray.rollout.isolation import IsolatedObject, Reply, is_text
from cola_ray.sandbox.execution import SeparateExecutor
from cola_ray.sandbox.messages import as_text
from cola_ray.tasks import Task, answer_of
from cola_ray.tasks.protocol import Split, not_a_reward
from cola_ray.tasks.rewarded import Item, Rewarded, total

_BATCH = 64  # responses per call; more if one problem has more
_BATCH_BYTES = 1 << 19  # size limit of the responses in one call
_LATE = 3  # late responses in a row after which the rest of a batch is given up


@dataclass(frozen=True)
class Reward:
    value: float  # 0 where scoring failed
    failure: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)  # value of each reward in ``task.reward`` that applies


class RewardProcess(IsolatedObject):
    """A task's verifier in a separate process.

    Args:
        make: builds the task.
        timeout_s: seconds that a call may take.
        weights: of the rewards of a :class:`~cola_ray.tasks.rewarded.Rewarded` task; empty for a task with a score.
        beside: rewards from elsewhere are added to these, so a response need not have any of these.
        batched: rewards are asked for up to :data:`_BATCH` responses at a time. A call that fails is repeated one by
            one, so that a failure still costs its own sample; if :data:`_LATE` of those take too long one after the
            other, the rest fail with them.
    """

    def __init__(
        self,
        make: Callable[[], Task],
        timeout_s: float,
        weights: Mapping[str, float] | None = None,
        beside: bool = False,
        batched: bool = False,
    ) -> None:
        super().__init__(functools.partial(_Verifier, make, timeout_s), timeout_s)
        self.weights, self.beside, self.batched = weights or {}, beside, batched

    def score(self, items: Sequence[Item]) -> list[Reward]:
        """Return a reward for each (split, index of the problem, response), in order."""
        if not self.weights:
            return [as_reward(reply) for reply in self.call([("score", *item) for item in items])]
        batches = _batches(items) if self.batched else [[item] for item in items]
        return [reward for batch in batches for reward in self._score_batch(batch)]

    def _score_batch(self, batch: Sequence[Item]) -> list[Reward]:
        (reply,) = self.call([("score_all", batch)])
        if not reply.failure:
            return self._rewards(reply.value, len(batch))
        if len(batch) == 1:
            return [Reward(0.0, reply.failure)]
        found, late = list[Reward](), 0
        for item in batch:
            if late < _LATE:
                started = time.monotonic()
                found += self._score_batch([item])
                in_time = not found[-1].failure or time.monotonic() - started < self.timeout_s
                late = 0 if in_time else late + 1
            else:
                found.append(found[-1])
        return found

    def _rewards(self, values: Any, count: int) -> list[Reward]:
        """Combine the functions' values into the rewards of a batch. Each function gives one value per response, None
        where it does not apply."""
        if not isinstance(values, dict) or values.keys() != self.weights.keys():
            return [Reward(0.0, "returned something that is not rewards")] * count
        for name, said in values.items():
            if not isinstance(said, list) or len(said) != count:
                what = f"{len(said)} rewards" if isinstance(said, list) else as_text(repr(said), 60)
                return [Reward(0.0, f"{name} returned {what} for {count} completions")] * count
        return [self._reward({name: said[i] for name, said in values.items()}) for i in range(count)]

    def _reward(self, values: Mapping[str, Any]) -> Reward:
        for name, value in values.items():
            if value is not None and (why := not_a_reward(value)):
                return Reward(0.0, f"{name} returned {why}")
        reward = 0.0 if self.beside and set(values.values()) == {None} else total(values, self.weights)
        if reward is None:
            return Reward(0.0, f"no reward applies: {' and '.join(values)} returned None")
        parts = {name: float(value) for name, value in values.items() if value is not None}
        return dataclasses.replace(as_reward(Reply(reward)), parts=parts)

    def answers(self, responses: Sequence[str]) -> list[str]:
        """Return each response's final answer; "" where it cannot be read, or not in time."""
        replies = self.call([("answer_of", response) for response in responses])
        return [reply.value if is_text(reply.value) else "" for reply in replies]


class _Verifier:
    """The task, in the child; code that it executes runs in forks of a process forked before the task was built."""

    def __init__(self, make: Callable[[], Task], seconds: float) -> None:
        executor = SeparateExecutor(seconds)  # forked from here, before any solution is in memory
        self.task = make()
        self.executes_responses = getattr(self.task, "executes_responses", False)
        tasks: tuple[Any, ...] = (self.task, getattr(self.task, "task", None))
        owner = next((one for one in tasks if _executes_separately(one)), None)
        self.keeps_time = self.executes_responses or owner is not None
        if owner is None:
            executor.close()
            return
        executor.use(owner.execute)
        owner.execute = executor

    def score(self, split: Split, index: int, response: str) -> Any:
        reward: Any = self.task.score(split, index, response)
        return float(reward) if hasattr(reward, "__float__") else reward

    def score_all(self, items: Sequence[Item]) -> dict[str, Any]:
        assert isinstance(self.task, Rewarded)
        return self.task.score_all(items)

    def answer_of(self, response: str) -> str:
        return answer_of(self.task, response)


def _batches(items: Sequence[Item]) -> list[list[Item]]:
    """Split into as few calls as a message's limits allow; a problem's completions stay together where they fit."""
    batches, room = list[list[Item]](), 0
    for _, group in itertools.groupby(items, key=lambda item: item[:2]):
        siblings = list(group)
        whole = sum(len(json.dumps(text)) for *_, text in siblings)
        if not batches or len(batches[-1]) + len(siblings) > _BATCH or whole > room:
            batches, room = [*batches, []], _BATCH_BYTES
        for item in siblings:
            size = len(json.dumps(item[-1]))
            if batches[-1] and size > room:
                batches, room = [*batches, []], _BATCH_BYTES
            batches[-1].append(item)
            room -= size
    return batches


def _executes_separately(task: object) -> bool:
    return isinstance(inspect.getattr_static(task, "execute", None), staticmethod)


def added(own: Reward, further: Reward, weight: float, name: str) -> Reward:
    """Return ``own + weight * further``; a failure if either is one.

    Args:
        own: weighted sum of a process's rewards.
        further: the reward called ``name``, without its weight.
    """
    if own.failure or further.failure:
        return Reward(0.0, own.failure or further.failure)
    value = as_reward(Reply(own.value + weight * further.value))
    return dataclasses.replace(value, parts={**own.parts, name: further.value})


def as_reward(reply: Reply) -> Reward:
    """Return a call's reply as a reward; a failure unless it is a number within +-``protocol.LARGEST_REWARD``."""
    if reply.failure:
        return Reward(0.0, reply.failure)
    why = not_a_reward(reply.value)
    return Reward(0.0, f"returned {why}") if why else Reward(float(reply.value))
