"""Held actions: vLLM, PyTorch and the learner hold the same ones, through chunks, preemptions and weight updates.

As in ``test_engine.py``, with models whose actions last 2 and 3 tokens. float32 throughout.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import ON_ACCELERATOR
from test_engine import (
    LOG_PROB_TOLERANCE,
    STOP,
    assert_same,
    mixed_requests,
    preemptions,
    publish,
    reference,
    with_another_policy,
)

from cola_ray.batch import Picked, as_groups, collate
from cola_ray.experience import Trajectory
from cola_ray.learner.micro_batch import Frozen, MicroBatch
from cola_ray.learner.objective import score
from cola_ray.learner.policies import LatentPolicy, forward
from cola_ray.rollout.engine import LatentEngine, Request
from cola_ray.rollout.worker import RolloutWorker

SMALL = {"block_size": 32, "num_gpu_blocks_override": 32, "max_num_batched_tokens": 160, "disable_log_stats": False}
"""Chunked prefill and preemption happen all the time."""


@pytest.fixture(scope="module", params=[2, 3])
def held_dir(request, cola, tmp_path_factory):
    model = copy.deepcopy(cola)
    model.config.action_every = request.param
    path = tmp_path_factory.mktemp("held")
    model.save_pretrained(path)
    return path, model


@pytest.fixture(scope="module")
def held(held_dir):
    path, model = held_dir
    engine = LatentEngine(
        str(path), dtype="float32", max_model_len=160, stop_token_ids=[STOP], max_num_seqs=64, **SMALL, **ON_ACCELERATOR
    )
    yield engine, model
    engine.close()


@pytest.fixture(scope="module")
def made(held):
    """Requests of uneven lengths, and their completions."""
    engine, _ = held
    requests = mixed_requests()
    return requests, engine.generate(requests)


def test_an_engine_holds_what_pytorch_holds(held, made):
    engine, model = held
    every, (requests, together) = model.config.action_every, made
    assert engine.action_every == every
    assert preemptions(engine) > 0, "the cache was meant to be too small"
    again = engine.generate(requests)  # prefix cache hits
    for request, completion, second in zip(requests, together, again, strict=True):
        assert_same(completion, reference(model, request))
        assert second.actions.tolist() == completion.actions.tolist()
        places = np.arange(len(completion.actions))
        assert completion.actions.tolist() == completion.actions[places - places % every].tolist()
        assert not completion.log_probs[places % every != 0].any()
    assert any(len(one.actions) % every for one in together), "some were meant to end amid an action"
    assert any(len({*one.actions.tolist()}) > 1 for one in together)


def test_a_prompt_that_ends_amid_an_action_is_refused(held):
    engine, model = held
    every = model.config.action_every
    with pytest.raises(ValueError, match=f"response_prefix = {every + 1}: an action lasts {every} tokens"):
        engine.generate([Request(list(range(10, 30)), 0, 1.0, 0, 4, response_prefix=every + 1)])
    whole = engine.generate([Request(list(range(10, 30)), 0, 1.0, 0, 3 * every)])[0]
    rest = Request([*range(10, 30), *whole.token_ids[:every].tolist()], 0, 1.0, 0, 2 * every, response_prefix=every)
    assert engine.generate([rest])[0].actions.tolist() == whole.actions[every:].tolist(), "draws depend on positions"


def test_an_action_is_held_through_a_weight_update(held):
    """An action chosen before the update is held after it, with the version that chose it."""
    engine, model = held
    every, other = model.config.action_every, with_another_policy(model)
    requests = [Request(list(range(20 + i, 40 + 2 * i)), 50 + i, 1.0, 0, 17) for i in range(8)]
    amid, before = 0, engine.version
    for steps, version in ((5, 10), (6, 12), (8, 14)):
        ids, finished = [engine.submit(one) for one in requests], {}
        for _ in range(steps):
            finished |= engine.step()
        counts = [engine.scheduler.requests[one.engine_id].num_output_tokens for one in engine.in_flight.values()]
        amid += sum(count % every != 0 for count in counts)
        publish(engine, other, version)
        while engine.num_in_flight:
            finished |= engine.step()
        for name, request in zip(ids, requests, strict=True):
            completion = finished[name]
            old = int((completion.versions != version).sum())
            assert sorted(completion.versions == version) == list(completion.versions == version), "versions only grow"
            assert old % every == 0 or old == len(completion.versions)
            assert_same(completion, replayed(model, other, request, old))
        publish(engine, model, version + 1)
    assert amid > 3, "updates were meant to fall amid actions"
    assert before < engine.version


def replayed(first, second, request, switch):
    """PyTorch without a cache, token by token: decisions before ``switch`` by one model, the rest by the other."""
    ids, columns = list(request.prompt_ids), ([], [], [])
    for step in range(request.max_new_tokens):
        between = step % first.config.action_every != 0
        model = first if step < switch else second
        found = model.generate_latent(
            torch.tensor([ids]), max_new_tokens=1, temperature=1.0, seed=request.seed,
            actions=torch.tensor([[columns[1][-1]]]) if between else None,
        )  # fmt: skip
        for column, value in zip(columns, found, strict=True):
            column.append(value[0, 0].item())
        if between:
            columns[2][-1] = 0.0
        ids.append(columns[0][-1])
        if ids[-1] == STOP:
            break
    return [np.array(column) for column in columns]


def test_a_learner_scores_what_the_engine_chose(held, made):
    """At decisions, log-probabilities equal the engine's; other positions do not count; the last has the reward."""
    engine, model = held
    every, (requests, completions) = model.config.action_every, made
    chosen = [i for i, one in enumerate(requests) if not one.actions and not one.top_k and one.top_p == 1
              and one.temperature == 1.0]  # fmt: skip
    assert len(chosen) > 1
    worker = RolloutWorker.__new__(RolloutWorker)
    worker.config = SimpleNamespace(model=SimpleNamespace(action_every=engine.action_every))
    made = [
        worker._with_decisions(Trajectory(
            np.array(requests[i].prompt_ids), completions[i].token_ids, completions[i].actions,
            completions[i].log_probs, completions[i].versions, float(i), False, "",
        ))
        for i in chosen
    ]  # fmt: skip
    (group,) = as_groups([(0, made, None)])
    decisions = [-(-len(one.actions) // every) for one in made]
    assert int(group.actions.counts.sum()) == sum(decisions)
    (batch,) = collate(Picked.of_groups([group]), [one.reward for one in made], 1, 0, 0, 10_000)
    assert batch.num_actions_global == sum(decisions)
    batch = batch.fetched()
    one = MicroBatch.cut(batch, *batch.micro_batches[0], torch.device("cpu"))
    assert int(one.action_mask.sum()) == sum(decisions)
    policy = LatentPolicy(copy.deepcopy(model))
    with torch.no_grad():
        logits, frozen = forward(policy, one, Frozen())
        scores = score(logits, frozen.reference_logits, one, 1.0, 0)
    assert len(logits) == sum(decisions), "no logits where nothing is decided"
    difference = (scores.log_probs - one.rollout_log_probs)[one.action_mask].abs().max()
    assert float(difference) < LOG_PROB_TOLERANCE
    assert not scores.log_probs[~one.action_mask].any()
    assert not one.rewards[~one.action_mask].any()
    torch.testing.assert_close(one.rewards.sum(1), torch.from_numpy(batch.advantages))
