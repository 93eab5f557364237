"""GRPO: a completion against the others of its prompt, in units of their spread.

    A_i = (r_i - mean_j r_j) / std_j r_j        Shao et al. 2024, "DeepSeekMath", section 4.1.2

The same number at every action of a completion; the loss is PPO's clipped surrogate.
"""

from collections.abc import Sequence

from torch import Tensor

from cola_ray.algorithms.advantages import Outcomes, standardised, within_each_prompt


def advantages(prompts: Sequence[Outcomes]) -> list[Tensor]:
    """Of each prompt's completions, (G,); exactly 0 where their rewards are equal, or differ by rounding alone.

    Example: rewards [1, 0] -> [0.7071, -0.7071].
    """
    return within_each_prompt(prompts, standardised)
