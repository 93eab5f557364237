"""GRPO: compares a completion with the others of its prompt, in units of their spread.

    A_i = (r_i - mean_j r_j) / std_j r_j        Shao et al. 2024, "DeepSeekMath", section 4.1.2

The advantage is the same for every action of a completion; the loss is PPO's clipped surrogate. ``rl.scale_rewards``
sets the divisor, by TRL's names:

    group    the spread within the prompt: each prompt teaches as much as any other
    batch    that of all rewards of the batch: prompts keep their proportions     Liu et al. 2025, arXiv 2508.08221
    none     1: no prompt counts more for being nearly solved or nearly hopeless  Liu et al. 2025, "Dr. GRPO", section 3
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cola_ray.algorithms.advantages import Outcomes, centred, over_spread, standardised, within_each_prompt

Scale = Literal["group", "batch", "none"]


def advantages(prompts: Sequence[Outcomes], scale_rewards: Scale = "group") -> list[Tensor]:
    """Advantages of each prompt's completions, (G,); exactly 0 where rewards are equal, or differ only by rounding.

    Example: rewards [1, 0] -> [0.7071, -0.7071]; none: [0.5, -0.5].
    """
    if scale_rewards == "group":
        return within_each_prompt(prompts, standardised)
    differences = within_each_prompt(prompts, centred)
    if scale_rewards == "none":
        return differences
    everything = torch.cat([one.rewards for one in prompts]).double()
    if len(everything) == 1:
        return differences
    spread, largest = everything.std(), everything.abs().max()
    return [over_spread(one.double(), spread, largest).to(one.dtype) for one in differences]
