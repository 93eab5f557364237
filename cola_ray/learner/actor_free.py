"""ETPO without an actor: only Q trains, ``rho exp(Q / beta) / Z`` acts, and batches may have any age.

    e (N, H) ─> Qbar(e) ─> V* = beta log sum_a rho exp(Qbar / beta) ─> r + g V*(next) ─> (Q(e, a) - target)^2
                  ^                                                                            │
                  └── Polyak average of Q <── ZeRO-3 step <────────────────────────────────────┘

The targets are valid whichever policy an action came from (``algorithms/etpo.py``), so there are no importance weights.
"""

import copy

import torch
from torch import Tensor

from cola_ray.algorithms import etpo
from cola_ray.algorithms.advantages import beyond_noise
from cola_ray.algorithms.heads import polyak_
from cola_ray.algorithms.policy_loss import entropy, exact_kl
from cola_ray.batch import Batch
from cola_ray.learner import sums
from cola_ray.learner.engine import ZeroEngine
from cola_ray.learner.micro_batch import Encoded, Frozen, MicroBatch
from cola_ray.learner.policies import SoftQPolicy, forward
from cola_ray.learner.soft_q import one_step_targets
from cola_ray.model.modeling_cola import QHead
from cola_ray.settings.config import RLConfig


class ActorFreeUpdate:
    """The optimizer steps of Q on one batch.

    Args:
        target: the result of :meth:`target_of`, made before ``zero`` took the policy over.
        shares_prompts: compute a prompt once for all of its rows in a micro-batch.
    """

    def __init__(
        self, rl: RLConfig, policy: SoftQPolicy, zero: ZeroEngine, target: QHead, shares_prompts: bool = False
    ) -> None:
        self.shares_prompts = shares_prompts
        self.rl, self.policy, self.zero, self.target = rl, policy, zero, target.to(zero.device)
        self.lr = rl.value_lr

    @staticmethod
    def target_of(policy: SoftQPolicy) -> QHead:
        """A copy of Q in float32, whole on every rank; make it before Q itself is partitioned."""
        return copy.deepcopy(policy.q).float().requires_grad_(False)

    @property
    def heads(self) -> dict[str, QHead]:
        """What a checkpoint holds besides the engine's state, by the name under which it is saved."""
        return {"target_q": self.target}

    @torch.no_grad()
    def measure(self, batch: Batch, beta: float) -> dict[str, Tensor]:
        """Metric sums only."""
        found: dict[str, Tensor] = {}
        for one, frozen in self._cut(batch):
            sums.add(found, self._error(one, frozen, beta)[1])
        return found

    def improve(self, batch: Batch, lr: float, beta: float) -> tuple[dict[str, Tensor], float]:
        """``value_steps`` optimizer steps on ``mean (Q(e, a) - r - g V(next))^2``; all ranks call.

        Returns:
            metric sums of the first step; the gradient's norm in the last.

        Raises:
            NonFiniteError: loss or gradient is not finite; the weights are those before the optimizer step.
        """
        found: dict[str, Tensor] = {}
        batches = self._cut(batch)
        for step in range(self.rl.value_steps):
            for index, (one, frozen) in enumerate(batches):
                error, metrics, frozen = self._error(one, frozen, beta)
                batches[index] = one, frozen
                self.zero.backward(error / batch.num_actions_global, last=index == len(batches) - 1)
                if step == 0:
                    sums.add(found, metrics)
            grad_norm = self.zero.step(lr)
            fitted = [tensor.float().clone() for _, tensor in self.zero.stream(self.policy.published())]
            polyak_(self.target.parameters(), fitted, self.rl.target_tau)
        return found, grad_norm

    def _cut(self, batch: Batch) -> list[tuple[MicroBatch, Frozen]]:
        made = [MicroBatch.cut(batch, *cut, self.zero.device, True, self.shares_prompts)
                for cut in batch.micro_batches]  # fmt: skip
        return [(one, Frozen(one.hidden_states)) for one in made]

    def _error(self, batch: MicroBatch, frozen: Frozen, beta: float) -> tuple[Tensor, dict[str, Tensor], Frozen]:
        """Squared error, summed over actions, with metric sums and the outputs of the frozen parts."""
        q, frozen = forward(self.zero.engine, batch, frozen)
        assert frozen.hidden_states is not None
        assert frozen.reference_logits is not None
        mask, reference = batch.action_mask, frozen.reference_logits.log_softmax(-1)
        encoded = Encoded(batch, frozen.hidden_states, batch.rewards)
        goals = one_step_targets(self.target, encoded, reference, beta)[mask]
        taken = batch.place(batch.taken(q))[mask]
        error = beyond_noise(taken - goals, goals).square().sum()
        with torch.no_grad():
            policy = etpo.best_log_probs(q, reference, beta)
            return error, {
                "q/taken": taken.sum(), "q/target": goals.sum(), "q/error": error.detach(),
                "policy/kl": batch.place(exact_kl(policy, reference))[mask].sum(),
                "policy/entropy": batch.place(entropy(policy))[mask].sum(),
            }, frozen  # fmt: skip
