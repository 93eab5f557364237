"""Double Q-learning over latent actions, from logged answers (van Hasselt et al. 2016; CoLA's released search).

y_t     = r_t + gamma Qbar(s_t+1, argmax_a Q(s_t+1, a))          r_t alone at the last action
error_t = (Q(s_t, a_t) - r_t - gamma max_a Q(s_t+1, a))^2        small where nothing is decided
"""

from torch import Tensor


def double_q_values(online: Tensor, target: Tensor) -> Tensor:
    """A state's value: the target's value of the action that the online Q prefers; (..., K) each -> (...).

    Example: online [1, 3], target [5, 4] -> 4, where the target's own maximum would say 5.
    """
    return target.gather(-1, online.argmax(-1, keepdim=True))[..., 0]


def square_errors(q: Tensor, actions: Tensor, gamma: float) -> Tensor:
    """Squared temporal-difference errors of all actions but the last, whose reward is not known yet.

    Args:
        q: (L, K), of the state before each action.
        actions: (L,) int64.

    Returns:
        (L - 1,). No reward comes before the last action.

    Example: q [[1, 0], [2, 5]], actions [0, 1], gamma 1 -> [(1 - 5)^2] = [16].
    """
    taken = q.gather(-1, actions[:, None])[:-1, 0]
    return (taken - gamma * q[1:].amax(-1)).square()


def first_decision(errors: Tensor, threshold: float, limit: int) -> int:
    """The number of actions before the first error of ``threshold`` or more, place 0 aside; at most ``limit``.

    Example: errors [9, 0, 0, 9, 0], threshold 1, limit 64 -> 3: the action at place 3 is worth another try.
    """
    found = [place for place, error in enumerate(errors.tolist()) if place and error >= threshold]
    return min(found[0] if found else len(errors) + 1, limit)
