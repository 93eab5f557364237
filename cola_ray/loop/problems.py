"""Problems with one answer each as a source of batches; preference pairs are such problems, scored by a reward model.

position of the run ──> ticket (a new permutation every epoch) ──> workers.generate_groups ──> groups
                             ^                                                                   │ rewards differ?
                             └──── dynamic sampling: other prompts for those without signal <────┤
                                                                                                 v
         batches <── collate <── completions that ended <── advantages <── outcomes: clipped, less overlong penalty
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cola_ray.algorithms.advantages import Outcomes, alike, all_alike, of_each, overlong_penalty
from cola_ray.batch import Batch, Group, Picked, Sample, Tally
from cola_ray.experience import Ticket
from cola_ray.loop.batches import BatchMaker, Metrics
from cola_ray.loop.evaluation import HeldOut, graded
from cola_ray.loop.replay_client import ReplayClient
from cola_ray.loop.samples import Samples
from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.window import Window
from cola_ray.loop.workers import WorkerGroup
from cola_ray.replay.service import Shards
from cola_ray.settings.config import Config
from cola_ray.tasks import least_right_reward

_REFILLS = 1 << 40
"""Tickets that replace prompts without signal are numbered from here, so that no draw is made twice."""


@dataclass(frozen=True)
class Collected:
    """One step's groups."""

    groups: Sequence[Group]  # of the first draw
    refills: Sequence[Group]  # of other prompts, to replace groups without signal
    seconds: float

    @property
    def groups_of_all(self) -> list[Group]:
        return [*self.groups, *self.refills]

    @functools.cached_property
    def asked(self) -> list[Sample]:
        """All completions, including those whose reward failed."""
        return [one for group in self.groups_of_all for one in group.asked]


class Problems:
    """A :class:`~cola_ray.loop.batches.Source` of groups of completions.

    Args:
        workers: have ``generate_groups`` and ``evaluate``, see rollout/worker.py.
        shards: of replay, for ``rl.actor_free``.
    """

    def __init__(self, config: Config, workers: WorkerGroup, supervisor: Supervisor, shards: Shards) -> None:
        self.config, self.workers, self.supervisor = config, workers, supervisor
        self.replay = ReplayClient(shards, supervisor)
        self.batches = BatchMaker(config, workers, self.replay)
        summarise = functools.partial(graded, right_from=least_right_reward(config.task))
        self.samples = Samples(config, supervisor)
        self.held_out = HeldOut(config.rl, workers, supervisor, summarise, self._no_arguments, self.samples)
        self.window = Window(config.rl, workers, supervisor, self._ticket) if config.rl.window else None

    async def _no_arguments(self) -> tuple[Any, ...]:
        return ()

    def check(self) -> None:
        if not self.workers.facts["num_train"]:
            raise ValueError(
                f"task.name = {self.config.task.name!r}: no problem to train on; all are held out, or longer than "
                f"rollout.max_prompt_tokens = {self.config.rollout.max_prompt_tokens}"
            )
        if not self.workers.facts["num_heldout"]:
            self.supervisor.say("no problem is held out, or none fits rollout.max_prompt_tokens: nothing is evaluated")

    def learnt(self, step: int, of_sequences: np.ndarray) -> None:
        """Ignored: nothing is asked of the learner."""

    async def state(self, version: int) -> dict[str, Any]:
        """The window's state, if any: otherwise draws depend only on tickets, and there is nothing to restore."""
        return {} if self.window is None else {"window": self.window.state(version)}

    async def restore(self, state: Mapping[str, Any] | None) -> None:
        if self.window is not None:
            await self.window.stop()
            self.window.restore(state)

    # --- rollouts ---------------------------------------------------------------------------------------------------

    async def collect(self, step: int) -> Collected:
        started = time.perf_counter()
        groups = await (self.window.collect(step) if self.window else self._generate(self.tickets(step)))
        refills = await self._refill(groups, step) if self.config.rl.dynamic_sampling else []
        seconds = time.perf_counter() - started
        made = Collected(groups, refills, seconds)
        self.batches.check_failures([one.failure for one in made.asked if one.failure], len(made.asked), "rewards")
        return made

    def tickets(self, step: int) -> list[Ticket]:
        wanted = self.config.rl.prompts_per_step
        return [self._ticket(position) for position in range(step * wanted, (step + 1) * wanted)]

    def _ticket(self, position: int) -> Ticket:
        """The training problem at ``position`` of the run: a new permutation every epoch."""
        num_train = self.workers.facts["num_train"]
        epoch, offset = divmod(position, num_train)
        return Ticket(position, int(_epoch_order(self.config.seed, epoch, num_train)[offset]))

    async def _generate(self, tickets: Sequence[Ticket]) -> list[Group]:
        size = self.config.rl.group_size
        return await self.workers.generate(tickets, "generate_groups", completions_per_ticket=size)

    async def _refill(self, groups: Sequence[Group], step: int) -> list[Group]:
        """Groups of other prompts, if too few groups have differing rewards (DAPO, Yu et al. 2025, section 3.2).

        Metrics are those of the first draw, which is a fair sample of the problems, except for counts of failures. If
        rewards differ in no group at all, the first draw is the batch.
        """
        rl, refills = self.config.rl, list[Group]()
        for round_number in range(rl.refill_rounds):
            missing = rl.prompts_per_step - sum(self._differs(group) for group in (*groups, *refills))
            if not missing:
                break
            first = _REFILLS + (step * rl.refill_rounds + round_number) * rl.prompts_per_step
            refills += await self._generate([self._ticket(first + i) for i in range(missing)])
        return refills

    def _differs(self, group: Group) -> bool:
        return bool(group.scored) and not all_alike(self.outcomes(group).rewards)

    # --- batches ----------------------------------------------------------------------------------------------------

    async def to_batches(self, rollouts: Collected, step: int) -> tuple[list[Batch], Metrics]:
        groups = taught = rollouts.groups
        more = {"rollout/tokens_per_second": sum(one.length for one in rollouts.asked) / rollouts.seconds}
        if self.window:
            more["rollout/window_left"] = float(self.window.num_left(step))
        if self.config.rl.dynamic_sampling:
            taught = [group for group in rollouts.groups_of_all if self._differs(group)]
            more["rollout/refilled_groups"] = float(len(rollouts.refills))
            more["reward/taught_groups"] = float(len(taught))
        scored = [group for group in taught or groups if group.scored]
        if not scored:
            raise RuntimeError("a step has no sample with a reward")
        of_groups = self.batches.advantages([self.outcomes(group) for group in scored])
        known = zip(scored, of_groups, strict=True) if self.batches.compare else ()
        self.samples.of_groups(
            step, groups, {group.position: self._of_kept(group, advantages) for group, advantages in known}
        )
        rows = [
            (sample, advantage, group.position)
            for group, advantages in zip(scored, of_groups, strict=True)
            for sample, advantage in zip(group.scored, advantages, strict=True)
        ]
        kept = [row for row, (sample, *_) in enumerate(rows) if self._keeps(sample)]
        sequences = Picked.of_groups(scored)
        if 0 < len(kept) < len(rows):
            sequences, rows = sequences.of(kept), [rows[row] for row in kept]
        samples, of_samples, positions = zip(*rows, strict=True)
        versions = [sample.version for sample in samples]
        batches, replayed = await self.batches.train_on(sequences, of_samples, positions, versions, step)
        if not kept:  # the policy is left unchanged
            batches = [replace(batch, trains=False) for batch in batches]
        return batches, self._measure(groups, step, rollouts.seconds) | more | replayed

    def _keeps(self, sample: Sample) -> bool:
        """Whether a completion is in the loss. The reward of a masked (truncated) one still counts for the others."""
        return not (self.config.rl.mask_truncated_completions and sample.truncated)

    def _of_kept(self, group: Group, advantages: Sequence[float]) -> list[float | None]:
        return [one if self._keeps(sample) else None for sample, one in zip(group.scored, advantages, strict=True)]

    def outcomes(self, group: Group) -> Outcomes:
        """Rewards as the algorithm sees them: clipped, less the penalty on overlong completions.

        If completions are compared with each other, or with the greedy one, and all have the same reward, length alone
        must not teach anything: DAPO drops such groups by their accuracy, before the penalty (Yu et al. 2025, eq. 11).
        """
        greedy = None if group.greedy is None or group.greedy.failure else group.greedy
        whole = [*group.scored, *([greedy] if greedy else [])]
        rewards = torch.tensor([self.batches.clipped(one.reward) for one in whole], dtype=torch.float64)
        limit, buffer = self.config.rollout.max_new_tokens, self.config.rl.overlong_buffer
        if buffer and not (self.batches.algorithm.within_prompts and all_alike(rewards)):
            lengths = [one.length for one in whole]
            rewards -= torch.tensor([overlong_penalty(length, limit, buffer) for length in lengths])
        return Outcomes(rewards[: len(group.scored)], float(rewards[-1]) if greedy else float("nan"))

    def _measure(self, groups: Sequence[Group], step: int, seconds: float) -> Metrics:
        """Metrics of a step's first draw; only the counts if none of its rewards came."""
        counted = self.batches.counted(seconds)
        counted["rollout/last_position"] = float(groups[-1].position)  # all tickets so far were generated, each once
        scored = [group for group in groups if group.scored]
        if not scored:
            return counted
        samples = [sample for group in scored for sample in group.scored]
        actions, versions = (Tally.over(getattr(group, name) for group in scored) for name in ("actions", "versions"))
        lengths, rewards = [one.length for one in samples], [one.reward for one in samples]
        learnt = [[self.batches.clipped(reward) for reward in group.rewards.tolist()] for group in scored]
        without_signal = of_each([torch.tensor(of_group) for of_group in learnt], alike)
        return counted | self.batches.measured(lengths, actions, versions, rewards, step) | {
            "reward/zero_variance_groups": float(torch.stack(without_signal).double().mean()),
            "rollout/distinct": float(np.mean([group.distinct / len(group.scored) for group in scored])),
            "rollout/truncated": float(np.mean([sample.truncated for sample in samples])),
        } | self.batches.clipped_share(rewards) | _parts(samples) | _by_source(samples)  # fmt: skip


def _parts(samples: Sequence[Sample]) -> Metrics:
    """The mean of each reward of ``task.reward`` over the completions that it applies to."""
    names = dict.fromkeys(name for one in samples for name in one.parts)
    said = {name: [one.parts[name] for one in samples if name in one.parts] for name in names}
    return {f"reward/{name}": float(np.mean(values)) for name, values in said.items()}


def _by_source(samples: Sequence[Sample]) -> Metrics:
    """The mean reward of each source, if the task has several, and its share of the completions."""
    found: Metrics = {}
    for name in dict.fromkeys(one.source for one in samples if one.source):
        rewards = [one.reward for one in samples if one.source == name]
        found |= {f"reward/mean/{name}": float(np.mean(rewards)),
                  f"rollout/share/{name}": len(rewards) / len(samples)}  # fmt: skip
    return found


@functools.lru_cache(maxsize=2)  # a step may reach into the next epoch
def _epoch_order(seed: int, epoch: int, num_train: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_train)
