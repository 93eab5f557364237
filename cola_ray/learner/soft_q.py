"""ETPO's soft Q: a K-way head on the frozen base's e, and what it is fitted to.

    e (N, H) ─> Qbar(e) ────┐                        pi, rho (N, K)
                            ├─> V of each state ─> targets r + g V(next) ─> squared error of Q(e, action taken)
    pi, rho ────────────────┘                                              then Qbar follows by Polyak averaging

    with an actor   Q(e) ─> actor loss, summed over all K actions ─> the policy's update, on the same batch
    without         rho exp(Q / beta) / Z acts, V is its own, and batches are of any age

At first every action is worth the same, and the best policy is the reference. N
positions are scored: where an action was taken, and the last one of a sequence.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cola_ray.algorithms import etpo
from cola_ray.algorithms.advantages import beyond_noise
from cola_ray.algorithms.archer import polyak_
from cola_ray.learner.value import level_of, step_together
from cola_ray.model.modeling_cola import QHead


class SoftQLearner:
    """Beside an actor: online head, target head and Adam, small and whole on every rank, with a clip of its own.

    ``torch.distributed`` must be initialised.

    Args:
        tau: share of the online head that the target takes over after each gradient step.
        steps: gradient steps a batch.
    """

    def __init__(
        self, width: int, num_actions: int, device: torch.device, *, lr: float, tau: float, grad_clip: float,
        steps: int, seed: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.online = QHead(width, num_actions).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=lr)
        self.tau, self.grad_clip, self.steps = tau, grad_clip, steps

    @torch.no_grad()
    def start(self, pieces: Sequence[dict[str, Tensor]], num_actions: int) -> None:
        """Before the first step: every action of every state is worth what the average one leads to.

        From 0, actions that were taken would be learnt to be worth more than those that were not, by the rewards' level
        alone. All ranks call; once there has been a step it changes nothing.
        """
        if self.optimizer.state:
            return
        level = level_of(pieces, num_actions)
        for head in (self.online, self.target):
            nn.init.constant_(head.layers[-1].get_parameter("bias"), level)

    def fit(self, pieces: Sequence[dict[str, Tensor]], num_actions: int, beta: float) -> dict[str, Tensor]:
        """``steps`` gradient steps on ``mean (Q(e, a) - target)^2``; all ranks call.

        Args:
            pieces: of this rank, with ``hidden_states`` (B, T, H), ``policy`` and ``reference`` (N, K)
                log-probabilities at the positions of ``scored_mask`` (B, T), ``rewards`` and ``discounts`` (B, T).
            num_actions: over all ranks.
            beta: weight of KL(policy || reference) in values.

        Returns:
            metric sums over actions, of the first step.
        """
        sums: dict[str, Tensor] = {}
        for step in range(self.steps):
            self.optimizer.zero_grad()
            for piece in pieces:
                mask = piece["action_mask"]
                goals = one_step_targets(self.target, piece, beta, piece["policy"])[mask]
                taken = self.online(piece["hidden_states"][mask]).gather(-1, piece["actions"][mask][:, None])[:, 0]
                error = beyond_noise(taken - goals, goals).square().sum()
                (error / num_actions).backward()
                if step == 0:
                    found = {"q/taken": taken.detach().sum(), "q/target": goals.sum(), "q/error": error.detach()}
                    sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            step_together(self.online, self.optimizer, self.grad_clip)
            polyak_(self.target.parameters(), self.online.parameters(), self.tau)
        return sums

    @torch.no_grad()
    def q(self, piece: dict[str, Tensor]) -> Tensor:
        """What the policy follows, (N, K)."""
        return self.online(piece["hidden_states"][piece["scored_mask"]])

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in ("online", "target", "optimizer")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            getattr(self, name).load_state_dict(saved)


@torch.no_grad()
def one_step_targets(target: QHead, piece: dict[str, Tensor], beta: float, policy: Tensor | None = None) -> Tensor:
    """``r + g V(next)`` at each action, 0 elsewhere, (B, T).

    Args:
        piece: as for :meth:`SoftQLearner.fit`.
        policy: (N, K) log-probabilities, whose values count; None for the best policy's.
    """
    scored, reference = piece["scored_mask"], piece["reference"]
    q = target(piece["hidden_states"][scored])
    if policy is None:
        found = etpo.best_soft_values(q, reference, beta)
    else:
        found = etpo.soft_values(q, policy, reference, beta)
    values = torch.zeros(scored.shape, device=found.device).masked_scatter(scored, found)
    final = values[last_positions(piece["attention_mask"])]
    return etpo.soft_targets(piece["rewards"], piece["discounts"], values, final, piece["action_mask"])


def last_positions(attention_mask: Tensor) -> Tensor:
    """True at each row's last token, (B, T); padding is on the right."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return places == attention_mask.sum(1, keepdim=True) - 1
