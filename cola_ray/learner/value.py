"""A value head on the frozen base's e: what PPO's advantages and ArCHer's token baseline are measured against.

    e (B, T, H) ─> V(state before each action) ─> GAE over rewards and discounts ─> advantages ─> policy update
                          ^                                 │
                          └── squared error to A + V <──────┘    own Adam, own clip

The head reads e, which nothing here trains, so its gradients never meet the policy's: it has an optimizer of its own,
and a large value error cannot use up the policy's gradient norm. It is small, and whole on every rank. Legend: B
sequences, T positions, H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cola_ray.algorithms.advantages import typical_value
from cola_ray.algorithms.ppo import generalised_advantages


class ValueHead(nn.Module):
    """``V(e)``: (..., H) -> (...), in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, e: Tensor) -> Tensor:
        return self.layers(self.norm(e.float()))[..., 0]


class ValueLearner:
    """The head and its optimizer, the same on every rank. ``torch.distributed`` must be initialised.

    Args:
        decay: lambda of GAE.
        whiten: advantages to mean 0 and variance 1 over the actions of the global batch.
        steps: gradient steps a batch.
    """

    def __init__(
        self, width: int, device: torch.device, *, lr: float, grad_clip: float, decay: float, whiten: bool, steps: int,
        seed: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.head = ValueHead(width).to(device)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=lr)
        self.grad_clip, self.decay, self.whiten, self.steps = grad_clip, decay, whiten, steps

    @torch.no_grad()
    def advantages(self, pieces: Sequence[dict[str, Tensor]], num_actions: int) -> dict[str, Tensor]:
        """Replace each micro-batch's ``advantages`` by GAE's and add its ``returns``; all ranks call.

        Args:
            pieces: of this rank, with ``hidden_states`` (B, T, H), ``rewards`` and ``discounts`` (B, T).
            num_actions: over all ranks.

        Returns:
            metric sums over actions: values, returns, their squares, and squared errors of values.
        """
        if not self.optimizer.state:
            self._start(pieces, num_actions)
        sums = {name: torch.zeros((), device=next(self.head.parameters()).device) for name in _METRICS}
        for piece in pieces:
            values, mask = self.head(piece["hidden_states"]), piece["action_mask"]
            last = piece["attention_mask"].sum(1, keepdim=True) - 1
            piece["advantages"] = generalised_advantages(
                piece["rewards"], piece["discounts"], values, values.gather(1, last)[:, 0], mask, self.decay
            )
            piece["returns"] = piece["advantages"] + values.masked_fill(~mask, 0.0)
            sums["value/mean"] += values[mask].sum()
            sums["value/returns"] += piece["returns"].sum()
            sums["value/returns_square"] += piece["returns"].square().sum()
            sums["value/error"] += piece["advantages"].square().sum()
        if self.whiten:
            moments = torch.stack([sum(p["advantages"].sum() for p in pieces), sums["value/error"]])  # type: ignore[list-item]
            torch.distributed.all_reduce(moments)
            mean, square = moments / num_actions
            deviation = (square - mean.square()).clamp_min(1e-12).sqrt()
            for piece in pieces:
                piece["advantages"] = ((piece["advantages"] - mean) / deviation) * piece["action_mask"]
        return sums

    @torch.no_grad()
    def _start(self, pieces: Sequence[dict[str, Tensor]], num_actions: int) -> None:
        """Before the first step: every value as if all actions were like the average one of the global batch."""
        columns = [
            torch.cat([piece[name][piece["action_mask"]] for piece in pieces]) for name in ("rewards", "discounts")
        ]
        sums = torch.stack([column.sum() for column in columns])
        torch.distributed.all_reduce(sums)
        level = typical_value(*(sums / num_actions))
        nn.init.constant_(self.head.layers[-1].get_parameter("bias"), float(level))

    def fit(self, pieces: Sequence[dict[str, Tensor]], num_actions: int) -> None:
        """``steps`` gradient steps on ``mean (V - returns)^2``; all ranks call."""
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            for piece in pieces:
                error = (self.head(piece["hidden_states"]) - piece["returns"])[piece["action_mask"]]
                (error.square().sum() / num_actions).backward()
            step_together(self.head, self.optimizer, self.grad_clip)

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


def step_together(head: nn.Module, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
    """A step on the sum of all ranks' gradients, for a head that every rank holds whole; all ranks call."""
    for parameter in head.parameters():
        torch.distributed.all_reduce(parameter.grad)
    nn.utils.clip_grad_norm_(head.parameters(), grad_clip)
    optimizer.step()


_METRICS = ("value/mean", "value/returns", "value/returns_square", "value/error")
