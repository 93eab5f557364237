"""Held-out evaluation within a run: before training, and every ``rl.eval_every`` versions.

held-out problems, or environment seeds ── workers.evaluate: greedy ──> answers ── graded or returned ──> metrics
"""

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cola_ray.loop.samples import Samples
from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.workers import WorkerGroup
from cola_ray.settings.rl import RLConfig

Metrics = dict[str, float]
Summary = Callable[[Sequence[float]], Metrics]
"""Rewards or returns (not finite if they failed) -> metrics, by names without ``eval/``."""


class HeldOut:
    """What the policy is evaluated on, and how.

    Args:
        summarise: :func:`graded` or :func:`returned`.
        arguments: further arguments of the workers' ``evaluate``, after the problems and ``bare_base``.
        samples: receives the answers.
    """

    def __init__(
        self,
        rl: RLConfig,
        workers: WorkerGroup,
        supervisor: Supervisor,
        summarise: Summary,
        arguments: Callable[[], Awaitable[tuple[Any, ...]]],
        samples: Samples,
    ) -> None:
        self.rl, self.workers, self.supervisor = rl, workers, supervisor
        self.summarise, self.arguments, self.samples = summarise, arguments, samples

    async def before_training(self) -> None:
        """Evaluate the bare base and the start policy; reported as step 0."""
        self.supervisor.doing("evaluating the bare base")
        base = await self.evaluate(0, bare_base=True)
        self.supervisor.doing("evaluating the start policy")
        start = await self.evaluate(0, bare_base=False)
        self.supervisor.step(0, {f"eval/base_{name}": value for name, value in base.items()} | _named(start))

    async def when_due(self, version: int) -> Metrics:
        """Metrics of ``version``; empty if no evaluation is due."""
        if not (version == self.rl.max_steps or (self.rl.eval_every and version % self.rl.eval_every == 0)):
            return {}
        started = time.perf_counter()
        found = _named(await self.evaluate(version, bare_base=False))
        return found | {"time/eval": time.perf_counter() - started}

    async def evaluate(self, version: int, bare_base: bool) -> Metrics:
        """Greedy answers to the first ``rl.eval_problems``; the number of failures is reported."""
        indices = range(min(self.rl.eval_problems, self.workers.facts["num_heldout"]))
        answers = await self.workers.dispatch(indices, "evaluate", bare_base, *await self.arguments())
        self.samples.of_evaluation(version, answers, bare_base)
        rewards = [answer.reward for answer in answers]
        failed = sum(not math.isfinite(reward) for reward in rewards)
        if failed:
            self.supervisor.say(
                f"{failed} of {len(rewards)} answers could not be scored; they count as wrong, and means leave them out"
            )
        return self.summarise(rewards) | self._by_source(rewards)

    def _by_source(self, rewards: Sequence[float]) -> Metrics:
        """The same metrics for each source, if the task has several, as ``<metric>/<source>``."""
        sources = self.workers.facts.get("heldout_sources", [])[: len(rewards)]
        found: Metrics = {}
        for name in dict.fromkeys(source for source in sources if source):
            own = [reward for reward, source in zip(rewards, sources, strict=True) if source == name]
            found |= {f"{metric}/{name}": value for metric, value in self.summarise(own).items()}
        return found


def graded(rewards: Sequence[float], right_from: float | None) -> Metrics:
    """The mean reward, and the share of right responses if the task defines them.

    A response whose scoring failed is not right, and is left out of the mean.

    Args:
        right_from: the least reward of a right response; None if the task does not define it.
    """
    known = [reward for reward in rewards if math.isfinite(reward)]
    found = {"reward": float(np.mean(known))} if known else {}
    if rewards and right_from is not None:
        found["accuracy"] = sum(reward >= right_from for reward in known) / len(rewards)
    return found


def returned(rewards: Sequence[float]) -> Metrics:
    """The mean return of episodes; failed ones are left out."""
    known = [one for one in rewards if math.isfinite(one)]
    return {"return": float(np.mean(known))} if known else {}


def _named(found: Mapping[str, float]) -> Metrics:
    return {f"eval/{name}": value for name, value in found.items()}
