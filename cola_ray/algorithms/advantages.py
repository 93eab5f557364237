"""Advantages for outcome rewards. Legend: P prompts, G completions a prompt, B sequences, T positions."""

import torch
from torch import Tensor


def group_normalised(rewards: Tensor, normalise_std: bool = True, eps: float = 1e-8) -> Tensor:
    """GRPO: ``(r - mean_G) / max(std_G, eps)`` with the unbiased std (Shao et al. 2024, section 4.1).

    Args:
        rewards: (P, G) with G >= 2.
        normalise_std: False leaves the division out (Liu et al. 2025, "Dr. GRPO").

    Returns:
        advantages (P, G); a group whose rewards are all equal has advantage 0.

    Example: rewards [[1, 0]] -> [[0.7071, -0.7071]]; without std [[0.5, -0.5]].
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    if not normalise_std:
        return centred
    return centred / rewards.std(-1, keepdim=True).clamp_min(eps)


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO: ``r_i - mean_{j != i} r_j`` over rewards (P, G) (Ahmadian et al. 2024, eq. 6).

    Example: rewards [[6, 3]] -> [[3, -3]].
    """
    group_size = rewards.shape[-1]
    return (rewards - rewards.mean(-1, keepdim=True)) * (group_size / (group_size - 1))


def discounted_sum_to_go(values: Tensor, mask: Tensor, decay: float = 1.0) -> Tensor:
    """``y_t = sum_{l >= 0} decay^l values_{t+l}`` over masked-in positions only, (B, T).

    Positions outside the mask (observations, padding) are skipped, not counted as steps, so an
    observation between two turns costs no decay. Used to spread per-step KL penalties backwards; with
    decay = 1 an outcome reward reaches every action undiminished.

    Example: values [1, 2, 3], mask [1, 0, 1], decay 0.5 -> [2.5, 0, 3].
    """
    if decay == 1.0:
        return (values * mask).flip(1).cumsum(1).flip(1) * mask
    out = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        here = mask[:, t].bool()
        running = torch.where(here, values[:, t] + decay * running, running)
        out[:, t] = torch.where(here, running, torch.zeros_like(running))
    return out


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


def typical_value(rewards: Tensor, discounts: Tensor) -> Tensor:
    """``mean(r) / (1 - mean(g))``: what every state is worth if all steps are alike; where a value head may begin.

    Args:
        rewards, discounts: of any one shape; a discount is 0 where the episode ends.

    Example: rewards -1, discounts 0.95 -> -20.
    """
    return rewards.mean() / (1.0 - discounts.mean()).clamp_min(1e-3)
