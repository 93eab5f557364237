"""Weights for rollouts drawn by an older version, or with another engine's arithmetic: ``rl.importance_mode``.

    d_t = log pi_learner(a_t) - log pi_rollout(a_t)

    token        w_t = exp(d_t)                  each action by itself
    sequence     w   = exp(sum_t d_t)            all actions of a sequence: of rewards unbiased, and of most variance
    geometric    w   = exp(1/L sum_t d_t)        a sequence's mean deviation per action

    truncate     min(w, cap)                     Espeholt et al. 2018, "IMPALA"; Yao et al. 2025, "TIS"
    mask         w up to the cap, else 0: leaves out what is further off

The learner's policy is the one before the batch's first update; changes by updates are in the surrogate's ratio. A KL
divergence in the loss is not weighted. Names are those of TRL's ``vllm_importance_sampling_mode``, which has no
geometric mean. That is verl's ``seq_mean_k1``, and like it also masks sequences below 1 / cap: a mean per action is
near 1 for any sequence, and shows deviations on both sides. verl masks below 1 / cap in its other modes, too.
"""

from typing import Literal

from torch import Tensor

ImportanceMode = Literal[
    "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask"
]


def importance_weights(
    log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, cap: float, mode: ImportanceMode
) -> tuple[Tensor, Tensor]:
    """Weights, 0 where masked, and where the cap changed one (bool); (B, T).

    Args:
        log_probs: of the learner before the batch's first update; finite where not masked.
        mask: (B, T) bool; a row is a sequence.

    Example: cap 2, d 1 and -0.5 in a row: token_truncate -> 2, 0.61; sequence_truncate -> 1.65 twice; geometric_mask ->
    1.28 twice.
    """
    level, _, kind = mode.partition("_")
    difference = (log_probs - rollout_log_probs).masked_fill(~mask, 0.0)
    if level != "token":
        whole = difference.sum(1, keepdim=True)
        if level == "geometric":
            whole = whole / mask.sum(1, keepdim=True).clamp_min(1)
        difference = whole.expand_as(difference)
    weights = difference.exp()
    if kind == "truncate":
        weights = weights.clamp(max=cap)
        beyond = weights >= cap
    else:
        beyond = weights > cap
        if level == "geometric":
            beyond = beyond | (weights < 1.0 / cap)
        weights = weights.masked_fill(beyond, 0.0)
    return weights.masked_fill(~mask, 0.0), beyond & mask


def effective_sample_size(mean: float, mean_square: float) -> float:
    """The number of equal samples that the weighted ones are worth, as a share: ``(mean w)^2 / mean w^2``; 0 of none.

    Kong 1992; 1 where all weights are equal, 1 / n where one of n has all the weight.
    """
    return mean * mean / mean_square if mean_square else 0.0
