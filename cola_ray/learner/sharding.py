"""Models of which every rank loads its own shards.

    checkpoint ─> each rank maps a tensor from its file ─> and copies its own share of it ─> the next tensor

A rank holds its share of the model and, only if the checkpoint has another dtype or layout, one whole tensor. Without
a process group the same code loads the whole model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cola_ray.model.tensors import Tensors, place


def zero_config(dtype: torch.dtype, offload_optimizer: bool = False) -> dict[str, Any]:
    """DeepSpeed's ZeRO-3 settings, for dividing parameters and for training them.

    Args:
        offload_optimizer: keep the optimizer's state in host memory.
    """
    offloaded = {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    return {
        "train_micro_batch_size_per_gpu": 1,  # we cut batches ourselves; DeepSpeed only needs a number
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": torch.cuda.is_available(),
            "stage3_param_persistence_threshold": 0,
            **(offloaded if offload_optimizer else {}),
        },
        "bf16": {"enabled": dtype is torch.bfloat16},
        # With bfloat16, the sum over 128 micro-batches is off by more than 1 % of the gradient.
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
    """Load the parameters of ``module`` that are on the meta device; a collective if there is a process group.

    Args:
        tensors: with their values after conversion to the parameter's dtype.
        stored: maps a parameter's name to its tensor's.
        whole: prefixes of parameters that every rank keeps whole; the engine divides them later.
        initialise: draws the parameters of a module that the checkpoint lacks; all ranks must draw the same.
        device: of whole parameters, by default the CPU; shares are on the rank's own device.
        on_host: whether a parameter's shares stay in host memory, by its name.

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
    # Conversions go through one buffer: shares between freed tensors would keep malloc from returning memory.
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
        # An already divided parameter, by which DeepSpeed divides others; by whether shares are in host memory.
        self.first: dict[bool, Any] = {}

    def take(self, parameter: Any, on_host: bool = False) -> None:
        """Keep this rank's share of a parameter that has the same values on all ranks.

        Args:
            on_host: keep the share in host memory, pinned where there are GPUs.
        """
        if on_host in self.first:
            self.first[on_host].convert_to_zero_parameters(param_list=[parameter])
            return
        import deepspeed  # policies also run without it

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
    """Let the decoder layers of a transformers model be recomputed in the backward pass.

    Only the layers themselves enter training mode, which transformers requires: nothing inside uses dropout.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
