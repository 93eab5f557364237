"""PPO: advantages of single actions from a value function, in trust regions (Schulman et al. 2017).

    delta_t = r_t + g_t V_{t+1} - V_t,  A_t = delta_t + g_t lambda A_{t+1}      GAE (Schulman et al. 2016, eq. 16)
    loss    = -min(ratio A, clip(ratio, 1 - low, 1 + high) A)                   eq. 7, in policy_loss.py

    value   = max((V - R)^2, (clip(V, V_old - range, V_old + range) - R)^2)     as in OpenAI's baselines and TRL

The value function is a head on the frozen base's e (learner/value.py).
"""

import torch
from torch import Tensor


def generalised_advantages(
    rewards: Tensor, discounts: Tensor, values: Tensor, final_values: Tensor, mask: Tensor, decay: float
) -> Tensor:
    """GAE (Schulman et al. 2016, eq. 16) over masked-in positions only, (B, T).

    ``delta_t = r_t + g_t V_next - V_t``, ``A_t = delta_t + g_t decay A_next``, where "next" is the next masked-in
    position, and after the last one ``final_values`` with advantage 0. What an environment says between two turns is
    skipped, so that an utterance's last action is followed by the next utterance's first.

    Args:
        rewards: (B, T), of each action.
        discounts: (B, T), ``g_t``: 1 within a turn, gamma at its end, 0 where the episode terminates.
        values: (B, T), before each action.
        final_values: (B,), of what a limit cut off.
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


def clipped_values(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Values no further than ``cliprange`` from what they were before the batch, where that makes the error larger.

    Their squared error is PPO's value loss: a step past the range brings nothing more, and its gradient is 0. (OpenAI's
    baselines, ppo2; TRL's and verl's ``cliprange_value``.) All arguments have one shape.

    Example: value 3, before 1, return 5, range 0.5 -> 1.5; return 1 -> 3.
    """
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return torch.where((near - returns).square() > (values - returns).square(), near, values)
