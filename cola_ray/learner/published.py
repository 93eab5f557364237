"""Tensors that a learner publishes: their names outside, and the parameters that make them.

This module imports neither DeepSpeed nor Ray: policies, which list these tensors, also run without them
(benchmarks/gpu.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Published:
    """A tensor that leaves the engine: its name outside, its parameters, and how they are merged into it."""

    name: str
    parameters: tuple[Any, ...]
    merged: Callable[..., Tensor] = lambda parameter: parameter

    @property
    def nbytes(self) -> int:
        """Size of the gathered parameters. A partitioned parameter's own ``numel()`` is zero."""
        return sum(parameter.ds_numel * parameter.element_size() for parameter in self.parameters)
