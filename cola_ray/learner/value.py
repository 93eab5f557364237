"""A value head on the frozen base's e: the baseline of PPO's advantages, and ArCHer's token baseline.

    e (B, T, H) ─> V(state before each action) ─> GAE over rewards and discounts ─> advantages ─> policy update
                          ^                                 │
                          └── squared error to A + V <──────┘    own Adam, own clip

The decisions that have a value are actions; or turns, each at its first action (``rl.gae_level``, algorithms/ppo.py).
The head reads e, which nothing here trains, so its gradients never mix with the policy's: it has its own optimizer, and
a large value error cannot use up the policy's gradient norm. Legend: B sequences, T positions, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from cola_ray.algorithms.advantages import beyond_noise, over_spread, typical_value, within_noise
from cola_ray.algorithms.heads import HeadLearner
from cola_ray.algorithms.ppo import as_turns, clipped_values, generalised_advantages, of_turns
from cola_ray.learner.micro_batch import Advantages, Encoded, MicroBatch


class ValueHead(nn.Module):
    """``V(e)``: (..., H) -> (...), in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, e: Tensor) -> Tensor:
        return self.layers(self.norm(e.float()))[..., 0]


@dataclass(frozen=True)
class _Estimates:
    """The head's estimates for a micro-batch's decisions, (B, T) each, 0 elsewhere."""

    values: Tensor
    advantages: Tensor  # GAE's
    returns: Tensor  # advantages + values, the head's targets
    gains: Tensor  # the rewards that follow each decision, undecayed, independent of the values


class ValueLearner(HeadLearner):
    """The head and its optimizer. ``torch.distributed`` must be initialised.

    Args:
        decay: lambda of GAE.
        whiten: scale advantages to mean 0 and variance 1 over the actions of the global batch.
        steps: gradient steps per batch.
        seed: of the head's initial weights.
        cliprange: how far values may move on one batch; 0: no limit.
        gae_level: what a decision is. token: an action. turn: all actions of a turn.
    """

    def __init__(
        self, width: int, device: torch.device, *, lr: float, grad_clip: float, decay: float, whiten: bool, steps: int,
        seed: int, cliprange: float = 0.0, gae_level: Literal["token", "turn"] = "token",
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        super().__init__(ValueHead(width).to(device), lr=lr, grad_clip=grad_clip)
        self.decay, self.whiten, self.steps, self.cliprange = decay, whiten, steps, cliprange
        self.gae_level = gae_level

    @torch.no_grad()
    def start(self, batches: Sequence[Encoded], num_actions: int) -> None:
        """Before the first step: set every value as if all decisions were like the average one of the global batch.

        All ranks call; after the first step this does nothing.
        """
        if self.is_new:
            decided = [self._decisions(one) for one in batches]
            level = level_of([(one.rewards, one.batch) for one in decided], self._num_decisions(batches, num_actions))
            nn.init.zeros_(self.online.layers[-1].get_parameter("weight"))
            nn.init.constant_(self.online.layers[-1].get_parameter("bias"), level)

    @torch.no_grad()
    def advantages(
        self, batches: Sequence[Encoded], num_actions: int
    ) -> tuple[list[Advantages], list[Tensor], dict[str, Tensor]]:
        """GAE's advantages of this rank's micro-batches, whitened if wanted; all ranks call.

        If the rewards after every decision are worth the same, the head's errors are not advantages: all advantages are
        exactly 0. Whitened advantages come with the deviation that they were divided by (1 if they were not), for other
        terms of the same objective.

        Args:
            num_actions: over all ranks.

        Returns:
            advantages; returns (B, T), the head's targets; values, returns, their squared deviations and squared errors
            of values as metric sums, which divided by ``num_actions`` are means over decisions.
        """
        decisions, num_decisions = [self._decisions(one) for one in batches], self._num_decisions(batches, num_actions)
        found = [self._estimate(one) for one in decisions]
        largest, highest, lowest = _extremes(decisions, found)
        if bool(within_noise(highest - lowest, largest)):
            found = [replace(one, advantages=torch.zeros_like(one.gains), returns=one.gains) for one in found]
        values, returns, errors = (
            _acted(decisions, [getattr(one, name) for one in found]) for name in ("values", "returns", "advantages")
        )
        of_actions = [
            of_turns(of.advantages, one.batch.action_mask, self._decided(one.batch))
            for one, of in zip(batches, found, strict=True)
        ]
        advantages = _acted(batches, of_actions)
        sums = _summed(values.sum(), returns.sum(), advantages.sum(), advantages.square().sum())
        mean_return, mean = sums[1] / num_decisions, sums[2] / num_actions
        made = [Advantages(one) for one in of_actions]
        if self.whiten:
            deviation = (_summed((advantages - mean).square().sum())[0] / num_actions).sqrt()
            divisor = torch.ones_like(deviation) if bool(within_noise(deviation, largest)) else deviation
            whitened = (over_spread(one.double() - mean, deviation, largest) for one in of_actions)
            made = [
                Advantages(one.masked_fill(~encoded.batch.action_mask, 0.0).float(), deviation=divisor)
                for one, encoded in zip(whitened, batches, strict=True)
            ]
        each = num_actions / num_decisions
        return made, [one.returns for one in found], {
            "value/mean": each * values.sum(),
            "value/returns": each * returns.sum(),
            "value/returns_deviation": each * (returns - mean_return).square().sum(),
            "value/error": each * errors.square().sum(),
        }  # fmt: skip

    def _decided(self, batch: MicroBatch) -> Tensor:
        """Where the head's values count, (B, T) bool."""
        return batch.turn_starts if self.gae_level == "turn" else batch.action_mask

    def _decisions(self, encoded: Encoded) -> Encoded:
        """With decisions in place of actions: their mask, rewards and discounts."""
        if self.gae_level == "token":
            return encoded
        batch = encoded.batch
        rewards, discounts = as_turns(encoded.rewards, batch.discounts, batch.action_mask, batch.turn_starts)
        return replace(
            encoded, batch=replace(batch, action_mask=batch.turn_starts, discounts=discounts), rewards=rewards
        )

    def _num_decisions(self, batches: Sequence[Encoded], num_actions: int) -> int:
        """The number of decisions over all ranks, which all call."""
        if self.gae_level == "token":
            return num_actions
        return int(_summed(torch.stack([one.batch.turn_starts.sum() for one in batches]).sum())[0])

    def _estimate(self, encoded: Encoded) -> _Estimates:
        values, batch = self.online(encoded.hidden_states), encoded.batch
        last = batch.attention_mask.sum(1, keepdim=True) - 1
        final = values.gather(1, last)[:, 0]
        given, mask = (encoded.rewards, batch.discounts), batch.action_mask
        masked = values.masked_fill(~mask, 0.0)
        advantages = generalised_advantages(*given, values, final, mask, self.decay)
        gains = generalised_advantages(*given, torch.zeros_like(values), final, mask, 1.0)
        return _Estimates(masked, advantages, advantages + masked, gains)

    def fit(self, batches: Sequence[Encoded], returns: Sequence[Tensor], num_actions: int) -> None:
        """``steps`` gradient steps on ``mean (V - returns)^2``, or PPO's clipped error; all ranks call.

        Args:
            returns: (B, T) of each micro-batch, used where there are decisions.

        Raises:
            NonFiniteError: on every rank; the head is unchanged by the step.
        """

        num_decisions = self._num_decisions(batches, num_actions)

        def values(encoded: Encoded) -> Tensor:
            found: Tensor = self.online(encoded.hidden_states)[self._decided(encoded.batch)]
            return found

        def loss(encoded: Encoded, goals: Tensor, before: Tensor | None) -> Tensor:
            found = values(encoded)
            if before is not None:
                found = clipped_values(found, before, goals, self.cliprange)
            return beyond_noise(found - goals, goals).square().sum() / num_decisions

        with torch.no_grad():
            known = [values(one) if self.cliprange else None for one in batches]
        for _ in range(self.steps):
            given = zip(batches, returns, known, strict=True)
            self.accumulate(loss(one, goals[self._decided(one.batch)], before) for one, goals, before in given)
            self.descend()


def level_of(parts: Sequence[tuple[Tensor, MicroBatch]], num_actions: int) -> float:
    """The value of every state if all actions of all ranks' batches are like the average one; all ranks call.

    Args:
        parts: micro-batches, each with the rewards (B, T) of its actions.
    """
    columns = [torch.cat([rewards[of.action_mask] for rewards, of in parts]),
               torch.cat([of.discounts[of.action_mask] for _, of in parts])]  # fmt: skip
    return float(typical_value(*(_summed(*(column.double().sum() for column in columns)) / num_actions)))


def _acted(batches: Sequence[Encoded], columns: Sequence[Tensor]) -> Tensor:
    """(B, T) of each micro-batch -> float64, at all of this rank's actions."""
    masks = [one.batch.action_mask for one in batches]
    return torch.cat([column[mask] for column, mask in zip(columns, masks, strict=True)]).double()


def _extremes(batches: Sequence[Encoded], estimates: Sequence[_Estimates]) -> Tensor:
    """Over all ranks' actions: the greatest magnitude of gains and values, the greatest gain, and the least; (3,)."""
    gains, values = (_acted(batches, [getattr(one, name) for one in estimates]) for name in ("gains", "values"))
    least = torch.full((1,), -torch.inf, dtype=torch.float64, device=gains.device)  # for ranks without actions
    found = torch.stack([
        torch.cat([least, gains.abs(), values.abs()]).max(),
        torch.cat([least, gains]).max(),
        torch.cat([least, -gains]).max(),
    ])  # fmt: skip
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64, device=found.device)


def _summed(*sums: Tensor) -> Tensor:
    """Sums over all ranks, (S,)."""
    together = torch.stack(sums)
    torch.distributed.all_reduce(together)
    return together
