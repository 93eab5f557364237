"""GRPO: a completion against the others of its prompt, in units of their spread.

    A_i = (r_i - mean_j r_j) / std_j r_j        Shao et al. 2024, "DeepSeekMath", section 4.1.2
    A_i =  r_i - mean_j r_j                     Liu et al. 2025, "Dr. GRPO": hard and easy prompts weigh no more

The same number at every action of a completion; the loss is PPO's clipped surrogate.
"""

from collections.abc import Sequence

from torch import Tensor

from cola_ray.algorithms.advantages import Outcomes, centred, standardised, within_each_prompt


def advantages(prompts: Sequence[Outcomes]) -> list[Tensor]:
    return within_each_prompt(prompts, group_normalised)


def group_normalised(rewards: Tensor, normalise_std: bool = True) -> Tensor:
    """``(r - mean_G) / std_G`` with the unbiased std.

    Args:
        rewards: (P, G) with G >= 2.
        normalise_std: False leaves the division out.

    Returns:
        advantages (P, G); exactly 0 in a group whose rewards are equal, or differ by rounding alone.

    Example: rewards [[1, 0]] -> [[0.7071, -0.7071]]; without std [[0.5, -0.5]].
    """
    return standardised(rewards) if normalise_std else centred(rewards)
