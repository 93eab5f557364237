"""Tokens as actions: vLLM with a plain Llama draws as PyTorch does, and accepts full or LoRA weights. float32."""

import copy

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, letters, scramble, small_llama
from endings import check_what_ends_a_completion
from engines import ON_ACCELERATOR

from cola_ray.learner.policies import TokenPolicy
from cola_ray.model.modeling_cola import sample_actions
from cola_ray.rollout.engine import Request, TokenEngine
from cola_ray.weights import WeightSender, WeightTransferError

STOP = 7
LOG_PROB_TOLERANCE = 5e-5  # a forced token may lie at -30, where float32 has six digits


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request):
    return scramble(small_llama(tied=request.param)).eval()


@pytest.fixture(scope="module")
def engine(llama, tmp_path_factory):
    # Small blocks, a small cache and a small token budget: chunked prefill and preemption happen all the time.
    path = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(path)
    engine = TokenEngine(
        str(path), dtype="float32", max_model_len=160, stop_token_ids=[STOP], max_num_seqs=64, block_size=32,
        num_gpu_blocks_override=32, max_num_batched_tokens=160, disable_log_stats=False, tokenizer=letters(),
        **ON_ACCELERATOR,
    )  # fmt: skip
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def requests():
    """64 requests of mixed length, seed, temperature, truncation, forced tokens and budget."""
    draw = np.random.default_rng(3)
    return [
        Request(
            prompt_ids=draw.integers(8, VOCAB_SIZE, 1 + (i * 13) % 60).tolist(),
            seed=1000 + i,
            temperature=[1.0, 0.0, 0.7, 1.3][i % 4],
            top_k=[0, 0, 3, 9][(i // 4) % 4],
            top_p=[1.0, 0.8, 1.0][i % 3],
            max_new_tokens=10 + (i * 37) % 40,
            actions=[20 + i % 8] * (i % 3),
        )
        for i in range(64)
    ]


@torch.no_grad()
def reference(model, request):
    """PyTorch without a cache, token by token."""
    ids, log_probs = list(request.prompt_ids), []
    for step in range(request.max_new_tokens):
        forced = request.actions[step] if step < len(request.actions) else -1
        whole = [torch.tensor([value]) for value in (request.top_k, request.seed, len(ids) - 1, forced)]
        token, log_prob = sample_actions(
            model(torch.tensor([ids])).logits[:, -1], torch.tensor([request.temperature]), *whole,
            torch.tensor([request.top_p]),
        )  # fmt: skip
        ids.append(int(token))
        log_probs.append(float(log_prob))
        if ids[-1] == STOP:
            break
    return ids[len(request.prompt_ids) :], np.array(log_probs)


def assert_same(completion, expected):
    tokens, log_probs = expected
    assert completion.token_ids.tolist() == completion.actions.tolist() == tokens
    finite = np.isfinite(log_probs)  # a forced token outside the truncation has no finite score
    np.testing.assert_allclose(completion.log_probs[finite], log_probs[finite], atol=LOG_PROB_TOLERANCE)


def test_what_ends_a_completion(engine, llama, monkeypatch):
    check_what_ends_a_completion(engine, lambda request: reference(llama, request), STOP, monkeypatch)


def test_64_mixed_requests_equal_each_alone_and_pytorch(engine, llama, requests):
    together = engine.generate(requests)
    preemptions = sum(one.value for one in engine.llm.get_metrics() if one.name == "vllm:num_preemptions")
    assert preemptions > 0, "the cache was meant to be too small"
    assert {completion.truncated for completion in together} == {True, False}
    for request, completion in zip(requests, together, strict=True):
        assert_same(completion, reference(llama, request))
    for request, completion in list(zip(requests, together, strict=True))[::4]:
        assert engine.generate([request])[0].token_ids.tolist() == completion.token_ids.tolist()


def changed(model):
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
    for parameter in other.parameters():
        parameter.data += 0.1 * parameter.data.std().nan_to_num(1.0) * torch.randn(parameter.shape, generator=generator)
    return other


def tensors(policy):
    return [(one.name, one.merged(*(p.detach() for p in one.parameters))) for one in policy.published()]


def publish(engine, version, named):
    engine.update_weights(version, list(WeightSender(1 << 12).buckets(version, named)))


def test_all_weights_are_replaced_or_none(engine, llama):
    request, other = Request(list(range(20, 60)), 5, 1.0, 0, 12), changed(llama)
    publish(engine, 1, tensors(TokenPolicy(other)))
    assert_same(engine.generate([request])[0], reference(other, request))
    with pytest.raises(WeightTransferError, match="missing"):
        publish(engine, 2, tensors(TokenPolicy(llama))[:-1])
    assert_same(engine.generate([request])[0], reference(other, request))
    publish(engine, 3, tensors(TokenPolicy(llama)))
    assert_same(engine.generate([request])[0], reference(llama, request))


def test_adapters_arrive_merged(engine, llama, monkeypatch):
    request, policy = Request(list(range(20, 60)), 5, 1.0, 0, 12), TokenPolicy(copy.deepcopy(llama), lora_rank=4)
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    monkeypatch.setattr(engine, "adapters", True)
    publish(engine, 4, tensors(policy))
    expected = reference(policy.policy, request)
    assert expected[0] != reference(llama, request)[0]
    assert_same(engine.generate([request])[0], expected)
    monkeypatch.setattr(engine, "adapters", False)
    publish(engine, 5, tensors(TokenPolicy(llama)))
    assert_same(engine.generate([request])[0], reference(llama, request))
