"""``rollout.engine_args``: arguments of ``vllm.LLM`` without a setting, checked by name before vLLM is imported.

faults(config)      # ["rollout.engine_args.dtype = 'half': both sides have one; use model.dtype"]
"""

import ast
import difflib
import functools
import importlib.util
from pathlib import Path

from cola_ray.settings.config import Config

_OWNED = {
    "model": "the engine serves the model that the run trains; use model.path",
    "dtype": "learner and engine have one; use model.dtype",
    "max_model_len": "the sum of two settings; use rollout.max_prompt_tokens and rollout.max_new_tokens",
    "seed": "draws depend on the run's; use seed",
    "tokenizer": "texts become tokens outside the engine; leave it out",
    "skip_tokenizer_init": "texts become tokens outside the engine; leave it out",
    "logits_processors": "they draw the actions; leave it out",
    "hf_overrides": "they say how a CoLA model is served; leave it out",
    "logprobs_mode": "log-probabilities are those of actions; leave it out",
    "pipeline_parallel_size": "policy layers read the base's last hidden state; use rollout.tensor_parallel_size",
    "data_parallel_size": "engines are the data parallelism; use rollout.num_workers",
    "enable_expert_parallel": "bases have no experts; leave it out",
    "enable_lora": "adapters arrive merged into their layers; use rl.lora_rank",
    "enable_sleep_mode": "engines have GPUs of their own; leave it out",
    "speculative_config": "drafts are accepted by token probabilities, which latent actions do not have; leave it out",
    "runner": "engines generate; leave it out",
    "compilation_config": "use rollout.optimization_level or rollout.enforce_eager",
    "kv_cache_memory_bytes": "use rollout.gpu_memory_utilization, and on CPU rollout.kv_cache_mb",
} | {
    name: f"use rollout.{setting}"
    for name, setting in {
        "async_scheduling": "async_scheduling", "enable_prefix_caching": "prefix_caching",
        "enforce_eager": "enforce_eager", "gpu_memory_utilization": "gpu_memory_utilization",
        "kv_cache_dtype": "kv_cache_dtype", "max_num_batched_tokens": "max_num_batched_tokens",
        "max_num_seqs": "max_num_seqs", "optimization_level": "optimization_level", "quantization": "quantization",
        "tensor_parallel_size": "tensor_parallel_size",
    }.items()
}  # fmt: skip
"""Arguments that are refused: why, and what to use."""


def faults(config: Config) -> list[str]:
    """A line for each argument that has a setting, that would break the drawing of actions, or that vLLM lacks."""
    lines = []
    for name, value in config.rollout.engine_args.items():
        given = f"rollout.engine_args.{name} = {value!r}"
        if name in _OWNED:
            lines.append(f"{given}: {_OWNED[name]}")
        elif known() and name not in known():
            near = difflib.get_close_matches(name, known(), n=1)
            hint = f"did you mean {near[0]}?" if near else "`vllm serve --help=all` names them"
            lines.append(f"{given}: vllm.LLM takes no such argument; {hint}")
    return lines


@functools.cache
def known() -> frozenset[str]:
    """Arguments of ``vllm.LLM``, read from vLLM's sources because importing it takes long; empty without vLLM."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        return frozenset()
    tree = ast.parse((Path(found.origin).parent / "engine" / "arg_utils.py").read_text())
    (arguments,) = (one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == "EngineArgs")
    targets = [one.target for one in arguments.body if isinstance(one, ast.AnnAssign)]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return frozenset(name for name in names if not name.startswith("_"))
