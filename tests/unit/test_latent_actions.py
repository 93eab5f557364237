"""Sampling and code usage against closed forms."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ray.algorithms.latent_actions import negative_entropy, straight_through_gumbel, usage, usage_imbalance
from cola_ray.model import modeling_cola
from cola_ray.model.modeling_cola import FEW_ACTIONS, RANKED, action_log_probs, gumbel_noise, sample_actions


def draw(logits, temperature=1.0, top_k=0, seeds=None, positions=None, forced=None, top_p=1.0):
    n = len(logits)
    whole = lambda value: torch.full((n,), value, dtype=torch.int64)  # noqa: E731
    return sample_actions(
        logits,
        torch.full((n,), temperature),
        whole(top_k),
        whole(0) if seeds is None else seeds,
        whole(0) if positions is None else positions,
        whole(-1) if forced is None else forced,
        torch.full((n,), top_p),
    )


def splitmix64(state: int) -> int:
    """The published finaliser in unbounded integers, masked by hand."""
    mask = (1 << 64) - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_noise_equals_the_hash_in_python_integers():
    golden = 0x9E3779B97F4A7C15
    for seed, position in [(0, 0), (7, 3), (2**62 - 1, 10**6)]:
        key = splitmix64(splitmix64(seed + golden) + position * golden)
        expected = []
        for index in range(1, 6):
            uniform = ((splitmix64(key + index * golden) >> 12) + 0.5) * 2.0**-52
            expected.append(-math.log(-math.log(uniform)))
        noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 5)[0]
        np.testing.assert_allclose(noise.numpy(), expected, rtol=1e-12)


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, 4)
    actions, log_probs = draw(logits, temperature=0.7, seeds=torch.arange(40_000))
    expected = (torch.tensor([2.0, 1.0, 0.0, -1.0]) / 0.7).softmax(0)
    shares = torch.bincount(actions, minlength=4) / 40_000
    # Four standard errors of a share.
    assert torch.all((shares - expected).abs() < 4 * (expected * (1 - expected) / 40_000).sqrt())
    torch.testing.assert_close(log_probs, expected.log()[actions], atol=1e-6, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 5000), st.floats(0.1, 3), st.integers(0, 12))
def test_a_row_does_not_depend_on_its_batch(seed, position, temperature, top_k):
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed % 2**31))
    seeds, positions = torch.arange(5) + seed, torch.arange(5) + position
    together = draw(logits, temperature, top_k, seeds, positions)
    for row in range(5):
        alone = draw(logits[row : row + 1], temperature, top_k, seeds[row : row + 1], positions[row : row + 1])
        assert together[0][row] == alone[0][0]
        assert together[1][row] == alone[1][0]


def test_a_vocabulary_is_drawn_in_float32_and_follows_its_distribution():
    """Draws are those of float64 noise but for rare ties, and shares are the softmax's, also of a rare token."""
    rows, vocabulary = 400, 2 * FEW_ACTIONS
    logits = torch.full((vocabulary,), -4.0)
    logits[5], logits[-1], logits[77] = 6.0, 5.0, 2.0  # beside 8189 tokens of e^-4 each: 0.57, 0.21, 0.01, 0.21
    expected = logits.double().softmax(0)
    rounding = vocabulary / 8 * 2**-24  # of a sum in at least 8 lanes; how many depends on the processor
    groups, same = torch.zeros(4), 0
    for start in range(0, 8 * rows, rows):
        seeds = torch.arange(start, start + rows)
        actions, log_probs = draw(logits.expand(rows, -1), seeds=seeds)
        torch.testing.assert_close(log_probs.double(), expected.log()[actions], atol=rounding, rtol=0)
        same += int((actions == (gumbel_noise(seeds, seeds * 0, vocabulary) + expected.log()).argmax(-1)).sum())
        named = [(actions == one).sum() for one in (5, vocabulary - 1, 77)]
        groups += torch.tensor([*named, rows - sum(named)])
    assert same >= 8 * rows - 1
    shares = torch.tensor([*expected[[5, vocabulary - 1, 77]], 1 - expected[[5, vocabulary - 1, 77]].sum()])
    chi_square = ((groups - 8 * rows * shares) ** 2 / (8 * rows * shares)).sum()
    assert chi_square < 16.3, "the 0.001 quantile for three degrees of freedom"


def test_noise_in_float32_is_that_of_float64():
    seeds = torch.arange(40)
    exact, found = (gumbel_noise(seeds, seeds, 50_000, dtype) for dtype in (torch.float64, torch.float32))
    assert exact.max() > 13, "large noise decides draws, and is not cut off"
    decides = exact > -1
    torch.testing.assert_close(found[decides].double(), exact[decides], atol=2e-6, rtol=2e-7)
    assert found[~decides].max() < -0.999


def test_noise_is_drawn_in_parts_that_fit_into_memory(monkeypatch):
    logits = torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    whole = draw(logits, seeds=torch.arange(7))
    monkeypatch.setattr(modeling_cola, "NOISE_AT_ONCE", 19)
    for one, other in zip(draw(logits, seeds=torch.arange(7)), whole, strict=True):
        assert torch.equal(one, other)


def test_settings_that_no_row_has_need_not_be_asked_of_the_device():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    seeds, zero = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    neutral = torch.zeros(6), zero, seeds, zero, zero - 1
    for absent, neutral_ones in (
        ((None, None, seeds, zero, None, None), (*neutral, torch.ones(6))),
        ((torch.ones(6), None, seeds, zero, None, None), (torch.ones(6), *neutral[1:], torch.ones(6))),
    ):
        for one, other in zip(sample_actions(logits, *absent), sample_actions(logits, *neutral_ones), strict=True):
            assert torch.equal(one, other)


def test_truncation_is_part_of_the_score():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(500, 4)
    actions, log_probs = draw(logits, top_k=2, seeds=torch.arange(500))
    assert set(actions.tolist()) == {0, 1}
    expected = torch.tensor([3.0, 2.0]).log_softmax(0)
    torch.testing.assert_close(log_probs, expected[actions], atol=1e-6, rtol=0)
    _, outside = draw(logits[:1], top_k=2, forced=torch.tensor([3]))
    assert outside.item() == -math.inf


def test_greedy_and_forced():
    logits = torch.tensor([[0.0, 5.0, 1.0], [4.0, 0.0, 1.0]])
    assert draw(logits, temperature=0.0)[0].tolist() == [1, 0]
    actions, log_probs = draw(logits, temperature=0.0, forced=torch.tensor([2, -1]))
    assert actions.tolist() == [2, 0]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1)[[0, 1], [2, 0]])


def test_ranks():
    logits = torch.tensor([[0.0, 5.0, 1.0]]).expand(4, 3)
    wanted = torch.tensor([RANKED, RANKED - 1, RANKED - 2, RANKED - 7])
    actions, log_probs = draw(logits, forced=wanted)
    assert actions.tolist() == [1, 2, 0, 0], "beyond the last, the last"
    torch.testing.assert_close(log_probs, logits.log_softmax(-1)[0, actions])


def test_top_k_per_row():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    scored = action_log_probs(logits, torch.ones(3), torch.tensor([0, 1, 3]))
    assert torch.isfinite(scored).sum(-1).tolist() == [8, 1, 3]
    torch.testing.assert_close(scored.exp().sum(-1), torch.ones(3))


def kept_by_hand(logits, top_k, top_p):
    """One row: the most probable actions one after the other, of the first ``top_k``, until they have ``top_p``."""
    ranked = sorted(range(len(logits)), key=lambda action: -logits[action])[: top_k or None]
    weights = {action: math.exp(logits[action]) for action in ranked}
    kept, mass = [], 0.0
    for action in ranked:
        if mass >= top_p * sum(weights.values()):
            break
        kept.append(action)
        mass += weights[action]
    return set(kept), {action: math.log(weights[action] / mass) for action in kept}


def test_top_p_keeps_the_fewest_that_have_the_probability():
    draws = np.random.default_rng(0)
    for _ in range(300):
        logits = torch.from_numpy(draws.normal(0, draws.uniform(0.1, 4), 9))
        top_k, top_p = int(draws.integers(0, 9)), float(draws.uniform(0.02, 1))
        scored = action_log_probs(logits[None], None, torch.tensor([top_k]), torch.tensor([top_p]).double())[0]
        kept, log_probs = kept_by_hand(logits.tolist(), top_k, top_p)
        assert set(scored.isfinite().nonzero()[:, 0].tolist()) == kept
        for action, log_prob in log_probs.items():
            assert abs(float(scored[action]) - log_prob) < 1e-9


def test_top_p_is_that_of_transformers():
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(200, 16, generator=torch.Generator().manual_seed(5))
    for temperature, top_k, top_p in ((0.7, 0, 0.9), (1.3, 5, 0.5), (1.0, 0, 0.05), (0.5, 12, 0.999), (1.0, 0, 1.0)):
        shapes = [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k or 16), TopPLogitsWarper(top_p)]
        theirs = LogitsProcessorList(shapes)(None, logits.double()).log_softmax(-1)
        row = torch.ones(200, dtype=torch.float64)
        ours = action_log_probs(logits.double(), row * temperature, torch.full((200,), top_k), row * top_p)
        torch.testing.assert_close(ours, theirs)
        actions, log_probs = draw(logits, temperature, top_k, torch.arange(200), top_p=top_p)
        assert log_probs.isfinite().all(), "drawn from what is kept"
        torch.testing.assert_close(log_probs.double(), ours.gather(1, actions[:, None])[:, 0], atol=2e-6, rtol=0)


def test_top_p_keeps_ties_and_at_least_one_action():
    even = torch.zeros(1, 8)
    assert action_log_probs(even, None, None, torch.tensor([0.3])).isfinite().all(), "no order is in them"
    sure = torch.tensor([[50.0, 0.0, 1.0]])
    assert action_log_probs(sure, None, None, torch.tensor([1e-9])).isfinite().tolist() == [[True, False, False]]
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    scored = action_log_probs(rows, None, None, torch.tensor([1.0, 1e-6, 1.0]))
    assert torch.equal(scored[[0, 2]], rows.log_softmax(-1)[[0, 2]]), "1 is all, to the last bit"
    assert scored[1].isfinite().sum() == 1


def test_straight_through_has_the_relaxed_gradient():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    noise, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    one_hot, relaxed = straight_through_gumbel(logits, noise, 2.0)
    assert torch.equal(one_hot.detach().argmax(-1), (logits + noise).argmax(-1))
    torch.testing.assert_close(one_hot.detach().sum(-1), torch.ones(6, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((one_hot * weight).sum(), logits)
    p = relaxed.detach()
    expected = p * (weight - (p * weight).sum(-1, keepdim=True)) / 2.0  # softmax Jacobian, by hand
    torch.testing.assert_close(gradient, expected)


def test_usage_terms():
    uniform = torch.full((3, 4), 0.25)
    torch.testing.assert_close(negative_entropy(uniform), torch.full((3,), -math.log(4)), atol=1e-6, rtol=0)
    even, uneven = torch.eye(4), torch.eye(4)[[0, 0]]
    assert abs(float(usage_imbalance(even, even.mean(0)))) < 1e-6  # each row certain, all codes used
    assert abs(float(usage_imbalance(uneven, uneven.mean(0))) - 2 * math.log(4)) < 1e-6


def test_parts_of_a_batch_add_up_to_the_imbalance_of_the_whole():
    """Value and gradient, against autograd of ``N (log K - H(mean p))`` itself."""
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    relaxed = logits.softmax(-1)
    mean = relaxed.mean(0)
    whole = 12 * (math.log(5) + (mean * (mean + 1e-8).log()).sum())
    parts = sum(usage_imbalance(part, mean) for part in relaxed.split([1, 4, 7]))
    torch.testing.assert_close(parts, whole)
    found, wanted = (torch.autograd.grad(of, logits, retain_graph=True)[0] for of in (parts, whole))
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-6)  # the 1e-8 in the logarithm
    assert usage(torch.tensor([3.0, 0.0, 1.0])) == {"actions/alive": 2.0, "actions/top_share": 0.75}
