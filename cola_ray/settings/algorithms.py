"""What each algorithm of ``rl.algorithm`` needs from the system; its mathematics is in ``cola_ray/algorithms``.

    of("grpo").groups                    # True: completions of one prompt are compared
    of("mine.py:dr_grpo").advantages()   # the advantage function of an algorithm of your own

Nothing here imports torch, because command lines are checked with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cola_ray import registry


@dataclass(frozen=True)
class Algorithm:
    """How a policy learns from its completions; read by the loop and the learner.

    If an algorithm has no advantage function, the learner gets the rewards themselves, and a value head, a Q or the
    utterance critic turns them into advantages.

    Example:
        >>> import cola_ray
        >>> cola_ray.Algorithm(advantage="rloo", groups=True).within_prompts
        True
    """

    advantage: str | Callable[..., Any] = ""
    """Maps the outcomes of a step's prompts to a number for each completion: a function ``prompts -> list of (G,)
    tensors``, or a name as in ``rl.advantage``."""
    loss: str | Callable[..., Any] = ""
    """The policy's loss: a function ``(log_probs, old_log_probs, advantages, mask) -> loss of each action``, all
    (B, T), or a name as in ``rl.loss``; empty: ppo, the clipped surrogate."""
    groups: bool = False
    """Compares completions of one prompt with each other: ``rl.group_size`` is 2 or more."""
    greedy: bool = False
    """Compares completions with the greedy completion of their prompt, which workers also generate."""
    value_head: bool = False
    """Learns a value head on the base's states; advantages are PPO's."""
    soft_q: bool = False
    """Learns a Q over all actions, with ``rl.kl_coef`` as temperature; ETPO. With a critic, from its advantages."""
    bellman_residual: bool = False
    """The policy's logits are its values, fitted to the rewards of whole trajectories; TBRM."""
    replays: bool = False
    """Learns from replayed turns, as ArCHer, CHAI and filtered cloning do."""
    critic: bool = False
    """Uses an utterance critic."""
    turns: bool = False
    """Compares turns of a group's episodes in addition to whole episodes, as GiGPO does."""

    @property
    def within_prompts(self) -> bool:
        """Whether completions are compared with others of their own prompt."""
        return self.groups or self.greedy

    def advantages(self) -> Callable[..., Any] | None:
        """The advantage function, imported if given by name; None if the learner gets the rewards unchanged."""
        return _function("advantage", self.advantage)

    def policy_loss(self) -> Callable[..., Any]:
        """The loss function; a built-in one also takes clips."""
        found = _function("loss", self.loss or "ppo")
        assert found is not None
        return found

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss is the user's own, not a built-in one."""
        return bool(self.loss) and self.loss not in registry.BUILT_IN["loss"]


def _function(kind: registry.Kind, given: str | Callable[..., Any]) -> Callable[..., Any] | None:
    found: Callable[..., Any] | None = registry.find(kind, given) if given and isinstance(given, str) else given or None
    return found


GRPO = Algorithm(advantage="grpo", groups=True)
RLOO = Algorithm(advantage="rloo", groups=True)
REMAX = Algorithm(advantage="remax", greedy=True)
REINFORCE = Algorithm(advantage="reinforce")
GIGPO = Algorithm(groups=True, turns=True)
PPO = Algorithm(value_head=True)
ETPO = Algorithm(soft_q=True)
TBRM = Algorithm(bellman_residual=True)
ARCHER = Algorithm(replays=True, critic=True)
ARCHER_SOFT = Algorithm(replays=True, critic=True, soft_q=True)
CHAI = Algorithm(replays=True, critic=True)
FILTERED_BC = Algorithm(replays=True)


def of(name: str) -> Algorithm:
    """The algorithm of this name; ``registry.NotFoundError`` if there is none, or if it is not an Algorithm."""
    found = registry.find("algorithm", name)
    if not isinstance(found, Algorithm):
        raise registry.NotFoundError(
            f"{name.rpartition(':')[2]} is {type(found).__name__}, not an Algorithm; docs/extending.md has an example"
        )
    return found


def _with(need: str) -> tuple[str, ...]:
    return tuple(name for name in registry.BUILT_IN["algorithm"] if getattr(of(name), need))


OF_OUTCOMES = _with("advantage")
"""Built-in algorithms whose advantages come from the outcomes of whole completions."""
COMPARING = tuple(name for name in _with("groups") if name in OF_OUTCOMES)
"""Of these, the algorithms that compare completions or episodes of one group."""
OF_TURNS = _with("replays")
"""Built-in algorithms that learn from an agent's replayed turns."""
