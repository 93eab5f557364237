"""Actions that last: spans of documents, what pre-training makes of them, and generation that holds actions.

Everything here is compared with loops over documents and tokens, which know nothing of masks that are cut or packed.
"""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_ACTIONS, VOCAB_SIZE, assert_near, ending
from test_pretrain import PlainEngine

from cola_ray.algorithms.spans import Spans, starts_of
from cola_ray.learner.corpus import pack
from cola_ray.learner.packed import PackedRows, steps_of
from cola_ray.learner.pretrain import corpus_step
from cola_ray.learner.stage_module import TRAINED, StageModule
from cola_ray.model.modeling_cola import RANKED, CoLAConfig, CoLAForCausalLM, gumbel_noise, sample_actions
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset


def lasting(model, every):
    """The same model, whose actions last."""
    model = copy.deepcopy(model)
    model.config.action_every = every
    return model


# --- which tokens share an action -------------------------------------------------------------------------------------


def test_steps_are_counted_from_responses():
    assert steps_of(5, [2]).tolist() == [-1, 0, 1, 2, 3]
    assert steps_of(4, []).tolist() == [0, 1, 2, 3], "a text: from its first token"
    assert steps_of(4, [0]).tolist() == [0, 1, 2, 3], "as is a response without a prompt"
    assert steps_of(9, [2, 6]).tolist() == [-1, 0, 1, 2, 3, 0, 1, 2, 3], "a dialogue: each response anew"


DOCUMENTS = [
    ([3, 4, 5, 6, 7, 8], [False, False, True, True, True, True]),
    ([9, 10, 11], [True, True, True]),
    ([3, 4, 5, 6, 7, 8, 9], [False, True, True, True, False, False, True]),
    ([12, 13], [False, True]),
    ([14, 15, 16, 17, 18, 19, 20, 21], [False] * 5 + [True] * 3),
]


def spans_by_hand(ids, own, every, response_only):
    """Lists of positions of a document that share an action."""
    spans, previous = [], None
    for position in range(len(ids) - 1):
        token = position + 1
        if response_only and not own[token]:
            previous = None
            continue
        begins = [one for one in range(len(own)) if own[one] and (one == 0 or not own[one - 1])]
        begins = [max(one, 1) for one in begins]
        first = max([one for one in begins if one <= token], default=begins[0])
        key = first, (token - first) // every
        if key == previous:
            spans[-1].append(position)
        else:
            spans.append([position])
        previous = key
    return spans


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("response_only", [True, False])
def test_spans_of_packed_documents_are_those_of_each_alone(every, response_only):
    rows = pack(DOCUMENTS, 14, 0, response_only)
    arrays = (torch.from_numpy(one) for one in (rows.loss_mask, rows.position_ids, rows.steps))
    mask, places, steps = (one[:, :-1] for one in arrays)
    spans = Spans.of(mask, places, steps, every)
    numbers = torch.full(mask.shape, -1)
    numbers[mask] = spans.owner
    found = []
    for row in range(len(rows)):
        cuts = [*np.flatnonzero(rows.position_ids[row] == 0), rows.width]
        for start, end in itertools.pairwise(cuts):
            inside = numbers[row, start:end].tolist()
            groups = {one: [i for i, other in enumerate(inside) if other == one] for one in inside if one >= 0}
            if groups:
                found.append((rows.input_ids[row, start:end].tolist(), [*groups.values()]))
    wanted = [(ids, spans_by_hand(ids, own, every, response_only)) for ids, own in DOCUMENTS]
    assert sorted(found) == sorted((ids, spans) for ids, spans in wanted if spans)
    assert torch.equal(spans.starts, starts_of(mask, places, steps, every))
    if every == 1:
        assert spans.starts is mask


def test_a_spans_mean_is_that_of_its_rows():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 20, generator=generator) < 0.8
    places = torch.arange(20).expand(3, -1)
    spans = Spans.of(mask, places, places, 3)
    rows = torch.randn(int(mask.sum()), 5, generator=generator, dtype=torch.float64, requires_grad=True)
    pooled = spans.pooled(rows)
    by_hand = torch.stack([rows[spans.owner == one].mean(0) for one in range(len(pooled))])
    torch.testing.assert_close(pooled, by_hand)
    weights = torch.randn(pooled.shape, generator=generator, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((one * weights).sum(), rows, retain_graph=True)[0]
                     for one in (pooled, by_hand))  # fmt: skip
    torch.testing.assert_close(found, wanted)
    assert [int((spans.owner == one).sum()) for one in range(len(pooled))] == [
        len(spans.spread(torch.arange(len(pooled))).eq(one).nonzero()) for one in range(len(pooled))
    ]


# --- pre-training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    """Documents of unlike lengths, with and without prompts."""
    draw = np.random.default_rng(0)
    documents = []
    for length, prompt in ((9, 3), (4, 0), (11, 6), (7, 2), (5, 1), (8, 0)):
        own = [place >= prompt for place in range(length)]
        documents.append((draw.integers(3, VOCAB_SIZE, length).tolist(), own))
    return pack(documents, 16, 0, response_only=False)


def stage_module(stage, model, **changes):
    changed = override(preset("tiny"), {f"pretrain.{name}": value for name, value in changes.items()})
    module = StageModule(copy.deepcopy(model), stage, changed)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[stage]))
    return module


def tensors(rows):
    return [torch.from_numpy(one) for one in (rows.input_ids, rows.position_ids, rows.loss_mask, rows.steps)]


def whole_spans(rows, every):
    """(row, its positions) of every span, by the steps alone: a document's are one after another."""
    found = []
    for row in range(len(rows)):
        for position in range(rows.width - 1):
            if not rows.loss_mask[row, position]:
                continue
            new = rows.position_ids[row, position] == 0 or rows.steps[row, position] % every == 0
            if new:
                found.append((row, [position]))
            else:
                found[-1][1].append(position)
    return found


def by_hand(stage, model, rows, seeds, every, settings):
    """The loss sum of a stage, span by span; and each span's action."""
    ids, places, _, _ = tensors(rows)
    e = model.encode(ids, position_ids=places).detach()
    u = model.inverse_dynamics_logits(e, position_ids=places)
    policy = model.policy_logits(e, position_ids=places)
    total, taken, relaxed = 0.0, [], []
    for row, positions in whole_spans(rows, every):
        first = positions[0]
        label = sum(u[row, t + 1] for t in positions) / len(positions)
        if stage == "policy":
            taken.append(int(label.argmax()))
            total = total - policy[row, first].log_softmax(-1)[taken[-1]]
            continue
        if stage == "actions":
            noise = gumbel_noise(seeds[row : row + 1], torch.tensor([first]), NUM_ACTIONS)[0].float()
            p = ((label + noise) / settings.gumbel_tau).softmax(-1)
            relaxed += [p] * len(positions)
            action = F.one_hot(p.argmax(), NUM_ACTIONS) + p - p.detach()
            total = total + len(positions) * settings.entropy_coef * (p * (p + 1e-8).log()).sum()
        elif stage == "fta_idm":
            action = label.argmax()
        else:
            one = torch.tensor([1.0]), None, seeds[row : row + 1], torch.tensor([first]), None
            action = sample_actions(policy[row, first][None], *one)[0][0]
        taken.append(int(action if action.dim() == 0 else action.argmax()))
        for t in positions:
            total = total + F.cross_entropy(model.world_model_logits(e[row, t], action), ids[row, t + 1])
    if relaxed and settings.balance_coef:
        mean = torch.stack(relaxed).mean(0)
        entropy = -(mean * (mean + 1e-8).log()).sum()
        total = total + settings.balance_coef * len(relaxed) * (np.log(NUM_ACTIONS) - entropy)
    return total, taken


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("stage", ["actions", "policy", "fta_idm", "fta_policy"])
def test_a_stage_and_its_gradient_by_hand(stage, every, cola, rows):
    """The modules against loops over spans: the loss, the actions taken, and every gradient."""
    settings = {"entropy_coef": 0.3, "balance_coef": 0.2, "gumbel_tau": 1.5} if stage == "actions" else {}
    module = stage_module(stage, lasting(cola, every), **settings)
    ids, places, mask, steps = tensors(rows)
    seeds = torch.arange(len(rows)) + 5
    loss, sums = module(ids, places, mask, seeds, False, steps=steps)
    wanted, taken = by_hand(stage, module.model, rows, seeds, every, module.settings)
    if stage.startswith("fta"):  # the base trains, whose states are detached above
        with torch.no_grad():
            assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    else:
        trained = [one for one in module.parameters() if one.requires_grad]
        found = torch.autograd.grad(loss, trained)
        for one, other in zip(found, torch.autograd.grad(wanted, trained), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-7)
        if stage == "policy":
            assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.equal(sums["counts"], torch.bincount(torch.tensor(taken), minlength=NUM_ACTIONS).float())


@pytest.mark.parametrize("every", [1, 2])
def test_reachable_tokens_and_covered_spans(every, cola, rows):
    module = stage_module("actions", lasting(cola, every))
    ids, places, mask, steps = tensors(rows)
    _, sums = module(ids, places, mask, torch.arange(len(rows)), False, reach=True, steps=steps)
    e = cola.encode(ids, position_ids=places)
    said = [
        [[int(cola.world_model_logits(e[row, t], torch.tensor(a)).argmax()) for t in positions]
         for a in range(NUM_ACTIONS)]
        for row, positions in whole_spans(rows, every)
    ]  # fmt: skip
    right = [ids[row, 1:][positions].tolist() for row, positions in whole_spans(rows, every)]
    kept, covered, reachable, spans = 32, 0, 0, 0
    for tokens, wanted in zip(said, right, strict=True):
        length = min(len(wanted), kept)
        if not length:
            break
        kept, spans = kept - length, spans + 1
        covered += any(one[:length] == wanted[:length] for one in tokens)
        reachable += sum(len({one[place] for one in tokens}) for place in range(length))
    assert (float(sums["covered"]), float(sums["spans"])) == (covered, spans)
    assert (float(sums["reachable"]), float(sums["states"])) == (reachable, 32)


@pytest.mark.parametrize("stage", ["actions", "policy"])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_a_step_divides_by_what_was_decided_or_said(stage, micro_batch_size, cola, rows, monkeypatch):
    """The policy's loss is a mean over decisions, the others' over tokens, however a step is cut."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    changed = override(preset("tiny"), {
        "pretrain.batch_size": len(rows), "pretrain.micro_batch_size": micro_batch_size,
        "model.num_actions": NUM_ACTIONS, "model.action_every": 2,
    })  # fmt: skip
    module = stage_module(stage, lasting(cola, 2), balance_coef=0.0)
    metrics, counts = corpus_step(changed, PlainEngine(module, rank=0, world_size=1), rows, stage, 0, 0.1)
    ids, places, mask, steps = tensors(rows)
    spans = whole_spans(rows, 2)
    assert float(counts.sum()) == len(spans)
    if stage == "policy":
        with torch.no_grad():
            loss, _ = module(ids, places, mask, torch.arange(len(rows)), False, steps=steps)
        assert metrics["policy/loss"] == pytest.approx(float(loss) / len(spans), rel=1e-5)
    else:
        tokens = int(mask[:, :-1].sum())
        e = cola.encode(ids, position_ids=places)[:, :-1][mask[:, :-1]]
        base = F.cross_entropy(cola.lm_head(e), ids[:, 1:][mask[:, :-1]], reduction="sum")
        assert metrics["actions/base_loss"] == pytest.approx(float(base) / tokens, rel=1e-5)


def test_rows_without_steps_are_texts(cola, rows):
    module = stage_module("policy", lasting(cola, 3))
    ids, places, mask, _ = tensors(rows)
    seeds = torch.arange(len(rows))
    assert torch.equal(
        module(ids, places, mask, seeds, False)[0], module(ids, places, mask, seeds, False, steps=places)[0]
    )
    without = PackedRows(rows.input_ids, rows.position_ids, rows.loss_mask)
    assert without.read(np.array([0])).steps is None
    assert np.array_equal(rows.read(np.array([1])).steps, rows.steps[[1]])


@pytest.mark.parametrize("every", [1, 2, 3, "until it ends"])
def test_greedy_accuracy_is_that_of_generating(every, cola):
    """Fed its own greedy answer the policy is right; fed another, wrong. Prompts of unlike lengths in a batch."""
    model = ending(cola) if every == "until it ends" else lasting(cola, every)
    draw = np.random.default_rng(1)
    module = stage_module("policy", model)
    prompts = [draw.integers(3, VOCAB_SIZE, length).tolist() for length in (2, 5, 4, 7)]
    answers = [model.generate_latent(torch.tensor([one]), max_new_tokens=7, temperature=0.0)[0][0].tolist()
               for one in prompts]  # fmt: skip
    answers[2] = [*answers[2][:6], (answers[2][6] + 1) % VOCAB_SIZE]
    width = max(map(len, prompts)) + 7
    ids, attention = torch.zeros(4, width, dtype=torch.int64), torch.zeros(4, width, dtype=torch.int64)
    mask = torch.zeros(4, width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + 7
        ids[row, :end], attention[row, :end] = torch.tensor([*prompt, *answer]), 1
        mask[row, len(prompt) - 1 : end - 1] = True
    assert module.correct(ids, attention, mask).tolist() == [True, True, False, True]


# --- generation -------------------------------------------------------------------------------------------------------


def held_by_hand(model, every, prompt, count, seed, temperature, top_k, forced):
    """Token by token without a cache; the action of each is kept in a variable."""
    ids, tokens, actions, log_probs = list(prompt), [], [], []
    for step in range(count):
        e = model.encode(torch.tensor([ids]))
        if step % every == 0:
            settings = torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([seed])
            one = torch.tensor([forced[step]]) if step < len(forced) else None
            action, log_prob = sample_actions(
                model.policy_logits(e)[:, -1], *settings, torch.tensor([len(ids) - 1]), one
            )
        else:
            log_prob = torch.zeros(1)
        tokens.append(int(model.world_model_logits(e[:, -1], action).argmax()))
        actions.append(int(action))
        log_probs.append(float(log_prob))
        ids.append(tokens[-1])
    return tokens, actions, log_probs


def check_generation(model, by_hand, count):
    """A batch of prompts of unlike lengths, with forced actions, against ``by_hand`` for each; returns all actions.

    Args:
        by_hand: (prompt, number of tokens, seed, temperature, top_k, forced actions) -> tokens, actions, log_probs.
    """
    draw, forced = np.random.default_rng(2), [4, 5, -1, RANKED - 1, -1]
    prompts = [draw.integers(3, VOCAB_SIZE, length).tolist() for length in (3, 7, 1, 5)]
    ids, mask = torch.zeros(4, 7, dtype=torch.int64), torch.zeros(4, 7, dtype=torch.int64)
    for row, one in enumerate(prompts):
        ids[row, -len(one) :], mask[row, -len(one) :] = torch.tensor(one), 1
    heat, top_k, seeds = torch.tensor([1.0, 0.0, 0.7, 1.3]), torch.tensor([0, 0, 3, 9]), torch.arange(4) + 30
    found = model.generate_latent(
        ids, mask, max_new_tokens=count, temperature=heat, top_k=top_k, seed=seeds,
        actions=torch.tensor(forced).expand(4, -1),
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        settings = int(seeds[row]), float(heat[row]), int(top_k[row])
        tokens, actions, log_probs = by_hand(prompt, count, *settings, forced)
        assert found[0][row].tolist() == tokens
        assert found[1][row].tolist() == actions
        torch.testing.assert_close(found[2][row], torch.tensor(log_probs), atol=1e-4, rtol=0)
    return found[1].tolist()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_generation_holds_actions(every, cola):
    model = lasting(cola, every)
    for actions in check_generation(model, functools.partial(held_by_hand, model, every), 8):
        assert all(actions[step] == actions[step - step % every] for step in range(8))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_generate_holds_actions(every, cola):
    model = lasting(cola, every)
    ids = torch.tensor([[5, 9, 4], [8, 3, 11]])
    options = {"max_new_tokens": 7, "return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": 95}
    greedy = model.generate(ids, do_sample=False, **options)
    tokens, actions, log_probs = model.generate_latent(ids, max_new_tokens=7, temperature=0.0)
    assert torch.equal(greedy.sequences[:, 3:], tokens)
    assert torch.equal(greedy.actions, actions)
    assert_near(greedy.action_log_probs, log_probs)
    torch.manual_seed(0)
    drawn = model.generate(ids, do_sample=True, **options)
    held = torch.arange(7) - torch.arange(7) % every
    assert torch.equal(drawn.actions, drawn.actions[:, held])
    assert torch.equal(drawn.action_log_probs == 0, (held != torch.arange(7)).expand(2, -1))
    assert len({*drawn.actions.flatten().tolist()}) > 1


def test_what_is_defined_token_by_token_is_refused(cola, tmp_path):
    model, ids = lasting(cola, 2), torch.tensor([[5, 9, 4]])
    e = model.encode(ids)
    for call in (
        lambda: model(ids), lambda: model(ids, actions=torch.tensor([[1, -1, 2]])),
        lambda: model(ids, labels=ids, actions=torch.tensor([[1, 1, 2]])),
        lambda: model.inverse_dynamics_actions(e),
        lambda: model.token_log_probs(e[0], model.policy_logits(e)[0], "marginal"),
        lambda: model.token_log_probs(e[0], model.policy_logits(e)[0], "greedy"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r": with action_every = 2 "):
            call()
    assert model(ids, actions=torch.tensor([[1, 1, 2]])).logits.shape == (1, 3, VOCAB_SIZE)
    assert model.token_log_probs(e[0], model.policy_logits(e)[0], "base").shape == (3, VOCAB_SIZE)
    model.config.world_model_form = "released"
    with pytest.raises(ValueError, match="action_every = 2: cannot be exported"):
        model.export_released(tmp_path)
    with pytest.raises(ValueError, match="action_every = 0"):
        CoLAConfig(action_every=0)


def test_a_checkpoint_says_how_long_actions_last(base_dir, tmp_path):
    sizes = {"num_actions": 4, "num_idm_layers": 1, "num_policy_layers": 1}
    model = CoLAForCausalLM.attach(base_dir, **sizes, action_every=3)
    model.save_pretrained(tmp_path / "held")
    assert CoLAForCausalLM.from_pretrained(tmp_path / "held").config.action_every == 3
    assert CoLAForCausalLM.attach(base_dir, **sizes).config.action_every == 1
