"""Latent actions: how one is drawn, how they are learned, how their use is measured.

Legend: N rows, B sequences, T positions, K actions.

Sampling is a pure function of (seed, position, logits). The Gumbel noise comes from a counter-based
hash, so a request draws the same actions alone or among sixty-three others, in vLLM or in PyTorch, before
or after a preemption; any trajectory can be replayed exactly.
"""

import math

import torch
from torch import Tensor


def _as_int64(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


# Constants of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
_GOLDEN = _as_int64(0x9E3779B97F4A7C15)
_MIX_1 = _as_int64(0xBF58476D1CE4E5B9)
_MIX_2 = _as_int64(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's ``>>`` on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    # int64 multiplication wraps alike on CPU and CUDA, which is all the hash needs.
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def gumbel_noise(seed: Tensor, position: Tensor, num_actions: int) -> Tensor:
    """Standard Gumbel noise (N, K) float64, a pure function of ``seed`` (N,) and ``position`` (N,), both int64."""
    key = _mix(_mix(seed + _GOLDEN) + position * _GOLDEN)
    index = torch.arange(1, num_actions + 1, device=seed.device, dtype=torch.int64)
    bits = _mix(key[:, None] + index[None] * _GOLDEN)
    # 52 random bits, centred in their cell: never 0, never 1.
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def action_log_probs(logits: Tensor, temperature: Tensor, top_k: Tensor) -> Tensor:
    """Log-probabilities (..., K) of the distribution that is sampled: temperature and truncation included.

    Args:
        logits: (..., K); the result has their type.
        temperature: (...,); 0 means greedy, whose scores are those of temperature 1.
        top_k: (...,) int64; 0 keeps all K. Ties at the k-th value are all kept.
    """
    num_actions = logits.shape[-1]
    temperature = torch.where(temperature > 0, temperature, torch.ones_like(temperature))
    scaled = logits / temperature[..., None].to(logits.dtype)
    if bool(((top_k > 0) & (top_k < num_actions)).any()):
        keep = torch.where(top_k > 0, top_k.clamp(max=num_actions), torch.full_like(top_k, num_actions))
        kth = scaled.sort(dim=-1, descending=True).values.gather(-1, (keep - 1)[..., None])
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    return scaled.log_softmax(-1)


RANKED = -3
"""As a forced action: RANKED - i takes the i-th most probable one, counted from 0."""


def sample_actions(
    logits: Tensor, temperature: Tensor, top_k: Tensor, seed: Tensor, position: Tensor, forced: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one action a row and score it under the very distribution it was drawn from.

    ``a = argmax_k (log pi_k + g_k)`` with Gumbel noise g, an exact categorical sample.

    Args:
        logits: (N, K) policy logits.
        temperature: (N,) float; 0 is greedy.
        top_k: (N,) int64; 0 keeps all actions.
        seed: (N,) int64, the request's seed.
        position: (N,) int64, index in its own sequence of the token whose state acts.
        forced: (N,) int64; an action to take regardless, or -1, or ``RANKED - i`` for the i-th most probable one.

    Returns:
        actions (N,) int64 and their log-probabilities (N,) float32. A forced action outside the
        truncation has log-probability -inf.
    """
    log_probs = action_log_probs(logits.double(), temperature, top_k)  # double: rounding must not decide a draw
    noise = gumbel_noise(seed, position, logits.shape[-1])
    drawn = torch.where(temperature > 0, (log_probs + noise).argmax(-1), log_probs.argmax(-1))
    actions = torch.where(forced >= 0, forced, drawn)
    if bool((forced <= RANKED).any()):
        ranks = (RANKED - forced).clamp(0, logits.shape[-1] - 1)
        ranked = logits.argsort(dim=-1, descending=True, stable=True).gather(-1, ranks[:, None])[:, 0]
        actions = torch.where(forced <= RANKED, ranked, actions)
    return actions, log_probs.gather(-1, actions[:, None])[:, 0].float()


def straight_through_gumbel(logits: Tensor, noise: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Straight-through Gumbel-softmax (CoLA, latent pre-training; Jang et al. 2017).

    Args:
        logits: (N, K) inverse dynamics logits, already shifted onto the step they label.
        noise: (N, K) standard Gumbel noise.
        tau: relaxation temperature; 2.0 in the paper.

    Returns:
        one-hot (N, K) whose forward value is the argmax and whose gradient is that of the relaxed
        sample, and the relaxed sample ``p`` (N, K) itself.
    """
    relaxed = ((logits + noise) / tau).softmax(-1)
    hard = torch.zeros_like(relaxed).scatter_(-1, relaxed.argmax(-1, keepdim=True), 1.0)
    return hard + relaxed - relaxed.detach(), relaxed


def negative_entropy(relaxed: Tensor) -> Tensor:
    """``sum_k p log p`` a row, (N,). Minimised with weight 0.001 in the paper: it keeps codes alive."""
    return (relaxed * (relaxed + 1e-8).log()).sum(-1)


def usage_imbalance(relaxed: Tensor, mean: Tensor) -> Tensor:
    """These rows' part of ``N (log K - H(mean))`` over all N rows of a batch: 0 where it uses all codes equally often.

    ``sum_nk p_nk log mean_k + N log K``. With the mean held fixed the gradient is the entropy's own, for rows sum to 1:
    ``d(-N H(mean)) / dp_nk = log mean_k + 1``. So parts add up, however a batch is cut.

    Args:
        relaxed: (N', K), p, some of the rows.
        mean: (K,), of all rows.
    """
    return (relaxed @ (mean.detach() + 1e-8).log()).sum() + len(relaxed) * math.log(relaxed.shape[-1])


def usage(counts: Tensor) -> dict[str, float]:
    """From action counts (K,): how many codes are alive and the share of the most used one."""
    total = max(float(counts.sum()), 1.0)
    return {"actions/alive": float((counts > 0).sum()), "actions/top_share": float(counts.max()) / total}
