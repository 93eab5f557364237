"""What happened in a rollout: completions of a prompt, and episodes of turns. packing.py has how it travels.

    Ticket ─> Trajectory ───────────┐
    Ticket ─> Turn ─> Episode ──────┴─> pack ─> collate ─> Batch, one a learner rank
    held-out problem ─> Answer

Legend: P tokens of a prompt or a state, L tokens and as many actions of what was said.

Ids travel from end to end; text is never tokenised again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Ticket:
    """One prompt handed out: its place in the run's order, which also seeds its draws, and the problem there."""

    position: int
    problem: int  # counted among the training problems whose prompts fit


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
    failure: str = ""  # why there is no reward; such a trajectory is counted and not trained on
    # (P + L - 1, H), e at all but the last token, if the engine sends it; bf16 as int16
    hidden_states: Array | None = None
    # (L,) bool, false at an environment's tokens, and where an action is held; None: the policy chose at each token
    action_mask: Array | None = None
    # (L,) float32 both; None: all of the reward at the last action, which nothing follows
    rewards: Array | None = None
    discounts: Array | None = None  # what the value after each action is worth: 1 within a turn, 0 at an end
    advantages: Array | None = None  # (L,) float32; None: the outcome's at every action
    turn_starts: Array | None = None  # (L,) bool, true at the first action of each turn; None: all of it is one turn
    source: str = ""  # of its problem, where the task has several
    parts: Mapping[str, float] = field(default_factory=dict)  # each reward of ``task.reward``, without its weight


@dataclass(frozen=True)
class Answer:
    """What came of one held-out problem or environment seed."""

    reward: float  # not finite where scoring or the environment failed
    sequences: tuple[Trajectory, ...] = ()  # what was said, where it is kept to be read


@dataclass(frozen=True)
class Turn:
    """One utterance of L tokens, the state of P ids that it was said in, and what it brought."""

    state_ids: Array  # (P,) int64
    token_ids: Array  # (L,) int64, the stop token included
    actions: Array  # (L,) int64
    rollout_log_probs: Array  # (L,) float32
    versions: Array  # (L,) int64
    reward: float
    observation_ids: Array  # (O,) int64, what the environment answered
    state_features: Array | None = None  # (H,), e at the state's last token, if the engine sends it
    utterance_features: Array | None = None  # (H,), mean of e over the utterance
    left: bool = False  # an agent program went on from something else, in which nothing of this is


def was_said(state_ids: Sequence[int] | Array, token_ids: Sequence[int] | Array) -> bool:
    """Whether a state's ids hold these very ids, in a row.

    Example: [5, 1, 2, 9], [1, 2] -> True.
    """
    state, said = ("".join(map(chr, ids)) for ids in (state_ids, token_ids))
    return said in state


@dataclass(frozen=True)
class Episode:
    """One finished multi-turn episode."""

    position: int  # of its ticket
    turns: tuple[Turn, ...]
    terminated: bool  # by the environment's rules; else by a limit, and the last state still has a value
    text: str
    final_features: Array | None = None  # (H,), e at the last token of all, where a limit cut the episode
    failure: str = ""  # of the environment; such an episode is counted and not trained on
    metrics: Mapping[str, float] = field(default_factory=dict)  # what the environment has measured, by name
    retokenised: int = 0  # messages of the policy that an agent program has sent back otherwise than it got them

    @property
    def total_reward(self) -> float:
        """The undiscounted return."""
        return sum(turn.reward for turn in self.turns)

    def with_rewards(self, of_each: Callable[[float], float]) -> "Episode":
        """With another reward for each turn, made of its own."""
        return replace(self, turns=tuple(replace(turn, reward=of_each(turn.reward)) for turn in self.turns))

    @property
    def observations(self) -> list[Array]:
        """Ids of what each turn answers: the opening, with what the transcript begins with, then observations."""
        return [self.turns[0].state_ids, *(turn.observation_ids for turn in self.turns[:-1])] if self.turns else []

    def as_trajectories(self, gamma: float = 1.0, advantages: Sequence[float] | None = None) -> list[Trajectory]:
        """Sequences to train on, their masked-in actions the policy's.

        Turns whose states continue one another are one sequence; where the oldest turns were dropped from a state
        that had grown too long, a new one begins. One that something follows, unseen in it, ends with the last
        observation: the value there stands for what follows. If an agent program went on from something else, there
        is no such state, and what followed stands for itself: its discounted rewards count as the last action's.

        Args:
            gamma: discount of a turn; 0 where each turn is by itself.
            advantages: of each turn, for all of its actions, and in place of its reward.
        """
        runs: list[list[tuple[Turn, float]]] = []
        gains = [turn.reward for turn in self.turns] if advantages is None else advantages
        for turn, gain in zip(self.turns, gains, strict=True):
            if runs and _continues(runs[-1][-1][0], turn):
                runs[-1].append((turn, gain))
            else:
                runs.append([(turn, gain)])
        weighed, made, later = advantages is not None, list[Trajectory](), 0.0
        for run in reversed(runs):
            is_last = run is runs[-1]
            unseen = run[-1][0].left
            ends = unseen or (is_last and self.terminated)
            made.append(self._as_trajectory(run, ends, gamma * later if unseen else 0.0, gamma, weighed))
            for _, gain in reversed(run):
                later = gain + gamma * later
        return made[::-1]

    def _as_trajectory(
        self, turns: list[tuple[Turn, float]], ends: bool, later: float, gamma: float, weighed: bool
    ) -> Trajectory:
        first, last = turns[0][0], turns[-1][0]
        ids = np.concatenate([last.state_ids, last.token_ids, *(() if ends else (last.observation_ids,))])
        actions, versions = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        log_probs, rewards = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
        mask, discounts = np.zeros(len(ids), bool), np.ones(len(ids), np.float32)
        advantages, turn_starts = np.zeros(len(ids), np.float32), np.zeros(len(ids), bool)
        for turn, gain in turns:
            end = len(turn.state_ids) + len(turn.token_ids)
            said = slice(len(turn.state_ids), end)
            actions[said], log_probs[said], versions[said] = turn.actions, turn.rollout_log_probs, turn.versions
            mask[said], advantages[said], turn_starts[said.start] = True, gain, True
            rewards[end - 1], discounts[end - 1] = gain, 0.0 if ends and turn is last else gamma
        rewards[len(last.state_ids) + len(last.token_ids) - 1] += later
        start = len(first.state_ids)
        return Trajectory(
            first.state_ids, ids[start:], actions[start:], log_probs[start:], versions[start:], self.total_reward,
            not self.terminated, self.text, self.failure, action_mask=mask[start:], rewards=rewards[start:],
            discounts=discounts[start:], advantages=advantages[start:] if weighed else None,
            turn_starts=turn_starts[start:],
        )  # fmt: skip


def _continues(before: Turn, after: Turn) -> bool:
    whole = np.concatenate([before.state_ids, before.token_ids])
    return np.array_equal(after.state_ids[: len(whole)], whole)
