"""Mini-batches: how a step's sequences are cut and dealt, and the optimizer steps against a loop written by hand.

The loop is algorithm 1 of PPO (Schulman et al. 2017) in plain torch: in each pass a permutation, of each part of it the
mean loss, and a step of Adam. It knows nothing of ranks, rows, micro-batches or padding.
"""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NUM_ACTIONS, VOCAB_SIZE, small_llama

from cola_ray import CoLAForCausalLM
from cola_ray.algorithms.mini_batches import deal, permuted
from cola_ray.batch import collate
from cola_ray.experience import Trajectory
from cola_ray.learner.micro_batch import Advantages, Frozen, MicroBatch, Ready, Scored
from cola_ray.learner.mini_batches import Rows
from cola_ray.learner.policies import LatentPolicy, TokenPolicy
from cola_ray.learner.rl import PolicyUpdate, _heads
from cola_ray.loop.batches import BatchMaker
from cola_ray.packing import pack
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

K, VOCABULARY, STEP, SEED, LR = 5, 11, 7, 3, 0.1
LENGTHS = (3, 9, 1, 4, 6, 2, 7, 5, 5, 8, 2, 4)
CLIP, CAP, KL = 0.2, 1.5, 0.3


# --- how sequences are cut and dealt ----------------------------------------------------------------------------------


def test_each_pass_has_a_permutation_of_seed_step_and_pass():
    passes = permuted(10, 3, 4, SEED, STEP)
    assert len(passes) == 4
    for number, parts in enumerate(passes):
        order = np.random.default_rng((SEED, STEP, number)).permutation(10).tolist()
        assert [part.tolist() for part in parts] == [order[:4], order[4:7], order[7:]], "uneven, in this order"
        assert sorted(order) == [*range(10)], "each sequence once"
    orders = {tuple(np.concatenate(parts)) for parts in passes}
    orders |= {tuple(np.concatenate(permuted(10, 3, 1, *key)[0])) for key in ((SEED + 1, STEP), (SEED, STEP + 1))}
    assert len(orders) == 6, "another one for each pass, seed and step"


def test_one_mini_batch_is_none():
    assert permuted(10, 1, 4, SEED, STEP) == ()
    assert deal([4, 2, 0, 3, 1], (), 2) == [[4, 0, 1], [2, 3]], "in turn"


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "parts", "passes"), [(96, 4, 1), (96, 4, 3), (50, 7, 2), (5, 5, 2), (3, 5, 2)])
def test_ranks_get_about_as_many_sequences_of_every_mini_batch(count, parts, passes, ranks):
    order = np.random.default_rng(1).permutation(count).tolist()
    cut = permuted(count, parts, passes, SEED, STEP)
    owned = deal(order, cut, ranks)
    assert sorted(place for mine in owned for place in mine) == [*range(count)]
    for mine in owned:
        assert [place for place in order if place in mine] == mine, "in the order given"
    sets = [[*range(count)], *(places.tolist() for parts in cut for places in parts)]
    for chosen in sets:
        fullest = max(len({*mine} & {*chosen}) for mine in owned)
        assert fullest <= -(-len(chosen) // ranks) + (passes > 1 or chosen is sets[0])


# --- a run of rollouts ------------------------------------------------------------------------------------------------


class Policy:
    """Logits by the token in front, in the place of a ZeRO-3 engine on every rank: they step when all ranks have."""

    device = torch.device("cpu")

    def __init__(self, logits, reference, ranks):
        self.logits, self.reference = logits.clone().requires_grad_(), reference
        self.engine, self.optimizer = self, torch.optim.Adam([self.logits], lr=LR)
        self.lock, self.all_here = threading.Lock(), threading.Barrier(ranks, timeout=60)
        self.logits.grad, self.norms, self.rates = torch.zeros_like(logits), [], []

    def __call__(self, input_ids, attention_mask, scored_mask, hidden_states, reference_logits, aliases, **_):
        logits = self.logits[input_ids[scored_mask]]
        known = self.reference[input_ids[scored_mask]]
        if reference_logits is not None:
            torch.testing.assert_close(reference_logits, known, rtol=0, atol=0)
        return logits, None, known, None

    def backward(self, loss, last):
        (gradient,) = torch.autograd.grad(loss, self.logits)
        with self.lock:
            self.logits.grad += gradient

    def step(self, lr):
        if self.all_here.wait() == 0:
            self.norms.append(float(self.logits.grad.norm()))
            self.rates.append(lr)
            self.optimizer.step()
            self.logits.grad.zero_()
        self.all_here.wait()
        return self.norms[-1]


class Rollouts:
    """Completions of LENGTHS actions, drawn from another policy than the one that learns."""

    def __init__(self):
        draw = np.random.default_rng(0)
        self.logits, self.reference = (torch.from_numpy(draw.normal(size=(VOCABULARY, K))) for _ in range(2))
        self.advantages = draw.normal(size=len(LENGTHS)).astype(np.float32)
        self.made = []
        for length in LENGTHS:
            ids, actions = draw.integers(0, VOCABULARY, 2 + length), draw.integers(0, K, length)
            log_probs = -draw.random(length).astype(np.float32) - 1
            self.made.append(Trajectory(ids[:2], ids[2:], actions, log_probs, actions * 0, 0.0, False, ""))

    def of(self, logits, place):
        """Log-probabilities of all actions in a sequence's states, (L, K), and of those taken, (L,)."""
        one = self.made[place]
        states = torch.from_numpy(np.concatenate([one.prompt_ids[1:], one.token_ids[:-1]]))
        every = logits[states].log_softmax(-1)
        return every, every[torch.arange(len(states)), torch.from_numpy(one.actions)]


def config(ranks=1, **changes):
    given = {name.replace("__", "."): value for name, value in changes.items()}
    usual = {"rl.num_minibatches": 3, "rl.updates_per_batch": 2, "rl.importance_cap": CAP, "rollout.max_new_tokens": 9,
             "rl.kl_in": "loss", "cluster.learner_ranks": ranks, "seed": SEED}  # fmt: skip
    return override(preset("tiny"), usual | given)


def batches(rollouts, config):
    return BatchMaker(config, SimpleNamespace(facts={"pad_token_id": 0}), None).collate(
        pack(rollouts.made), rollouts.advantages.tolist(), STEP
    )


def learnt(rollouts, config):
    """The policy after a step of all ranks, each in a thread, and what the first rank says of it, for all."""
    ranks = config.cluster.learner_ranks
    policy, found = Policy(rollouts.logits, rollouts.reference, ranks), [None] * ranks

    def rank(number, batch):
        found[number] = PolicyUpdate(config, policy, None, None).improve(batch, LR, KL)

    threads = [threading.Thread(target=rank, args=pair) for pair in enumerate(batches(rollouts, config))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sums = {name: sum(float(of[name]) for of, _ in found) for name in found[0][0]}
    return policy, sums, [norm for _, norm in found]


def by_hand(rollouts, rl):
    """Weights after the step; loss of each step; what is clipped of each pass; norms of the gradients."""
    logits = rollouts.logits.clone().requires_grad_()
    optimizer, losses, clipped, norms = torch.optim.Adam([logits], lr=LR), [], [], []
    old = [rollouts.of(rollouts.logits, place)[1] for place in range(len(LENGTHS))]
    for number in range(rl.updates_per_batch):
        order = np.random.default_rng((SEED, STEP, number)).permutation(len(LENGTHS))
        clipped.append(0)
        for part in np.array_split(order, rl.num_minibatches):
            of_sequences = []
            for place in part:
                every, taken = rollouts.of(logits, place)
                reference, ref_taken = rollouts.of(rollouts.reference, place)
                weight = (old[place] - torch.from_numpy(rollouts.made[place].rollout_log_probs)).exp().clamp(max=CAP)
                gain = torch.full_like(weight, rollouts.advantages[place])
                penalty = (every.exp() * (every - reference)).sum(-1)
                if rl.kl_in == "reward":  # k1, before the first update, of the actions from each one on
                    charged = old[place] - ref_taken
                    gain, penalty = gain - KL * charged.flip(0).cumsum(0).flip(0), torch.zeros_like(penalty)
                ratio, gain = (taken - old[place]).exp(), weight * gain
                plain, limited = ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain
                clipped[-1] += int((limited < plain).sum())
                of_sequences.append(-torch.minimum(plain, limited) + KL * penalty)
            loss = torch.cat(of_sequences).mean()
            if rl.loss_agg_mode == "seq-mean-token-mean":
                loss = torch.stack([of.mean() for of in of_sequences]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((loss.item(), sum(LENGTHS[place] for place in part)))
            norms.append(float(logits.grad.norm()))
    return logits, losses, clipped, norms


# --- optimizer steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 5, 13])
@pytest.mark.parametrize("micro_batch_tokens", [12, 1000])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rl__loss_agg_mode": "seq-mean-token-mean"},
        {"rl__kl_in": "reward", "rl__kl_estimator": "k1"},
        {"rl__num_minibatches": 5, "rl__updates_per_batch": 1},
    ],
)
def test_a_step_is_the_loop_written_by_hand_on_any_number_of_ranks(ranks, micro_batch_tokens, changes):
    rollouts, of_run = Rollouts(), config(ranks, rl__micro_batch_tokens=micro_batch_tokens, **changes)
    policy, sums, norms = learnt(rollouts, of_run)
    wanted, losses, clipped, wanted_norms = by_hand(rollouts, of_run.rl)
    torch.testing.assert_close(policy.logits, wanted, rtol=1e-9, atol=1e-9)
    moved = (wanted - rollouts.logits).abs().max()
    assert moved > LR, "a step of Adam alone moves no weight further"
    updates, passes = of_run.rl.num_minibatches * of_run.rl.updates_per_batch, of_run.rl.updates_per_batch
    assert policy.rates == [LR] * updates, "a rate is an RL step's, whatever optimizer steps it has"
    assert norms == [pytest.approx(np.mean(wanted_norms), rel=1e-6)] * ranks, "the mean over optimizer steps"
    assert sum(clipped) > 0
    assert sums["policy/clip_fraction"] == pytest.approx(sum(clipped) / passes), "the mean over passes"
    first = losses[: of_run.rl.num_minibatches]
    assert sums["policy/loss"] == pytest.approx(sum(loss * actions for loss, actions in first)), "of the first pass"


def test_in_one_part_a_step_is_as_it_was_bit_for_bit():
    """The same weights, sums and norm as from a batch that was collated without any word of mini-batches."""
    rollouts, of_run = Rollouts(), config(rl__num_minibatches=1, rl__micro_batch_tokens=30)
    policy, sums, norms = learnt(rollouts, of_run)
    (batch,) = collate(pack(rollouts.made), rollouts.advantages.tolist(), 1, 0, STEP, 30)
    plain = Policy(rollouts.logits, rollouts.reference, 1)
    plain_sums, norm = PolicyUpdate(of_run, plain, None, None).improve(batch, LR, KL)
    assert torch.equal(policy.logits, plain.logits)
    assert sums == {name: float(value) for name, value in plain_sums.items()}
    assert norms == [norm]
    torch.testing.assert_close(policy.logits, by_hand(rollouts, of_run.rl)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2, 3, 30])
def test_ranks_have_the_same_optimizer_steps_and_micro_batches_and_each_sequence_once(ranks):
    rollouts, of_run = Rollouts(), config(ranks, rl__micro_batch_tokens=24)
    of_ranks = batches(rollouts, of_run)
    fields = ("num_rows", "micro_batches", "num_actions_global", "num_sequences_global", "num_tokens_global")
    for number, order in enumerate(permuted(len(LENGTHS), 3, 2, SEED, STEP)):
        for index, places in enumerate(order):
            parts = [batch.part(batch.mini_batches[number][index]) for batch in of_ranks]
            assert len({tuple(getattr(part, field) for field in fields) for part in parts}) == 1
            found = [part.sequences.responses[row].tobytes() for part in parts for row in range(len(part.sequences))]
            wanted = [rollouts.made[place].token_ids.astype(np.int32).tobytes() for place in places]
            assert sorted(found) == sorted(wanted)
            gains = np.concatenate([part.advantages for part in parts])
            assert sorted(gains) == sorted(rollouts.advantages[places])
            actions = sum(LENGTHS[place] for place in places)
            assert parts[0].num_actions_global == actions
            assert parts[0].num_tokens_global == actions + 2 * len(places)
            assert parts[0].num_sequences_global == len(places)
            for part in parts:
                assert part.num_rows >= len(part.sequences)
                assert [start for start, _, _ in part.micro_batches[1:]] == [
                    end for _, end, _ in part.micro_batches[:-1]
                ]
                lengths = part.sequences.num_tokens
                for start, stop, width in part.micro_batches:
                    assert (lengths[start:stop] <= width).all()
                    assert stop - start == 1 or (stop - start) * width <= 24


def test_mini_batches_without_actions_are_left_out():
    """A step may have fewer sequences than parts, where prompts were left out, and sequences without an action."""
    draw = np.random.default_rng(0)
    ids = draw.integers(1, VOCABULARY, 4)
    quiet = Trajectory(ids[:2], ids[2:], ids[2:] % K, np.zeros(2, np.float32), ids[2:] * 0, 0.0, False, "",
                       action_mask=np.zeros(2, bool))  # fmt: skip
    acts = Trajectory(ids[:2], ids[2:], ids[2:] % K, np.zeros(2, np.float32), ids[2:] * 0, 0.0, False, "",
                      action_mask=np.ones(2, bool))  # fmt: skip
    of_ranks = collate(pack([acts, quiet, acts]), [1.0, 2.0, 3.0], 2, 0, 0, 64, permuted(3, 5, 2, SEED, STEP))
    for batch in of_ranks:
        assert [len(parts) for parts in batch.mini_batches] == [2, 2], "of five, two have an action"
        assert all(part.num_actions_global == 2 for parts in batch.mini_batches for part in parts)


# --- what is known of rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_last", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 13])
def test_what_was_found_of_a_row_goes_along_with_it(ranks, score_last):
    """All that is known is a function of the tokens up to a position: in other micro-batches it is the same."""
    draw = torch.Generator().manual_seed(0)
    wide, scores = (torch.randn(VOCABULARY, size, generator=draw) for size in (4, K))
    wide[0], scores[0] = 0.0, 0.0  # of padding

    def found(one):
        ids, scored = one.input_ids, one.scored_mask
        summed = wide[ids].cumsum(1) * one.attention_mask[..., None]
        columns = [summed[..., index] for index in range(4)]
        return Ready(
            one, Frozen(summed, scores[ids[scored]], scores[ids[scored]] > 0.5),
            Advantages(columns[0], True, torch.tensor(2.0), 3 * scores[ids[scored]]), None, Scored(*columns[1:]),
        )  # fmt: skip

    rollouts = Rollouts()
    for one in rollouts.made:
        one.prompt_ids[:] += one.prompt_ids == 0
        one.token_ids[:] += one.token_ids == 0
    seen = 0
    for batch in batches(rollouts, config(ranks, rl__micro_batch_tokens=24)):
        cuts = (MicroBatch.cut(batch, *cut, torch.device("cpu"), score_last) for cut in batch.micro_batches)
        rows = Rows([found(one) for one in cuts])
        for mini_batch in (one for parts in batch.mini_batches for one in parts):
            part = batch.part(mini_batch)
            for start, stop, width in part.micro_batches:
                one = MicroBatch.cut(part, start, stop, width, torch.device("cpu"), score_last)
                collated = Ready(one, Frozen(), Advantages(one.advantages), torch.ones(stop - start, 1))
                moved, wanted = rows.known(mini_batch.rows[start:stop], collated), found(one)
                assert moved.batch is one
                assert moved.loss_weights is collated.loss_weights
                assert moved.follows.hold_kl
                assert moved.follows.deviation == 2.0
                for name in ("frozen", "follows", "old"):
                    for field, value in vars(getattr(wanted, name)).items():
                        if isinstance(value, torch.Tensor):
                            assert torch.equal(getattr(getattr(moved, name), field), value), (name, field)
                seen += len(mini_batch.rows[start:stop])
    assert seen == 2 * len(LENGTHS)


class Still:
    """A policy that is never stepped, so that the order of mini-batches cannot matter."""

    device = torch.device("cpu")

    def __init__(self, policy):
        self.engine, self.steps, self.passed = policy, 0, 0
        policy.register_forward_pre_hook(self.forwards)

    def forwards(self, module, given):
        self.passed += len(given) > 3 and given[3] is not None  # with e, which is known by then

    def backward(self, loss, last):
        loss.backward()

    def step(self, lr):
        self.steps += 1
        return 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"rl__kl_coef": KL, "rl__entropy_coef": 0.1},
        {"rl__algorithm": "ppo", "rl__kl_coef": KL, "rl__cliprange_value": 0.2},
        {"rl__algorithm": "etpo", "rl__kl_coef": 0.05},
        {"rl__marginal_aliases": True, "rl__kl_coef": KL},
        {"rl__cache_hidden_states": True},
        {"rl__action_space": "token", "rl__kl_coef": KL},
        {"rl__action_space": "token", "rl__kl_coef": 0.0},
    ],
    ids=lambda changes: "-".join(name[4:] for name in changes),
)
def test_a_policy_that_stays_is_measured_alike_in_any_number_of_parts(changes, cola_dir, one_rank):
    """Losses and metrics are means over actions: of parts they are those of the whole, whatever an algorithm keeps."""
    tokens, draw = changes.get("rl__action_space") == "token", np.random.default_rng(5)
    made, encoder = [], CoLAForCausalLM.from_pretrained(cola_dir)
    for length in LENGTHS:
        ids = draw.integers(3, VOCAB_SIZE, 2 + length)
        chosen = ids[2:] if tokens else draw.integers(0, NUM_ACTIONS, length)
        states = None
        if "rl__cache_hidden_states" in changes:
            with torch.no_grad():
                states = encoder.encode(torch.from_numpy(ids[None, :-1]), torch.ones(1, length + 1).long())[0].numpy()
        log_probs = -draw.random(length).astype(np.float32) - 2
        made.append(Trajectory(ids[:2], ids[2:], chosen, log_probs, chosen * 0, 0.0, False, "", hidden_states=states))
    found = []
    for parts in (1, 3):
        usual = {"rl__updates_per_batch": 2, "rl__kl_in": "reward", "rl__micro_batch_tokens": 30}
        of_run = config(rl__num_minibatches=parts, model__num_actions=NUM_ACTIONS, model__dtype="float32",
                        **(usual | changes))  # fmt: skip
        if tokens:
            policy = TokenPolicy(small_llama(), with_reference=of_run.rl.kl_coef > 0)
        else:
            cola = CoLAForCausalLM.from_pretrained(cola_dir)
            policy = LatentPolicy(cola, of_run.rl.cache_hidden_states, of_run.rl.marginal_aliases)
        zero = Still(policy)
        update = PolicyUpdate(of_run, zero, *_heads(of_run, policy.width, policy.num_actions, zero.device))
        maker = BatchMaker(of_run, SimpleNamespace(facts={"pad_token_id": 0}), None)
        (batch,) = maker.collate(pack(made), Rollouts().advantages.tolist(), STEP)
        sums, _ = update.improve(batch, 0.0, of_run.rl.kl_coef)
        found.append({name: float(value) for name, value in sums.items()})
        assert zero.steps == 2 * parts
        if not tokens:
            passes = batch.mini_batches or ((batch,), (batch,))
            assert zero.passed >= sum(len(one.micro_batches) for parts in passes for one in parts), "e is known by then"
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)
    assert abs(found[0]["policy/loss"]) > 0.1
