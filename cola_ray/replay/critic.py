"""The utterance critic: twin Q and V heads over features of states and utterances, its optimizer and its targets.

    features   e of the frozen base at the last token, sent along by the engine       (hidden_size,)
               or a trainable Hugging Face encoder of the last 512 tokens' text       (encoder's hidden size)
    heads      Q_i([h(s); h(u)]), V_i(h(s)): two hidden ReLU layers of the features' width, i = 1, 2

The base never changes, so its features are stored in the replay buffer once and critic steps run no base at all.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cola_ray.algorithms.archer import (
    TwinHeads,
    expectile_loss,
    polyak_,
    q_targets,
    twin_squared_error,
    utterance_advantages,
)

Array = np.ndarray


@dataclass(frozen=True)
class CriticBatch:
    """Replayed transitions, and states with a fresh utterance each; features (B, H), the rest (B,)."""

    states: Tensor
    utterances: Tensor
    next_states: Tensor
    rewards: Tensor
    terminated: Tensor
    fresh_states: Tensor  # (B', H)
    fresh_utterances: Tensor
    weights: Tensor | None = None  # of prioritised replay


class Critic:
    """Online heads, target heads and Adam over the online ones.

    Args:
        width: of the features.
        gamma: discount of a turn.
        tau: share of the online heads that the targets take over after every step.
        expectile: 0 fits V to fresh utterances (ArCHer); above 0.5, to replayed ones by expectiles (IQL).
    """

    def __init__(
        self,
        width: int,
        *,
        gamma: float,
        tau: float,
        lr: float,
        grad_clip: float,
        expectile: float = 0.0,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.gamma, self.tau, self.grad_clip, self.expectile = gamma, tau, grad_clip, expectile
        self.online = TwinHeads(width)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=lr)
        self.steps = 0

    def step(self, batch: CriticBatch) -> dict[str, float]:
        """One gradient step on Q and V, then the targets move. Returns metrics.

        Raises RuntimeError on a loss that is not finite; the weights are those before.
        """
        goals = self._q_targets(batch)
        q = self.online.q_values(batch.states, batch.utterances)
        v, v_loss = self._value_loss(batch)
        loss = twin_squared_error(q, goals, batch.weights) + v_loss
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the critic's loss is {loss.item()} at its step {self.steps}: a reward or a state is NaN"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.online.parameters(), self.grad_clip)
        self.optimizer.step()
        polyak_(self.target.parameters(), self.online.parameters(), self.tau)
        self.steps += 1
        return {
            "critic/loss": loss.item(),
            "critic/td_error": (q.detach() - goals).abs().mean().item(),
            "critic/q": q.mean().item(),
            "critic/v": v.mean().item(),
            "critic/grad_norm": float(grad_norm),
        }

    @torch.no_grad()
    def _q_targets(self, batch: CriticBatch) -> Tensor:
        return q_targets(batch.rewards, batch.terminated, self.target.values(batch.next_states), self.gamma)

    def _value_loss(self, batch: CriticBatch) -> tuple[Tensor, Tensor]:
        if self.expectile:
            v = self.online.values(batch.states)
            return v, expectile_loss(v, self.target.q_values(batch.states, batch.utterances), self.expectile)
        v = self.online.values(batch.fresh_states)
        return v, twin_squared_error(v, self.target.q_values(batch.fresh_states, batch.fresh_utterances))

    @torch.no_grad()
    def advantages(self, states: Array, utterances: Array) -> Array:
        """(B, H), (B, H) -> (B,), by the online heads."""
        s, u = torch.tensor(states), torch.tensor(utterances)
        return utterance_advantages(self.online.q_values(s, u), self.online.values(s)).numpy()

    @torch.no_grad()
    def td_errors(self, batch: CriticBatch) -> Array:
        """``|Q_i - target|``, mean over the twins: priorities of the replayed rows, (B,)."""
        q = self.online.q_values(batch.states, batch.utterances)
        return (q - self._q_targets(batch)).abs().mean(0).numpy()

    def judge(self) -> dict[str, Array]:
        """The target heads' weights, for a player who chooses among utterances (CHAI)."""
        return {name: tensor.numpy().copy() for name, tensor in self.target.state_dict().items()}

    def state_dict(self) -> dict[str, object]:
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
