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

from cola_ray.algorithms.advantages import beyond_noise, over_spread, typical_value, within_noise
from cola_ray.algorithms.gradients import NonFiniteError, clip_gradients
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
    def start(self, pieces: Sequence[dict[str, Tensor]], num_actions: int) -> None:
        """Before the first step: every value as if all actions were like the average one of the global batch.

        All ranks call; once there has been a step it changes nothing.
        """
        if self.optimizer.state:
            return
        nn.init.zeros_(self.head.layers[-1].get_parameter("weight"))
        nn.init.constant_(self.head.layers[-1].get_parameter("bias"), level_of(pieces, num_actions))

    @torch.no_grad()
    def advantages(self, pieces: Sequence[dict[str, Tensor]], num_actions: int) -> dict[str, Tensor]:
        """Replace each micro-batch's ``advantages`` by GAE's and add its ``returns``; all ranks call.

        Where all that comes after one action is worth the same as after any other, the head's errors are no advantage:
        all are exactly 0. Whitened, a micro-batch has the ``deviation`` that its advantages were divided by, 1 where
        they were not, for whatever else belongs to the same objective.

        Args:
            pieces: of this rank, with ``hidden_states`` (B, T, H), ``rewards`` and ``discounts`` (B, T).
            num_actions: over all ranks.

        Returns:
            metric sums over actions: values, returns, their squared deviations, and squared errors of values.
        """
        gains = [self._estimate(piece) for piece in pieces]
        largest, highest, lowest = self._extremes(pieces, gains)
        if bool(within_noise(highest - lowest, largest)):
            for piece, gain in zip(pieces, gains, strict=True):
                piece |= {"advantages": torch.zeros_like(gain), "returns": gain}
        acted = [piece["action_mask"] for piece in pieces]
        values, returns, advantages = (
            torch.cat([piece[name][mask] for piece, mask in zip(pieces, acted, strict=True)]).double()
            for name in ("values", "returns", "advantages")
        )
        sums = self._summed(values.sum(), returns.sum(), advantages.sum(), advantages.square().sum())
        mean_return, mean = sums[1] / num_actions, sums[2] / num_actions
        if self.whiten:
            deviation = (self._summed((advantages - mean).square().sum())[0] / num_actions).sqrt()
            noise = bool(within_noise(deviation, largest))
            for piece, mask in zip(pieces, acted, strict=True):
                whitened = over_spread(piece["advantages"].double() - mean, deviation, largest)
                piece["advantages"] = whitened.masked_fill(~mask, 0.0).float()
                piece["deviation"] = torch.ones_like(deviation) if noise else deviation
        return {
            "value/mean": values.sum(),
            "value/returns": returns.sum(),
            "value/returns_deviation": (returns - mean_return).square().sum(),
            "value/error": advantages.square().sum(),
        }

    def _estimate(self, piece: dict[str, Tensor]) -> Tensor:
        """Leaves ``values``, ``advantages`` and ``returns`` in a micro-batch; what follows each action, undecayed."""
        values, mask = self.head(piece["hidden_states"]), piece["action_mask"]
        last = piece["attention_mask"].sum(1, keepdim=True) - 1
        final = values.gather(1, last)[:, 0]
        given = piece["rewards"], piece["discounts"]
        piece["values"] = values.masked_fill(~mask, 0.0)
        piece["advantages"] = generalised_advantages(*given, values, final, mask, self.decay)
        piece["returns"] = piece["advantages"] + piece["values"]
        return generalised_advantages(*given, torch.zeros_like(values), final, mask, 1.0)

    def _extremes(self, pieces: Sequence[dict[str, Tensor]], gains: Sequence[Tensor]) -> Tensor:
        """Over all ranks' actions: the greatest magnitude of gains and values, the greatest gain and the least."""
        masks = [piece["action_mask"] for piece in pieces]
        gained, values = (
            torch.cat([one[mask] for one, mask in zip(of, masks, strict=True)]).double()
            for of in (gains, [piece["values"] for piece in pieces])
        )
        least = torch.full((1,), -torch.inf, dtype=torch.float64, device=gained.device)  # of a rank without actions
        found = torch.stack([
            torch.cat([least, gained.abs(), values.abs()]).max(),
            torch.cat([least, gained]).max(),
            torch.cat([least, -gained]).max(),
        ])  # fmt: skip
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return found * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64, device=found.device)

    @staticmethod
    def _summed(*sums: Tensor) -> Tensor:
        """Over all ranks."""
        together = torch.stack(sums)
        torch.distributed.all_reduce(together)
        return together

    def fit(self, pieces: Sequence[dict[str, Tensor]], num_actions: int) -> None:
        """``steps`` gradient steps on ``mean (V - returns)^2``; all ranks call."""
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            for piece in pieces:
                mask = piece["action_mask"]
                goals = piece["returns"][mask]
                error = beyond_noise(self.head(piece["hidden_states"])[mask] - goals, goals)
                (error.square().sum() / num_actions).backward()
            step_together(self.head, self.optimizer, self.grad_clip)

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


def level_of(pieces: Sequence[dict[str, Tensor]], num_actions: int) -> float:
    """What every state is worth if all actions of all ranks' micro-batches are like the average one; all ranks call."""
    columns = [torch.cat([piece[name][piece["action_mask"]] for piece in pieces]) for name in ("rewards", "discounts")]
    sums = torch.stack([column.double().sum() for column in columns])
    torch.distributed.all_reduce(sums)
    return float(typical_value(*(sums / num_actions)))


def step_together(head: nn.Module, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
    """A step on the sum of all ranks' gradients, for a head that every rank holds whole; all ranks call.

    Raises:
        NonFiniteError: on every rank; the head is as before.
    """
    for parameter in head.parameters():
        torch.distributed.all_reduce(parameter.grad)
    if not torch.isfinite(clip_gradients(head.parameters(), grad_clip)):
        raise NonFiniteError("a value's gradient is not finite")
    optimizer.step()
