"""The data that crosses processes, and the one place where positions shift.

    Ticket ─> Trajectory ─> Group ──────┐
    Ticket ─> Turn ─> Episode ──────────┴─> collate ─> Batch, one a learner rank

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
from dataclasses import dataclass, replace

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
    action_mask: Array | None = None  # (L,) bool, false at an environment's tokens; None: the policy said all of it
    # (L,) float32 both; None: all of the reward at the last action, which nothing follows
    rewards: Array | None = None
    discounts: Array | None = None  # what the value after each action is worth: 1 within a turn, 0 at an end
    advantages: Array | None = None  # (L,) float32; None: the outcome's at every action

    @property
    def num_actions(self) -> int:
        return len(self.actions) if self.action_mask is None else int(self.action_mask.sum())


@dataclass(frozen=True)
class Group:
    """All completions of one ticket's prompt."""

    position: int
    trajectories: tuple[Trajectory, ...]
    greedy: Trajectory | None = None  # a baseline that is not trained on, where the algorithm wants one

    @property
    def asked(self) -> tuple[Trajectory, ...]:
        """All that were generated and wanted a reward, the baseline too."""
        return self.trajectories if self.greedy is None else (*self.trajectories, self.greedy)

    @property
    def scored(self) -> tuple[Trajectory, ...]:
        """Those with a reward."""
        return tuple(trajectory for trajectory in self.trajectories if not trajectory.failure)

    @property
    def rewards(self) -> Array:
        """Of the scored ones, float32."""
        return np.array([trajectory.reward for trajectory in self.scored], np.float32)


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

    @property
    def total_reward(self) -> float:
        """The undiscounted return."""
        return sum(turn.reward for turn in self.turns)

    def as_trajectories(self, gamma: float = 1.0, advantages: Sequence[float] | None = None) -> list[Trajectory]:
        """Sequences to train on, their masked-in actions the policy's.

        Turns whose states continue one another are one sequence; where the oldest turns were dropped from a state
        that had grown too long, a new one begins. One that something follows, unseen in it, ends with the last
        observation: the value there stands for what follows.

        Args:
            gamma: discount of a turn.
            advantages: of each turn, in place of its reward; each turn is then by itself.
        """
        runs: list[list[tuple[Turn, float]]] = []
        gains = [turn.reward for turn in self.turns] if advantages is None else advantages
        for turn, gain in zip(self.turns, gains, strict=True):
            if runs and _continues(runs[-1][-1][0], turn):
                runs[-1].append((turn, gain))
            else:
                runs.append([(turn, gain)])
        if advantages is not None:
            gamma = 0.0
        made = [self._as_trajectory(run, self.terminated and run is runs[-1], gamma) for run in runs]
        return made if advantages is None else [_turn_by_turn(one) for one in made]

    def _as_trajectory(self, turns: list[tuple[Turn, float]], ends: bool, gamma: float) -> Trajectory:
        first, last = turns[0][0], turns[-1][0]
        ids = np.concatenate([last.state_ids, last.token_ids, *(() if ends else (last.observation_ids,))])
        actions, versions = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        log_probs, rewards = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
        mask, discounts = np.zeros(len(ids), bool), np.ones(len(ids), np.float32)
        for turn, gain in turns:
            end = len(turn.state_ids) + len(turn.token_ids)
            said = slice(len(turn.state_ids), end)
            actions[said], log_probs[said], versions[said] = turn.actions, turn.rollout_log_probs, turn.versions
            mask[said] = True
            rewards[end - 1], discounts[end - 1] = gain, 0.0 if ends and turn is last else gamma
        start = len(first.state_ids)
        return Trajectory(
            first.state_ids, ids[start:], actions[start:], log_probs[start:], versions[start:], self.total_reward,
            not self.terminated, self.text, action_mask=mask[start:], rewards=rewards[start:],
            discounts=discounts[start:],
        )  # fmt: skip


def _turn_by_turn(trajectory: Trajectory) -> Trajectory:
    """What comes at a turn's end, where its discount is 0, as the advantage of all its actions."""
    mask, rewards, discounts = trajectory.action_mask, trajectory.rewards, trajectory.discounts
    assert mask is not None
    assert rewards is not None
    assert discounts is not None
    ends = discounts == 0.0
    turn_of = np.cumsum(ends) - ends  # number of the turn that a place is in or before
    return replace(trajectory, advantages=np.append(rewards[ends], np.float32(0.0))[turn_of] * mask)


def _continues(before: Turn, after: Turn) -> bool:
    whole = np.concatenate([before.state_ids, before.token_ids])
    return np.array_equal(after.state_ids[: len(whole)], whole)


@dataclass(frozen=True)
class Batch:
    """One learner rank's share of a step, right-padded, cut into micro-batches at the same rows on every rank."""

    input_ids: Array  # (B, T) int64
    attention_mask: Array  # (B, T) int64
    actions: Array  # (B, T) int64, 0 where masked
    action_mask: Array  # (B, T) bool
    rollout_log_probs: Array  # (B, T) float32, 0 where masked
    advantages: Array  # (B, T) float32, of the outcome; the same at every action of a sequence
    rewards: Array  # (B, T) float32, of each action; all of these three are 0 where masked
    discounts: Array  # (B, T) float32, of the value after each action
    micro_batches: tuple[tuple[int, int, int], ...]  # (first row, end row, width) of each
    num_actions_global: int  # over all ranks: what a loss sum is divided by
    num_tokens_global: int  # over all ranks, prompts and observations included
    policy_version: int  # the version the learner holds when it trains on this
    hidden_states: Array | None = None  # (B, T, H), where the engine sends them; bfloat16 as int16
    trains: bool = True  # else the learner measures, and the policy stays as it is

    @property
    def computed_positions(self) -> int:
        """On each rank, padding included."""
        return sum((stop - start) * width for start, stop, width in self.micro_batches)


def collate(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float],
    num_ranks: int,
    pad_id: int,
    policy_version: int,
    micro_batch_tokens: int,
) -> list[Batch]:
    """Trajectories and their outcome advantages -> one batch a rank.

    Longest first and dealt out in turn, so that ranks get near-equal work and a micro-batch holds sequences of like
    length. A micro-batch takes as many rows as ``micro_batch_tokens`` allows at its longest row's width, one at
    least. ZeRO-3 needs every rank to run the same number of them: all ranks cut at the same rows, and where the
    sequences do not divide, the last ranks get a row without actions.
    """
    lengths = [len(t.prompt_ids) + len(t.token_ids) for t in trajectories]
    order = sorted(range(len(trajectories)), key=lambda i: -lengths[i])
    widths = [lengths[i] for i in order[::num_ranks]]  # of the longest rank at each row
    cuts = _cut(widths, micro_batch_tokens)
    num_actions = sum(trajectory.num_actions for trajectory in trajectories)

    states = next((t.hidden_states for t in trajectories if t.hidden_states is not None), None)
    like = None if states is None else states[:0]  # of a rank without sequences, too

    def of_rank(rank: int) -> Batch:
        mine = order[rank::num_ranks]
        pairs = [(trajectories[i], advantages[i]) for i in mine]
        return _collate_rank(pairs, len(widths), cuts, pad_id, num_actions, sum(lengths), policy_version, like)

    return [of_rank(rank) for rank in range(num_ranks)]


def _cut(widths: Sequence[int], budget: int) -> tuple[tuple[int, int, int], ...]:
    """Rows of falling width into runs of at most ``budget`` padded tokens."""
    cuts, start = [], 0
    while start < len(widths):
        rows = max(budget // widths[start], 1)
        stop = min(start + rows, len(widths))
        cuts.append((start, stop, widths[start]))
        start = stop
    return tuple(cuts)


def _collate_rank(
    pairs: Sequence[tuple[Trajectory, float]],
    num_rows: int,
    micro_batches: tuple[tuple[int, int, int], ...],
    pad_id: int,
    num_actions: int,
    num_tokens: int,
    version: int,
    states: Array | None,
) -> Batch:
    """Args: states: (0, H) of the type of all hidden states, None where the engine sends none."""
    shape = (num_rows, max(width for _, _, width in micro_batches))
    input_ids = np.full(shape, pad_id, np.int64)
    attention_mask, actions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    attention_mask[len(pairs) :, 0] = 1  # a row without a sequence: one token, no action
    action_mask = np.zeros(shape, bool)
    log_probs, outcome, rewards, discounts = (np.zeros(shape, np.float32) for _ in range(4))
    hidden = None if states is None else np.zeros((*shape, states.shape[-1]), states.dtype)
    for row, (trajectory, advantage) in enumerate(pairs):
        start, length = len(trajectory.prompt_ids), len(trajectory.token_ids)
        end = start + length
        input_ids[row, :start], input_ids[row, start:end] = trajectory.prompt_ids, trajectory.token_ids
        attention_mask[row, :end] = 1
        acting = slice(start - 1, end - 1)  # the shift: an action sits where it was chosen
        actions[row, acting] = trajectory.actions
        action_mask[row, acting] = True if trajectory.action_mask is None else trajectory.action_mask
        log_probs[row, acting] = trajectory.rollout_log_probs
        outcome[row, acting] = advantage if trajectory.advantages is None else trajectory.advantages
        if trajectory.rewards is None or trajectory.discounts is None:
            rewards[row, end - 2], discounts[row, start - 1 : end - 2] = advantage, 1.0
        else:
            rewards[row, acting], discounts[row, acting] = trajectory.rewards, trajectory.discounts
        if hidden is not None and trajectory.hidden_states is not None:
            hidden[row, : len(trajectory.hidden_states)] = trajectory.hidden_states
    return Batch(
        input_ids, attention_mask, actions, action_mask, log_probs, outcome, rewards, discounts, micro_batches,
        num_actions, num_tokens, version, hidden,
    )  # fmt: skip
