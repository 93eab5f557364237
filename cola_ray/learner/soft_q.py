"""ETPO's soft Q beside an actor: a K-way head on the frozen base's e, and its targets.

    e (N, H) ─> Qbar(e) ────┐                        pi, rho (N, K)
                            ├─> V of each state ─> targets r + g V(next) ─> squared error of Q(e, action taken)
    pi, rho ────────────────┘                                              then Qbar follows by Polyak averaging

    Q(e) ─> actor loss, summed over all K actions ─> the policy's update, on the same batch

At first every action has the same value, and the best policy is the reference. N positions are scored: those where an
action was taken, and the last one of a sequence. Without an actor: ``actor_free.py``.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cola_ray.algorithms import etpo
from cola_ray.algorithms.advantages import beyond_noise
from cola_ray.algorithms.heads import HeadLearner
from cola_ray.learner.micro_batch import Distributions, Encoded, last_positions
from cola_ray.learner.value import level_of
from cola_ray.model.modeling_cola import QHead


class SoftQLearner(HeadLearner):
    """Online head, target head and Adam. ``torch.distributed`` must be initialised.

    Args:
        tau: share of the online head that the target takes over after each gradient step.
        steps: gradient steps per batch.
        seed: of the head's initial weights.
    """

    def __init__(
        self, width: int, num_actions: int, device: torch.device, *, lr: float, tau: float, grad_clip: float,
        steps: int, seed: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        super().__init__(self._head(width, num_actions).to(device), lr=lr, grad_clip=grad_clip, with_target=True)
        self.tau, self.steps = tau, steps

    def _head(self, width: int, num_actions: int) -> nn.Module:
        return QHead(width, num_actions)

    def _start_at(self, head: Any, level: float) -> None:
        nn.init.constant_(head.layers[-1].get_parameter("bias"), level)

    def _goals(self, encoded: Encoded, of: Distributions, beta: float) -> Tensor:
        """Targets of Q for the actions taken, (B, T)."""
        return one_step_targets(self.target, encoded, of.reference, beta, of.policy)

    @torch.no_grad()
    def start(self, batches: Sequence[Encoded], num_actions: int) -> None:
        """Before the first step: set the value of every action in every state to that of the average action.

        From 0, actions taken would get higher values than those that were not, merely by the rewards' level. All ranks
        call; after the first step this does nothing.
        """
        if self.is_new:
            level = level_of([(one.rewards, one.batch) for one in batches], num_actions)
            for head in (self.online, self.target):
                self._start_at(head, level)

    def fit(
        self, batches: Sequence[Encoded], distributions: Sequence[Distributions], num_actions: int, beta: float
    ) -> dict[str, Tensor]:
        """``steps`` gradient steps on ``mean (Q(e, a) - target)^2``; all ranks call.

        Args:
            num_actions: over all ranks.
            beta: weight of KL(policy || reference) in values.

        Returns:
            metric sums over actions, of the first step.
        """
        sums: dict[str, Tensor] = {}

        def losses(step: int) -> Iterator[Tensor]:
            for encoded, of in zip(batches, distributions, strict=True):
                batch, mask = encoded.batch, encoded.batch.action_mask
                goals = self._goals(encoded, of, beta)[mask]
                q = self.online(encoded.hidden_states[mask])
                taken = q.gather(-1, batch.actions[mask][:, None])[:, 0]
                error = beyond_noise(taken - goals, goals).square().sum()
                yield error / num_actions
                if step == 0:
                    found = {"q/taken": taken.detach().sum(), "q/target": goals.sum(), "q/error": error.detach()}
                    sums.update({name: sums.get(name, 0.0) + value for name, value in found.items()})

        for step in range(self.steps):
            self.accumulate(losses(step))
            self.descend(tau=self.tau)
        return sums

    @torch.no_grad()
    def q(self, encoded: Encoded) -> Tensor:
        """Values of all actions at the scored positions, (N, K)."""
        found: Tensor = self.online(encoded.hidden_states[encoded.batch.scored_mask])
        return found

    def control(self, encoded: Encoded, of: Distributions) -> Tensor:
        """Q of each action less the policy's mean, (N, K): a control variate."""
        q = self.q(encoded)
        return q - etpo.soft_values(q, of.policy, of.reference, 0.0)[..., None]


@torch.no_grad()
def one_step_targets(
    target: QHead, encoded: Encoded, reference: Tensor, beta: float, policy: Tensor | None = None
) -> Tensor:
    """``r + g V(next)`` at each action, 0 elsewhere, (B, T).

    Args:
        reference: (N, K) log-probabilities at the scored positions, including each row's last.
        policy: (N, K), the policy whose values count; None for the best policy.
    """
    batch = encoded.batch
    q = target(encoded.hidden_states[batch.scored_mask])
    if policy is None:
        found = etpo.best_soft_values(q, reference, beta)
    else:
        found = etpo.soft_values(q, policy, reference, beta)
    values = batch.place(found)
    final = values[last_positions(batch.attention_mask)]
    return etpo.soft_targets(encoded.rewards, batch.discounts, values, final, batch.action_mask)
