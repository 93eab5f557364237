"""Entry point ``vllm.general_plugins``, through which every vLLM process with cola_ray installed can serve CoLA."""

import torch


def register() -> None:
    """Register the model with vLLM. Called in every vLLM process before a model loads, possibly more than once."""
    # vLLM's CPU attention uses AMX if the processor has it, and the kernel kills a process that uses AMX without having
    # requested permission.
    if hasattr(torch.cpu, "_init_amx") and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import cola_ray  # noqa: F401  (registers model_type "cola" with AutoConfig)
    from cola_ray.model.vllm_rows import ServedConfig

    # A string, so that the model's module is imported only when a model is loaded.
    ModelRegistry.register_model("CoLAForCausalLM", "cola_ray.model.vllm_cola:CoLAForCausalLM")
    ModelRegistry.register_model("SmolLM3ForCausalLM", "cola_ray.model.vllm_smollm3:SmolLM3ForCausalLM")
    MODELS_CONFIG_MAP["CoLAForCausalLM"] = ServedConfig
