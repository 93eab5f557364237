"""REINFORCE with one baseline for the whole batch.

    A_i = (r_i - mean_batch r) / std_batch r    Williams 1992, section 2; whitened as in REINFORCE++ (Hu 2025, eq. 3)

One completion a prompt is enough. Prompts of different difficulty share the baseline, which leaves more variance than
a comparison within a prompt does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cola_ray.algorithms.advantages import Outcomes


def advantages(prompts: Sequence[Outcomes], eps: float = 1e-8) -> list[Tensor]:
    """Example: rewards [1], [0] -> [0.7071], [-0.7071]."""
    everything = torch.cat([one.rewards for one in prompts])
    spread = everything.std().clamp_min(eps) if len(everything) > 1 else torch.ones(())
    return [(one.rewards - everything.mean()) / spread for one in prompts]
