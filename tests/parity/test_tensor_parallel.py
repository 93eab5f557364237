"""An engine of two processes behaves like one of one process, under a GPU's contract: CPU processes, float32."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm
from conftest import NUM_ACTIONS, VOCAB_SIZE, free_port
from engines import ON_ACCELERATOR

from cola_ray.model.vllm_rows import RowTable
from cola_ray.rollout.engine import LatentEngine, Request, prepare_process
from cola_ray.weights import Broadcast, Channel, Offer, WeightSender, WeightTransferError

STOP = 7
TOLERANCE = 2e-5  # two halves are added in another order; the difference depends on the processor
REQUESTS = [
    Request(
        np.random.default_rng(i).integers(8, VOCAB_SIZE, 3 + 9 * i).tolist(), 1000 + i, [1.0, 0.7][i % 2], 0, 16,
        actions=[(i + t) % NUM_ACTIONS for t in range(i % 3)],
    )
    for i in range(8)
]  # fmt: skip


@pytest.fixture(autouse=True)
def environment_of_processes(monkeypatch):
    """Let the engine's processes import the contract by name, and compile nothing."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="module")
def versions(cola):
    """Two more policies for the same model, each as (name, tensor) pairs."""
    found, generator = [], torch.Generator().manual_seed(9)
    for _ in range(2):
        policy = copy.deepcopy(cola.policy)
        for parameter in policy.parameters():
            parameter.data += 0.1 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
        found.append([(f"policy.{name}", tensor) for name, tensor in policy.state_dict().items()])
    return found


def receive(engine, version, tensors, members):
    """Let the engine receive ``tensors`` by a broadcast to its ``members`` processes."""
    channel = Channel("localhost", free_port(), 1 + members)
    manifest = tuple((n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors)

    def send():
        end = Broadcast()
        end.join(channel, 0, torch.device("cpu"))
        return len(list(end.send(tensors)))

    with ThreadPoolExecutor() as threads:
        sending = threads.submit(send)
        engine.receive_weights(Offer(version, channel, 1, manifest))
        assert sending.result(timeout=60) == len(tensors)


def completions(path, members, versions):
    """Completions of three policies: the first, one sent in buckets while requests run, and one sent by broadcast."""
    engine = LatentEngine(
        str(path), dtype="float32", max_model_len=128, stop_token_ids=[STOP], max_num_seqs=16, block_size=32,
        num_gpu_blocks_override=32, max_num_batched_tokens=96, keep_hidden_states=True, kv_cache_mb=64,
        tensor_parallel_size=members, **ON_ACCELERATOR,
    )  # fmt: skip
    try:
        found = engine.generate(REQUESTS)
        with pytest.raises(WeightTransferError, match=r"missing \['policy.head.weight'\]"):
            engine.update_weights(1, list(WeightSender().buckets(1, versions[0][:-1])))
        names = [engine.submit(request) for request in REQUESTS]
        finished = {}
        for _ in range(6):
            finished |= engine.step()
        engine.update_weights(1, list(WeightSender().buckets(1, versions[0])))
        while engine.num_in_flight:
            finished |= engine.step()
        found += [finished[name] for name in names]
        receive(engine, 2, versions[1], members)
        return found + engine.generate(REQUESTS)
    finally:
        engine.close()


def test_two_processes_complete_and_update_as_one(cola_dir, versions):
    one, two = (completions(cola_dir, members, versions) for members in (1, 2))
    assert {version for made in one for version in made.versions.tolist()} == {0, 1, 2}
    for single, split in zip(one, two, strict=True):
        assert split.token_ids.tolist() == single.token_ids.tolist()
        assert split.actions.tolist() == single.actions.tolist()
        assert split.versions.tolist() == single.versions.tolist()
        np.testing.assert_allclose(split.log_probs, single.log_probs, atol=TOLERANCE)
        np.testing.assert_allclose(split.hidden_states, single.hidden_states, atol=TOLERANCE)


def seeds(worker):
    table = RowTable.of(worker.vllm_config)
    return table.settings.integers[1].tolist()


def test_processes_of_a_server_draw_the_same_actions(cola_dir):
    """Also for requests without a seed, each of which gets a different one."""
    prepare_process(1)
    llm = vllm.LLM(
        str(cola_dir), dtype="float32", max_model_len=128, max_num_seqs=16, block_size=32, skip_tokenizer_init=True,
        num_gpu_blocks_override=32, kv_cache_memory_bytes=64 << 20, tensor_parallel_size=2, enforce_eager=True,
        distributed_executor_backend="mp",
    )  # fmt: skip
    try:
        params = vllm.SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": request.prompt_ids} for request in REQUESTS], params, use_tqdm=False)
        first, second = llm.collective_rpc(seeds)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert first == second
    assert len({*first} - {0}) == len(REQUESTS)
