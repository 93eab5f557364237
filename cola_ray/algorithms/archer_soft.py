"""ArCHer above, soft values below: a critic for utterances, and exact sums over all actions inside them.

    Q_i(s, u)   -> r + gamma (1 - terminated) Vbar_i(s')            off-policy, from replay: archer.py
    A(s, u)      = min(Q_1, Q_2)(s, u) - min(V_1, V_2)(s)           archer.py
    w(h, a)      = Q(h, a) - V(h),   V(h) = beta log sum_a rho(a|h) exp(Q(h, a) / beta)      soft advantage: etpo.py
    Q(h_j, a_j) -> A(s, u) - sum_{i>j} wbar(h_i, a_i)               for all actions a_1 .. a_n of a replayed u
    V_i(s)      -> Qbar_i(s, u) - sum_j w(h_j, a_j)                 in place of Qbar_i(s, u~), u~ ~ pi(. | s)
    pi           minimises sum_a pi(a|h) [beta log(pi(a|h) / rho(a|h)) - Q(h, a)]            etpo.py

s is a state in which the policy speaks, u an utterance, h_j the tokens before its action a_j; rho is the reference and
bars are targets. In ArCHer, V follows Q of an utterance that has to be drawn for it. Here it is the soft value of s,

    V(s) = beta log sum_u rho(u|s) exp(Q(s, u) / beta),   so that   Q(s, u) - V(s) = beta log(pi*(u|s) / rho(u|s))

with pi* the best policy, which is autoregressive: the right-hand side is ``sum_j w(h_j, a_j)``, for every u of any
policy. So V's target does not depend on which utterance was replayed, and nothing is generated for it. Conversely, w's
that add up like this for all u are the soft advantages, since ``sum_a rho exp(w / beta)`` is 1 in every state (path
consistency; Nachum et al. 2017, arXiv 1702.08892). The sum over utterances is never taken, those over K actions are.

Before anything is learnt, w is 0: V is then the mean of Q over replayed utterances. Q is fitted to an advantage, and a
state's value cancels in w: the critic knows more about that than e does, such as how many turns are left.
Legend: B sequences, T positions, K actions.
"""

from torch import Tensor

from cola_ray.algorithms.etpo import best_soft_values
from cola_ray.algorithms.policy_loss import discounted_sum_to_go


def soft_advantages(q: Tensor, ref_log_probs: Tensor, beta: float) -> Tensor:
    """``w = q - V``, (..., K) each: ``beta log(pi* / rho)`` of all actions.

    Example: q the same for all actions: 0 for each.
    """
    return q - best_soft_values(q, ref_log_probs, beta)[..., None]


def path_targets(rewards: Tensor, discounts: Tensor, taken: Tensor, mask: Tensor) -> Tensor:
    """The rewards still to come from each action on, less the soft advantages of the actions after it; (B, T).

    Args:
        rewards, discounts: (B, T), of each action: an utterance's advantage at its last one, and 1 until there.
        taken: (B, T), soft advantages of the actions taken.
        mask: (B, T) bool; results are 0 elsewhere.

    Example: rewards [0, 0, 5], discounts [1, 1, 0], taken [1, 2, 3] -> [0, 2, 5].
    """
    return discounted_sum_to_go(rewards - taken, mask, discounts) + taken.masked_fill(~mask, 0.0)


def soft_value_targets(q: Tensor, of_utterances: Tensor) -> Tensor:
    """``Qbar_i(s, u) - sum_j w(h_j, a_j)``: (2, B), (B,) -> (2, B)."""
    return q - of_utterances
