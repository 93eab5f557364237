"""The data that crosses processes: Trajectory -> Group -> Batch, and the one place where positions shift.

Legend: B sequences, T positions, L actions of a completion.

Alignment, by example: prompt tokens p0 p1 p2, response x3 x4. Action a2, chosen at position 2, produced x3; a3
produced x4. A :class:`Trajectory` stores what happened, ``token_ids [x3 x4]``, ``actions [a2 a3]``, log-probabilities
of the same length. Only :func:`collate` places them at positions 2 and 3 of a (B, T) array:

    position        0    1    2    3    4
    input_ids       p0   p1   p2   x3   x4
    actions         0    0    a2   a3   0
    action_mask     -    -    1    1    -        (the last position acts on nothing; padding is on the right)

Ids travel from end to end; text is never tokenised again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Trajectory:
    """One finished completion."""

    prompt_ids: Array  # (P,) int64
    token_ids: Array  # (L,) int64
    actions: Array  # (L,) int64
    rollout_log_probs: Array  # (L,) float32, of the distribution that was sampled
    versions: Array  # (L,) int64, the policy version that chose each action
    reward: float
    truncated: bool  # ended by the token budget, not by a stop token
    text: str  # the decoded response, for people


@dataclass(frozen=True)
class Group:
    """All completions of one prompt."""

    problem_index: int
    trajectories: tuple[Trajectory, ...]

    @property
    def rewards(self) -> Array:
        return np.array([trajectory.reward for trajectory in self.trajectories], np.float32)


@dataclass(frozen=True)
class Batch:
    """One learner rank's share of a step, right-padded."""

    input_ids: Array  # (B, T) int64
    attention_mask: Array  # (B, T) int64
    actions: Array  # (B, T) int64, 0 where masked
    action_mask: Array  # (B, T) bool
    rollout_log_probs: Array  # (B, T) float32, 0 where masked
    advantages: Array  # (B, T) float32, of the outcome; the same at every action of a sequence
    num_actions_global: int  # over all ranks: what a loss sum is divided by
    policy_version: int  # the version the learner holds when it trains on this

    @property
    def padding_share(self) -> float:
        return 1.0 - float(self.attention_mask.sum()) / self.attention_mask.size

    def rows(self, start: int, stop: int) -> "Batch":
        """A micro-batch, trimmed to its own longest sequence."""
        width = int(self.attention_mask[start:stop].sum(1).max())

        def cut(array: Array) -> Array:
            return array[start:stop, :width]

        return Batch(
            input_ids=cut(self.input_ids),
            attention_mask=cut(self.attention_mask),
            actions=cut(self.actions),
            action_mask=cut(self.action_mask),
            rollout_log_probs=cut(self.rollout_log_probs),
            advantages=cut(self.advantages),
            num_actions_global=self.num_actions_global,
            policy_version=self.policy_version,
        )


def collate(
    trajectories: Sequence[Trajectory], advantages: Sequence[float], num_ranks: int, pad_id: int, policy_version: int
) -> list[Batch]:
    """Trajectories and their outcome advantages -> one batch a rank.

    Longest first and dealt out in turn, so that ranks get near-equal work and a micro-batch holds sequences of
    like length. Every rank gets the same number of sequences, which ZeRO-3 needs.

    Raises:
        ValueError: the number of sequences does not divide over the ranks.
    """
    if len(trajectories) % num_ranks:
        raise ValueError(f"{len(trajectories)} sequences do not divide over {num_ranks} ranks")
    order = sorted(
        range(len(trajectories)), key=lambda i: -(len(trajectories[i].prompt_ids) + len(trajectories[i].token_ids))
    )
    num_actions = sum(len(trajectory.actions) for trajectory in trajectories)
    return [
        _collate_rank(
            [trajectories[i] for i in order[rank::num_ranks]],
            [advantages[i] for i in order[rank::num_ranks]],
            pad_id,
            num_actions,
            policy_version,
        )
        for rank in range(num_ranks)
    ]


def _collate_rank(
    trajectories: Sequence[Trajectory], advantages: Sequence[float], pad_id: int, num_actions: int, version: int
) -> Batch:
    width = max(len(t.prompt_ids) + len(t.token_ids) for t in trajectories)
    shape = (len(trajectories), width)
    input_ids = np.full(shape, pad_id, np.int64)
    attention_mask, actions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    action_mask = np.zeros(shape, bool)
    log_probs, outcome = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for row, (trajectory, advantage) in enumerate(zip(trajectories, advantages, strict=True)):
        start, length = len(trajectory.prompt_ids), len(trajectory.token_ids)
        end = start + length
        input_ids[row, :start], input_ids[row, start:end] = trajectory.prompt_ids, trajectory.token_ids
        attention_mask[row, :end] = 1
        acting = slice(start - 1, end - 1)  # the shift: an action sits where it was chosen
        actions[row, acting] = trajectory.actions
        action_mask[row, acting] = True
        log_probs[row, acting] = trajectory.rollout_log_probs
        outcome[row, acting] = advantage
    return Batch(input_ids, attention_mask, actions, action_mask, log_probs, outcome, num_actions, version)
