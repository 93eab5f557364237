"""How the losses of single actions become one number, ``rl.loss_agg_mode``; the names are verl's.

    token-mean                 sum_i sum_t l_it / sum_i L_i        DAPO, Yu et al. 2025, eq. 8
    seq-mean-token-mean        1/N sum_i 1/L_i sum_t l_it          GRPO, Shao et al. 2024, eq. 3
    seq-mean-token-sum         1/N sum_i sum_t l_it                the policy gradient, Williams 1992
    seq-mean-token-sum-norm    1/N sum_i 1/M sum_t l_it            Dr. GRPO, Liu et al. 2025, section 3.2

All sums are over the global batch: N sequences, L_i actions in sequence i; M is a constant, the most actions that a
completion may take. Learners divide every loss by the number of actions in the batch, so a mode is a weight per action
on top of that, and a micro-batch needs only its own lengths.
"""

from typing import Literal

from torch import Tensor

LossAggMode = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def loss_weights(
    mask: Tensor, mode: LossAggMode, num_actions: int, num_sequences: int, max_actions: int
) -> Tensor | None:
    """The weight of each row's actions, (B, 1) float64: ``sum w l / num_actions`` is the aggregated loss. None: all 1.

    Args:
        mask: (B, T) bool, where an action was taken; a row is a whole sequence.
        num_actions, num_sequences: of the global batch; sequences without an action do not count.
        max_actions: M.

    Example: lengths 1 and 3 of 4 actions in 2 sequences, seq-mean-token-mean -> 2 and 2/3.
    """
    if mode == "token-mean":
        return None
    lengths = mask.sum(1, keepdim=True).double()
    whole = num_actions / num_sequences
    divisors = {
        "seq-mean-token-mean": lengths.clamp_min(1.0),
        "seq-mean-token-sum": lengths.new_ones(lengths.shape),
        "seq-mean-token-sum-norm": lengths.new_full(lengths.shape, max_actions),
    }
    return whole / divisors[mode]
