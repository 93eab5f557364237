"""PPO's value side: GAE against a brute force over lists, and two ranks against one."""

import copy

import numpy as np
import pytest
import torch
from conftest import on_ranks
from hypothesis import given
from hypothesis import strategies as st
from micro_batches import micro_batch

from cola_ray.algorithms.gradients import NonFiniteError
from cola_ray.algorithms.ppo import clipped_values, generalised_advantages
from cola_ray.batch import collate
from cola_ray.experience import Episode, Turn
from cola_ray.learner.micro_batch import Encoded
from cola_ray.learner.value import ValueLearner
from cola_ray.packing import pack

WIDTH, NUMBERS = 5, st.floats(-3, 3, width=32)


@given(st.data(), st.integers(1, 7), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum_over_the_actions_alone(data, length, gamma, decay):
    """A_i = sum_j decay^(j-i) (prod g_i..g_{j-1}) delta_j, with what is not an action taken out beforehand."""
    mask = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    draw = st.lists(NUMBERS, min_size=length, max_size=length)
    rewards, values, final = data.draw(draw), data.draw(draw), data.draw(NUMBERS)
    discounts = data.draw(st.lists(st.sampled_from([1.0, gamma, 0.0]), min_size=length, max_size=length))
    acting = [t for t in range(length) if mask[t]]
    after = [*(values[t] for t in acting[1:]), final][: len(acting)]
    deltas = [rewards[t] + discounts[t] * v - values[t] for t, v in zip(acting, after, strict=True)]
    wanted = np.zeros(length)
    for i, t in enumerate(acting):
        passed = 1.0
        for j in range(i, len(acting)):
            wanted[t] += passed * deltas[j]
            passed *= discounts[acting[j]] * decay
    tensors = [torch.tensor([column], dtype=torch.float64) for column in (rewards, discounts, values)]
    got = generalised_advantages(*tensors, torch.tensor([final], dtype=torch.float64), torch.tensor([mask]), decay)
    np.testing.assert_allclose(got[0].numpy(), wanted, atol=1e-9)


def episode(terminated: bool) -> Episode:
    """Two turns of two tokens each, with one token of opening and of each answer."""
    two = np.arange(2)
    turns = [
        Turn(np.arange(1 + 3 * i), two, two, -np.ones(2, np.float32), two * 0, -1.0, np.array([9])) for i in range(2)
    ]
    turns[1] = Turn(np.array([0, 0, 1, 9]), two, two, -np.ones(2, np.float32), two * 0, 2.0, np.array([9]))
    return Episode(0, tuple(turns), terminated, "")


@pytest.mark.parametrize("terminated", [True, False])
def test_rewards_and_discounts_stand_at_the_ends_of_turns(terminated):
    (trajectory,) = episode(terminated).as_trajectories(gamma=0.5)
    (batch,) = collate(pack([trajectory]), [0.0], 1, 0, 0, 1000)
    padded = batch.padded()
    # ids 0 | 0 1 | 9 | 0 1 (| 9): actions at positions 0, 1 and 3, 4.
    assert padded.action_mask[0].tolist()[:5] == [True, True, False, True, True]
    assert padded.rewards[0].tolist()[:5] == [0, -1, 0, 0, 2]
    assert padded.discounts[0][padded.action_mask[0]].tolist() == [1, 0.5, 1, 0 if terminated else 0.5]
    assert padded.attention_mask.sum() == (6 if terminated else 7), "what is cut off is valued after the last answer"
    # By hand with V = 0 but 4 at the very end, decay 1: the last action gets 2 + 0.5 * 4, the second -1 + 0.5 of that.
    advantages = generalised_advantages(
        torch.tensor(padded.rewards), torch.tensor(padded.discounts), torch.zeros(padded.rewards.shape),
        torch.tensor([4.0]), torch.tensor(padded.action_mask), 1.0,
    )  # fmt: skip
    last = 2.0 if terminated else 4.0
    assert advantages[0, :5].tolist() == [-1 + last / 2, -1 + last / 2, 0, last, last]


def in_twos(e: torch.Tensor, fields: dict[str, torch.Tensor]) -> list[Encoded]:
    """Micro-batches of two rows."""
    cuts = [slice(i, i + 2) for i in range(0, len(e), 2)]
    made = [micro_batch(**{name: tensor[cut] for name, tensor in fields.items()}) for cut in cuts]
    return [Encoded(one, e[cut], one.rewards) for one, cut in zip(made, cuts, strict=True)]


def drawn(rows: slice) -> list[Encoded]:
    torch.manual_seed(3)
    mask = torch.rand(6, 8) < 0.7
    e, rewards = torch.randn(6, 8, WIDTH), torch.randn(6, 8) * mask
    fields = {"rewards": rewards, "action_mask": mask, "discounts": torch.rand(6, 8) * mask}
    first = mask & (mask.cumsum(1) == 1)
    fields["turn_starts"] = first | (mask & (torch.rand(6, 8) < 0.4))
    return in_twos(e[rows], {name: tensor[rows] for name, tensor in fields.items()})


def acted(batches: list[Encoded], columns: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([column[one.batch.action_mask] for one, column in zip(batches, columns, strict=True)])


def actions_of(batches: list[Encoded]) -> int:
    return sum(int(one.batch.action_mask.sum()) for one in batches)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)


def learner_of(**changes) -> ValueLearner:
    given = {"lr": 1e-2, "grad_clip": 1.0, "decay": 0.95, "whiten": True, "steps": 3, "seed": 0} | changes
    return ValueLearner(WIDTH, torch.device("cpu"), **given)


def outcomes(*rewards) -> list[Encoded]:
    """Completions of three to eight actions, a reward at the end of each, in micro-batches of two."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (len(rewards),), generator=generator)
    places = torch.arange(9)
    mask = places < lengths[:, None]
    last = places == lengths[:, None] - 1
    return in_twos(torch.randn(len(rewards), 9, WIDTH, generator=generator), {
        "action_mask": mask, "rewards": last * torch.tensor(rewards)[:, None], "discounts": (mask & ~last).float(),
        "attention_mask": (places <= lengths[:, None]).long(),
    })  # fmt: skip


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("reward", [0.0, 0.2, -1.7, 31.0])
def test_equal_outcomes_have_no_advantage_however_wrong_the_head_is(alone, reward, whiten):
    learner = learner_of(whiten=whiten)
    for started in (False, True):
        for _ in range(3):
            given = outcomes(*[reward] * 6)
            count = actions_of(given)
            if started:
                learner.start(given, count)
            advantages, returns, sums = learner.advantages(given, count)
            assert not any(one.values.any() for one in advantages)
            assert all(one.deviation == (1.0 if whiten else None) for one in advantages), "nothing is divided"
            assert float(sums["value/returns"]) / count == pytest.approx(reward, abs=1e-5)
            learner.fit(given, returns, count)


def test_whitening_by_hand_and_its_metrics(alone):
    """Against NumPy in float64, of outcomes far from 0, where the difference of two squares would be rounding."""
    learner, given = learner_of(decay=1.0), outcomes(1000.0, 1001.0, 1000.5, 1003.0)
    count = actions_of(given)
    with torch.no_grad():
        values = acted(given, [learner.online(one.hidden_states) for one in given])
    advantages, _, sums = learner.advantages(given, count)
    gains = acted(given, [one.rewards.sum(1, keepdim=True).expand(one.rewards.shape) for one in given])
    raw = (gains.double() - values.double()).numpy()
    found = acted(given, [one.values for one in advantages]).numpy()
    np.testing.assert_allclose(found, (raw - raw.mean()) / raw.std(), atol=1e-3)  # 1000's rounding over a spread of 1
    assert float(advantages[0].deviation) == pytest.approx(raw.std(), rel=1e-3)
    returns = gains.double().numpy()
    assert float(sums["value/returns_deviation"]) / count == pytest.approx(returns.var(), rel=1e-3)
    assert float(sums["value/error"]) == pytest.approx((raw**2).sum(), rel=1e-5)


def test_a_limit_of_zero_clips_nothing_and_a_nan_is_not_stepped_on(alone):
    heads = []
    for limit in (0.0, 1e9):
        learner, given = learner_of(grad_clip=limit), outcomes(0.0, 1.0, 5.0, 2.0)
        count = actions_of(given)
        _, returns, _ = learner.advantages(given, count)
        before = {name: tensor.clone() for name, tensor in learner.online.state_dict().items()}
        learner.fit(given, returns, count)
        heads.append(learner.online.state_dict())
        assert not torch.equal(heads[-1]["layers.0.weight"], before["layers.0.weight"])
    for name, tensor in heads[0].items():
        assert torch.equal(tensor, heads[1][name])
    returns[0][0, 0] = torch.nan
    kept = {name: tensor.clone() for name, tensor in heads[1].items()}
    with pytest.raises(NonFiniteError):
        learner.fit(given, returns, count)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in learner.online.state_dict().items())


def trl_value_loss(vpred, values, returns, cliprange_value):
    """Of each action: ``trl/trainer/ppo_trainer.py`` (Apache-2.0), without its factor of 1/2."""
    clipped = torch.clamp(vpred, values - cliprange_value, values + cliprange_value)
    return torch.max(torch.square(vpred - returns), torch.square(clipped - returns))


def test_a_clipped_values_error_is_trls():
    generator = torch.Generator().manual_seed(0)
    values, before, returns = torch.randn(3, 400, generator=generator, dtype=torch.float64)
    values.requires_grad_()
    found = (clipped_values(values, before, returns, 0.3) - returns).square()
    wanted = trl_value_loss(values, before, returns, 0.3)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(one.sum(), values)[0] for one in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert 40 < (gradients[0] == 0).sum() < 360, "clipped and not"
    assert clipped_values(*torch.tensor([[3.0, 3.0], [1.0, 1.0], [5.0, 1.0]]), 0.5).tolist() == [1.5, 3.0]


@pytest.mark.parametrize("cliprange", [0.05, 0.1, 1e6])
def test_a_head_with_a_clip_learns_as_if_its_loss_were_trls(alone, cliprange):
    """Against Adam on TRL's loss, over micro-batches of two; without a limit that binds, as without any."""
    given = outcomes(0.0, 3.0, 5.0, -2.0)
    count, learner = actions_of(given), learner_of(cliprange=cliprange, grad_clip=0.0, steps=6)
    other, free = copy.deepcopy(learner.online), learner_of(grad_clip=0.0, steps=6)
    free.online.load_state_dict(other.state_dict())
    _, returns, _ = learner.advantages(given, count)
    learner.fit(given, returns, count)
    free.fit(given, returns, count)
    adam, before, goals = torch.optim.Adam(other.parameters(), lr=1e-2), None, acted(given, returns)
    for _ in range(6):
        values = acted(given, [other(one.hidden_states) for one in given])
        before = values.detach() if before is None else before
        adam.zero_grad()
        (trl_value_loss(values, before, goals, cliprange).sum() / count).backward()
        adam.step()
    for name, tensor in learner.online.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], atol=1e-5, rtol=1e-5)
    without = free.online.state_dict()
    same = [torch.equal(tensor, without[name]) for name, tensor in learner.online.state_dict().items()]
    assert all(same) == (cliprange == 1e6)


def rank(number, size, out, gae_level):
    learner = ValueLearner(
        WIDTH, torch.device("cpu"), lr=1e-2, grad_clip=1.0, decay=0.9, whiten=True, steps=3, seed=0,
        gae_level=gae_level,
    )  # fmt: skip
    count = actions_of(drawn(slice(0, 6)))
    mine = drawn(slice(0, 6) if size == 1 else slice(4 * number, 4 + 2 * number))
    for _ in range(4):
        learner.start(mine, count)
        advantages, returns, _ = learner.advantages(mine, count)
        learner.fit(mine, returns, count)
    found = torch.cat([one.values for one in advantages])
    torch.save([learner.state_dict()["online"], found], f"{out}/{size}-{number}")


@pytest.mark.parametrize("gae_level", ["token", "turn"])
def test_two_ranks_fit_the_same_head_as_one(tmp_path, gae_level):
    for size in (1, 2):
        on_ranks(rank, size, size, tmp_path, gae_level)
    alone, *both = [torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1")]
    for name, tensor in alone[0].items():
        torch.testing.assert_close(both[0][0][name], tensor, atol=1e-5, rtol=1e-5)
        assert torch.equal(both[0][0][name], both[1][0][name]), "every rank holds the same head"
    torch.testing.assert_close(torch.cat([both[0][1], both[1][1]]), alone[1], atol=1e-4, rtol=1e-4)
    acted = alone[1][torch.cat([one.batch.action_mask for one in drawn(slice(0, 6))])]
    assert abs(float(acted.mean())) < 1e-5
    assert float(acted.square().mean()) == pytest.approx(1.0, abs=1e-4)
