"""RLOO: compares a completion with the mean of the other ones of its prompt.

    A_i = r_i - 1/(G-1) sum_{j != i} r_j        Ahmadian et al. 2024, "Back to Basics", eq. 6

The baseline is unbiased, since no reward is in its own baseline; no value network, and no division by a spread.
"""

from collections.abc import Sequence

from torch import Tensor

from cola_ray.algorithms.advantages import Outcomes, centred, within_each_prompt


def advantages(prompts: Sequence[Outcomes]) -> list[Tensor]:
    return within_each_prompt(prompts, leave_one_out)


def leave_one_out(rewards: Tensor) -> Tensor:
    """``r_i - mean_{j != i} r_j`` over rewards (P, G).

    Example: rewards [[6, 3]] -> [[3, -3]].
    """
    group_size = rewards.shape[-1]
    return centred(rewards) * (group_size / (group_size - 1))
