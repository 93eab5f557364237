"""ArCHer's critic: a hand-worked example, and exact values on a small decision process, truncation included."""

import numpy as np
import pytest
import torch

from cola_ray.algorithms.advantages import typical_value
from cola_ray.algorithms.archer import (
    TwinHeads,
    expectile_loss,
    q_targets,
    twin_squared_error,
    utterance_advantages,
)
from cola_ray.algorithms.heads import polyak_
from cola_ray.replay import critic as archer_critic
from cola_ray.replay.critic import Critic, CriticBatch


def test_losses_by_hand():
    """Two transitions, gamma 0.5. The first goes on: -1 + 0.5 * [-4, -6] = [-3, -4]. The second terminates: 2."""
    goals = q_targets(
        torch.tensor([-1.0, 2.0]), torch.tensor([False, True]), torch.tensor([[-4.0, 9.0], [-6.0, 9.0]]), 0.5
    )
    assert goals.tolist() == [[-3, 2], [-4, 2]]
    q = torch.tensor([[-2.0, 2.0], [-4.0, 5.0]])
    # Squares [[1, 0], [0, 9]]: means 0.5 and 4.5.
    assert twin_squared_error(q, goals) == 5.0
    assert twin_squared_error(q, goals, torch.tensor([1.0, 1 / 3])) == pytest.approx(0.5 + 1.5)
    assert utterance_advantages(q, torch.tensor([[-1.0, 0.0], [-2.0, 1.0]])).tolist() == [-2, 2]


def test_goals_get_no_gradient():
    goals, values = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    twin_squared_error(values, goals).backward()
    assert goals.grad is None
    assert torch.allclose(values.grad, torch.full((2, 3), -2 / 3))


def test_gradients_of_the_losses_are_those_of_their_values():
    """Against finite differences; the heads' own, through standardised features."""
    draw = torch.Generator().manual_seed(0)
    values, goals = (torch.randn(2, 5, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    weights = torch.rand(5, generator=draw, dtype=torch.float64)
    fixed = goals.detach()
    assert torch.autograd.gradcheck(lambda v: twin_squared_error(v, fixed, weights), (values,))
    assert torch.autograd.gradcheck(lambda v: expectile_loss(v, fixed, 0.8), (values,))
    heads = TwinHeads(3, 3).double()
    states, utterances = (torch.randn(5, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    heads.states.measure(torch.stack([states.mean(0), states.square().mean(0)]))

    def loss(*parameters):
        named = dict(zip(dict(heads.named_parameters()), parameters, strict=True))
        read = [(states, utterances), (states,)]
        q, v = (
            torch.func.functional_call(Called(heads, name), {f"heads.{k}": p for k, p in named.items()}, given)
            for name, given in zip(("q_values", "values"), read, strict=True)
        )
        return twin_squared_error(q, fixed, weights) + twin_squared_error(v, fixed)

    assert torch.autograd.gradcheck(loss, tuple(heads.parameters()))


class Called(torch.nn.Module):
    """A module whose forward is another one's method."""

    def __init__(self, heads, method):
        super().__init__()
        self.heads, self.method = heads, method

    def forward(self, *given):
        return getattr(self.heads, self.method)(*given)


def test_expectiles():
    """d = [1, -2]: 0.9 * 1 and 0.1 * 4, mean 0.65, twice."""
    v, q = torch.zeros(2, 2), torch.tensor([[1.0, -2.0]] * 2)
    assert expectile_loss(v, q, 0.9) == pytest.approx(1.3)
    assert expectile_loss(v, q, 0.5) == pytest.approx(twin_squared_error(v, q).item() / 2)


def test_polyak_moves_by_its_share():
    slow, fast = [torch.tensor([0.0, 10.0])], [torch.tensor([1.0, 0.0])]
    polyak_(slow, fast, 0.1)
    assert slow[0].tolist() == pytest.approx([0.1, 9.0])


# --- a chain of four states, two utterances ---------------------------------------------------------------------------

STATES, GAMMA = 4, 0.9
STAY, GO = 0, 1
POLICY = torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.8, 0.2], [0.4, 0.6]])  # pi(utterance | state)


def outcome(state: int, utterance: int) -> tuple[float, int, bool]:
    """Reward, next state, terminated: going on from the last state ends the episode with 5, all else costs 1."""
    if utterance == STAY:
        return -1.0, state, False
    return (5.0, 0, True) if state == STATES - 1 else (-1.0, state + 1, False)


def exact_values() -> tuple[torch.Tensor, torch.Tensor]:
    """By solving the linear system of policy evaluation in float64; a time limit changes nothing."""
    pi = POLICY.double()
    transition, reward = torch.zeros(STATES, STATES, dtype=torch.float64), torch.zeros(STATES, dtype=torch.float64)
    for state in range(STATES):
        for utterance in (STAY, GO):
            r, after, terminated = outcome(state, utterance)
            reward[state] += pi[state, utterance] * r
            transition[state, after] += pi[state, utterance] * (not terminated)
    v = torch.linalg.solve(torch.eye(STATES, dtype=torch.float64) - GAMMA * transition, reward)
    q = torch.zeros(STATES, 2, dtype=torch.float64)
    for state in range(STATES):
        for utterance in (STAY, GO):
            r, after, terminated = outcome(state, utterance)
            q[state, utterance] = r + GAMMA * (not terminated) * v[after]
    return q, v


class TableHeads(torch.nn.Module):
    """The heads' interface over one-hot features: as many parameters as values."""

    def __init__(self) -> None:
        super().__init__()
        self.q_table = torch.nn.Parameter(torch.zeros(2, STATES, 2))
        self.v_table = torch.nn.Parameter(torch.zeros(2, STATES))

    def q_values(self, states, utterances):
        return torch.einsum("ksu,bs,bu->kb", self.q_table, states, utterances)

    def values(self, states):
        return torch.einsum("ks,bs->kb", self.v_table, states)


def every_transition(rng: np.random.Generator) -> CriticBatch:
    """All of them once, ``terminated`` only where the rules end an episode, and fresh utterances from the policy."""
    pairs = [(state, utterance) for state in range(STATES) for utterance in (STAY, GO)]
    results = [outcome(*pair) for pair in pairs]
    eye = torch.eye(max(STATES, 2))
    # 100 copies a state in exact proportion to the policy stand for fresh draws without their noise.
    fresh = [(s, u) for s in range(STATES) for u in (STAY, GO) for _ in range(round(100 * float(POLICY[s, u])))]
    order = rng.permutation(len(fresh))
    return CriticBatch(
        states=eye[[s for s, _ in pairs]],
        utterances=eye[[u for _, u in pairs]][:, :2],
        next_states=eye[[after for _, after, _ in results]],
        rewards=torch.tensor([r for r, _, _ in results]),
        terminated=torch.tensor([ended for *_, ended in results]),
        fresh_states=eye[[fresh[i][0] for i in order]],
        fresh_utterances=eye[[fresh[i][1] for i in order]][:, :2],
    )


def table_critic(**changes) -> Critic:
    critic = Critic(TableHeads(), **{"gamma": GAMMA, "tau": 0.1, "lr": 0.05, "grad_clip": 1e9} | changes)
    critic.optimizer = torch.optim.SGD(critic.online.parameters(), lr=1.0)
    return critic


def test_fitted_values_converge_to_the_exact_ones():
    critic, rng = table_critic(), np.random.default_rng(0)
    for _ in range(2000):
        critic.step(every_transition(rng))
    q, v = exact_values()
    for twin in range(2):
        torch.testing.assert_close(critic.online.q_table[twin].double(), q, atol=1e-3, rtol=0)
        torch.testing.assert_close(critic.online.v_table[twin].double(), v, atol=1e-3, rtol=0)


def test_taking_a_time_limit_for_an_end_would_be_wrong():
    """What the exact-value test would not notice if truncation did not matter: it does, by far more than 1e-3."""
    critic, rng = table_critic(), np.random.default_rng(0)
    for _ in range(2000):
        batch = every_transition(rng)
        cut = batch.terminated.clone()
        cut[0] = True  # staying in the first state, cut by a limit and mistaken for an end
        critic.step(CriticBatch(**{**vars(batch), "terminated": cut}))
    assert (critic.online.q_table[0].double() - exact_values()[0]).abs().max() > 0.1


def test_high_expectiles_approach_the_best_replayed_utterance():
    critic, rng = table_critic(expectile=0.99), np.random.default_rng(0)
    for _ in range(4000):
        critic.step(every_transition(rng))
    best = torch.zeros(STATES, dtype=torch.float64)
    for _ in range(200):  # value iteration
        moves = [[outcome(s, u) for u in (STAY, GO)] for s in range(STATES)]
        best = torch.tensor([max(r + GAMMA * (not end) * best[after].item() for r, after, end in m) for m in moves])
    torch.testing.assert_close(critic.online.v_table[0], best.float(), atol=0.1, rtol=0)


def test_network_heads_learn_and_states_resume():
    torch.manual_seed(0)
    shape = {"gamma": 0.95, "tau": 0.1, "lr": 1e-3, "grad_clip": 1.0}
    critic, again = Critic(TwinHeads(16, 16), **shape), Critic(TwinHeads(16, 16), **shape)
    states, utterances = torch.randn(64, 16), torch.randn(64, 16)
    rewards = states[:, 0] + utterances[:, 1]
    batch = CriticBatch(states, utterances, states, rewards, torch.ones(64, dtype=torch.bool), states, utterances)
    first = [critic.step(batch)["critic/td_error"] for _ in range(300)]
    assert first[-1] < 0.2 * first[0]
    again.load_state_dict(critic.state_dict())
    assert again.step(batch) == critic.step(batch)
    assert critic.td_errors(batch).shape == (64,)
    assert critic.advantages(states, utterances).shape == (64,)


def test_what_an_advantage_foretells_by_hand():
    """gamma 0.9, tables at zero but V(s0) = 2 and Q(s0, GO) = 5: going on to s1 for -1 errs by -1 + 0 - 2 = -3."""
    critic, everything = table_critic(), every_transition(np.random.default_rng(0))
    with torch.no_grad():
        critic.online.v_table[:, 0], critic.online.q_table[:, 0, GO] = 2.0, 5.0
    advantages, errors = critic.advantages_and_td_errors(everything)
    assert (advantages[GO], errors[GO]) == pytest.approx((5 - 2, -3))
    assert errors[STAY] == pytest.approx(-1 + 0.9 * 2 - 2)
    assert errors[-1] == 5.0, "the last one ends the episode"


def test_expectiles_weigh_prioritised_rows():
    """As twice the rows would: a row of weight 2 and one of weight 0, against the first one twice."""
    v, q = torch.tensor([[0.0, 0.5], [1.0, 0.0]]), torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    twice = expectile_loss(v[:, [0, 0]], q[:, [0, 0]], 0.8)
    assert expectile_loss(v, q, 0.8, torch.tensor([2.0, 0.0])) == pytest.approx(float(twice))
    critic, batch = table_critic(expectile=0.8), every_transition(np.random.default_rng(0))
    before = critic.online.v_table.clone()
    critic.step(CriticBatch(**{**vars(batch), "weights": torch.zeros(len(batch.rewards))}))
    assert torch.equal(critic.online.v_table, before), "rows without weight teach V nothing"


def test_heads_stay_level_while_rewards_do():
    """Q and V of every state and utterance begin at the level, exactly: all advantages are 0 until a reward differs."""
    torch.manual_seed(0)
    critic = Critic(TwinHeads(8, 8), gamma=0.9, tau=0.1, lr=1e-3, grad_clip=1.0)
    x, ended = torch.randn(32, 8), torch.ones(32, dtype=torch.bool)
    rewards = torch.full((32,), 0.25)
    critic.initialise(rewards, ended, x, x)
    for _ in range(20):
        critic.step(CriticBatch(x, x, x, rewards, ended, x, x))
    assert not critic.advantages(x, torch.randn(32, 8)).any()


def test_the_first_repeated_utterance_is_no_catastrophe():
    """A flag that was down in all rows at first, and heads that have learnt something: its advantage is of order 1."""
    torch.manual_seed(0)
    critic = Critic(TwinHeads(8, 9), gamma=0.9, tau=0.1, lr=1e-3, grad_clip=1.0)
    x, ended = torch.randn(256, 8), torch.ones(256, dtype=torch.bool)
    said = torch.cat([torch.randn(256, 8), torch.zeros(256, 1)], 1)
    critic.initialise(x[:, 0], ended, x, said)
    for _ in range(50):
        critic.step(CriticBatch(x, said, x, x[:, 0] + said[:, 1], ended, x, said))
    repeated = said.clone()
    repeated[:, -1] = 1.0
    assert np.abs(critic.advantages(x, repeated) - critic.advantages(x, said)).max() < 1.0


def test_a_limit_of_zero_clips_nothing():
    frozen, free = (table_critic(grad_clip=limit) for limit in (0.0, 1e9))
    batch = every_transition(np.random.default_rng(0))
    assert frozen.step(batch) == free.step(batch)
    assert frozen.online.q_table.abs().max() > 0
    assert torch.equal(frozen.online.q_table, free.online.q_table)


def test_a_poisoned_reward_is_told_and_changes_nothing():
    critic = Critic(TwinHeads(8, 8), gamma=0.95, tau=0.1, lr=1e-3, grad_clip=1.0)
    before = {name: tensor.clone() for name, tensor in critic.online.state_dict().items()}
    x = torch.randn(4, 8)
    ended = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="critic's loss is nan at its step 0"):
        critic.step(CriticBatch(x, x, x, torch.tensor([0.0, float("nan"), 0, 0]), ended, x, x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic.online.state_dict().items())


def test_every_input_is_moved_to_the_heads(monkeypatch):
    """float64 stands for another device: what nobody moves would meet weights of another type."""
    monkeypatch.setattr(archer_critic, "moved", lambda one, _: one.double() if torch.is_floating_point(one) else one)
    monkeypatch.setattr(CriticBatch, "to", lambda batch, device: CriticBatch(**{
        name: one if one is None else archer_critic.moved(one, device) for name, one in vars(batch).items()
    }))  # fmt: skip
    critic = Critic(TwinHeads(5, 5).double(), gamma=0.9, tau=0.1, lr=1e-3, grad_clip=1.0)
    x, ended = torch.randn(8, 5), torch.zeros(8, dtype=torch.bool)
    batch = CriticBatch(x, x, x, torch.randn(8), ended, x, x, torch.ones(8))
    critic.step(batch)
    assert critic.td_errors(batch).dtype == np.float64
    assert critic.advantages(x, x).dtype == np.float64
    assert {one.dtype for one in critic.advantages_and_td_errors(batch)} == {np.dtype("float64")}


def test_values_start_where_the_average_turn_leads():
    """Half of the turns end with 0, the others go on for -1: v = -1/2 + 0.9 * v / 2, so v = -0.5 / 0.55."""
    rewards, ended = torch.tensor([-1.0, 0.0]), torch.tensor([False, True])
    assert typical_value(rewards, 0.9 * (~ended).float()) == pytest.approx(-0.5 / 0.55)
    critic = Critic(TwinHeads(8, 8), gamma=0.9, tau=0.1, lr=1e-3, grad_clip=1.0)
    x = torch.randn(2, 8)
    critic.initialise(rewards, ended)
    for heads in (critic.online, critic.target):
        assert (heads.values(x) + 0.909).abs().max() < 0.5


def test_features_of_any_spread_are_read_alike():
    """A feature a thousand times smaller than another changes values as much, once both have been measured."""
    critic = Critic(TwinHeads(2, 2), gamma=0.9, tau=0.1, lr=1e-3, grad_clip=1.0)
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-3]) + 5
    critic.initialise(torch.zeros(512), torch.zeros(512, dtype=torch.bool), x, x)
    standard = critic.target.states(x)
    torch.testing.assert_close(standard.mean(0), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.std(0, unbiased=False), torch.ones(2), atol=0.05, rtol=0)
    assert critic.target_weights()["utterances.mean"] == pytest.approx([5.0, 5.0], abs=0.1)


def test_heads_have_the_papers_shape():
    heads = TwinHeads(6, 6)
    assert [tuple(p.shape) for p in heads.q[0].parameters() if p.ndim == 2] == [(6, 12), (6, 6), (1, 6)]
    assert [tuple(p.shape) for p in heads.v[1].parameters() if p.ndim == 2] == [(6, 6), (6, 6), (1, 6)]
    assert heads.q_values(torch.zeros(3, 6), torch.zeros(3, 6)).shape == (2, 3)
