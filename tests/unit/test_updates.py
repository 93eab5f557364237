"""Several updates on one batch: what the learner says of them, against each update worked by itself."""

import numpy as np
import pytest
import torch

from cola_ray.batch import collate
from cola_ray.experience import Trajectory
from cola_ray.learner.rl import PolicyUpdate
from cola_ray.packing import pack
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

K, LENGTH, LR = 5, 6, 40.0


class Engine:
    """Logits a position in the place of a policy, and steps against their gradient."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.engine, self.logits, self.norms = self, logits.clone().requires_grad_(), []
        self.reference = logits.clone()

    def __call__(self, input_ids, attention_mask, scored_mask, *_, **__):
        rows = self.logits[: scored_mask.sum()]
        return rows, None, self.reference[: len(rows)], None

    def backward(self, loss, last):
        loss.backward()

    def step(self, lr):
        self.norms.append(float(self.logits.grad.norm()))
        self.logits = (self.logits - lr * self.logits.grad).detach().requires_grad_()
        return self.norms[-1]


def test_what_is_clipped_and_the_gradient_are_means_over_updates():
    draw = np.random.default_rng(0)
    logits = torch.from_numpy(draw.normal(size=(LENGTH, K))).float()
    taken = draw.integers(0, K, LENGTH)
    log_probs = logits.log_softmax(-1)[torch.arange(LENGTH), torch.from_numpy(taken)].numpy()
    one = Trajectory(np.array([1, 2]), taken, taken, log_probs, taken * 0, 0.0, False, "")
    (batch,) = collate(pack([one]), [1.0], 1, 0, 0, 64)
    config = override(preset("tiny"), {"rl.updates_per_batch": 3, "rl.kl_coef": 0.0})
    sums, norm = PolicyUpdate(config, Engine(logits), None, None).improve(batch, LR, 0.0)

    policy, shares, norms = logits.clone(), [], []
    old = torch.from_numpy(log_probs)
    for _ in range(3):
        policy.requires_grad_()
        ratio = (policy.log_softmax(-1)[torch.arange(LENGTH), torch.from_numpy(taken)] - old).exp()
        clipped = ratio > 1 + config.rl.clip_high
        shares.append(float(clipped.float().mean()))
        (gradient,) = torch.autograd.grad(-torch.where(clipped, 1 + config.rl.clip_high, ratio).mean(), policy)
        norms.append(float(gradient.norm()))
        policy = (policy - LR * gradient).detach()
    assert shares[0] == 0 < shares[1], "the first update is made where the batch was drawn"
    assert float(sums["policy/clip_fraction"]) / LENGTH == pytest.approx(np.mean(shares))
    assert norm == pytest.approx(np.mean(norms), rel=1e-4)
