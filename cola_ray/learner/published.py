"""Tensors that leave a learner: their names outside, and the parameters that make them.

It imports neither DeepSpeed nor Ray: policies, which say what goes out, run without them too (benchmarks/gpu.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Published:
    """A tensor that leaves the engine: its name outside, the parameters that make it, and how."""

    name: str
    parameters: tuple[Any, ...]
    merged: Callable[..., Tensor] = lambda parameter: parameter

    @property
    def nbytes(self) -> int:
        """Of what is gathered. A partitioned parameter's own ``numel()`` is zero."""
        return sum(parameter.ds_numel * parameter.element_size() for parameter in self.parameters)
