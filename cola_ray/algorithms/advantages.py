"""What several algorithms share: what an outcome is, and when outcomes differ.

Legend: G completions of a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcomes:
    """Rewards of one prompt's completions."""

    rewards: Tensor  # (G,)
    greedy: float = float("nan")  # of the greedy completion, if the algorithm asks for one


def of_each(rows: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``compute`` applied to each row (G,), results in order; rows of equal length are computed together, as (P, G)."""
    places: dict[tuple[int, torch.dtype], list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault((len(row), row.dtype), []).append(place)
    found: dict[int, Tensor] = {}
    for of_length in places.values():
        found.update(zip(of_length, compute(torch.stack([rows[place] for place in of_length])), strict=True))
    return [found[place] for place in range(len(rows))]


def within_each_prompt(prompts: Sequence[Outcomes], compare: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``compare`` maps rewards (P, G) to advantages; 0 for a completion that has nothing to compare with."""
    return of_each(
        [one.rewards for one in prompts],
        lambda rewards: compare(rewards) if rewards.shape[-1] > 1 else torch.zeros_like(rewards),
    )


NOISE = 1e-5
"""The difference that rounding may make, for numbers of order 1. A reward model in float32 gives one answer scores that
differ by some 1e-6 from batch to batch (eps 1.2e-7 over sums of a few dozen rounded layers); real differences are at
least a hundred times larger. TRL adds 1e-4 to the spread that it divides by (here: :func:`within_noise`)."""


def within_noise(difference: Tensor, largest: Tensor) -> Tensor:
    """Whether a difference or a spread is no more than rounding makes of values as large as ``largest``.

    ``difference <= NOISE max(1, largest)``: rounding is proportional to the size of numbers, and networks of order 1
    round their results accordingly, however small these are. NaN is not within noise, so that it is not hidden.
    """
    return difference <= NOISE * largest.clamp_min(1.0)


def beyond_noise(errors: Tensor, goals: Tensor) -> Tensor:
    """Errors of values, set to exactly 0 where they are no larger than the rounding of their goals.

    Adam's steps are as long for gradients of 1e-8 as for any others, so values would learn to tell states apart by
    rounding.
    """
    return errors.masked_fill(within_noise(errors.detach().abs(), goals.abs()), 0.0)


def all_alike(values: Tensor) -> bool:
    """Whether values differ by noise only, so that none is better than another."""
    return bool(alike(values.flatten()))


def alike(values: Tensor) -> Tensor:
    """:func:`all_alike` over the last dimension."""
    wide = values.double()
    return within_noise(wide.amax(-1) - wide.amin(-1), wide.abs().amax(-1))


def over_spread(values: Tensor, spread: Tensor, largest: Tensor) -> Tensor:
    """``values / spread``, and exactly 0 where the spread is noise.

    Args:
        values: differences from a mean.
        spread: of them, e.g. their standard deviation; broadcasts.
        largest: the greatest magnitude of what they are differences of; broadcasts.
    """
    return torch.where(within_noise(spread, largest), torch.zeros_like(values), values / spread)


def centred(values: Tensor) -> Tensor:
    """``values`` less their mean over the last dimension, in float64; exactly 0 where they differ by noise only.

    Example: [1, 0] -> [0.5, -0.5]; [0.2, 0.2, 0.2] -> [0, 0, 0].
    """
    wide = values.double()
    alike = within_noise(wide.amax(-1, keepdim=True) - wide.amin(-1, keepdim=True), wide.abs().amax(-1, keepdim=True))
    return (wide - wide.mean(-1, keepdim=True)).masked_fill(alike, 0.0).to(values.dtype)


def standardised(values: Tensor) -> Tensor:
    """:func:`centred`, divided by the unbiased standard deviation over the last dimension of at least two values.

    It is 0 if and only if :func:`all_alike` finds no difference.

    Example: [1, 0] -> [0.7071, -0.7071].
    """
    wide = centred(values.double())
    spread = wide.square().sum(-1, keepdim=True).div(wide.shape[-1] - 1).sqrt()
    return (wide / spread.masked_fill(spread == 0, 1.0)).to(values.dtype)


def clipped_reward(reward: float, limit: float | None) -> float:
    """``reward`` clipped to [-limit, limit]; unchanged if None.

    Clipped rewards keep single outliers from deciding a batch (Mnih et al. 2015, "Human-level control through deep
    reinforcement learning", clip at 1).

    Example: limit 1: -3 -> -1, 0.5 -> 0.5.
    """
    return reward if limit is None else min(max(reward, -limit), limit)


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """The penalty on a completion's length: 0 up to ``limit - buffer``, then linear to 1 at ``limit``.

    DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), with the sign of a penalty.

    Example: limit 100, buffer 20: length 80 -> 0, 90 -> 0.5, 100 -> 1.
    """
    return min(max(length - (limit - buffer), 0) / buffer, 1.0) if buffer else 0.0


def typical_value(rewards: Tensor, discounts: Tensor) -> Tensor:
    """``mean(r) / (1 - mean(g))``: the value of every state if all steps are alike; a value head may start there.

    Args:
        rewards, discounts: of any one shape; a discount is 0 where the episode ends.

    Example: rewards -1, discounts 0.95 -> -20.
    """
    return rewards.mean() / (1.0 - discounts.mean()).clamp_min(1e-3)
