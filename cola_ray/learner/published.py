"""Tensors that a learner publishes: their names outside, and the parameters that make them.

It imports neither DeepSpeed nor Ray: policies, which say what is published, also run without them (benchmarks/gpu.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Published:
    """A tensor that the engine publishes: its name outside, the parameters that make it, and how."""

    name: str
    parameters: tuple[Any, ...]
    merged: Callable[..., Tensor] = lambda parameter: parameter

    @property
    def nbytes(self) -> int:
        """Size of what is gathered. A partitioned parameter's own ``numel()`` is zero."""
        return sum(parameter.ds_numel * parameter.element_size() for parameter in self.parameters)
