"""Latent actions: how they are learned, and how their use is measured. ``model/modeling_cola.py`` draws them.

Legend: N rows, K actions.
"""

import math

import torch
from torch import Tensor


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
    """``sum_k p log p`` of each row, (N,). Minimised with weight 0.001 in the paper: it keeps codes alive."""
    return (relaxed * (relaxed + 1e-8).log()).sum(-1)


def usage_imbalance(relaxed: Tensor, mean: Tensor) -> Tensor:
    """These rows' part of ``N (log K - H(mean))`` over all N rows of a batch: 0 if it uses all codes equally often.

    ``sum_nk p_nk log mean_k + N log K``. With the mean held fixed the gradient is the entropy's own, as rows sum to 1:
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
