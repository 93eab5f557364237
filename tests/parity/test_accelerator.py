"""The latent engine under a GPU's contract: eager and compiled, with one and with eight policy layers. float32.

Faults that the contract is meant to catch are reintroduced, and must be found.
"""

import copy
from unittest import mock

import numpy as np
import pytest
import torch
from accelerator import COMPILED, piecewise
from conftest import NUM_ACTIONS, VOCAB_SIZE, scramble
from engines import ON_ACCELERATOR
from vllm import ir
from vllm.config import set_current_vllm_config
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.models.llama import LlamaModel
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from cola_ray import CoLAForCausalLM
from cola_ray.model import vllm_cola
from cola_ray.rollout.engine import LatentEngine, Request
from cola_ray.weights import WeightSender

STOP = 7
LOG_PROB_TOLERANCE = 5e-5
STATE_TOLERANCE = 2e-5
REQUESTS = [
    Request(np.random.default_rng(i).integers(8, VOCAB_SIZE, 3 + 7 * i).tolist(), 1000 + i, 1.0, 0, 8) for i in range(6)
]


def start(path, **compilation):
    return LatentEngine(
        str(path), dtype="float32", max_model_len=96, stop_token_ids=[STOP], max_num_seqs=16, block_size=32,
        num_gpu_blocks_override=24, max_num_batched_tokens=96, keep_hidden_states=True, **ON_ACCELERATOR, **compilation,
    )  # fmt: skip


class TableOfTheFirstSize:
    """States in a table that is created by the first run that has a cache, even one of profiling."""

    def __init__(self, vllm_config, hidden, name):
        self.cache, self.hidden, self.table = vllm_config.cache_config, hidden, None

    def write(self, e):
        mappings = get_forward_context().slot_mapping
        if mappings:
            slots, last = next(iter(mappings.values())).long(), self.cache.num_gpu_blocks * self.cache.block_size
            self.table = torch.zeros(last + 1, self.hidden) if self.table is None else self.table
            self.table.index_copy_(0, torch.where(slots < 0, last, slots), e)


def test_states_in_a_table_of_the_first_size_are_found(cola_dir, monkeypatch):
    monkeypatch.setattr(vllm_cola, "StateStore", TableOfTheFirstSize)
    with pytest.raises(IndexError, match="is out of bounds for dimension 0"):
        start(cola_dir)


@pytest.fixture(scope="module", params=[1, 8], ids=["one policy layer", "eight policy layers"])
def model(base_dir, request):
    model = CoLAForCausalLM.attach(
        base_dir, num_actions=NUM_ACTIONS, num_idm_layers=1, num_world_model_layers=2, num_policy_layers=request.param
    )
    return scramble(model).eval()


@pytest.fixture(scope="module")
def model_dir(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cola")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["eager", "compiled"])
def engine(model_dir, request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_AOT_COMPILE", "0")  # it would store Inductor's output
        engine = start(model_dir, **(COMPILED if request.param == "compiled" else {}))
        yield engine
        engine.close()


def check(completions, model):
    """Check that tokens, actions, log-probabilities and states equal PyTorch's."""
    for request, found in zip(REQUESTS, completions, strict=True):
        tokens, actions, log_probs = (
            column[0].numpy()
            for column in model.generate_latent(
                torch.tensor([request.prompt_ids]), max_new_tokens=request.max_new_tokens, temperature=1.0,
                seed=request.seed, eos_token_id=STOP,
            )
        )  # fmt: skip
        assert found.token_ids.tolist() == tokens.tolist(), "tokens are not PyTorch's"
        assert found.actions.tolist() == actions.tolist(), "actions are not PyTorch's"
        np.testing.assert_allclose(found.log_probs, log_probs, atol=LOG_PROB_TOLERANCE)
        e = model.encode(torch.tensor([[*request.prompt_ids, *tokens.tolist()[:-1]]]))[0].detach().numpy()
        np.testing.assert_allclose(found.hidden_states, e, atol=STATE_TOLERANCE, err_msg="states are not e")


def test_completions_are_pytorchs_before_and_after_an_update(engine, model):
    check(engine.generate(REQUESTS), model)
    check(engine.generate(REQUESTS), model)  # with cached prefixes
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
    for parameter in other.policy.parameters():
        parameter.data += 0.1 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    for version, published in ((1, other), (2, model)):
        tensors = [(f"policy.{name}", tensor) for name, tensor in published.policy.state_dict().items()]
        engine.update_weights(version, list(WeightSender().buckets(version, tensors)))
        check(engine.generate(REQUESTS), published)


def test_states_are_a_layer_of_the_cache(engine, model):
    """They are in the only cache group and use its blocks, count in a block's bytes, and keep their address."""

    def look(worker):
        (group,) = worker.model_runner.kv_cache_config.kv_cache_groups
        pages = {name: one.page_size_bytes for name, one in group.kv_cache_spec.kv_cache_specs.items()}
        store = worker.get_model().states
        return pages, group.kv_cache_spec.page_size_bytes, store.name, store.kv_cache

    (pages, of_a_block, name, states), *_ = engine.llm.collective_rpc(look)
    layers, width = model.config.num_hidden_layers + len(model.policy.layers), model.config.hidden_size
    assert pages.pop(name) == 32 * width * 4
    assert len(pages) == layers
    assert of_a_block == sum(pages.values()) + 32 * width * 4
    assert states.shape == (24, 1, 32, width), "the last of three caches, the real one"
    engine.generate(REQUESTS[:1])
    assert engine.llm.collective_rpc(look)[0][3].data_ptr() == states.data_ptr()


def reads_e_late(leave):
    """A forward that reads e only after the policy layers, which received ``leave(e)`` as their residual."""

    def forward(self, input_ids, positions, *_):
        e = LlamaModel.forward(self, input_ids, positions, None)
        hidden, residual = leave(e), None
        for layer in self.policy_layers:
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.policy_norm(hidden, residual)
        return torch.cat([e, hidden], -1)

    return forward


def half_of_rows(engine, forward):
    """The e that ``forward`` returns after vLLM's passes, and the base's own e computed without overwriting.

    Without a cache, vLLM leaves the output of attention as it is; here, each token attends only to itself.
    """

    def attend(self, layer, query, key, value, kv_cache, metadata, output, **_):
        return output.copy_(query)

    def run(worker):
        served, ids, positions = worker.get_model().model, torch.arange(8, 24), torch.arange(16)
        config = worker.vllm_config
        torch._dynamo.reset()
        through_passes = torch.compile(lambda *inputs: forward(served, *inputs), backend=piecewise, fullgraph=True)
        with (
            mock.patch.object(CPUAttentionBackendImpl, "forward", attend),
            set_current_vllm_config(config),
            set_forward_context(None, config, num_tokens=16),
            torch.no_grad(),
        ):
            with ir.ops.fused_add_rms_norm.set_priority(["native"]):
                e = LlamaModel.forward(served, ids, positions, None)
            with ir.enable_torch_wrap():
                return through_passes(ids, positions)[:, : e.shape[1]], e

    return engine.llm.collective_rpc(run)[0]


def test_e_read_after_a_norm_that_overwrote_it_is_found(engine, model, monkeypatch):
    if engine.llm.llm_engine.vllm_config.model_config.enforce_eager:
        check_completions_without_e(engine, model, monkeypatch)
    else:
        check_vllms_passes(engine, len(model.policy.layers))


def check_completions_without_e(engine, model, monkeypatch):
    monkeypatch.setattr(vllm_cola.with_policy(LlamaModel), "forward", reads_e_late(lambda e: e))
    with pytest.raises(AssertionError, match="tokens are not PyTorch's"):
        check(engine.generate(REQUESTS), model)
    monkeypatch.undo()
    engine.reset_prefix_cache()  # it contains the states
    check(engine.generate(REQUESTS), model)


def check_vllms_passes(engine, num_layers):
    """vLLM's passes refuse a read after the norm if they see it, miss it across pieces, and remove a clone."""
    kept, e = half_of_rows(engine, vllm_cola.with_policy(LlamaModel).forward)
    torch.testing.assert_close(kept, e, atol=STATE_TOLERANCE, rtol=0)
    late, cloned = reads_e_late(lambda e: e), reads_e_late(torch.clone)
    if num_layers == 1:
        with pytest.raises(Exception, match="used again after the node"):
            half_of_rows(engine, late)
    for forward in [cloned] if num_layers == 1 else [late, cloned]:
        spoiled, e = half_of_rows(engine, forward)
        assert not torch.allclose(spoiled, e, atol=0.1), "vLLM's passes now keep what is read late"
