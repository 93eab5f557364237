"""Discounted returns of an episode's turns."""

from collections.abc import Sequence


def returns_after(rewards: Sequence[float], answers: Sequence[range], gamma: float) -> list[float]:
    """The discounted return of what follows each turn: the choices of one answer do not follow one another.

    ``A_k = gamma A_{k+1} + sum of the rewards of answer k+1's choices``, the same for all choices of answer k.

    Args:
        rewards: of each turn.
        answers: numbers of the turns of each answer, as in ``Episode.answers``.

    Example: rewards 1, 2, 3, of which the first two belong to choices of one answer; gamma 0.5 -> 3, 3, 0.
    """
    after, later = [0.0] * len(rewards), 0.0
    for choices in reversed(answers):
        for number in choices:
            after[number] = later
        later = sum(rewards[number] for number in choices) + gamma * later
    return after
