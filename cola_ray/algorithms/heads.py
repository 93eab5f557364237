"""Small networks on features that train elsewhere or not at all; every process holds them whole and steps them alike.

    losses of this process ─> gradients ─> combined over processes ─> clipped ─> Adam ─> the target follows

Value heads, Qs and ArCHer's twins are :class:`HeadLearner`; their own files say what they are fitted to.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cola_ray.algorithms.gradients import NonFiniteError, clip_gradients


def summed_over_ranks(gradients: Sequence[Tensor]) -> None:
    """In place; all ranks of ``torch.distributed`` call."""
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)


class HeadLearner:
    """A head, its Adam and, if asked for, a target: a copy that follows the head and has no gradient.

    Args:
        head: the same in every process; taken over.
        grad_clip: bound on the norm over all of the head's gradients, and of no other network's; 0 clips nothing.
        with_target: whether there is a target.
        combine: makes this process's gradients those of all processes, in place.
    """

    def __init__(
        self,
        head: nn.Module,
        *,
        lr: float,
        grad_clip: float,
        with_target: bool = False,
        combine: Callable[[Sequence[Tensor]], None] = summed_over_ranks,
    ) -> None:
        self.online: Any = head
        self.target: Any = copy.deepcopy(head).requires_grad_(False) if with_target else None
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(head.parameters(), lr=lr)
        self.grad_clip, self.combine = grad_clip, combine

    @property
    def is_new(self) -> bool:
        """Whether there has been no step yet."""
        return not self.optimizer.state

    def accumulate(self, losses: Iterable[Tensor]) -> None:
        """Gradients of the sum of these losses only; losses are requested one by one, so only one graph is alive."""
        self.optimizer.zero_grad()
        for loss in losses:
            loss.backward()

    def descend(self, *, lr: float | None = None, tau: float = 0.0) -> Tensor:
        """Step on the accumulated gradients; all processes call.

        Args:
            lr: replaces the previous one.
            tau: share of the head that the target takes over afterwards.

        Returns:
            the gradient's norm before clipping, a scalar.

        Raises:
            NonFiniteError: in every process; the head is as before.
        """
        self.combine([parameter.grad for parameter in self.online.parameters() if parameter.grad is not None])
        norm = clip_gradients(self.online.parameters(), self.grad_clip)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"the gradient of a value is {float(norm)}")
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.optimizer.step()
        if tau:
            polyak_(self.target.parameters(), self.online.parameters(), tau)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"online": self.online, "target": self.target, "optimizer": self.optimizer}
        return {name: part for name, part in parts.items() if part is not None}


@torch.no_grad()
def polyak_(target: Iterable[Tensor], online: Iterable[Tensor], tau: float) -> None:
    """``target <- (1 - tau) target + tau online``, in place (Polyak averaging; Lillicrap et al. 2016, algorithm 1)."""
    for slow, fast in zip(target, online, strict=True):
        slow.lerp_(fast, tau)
