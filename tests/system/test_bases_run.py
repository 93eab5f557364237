"""Bases of other families, end to end: small random ones, trained alone, with latent actions, and by RL."""

import pytest
from runs import Run
from transformers import AutoConfig, AutoModelForCausalLM

from cola_ray.learner.start_model import make_tokenizer
from cola_ray.settings.config import TaskConfig
from cola_ray.tasks import make_task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
KINDS = {
    "qwen3": {"head_dim": 64},  # norms of queries and keys, heads wider than hidden size / number of heads
    "mistral": {"sliding_window": 8},  # packed rows are longer, and so are many problems with their answers
}
SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "initializer_range": 0.06, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(params=KINDS)
def base(request, tmp_path):
    """(model_type, folder) of a random base as large as the one that the preset tiny makes."""
    tokenizer = make_tokenizer(make_task(TaskConfig(), 0))
    words = {"vocab_size": len(tokenizer) + -len(tokenizer) % 8, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(request.param, **(SIZES | words | KINDS[request.param]))
    for saved in (AutoModelForCausalLM.from_config(config), tokenizer):
        saved.save_pretrained(tmp_path / "base")
    return request.param, tmp_path / "base"


def test_rl_gains_ten_points_on_a_base_of_another_family(base, tmp_path):
    kind, folder = base
    start = Run("pretrain", tmp_path, "--model.base", str(folder))
    start.finish()
    assert AutoConfig.from_pretrained(start.output / "stages" / "base").model_type == kind
    run = Run("rl_math", tmp_path, "--model.path", str(start.output / "model"))
    run.finish()
    made = AutoConfig.from_pretrained(run.output / "model")
    assert (made.model_type, made.base_model_type) == ("cola", kind)
    assert all(getattr(made, name) == value for name, value in KINDS[kind].items())
    assert max(run.series("policy/rollout_mismatch_max").values()) < 1e-4
    found = run.summary
    assert found["rl_accuracy"] >= found["bc_accuracy"] + 0.1, found
