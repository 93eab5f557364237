"""TBRM's residuals for a micro-batch's trajectories, see algorithms/tbrm.py.

    logits, reference's ─┬─ at the first action, and after the last one ─> V(s_1), V(s_T+1) ─┬─> residuals
                         └─ of the actions taken ─> log(pi / rho) ───────────────────────────┘

Legend: B sequences, T positions, N of them scored, K actions.
"""

import torch
from torch import Tensor

from cola_ray.algorithms import tbrm
from cola_ray.algorithms.advantages import beyond_noise
from cola_ray.learner.micro_batch import MicroBatch, Rewards, last_positions


def trajectory_residuals(
    logits: Tensor,
    reference_logits: Tensor,
    batch: MicroBatch,
    follows: Rewards,
    log_ratios: Tensor,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Residuals, exactly 0 where they are no larger than rounding, and the values of the first states; (B, 1) each.

    Args:
        logits, reference_logits: (N, K), at ``batch.scored_mask``, which includes each row's last position.
        log_ratios: (B, T), ``log(pi / rho)`` of the actions taken.
        temperature: of the rollouts; the values belong to the policy at this temperature.
    """
    mask = batch.action_mask
    first, last = mask & (mask.cumsum(1) == 1), last_positions(batch.attention_mask)
    both = first | last
    chosen = both[batch.scored_mask]  # two rows per sequence, of N rows as wide as a vocabulary

    def of_chosen(wide: Tensor) -> Tensor:
        rows = wide[chosen]
        return rows.to(torch.promote_types(rows.dtype, torch.float32)) / temperature

    found = tbrm.logit_values(of_chosen(logits), of_chosen(reference_logits), beta)
    values = torch.zeros(mask.shape, dtype=found.dtype, device=found.device).masked_scatter(both, found)
    of_first, of_last = ((values * at).sum(1) for at in (first, last))
    of_each, returns = tbrm.residuals(
        log_ratios, follows.values, follows.discounts, mask, of_first, of_last, beta, follows.level
    )  # fmt: skip
    return beyond_noise(of_each, returns)[:, None], of_first[:, None] + follows.level
