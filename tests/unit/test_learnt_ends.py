"""Actions that the policy ends: the distribution over the next one, pre-training, generation and what a learner sees.

Everything here is compared with loops over documents and tokens, in which the action before is a variable.
"""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_ACTIONS, VOCAB_SIZE, assert_near, ending
from test_held_learner import micro_batch_of, trajectories
from test_spans import check_generation, stage_module, tensors

from cola_ray.algorithms.spans import Spans
from cola_ray.learner.corpus import pack
from cola_ray.learner.micro_batch import Frozen
from cola_ray.learner.policies import LatentPolicy, forward
from cola_ray.model.modeling_cola import (
    CoLAConfig,
    CoLAForCausalLM,
    gumbel_noise,
    held_or_new,
    sample_actions,
)

# --- the distribution -------------------------------------------------------------------------------------------------


def mixture(logits, ends, held):
    """Of one row: the action goes on with probability 1 - b, or ends, and one is chosen from the policy."""
    new = [float(one) for one in logits.softmax(-1)]
    if held < 0:
        return new
    ends_here = 1 / (1 + float((-ends[held]).exp()))
    return [ends_here * share + (1 - ends_here) * (action == held) for action, share in enumerate(new)]


def test_the_next_action_goes_on_or_is_new():
    draw = torch.Generator().manual_seed(0)
    logits, ends = (3 * torch.randn(40, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    held = torch.arange(40) % 7 - 1
    found = held_or_new(logits, ends, held)
    wanted = [mixture(*row) for row in zip(logits, ends, held.tolist(), strict=True)]
    torch.testing.assert_close(found.exp(), torch.tensor(wanted, dtype=torch.float64))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(held_or_new(logits, ends, None), logits.log_softmax(-1))
    torch.testing.assert_close(held_or_new(found, ends, None), found), "log-probabilities are logits of themselves"


def test_its_gradient_is_that_of_the_mixture():
    draw = torch.Generator().manual_seed(1)
    logits, ends = (torch.randn(14, 6, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    held = torch.arange(14) % 7 - 1
    assert torch.autograd.gradcheck(lambda a, b: held_or_new(a, b, held), (logits, ends))
    far = (torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[90.0, 0.0], [-90.0, 0.0]], requires_grad=True))
    sure = held_or_new(*far, torch.tensor([0, 0]))
    torch.testing.assert_close(sure, torch.tensor([[0.5, 0.5], [1.0, 0.5 * np.exp(-90)]]).log().float())
    assert torch.autograd.grad(sure.sum(), far[1])[0].isfinite().all()


# --- pre-training -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False])
def rows(request):
    """Documents of unlike lengths, with and without prompts."""
    draw = np.random.default_rng(0)
    documents = []
    for length, prompt in ((9, 3), (4, 0), (11, 6), (7, 2), (5, 1), (8, 0)):
        own = [place >= prompt for place in range(length)]
        documents.append((draw.integers(3, VOCAB_SIZE, length).tolist(), own))
    return pack(documents, 16, 0, response_only=request.param)


def runs(rows):
    """(row, positions) of tokens that are learnt from and follow one another; a response begins anew."""
    found = []
    for row in range(len(rows)):
        goes_on = False
        for position in range(rows.width - 1):
            if not rows.loss_mask[row, position]:
                goes_on = False
                continue
            if not goes_on or rows.position_ids[row, position] == 0 or rows.steps[row, position] == 0:
                found.append((row, []))
            found[-1][1].append(position)
            goes_on = True
    return found


def test_the_policy_is_cloned_given_the_action_before(cola, rows):
    model = ending(cola)
    ids, places, mask, steps = tensors(rows)
    e = model.encode(ids, position_ids=places).detach()
    labels = model.inverse_dynamics_logits(e, position_ids=places).argmax(-1)
    logits, ends = model.policy.heads(e, position_ids=places)
    total = 0.0
    for row, positions in runs(rows):
        held = -1
        for t in positions:
            label = int(labels[row, t + 1])
            total = total - held_or_new(logits[row, t], ends[row, t], torch.tensor(held))[label]
            held = label
    module = stage_module("policy", model)
    loss, _ = module(ids, places, mask, torch.arange(len(rows)), False, steps=steps)
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-4)
    known, _ = module(ids, places, mask, torch.arange(len(rows)), False, labels=labels, steps=steps)
    torch.testing.assert_close(known, loss)
    loss.backward()
    assert module.model.policy.end_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("cost", [0.0, 0.7])
def test_changes_of_actions_cost(cost, cola, rows):
    model = ending(cola)
    ids, places, mask, steps = tensors(rows)
    seeds = torch.arange(len(rows)) + 3
    module = stage_module("actions", model, switch_cost=cost, balance_coef=0.0)
    e = model.encode(ids, position_ids=places).detach()
    u = model.inverse_dynamics_logits(e, position_ids=places)
    total, changed, relaxed = 0.0, 0, []
    for row, positions in runs(rows):
        relaxed.append([])
        for t in positions:
            noise = gumbel_noise(seeds[row : row + 1], torch.tensor([t]), NUM_ACTIONS)[0].float()
            p = ((u[row, t + 1] + noise) / module.settings.gumbel_tau).softmax(-1)
            logits = model.world_model_logits(e[row, t], p.argmax())
            total = total + F.cross_entropy(logits, ids[row, t + 1])
            total = total + module.settings.entropy_coef * (p * (p + 1e-8).log()).sum()
            relaxed[-1].append(p)
    mean = torch.stack([p for run in relaxed for p in run]).mean(0)
    pairs = [pair for run in relaxed for pair in itertools.pairwise(run)]
    for before, p in pairs:
        total = total - cost * sum((before[k] - mean[k]) * (p[k] - mean[k]) for k in range(NUM_ACTIONS))
        changed += int(p.argmax() != before.argmax())
    loss, sums = module(ids, places, mask, seeds, False, steps=steps)
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-4)
    assert (float(sums["changes"]), float(sums["pairs"])) == (changed, len(pairs))
    assert changed


def test_actions_before_end_with_documents():
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]).bool()
    places = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    spans = Spans.of(mask, places, places, 1)
    assert spans.held(torch.tensor([7, 8, 9, 1, 2, 3, 4])).tolist() == [-1, 7, -1, -1, 1, -1, 3]
    one_hot = F.one_hot(torch.tensor([7, 7, 9, 1, 2, 3, 3])).double()
    assert float(spans.persistence(one_hot, torch.zeros(10))) == 2, "7 and 3 go on, 1 does not"
    alone = F.one_hot(torch.full((7,), 4), 10).double()
    assert float(spans.persistence(alone, alone.mean(0))) == 0, "one action for all gains nothing"


# --- generation -------------------------------------------------------------------------------------------------------


def by_hand(model, prompt, count, seed, temperature, top_k, forced):
    """Token by token without a cache; the action before is kept in a variable."""
    ids, columns, held = list(prompt), ([], [], []), torch.tensor([-1])
    for step in range(count):
        e = model.encode(torch.tensor([ids]))
        logits, ends = (one[:, -1] for one in model.policy.heads(e))
        settings = torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([seed])
        one = torch.tensor([forced[step]]) if step < len(forced) else None
        mixed = held_or_new(logits, ends, held)
        held, log_prob = sample_actions(mixed, *settings, torch.tensor([len(ids) - 1]), one)
        token = int(model.world_model_logits(e[:, -1], held).argmax())
        for column, value in zip(columns, (token, int(held), float(log_prob)), strict=True):
            column.append(value)
        ids.append(token)
    return columns


def test_generation_lets_actions_go_on(cola):
    model = ending(cola)
    found = check_generation(model, functools.partial(by_hand, model), 12)
    assert 4 < sum(one == other for actions in found for one, other in itertools.pairwise(actions)) < 40


def test_generate_lets_actions_go_on(cola):
    model, ids = ending(cola), torch.tensor([[5, 9, 4], [8, 3, 11]])
    options = {"max_new_tokens": 9, "return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": 95}
    tokens, actions, log_probs = model.generate_latent(ids, max_new_tokens=9, temperature=0.0)
    for cached in (True, False):
        greedy = model.generate(ids, do_sample=False, use_cache=cached, **options)
        assert torch.equal(greedy.sequences[:, 3:], tokens)
        assert torch.equal(greedy.actions, actions)
        assert_near(greedy.action_log_probs, log_probs)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_a_learner_scores_given_the_action_before(cola):
    """Policy and reference, row by row; a turn's first action has none before it, wherever the turn begins."""
    model = ending(cola)
    one, _ = micro_batch_of(trajectories(1), [1.0, -2.0, 3.0, -4.0, 5.0])
    later = one.action_mask.nonzero()[2]
    one.turn_starts[tuple(later)] = True
    policy = LatentPolicy(copy.deepcopy(model))
    torch.nn.init.normal_(policy.reference.end_head.weight, std=0.5)
    with torch.no_grad():
        found, frozen = forward(policy, one, Frozen())
        e = model.encode(one.input_ids, one.attention_mask)
        ways = [of.heads(e, one.attention_mask) for of in (model.policy, policy.reference)]
        for (logits, ends), scores in zip(ways, (found, frozen.reference_logits), strict=True):
            wanted = []
            for row, place in one.scored_mask.nonzero().tolist():
                held = -1
                if place and one.action_mask[row, place - 1] and not one.turn_starts[row, place]:
                    held = int(one.actions[row, place - 1])
                wanted.append(held_or_new(logits[row, place], ends[row, place], torch.tensor(held)))
            torch.testing.assert_close(scores, torch.stack(wanted))
    assert (one.held < 0).sum() == int(one.turn_starts.sum())


# --- the model --------------------------------------------------------------------------------------------------------


def test_what_is_defined_token_by_token_is_refused(cola, tmp_path):
    model, ids = ending(cola), torch.tensor([[5, 9, 4]])
    e = model.encode(ids)
    for call in (
        lambda: model(ids), lambda: model(ids, actions=torch.tensor([[1, -1, 2]])),
        lambda: model(ids, labels=ids, actions=torch.tensor([[1, 1, 2]])),
        lambda: model.token_log_probs(e[0], model.policy_logits(e)[0], "marginal"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r": with learnt_ends "):
            call()
    assert model.inverse_dynamics_actions(e).shape == (1, 2), "each token has a label"
    module, mask = stage_module("fta_policy", model), torch.ones_like(ids, dtype=torch.bool)
    with pytest.raises(ValueError, match="fta_policy draws all actions of a text at once"):
        module(ids, torch.arange(3)[None], mask, torch.zeros(1, dtype=torch.int64), False)
    model.config.world_model_form = "released"
    with pytest.raises(ValueError, match="learnt_ends: cannot be exported"):
        model.export_released(tmp_path)
    with pytest.raises(ValueError, match="action_every = 2: with learnt_ends"):
        CoLAConfig(action_every=2, learnt_ends=True)


def test_a_checkpoint_keeps_what_ends_actions(base_dir, tmp_path):
    sizes = {"num_actions": 4, "num_idm_layers": 1, "num_policy_layers": 1}
    model = CoLAForCausalLM.attach(base_dir, **sizes, learnt_ends=True)
    model.save_pretrained(tmp_path / "model")
    again = CoLAForCausalLM.from_pretrained(tmp_path / "model")
    assert again.config.learnt_ends
    assert torch.equal(again.policy.end_head.weight, model.policy.end_head.weight)
    assert model.policy.end_head.weight.std() > 0
    assert CoLAForCausalLM.attach(base_dir, **sizes).policy.end_head is None
