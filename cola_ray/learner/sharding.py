"""Loads models so that each rank reads only its own shards.

    checkpoint ─> each rank maps a tensor from its file ─> and copies its own share of it ─> the next tensor

A rank holds its share of the model and, only where the checkpoint has another dtype or form, one whole tensor.
Without a process group the same code fills the model whole.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cola_ray.model.tensors import Tensors, place


def zero_config(dtype: torch.dtype, offload_optimizer: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration of ZeRO-3, for dividing parameters and for training them.

    Args:
        offload_optimizer: keep the optimizer's state in host memory.
    """
    offloaded = {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    return {
        "train_micro_batch_size_per_gpu": 1,  # micro-batches are cut by the learner; DeepSpeed only needs a number
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": torch.cuda.is_available(),
            "stage3_param_persistence_threshold": 0,
            **(offloaded if offload_optimizer else {}),
        },
        "bf16": {"enabled": dtype is torch.bfloat16},
        # A sum of 128 micro-batches in bfloat16 is off by more than 1 % of the gradient.
        "data_types": {"grad_accum_dtype": "fp32"},
        # torch's AdamW starts at once; DeepSpeed's own would compile a CPU kernel first.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def fill(
    module: nn.Module,
    tensors: Tensors,
    *,
    stored: Callable[[str], str] = lambda name: name,
    whole: Sequence[str] = (),
    initialise: Callable[[nn.Module], None] | None = None,
    device: torch.device | None = None,
    on_host: Callable[[str], bool] = lambda _: False,
) -> None:
    """Load values for the parameters of ``module`` on the meta device; a collective if there is a process group.

    Args:
        tensors: the checkpoint's; converted to each parameter's dtype.
        stored: from a parameter's name to its tensor's.
        whole: prefixes of parameters that every rank keeps whole; the engine divides them later.
        initialise: draws the parameters of a module that the checkpoint does not have; all ranks must draw the same.
        device: of parameters that stay whole, by default the CPU; shares are on the rank's own device.
        on_host: from a parameter's name to whether its shares stay in host memory.

    Raises:
        ValueError: a tensor is missing (without ``initialise``) or has another shape; names the first five.
    """
    parameters = {name: one for name, one in module.named_parameters() if one.is_meta}
    absent = [name for name in parameters if stored(name) not in tensors]
    if absent and initialise is None:
        raise ValueError(f"model.path: {tensors.path} lacks {[stored(name) for name in absent][:5]}")
    present = {name: one for name, one in parameters.items() if name not in absent}
    wrong = [stored(name) for name, one in present.items() if tensors.shape(stored(name)) != one.shape]
    if wrong:
        raise ValueError(f"model.path: in {tensors.path} config.json asks for other shapes than those of {wrong[:5]}")
    divided = torch.distributed.is_initialized()
    shared = {name: one for name, one in present.items() if divided and not name.startswith(tuple(whole))}
    for name in present.keys() - shared.keys():
        data = torch.empty(present[name].shape, dtype=present[name].dtype, device=device)
        place(module, name, data.copy_(tensors.read(stored(name))))
    # Conversions share one buffer: with shares lying between freed tensors, malloc could not give memory back.
    buffer = torch.empty(max((one.nbytes for one in shared.values()), default=0), dtype=torch.uint8)
    shards = Shards()
    for name, parameter in shared.items():
        data = tensors.read(stored(name))
        if data.dtype != parameter.dtype:
            data = buffer[: parameter.nbytes].view(parameter.dtype).view(parameter.shape).copy_(data)
        shards.take(place(module, name, data), on_host(name))
    for name in absent:
        place(module, name, torch.empty(parameters[name].shape, dtype=parameters[name].dtype))
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in absent):
        assert initialise is not None
        initialise(module.get_submodule(owner))


class Shards:
    """Divides parameters over the ranks of the process group, one by one."""

    def __init__(self) -> None:
        # A parameter that is divided already, with which DeepSpeed divides more; one for host memory and one for not.
        self.first: dict[bool, Any] = {}

    def take(self, parameter: Any, on_host: bool = False) -> None:
        """Keep this rank's share of a parameter that has the same values on all ranks.

        Args:
            on_host: keep the share in host memory, pinned where there are GPUs.
        """
        if on_host in self.first:
            self.first[on_host].convert_to_zero_parameters(param_list=[parameter])
            return
        import deepspeed  # imported here because policies also run without it

        class Divide(deepspeed.zero.Init):  # type: ignore[misc]
            """Init without the broadcast of the first rank's values, which would read and write the whole tensor."""

            def _zero_init_param(self, param: Any) -> None:
                self._convert_to_deepspeed_param(param)
                param.partition()

        holder = nn.Module()
        holder.register_parameter("parameter", parameter)
        Divide(
            module=holder, config_dict_or_path=zero_config(parameter.dtype), remote_device="cpu" if on_host else None,
            pin_memory=on_host and torch.cuda.is_available(),
        )  # fmt: skip
        self.first[on_host] = parameter


def checkpoint_layers(model: Any) -> None:
    """Turn on gradient checkpointing for the decoder layers of a transformers model.

    Only the layers themselves enter training mode, as transformers requires: modules inside them apply no dropout.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
