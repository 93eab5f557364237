"""A server's requests hold their actions, which no slot of their own keeps, and say what PyTorch says."""

import copy

import pytest
import torch

from cola_ray.model.action_requests import ActionRequest


@pytest.mark.parametrize("every", [2, 3])
def test_a_served_model_holds_what_pytorch_holds(every, cola, tmp_path):
    """Requests through vLLM's own interface, as a server's are, with preemptions."""
    import vllm

    from cola_ray.model.vllm_rows import settle_vllm
    from cola_ray.rollout.engine import prepare_process

    model = copy.deepcopy(cola)
    model.config.action_every = every
    model.save_pretrained(tmp_path)
    prepare_process(1)
    settle_vllm()
    llm = vllm.LLM(
        str(tmp_path), skip_tokenizer_init=True, dtype="float32", max_model_len=160, max_num_seqs=16,
        enforce_eager=True, kv_cache_memory_bytes=256 << 20, block_size=32, num_gpu_blocks_override=16,
        max_num_batched_tokens=160, disable_log_stats=False,
    )  # fmt: skip
    prompts = [[8 + (7 * i + place) % 80 for place in range(2 + 3 * i)] for i in range(24)]
    params = [
        vllm.SamplingParams(temperature=[0.9, 0.0][i % 2], seed=i, max_tokens=20 + i, ignore_eos=True, detokenize=False)
        for i in range(24)
    ]
    found = llm.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
    assert sum(one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions") > 0
    for prompt, one, answer in zip(prompts, params, found, strict=True):
        tokens, _, _ = model.generate_latent(
            torch.tensor([prompt]), max_new_tokens=one.max_tokens, temperature=one.temperature,
            seed=ActionRequest.from_params({}, one.seed).seed,
        )  # fmt: skip
        assert list(answer.outputs[0].token_ids) == tokens[0].tolist()
    llm.llm_engine.engine_core.shutdown()
