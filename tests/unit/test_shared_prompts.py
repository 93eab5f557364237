"""A prompt is computed once for its completions, and logits, states and gradients are the same as row by row."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from conftest import BASES, VOCAB_SIZE, scramble, small_base, small_llama

from cola_ray import CoLAForCausalLM, registry
from cola_ray.batch import collate
from cola_ray.experience import Trajectory
from cola_ray.learner import policies
from cola_ray.learner.micro_batch import Frozen, MicroBatch
from cola_ray.learner.policies import LatentPolicy, SoftQPolicy, TokenPolicy
from cola_ray.learner.shared_prompts import ATTENTION, SharedPrompts, share_prompts
from cola_ray.packing import pack

CPU = torch.device("cpu")


def trajectories(groups, seed=0):
    """Completions of groups, given as (length of the prompt, lengths of the responses)."""
    draw = np.random.default_rng(seed)
    made = []
    for prompt, responses in groups:
        ids = draw.integers(3, VOCAB_SIZE, prompt)
        for length in responses:
            made.append(Trajectory(
                ids, draw.integers(3, VOCAB_SIZE, length), draw.integers(0, 4, length),
                -draw.random(length).astype(np.float32), np.zeros(length, np.int64), 0.0, False, "",
            ))  # fmt: skip
    return made


def batch_of(groups, ranks=1, budget=10_000):
    made = trajectories(groups)
    return collate(pack(made), np.arange(1.0, len(made) + 1), ranks, 0, 0, budget, shares_prompts=True)


def test_the_layout_of_the_example():
    """Rows p p a a a, p p b b - and q c - - -."""
    found = SharedPrompts.of(["p", "p", "q"], [(2, 3), (2, 2), (1, 1)], 5)
    assert found.position_ids.tolist() == [[0, 1, 0, 2, 3, 4, 2, 3, 1]]
    assert found.tokens.tolist() == [0, 1, 10, 2, 3, 4, 7, 8, 11]
    assert found.places.tolist() == [[0, 1, 3, 4, 5], [0, 1, 6, 7, 0], [2, 8, 0, 0, 0]]
    packed = found.pack(torch.arange(15).view(3, 5))
    assert packed.tolist() == [found.tokens.tolist()]
    assert found.unpack(packed)[1, :4].tolist() == [0, 1, 7, 8], "a shared prompt is the first row's"
    assert SharedPrompts.of(["p", "q", "r"], [(2, 3), (2, 2), (1, 1)], 5) is None


GROUPS = {
    "groups of different lengths": [(4, [3, 1, 6]), (1, [2, 2]), (7, [5]), (2, [1, 4])],
    "one group": [(5, [4, 2, 3, 1])],
    "prompts of one token": [(1, [1, 1]), (1, [3, 2])],
    "a row without a sequence": [(3, [4, 2, 3, 1, 5])],
}


def policy_of(kind, cola, **settings):
    if kind == "token":
        return TokenPolicy(scramble(small_llama()).eval(), **settings).double()
    policy = (LatentPolicy if kind == "latent" else SoftQPolicy)(copy.deepcopy(cola), **settings)
    return scramble(policy).double()


KINDS = {
    "latent": {}, "latent with aliases": {"with_aliases": True}, "soft_q": {"beta": 0.3}, "token": {},
    "token with adapters": {"lora_rank": 4}, "token, steered": {"steering": "all"},
    "token without a reference": {"with_reference": False},
}  # fmt: skip


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_states_and_gradients_are_those_of_rows(kind, groups, cola):
    policy = policy_of(kind.split()[0].strip(","), cola, **KINDS[kind])
    batch = batch_of(groups, ranks=2 if len(groups[0][1]) == 5 else 1)[-1]
    found = []
    for shares in (False, True):
        one = MicroBatch.cut(batch, *batch.micro_batches[0], CPU, score_last=True, shares_prompts=shares)
        assert (one.shared_prompts is not None) is shares
        policy.zero_grad()
        logits, frozen = policies.forward(policy, one, Frozen())
        again, _ = policies.forward(policy, one, frozen)
        assert torch.equal(logits, again), "from what is known"
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
        (weights * logits.log_softmax(-1)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        found.append((one, logits.detach(), frozen, gradients))
    (one, logits, frozen, gradients), (_, packed_logits, packed, packed_gradients) = found
    near = {"rtol": 1e-5, "atol": 1e-6}  # norms and heads compute in float32
    torch.testing.assert_close(packed_logits, logits, **near)
    real = one.attention_mask.bool()
    for name in ("hidden_states", "reference_logits", "aliases"):
        wanted, value = getattr(frozen, name), getattr(packed, name)
        assert (wanted is None) == (value is None)
        if wanted is not None:
            both = (value[real], wanted[real]) if name == "hidden_states" else (value, wanted)
            torch.testing.assert_close(*both, **near)
    assert gradients.keys() == packed_gradients.keys()
    assert any("layers" in name or "q." in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 or "lora_A" in name
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_what_others_say_changes_nothing(cola):
    """A completion's logits depend neither on other completions of its prompt nor on other prompts."""
    policy = policy_of("latent", cola)
    (batch,) = batch_of(GROUPS["groups of different lengths"])
    one = MicroBatch.cut(batch, *batch.micro_batches[0], CPU, shares_prompts=True)
    logits, _ = policies.forward(policy, one, Frozen())
    for row, real in enumerate(one.attention_mask.bool()):
        own = torch.isin(one.shared_prompts.places, one.shared_prompts.places[row][real])
        ids = torch.where(own, one.input_ids, 3)
        assert not torch.equal(ids, one.input_ids)
        changed, _ = policies.forward(policy, dataclasses.replace(one, input_ids=ids), Frozen())
        of_row = one.scored_mask.nonzero()[:, 0] == row
        assert torch.equal(changed[of_row], logits[of_row])


@pytest.mark.parametrize("name", [name for name, (kind, _) in BASES.items() if kind in registry.BUILT_IN["base"]])
def test_every_family_computes_prompts_once_unless_it_has_windows(name, tmp_path):
    small_base(name).save_pretrained(tmp_path)
    sizes = {"num_actions": 4, "num_idm_layers": 1, "num_policy_layers": 2}
    policy = LatentPolicy(scramble(CoLAForCausalLM.attach(tmp_path, **sizes)).eval())
    assert policy.shares_prompts == (name not in ("mistral", "gemma3"))
    if policy.shares_prompts:
        (batch,) = batch_of(GROUPS["groups of different lengths"])
        cuts = [MicroBatch.cut(batch, *batch.micro_batches[0], CPU, shares_prompts=shares) for shares in (False, True)]
        logits, packed_logits = (policies.forward(policy, one, Frozen())[0] for one in cuts)
        torch.testing.assert_close(packed_logits, logits, rtol=1e-4, atol=1e-4)


def test_only_layers_that_see_everything_share(cola):
    windowed = small_llama()
    windowed.config.layer_types = ["full_attention", "sliding_attention"]
    assert not share_prompts(windowed)
    assert windowed.config._attn_implementation == "sdpa"
    mistral = small_llama()
    mistral.config.sliding_window = 8
    assert not share_prompts(mistral)
    eager = small_llama()
    eager.config._attn_implementation = "eager"
    assert not share_prompts(eager)
    full = small_llama()
    full.config.layer_types = ["full_attention"] * 2
    assert share_prompts(full)
    assert share_prompts(full), "once is enough, twice is no harm"
    ids = torch.randint(3, VOCAB_SIZE, (2, 7))
    assert full.config._attn_implementation == ATTENTION
    plain = small_llama()
    plain.load_state_dict(full.state_dict())
    assert torch.equal(full(ids).logits, plain(ids).logits), "rows that are not packed are read by sdpa"


def test_the_share_of_positions_that_are_computed():
    (batch,) = batch_of([(4, [3, 1, 6]), (1, [2])])
    tokens = 3 * 4 + 10 + 3
    assert batch.computed_share(False) == 4 * 10 / tokens
    assert batch.computed_share(True) == (4 + 10 + 3) / tokens
    first, second = batch_of([(4, [3])], ranks=2)
    assert (first.computed_share(True), second.computed_share(True)) == (1.0, 7.0), "a row of one token, padded"
