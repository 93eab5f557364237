"""How a request's sampling settings enter vLLM, and where its actions are kept until it has finished.

    Engine.submit ─> SamplingParams.extra_args ─> ActionRequest ─> a draw at every step ─> ActionTable[slot, step]
                     seed, temperature, ..., slot                                              │ once, at the end
                                                                                               v
                                                                         actions and log-probabilities (L,)

A request owns a slot, a row of a table on the device, from its submission to its end. The model writes each action and
its log-probability to (slot, step), so nothing passes through vLLM's own log-probabilities, which cost a Python loop
per token and a softmax over the vocabulary. The address depends on the request alone: a step that is computed again,
after a preemption or in a chunk of a prefill, draws the same action and writes it to the same place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LOWEST_LOG_PROB = -80.0
"""The lowest log-probability that is kept; only forced actions have lower ones."""

SERVED_SLOTS = 1024
"""Slots of a server, for completions in progress whose actions are returned."""
SERVED_ARGS = ("actions", "action_slots", "action_first_seed")
"""What `cola_ray serve` puts into ``extra_args`` (cola_ray/serve_actions.py)."""
TAKES_ACTIONS = "COLA_RAY_SERVES_ACTIONS"
"""Environment variable of a server that checks what its clients request about actions."""
UNSERVED = "actions that last are held for requests of training, search and evaluation, and a server cannot hold them"

BASE_TOKENS = -2
"""As a forced action: take the greedy token of the bare base, bypassing policy and world model."""


@dataclass(frozen=True)
class ActionRequest:
    """How the actions of a request are drawn, from ``SamplingParams.extra_args`` as :func:`sampling_args` makes them.

    Args:
        temperature: of the distribution over actions; 0 is greedy.
        top_k: number of most probable actions to keep; 0 keeps all.
        top_p: total probability of the actions to keep of these; 1 keeps all.
        seed: for all draws of the request.
        forced: actions of the first steps: action ids, -1 to draw, ``BASE_TOKENS``, or ranks (``RANKED - i``).
        slot: row of the engine's table that keeps the actions; -1 keeps none.
        held: the action before the first step, which may go on if ends are learnt; -1 for none.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    forced: tuple[int, ...]
    slot: int = -1
    held: int = -1

    @classmethod
    def from_params(cls, extra_args: dict[str, Any] | None, seed: int | None) -> "ActionRequest":
        """``seed`` is that of vLLM's request. With n > 1, completion i has seed + i, so completions differ."""
        args = extra_args or {}
        action_seed = int(args.get("action_seed", 0))
        if seed is not None:
            action_seed ^= (int(seed) * 0x9E3779B97F4A7C15) & 0x7FFFFFFFFFFFFFFF
        return cls(
            temperature=float(args.get("action_temperature", 1.0)),
            top_k=int(args.get("action_top_k", 0)),
            top_p=float(args.get("action_top_p", 1.0)),
            seed=action_seed & 0x7FFFFFFFFFFFFFFF,
            forced=tuple(args.get("actions") or ()),
            slot=int(args.get("action_slot", -1)),
            held=int(args.get("action_held", -1)),
        )


def sampling_args(
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    actions: Sequence[int] = (),
    slot: int = -1,
    held: int = -1,
) -> dict[str, Any]:
    """Keyword arguments of ``vllm.SamplingParams``, for latent actions and for tokens as actions."""
    extra: dict[str, Any] = {
        "action_temperature": temperature, "action_top_k": top_k, "action_top_p": top_p, "action_seed": seed,
        "action_slot": slot, "action_held": held,
    }  # fmt: skip
    if actions:
        extra["actions"] = list(actions)
    return {"temperature": 0.0, "extra_args": extra}  # given the action, vLLM takes the most probable token
