"""ArCHer's high level: twin critics over whole utterances, and the advantage they give one (Zhou et al. 2024).

    Q_i(s, u) -> r + gamma (1 - terminated) Vbar_i(s')        off-policy: (s, u, r, s') from replay
    V_i(s)    -> Qbar_i(s, u~)                                 u~ ~ pi(. | s), fresh
    A(s, u~)   = min(Q_1, Q_2)(s, u~) - min(V_1, V_2)(s)       the policy gradient's weight for all of u~'s actions

Bars are targets, moved by ``heads.polyak_`` after every critic step. A time limit is no end: ``terminated`` is false
for a truncated episode, whose last state still has a value.
Legend: B transitions; twins are the leading dimension of 2.
"""

import torch
from torch import Tensor, nn

from cola_ray.algorithms.advantages import within_noise


class Standardised(nn.Module):
    """``(x - mean) / std``, feature by feature, within 10 either way; x as it is until :meth:`measure` was called.

    Mean and deviation are measured once, on the first rows, and must hold for all later ones. A feature that has not
    varied yet, such as a flag that was never set, is centred and keeps its own scale. One that hardly varied may later
    lie a thousand deviations away, where heads trained within a few deviations are unreliable: it is clipped.
    """

    LIMIT = 10.0

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        return ((features - self.mean) / self.std).clamp(-self.LIMIT, self.LIMIT)

    def measure(self, moments: Tensor) -> None:
        """Args: moments: (2, H) float64, mean of x and of x^2."""
        mean, square = moments.double()
        std = (square - mean.square()).clamp_min(0.0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(within_noise(std, square.sqrt()), torch.ones_like(std), std))


class TwinHeads(nn.Module):
    """Two Q and two V heads over features of states, S wide, and of utterances, U wide; hidden layers are U wide.

    A base's features differ in spread by orders of magnitude, and those that distinguish utterances are small: each is
    standardised. (A layer norm over the vector would leave them as small as they are.)
    """

    def __init__(self, states: int, utterances: int) -> None:
        super().__init__()
        self.states, self.utterances = Standardised(states), Standardised(utterances)
        self.q = nn.ModuleList(_mlp(states + utterances, utterances) for _ in range(2))
        self.v = nn.ModuleList(_mlp(states, utterances) for _ in range(2))

    def q_values(self, states: Tensor, utterances: Tensor) -> Tensor:
        """(B, S), (B, U) -> (2, B)."""
        both = torch.cat([self.states(states), self.utterances(utterances)], -1)
        return torch.stack([head(both)[:, 0] for head in self.q])

    def values(self, states: Tensor) -> Tensor:
        """(B, S) -> (2, B)."""
        return torch.stack([head(self.states(states))[:, 0] for head in self.v])

    def start_at(self, level: Tensor) -> None:
        """Set every head's output to ``level`` everywhere: from 0, a value of -18 is a thousand small steps away.

        So all advantages start at exactly 0, and stay there as long as all rewards agree with the level.
        """
        for head in (*self.q, *self.v):
            nn.init.zeros_(head[-1].weight)
            nn.init.constant_(head[-1].bias, float(level))


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )  # fmt: skip


def q_targets(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """``r + gamma (1 - terminated) Vbar_i(s')``, (2, B); the i-th Q uses the i-th V, without a minimum (section 3.2).

    Args:
        rewards, terminated: (B,).
        next_values: (2, B), of the target critics.

    Example: reward -1, not terminated, values [-4, -6], gamma 0.5 -> [-3, -4].
    """
    return rewards + gamma * (1.0 - terminated.float()) * next_values


def twin_squared_error(values: Tensor, goals: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_i mean_b w_b (value_ib - goal_ib)^2`` (eqs. 1 and 2): the loss of Q, and with fresh utterances of V.

    Args:
        values, goals: (2, B); no gradient flows into goals.
        weights: (B,), of prioritised replay.

    Example: values [[0], [0]], goals [[-3], [-4]] -> 25.
    """
    squared = (values - goals.detach()).square()
    return (squared if weights is None else squared * weights).mean(1).sum()


def expectile_loss(v: Tensor, q: Tensor, expectile: float, weights: Tensor | None = None) -> Tensor:
    """IQL's value loss on replayed utterances, in place of fresh ones: ``mean w |e - 1(d < 0)| d^2``, ``d = q - v``.

    Kostrikov et al. 2021, eq. 5; summed over the twins. ``expectile`` 0.5 is half the squared error.

    Args:
        v, q: (2, B).
        weights: (B,), of prioritised replay, which drew the same rows.
    """
    difference = q.detach() - v
    each = torch.where(difference > 0, expectile, 1.0 - expectile) * difference.square()
    return (each if weights is None else each * weights).mean(1).sum()


def utterance_advantages(q: Tensor, v: Tensor) -> Tensor:
    """``min_i Q_i(s, u) - min_i V_i(s)``: (2, B), (2, B) -> (B,). Example: Q [3, 2], V [1, 2] -> 1."""
    return q.min(0).values - v.min(0).values
