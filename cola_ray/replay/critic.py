"""The utterance critic: twin Q and V heads over features of states and utterances, its optimizer and its targets.

    features   the frozen base's e: s at its last token, with the number of its turn; u as the mean over its tokens,
               with whether it was said before
               or a Hugging Face encoder of the last 512 tokens' text, trained along
    heads      Q_i([h(s); h(u)]), V_i(h(s)): two hidden ReLU layers of the features' width, i = 1, 2

The base never changes, so its features are stored in the replay buffer once and critic steps run no base at all.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cola_ray.algorithms.advantages import typical_value
from cola_ray.algorithms.archer import (
    TwinHeads,
    expectile_loss,
    polyak_,
    q_targets,
    twin_squared_error,
    utterance_advantages,
)
from cola_ray.algorithms.gradients import clip_gradients

Array = np.ndarray
Inputs = Tensor | Mapping[str, Tensor]
"""Features of B states or utterances, (B, S) or (B, U), or what a tokenizer makes of B texts."""


class EncodedTwins(nn.Module):
    """:class:`TwinHeads` over the pooled output of an encoder that trains with them (section 3.4 of the paper).

    Args:
        encoder: of Hugging Face; where it pools nothing, its first token's state counts.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder, self.heads = encoder, TwinHeads(width, width)

    def q_values(self, states: Inputs, utterances: Inputs) -> Tensor:
        return self.heads.q_values(self._pooled(states), self._pooled(utterances))

    def values(self, states: Inputs) -> Tensor:
        return self.heads.values(self._pooled(states))

    def start_at(self, level: Tensor) -> None:
        self.heads.start_at(level)

    def _pooled(self, texts: Any) -> Tensor:
        output = self.encoder(**texts)
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled


@dataclass(frozen=True)
class CriticBatch:
    """Replayed transitions, B of them, and B' states with a fresh utterance each."""

    states: Inputs
    utterances: Inputs
    next_states: Inputs
    rewards: Tensor  # (B,)
    terminated: Tensor  # (B,)
    fresh_states: Inputs
    fresh_utterances: Inputs
    weights: Tensor | None = None  # of prioritised replay


class Critic:
    """Online heads, target heads and Adam over the online ones.

    Args:
        heads: :class:`TwinHeads` or :class:`EncodedTwins`; taken over.
        gamma: discount of a turn.
        tau: share of the online heads that the targets take over after every step.
        expectile: 0 fits V to fresh utterances (ArCHer); above 0.5, to replayed ones by expectiles (IQL).
    """

    def __init__(
        self,
        heads: nn.Module,
        *,
        gamma: float,
        tau: float,
        lr: float,
        grad_clip: float,
        expectile: float = 0.0,
    ) -> None:
        self.gamma, self.tau, self.grad_clip, self.expectile = gamma, tau, grad_clip, expectile
        self.online: Any = heads
        self.target: Any = copy.deepcopy(heads).requires_grad_(False)
        self.optimizer = torch.optim.Adam(heads.parameters(), lr=lr)
        self.average: Callable[[Tensor], None] | None = None  # of gradients over replicas, in place
        self.steps = 0

    def step(self, batch: CriticBatch) -> dict[str, float]:
        """One gradient step on Q and V, then the targets move. Returns metrics.

        Raises RuntimeError where the gradient is not finite; the weights are those before.
        """
        goals = self._q_targets(batch)
        q = self.online.q_values(batch.states, batch.utterances)
        v, v_loss = self._value_loss(batch)
        loss = twin_squared_error(q, goals, batch.weights) + v_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.average is not None:
            self._average_gradients(self.average)
        grad_norm = clip_gradients(self.online.parameters(), self.grad_clip)
        if not torch.isfinite(grad_norm):  # on every replica alike
            raise RuntimeError(
                f"the critic's loss is {loss.item()} at its step {self.steps}, its gradient over all replicas "
                f"{float(grad_norm)}: a reward or a state is NaN"
            )
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

    def start_from(
        self, rewards: Tensor, terminated: Tensor, states: Tensor | None = None, utterances: Tensor | None = None
    ) -> None:
        """Before the first step: all values as if every turn were like the average of these N.

        Args:
            rewards, terminated: (N,).
            states, utterances: (N, S), (N, U), of a base whose features the heads are to standardise.
        """
        rates = torch.stack([rewards.double().mean(), self.gamma * (1.0 - terminated.double()).mean()])
        self._agree_on(rates)
        level = typical_value(*rates)
        for heads in (self.online, self.target):
            heads.start_at(level)
        for name, features in (("states", states), ("utterances", utterances)):
            if features is not None:
                wide = features.double()  # the difference of two large numbers follows
                moments = torch.stack([wide.mean(0), wide.square().mean(0)])
                self._agree_on(moments)
                for heads in (self.online, self.target):
                    getattr(heads, name).measure(moments)

    def _agree_on(self, measured: Tensor) -> None:
        if self.average is not None:
            self.average(measured)

    def _average_gradients(self, average: Callable[[Tensor], None]) -> None:
        parameters = [p for p in self.online.parameters() if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in parameters])
        average(flat)
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    @torch.no_grad()
    def _q_targets(self, batch: CriticBatch) -> Tensor:
        return q_targets(batch.rewards, batch.terminated, self.target.values(batch.next_states), self.gamma)

    def _value_loss(self, batch: CriticBatch) -> tuple[Tensor, Tensor]:
        if self.expectile:
            v = self.online.values(batch.states)
            q = self.target.q_values(batch.states, batch.utterances)
            return v, expectile_loss(v, q, self.expectile, batch.weights)
        v = self.online.values(batch.fresh_states)
        return v, twin_squared_error(v, self.target.q_values(batch.fresh_states, batch.fresh_utterances))

    @torch.no_grad()
    def advantages(self, states: Inputs, utterances: Inputs) -> Array:
        """Of B utterances, (B,), by the online heads."""
        return utterance_advantages(self.online.q_values(states, utterances), self.online.values(states)).numpy()

    @torch.no_grad()
    def foretold(self, batch: CriticBatch) -> tuple[Array, Array]:
        """Advantages of replayed utterances and V's temporal-difference errors after them, (B,) each.

        ``r + gamma (1 - terminated) V(s') - V(s)`` with V the mean of the online twins: what an advantage foretells.
        """
        v, after = (self.online.values(states).mean(0) for states in (batch.states, batch.next_states))
        errors = batch.rewards + self.gamma * (1.0 - batch.terminated.float()) * after - v
        return self.advantages(batch.states, batch.utterances), errors.numpy()

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
