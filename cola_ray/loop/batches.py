"""From a step's sequences to a batch for each learner rank: advantages, replay for some algorithms, collation.

outcomes of each prompt ── advantages ──> one per sequence ──> collate ──> one Batch per rank
                                                 │                ^
                                                 └─ actor_free: replay
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from cola_ray.algorithms.advantages import Outcomes, clipped_reward
from cola_ray.algorithms.latent_actions import usage
from cola_ray.algorithms.mini_batches import permuted
from cola_ray.batch import Batch, Picked, Tally, collate
from cola_ray.loop.evaluation import HeldOut
from cola_ray.loop.replay_client import ReplayClient
from cola_ray.loop.workers import WorkerGroup
from cola_ray.packing import Packed, pack
from cola_ray.replay.transitions import as_completion_rows, as_trajectories
from cola_ray.settings.config import Config

Metrics = dict[str, float]


class Source(Protocol):
    """Where a run's batches come from: problems with one answer each, or episodes of an environment."""

    held_out: HeldOut  # how the policy is evaluated
    replay: ReplayClient  # has no shards if nothing is learnt from replay

    def check(self) -> None:
        """Called once the workers have answered. Raises ValueError if their task has nothing to train on."""
        ...

    async def collect(self, step: int) -> Any:
        """Scored rollouts of the step's tickets. Raises RuntimeError if too many failed."""
        ...

    async def to_batches(self, rollouts: Any, step: int) -> tuple[list[Batch], Metrics]:
        """One batch per rank, with advantages, and the step's metrics."""
        ...

    def learnt(self, step: int, of_sequences: np.ndarray) -> None:
        """Receive one number per sequence of the step, in order, that the learner computed, if the algorithm asks."""
        ...

    async def state(self, version: int) -> dict[str, Any]:
        """What a checkpoint of ``version`` needs of this source in addition to replay, under its own names."""
        ...

    async def restore(self, state: Mapping[str, Any] | None) -> None:
        """Return to what :meth:`state` gave; None: to the state before the first step."""
        ...


class BatchMaker:
    """Makes the batches of one run."""

    def __init__(self, config: Config, workers: WorkerGroup, replay: ReplayClient) -> None:
        self.config, self.workers, self.replay = config, workers, replay
        self.algorithm, self.compare = config.algorithm, config.algorithm.advantages()
        if self.algorithm.advantage == "grpo" and self.compare is not None:
            self.compare = functools.partial(self.compare, scale_rewards=config.rl.scale_rewards)

    def check_failures(self, failures: Sequence[str], count: int, what: str) -> None:
        """Count failures of user code.

        Raises:
            RuntimeError: they are too large a share of ``count``.
        """
        self.workers.totals.failed_rewards += len(failures)
        share = len(failures) / count
        if share > self.config.task.max_failed_rewards:
            raise RuntimeError(
                f"{share:.0%} of a step's {what} failed, more than task.max_failed_rewards = "
                f"{self.config.task.max_failed_rewards:.0%}; the first one {failures[0]}"
            )

    def clipped(self, reward: float) -> float:
        """The task's reward, clipped as it is for learning."""
        return clipped_reward(reward, self.config.rl.reward_clip_range)

    def clipped_share(self, rewards: Sequence[float]) -> Metrics:
        """The share of rewards that are clipped, if clipping is on."""
        if self.config.rl.reward_clip_range is None:
            return {}
        return {"reward/clipped": float(np.mean([self.clipped(reward) != reward for reward in rewards]))}

    def counted(self, seconds: float) -> Metrics:
        """Failures and losses so far, and the seconds that a step's rollouts took."""
        totals = self.workers.totals
        return {
            "reward/failed": float(totals.failed_rewards),
            "rollout/regenerated_groups": float(totals.regenerated_groups),
            "rollout/worker_losses": float(totals.worker_losses),
            "time/rollout": seconds,
        }

    def measured(
        self, lengths: Sequence[int], actions: Tally, versions: Tally, rewards: Sequence[float], step: int
    ) -> Metrics:
        """Metrics of what the policy generated in a step's rollouts, one rollout per reward.

        The mean length also updates the estimate of how much work a rollout is.

        Args:
            lengths: of each completion or turn.
            actions: all actions taken.
            versions: of the policies that chose these actions.
        """
        staleness = step - versions.values
        counts = torch.zeros(max(self.config.model.num_actions, int(actions.values[-1]) + 1), dtype=torch.long)
        counts[torch.from_numpy(actions.values).long()] = torch.from_numpy(actions.counts).long()
        totals = self.workers.totals
        totals.response_length = 0.9 * totals.response_length + 0.1 * float(np.sum(lengths) / len(rewards))
        return {
            "reward/mean": float(np.mean(rewards)),
            "reward/std": float(np.std(rewards)),
            "rollout/response_length": float(np.mean(lengths)),
            "staleness/mean": float(staleness @ versions.counts / versions.counts.sum()),
            "staleness/max": float(staleness.max()),
            **usage(counts),
        }

    def advantages(self, prompts: Sequence[Outcomes]) -> list[list[float]]:
        """Advantages of each prompt's completions; the plain rewards if the learner's value head is the baseline."""
        found = [one.rewards for one in prompts] if self.compare is None else self.compare(prompts)
        return [advantages.tolist() for advantages in found]

    async def train_on(
        self,
        sequences: Packed | Picked,
        advantages: Sequence[float],
        positions: Sequence[int],
        versions: Sequence[int],
        step: int,
    ) -> tuple[list[Batch], Metrics]:
        """One batch per rank, of these sequences; if ``actor_free``, they go into replay and as many are drawn from it.

        Args:
            positions: the sequences' ticket positions.
            versions: the policy versions that chose the sequences' first actions.
        """
        if not self.config.rl.actor_free:
            return self.collate(sequences, advantages, step), {}
        here = sequences if isinstance(sequences, Packed) else sequences.fetched()
        await self.replay.store(as_completion_rows(positions, versions, here, np.asarray(advantages)))
        rows = await self.replay.sample(len(sequences), step)
        age = {"replay/age": float(step - np.mean(rows["version"].to_numpy()))}
        batches = self.collate(pack(as_trajectories(rows)), rows["outcome"].to_pylist(), step)
        return batches, age | await self.replay.size()

    def collate(self, sequences: Packed | Picked, advantages: Sequence[float], step: int) -> list[Batch]:
        """One batch per learner rank."""
        rl = self.config.rl
        return collate(
            sequences, advantages, self.config.cluster.learner_ranks, self.workers.facts["pad_token_id"], step,
            rl.micro_batch_tokens,
            permuted(len(sequences), rl.num_minibatches, rl.updates_per_batch, self.config.seed, step),
            keep_places=self.algorithm.critic and self.algorithm.soft_q,
            shares_prompts=rl.share_prompts and bool(self.workers.facts.get("shares_prompts")),
        )  # fmt: skip
