"""MCTS-Q's values: double Q-learning against dynamic programming on a chain, and where a search may jump."""

import dataclasses
import itertools
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cola_ray.algorithms.double_q import double_q_values, first_decision, square_errors
from cola_ray.learner.engine import NonFiniteError
from cola_ray.learner.logged_q import LoggedQLearner, load_log
from cola_ray.model.modeling_cola import QHead
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

pytestmark = pytest.mark.usefixtures("alone")
K, LENGTH, GAMMA = 2, 3, 0.9
PREFIXES = [prefix for n in range(LENGTH + 1) for prefix in itertools.product(range(K), repeat=n)]
SEQUENCES = [prefix for prefix in PREFIXES if len(prefix) == LENGTH]


class Table(torch.nn.Module):
    """States that are one-hot: a token is the action that led to it."""

    config = types.SimpleNamespace(hidden_size=len(PREFIXES), num_actions=K, pad_token_id=0, lasting="")

    def encode(self, ids, attention_mask):
        e = torch.zeros(*ids.shape, len(PREFIXES))
        for row, column in itertools.product(*map(range, ids.shape)):
            if attention_mask[row, column]:
                e[row, column, PREFIXES.index(tuple(ids[row, 1 : column + 1].tolist()))] = 1
        return e


def reward_of(sequence):
    return float(np.random.default_rng(SEQUENCES.index(sequence)).normal())


def best_values():
    """Q*(prefix, a) by backing up from the ends."""
    values, q = {sequence: 0.0 for sequence in SEQUENCES}, {}
    for prefix in reversed([prefix for prefix in PREFIXES if len(prefix) < LENGTH]):
        for action in range(K):
            after = (*prefix, action)
            q[prefix, action] = reward_of(after) if len(after) == LENGTH else GAMMA * values[after]
        values[prefix] = max(q[prefix, action] for action in range(K))
    return q


def write_log(folder, sequences, rewards, actions=None, **more):
    folder.mkdir(exist_ok=True)
    row = {
        "prompt_ids": [7], "token_ids": [list(s) for s in sequences], "rewards": list(rewards),
        "actions": actions or [list(s) for s in sequences], **more,
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), folder / "000000.parquet")
    return str(folder)


def test_q_of_random_answers_is_the_best_answers(tmp_path):
    log = load_log(write_log(tmp_path / "log", SEQUENCES, map(reward_of, SEQUENCES)))
    config = override(preset("tiny"), {"q.gamma": GAMMA, "q.copy_every": 20})
    learner = LoggedQLearner(config, Table(), torch.device("cpu"))
    for step in range(1200):
        learner.step(log, 3e-3 if step < 900 else 3e-4, step)
    for (prefix, action), wanted in best_values().items():
        e = torch.zeros(len(PREFIXES))
        e[PREFIXES.index(prefix)] = 1
        assert learner.online(e)[action].item() == pytest.approx(wanted, abs=0.02), (prefix, action)
    measured = learner.measure(log)
    assert measured["loss"] < 1e-3
    assert 0 < measured["correlation"] <= 1


def test_a_checkpoint_and_a_file_bring_everything_back(tmp_path):
    log = load_log(write_log(tmp_path / "log", SEQUENCES, map(reward_of, SEQUENCES)))
    learners = [LoggedQLearner(preset("tiny"), Table(), torch.device("cpu")) for _ in range(2)]
    for step in range(3):
        learners[0].step(log, 1e-3, step)
    learners[0].save(tmp_path, 3)
    assert learners[1].load(tmp_path) == 3
    assert learners[0].step(log, 1e-3, 3) == learners[1].step(log, 1e-3, 3)
    learners[0].online.save(tmp_path / "q.safetensors")
    e = torch.randn(4, len(PREFIXES))
    assert torch.equal(QHead.open(tmp_path / "q.safetensors")(e), learners[0].online(e))
    assert torch.equal(learners[1].online(e), learners[0].online(e)), "the same step after loading"


def test_a_reward_that_is_not_finite_stops_before_the_step(tmp_path):
    with pytest.raises(ValueError, match=r"row 1, field rewards: response 1 has nan; leave it out"):
        load_log(write_log(tmp_path / "poisoned", SEQUENCES[:1], [float("nan")]))
    (answer,) = load_log(write_log(tmp_path / "log", SEQUENCES[:1], [1.0]))
    log = [dataclasses.replace(answer, reward=float("nan"))]
    learner = LoggedQLearner(preset("tiny"), Table(), torch.device("cpu"))
    before = [p.clone() for p in learner.online.parameters()]
    with pytest.raises(NonFiniteError, match="q/loss is nan; is there a reward that is not finite"):
        learner.step(log, 1e-3, 0)
    assert all(map(torch.equal, before, learner.online.parameters()))


def test_a_log_without_actions_is_refused(tmp_path):
    sequences = [(0, 1, 1), (1, 0, 0)]
    inherited = write_log(tmp_path / "a", sequences, [1.0, 0.0], [[-1, 1, 1], [-1, -1, -1]])
    (kept,) = load_log(inherited)
    assert kept.action_mask.tolist() == [False, True, True], "another rollout's actions are not known"
    failing = write_log(tmp_path / "d", sequences, [0.0, 1.0], failures=["took too long", ""])
    assert [one.reward for one in load_log(failing)] == [1.0], "a failed score is no reward of 0"
    with pytest.raises(ValueError, match="no answer with recorded actions"):
        load_log(write_log(tmp_path / "b", sequences[:1], [1.0], [[-1, -1, -1]]))
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "c" / "x.parquet")
    with pytest.raises(ValueError, match="no columns prompt_ids, token_ids, actions, rewards; give a folder that"):
        load_log(str(tmp_path / "c"))


def test_the_online_heads_choice_at_the_targets_price():
    assert double_q_values(torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 4.0]])).tolist() == [4.0]


def test_errors_and_where_they_let_a_search_go():
    q = torch.tensor([[1.0, 0.0], [2.0, 5.0], [0.0, 5.0]])
    assert square_errors(q, torch.tensor([0, 1, 0]), 1.0).tolist() == [16.0, 0.0]
    assert first_decision(torch.tensor([9.0, 0, 0, 9, 0]), 1.0, 64) == 3
    assert first_decision(torch.tensor([9.0, 0, 0, 9, 0]), 1.0, 2) == 2, "no further than the limit"
    assert first_decision(torch.tensor([9.0, 0.0]), 1.0, 64) == 3, "to the end where nothing is decided"
    assert first_decision(torch.tensor([]), 1.0, 64) == 1
