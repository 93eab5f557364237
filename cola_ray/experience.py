"""What happened in a rollout: completions of a prompt, and episodes of turns. packing.py has how it travels.

    Ticket ─> Trajectory ───────────┐
    Ticket ─> Turn ─> Episode ──────┴─> pack ─> collate ─> one Batch per learner rank
    held-out problem ─> Answer

Legend: P tokens of a prompt or a state, L tokens of a response or an utterance, and as many actions.

Token ids travel from end to end; text is never tokenised again.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cola_ray.algorithms.returns import returns_after

Array = np.ndarray


@dataclass(frozen=True)
class Ticket:
    """One prompt handed out: its place in the run's order, which also seeds its draws, and the problem there."""

    position: int
    problem: int  # index among the training problems whose prompts fit


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
    # (L,) float32 both; None: the whole reward is at the last action, and nothing follows it
    rewards: Array | None = None
    discounts: Array | None = None  # factor on the value after each action: 1 within a turn, 0 at an end
    advantages: Array | None = None  # (L,) float32; None: the outcome's advantage at every action
    turn_starts: Array | None = None  # (L,) bool, true at the first action of each turn; None: one turn
    source: str = ""  # of its problem, if the task has several sources
    parts: Mapping[str, float] = field(default_factory=dict)  # each reward of ``task.reward``, without its weight


@dataclass(frozen=True)
class Answer:
    """The result of one held-out problem or environment seed."""

    reward: float  # not finite where scoring or the environment failed
    sequences: tuple[Trajectory, ...] = ()  # what was generated, if it is kept to be read


@dataclass(frozen=True)
class Turn:
    """One utterance of L tokens, the state of P ids in which it was said, and its reward."""

    state_ids: Array  # (P,) int64
    token_ids: Array  # (L,) int64, the stop token included
    actions: Array  # (L,) int64
    rollout_log_probs: Array  # (L,) float32
    versions: Array  # (L,) int64
    reward: float
    observation_ids: Array  # (O,) int64, what the environment answered
    state_features: Array | None = None  # (H,), e at the state's last token, if the engine sends it
    utterance_features: Array | None = None  # (H,), mean of e over the utterance
    left: bool = False  # an agent program went on from a conversation that does not contain this turn
    answer: int = -1  # of which it is one of several choices, drawn in the same state; -1: it is an answer by itself


def was_said(state_ids: Sequence[int] | Array, token_ids: Sequence[int] | Array) -> bool:
    """Whether a state's ids contain exactly these ids, in a row.

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
    final_features: Array | None = None  # (H,), e at the very last token, if a limit cut the episode
    failure: str = ""  # of the environment; such an episode is counted and not trained on
    metrics: Mapping[str, float] = field(default_factory=dict)  # the environment's metrics, by name
    retokenised: int = 0  # the policy's messages that an agent program sent back changed

    @property
    def total_reward(self) -> float:
        """The undiscounted return."""
        return sum(turn.reward for turn in self.turns)

    def with_rewards(self, of_each: Callable[[float], float]) -> "Episode":
        """The episode with each turn's reward replaced by a function of it."""
        return replace(self, turns=tuple(replace(turn, reward=of_each(turn.reward)) for turn in self.turns))

    @property
    def answers(self) -> list[range]:
        """Numbers of the turns of each answer: one turn, or the choices that an agent program asked for together."""
        own = [turn.answer if turn.answer >= 0 else -1 - number for number, turn in enumerate(self.turns)]
        starts = [number for number, answer in enumerate(own) if not number or answer != own[number - 1]]
        return [range(*pair) for pair in itertools.pairwise([*starts, len(self.turns)])]

    @property
    def observations(self) -> list[Array]:
        """Ids that each turn answers: the opening, with the transcript's begin ids, then observations."""
        found, before = list[Array](), [turn.state_ids for turn in self.turns[:1]]
        for choices in self.answers:
            seen = next((ids for ids in before if len(ids)), np.zeros(0, np.int64))
            found += [seen] * len(choices)
            before = [self.turns[number].observation_ids for number in choices]
        return found

    def as_trajectories(self, gamma: float = 1.0, advantages: Sequence[float] | None = None) -> list[Trajectory]:
        """Sequences to train on; their masked-in actions are the policy's.

        Turns whose states continue one another are one sequence; where the oldest turns were dropped from a state that
        had grown too long, a new sequence begins. A sequence that is followed by turns outside it ends with the last
        observation: the value there stands for what follows. If an agent program went on from another conversation,
        there is no such state: the discounted rewards of what followed are then added to the last action's reward. The
        choices of one answer are sequences of their own, and what followed the answer follows each of them.

        Args:
            gamma: discount of a turn; 0 if each turn stands by itself.
            advantages: of each turn, for all of its actions, in place of its reward.
        """
        gains = [turn.reward for turn in self.turns] if advantages is None else advantages
        answers, runs = self.answers, list[list[int]]()
        after = returns_after(gains, answers, gamma)
        for number, turn in enumerate(self.turns):
            if runs and _continues(self.turns[runs[-1][-1]], turn):
                runs[-1].append(number)
            else:
                runs.append([number])
        made = []
        for run in runs:
            unseen = self.turns[run[-1]].left
            ends = unseen or (self.terminated and run[-1] in answers[-1])
            later = gamma * after[run[-1]] if unseen else 0.0
            turns = [(self.turns[number], gains[number]) for number in run]
            made.append(self._as_trajectory(turns, ends, later, gamma, advantages is not None))
        return made

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
