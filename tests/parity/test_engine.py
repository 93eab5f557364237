"""vLLM and PyTorch choose the same actions and tokens; published weights arrive; stale caches are dropped.

One engine serves all tests here, under a GPU's contract (``accelerator.py``): starting it takes longer than using it.
float32 throughout. Unmodified CPU engines run in ``test_serve.py`` and in the system tests.
"""

import asyncio
import copy

import numpy as np
import pytest
import torch
from conftest import NUM_ACTIONS, VOCAB_SIZE, letters
from endings import check_what_ends_a_completion
from engines import ON_ACCELERATOR, ON_GPU
from vllm.exceptions import VLLMValidationError

from cola_ray.model.action_requests import BASE_TOKENS
from cola_ray.model.modeling_cola import RANKED
from cola_ray.rollout.batching import RunningBatch
from cola_ray.rollout.engine import LatentEngine, Request
from cola_ray.weights import WeightSender, WeightTransferError

STOP = 7
LOG_PROB_TOLERANCE = 5e-5
STATE_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def engine(cola_dir):
    # Small blocks, a small cache and a small token budget: chunked prefill and preemption happen all the time.
    engine = LatentEngine(
        str(cola_dir), dtype="float32", max_model_len=160, stop_token_ids=[STOP], max_num_seqs=64,
        block_size=32, num_gpu_blocks_override=32, max_num_batched_tokens=160, disable_log_stats=False,
        keep_hidden_states=True, tokenizer=letters(), **ON_ACCELERATOR,
    )  # fmt: skip
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def requests():
    return mixed_requests()


def mixed_requests():
    """64 requests of mixed length, seed, temperature, truncation, forced actions and budget; some share a prefix."""
    draw = np.random.default_rng(3)
    shared = draw.integers(8, VOCAB_SIZE, 40).tolist()
    return [
        Request(
            prompt_ids=(shared if i % 4 == 0 else []) + draw.integers(8, VOCAB_SIZE, 1 + (i * 13) % 60).tolist(),
            seed=1000 + i,
            temperature=[1.0, 0.0, 0.7, 1.3][i % 4],
            top_k=[0, 0, 3, 9][(i // 4) % 4],
            top_p=[1.0, 0.8, 1.0][i % 3],
            max_new_tokens=10 + (i * 37) % 40,
            actions=[(i + t) % NUM_ACTIONS for t in range(i % 12)] if i % 5 == 0 else [RANKED - i % 4] * (i % 3),
        )
        for i in range(64)
    ]


def reference(model, request):
    forced = torch.tensor([list(request.actions)]) if request.actions else None
    columns = model.generate_latent(
        torch.tensor([request.prompt_ids]), max_new_tokens=request.max_new_tokens, temperature=request.temperature,
        top_k=request.top_k, top_p=request.top_p, seed=request.seed, actions=forced, eos_token_id=STOP,
    )  # fmt: skip
    return [column[0].numpy() for column in columns]


def assert_same(completion, expected):
    tokens, actions, log_probs = expected
    assert completion.token_ids.tolist() == tokens.tolist()
    assert completion.actions.tolist() == actions.tolist()
    finite = np.isfinite(log_probs)  # a forced action outside the truncation has no finite score
    np.testing.assert_allclose(completion.log_probs[finite], log_probs[finite], atol=LOG_PROB_TOLERANCE)


@pytest.mark.skipif(ON_GPU, reason="there vLLM measures what is free")
def test_the_cache_is_as_large_as_it_is_said_to_be(engine):
    assert engine.llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes == 256 << 20


def preemptions(engine):
    return sum(metric.value for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_64_mixed_requests_equal_each_alone_and_pytorch(engine, cola, requests):
    together = engine.generate(requests)
    assert preemptions(engine) > 0, "the cache was meant to be too small"
    assert {completion.truncated for completion in together} == {True, False}
    again = engine.generate(requests)  # prefix cache hits
    backwards = engine.generate(requests[::-1])[::-1]
    for request, completion, second, third in zip(requests, together, again, backwards, strict=True):
        expected = reference(cola, request)
        assert_same(completion, expected)
        for other in (second, third, engine.generate([request])[0]):
            assert other.token_ids.tolist() == completion.token_ids.tolist()
            assert other.actions.tolist() == completion.actions.tolist()
        # The returned states are always the base's, also for cached prefixes and preempted requests.
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids.tolist()[:-1]]])
        e = cola.encode(ids)[0].detach().numpy()
        for found in (completion, second, third):
            np.testing.assert_allclose(found.hidden_states, e, atol=STATE_TOLERANCE)


def test_what_ends_a_completion(engine, cola, monkeypatch):
    check_what_ends_a_completion(engine, lambda request: reference(cola, request), STOP, monkeypatch)


def test_bare_base_on_request(engine, cola):
    prompt = list(range(10, 22))
    found = engine.generate([Request(prompt, 0, 0.0, 0, 6, actions=[BASE_TOKENS] * 6)])[0]
    sequence = torch.tensor([prompt])
    for token in found.token_ids:
        expected = cola.lm_head(cola.encode(sequence)[:, -1]).argmax(-1)
        assert token == expected.item()
        sequence = torch.cat([sequence, expected[None]], 1)


def test_impossible_wishes_are_refused(engine):
    with pytest.raises(VLLMValidationError, match="action_temperature"):
        engine.generate([Request([9, 10], 0, -1.0, 0, 3)])


def policy_tensors(model):
    return [(f"policy.{name}", tensor) for name, tensor in model.policy.state_dict().items()]


def publish(engine, model, version):
    engine.update_weights(version, list(WeightSender(1 << 12).buckets(version, policy_tensors(model))))


def with_another_policy(cola):
    """The same model with a slightly different policy."""
    model = copy.deepcopy(cola)
    generator = torch.Generator().manual_seed(9)
    for parameter in model.policy.parameters():
        parameter.data += 0.1 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def other(cola):
    return with_another_policy(cola)


def test_published_weights_reach_the_engine(engine, cola, other):
    request = Request(list(range(20, 60)), 5, 1.0, 0, 12)
    before = engine.generate([request])[0]
    assert_same(before, reference(cola, request))
    publish(engine, other, 1)
    after = engine.generate([request])[0]
    assert engine.version == 1
    assert_same(after, reference(other, request))
    assert not np.allclose(before.log_probs[:1], after.log_probs[:1], atol=1e-3)
    publish(engine, cola, 2)
    assert_same(engine.generate([request])[0], reference(cola, request))


def test_requests_in_flight_continue_on_new_weights(engine, cola, other):
    """Tokens before the update come from the old policy and later ones from the new, exactly as in PyTorch."""
    check_an_update_amid_requests(engine, cola, other, 5)


def check_an_update_amid_requests(engine, cola, other, steps):
    """Check an update after this many engine steps."""
    requests = [Request(list(range(20 + i, 40 + i)), 50 + i, 1.0, 0, 16) for i in range(8)]
    ids = [engine.submit(request) for request in requests]
    finished = {}
    for _ in range(steps):
        finished |= engine.step()
    assert engine.num_in_flight
    publish(engine, other, 10)
    while engine.num_in_flight:
        finished |= engine.step()
    mixed = 0
    for name, request in zip(ids, requests, strict=True):
        completion = finished[name]
        old = int((completion.versions != 10).sum())
        assert sorted(completion.versions == 10) == list(completion.versions == 10), "versions only grow"
        mixed += 0 < old < len(completion.versions)
        assert_same(completion, replayed(cola, other, request, old))
    assert mixed >= 2, "the update was meant to fall amid the requests"
    publish(engine, cola, 11)


def replayed(first, second, request, switch):
    """PyTorch without a cache, token by token: ``switch`` steps by the first model, the rest by the second."""
    ids, columns = list(request.prompt_ids), ([], [], [])
    for step in range(request.max_new_tokens):
        model = first if step < switch else second
        found = model.generate_latent(torch.tensor([ids]), max_new_tokens=1, temperature=1.0, seed=request.seed)
        for column, value in zip(columns, found, strict=True):
            column.append(value[0, 0].item())
        ids.append(columns[0][-1])
        if ids[-1] == STOP:
            break
    return [np.array(column) for column in columns]


def test_prefix_cache_must_be_dropped_with_the_old_policy(engine, cola, other, monkeypatch):
    """Without the reset, a cached prompt would use the old policy's keys and values."""
    request = Request(list(range(20, 84)), 5, 0.0, 0, 4)
    engine.generate([request])  # fills the cache under the old policy
    with monkeypatch.context() as patch:
        patch.setattr(engine, "reset_prefix_cache", lambda: None)
        publish(engine, other, 3)
    expected = reference(other, request)[2]
    stale = engine.generate([request])[0].log_probs
    assert np.abs(stale[0] - expected[0]) > 1e-3, "the stale cache should have shown"
    engine.reset_prefix_cache()
    np.testing.assert_allclose(engine.generate([request])[0].log_probs, expected, atol=LOG_PROB_TOLERANCE)
    publish(engine, cola, 4)


def test_an_incomplete_update_changes_nothing(engine, cola):
    request = Request(list(range(20, 40)), 5, 1.0, 0, 6)
    with pytest.raises(WeightTransferError, match=r"missing \['policy.head.weight'\]"):
        engine.update_weights(9, list(WeightSender().buckets(9, policy_tensors(cola)[:-1])))
    assert engine.version != 9
    assert_same(engine.generate([request])[0], reference(cola, request))


def test_turns_of_many_episodes_share_steps(engine, monkeypatch):
    """Eight concurrent episodes of three turns take hardly more steps than one; a refused request fails alone."""
    batch, steps, step = RunningBatch(engine, drain=True), [0], engine.step

    def counted():
        steps[0] += 1
        return step()

    monkeypatch.setattr(engine, "step", counted)

    async def episode(number):
        ids = list(range(20, 30 + number))
        for turn in range(3):
            (said,) = await batch.complete([Request(ids, 8 * number + turn, 1.0, 0, 5)])
            ids += said.token_ids.tolist()
        return ids

    async def all_of_them():
        refused = batch.complete([Request([20] * 4096, 0, 1.0, 0, 5)])
        *played, failure = await asyncio.gather(*(episode(n) for n in range(8)), refused, return_exceptions=True)
        assert isinstance(failure, VLLMValidationError)
        return played

    together = asyncio.run(all_of_them())
    assert steps[0] < 2 * 3 * 5, "by turns they would take 8 x 3 x 5"
    batch = RunningBatch(engine, drain=True)
    assert asyncio.run(episode(3)) == together[3]
    batch = RunningBatch(engine, drain=True)
    with pytest.raises(VLLMValidationError):  # also alone, when there is nothing to step
        asyncio.run(batch.complete([Request([20] * 4096, 0, 1.0, 0, 5)]))


def test_who_is_cancelled_leaves_the_engine_and_the_others_stay(engine, cola):
    """As when a search runs out of time: within a few steps, long before its requests would have ended."""
    batch = RunningBatch(engine, drain=True)
    stays, goes = (Request([30 + i, 31, 32], i, 1.0, 0, 60, [3] * 60) for i in range(2))

    async def play():
        staying = asyncio.create_task(batch.complete([stays]))
        going = asyncio.create_task(batch.complete([goes, goes]))
        while engine.num_in_flight < 3:
            await asyncio.sleep(0.001)
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)
        while engine.num_in_flight == 3:
            await asyncio.sleep(0.001)
        assert engine.num_in_flight == 1
        assert not staying.done()
        return await staying

    (completion,) = asyncio.run(play())
    assert_same(completion, reference(cola, stays))
    assert not engine.num_in_flight
    assert not engine.last_blocks
