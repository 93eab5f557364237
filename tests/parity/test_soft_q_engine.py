"""Actions from ``rho exp(Q / beta) / Z`` inside vLLM equal PyTorch's, before and after a Q arrives. float32."""

import copy

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, scramble
from engines import ON_ACCELERATOR

from cola_ray import CoLAForCausalLM
from cola_ray.algorithms.etpo import best_log_probs
from cola_ray.learner.policies import SoftQPolicy
from cola_ray.rollout.engine import LatentEngine, Request
from cola_ray.weights import WeightSender, WeightTransferError

STOP, BETA = 7, 0.1
LOG_PROB_TOLERANCE = 5e-5  # logits contain Q / beta, ten times Q and its rounding


@pytest.fixture(scope="module")
def engine(cola_dir):
    engine = LatentEngine(
        str(cola_dir), dtype="float32", max_model_len=96, stop_token_ids=[STOP], max_num_seqs=16, block_size=32,
        soft_q_beta=BETA, **ON_ACCELERATOR,
    )  # fmt: skip
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def soft(cola):
    """The same model with a Q that changes most choices."""
    model = copy.deepcopy(cola)
    model.enable_soft_q(BETA)
    scramble(model.policy.soft_q)
    return model


@pytest.fixture(scope="module")
def requests():
    draw = np.random.default_rng(5)
    return [
        Request(draw.integers(8, VOCAB_SIZE, 3 + i % 20).tolist(), 50 + i, [1.0, 0.0, 0.7][i % 3], 0, 12)
        for i in range(24)
    ]


def reference(model, request):
    columns = model.generate_latent(
        torch.tensor([request.prompt_ids]), max_new_tokens=request.max_new_tokens, temperature=request.temperature,
        top_k=request.top_k, seed=request.seed, eos_token_id=STOP,
    )  # fmt: skip
    return [column[0].numpy() for column in columns]


def assert_all_equal(completions, model, requests):
    for completion, request in zip(completions, requests, strict=True):
        tokens, actions, log_probs = reference(model, request)
        assert completion.token_ids.tolist() == tokens.tolist()
        assert completion.actions.tolist() == actions.tolist()
        np.testing.assert_allclose(completion.log_probs, log_probs, atol=LOG_PROB_TOLERANCE)


def test_rho_acts_until_a_q_arrives_and_then_both(engine, cola, soft, requests):
    before = engine.generate(requests)
    assert_all_equal(before, cola, requests)
    learner = SoftQPolicy(copy.deepcopy(soft), BETA)
    tensors = [(one.name, one.parameters[0].detach()) for one in learner.published()]
    with pytest.raises(WeightTransferError):
        engine.update_weights(1, list(WeightSender().buckets(1, tensors[:-1])))
    engine.update_weights(1, list(WeightSender().buckets(1, tensors)))
    after = engine.generate(requests)
    assert_all_equal(after, soft, requests)
    assert any(a.actions.tolist() != b.actions.tolist() for a, b in zip(before, after, strict=True))


def test_the_learner_scores_what_acts(cola, soft):
    ids = torch.randint(8, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    module = SoftQPolicy(copy.deepcopy(soft), BETA)
    q, e, reference, _ = module(ids, mask, mask.bool())
    torch.testing.assert_close(reference, cola.policy_logits(e, mask).flatten(0, 1))
    torch.testing.assert_close(
        best_log_probs(q, reference.log_softmax(-1), BETA), soft.policy_logits(e, mask).flatten(0, 1).log_softmax(-1)
    )
    assert q.abs().max() > BETA


def test_a_saved_q_is_a_part_of_the_model(soft, tmp_path):
    soft.save_pretrained(tmp_path)
    again = CoLAForCausalLM.from_pretrained(tmp_path)
    assert again.config.soft_q_beta == BETA
    for name, tensor in soft.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="soft_q_beta"):
        again.export_released(tmp_path / "released")
