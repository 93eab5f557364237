"""GiGPO: compares an episode with the others of its seed, and a turn with others from the same state.

    A_E  = (R - mean R) / F         R: return of an episode, over the episodes of one seed             eq. 3
    A_S  = (G_t - mean G) / F       G_t = r_t + gamma G_{t+1}, over turns from one anchor state        eqs. 5 to 7
                                    (choices of one answer do not follow one another, see returns.py)
    A_t  = A_E + step_advantage_w A_S                                                                  eq. 8

Feng et al. 2025, "Group-in-Group Policy Optimization", arXiv 2505.10978. All turns played from the same anchor state,
in all episodes of a seed, are one group, however late in an episode, and also if one episode returned to the state. A
turn from a state that no other turn was played from has ``A_S`` 0. ``F`` is set by ``rl.scale_rewards``, at both levels
(grpo.py): ``group`` and ``none`` are verl-agent's modes ``mean_std_norm`` and ``mean_norm``. verl-agent takes the mean
of eq. 3 over turns, so that long episodes count more; here it is over episodes, as in the paper.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_ray.algorithms import grpo
from cola_ray.algorithms.advantages import Outcomes
from cola_ray.algorithms.returns import returns_after


@dataclass(frozen=True)
class TurnRewards:
    """The reward of each turn of an episode, and the state that the turn was played from.

    Args:
        answers: numbers of the turns of each answer; empty: each turn is one.
    """

    rewards: Sequence[float]
    anchors: Sequence[Hashable]
    answers: Sequence[range] = ()


def advantages(
    groups: Sequence[Sequence[TurnRewards]], gamma: float, step_advantage_w: float, scale_rewards: grpo.Scale = "group"
) -> list[Tensor]:
    """Advantages of each episode's turns, (turns,) float64, in episode order; 0 where everything compared is equal.

    Args:
        groups: episodes by seed.
        gamma: discount of a turn.

    Example: two episodes from state a, rewards [0, 1] and [0]; the first goes on in state b. gamma 0.5, weight 1,
    ``none``: A_E = [0.5, -0.5]; returns-to-go from a are 0.5 and 0, so A_S = [0.25, -0.25] there, and 0 in b
    -> [[0.75, 0.5], [-0.75]].
    """
    episodes = [episode for group in groups for episode in group]
    of_episodes = torch.cat(grpo.advantages([Outcomes(_returns(group)) for group in groups], scale_rewards))
    to_go = torch.cat([returns_to_go(episode.rewards, gamma, episode.answers) for episode in episodes])
    places = [torch.tensor(numbers) for numbers in same_state(groups)]
    compared = grpo.advantages([Outcomes(to_go[numbers]) for numbers in places], scale_rewards)
    of_turns = torch.zeros_like(to_go).index_copy_(0, torch.cat(places), torch.cat(compared))
    lengths = [len(episode.rewards) for episode in episodes]
    whole = of_episodes.repeat_interleave(torch.tensor(lengths))
    return list((whole + step_advantage_w * of_turns).split(lengths))


def same_state(groups: Sequence[Sequence[TurnRewards]]) -> list[list[int]]:
    """Indices of the turns from each anchor state of each group; turns are numbered through all episodes.

    Example: one group of anchors [a, b] and [a] -> [[0, 2], [1]].
    """
    found: dict[tuple[int, Hashable], list[int]] = {}
    states = ((group, state) for group, episodes in enumerate(groups) for one in episodes for state in one.anchors)
    for number, state in enumerate(states):
        found.setdefault(state, []).append(number)
    return list(found.values())


def returns_to_go(rewards: Sequence[float], gamma: float, answers: Sequence[range] = ()) -> Tensor:
    """``G_t = r_t + gamma G_{t+1}`` of each turn, float64. Example: [0, 0, 1], gamma 0.5 -> [0.25, 0.5, 1]."""
    each = [range(number, number + 1) for number in range(len(rewards))]
    after = torch.tensor(returns_after(rewards, answers or each, gamma), dtype=torch.float64)
    return torch.tensor(rewards, dtype=torch.float64) + gamma * after


def _returns(group: Sequence[TurnRewards]) -> Tensor:
    return torch.tensor([sum(episode.rewards) for episode in group], dtype=torch.float64)
