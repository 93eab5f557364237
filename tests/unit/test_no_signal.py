"""Where no completion is better than another nothing is to be learnt: exactly nothing, whatever rounding says."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ray.algorithms.advantages import Outcomes, alike, all_alike, centred, of_each, over_spread, standardised
from cola_ray.algorithms.archer import Standardised
from cola_ray.algorithms.gradients import clip_gradients
from cola_ray.algorithms.rloo import leave_one_out
from cola_ray.registry import find
from cola_ray.replay.buffer import ReplayBuffer
from cola_ray.replay.priorities import importance_weights
from cola_ray.settings.algorithms import OF_OUTCOMES

ADVANTAGES = {name: find("advantage", name) for name in OF_OUTCOMES}
GRID = [value / 100 for value in range(-300, 301)]
SIZES = range(2, 33)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_have_no_advantage(name, kind):
    """18 631 groups: every reward from -3 to 3 by a hundredth, in groups of 2 to 32."""
    of = ADVANTAGES[name]
    for size in SIZES:
        rewards = [torch.full((size,), value, dtype=kind) for value in GRID]
        if name == "reinforce":  # whose baseline is the batch's
            found = [of([Outcomes(one)])[0] for one in rewards]
        else:
            found = of([Outcomes(one, value) for one, value in zip(rewards, GRID, strict=True)])
        assert not torch.stack(found).any()


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, -2.7, 31.0, 4e4])
def test_what_a_reward_model_rounds_is_no_signal(name, level):
    """Eight answers of one worth, as a network in float32 scores them: some 1e-6 apart, or 1e-6 of their size."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = 1e-6 * max(1.0, abs(level)) * torch.randn(8, generator=draw, dtype=torch.float64)
        for rewards in (level + noise, (level + noise).float()):
            assert not ADVANTAGES[name]([Outcomes(rewards, level)])[0].any()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_prompts_at_once_are_bit_for_bit_those_one_by_one(name, kind):
    """Of all group sizes, mixed: advantages do not depend on which other prompts a step has."""
    if name == "reinforce":
        pytest.skip("its baseline is the batch's")
    draw, of = torch.Generator().manual_seed(0), ADVANTAGES[name]
    prompts = [Outcomes(torch.rand(size, generator=draw, dtype=kind), 0.3) for size in [1, *SIZES, 64, 100] * 5]
    together, apart = of(prompts), [of([one])[0] for one in prompts]
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
    rewards = [one.rewards for one in prompts] + [torch.full((5,), 0.7), torch.tensor([0.7, 0.7 + 1e-7])]
    assert [bool(one) for one in of_each(rewards, alike)] == [all_alike(one) for one in rewards]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_what_is_real_is_not_taken_for_noise(scale):
    """One right answer among 512 of any usual scale; a hundredth of the form's reward in thinking."""
    rewards = torch.zeros(512)
    rewards[3] = scale
    assert standardised(rewards)[3] == pytest.approx(511 / 512 * 512**0.5, rel=1e-5)
    assert standardised(torch.tensor([0.1, 0.101])).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("size", [2, 8, 64, 512])
@pytest.mark.parametrize("gap", [0.9e-5, 1.2e-5, 2e-5, 1e-3])
def test_what_counts_as_a_difference_has_an_advantage(name, size, gap):
    """Groups that the metric and the redrawing of groups take for signal are taught, whatever the group's size."""
    rewards = torch.zeros(size, dtype=torch.float64)
    rewards[0] = gap
    assert ADVANTAGES[name]([Outcomes(rewards, 0.0)])[0].any() == (not all_alike(rewards))


numbers = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=16)


@settings(max_examples=100, deadline=None)
@given(numbers)
def test_grpo_and_rloo_are_those_of_other_libraries(rewards):
    """TRL's GRPOTrainer, (r - mean) / (std + 1e-4), and RLOOTrainer, r - (sum - r) / (k - 1); by NumPy in float64."""
    values, given = np.array(rewards, np.float64), torch.tensor([rewards], dtype=torch.float32)
    if np.ptp(values) <= 1e-5 * max(1.0, np.abs(values).max()):
        assert not standardised(given).any()
        assert not leave_one_out(given).any()
        return
    others = (values.sum() - values) / (len(values) - 1)
    np.testing.assert_allclose(leave_one_out(given)[0], values - others, rtol=1e-6, atol=2e-5)  # float32 eps x 200
    spread = values.std(ddof=1)
    if spread > 2e-5 * max(1.0, np.abs(values).max()):
        exact, trl = (values - values.mean()) / spread, (values - values.mean()) / (spread + 1e-4)
        found = standardised(given)[0].numpy()
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found, trl, rtol=1e-4 / spread + 1e-6, atol=1e-7)


def test_means_are_computed_in_float64():
    """In float32 the mean of 4096 rewards of 1000.1 and one of 1001.1 is off by more than rewards differ from it."""
    rewards = torch.full((4097,), 1000.1)
    rewards[0] = 1001.1
    exact = rewards.double().numpy() - rewards.double().numpy().mean()
    np.testing.assert_allclose(centred(rewards), exact, rtol=1e-6)


def test_a_nan_is_not_hidden():
    assert standardised(torch.tensor([0.0, float("nan"), 1.0])).isnan().all()
    assert not all_alike(torch.tensor([0.0, float("nan")]))
    assert over_spread(torch.ones(1), torch.tensor([float("nan")]), torch.ones(1)).isnan().all()


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 5.0, -300.0])
def test_a_feature_that_was_constant_at_first_keeps_its_own_scale(level):
    """A flag that nobody has raised, and one with float32's rounding: the first that is raised reads 1, not 1e6."""
    rows = torch.full((4096, 2), level)
    rows[::2, 1] += 1e-7 * max(abs(level), 1.0)
    read = Standardised(2)
    read.measure(torch.stack([rows.double().mean(0), rows.double().square().mean(0)]))
    torch.testing.assert_close(read(rows + 1.0), torch.ones_like(rows), atol=1e-3, rtol=0)


def test_a_feature_that_hardly_varied_at_first_is_cut_off():
    rows = torch.zeros(4096, 1, dtype=torch.float64)
    rows[0] = 1e-3
    read = Standardised(1)
    read.measure(torch.stack([rows.mean(0), rows.square().mean(0)]))
    assert read(torch.tensor([[1.0], [-1.0]])).flatten().tolist() == [10.0, -10.0]


# --- priorities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 128, 300])
def test_rows_without_any_error_are_drawn_alike(rows):
    import pyarrow as pa

    buffer = ReplayBuffer(1000, 1 << 20)
    buffer.append(pa.table({"x": pa.array(range(rows), pa.int64())}))
    buffer.set_priorities(np.arange(rows), np.zeros(rows))
    table, _, drawn = buffer.sample_prioritised(50 * rows, np.random.default_rng(0))
    counts = np.bincount(table["x"].to_numpy(), minlength=rows)
    assert counts.min() > 0
    assert counts.max() < 120
    weights = importance_weights(drawn / buffer.priority_total, rows, 0.4)
    np.testing.assert_allclose(weights, 1.0)


def test_a_draw_never_falls_behind_the_last_row():
    """Even one that rounding puts at the very end of the priorities' sum, of all or of a block."""
    import pyarrow as pa

    class Last:
        def random(self, count):
            return np.full(count, np.nextafter(1.0, 0.0))

    for rows, last in itertools.product((1, 7, 130), (1e-6, 0.1, 3.0)):
        buffer = ReplayBuffer(1000, 1 << 20)
        buffer.append(pa.table({"x": pa.array(range(rows), pa.int64())}))
        buffer.set_priorities(np.arange(rows), np.append(np.full(rows - 1, 0.1), last))
        _, numbers, _ = buffer.sample_prioritised(3, Last())
        assert numbers.max() == rows - 1


# --- gradients --------------------------------------------------------------------------------------------------------


def test_a_limit_of_zero_leaves_gradients_as_they_are():
    def clipped(limit):
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([3.0, 4.0])
        assert clip_gradients([parameter], limit) == 5.0
        return parameter.grad.tolist()

    assert clipped(0.0) == [3.0, 4.0]
    assert clipped(10.0) == [3.0, 4.0]
    assert clipped(1.0) == pytest.approx([0.6, 0.8], abs=1e-5)
