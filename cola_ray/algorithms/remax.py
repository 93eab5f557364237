"""ReMax: compares a completion with the greedy one of its prompt.

    A_i = r(x, y_i) - r(x, greedy(x))           Li et al. 2023, "ReMax", eq. 6 and algorithm 1

Unbiased, since the baseline depends only on the prompt and the policy; it costs one more completion per prompt and
works with a single sample. If the greedy completion has no reward, the prompt teaches nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cola_ray.algorithms.advantages import Outcomes, within_noise


def advantages(prompts: Sequence[Outcomes]) -> list[Tensor]:
    """Example: rewards [1, 0], greedy 1 -> [0, -1]."""
    return [_against_greedy(one) for one in prompts]


def _against_greedy(one: Outcomes) -> Tensor:
    greedy = torch.tensor(one.greedy, dtype=torch.float64)
    if greedy.isnan():
        return torch.zeros_like(one.rewards)
    gained = one.rewards.double() - greedy
    noise = within_noise(gained.abs(), torch.maximum(one.rewards.double().abs(), greedy.abs()))
    return gained.masked_fill(noise, 0.0).to(one.rewards.dtype)
