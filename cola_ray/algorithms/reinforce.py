"""REINFORCE with one baseline for the whole batch.

    A_i = (r_i - mean_batch r) / std_batch r    Williams 1992, section 2; whitened as in REINFORCE++ (Hu 2025, eq. 3)

One completion per prompt is enough. Prompts of different difficulty share the baseline, which leaves more variance than
a comparison within a prompt does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cola_ray.algorithms.advantages import Outcomes, standardised


def advantages(prompts: Sequence[Outcomes]) -> list[Tensor]:
    """Advantages; exactly 0 where all rewards of the batch are equal, or differ only by rounding.

    Example: rewards [1], [0] -> [0.7071], [-0.7071].
    """
    everything = torch.cat([one.rewards for one in prompts])
    if len(everything) == 1:
        return [torch.zeros_like(everything)]
    return list(standardised(everything).split([len(one.rewards) for one in prompts]))
