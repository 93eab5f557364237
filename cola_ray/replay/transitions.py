"""Episodes as replay rows, and replay rows as what the critic reads: columns on both sides.

    Episode of n turns ─> n rows (s, u, r, s', terminated) with the base's features of s, u and s'

The base is frozen, so its features never go stale. What a limit cut keeps ``terminated`` false, and the features of its
last state stand for s'.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from cola_ray.experience import Episode
from cola_ray.replay.critic import CriticBatch

Array = np.ndarray


def schema(width: int) -> pa.Schema:
    """Of the rows, for features of this width."""
    features = pa.list_(pa.float32(), width)
    return pa.schema({
        "state_ids": pa.list_(pa.int32()), "utterance_ids": pa.list_(pa.int32()), "actions": pa.list_(pa.int16()),
        "reward": pa.float32(), "terminated": pa.bool_(), "position": pa.int64(), "turn": pa.int16(),
        "version": pa.int32(), "total_reward": pa.float32(),
        "state": features, "utterance": features, "next_state": features,
    })  # fmt: skip


def as_rows(episodes: Sequence[Episode], width: int) -> pa.Table:
    """One row a turn, in order. Episodes without features, or that failed, are a mistake here: ValueError."""
    for episode in episodes:
        if episode.failure or not episode.turns or episode.turns[0].state_features is None:
            raise ValueError(f"episode {episode.position} has no features to learn from: {episode.failure}")
    turns = [(episode, number, turn) for episode in episodes for number, turn in enumerate(episode.turns)]
    after = [
        (episode.turns[number + 1].state_features if number + 1 < len(episode.turns) else episode.final_features)
        for episode, number, _ in turns
    ]
    nowhere = np.zeros(width, np.float32)  # what follows an end is never looked at
    columns = {
        "state_ids": [turn.state_ids for _, _, turn in turns],
        "utterance_ids": [turn.token_ids for _, _, turn in turns],
        "actions": [turn.actions for _, _, turn in turns],
        "reward": [turn.reward for _, _, turn in turns],
        "terminated": [episode.terminated and number + 1 == len(episode.turns) for episode, number, _ in turns],
        "position": [episode.position for episode, _, _ in turns],
        "turn": [number for _, number, _ in turns],
        "total_reward": [episode.total_reward for episode, _, _ in turns],
        "version": [int(turn.versions[0]) for _, _, turn in turns],
    }
    of_features = {
        "state": [turn.state_features for _, _, turn in turns],
        "utterance": [turn.utterance_features for _, _, turn in turns],
        "next_state": after,
    }
    kinds = schema(width)
    arrays = {name: pa.array(values, kinds.field(name).type) for name, values in columns.items()}
    for name, values in of_features.items():
        stacked = np.stack([nowhere if one is None else one for one in values])
        arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(stacked.astype(np.float32).ravel()), width)
    return pa.table(arrays, schema=kinds)


def features(rows: pa.Table, name: str) -> Array:
    """A column of features as (rows, width) float32."""
    column = rows[name].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def critic_batch(
    rows: pa.Table, fresh_states: Array, fresh_utterances: Array, weights: Array | None = None
) -> CriticBatch:
    """Replayed rows, and states with their fresh utterances as features (B', width)."""
    return CriticBatch(
        states=torch.tensor(features(rows, "state")),
        utterances=torch.tensor(features(rows, "utterance")),
        next_states=torch.tensor(features(rows, "next_state")),
        rewards=torch.tensor(rows["reward"].to_numpy()),
        terminated=torch.tensor(rows["terminated"].to_numpy()),
        fresh_states=torch.tensor(fresh_states),
        fresh_utterances=torch.tensor(fresh_utterances),
        weights=None if weights is None else torch.tensor(weights, dtype=torch.float32),
    )
