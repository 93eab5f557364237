"""Asynchronous scheduling, as on a GPU: the next step is scheduled before the tokens of this one are known.

vLLM turns it off on CPUs. Here it stays on, with streams and events that do nothing, because a CPU has finished its
computation when a call returns. The scheduler, the queue of batches and the placeholder tokens are vLLM's own. float32.
"""

import contextlib

import numpy as np
import pytest
import torch
from conftest import letters
from test_engine import (
    STATE_TOLERANCE,
    STOP,
    assert_same,
    check_an_update_amid_requests,
    mixed_requests,
    reference,
    with_another_policy,
)

from cola_ray.rollout.engine import LatentEngine, Request


class Nothing:
    """Stands in for a CUDA stream or event."""

    device = torch.device("cpu")

    def __init__(self, *_, **__):
        pass

    def nothing(self, *_):
        pass

    record = synchronize = wait_stream = wait_event = nothing

    def query(self):
        return True


@pytest.fixture(scope="module")
def engine(cola_dir):
    from vllm.platforms.cpu import CpuPlatform

    settle = CpuPlatform.check_and_update_config

    def left_on(vllm_config):
        settle(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(left_on))
        patch.setattr(torch.cuda, "Event", Nothing)
        patch.setattr(torch.cuda, "Stream", Nothing)
        patch.setattr(torch.cuda, "current_stream", Nothing)
        patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        engine = LatentEngine(
            str(cola_dir), dtype="float32", max_model_len=160, stop_token_ids=[STOP], max_num_seqs=16, block_size=32,
            num_gpu_blocks_override=24, max_num_batched_tokens=96, keep_hidden_states=True, tokenizer=letters(),
        )  # fmt: skip
        yield engine
        engine.close()


def test_it_is_on(engine):
    core = engine.llm.llm_engine.engine_core.engine_core
    assert type(engine.scheduler).__name__ == "AsyncScheduler"
    assert core.batch_queue is not None
    engine.submit(Request([20, 21, 22], 0, 1.0, 0, 8))
    assert engine.step() == {}, "two steps are under way before the first is asked for its tokens"
    while engine.num_in_flight:
        engine.step()


def test_mixed_requests_equal_pytorch(engine, cola):
    """Per-row settings, forced actions, chunked prompts, shared prefixes, preemptions, ends by token and by limit."""
    requests = mixed_requests()[::2]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert_same(completion, reference(cola, request))
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids.tolist()[:-1]]])
        np.testing.assert_allclose(completion.hidden_states, cola.encode(ids)[0].detach().numpy(), atol=STATE_TOLERANCE)


def test_who_finishes_while_preempted_has_its_states_computed_again(engine, cola, monkeypatch):
    """The request is preempted while its last token is still being computed."""
    again, compute = [], engine._compute_states
    monkeypatch.setattr(engine, "_compute_states", lambda name, *args: (again.append(name), compute(name, *args)))
    requests = [Request([20 + i, *range(30, 70)], i, 1.0, 0, 8) for i in range(3)]
    names = [engine.submit(request) for request in requests]
    scheduler, finished = engine.scheduler, {}
    of_vllm = scheduler.requests[engine.in_flight[names[1]].engine_id]
    while of_vllm.num_output_tokens + of_vllm.num_output_placeholders < 8:
        finished |= engine.step()
    scheduler.running.remove(of_vllm)
    scheduler._preempt_request(of_vllm, 0.0)
    while engine.num_in_flight:
        finished |= engine.step()
    assert again == [names[1]]
    for name, request in zip(names, requests, strict=True):
        assert_same(finished[name], reference(cola, request))
        ids = torch.tensor([[*request.prompt_ids, *finished[name].token_ids.tolist()[:-1]]])
        np.testing.assert_allclose(finished[name].hidden_states, cola.encode(ids)[0].detach(), atol=STATE_TOLERANCE)
    assert not engine.last_blocks


def test_an_update_knows_where_the_step_under_way_begins(engine, cola):
    check_an_update_amid_requests(engine, cola, with_another_policy(cola), 6)


def test_slots_of_who_leaves_are_used_again(engine, cola):
    """A step under way still writes for a dropped request; the next request in its slot keeps its own actions."""
    stays = Request([30, 31, 32], 1, 1.0, 0, 24)
    name = engine.submit(stays)
    dropped = [engine.submit(Request([33 + i, 31, 32], 2 + i, 1.0, 0, 40)) for i in range(4)]
    finished = {}
    for _ in range(4):
        finished |= engine.step()
    for one in dropped:
        if one not in finished:
            engine.abort(one)
    later = [Request([60 + i, 61], 9 + i, 1.0, 0, 12) for i in range(4)]
    names = [engine.submit(request) for request in later]
    while engine.num_in_flight:
        finished |= engine.step()
    for one, request in zip([name, *names], [stays, *later], strict=True):
        assert_same(finished[one], reference(cola, request))
    assert engine.num_slots <= 32
    assert not engine.last_blocks
