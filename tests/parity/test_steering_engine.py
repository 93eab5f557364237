"""Steering vectors reach vLLM as biases, and nothing else has to be sent. float32."""

import copy

import pytest
import torch
from conftest import letters, scramble, small_llama
from engines import ON_ACCELERATOR
from test_token_engine import STOP, assert_same, publish, reference, tensors
from transformers import LlamaForCausalLM

from cola_ray.learner.policies import TokenPolicy
from cola_ray.model.conversion import with_mlp_biases
from cola_ray.rollout.engine import Request, TokenEngine
from cola_ray.weights import WeightTransferError


@pytest.mark.parametrize("steering", ["all", "last"])
def test_vectors_arrive_as_biases(steering, tmp_path):
    llama = scramble(small_llama()).eval()
    llama.save_pretrained(tmp_path / "llama")
    letters().save_pretrained(tmp_path / "llama")
    path = with_mlp_biases(tmp_path / "llama", tmp_path / "biased")
    biased, request = LlamaForCausalLM.from_pretrained(path).eval(), Request(list(range(20, 60)), 5, 1.0, 0, 12)
    policy = TokenPolicy(copy.deepcopy(biased), steering=steering)
    for number, (_, parameter) in enumerate((n, p) for n, p in policy.named_parameters() if n.endswith(".vector")):
        parameter.data.normal_(generator=torch.Generator().manual_seed(number))
    engine = TokenEngine(
        str(path), steering=steering, dtype="float32", max_model_len=160, stop_token_ids=[STOP], max_num_seqs=8,
        block_size=32, num_gpu_blocks_override=32, tokenizer=letters(), **ON_ACCELERATOR,
    )  # fmt: skip
    try:
        assert_same(engine.generate([request])[0], reference(llama, request))
        named = tensors(policy)
        assert sum(tensor.numel() for _, tensor in named) <= 64 * llama.config.num_hidden_layers, "vectors alone"
        publish(engine, 1, named)
        expected = reference(policy.policy, request)
        assert expected[0] != reference(llama, request)[0]
        assert_same(engine.generate([request])[0], expected)
        with pytest.raises(WeightTransferError):
            publish(engine, 2, tensors(TokenPolicy(copy.deepcopy(llama))))
        assert_same(engine.generate([request])[0], expected)
    finally:
        engine.close()
