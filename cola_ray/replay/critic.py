"""ArCHer's utterance critic: twin Q and V heads, their target heads, and the optimizer.

    inputs     features of the frozen base's states e: of a state, e at its last token and the number of the turn; of
               an utterance, the mean of e over its tokens and whether the state already contains it;
               or the text (last 512 tokens), read by a Hugging Face encoder that is trained with the heads
    heads      Q_i([h(s); h(u)]) and V_i(h(s)), i = 1, 2: MLPs with two hidden ReLU layers as wide as the features

The base never changes, so features are stored in the replay buffer once and critic steps do not run the base.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cola_ray.algorithms.advantages import typical_value
from cola_ray.algorithms.archer import (
    TwinHeads,
    expectile_loss,
    q_targets,
    twin_squared_error,
    utterance_advantages,
)
from cola_ray.algorithms.archer_soft import soft_value_targets
from cola_ray.algorithms.gradients import NonFiniteError
from cola_ray.algorithms.heads import HeadLearner

Array = np.ndarray
Inputs = Tensor | Mapping[str, Tensor]
"""B states or utterances: features (B, S) or (B, U), or a tokenizer's output for B texts."""


class TextTwinHeads(nn.Module):
    """:class:`TwinHeads` over the pooled output of a text encoder trained with them (Zhou et al. 2024, section 3.4).

    Args:
        encoder: a Hugging Face encoder; if it has no pooler, the state of the first token is used.
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
    """B replayed transitions, and B' states, each with an utterance; V is fitted to the Q of this utterance.

    The utterance was freshly drawn from the policy; or it was replayed, with a soft advantage by which Q exceeds V.
    """

    states: Inputs
    utterances: Inputs
    next_states: Inputs
    rewards: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool; False where a limit cut the episode
    fresh_states: Inputs
    fresh_utterances: Inputs
    weights: Tensor | None = None  # (B,) importance weights of prioritised replay
    soft_advantages: Tensor | None = None  # (B',) if replayed utterances are used instead of fresh ones

    def to(self, device: torch.device) -> "CriticBatch":
        return CriticBatch(**{name: moved(value, device) for name, value in vars(self).items()})


def moved(inputs: Any, device: torch.device) -> Any:
    """Move a tensor or a tokenizer's output to ``device``; None is returned unchanged."""
    if isinstance(inputs, Mapping):
        return {name: moved(value, device) for name, value in inputs.items()}
    return None if inputs is None else inputs.to(device)


class Critic(HeadLearner):
    """Online heads with Adam, and target heads that follow them; inputs are moved to the heads' device.

    Args:
        heads: the online heads, :class:`TwinHeads` or :class:`TextTwinHeads`.
        gamma: discount per turn.
        tau: after every step, ``target <- (1 - tau) target + tau online``.
        lr: of Adam.
        grad_clip: largest gradient norm.
        expectile: 0 fits V to fresh utterances (ArCHer); above 0.5, to replayed ones by expectile regression (IQL).
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
        super().__init__(heads, lr=lr, grad_clip=grad_clip, with_target=True, combine=self._average_gradients)
        self.gamma, self.tau, self.expectile = gamma, tau, expectile
        self.average: Callable[[Tensor], None] | None = None  # averages gradients over replicas, in place
        self.steps = 0

    @property
    def device(self) -> torch.device:
        where: torch.device = next(self.online.parameters()).device
        return where

    def step(self, batch: CriticBatch) -> dict[str, float]:
        """Take a gradient step on Q and V, then move the target heads. Returns metrics.

        Raises:
            NonFiniteError: the gradient is not finite, on every replica; the weights are left unchanged.
        """
        batch = batch.to(self.device)
        targets = self._q_targets(batch)
        q = self.online.q_values(batch.states, batch.utterances)
        v, v_loss = self._value_loss(batch)
        loss = twin_squared_error(q, targets, batch.weights) + v_loss
        self.accumulate([loss])
        try:
            grad_norm = self.descend(tau=self.tau)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"the critic's loss is {loss.item()} at its step {self.steps}, and over all replicas {error}: "
                "a reward or a state is NaN"
            ) from error
        self.steps += 1
        return {
            "critic/loss": loss.item(),
            "critic/td_error": (q.detach() - targets).abs().mean().item(),
            "critic/q": q.mean().item(),
            "critic/v": v.mean().item(),
            "critic/grad_norm": float(grad_norm),
        }

    def initialise(
        self, rewards: Tensor, terminated: Tensor, states: Tensor | None = None, utterances: Tensor | None = None
    ) -> None:
        """Before the first step, set all values to that of an average turn, ``mean(r) / (1 - mean(discount))``.

        Advantages then start at exactly 0. A critic that starts at 0, in a game with -1 per turn, spends its first
        thousand steps on finding the level, and until then PPO's advantages only measure how far away the next -1 is.

        Args:
            rewards, terminated: (N,) of N turns.
            states, utterances: (N, S) and (N, U) features, from whose means and deviations the heads get their
                standardisation; None for an encoder's heads, which do not standardise.
        """
        rates = torch.stack([rewards.double().mean(), self.gamma * (1.0 - terminated.double()).mean()])
        self._average_over_replicas(rates)
        level = typical_value(*rates)
        for heads in (self.online, self.target):
            heads.start_at(level)
        for name, features in (("states", states), ("utterances", utterances)):
            if features is not None:
                wide = features.double()  # the variance is a difference of two large numbers
                moments = torch.stack([wide.mean(0), wide.square().mean(0)])
                self._average_over_replicas(moments)
                for heads in (self.online, self.target):
                    getattr(heads, name).measure(moments)

    def _average_over_replicas(self, measured: Tensor) -> None:
        if self.average is not None:
            self.average(measured)

    def _average_gradients(self, gradients: Sequence[Tensor]) -> None:
        if self.average is not None:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self.average(flat)
            for gradient, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    @torch.no_grad()
    def _q_targets(self, batch: CriticBatch) -> Tensor:
        return q_targets(batch.rewards, batch.terminated, self.target.values(batch.next_states), self.gamma)

    def _value_loss(self, batch: CriticBatch) -> tuple[Tensor, Tensor]:
        if self.expectile:
            v = self.online.values(batch.states)
            q = self.target.q_values(batch.states, batch.utterances)
            return v, expectile_loss(v, q, self.expectile, batch.weights)
        v, goals = self.online.values(batch.fresh_states), self._value_goals(batch)
        return v, twin_squared_error(v, goals)

    @torch.no_grad()
    def _value_goals(self, batch: CriticBatch) -> Tensor:
        q: Tensor = self.target.q_values(batch.fresh_states, batch.fresh_utterances)
        return q if batch.soft_advantages is None else soft_value_targets(q, batch.soft_advantages)

    @torch.no_grad()
    def advantages(self, states: Inputs, utterances: Inputs) -> Array:
        """``min_i Q_i(s, u) - min_i V_i(s)`` of B utterances by the online heads, (B,) float32."""
        states, utterances = moved(states, self.device), moved(utterances, self.device)
        return utterance_advantages(self.online.q_values(states, utterances), self.online.values(states)).cpu().numpy()

    @torch.no_grad()
    def advantages_and_td_errors(self, batch: CriticBatch) -> tuple[Array, Array]:
        """Advantages of B replayed utterances, and V's temporal-difference errors of the same turns, (B,) each.

        The error is ``r + gamma (1 - terminated) V(s') - V(s)``, with V the mean of the online twins. Its expectation
        is the advantage if the critic is right.
        """
        batch = batch.to(self.device)
        v, after = (self.online.values(states).mean(0) for states in (batch.states, batch.next_states))
        errors = batch.rewards + self.gamma * (1.0 - batch.terminated.float()) * after - v
        return self.advantages(batch.states, batch.utterances), errors.cpu().numpy()

    @torch.no_grad()
    def td_errors(self, batch: CriticBatch) -> Array:
        """(B,) priorities of the replayed rows: ``|Q_i - target|``, averaged over the twins."""
        batch = batch.to(self.device)
        q = self.online.q_values(batch.states, batch.utterances)
        return (q - self._q_targets(batch)).abs().mean(0).cpu().numpy()

    def target_weights(self) -> dict[str, Array]:
        """The target heads' weights by name, for players that choose among utterances by Q (CHAI)."""
        return {name: tensor.cpu().numpy().copy() for name, tensor in self.target.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps = state["steps"]
