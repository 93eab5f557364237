"""How an action and its log-probability travel out of vLLM, and per-request wishes travel in.

The served vocabulary is padded by eight columns. At every step the model writes three numbers there,

    column V     BASE
    column V+1   BASE - STEP * action
    column V+2   BASE + SCALE * log_prob          (BASE is far below any real logit)

and each request asks vLLM for the log-probabilities of exactly these three "tokens". Their differences cancel the
softmax's normaliser and decode to the action (exact) and its log-probability. What is returned is thus tied to the
request by vLLM itself, through preemption, chunked prefill, prefix caching and aborts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_COLUMNS = 8  # three used; eight keep the vocabulary a multiple of eight
BASE, STEP, SCALE = -1.0e4, 100.0, 1.0e4
# The lowest log-probability that can be carried: beyond it a column would no longer lie far below the real logits'
# reach in float32. Such an action was forced outside the truncation.
LOWEST_LOG_PROB = -80.0

BASE_TOKENS = -2
"""As a forced action: take the bare base's greedy token at this step, bypassing policy and world model."""


@dataclass(frozen=True)
class ActionRequest:
    """One request's wishes. Built from ``SamplingParams.extra_args``; see :func:`sampling_args`."""

    temperature: float
    top_k: int
    seed: int
    forced: tuple[int, ...]

    @classmethod
    def from_params(cls, extra_args: dict[str, Any] | None, seed: int | None) -> "ActionRequest":
        """``seed`` is vLLM's own: with n > 1 child i carries seed + i, which sets the siblings apart."""
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
    """Keyword arguments for ``vllm.SamplingParams`` of a latent-action request; ``vocab_size`` is V, unpadded."""
    return {
        **acting_args(temperature, top_k, seed, actions),
        "logprob_token_ids": [vocab_size, vocab_size + 1, vocab_size + 2],
    }


def acting_args(temperature: float, top_k: int, seed: int, actions: Sequence[int] | None) -> dict[str, Any]:
    """The part of them that says how an action is drawn, latent or token."""
    extra: dict[str, Any] = {"action_temperature": temperature, "action_top_k": top_k, "action_seed": seed}
    if actions:
        extra["actions"] = list(actions)
    return {
        "temperature": 0.0,  # for vLLM tokens are greedy, given the action
        "extra_args": extra,
        "flat_logprobs": True,
    }


def decode(completion: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A vLLM ``CompletionOutput`` -> tokens int64 (L,), actions int64 (L,), log-probabilities float32 (L,)."""
    tokens = np.asarray(completion.token_ids, np.int64)
    # A row holds the sampled token's log-probability and then the three columns'.
    columns = np.asarray(completion.logprobs.logprobs, np.float64).reshape(len(tokens), 4)[:, 1:]
    actions = np.rint((columns[:, 0] - columns[:, 1]) / STEP).astype(np.int64)
    log_probs = ((columns[:, 2] - columns[:, 0]) / SCALE).astype(np.float32)
    return tokens, actions, log_probs
