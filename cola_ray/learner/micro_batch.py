"""What is known of a micro-batch, one type per stage: a field that does not exist yet belongs to a later type.

    Batch ──cut──> MicroBatch                              as it was collated, on the device
                       │ forward pass
                       v
                   Frozen                                  e, the reference's logits, aliases: the same at every update
                       │ Encoded = MicroBatch + e + rewards, the input of value heads and Qs
                       v
                   Scored, Distributions                   the policy before the batch's first update
                       │
                       v
                   Advantages, ActionValues or Rewards     what the policy is trained on
                       │
                       v
                   Ready                                   all of these, for an update

Legend: B sequences, T positions, N of them scored, H hidden size, K actions. (B, T) tensors are 0 where no action was
taken, except ``input_ids`` and ``attention_mask``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cola_ray.batch import Batch
from cola_ray.learner.shared_prompts import SharedPrompts


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a rank's batch."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64
    actions: Tensor  # (B, T) int64
    action_mask: Tensor  # (B, T) bool, where the policy chose an action
    scored_mask: Tensor  # (B, T) bool, the N positions with logits: those of actions and, for a Q, each row's last
    rollout_log_probs: Tensor  # (B, T) float32, of the engine that drew the actions
    advantages: Tensor  # (B, T) float32, of the outcome
    rewards: Tensor  # (B, T) float32
    discounts: Tensor  # (B, T) float32, of the value after each action
    turn_starts: Tensor  # (B, T) bool, the first action of each turn
    hidden_states: Tensor | None = None  # (B, T, H), e, if the engine sends it
    shared_prompts: SharedPrompts | None = None  # if a prompt is shared, and computed once

    @classmethod
    def cut(
        cls, batch: Batch, start: int, stop: int, width: int, device: torch.device, score_last: bool = False,
        shares_prompts: bool = False,
    ) -> "MicroBatch":  # fmt: skip
        """Rows ``start`` to ``stop`` of a batch, ``width`` positions wide.

        Args:
            score_last: also score each row's last position, whose value counts if a limit cut the episode.
            shares_prompts: pack the rows if several have the same prompt, so that it is computed once.
        """
        padded = vars(batch.padded(start, stop, width))
        fields = {name: torch.from_numpy(rows).to(device) for name, rows in padded.items() if rows is not None}
        states = fields.get("hidden_states")
        if states is not None and states.dtype is torch.int16:  # NumPy has no bfloat16
            fields["hidden_states"] = states.view(torch.bfloat16)
        scored = fields["action_mask"]
        if score_last:
            scored = scored | last_positions(fields["attention_mask"])
        shared = SharedPrompts.of(*batch.prompts(start, stop), width) if shares_prompts else None
        return cls(**fields, scored_mask=scored, shared_prompts=shared and shared.to(device))

    @property
    def held(self) -> Tensor:
        """The action at the token before, (N,); -1 where the turn has none."""
        before = self.actions.masked_fill(~self.action_mask, -1).roll(1, 1)
        before[:, 0] = -1
        return before.masked_fill(self.turn_starts, -1)[self.scored_mask]

    def taken(self, values: Tensor) -> Tensor:
        """Values of the actions taken: (N, K) -> (N,)."""
        return values.gather(-1, self.actions[self.scored_mask][:, None])[:, 0]

    def place(self, values: Tensor) -> Tensor:
        """(N,) -> (B, T), 0 at positions that are not scored."""
        scored = self.scored_mask
        return torch.zeros(scored.shape, dtype=values.dtype, device=values.device).masked_scatter(scored, values)


@dataclass(frozen=True)
class Frozen:
    """Outputs of the model's frozen parts; None if the policy does not need them, or before the first pass."""

    hidden_states: Tensor | None = None  # (B, T, H), e
    reference_logits: Tensor | None = None  # (N, K)
    aliases: Tensor | None = None  # (N, K) bool, which actions would have given the token that was said


@dataclass(frozen=True)
class Encoded:
    """A micro-batch with the states that value heads and Qs read."""

    batch: MicroBatch
    hidden_states: Tensor  # (B, T, H), e
    rewards: Tensor  # (B, T), including penalties charged to them


@dataclass(frozen=True)
class Distributions:
    """Log-probabilities of all actions at the scored positions, (N, K) each."""

    policy: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Scored:
    """The policy before the batch's first update, at the actions taken; without gradient."""

    log_probs: Tensor  # (B, T), -inf where top_k leaves the action out
    kl_penalties: Tensor  # (B, T), see algorithms/policy_loss.py
    marginals: Tensor | None = None  # (B, T), of the tokens said, if aliases are summed over


@dataclass(frozen=True)
class Advantages:
    """The weights of actions in a policy gradient."""

    values: Tensor  # (B, T)
    hold_kl: bool = False  # whether they already include KL penalties
    deviation: Tensor | None = None  # the scalar that they were divided by, if they are whitened
    control: Tensor | None = None  # (N, K), a control variate's value of every action


@dataclass(frozen=True)
class ActionValues:
    """Action values, which ETPO's policy follows."""

    q: Tensor  # (N, K)


@dataclass(frozen=True)
class Rewards:
    """The rewards that TBRM's policy fits with its own logits; (B, T), of each action."""

    values: Tensor
    discounts: Tensor
    level: float = 0.0  # of every state's value, before anything is learnt


@dataclass(frozen=True)
class Ready:
    """A micro-batch with everything that is known of it before an update."""

    batch: MicroBatch
    frozen: Frozen
    follows: Advantages
    loss_weights: Tensor | None  # (B, 1), weight of each sequence's actions in the loss; None: 1
    old: Scored | None = None  # None: the current policy is the one before the batch


def last_positions(attention_mask: Tensor) -> Tensor:
    """True at each row's last token, (B, T); padding is on the right."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return places == attention_mask.sum(1, keepdim=True) - 1
