"""PPO: advantages of single actions, or of turns, from a value function, in trust regions (Schulman et al. 2017).

    delta_t = r_t + g_t V_{t+1} - V_t,  A_t = delta_t + g_t lambda A_{t+1}      GAE (Schulman et al. 2016, eq. 16)
    loss    = -min(ratio A, clip(ratio, 1 - low, 1 + high) A)                   eq. 7, in policy_loss.py

    value   = max((V - R)^2, (clip(V, V_old - range, V_old + range) - R)^2)     as in OpenAI's baselines and TRL

With ``rl.gae_level turn`` the steps t are an agent's turns k, as in ArCHer's upper level (Zhou et al. 2024, arXiv
2402.19446) and in Turn-PPO (Li et al. 2025, arXiv 2512.17008):

    r_k = sum of the rewards of turn k's actions,  V_k before its first action,  A_t = A_k for every action t of turn k

so that V is evaluated, and fitted to A_k + V_k, only at the first action of each turn. The value function is a head on
the frozen base's e (learner/value.py).
"""

import torch
from torch import Tensor

from cola_ray.algorithms.policy_loss import discounted_sum_to_go, following


def generalised_advantages(
    rewards: Tensor, discounts: Tensor, values: Tensor, final_values: Tensor, mask: Tensor, decay: float
) -> Tensor:
    """GAE (Schulman et al. 2016, eq. 16) over masked-in positions only, (B, T).

    ``delta_t = r_t + g_t V_next - V_t``, ``A_t = delta_t + g_t decay A_next``, where "next" is the next masked-in
    position, and after the last one ``final_values`` with advantage 0. Observations between two turns are skipped, so
    that an utterance's last action is followed by the next utterance's first.

    Args:
        rewards: (B, T), of each action.
        discounts: (B, T), ``g_t``: 1 within a turn, gamma at its end, 0 where the episode terminates.
        values: (B, T), before each action.
        final_values: (B,), of the state in which a limit cut the episode.
        mask: (B, T) bool.

    Example: rewards [0, 1], discounts [1, 0], values [0.5, 0.2], decay 0.5 -> deltas [-0.3, 0.8] -> [0.1, 0.8].
    """
    out = torch.zeros_like(values)
    next_values, running = final_values, torch.zeros_like(final_values)
    for t in reversed(range(values.shape[1])):
        here, discount = mask[:, t], discounts[:, t]
        delta = rewards[:, t] + discount * next_values - values[:, t]
        running = torch.where(here, delta + discount * decay * running, running)
        next_values = torch.where(here, values[:, t], next_values)
        out[:, t] = torch.where(here, running, torch.zeros_like(running))
    return out


def as_turns(rewards: Tensor, discounts: Tensor, mask: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards and discounts of turns, each at its turn's first action and 0 elsewhere, (B, T) both.

    With ``starts`` as their mask, :func:`generalised_advantages` runs over turns. A turn's discount, of the value
    before the next turn, is the product of those of its actions: 1 within the turn, times that of its last action.

    Args:
        rewards, discounts, mask: (B, T), of actions, as there.
        starts: (B, T) bool, true at the first action of each turn, and so at the first one of each row.

    Example: rewards [1, 2, 0, 4], discounts [1, 0.5, 1, 0], turns of two actions -> [3, 0, 4, 0], [0.5, 0, 0, 0].
    """
    last = mask & following(starts, mask, torch.ones_like(starts[:, 0]))
    within = discounts.masked_fill(last, 0.0)
    gains = discounted_sum_to_go(rewards, mask, within)
    passed = discounted_sum_to_go(discounts.masked_fill(~last, 0.0), mask, within)
    return gains.masked_fill(~starts, 0.0), passed.masked_fill(~starts, 0.0)


def of_turns(values: Tensor, mask: Tensor, starts: Tensor) -> Tensor:
    """For each action the value at the first action of its turn, (B, T); 0 where masked.

    Example: values [5, 6, 7, 8], mask [1, 1, 0, 1], starts [1, 0, 0, 1] -> [5, 5, 0, 8].
    """
    places = torch.arange(values.shape[1], device=values.device).where(starts, 0)
    return values.gather(1, places.cummax(1).values).masked_fill(~mask, 0.0)


def clipped_values(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Values no further than ``cliprange`` from those before the batch, where that makes the error larger.

    Their squared error is PPO's value loss: a step past the range gains nothing, and its gradient is 0. (OpenAI's
    baselines, ppo2; TRL's and verl's ``cliprange_value``.) All arguments have one shape.

    Example: value 3, before 1, return 5, range 0.5 -> 1.5; return 1 -> 3.
    """
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return torch.where((near - returns).square() > (values - returns).square(), near, values)
