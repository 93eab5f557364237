"""Actions that the policy ends: vLLM, PyTorch and the learner agree, through chunks, preemptions and weight updates.

As in ``test_held_engine.py``. float32 throughout.
"""

import asyncio
import copy

import numpy as np
import pytest
import torch
from conftest import ending
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
from test_held_engine import SMALL

from cola_ray.batch import Picked, as_groups, collate
from cola_ray.experience import Trajectory
from cola_ray.learner.micro_batch import Frozen, MicroBatch
from cola_ray.learner.objective import score
from cola_ray.learner.policies import LatentPolicy, forward
from cola_ray.model.modeling_cola import RANKED
from cola_ray.rollout.engine import LatentEngine, Request
from cola_ray.rollout.search import BeamSearch, SearchProblem, TreeSearch
from cola_ray.settings.config import SearchConfig


@pytest.fixture(scope="module")
def model(cola):
    return ending(cola)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("ends")
    model.save_pretrained(path)
    engine = LatentEngine(
        str(path), dtype="float32", max_model_len=160, stop_token_ids=[STOP], max_num_seqs=64, **SMALL, **ON_ACCELERATOR
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def made(engine):
    """Requests of uneven lengths, and their completions."""
    requests = mixed_requests()
    return requests, engine.generate(requests)


def test_an_engine_ends_what_pytorch_ends(engine, model, made):
    requests, together = made
    assert engine.learnt_ends
    assert preemptions(engine) > 0, "the cache was meant to be too small"
    again = engine.generate(requests)  # prefix cache hits
    lasted = 0
    for request, completion, second in zip(requests, together, again, strict=True):
        assert_same(completion, reference(model, request))
        assert second.actions.tolist() == completion.actions.tolist()
        lasted += int((completion.actions[1:] == completion.actions[:-1]).sum())
    tokens = sum(len(one.actions) for one in together)
    assert 0.1 * tokens < lasted < 0.9 * tokens


def test_a_prompt_may_go_on_with_its_last_action(engine):
    whole = engine.generate([Request(list(range(10, 30)), 3, 1.0, 0, 16)])[0]
    for cut in (1, 3, 5):
        prompt = [*range(10, 30), *whole.token_ids[:cut].tolist()]
        held = int(whole.actions[cut - 1])
        rest = engine.generate([Request(prompt, 3, 1.0, 0, 16 - cut, response_prefix=cut, held=held)])[0]
        assert rest.actions.tolist() == whole.actions[cut:].tolist(), "draws depend on positions"
        np.testing.assert_allclose(rest.log_probs, whole.log_probs[cut:], atol=LOG_PROB_TOLERANCE)


def test_new_weights_bring_the_ends(engine, model):
    other = with_another_policy(model)
    torch.nn.init.normal_(other.policy.end_head.weight, std=0.5)
    requests = [Request(list(range(20 + i, 40 + 2 * i)), 50 + i, 1.0, 0, 17) for i in range(8)]
    publish(engine, other, engine.version + 1)
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert_same(completion, reference(other, request))
    publish(engine, model, engine.version + 1)
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert_same(completion, reference(model, request))


def test_a_learner_scores_what_the_engine_chose(model, made):
    requests, completions = made
    chosen = [i for i, one in enumerate(requests) if not one.actions and not one.top_k and one.top_p == 1
              and one.temperature == 1.0]  # fmt: skip
    assert len(chosen) > 1
    trajectories = [
        Trajectory(
            np.array(requests[i].prompt_ids), completions[i].token_ids, completions[i].actions,
            completions[i].log_probs, completions[i].versions, float(i), False, "",
        )
        for i in chosen
    ]  # fmt: skip
    (group,) = as_groups([(0, trajectories, None)])
    (batch,) = collate(Picked.of_groups([group]), [one.reward for one in trajectories], 1, 0, 0, 10_000)
    batch = batch.fetched()
    one = MicroBatch.cut(batch, *batch.micro_batches[0], torch.device("cpu"))
    policy = LatentPolicy(copy.deepcopy(model))
    with torch.no_grad():
        logits, frozen = forward(policy, one, Frozen())
        scores = score(logits, frozen.reference_logits, one, 1.0, 0)
    difference = (scores.log_probs - one.rollout_log_probs)[one.action_mask].abs().max()
    assert float(difference) < LOG_PROB_TOLERANCE


@pytest.mark.parametrize("kind", [TreeSearch, BeamSearch])
def test_searches_go_on_with_the_action_that_led_to_a_node(kind, engine, model):
    """Each rollout is one that PyTorch makes with the whole response's actions, from its first token on."""
    prompt, asked = list(range(12, 30)), []

    async def complete(requests):
        made = engine.generate(requests)
        asked.extend(zip(requests, made, strict=True))
        return made

    async def scores(responses):
        return [float(sum(one.tolist()) % 17) for one in responses]

    def request(ids, seed, actions, new_tokens, held):
        return Request(ids, seed, 1.0, 0, new_tokens, actions, response_prefix=len(ids) - len(prompt), held=held)

    config = SearchConfig(simulations=12, breadth=3, root_breadth=3, depth=4, searchers=1)
    asyncio.run(kind(config, SearchProblem(prompt, 6, complete, scores, request, 16)).run())
    continued = [(one, made) for one, made in asked if one.response_prefix]
    assert len(continued) > 2
    for one, made in continued:
        first, held = torch.tensor([list(one.prompt_ids)]), torch.tensor([one.held])
        e = model.encode(first)
        assert int(model.world_model_logits(e[:, -2], held).argmax()) == one.prompt_ids[-1], "it gave the last token"
        logits = model.policy_logits(e, held=held[:, None].expand(1, e.shape[1]))[0, -1]
        rank = RANKED - one.actions[0]
        action = logits.argsort(descending=True, stable=True)[rank]
        assert int(action) == int(made.actions[0])
        assert float(logits.log_softmax(-1)[action]) == pytest.approx(float(made.log_probs[0]), abs=1e-4)
