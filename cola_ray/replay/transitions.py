"""Conversion between episodes or trajectories, rows in replay, and batches for the critic and the learner.

    Episode of n turns ─> n rows (s, u, r, s', terminated) with the base's features of s, u and s'
    Trajectory         ─> one row: token ids and actions, with a reward and a discount for each action

The base is frozen, so its features stay valid. In an episode that was cut by a limit, ``terminated`` is false in the
last row, and s' has the features of the last observation.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch

from cola_ray.experience import Episode, Trajectory, was_said
from cola_ray.packing import Packed, Ragged, Runs
from cola_ray.replay.critic import CriticBatch, Inputs

Array = np.ndarray
SOFT = "soft_advantage"
"""Column of :func:`with_soft_advantages`."""


def schema(width: int) -> pa.Schema:
    """Arrow schema of turns, with ``width`` features of each state and utterance."""
    features = pa.list_(pa.float32(), width)
    return pa.schema({
        "state_ids": pa.list_(pa.int32()), "utterance_ids": pa.list_(pa.int32()), "actions": pa.list_(pa.int32()),
        "observation_ids": pa.list_(pa.int32()), "reward": pa.float32(), "terminated": pa.bool_(),
        "position": pa.int64(), "turn": pa.int16(), "said_before": pa.bool_(), "version": pa.int32(),
        "total_reward": pa.float32(), "state": features, "utterance": features, "next_state": features,
    })  # fmt: skip


def as_rows(episodes: Sequence[Episode], width: int) -> pa.Table:
    """One row per turn, in order.

    Raises:
        ValueError: an episode failed or has no features.
    """
    for episode in episodes:
        if episode.failure or not episode.turns or episode.turns[0].state_features is None:
            raise ValueError(f"episode {episode.position} has no features to learn from: {episode.failure}")
    turns = [(episode, number, turn) for episode in episodes for number, turn in enumerate(episode.turns)]
    after, terminated = list[Array | None](), list[bool]()
    for episode in episodes:
        for choices in episode.answers:  # what follows an answer follows each of its choices
            is_last = choices.stop == len(episode.turns)
            follows = episode.final_features if is_last else episode.turns[choices.stop].state_features
            after += [follows] * len(choices)
            terminated += [episode.terminated and is_last] * len(choices)
    unused = np.zeros(width, np.float32)  # the next state of a terminated episode is never read
    columns = {
        "state_ids": [turn.state_ids for _, _, turn in turns],
        "utterance_ids": [turn.token_ids for _, _, turn in turns],
        "observation_ids": [turn.observation_ids for _, _, turn in turns],
        "actions": [turn.actions for _, _, turn in turns],
        "reward": [turn.reward for _, _, turn in turns],
        "terminated": terminated,
        "position": [episode.position for episode, _, _ in turns],
        "turn": [number for _, number, _ in turns],
        "said_before": [was_said(turn.state_ids, turn.token_ids) for _, _, turn in turns],
        "total_reward": [episode.total_reward for episode, _, _ in turns],
        "version": [int(turn.versions[0]) for _, _, turn in turns],
    }
    feature_columns = {
        "state": [turn.state_features for _, _, turn in turns],
        "utterance": [turn.utterance_features for _, _, turn in turns],
        "next_state": after,
    }
    fields = schema(width)
    arrays = {name: pa.array(values, fields.field(name).type) for name, values in columns.items()}
    for name, values in feature_columns.items():
        arrays[name] = _as_lists(np.stack([unused if one is None else one for one in values]))
    return pa.table(arrays, schema=fields)


def as_completion_rows(
    positions: Sequence[int], versions: Sequence[int], sequences: Packed, outcomes: Array
) -> pa.Table:
    """One row per sequence, in order; ``outcomes`` (B,) are rewards of sequences without rewards per action."""

    def rows(column: Ragged | Runs | None) -> list[Array | None]:
        return [None if column is None else column[row] for row in range(len(sequences))]

    ids, per_action = pa.list_(pa.int32()), pa.list_(pa.float32())
    return pa.table({
        "position": pa.array(positions, pa.int64()),
        "state_ids": pa.array(rows(sequences.prompts), ids),
        "utterance_ids": pa.array(rows(sequences.responses), ids),
        "actions": pa.array(rows(sequences.actions), ids),
        "version": pa.array(versions, pa.int32()),
        "action_mask": pa.array(rows(sequences.action_mask), pa.list_(pa.bool_())),
        "rewards": pa.array(rows(sequences.rewards), per_action),
        "discounts": pa.array(rows(sequences.discounts), per_action),
        "outcome": pa.array(outcomes, pa.float32()),
    })  # fmt: skip


def as_trajectories(rows: pa.Table) -> list[Trajectory]:
    """Rows of turns or of completions as trajectories; fields that training does not read are zero or empty."""
    dtypes = {"state_ids": np.int64, "utterance_ids": np.int64, "actions": np.int64, "version": np.int64,
              "action_mask": bool, "rewards": np.float32, "discounts": np.float32}  # fmt: skip
    columns = {
        name: [None if one is None else np.asarray(one, dtype) for one in rows[name].to_pylist()]
        if name in rows.column_names
        else [None] * len(rows)
        for name, dtype in dtypes.items()
    }
    return [
        Trajectory(
            state, utterance, actions, np.zeros(len(actions), np.float32), np.full(len(actions), version), 0.0, False,
            "", action_mask=mask, rewards=rewards, discounts=discounts,
        )
        for state, utterance, actions, version, mask, rewards, discounts in zip(*columns.values(), strict=True)
    ]  # fmt: skip


def fresh_rows(rows: pa.Table, trajectories: Sequence[Trajectory], utterances: Sequence[Array]) -> pa.Table:
    """Replayed states, each with a fresh utterance of the current policy and that utterance's features.

    ArCHer draws new utterances in every critic step. The policy does not change between the steps of an iteration, so
    the targets of V and the actor share one draw for each sampled state.

    Args:
        rows: replayed rows, B of them.
        trajectories: B fresh utterances.
        utterances: B feature vectors of these.
    """
    said = pa.array([one.token_ids for one in trajectories], pa.list_(pa.int32()))
    before = pa.array([was_said(one.prompt_ids, one.token_ids) for one in trajectories], pa.bool_())
    return pa.table({
        "state_ids": rows["state_ids"], "utterance_ids": said, "turn": rows["turn"], "said_before": before,
        "state": rows["state"], "utterance": _as_lists(np.stack(utterances)),
    })  # fmt: skip


def with_soft_advantages(rows: pa.Table, soft_advantages: Array) -> pa.Table:
    """Replayed rows with their own utterances instead of fresh ones, and the excess of Q over V (archer_soft)."""
    said = rows.select(["state_ids", "utterance_ids", "turn", "said_before", "state", "utterance"])
    return said.append_column(SOFT, pa.array(soft_advantages, pa.float32()))


def _as_lists(features: Array) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(features.astype(np.float32).ravel()), features.shape[-1])


def features(rows: pa.Table, name: str) -> Array:
    """A feature column as an array (rows, width) float32."""
    column = rows[name].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


Reader = Callable[[pa.Table, str], Inputs]
"""``reader(rows, column)`` with column "state", "utterance" or "next_state": the critic's inputs."""


def read_features(rows: pa.Table, name: str) -> Inputs:
    """The base's features and one number: a state's turn, or whether the state already contains the utterance.

    A state is read at its last token, an utterance as the mean over its tokens, because at the last token the base
    needs to know only that the sentence ends. The turn is added because positions in a Llama are relative, so e does
    not tell how many turns are left before the limit: over 9 000 held-out turns of Twenty Questions it raises the
    correlation of advantages with what followed from 0.02 to 0.05. ``said_before`` is added because a small base
    forgets what was said. Among a dozen objects the tiny base gives a guess that was made a probability of 0.10 and
    one that was not 0.08. With ``said_before``, the advantages of a cloned player's turns correlate 0.33 with what
    followed instead of 0.2, and a repeated guess has advantage -0.7 where a new one has 0.7.
    """
    extra = rows["said_before" if name == "utterance" else "turn"].to_numpy().astype(np.float32)
    return torch.tensor(np.column_stack([features(rows, name), extra + (name == "next_state")]))


class TextReader:
    """Reads rows as text for a critic with its own encoder, truncated to the last 512 tokens of the encoder.

    Args:
        encoder: directory or hub id of the encoder.
        policy: directory or hub id of the model whose token ids are in the rows.
    """

    PIECES: ClassVar[dict[str, tuple[str, ...]]] = {
        "state": ("state_ids",),
        "utterance": ("utterance_ids",),
        "next_state": ("state_ids", "utterance_ids", "observation_ids"),
    }

    def __init__(self, encoder: str, policy: str) -> None:
        from transformers import AutoTokenizer  # takes seconds, for which the controller need not wait

        self.tokenizer = AutoTokenizer.from_pretrained(encoder, truncation_side="left")
        self.policy = AutoTokenizer.from_pretrained(policy)

    def __call__(self, rows: pa.Table, name: str) -> Inputs:
        columns = [rows[column].to_pylist() for column in self.PIECES[name]]
        ids = [list(itertools.chain(*pieces)) for pieces in zip(*columns, strict=True)]
        texts = self.policy.batch_decode(ids, skip_special_tokens=True)
        return dict(self.tokenizer(texts, truncation=True, max_length=512, padding=True, return_tensors="pt"))


def critic_batch(read: Reader, rows: pa.Table, fresh: pa.Table, weights: Array | None = None) -> CriticBatch:
    """A batch of replayed rows and of ``fresh``, made by :func:`fresh_rows` or :func:`with_soft_advantages`."""
    soft = torch.tensor(fresh[SOFT].to_numpy()) if SOFT in fresh.column_names else None
    return CriticBatch(
        states=read(rows, "state"),
        utterances=read(rows, "utterance"),
        next_states=read(rows, "next_state"),
        rewards=torch.tensor(rows["reward"].to_numpy()),
        terminated=torch.tensor(rows["terminated"].to_numpy()),
        fresh_states=read(fresh, "state"),
        fresh_utterances=read(fresh, "utterance"),
        weights=None if weights is None else torch.tensor(weights, dtype=torch.float32),
        soft_advantages=soft,
    )
