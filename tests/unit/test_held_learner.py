"""What a learner makes of actions that last: one decision each, from a worker's completions to a gradient in float64.

A completion whose actions last n tokens is learnt from as if it had a token for each of its decisions and no others:
that is written down here twice, as sums over decisions, and as completions without what lies in between.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cola_ray.batch import Picked, as_groups, collate
from cola_ray.experience import Trajectory
from cola_ray.learner.micro_batch import Advantages, Encoded, Frozen, MicroBatch
from cola_ray.learner.objective import before_updates, policy_objective, score
from cola_ray.learner.rl import PolicyUpdate
from cola_ray.learner.soft_q import SoftQLearner, one_step_targets
from cola_ray.learner.value import ValueLearner
from cola_ray.rollout.worker import RolloutWorker
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

K, WIDTH = 5, 8
SIZES = ((3, 7), (2, 4), (5, 1), (1, 6), (2, 5))  # prompt and response of each completion
LONGEST = 8


def trajectories(every):
    """As a worker makes them: actions are held, and the log-probability of a held one is 0."""
    worker, draw = RolloutWorker.__new__(RolloutWorker), np.random.default_rng(0)
    worker.config = SimpleNamespace(model=SimpleNamespace(action_every=every))
    made = []
    for number, (prompt, length) in enumerate(SIZES):
        places = np.arange(length)
        first = places - places % every
        actions, log_probs = draw.integers(0, K, length)[first], -0.2 - draw.random(length)
        made.append(worker._with_decisions(Trajectory(
            draw.integers(3, 90, prompt), draw.integers(3, 90, length), actions,
            np.where(places == first, log_probs, 0.0).astype(np.float32), np.full(length, 4)[first],
            float(number), number == 1, "",
        )))  # fmt: skip
    return made


def micro_batch_of(made, advantages, score_last=False):
    (group,) = as_groups([(0, made, None)])
    (batch,) = collate(Picked.of_groups([group]), advantages, 1, 0, 0, 10_000)
    batch = batch.fetched()
    return MicroBatch.cut(batch, *batch.micro_batches[0], torch.device("cpu"), score_last), batch


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_batch_counts_decisions_and_rewards_the_last(every):
    made = trajectories(every)
    one, batch = micro_batch_of(made, [1.0, -2.0, 3.0, -4.0, 5.0])
    decisions = [-(-length // every) for _, length in SIZES]
    assert batch.num_actions_global == sum(decisions)
    assert batch.num_sequences_global == len(SIZES)
    assert batch.num_tokens_global == sum(map(sum, SIZES)), "tokens are tokens"
    (group,) = as_groups([(0, made, None)])
    assert int(group.versions.counts.sum()) == int(group.actions.counts.sum()) == sum(decisions)
    assert [sample.length for sample in group.samples] == [length for _, length in SIZES]
    for row in range(len(SIZES)):
        prompt, length = len(batch.sequences.prompts[row]), len(batch.sequences.responses[row])
        acting = [prompt - 1 + step for step in range(0, length, every)]
        assert one.action_mask[row].nonzero()[:, 0].tolist() == acting
        assert one.rewards[row].nonzero()[:, 0].tolist() == acting[-1:]
        assert one.rewards[row, acting[-1]] == batch.advantages[row]
        assert one.discounts[row, acting].tolist() == [1.0] * (len(acting) - 1) + [0.0]
        assert one.turn_starts[row].nonzero()[:, 0].tolist() == acting[:1]
    if every == 1:
        assert made[0].action_mask is None, "nothing is different where actions do not last"


LOSSES = (
    {"rl.kl_in": "loss", "rl.kl_estimator": "exact"},
    {"rl.kl_in": "reward", "rl.kl_estimator": "exact"},
    {"rl.kl_in": "reward", "rl.kl_estimator": "k1", "rl.entropy_coef": 0.07},
    {"rl.kl_in": "loss", "rl.kl_estimator": "k3", "rl.importance_cap": 1.5},
)
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@pytest.mark.parametrize(("changes", "mode"), itertools.product(LOSSES, MODES))
@pytest.mark.parametrize("every", [2, 3])
def test_the_gradient_is_that_of_sums_over_decisions(every, changes, mode):
    """Every way to add up, with a second update's ratios; logits between decisions have no part."""
    config = override(preset("tiny"), {
        **changes, "rl.loss_agg_mode": mode, "model.action_every": every, "rollout.max_new_tokens": LONGEST,
    })  # fmt: skip
    rl, beta = config.rl, 0.3
    made, advantages = trajectories(every), [1.0, -2.0, 3.0, -4.0, 0.5]
    one, batch = micro_batch_of(made, advantages)
    draw = torch.Generator().manual_seed(1)
    shape = (*one.actions.shape, K)
    logits, earlier, reference = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    at, update = one.scored_mask, SimpleNamespace(config=config, follows_rewards=False)
    old = before_updates(score(earlier[at], reference[at], one, 1.0, 0), one, None, rl)
    loss, _ = policy_objective(
        logits[at], one, Frozen(None, reference[at]), Advantages(one.advantages), old, rl=rl, kl_coef=beta,
        temperature=1.0, top_k=0, loss_weights=PolicyUpdate._weights(update, one, batch),
    )  # fmt: skip
    (found,) = torch.autograd.grad(loss / batch.num_actions_global, logits)
    (wanted,) = torch.autograd.grad(
        by_hand(logits, earlier, reference, made, advantages, batch, rl, beta, mode, every), logits
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert not found[~one.action_mask].any()


def by_hand(logits, earlier, reference, made, advantages, batch, rl, beta, mode, every):
    pi, before, ref = (one.log_softmax(-1) for one in (logits, earlier, reference))
    losses = []
    for row in range(len(made)):
        prompt, said = batch.sequences.prompts[row].tolist(), batch.sequences.responses[row].tolist()
        number = next(i for i, one in enumerate(made) if one.token_ids.tolist() == said)
        places = [len(prompt) - 1 + step for step in range(0, len(said), every)]
        taken = [int(made[number].actions[step]) for step in range(0, len(said), every)]
        rollout = [float(made[number].rollout_log_probs[step]) for step in range(0, len(said), every)]
        of_row = []

        def divergence(policy, t):
            return (policy[t].exp() * (policy[t] - ref[row, t])).sum()  # noqa: B023

        for i, (t, a) in enumerate(zip(places, taken, strict=True)):
            advantage = torch.tensor(advantages[number], dtype=torch.float64)
            if rl.kl_in == "reward":  # charged for what follows; the exact one, of the states that follow
                for j in range(i, len(places)):
                    if rl.kl_estimator == "k1":
                        advantage = advantage - beta * (
                            before[row, places[j], taken[j]] - ref[row, places[j], taken[j]]
                        )
                    elif j + 1 < len(places):
                        advantage = advantage - beta * divergence(before[row], places[j + 1])
            if rl.importance_cap:
                advantage = advantage * (before[row, t, a] - rollout[i]).exp().clamp_max(rl.importance_cap)
            ratio = (pi[row, t, a] - before[row, t, a]).exp()
            clipped = ratio.clamp(1 - rl.clip_low, 1 + rl.clip_high)
            gained = torch.minimum(ratio * advantage, clipped * advantage)
            if rl.clip_c and advantage < 0:
                gained = torch.maximum(gained, rl.clip_c * advantage)
            one = -gained
            if rl.kl_estimator == "exact":
                one = one + beta * divergence(pi[row], t)
            elif rl.kl_in == "loss":
                d = pi[row, t, a] - ref[row, t, a]
                one = one + beta * ((-d).exp() - 1 + d)
            of_row.append(one + rl.entropy_coef * (pi[row, t].exp() * pi[row, t]).sum())
        losses.append(torch.stack(of_row))
    if mode == "token-mean":
        return torch.cat(losses).mean()
    if mode == "seq-mean-token-mean":
        return torch.stack([of.mean() for of in losses]).mean()
    sums = torch.stack([of.sum() for of in losses])
    return sums.mean() if mode == "seq-mean-token-sum" else (sums / -(-LONGEST // every)).mean()


def without_what_is_held(made, every):
    """A token for each decision."""
    return [
        Trajectory(
            one.prompt_ids, one.token_ids[::every], one.actions[::every], one.rollout_log_probs[::every],
            one.versions[::every], one.reward, one.truncated, "",
        )
        for one in made
    ]  # fmt: skip


@pytest.fixture
def both(monkeypatch):
    """For an n: micro-batches with held actions and without, their states, and where decisions stand in each."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)

    def made(every):
        held, outcomes = trajectories(every), [1.0, -2.0, 3.0, -4.0, 0.5]
        # All of one length of prompt and response order their rows alike: longest first, by the held ones' lengths.
        order = sorted(range(len(held)), key=lambda i: -(len(held[i].prompt_ids) + len(held[i].token_ids)))
        held, outcomes = [held[i] for i in order], [outcomes[i] for i in order]
        alone = without_what_is_held(held, every)
        pairs = []
        for index in range(len(held)):
            one, _ = micro_batch_of([held[index]], [outcomes[index]], score_last=True)
            other, _ = micro_batch_of([alone[index]], [outcomes[index]], score_last=True)
            states = torch.randn(*one.actions.shape, WIDTH, generator=torch.Generator().manual_seed(index))
            compact = torch.zeros(*other.actions.shape, WIDTH)
            compact[other.action_mask] = states[one.action_mask]
            pairs.append((Encoded(one, states, one.rewards), Encoded(other, compact, other.rewards)))
        return [one for one, _ in pairs], [other for _, other in pairs]

    return made


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_ppos_values_and_advantages_are_of_decisions(every, decay, both):
    held, alone = both(every)
    num_actions = sum(int(one.batch.action_mask.sum()) for one in held)
    learner = ValueLearner(WIDTH, torch.device("cpu"), lr=0.1, grad_clip=1.0, decay=decay, whiten=True, steps=2, seed=0)
    results = [learner.advantages(batches, num_actions) for batches in (held, alone)]
    (found, returns, sums), (wanted, wanted_returns, wanted_sums) = results
    for one, other, a, b in zip(held, alone, found, wanted, strict=True):
        torch.testing.assert_close(a.values[one.batch.action_mask], b.values[other.batch.action_mask])
        assert not a.values[~one.batch.action_mask].any()
    for one, other, a, b in zip(held, alone, returns, wanted_returns, strict=True):
        torch.testing.assert_close(a[one.batch.action_mask], b[other.batch.action_mask])
    assert sums.keys() == wanted_sums.keys()
    for name, value in sums.items():
        torch.testing.assert_close(value, wanted_sums[name])


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_etpos_targets_are_of_decisions(every, beta, both):
    """One-step targets of ETPO's Q, and of a control variate's, whose beta is 0."""
    held, alone = both(every)
    learner = SoftQLearner(WIDTH, K, torch.device("cpu"), lr=0.1, tau=0.5, grad_clip=1.0, steps=1, seed=0)
    torch.nn.init.normal_(learner.target.layers[-1].weight, generator=torch.Generator().manual_seed(3))
    for one, other in zip(held, alone, strict=True):
        draw = torch.Generator().manual_seed(4)
        every_place = [torch.randn(*one.batch.actions.shape, K, generator=draw).log_softmax(-1) for _ in range(2)]
        targets = []
        for encoded in (one, other):
            rows = []
            for of in every_place:
                placed = torch.zeros(*encoded.batch.actions.shape, K)
                placed[encoded.batch.action_mask] = of[one.batch.action_mask]
                rows.append(placed[encoded.batch.scored_mask])
            targets.append(one_step_targets(learner.target, encoded, rows[0], beta, rows[1])[encoded.batch.action_mask])
        torch.testing.assert_close(*targets)
