"""PPO over turns (``rl.gae_level turn``): GAE's equation turn by turn in float64, over rows made of uneven turns."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from micro_batches import micro_batch

from cola_ray.algorithms.ppo import as_turns, generalised_advantages, of_turns
from cola_ray.batch import collate
from cola_ray.experience import Episode, Turn
from cola_ray.learner.micro_batch import Encoded, MicroBatch
from cola_ray.learner.rl import _heads
from cola_ray.learner.value import ValueLearner
from cola_ray.packing import pack
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset


@dataclass(frozen=True)
class Played:
    """One row: of each turn its positions and its actions' rewards, charges for the KL among them."""

    places: list[list[int]]
    rewards: list[list[float]]
    terminated: bool
    values: np.ndarray  # (T,), what the head says at every position
    length: int  # positions that are not padding

    def of_turns(self, gamma, decay):
        """Advantages and values of the turns: ``A_k = sum_j (gamma lambda)^(j - k) delta_j``, as written."""
        last = 0.0 if self.terminated else self.values[self.length - 1]
        values = [self.values[turn[0]] for turn in self.places]
        after = [*values[1:], last]
        deltas = [sum(r) + gamma * v - own for r, v, own in zip(self.rewards, after, values, strict=True)]
        count = len(deltas)
        return [sum((gamma * decay) ** (j - k) * deltas[j] for j in range(k, count)) for k in range(count)], values


def drawn(seed, longest=5, one_token=False):
    """Rows of 1 to 6 turns, which observations of 0 to 3 positions stand between, padded to one width."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(int(draw.integers(1, 7))):
        at, places = int(draw.integers(0, 3)), []
        for _ in range(int(draw.integers(1, 7))):
            count = 1 if one_token else int(draw.integers(1, longest + 1))
            places.append(list(range(at, at + count)))
            at += count + int(draw.integers(0, 4))
        terminated = bool(draw.integers(0, 2))
        rewards = [draw.normal(size=len(turn)).tolist() for turn in places]
        rows.append((places, rewards, terminated, at + 1))
    width = max(length for *_, length in rows) + 2
    return [Played(*row[:3], draw.normal(size=width), row[3]) for row in rows]


def tensors(played, gamma):
    """Fields of a micro-batch, float64; what stands where nobody acts must not count."""
    shape = len(played), len(played[0].values)
    noise = np.random.default_rng(0)
    rewards, discounts = noise.normal(size=shape), noise.random(shape)
    masks, starts, attention = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, np.int64)
    for row, one in enumerate(played):
        attention[row, : one.length] = 1
        for number, (turn, gains) in enumerate(zip(one.places, one.rewards, strict=True)):
            masks[row, turn], starts[row, turn[0]], rewards[row, turn], discounts[row, turn] = True, True, gains, 1.0
            ends = one.terminated and number == len(one.places) - 1
            discounts[row, turn[-1]] = 0.0 if ends else gamma
    fields = {"action_mask": masks, "turn_starts": starts, "rewards": rewards, "discounts": discounts,
              "attention_mask": attention}  # fmt: skip
    return {name: torch.from_numpy(array) for name, array in fields.items()}


def encoded(played, gamma):
    """With e of width 1, which is the value itself."""
    batch = micro_batch(**tensors(played, gamma))
    return Encoded(batch, torch.from_numpy(np.stack([one.values for one in played]))[..., None], batch.rewards)


def with_states(given, width, seed):
    """In float32, with an e that a head makes something of."""
    e = torch.randn(*given.rewards.shape, width, generator=torch.Generator().manual_seed(seed))
    batch = replace(given.batch, discounts=given.batch.discounts.float())
    return Encoded(batch, e, given.rewards.float())


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)


def learner_of(width=1, **changes):
    given = {"lr": 1e-2, "grad_clip": 0.0, "decay": 0.9, "whiten": False, "steps": 3, "seed": 0, "gae_level": "turn"}
    return ValueLearner(width, torch.device("cpu"), **(given | changes))


def reading(**changes):
    """A learner whose head is the identity, in float64."""
    learner = learner_of(**changes)
    learner.online = lambda e: e[..., 0]
    return learner


def count(batches):
    return sum(int(one.batch.action_mask.sum()) for one in batches)


FACTORS = [(0.9, 0.8), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 0.95)]


@pytest.mark.parametrize(("gamma", "decay"), FACTORS)
@pytest.mark.parametrize("seed", range(15))
def test_every_action_has_the_advantage_of_its_turn(seed, gamma, decay):
    played = drawn(seed)
    given = encoded(played, gamma)
    (advantages,), (returns,), sums = reading(decay=decay).advantages([given], count([given]))
    wanted, goals, valued = np.zeros(advantages.values.shape), np.zeros(advantages.values.shape), []
    for row, one in enumerate(played):
        for turn, gain, value in zip(one.places, *one.of_turns(gamma, decay), strict=True):
            wanted[row, turn], goals[row, turn[0]] = gain, gain + value
            valued.append((value, gain))
    np.testing.assert_allclose(advantages.values, wanted, rtol=1e-12, atol=1e-12)
    starts = given.batch.turn_starts
    np.testing.assert_allclose(returns[starts], goals[starts.numpy()], rtol=1e-12, atol=1e-12)
    # Metrics: over the number of actions they are means over turns.
    values, gains = np.array(valued).T
    means = {name: float(one) / count([given]) for name, one in sums.items()}
    assert means["value/mean"] == pytest.approx(values.mean())
    assert means["value/returns"] == pytest.approx((values + gains).mean())
    assert means["value/returns_deviation"] == pytest.approx((values + gains).var())
    assert means["value/error"] == pytest.approx((gains**2).mean())


@pytest.mark.parametrize("seed", range(8))
def test_without_decay_or_discount_it_is_the_return_less_the_value(seed):
    played = drawn(seed)
    given = encoded(played, 1.0)
    (advantages,), (returns,), _ = reading(decay=1.0).advantages([given], count([given]))
    for row, one in enumerate(played):
        left = 0.0 if one.terminated else one.values[one.length - 1]
        for number, turn in enumerate(one.places):
            to_come = sum(sum(gains) for gains in one.rewards[number:]) + left
            assert float(returns[row, turn[0]]) == pytest.approx(to_come)
            for place in turn:
                assert float(advantages.values[row, place]) == pytest.approx(to_come - one.values[turn[0]])


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("cliprange", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(6))
def test_turns_of_one_token_are_actions(seed, cliprange, whiten):
    """Advantages, values and heads are those of ``token``, bit for bit."""
    width, made = 4, []
    given = [with_states(encoded(drawn(part, one_token=True), 0.9), width, part) for part in (seed, seed + 100)]
    for gae_level in ("token", "turn"):
        learner = learner_of(width, whiten=whiten, cliprange=cliprange, gae_level=gae_level)
        for _ in range(3):
            learner.start(given, count(given))
            advantages, returns, sums = learner.advantages(given, count(given))
            learner.fit(given, returns, count(given))
        made.append([*(one.values for one in advantages), *returns, *sums.values(), *learner.online.parameters()])
    for token, turn in zip(*made, strict=True):
        assert torch.equal(token, turn)
    assert any(one.any() for one in made[0])


def test_a_worked_example():
    """Two turns of two actions, an observation between; gamma 0.5, lambda 0.8, and a value of 10 after a cut.

    Deltas 3 + 0.5 * 4 - 1 = 4 and 4 + 0.5 * 10 - 4 = 5, so advantages 4 + 0.4 * 5 = 6 and 5.
    """
    mask = torch.tensor([[True, True, False, True, True]])
    starts = torch.tensor([[True, False, False, True, False]])
    rewards, discounts = torch.tensor([[1.0, 2, 7, 0, 4]]), torch.tensor([[1.0, 0.5, 9, 1, 0.5]])
    values = torch.tensor([[1.0, 99, 99, 4, 99]])
    gains, passed = as_turns(rewards, discounts, mask, starts)
    assert gains.tolist() == [[3, 0, 0, 4, 0]]
    assert passed.tolist() == [[0.5, 0, 0, 0.5, 0]]
    found = generalised_advantages(gains, passed, values, torch.tensor([10.0]), starts, 0.8)
    torch.testing.assert_close(found, torch.tensor([[6.0, 0, 0, 5, 0]]))
    torch.testing.assert_close(of_turns(found, mask, starts), torch.tensor([[6.0, 6, 0, 5, 5]]))


@pytest.mark.parametrize("cliprange", [0.0, 0.02])
def test_the_head_is_fitted_at_first_actions_alone(cliprange):
    """Against Adam on the (clipped) squared error at the turns' first actions, as PPO's paper and baselines have it."""
    played = [drawn(seed) for seed in (3, 4, 5)]
    given = [with_states(encoded(some, 0.9), 5, seed) for seed, some in enumerate(played)]
    learner = learner_of(5, cliprange=cliprange, steps=5)
    other = copy.deepcopy(learner.online)
    starts = [[(row, turn[0]) for row, one in enumerate(some) for turn in one.places] for some in played]

    def at_starts(columns):
        return torch.stack([column[place] for column, places in zip(columns, starts, strict=True) for place in places])

    _, returns, _ = learner.advantages(given, count(given))
    goals, adam, before = at_starts(returns), torch.optim.Adam(other.parameters(), lr=1e-2), None
    learner.fit(given, returns, count(given))
    for _ in range(5):
        values = at_starts([other(one.hidden_states) for one in given])
        before = values.detach() if before is None else before
        errors = (values - goals).square()
        if cliprange:
            errors = torch.max(errors, (before + (values - before).clamp(-cliprange, cliprange) - goals).square())
        adam.zero_grad()
        errors.mean().backward()
        adam.step()
    for name, tensor in learner.online.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], atol=1e-5, rtol=1e-5)


def test_what_the_head_would_say_within_a_turn_counts_for_nothing():
    played, found = drawn(11), []
    given = with_states(encoded(played, 0.9), 5, 0)
    read = given.batch.turn_starts.clone()
    for row, one in enumerate(played):
        read[row, one.length - 1] = True  # what follows a cut
    e = given.hidden_states
    for within in (e, e.roll(1, -1)):
        changed = replace(given, hidden_states=torch.where(read[..., None], e, within))
        learner = learner_of(5, whiten=True)
        (advantages,), returns, _ = learner.advantages([changed], count([changed]))
        learner.fit([changed], returns, count([changed]))
        found.append([advantages.values, *learner.online.parameters()])
    assert (~read & given.batch.action_mask).any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_whitening_is_over_actions():
    given = [encoded(drawn(seed), 0.9) for seed in (1, 2)]
    plain, _, _ = reading().advantages(given, count(given))
    white, _, _ = reading(whiten=True).advantages(given, count(given))
    raw, found = (
        torch.cat([one.values[of.batch.action_mask] for one, of in zip(some, given, strict=True)]).numpy()
        for some in (plain, white)
    )
    np.testing.assert_allclose(found, (raw - raw.mean()) / raw.std(), atol=1e-6)
    assert float(white[0].deviation) == pytest.approx(raw.std())


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_the_first_value_is_that_of_an_average_turn(gamma):
    """From ``mean r / (1 - mean g)`` over turns, with 1 - mean g no less than 0.001, as for actions."""
    played = drawn(2)
    given = replace(encoded(played, gamma), hidden_states=torch.zeros(len(played), len(played[0].values), 4))
    learner = learner_of(4)
    learner.start([given], count([given]))
    gains = [sum(turn) for one in played for turn in one.rewards]
    factors = [gamma * (not (one.terminated and number == len(one.places) - 1))
               for one in played for number in range(len(one.places))]  # fmt: skip
    level = np.mean(gains) / max(1 - np.mean(factors), 1e-3)
    values = learner.online(given.hidden_states)
    assert values.detach().numpy() == pytest.approx(level, rel=1e-5)


@pytest.mark.parametrize("reward", [0.0, -1.7, 31.0])
def test_equal_turns_have_no_advantage_however_wrong_the_head_is(reward):
    """Every turn ends the episode and brings the same; its length is no reason."""
    played = [Played([[0, 1, 2][:length]], [[0.0] * (length - 1) + [reward]], True, np.zeros(5), 4)
              for length in (1, 2, 3)]  # fmt: skip
    given = with_states(encoded(played, 0.9), 4, 0)
    (advantages,), (returns,), _ = learner_of(4, whiten=True).advantages([given], count([given]))
    assert not advantages.values.any()
    assert returns[given.batch.turn_starts].tolist() == pytest.approx([reward] * 3)


# --- where turns are --------------------------------------------------------------------------------------------------


def episode(draw, terminated, dropped=False):
    """Of 1 to 5 turns of 1 to 6 tokens, with observations of 0 to 3; ``dropped``: the last state lost what was before.

    Observations may be empty, and a discount of 1 does not show where a turn ends.
    """
    state, turns = draw.integers(1, 99, 3), []
    number = int(draw.integers(2 if dropped else 1, 6))
    for place in range(number):
        said = draw.integers(1, 99, int(draw.integers(1, 7)))
        answer = draw.integers(1, 99, int(draw.integers(0, 4)))
        if dropped and place == number - 1:
            state = state[-1:]
        zero = np.zeros(len(said), np.int64)
        turns.append(Turn(state, said, said % 5, zero.astype(np.float32), zero, float(draw.normal()), answer))
        state = np.concatenate([state, said, answer])
    return Episode(0, tuple(turns), terminated, "")


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_from_an_episode_to_the_advantages_of_its_turns(seed, gamma):
    """Through packing, padding and micro-batches. The last turn is a sequence of its own in every third episode."""
    draw = np.random.default_rng(seed)
    episodes = [episode(draw, bool(draw.integers(0, 2)), number % 3 == 0) for number in range(6)]
    pieces = [one.as_trajectories(gamma) for one in episodes]
    sequences = [piece for some in pieces for piece in some]
    (batch,) = collate(pack(sequences), [0.0] * len(sequences), 1, 0, 0, 60)
    cuts = [MicroBatch.cut(batch, *cut, torch.device("cpu")) for cut in batch.micro_batches]
    assert len(cuts) > 1
    # A value for every position, from the ids up to it, so that it is known without the batch.
    encoded = [Encoded(one, one.input_ids.cumsum(1).double().sin()[..., None], one.rewards) for one in cuts]
    advantages, _, _ = reading(decay=0.8).advantages(encoded, batch.num_actions_global)
    found = [row[mask].tolist() for one, of in zip(advantages, cuts, strict=True)
             for row, mask in zip(one.values, of.action_mask, strict=True) if mask.any()]  # fmt: skip

    def value(ids):
        return float(np.sin(np.sum(ids)))

    wanted = []
    for one, some in zip(episodes, pieces, strict=True):
        turns = list(one.turns)
        split = [turns[:-1], turns[-1:]] if len(some) == 2 else [turns]
        for part in split:
            ends = one.terminated and part is split[-1]
            last = part[-1]
            values = [value(turn.state_ids) for turn in part]
            values.append(
                0.0 if ends else value(np.concatenate([last.state_ids, last.token_ids, last.observation_ids]))
            )
            deltas = [turn.reward + gamma * after - own
                      for turn, own, after in zip(part, values[:-1], values[1:], strict=True)]  # fmt: skip
            gains = [sum((0.8 * gamma) ** (j - k) * deltas[j] for j in range(k, len(part))) for k in range(len(part))]
            wanted.append([gain for gain, turn in zip(gains, part, strict=True) for _ in turn.token_ids])
    for one, other in zip(sorted(found), sorted(wanted), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_completion_is_one_turn():
    """So is a replayed utterance: nothing says where its turns start."""
    whole = episode(np.random.default_rng(0), True).as_trajectories()[0]
    plain = replace(whole, action_mask=None, rewards=None, discounts=None, turn_starts=None)
    (batch,) = collate(pack([plain]), [1.0], 1, 0, 0, 100)
    starts = np.flatnonzero(batch.padded().turn_starts[0])
    assert starts.tolist() == [len(plain.prompt_ids) - 1]


# --- by default -------------------------------------------------------------------------------------------------------


def test_by_default_nothing_reads_where_turns_start():
    made = []
    for changed in (False, True):
        given = encoded(drawn(7), 0.9)
        if changed:
            given = replace(given, batch=replace(given.batch, turn_starts=given.batch.action_mask))
        learner = ValueLearner(1, torch.device("cpu"), lr=1e-2, grad_clip=0.0, decay=0.9, whiten=True, steps=1, seed=0)
        learner.online = lambda e: e[..., 0]
        (advantages,), (returns,), sums = learner.advantages([given], count([given]))
        made.append([advantages.values, returns, *sums.values()])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({"rl.algorithm": "ppo"}, "token"),
        ({"rl.algorithm": "ppo", "rl.gae_level": "turn"}, "turn"),
        ({"rl.algorithm": "archer", "critic.token_baseline": True}, "token"),
    ],
)
def test_the_setting_reaches_the_head(changes, level):
    config = override(preset("tiny", agents=True), {"task.name": "twenty_questions"} | changes)
    value, _ = _heads(config, 4, 8, torch.device("cpu"))
    assert value.gae_level == level
