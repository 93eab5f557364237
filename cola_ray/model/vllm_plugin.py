"""Entry point ``vllm.general_plugins``: any vLLM process on a machine with cola_ray installed can serve CoLA."""

import torch


def register() -> None:
    """Runs in every vLLM process before a model loads. Idempotent; imports nothing heavy by itself."""
    # vLLM's CPU attention uses AMX where the processor has it, but the kernel kills a process that has not asked
    # for the permission first.
    if hasattr(torch.cpu, "_init_amx") and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import cola_ray  # noqa: F401  (makes AutoConfig know model_type "cola")
    from cola_ray.model.vllm_rows import ServedConfig

    # A string, so that the model's own imports wait until somebody loads one.
    ModelRegistry.register_model("CoLAForCausalLM", "cola_ray.model.vllm_cola:CoLAForCausalLM")
    MODELS_CONFIG_MAP["CoLAForCausalLM"] = ServedConfig
