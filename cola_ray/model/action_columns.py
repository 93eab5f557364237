"""How actions and their log-probabilities leave vLLM, and how the settings of a request enter it.

The vocabulary of the served model is padded by eight columns. At every step the model writes three numbers there,

    column V     BASE
    column V+1   BASE - STEP * action
    column V+2   BASE + SCALE * log_prob          (BASE is far below any real logit)

and each request asks vLLM for the log-probabilities of exactly these three "tokens". Their differences cancel the
normaliser of the softmax and decode to the action (exactly) and its log-probability. So vLLM itself keeps the numbers
with their request, through preemption, chunked prefill, prefix caching and aborts; there is no side channel that would
have to be kept in step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_COLUMNS = 8  # three are used; eight keep the vocabulary size a multiple of eight
BASE, STEP, SCALE = -1.0e4, 100.0, 1.0e4
LOWEST_LOG_PROB = -80.0
"""The lowest log-probability that float32 columns can carry; lower ones occur only for forced actions."""

BASE_TOKENS = -2
"""As a forced action: take the greedy token of the bare base, bypassing policy and world model."""


@dataclass(frozen=True)
class ActionRequest:
    """How the actions of a request are drawn, from ``SamplingParams.extra_args`` as :func:`sampling_args` makes them.

    Args:
        temperature: of the distribution over actions; 0 is greedy.
        top_k: number of most probable actions to keep; 0 keeps all.
        seed: of all draws of the request.
        forced: actions of the first steps: action ids, -1 to draw, ``BASE_TOKENS``, or ranks (``RANKED - i``).
    """

    temperature: float
    top_k: int
    seed: int
    forced: tuple[int, ...]

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
            seed=action_seed & 0x7FFFFFFFFFFFFFFF,
            forced=tuple(args.get("actions") or ()),
        )


def sampling_args(
    vocab_size: int, *, temperature: float = 1.0, top_k: int = 0, seed: int = 0, actions: list[int] | None = None
) -> dict[str, Any]:
    """Keyword arguments of ``vllm.SamplingParams`` for a request over latent actions; ``vocab_size`` is V, unpadded."""
    return {
        **acting_args(temperature, top_k, seed, actions),
        "logprob_token_ids": [vocab_size, vocab_size + 1, vocab_size + 2],
    }


def acting_args(temperature: float, top_k: int, seed: int, actions: Sequence[int] | None) -> dict[str, Any]:
    """The part of :func:`sampling_args` that holds for latent actions and for tokens as actions."""
    extra: dict[str, Any] = {"action_temperature": temperature, "action_top_k": top_k, "action_seed": seed}
    if actions:
        extra["actions"] = list(actions)
    return {
        "temperature": 0.0,  # given the action, vLLM takes the most probable token
        "extra_args": extra,
        "flat_logprobs": True,
    }


def decode(completion: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (L,) int64, actions (L,) int64 and their log-probabilities (L,) float32 of a vLLM ``CompletionOutput``."""
    tokens = np.asarray(completion.token_ids, np.int64)
    # A row holds the log-probabilities of the sampled token and then of the three columns.
    columns = np.asarray(completion.logprobs.logprobs, np.float64).reshape(len(tokens), 4)[:, 1:]
    actions = np.rint((columns[:, 0] - columns[:, 1]) / STEP).astype(np.int64)
    log_probs = ((columns[:, 2] - columns[:, 0]) / SCALE).astype(np.float32)
    return tokens, actions, log_probs
