"""ZeRO-3 on two ranks against one plain PyTorch process: same losses and weights over 20 RL steps, in each space.

Half-way, a checkpoint is saved, from which the same two ranks and also three ranks continue.
"""

import copy
import faulthandler
import json
import os
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import NUM_ACTIONS, VOCAB_SIZE, free_port, words
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from transformers import LlamaForCausalLM

from cola_ray import CoLAForCausalLM
from cola_ray.algorithms.heads import polyak_
from cola_ray.algorithms.mini_batches import permuted
from cola_ray.batch import Batch, collate
from cola_ray.experience import Trajectory
from cola_ray.learner.engine import NonFiniteError, join_group, last_checkpoint, save_checkpoint
from cola_ray.learner.micro_batch import Advantages, Encoded, Frozen, MicroBatch, Rewards
from cola_ray.learner.objective import before_updates, policy_objective, score
from cola_ray.learner.policies import export, forward, make_policy
from cola_ray.learner.rl import RLLearner
from cola_ray.learner.soft_q import one_step_targets
from cola_ray.model.conversion import with_mlp_biases
from cola_ray.packing import pack
from cola_ray.runs.checkpoints import MANIFEST
from cola_ray.settings.config import Config, override
from cola_ray.settings.presets import preset

STEPS, TOLERANCE = 20, 1e-5  # tolerance of losses
# Of weights, which move by up to 6e-3: Adam divides by the size of a gradient, so when it is almost zero, the order of
# its sums matters. On one of several processors, a single weight of 4096 was off by 2.4e-5.
WEIGHT_TOLERANCE = 1e-4
# By kind of policy: its settings, and the number of actions to choose from.
SPACES = {
    "latent": ({"model.num_actions": NUM_ACTIONS}, NUM_ACTIONS),
    "actor_free": (
        {"model.num_actions": NUM_ACTIONS, "rl.algorithm": "etpo", "rl.actor_free": True, "rl.value_steps": 2},
        NUM_ACTIONS,
    ),
    "mini_batches": (
        # six optimizer steps per step, which move the weights as far as one step of the others
        {"model.num_actions": NUM_ACTIONS, "rl.num_minibatches": 3, "rl.updates_per_batch": 2, "rl.lr": 5e-5},
        NUM_ACTIONS,
    ),
    "tbrm": (
        {
            "model.num_actions": NUM_ACTIONS,
            "rl.algorithm": "tbrm",
            "rl.num_minibatches": 3,
            "rl.updates_per_batch": 2,
            "rl.lr": 5e-5,
        },
        NUM_ACTIONS,
    ),
    "token": ({"rl.action_space": "token"}, VOCAB_SIZE),
    "adapters": ({"rl.action_space": "token", "rl.lora_rank": 4}, VOCAB_SIZE),
    "steering": ({"rl.action_space": "token", "rl.steering": "all"}, VOCAB_SIZE),
}
LATENT = ("latent", "mini_batches", "tbrm", "actor_free")
# Not compared with a plain process: its Q, which every rank holds whole, is checked in tests/unit/test_archer_soft.py.
ALONE = {
    "archer_soft": (
        {"model.num_actions": NUM_ACTIONS, "rl.algorithm": "archer_soft", "rl.value_steps": 2}, NUM_ACTIONS
    )
}  # fmt: skip


def settings(space: str) -> Config:
    changes = {"rl.lr": 3e-4, "rl.kl_coef": 0.05, "rl.micro_batch_tokens": 40, "rollout.temperature": 0.8}
    return override(preset("tiny"), changes | (SPACES | ALONE)[space][0])


def policy_of(space: str, model_dir: str):
    torch.manual_seed(0)  # for the adapters' initial weights
    policy = make_policy(settings(space), model_dir)
    if space == "actor_free":
        # With a zero last layer, Adam's first steps are as large for gradients of 1e-8 as for any: rounding counts.
        torch.nn.init.normal_(policy.q.layers[-1].weight, std=0.1)
    return policy


def batches(ranks: int, space: str) -> list[list[Batch]]:
    """20 steps of ten random trajectories of mixed length; the same for any number of ranks.

    In every other step they are completions of two prompts, each of which a rank computes once in a micro-batch.
    """
    draw = np.random.default_rng(0)
    steps = []
    for step in range(STEPS):
        items = []
        prompts = [draw.integers(3, VOCAB_SIZE, int(draw.integers(2, 12))) for _ in range(10)]
        for number in range(10):
            length = int(draw.integers(1, 9))
            items.append(
                Trajectory(
                    prompt_ids=prompts[number % 2 if step % 2 else number],
                    token_ids=draw.integers(3, VOCAB_SIZE, length),
                    actions=draw.integers(0, (SPACES | ALONE)[space][1], length),
                    rollout_log_probs=-draw.random(length).astype(np.float32),
                    versions=np.full(length, step),
                    reward=0.0,
                    truncated=False,
                    text="",
                )
            )
        budget = 40 if ranks > 1 else 10**6
        rl = settings(space).rl
        passes = permuted(10, rl.num_minibatches, rl.updates_per_batch, 0, step)
        steps.append(
            collate(pack(items), draw.normal(size=10).tolist(), ranks, 0, step, budget, passes, space in ALONE)
        )
    return steps


def spawned(loop, ranks: int, space: str, model_dir: Path, out: Path):
    """Run ``loop(rank, learner, space, out)`` on this number of ranks; returns the first rank's result."""
    try:
        arguments = (loop, ranks, free_port(), space, str(model_dir), str(out))
        mp.start_processes(zero_rank, arguments, nprocs=ranks, start_method="fork")
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        said = [f"{file.name}:\n{file.read_text()}" for file in sorted(out.glob("rank-*.txt"))]
        pytest.fail("\n".join([str(error), *said]))
    return torch.load(out / "result.pt")


def zero_rank(rank: int, loop, ranks: int, port: int, space: str, model_dir: str, out: str) -> None:
    faulthandler.enable()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    torch.set_num_threads(1)
    try:
        join_group("gloo")
        found = loop(rank, RLLearner(settings(space), policy_of(space, model_dir)), space, out)
        if rank == 0:
            torch.save(found, f"{out}/result.pt")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        # When one rank fails, gloo may abort the other, and torch then reports only that one.
        Path(out, f"rank-{rank}.txt").write_text(traceback.format_exc())
        raise
    os._exit(0)  # all is written; at shutdown, gloo's threads may abort the interpreter


def state_of(learner: RLLearner) -> dict[str, list[torch.Tensor]]:
    """Float32 weights and Adam's moments of all trained parameters, gathered; all ranks must call this."""
    found = {}
    for name, one in learner.zero.trained:
        moments = [safe_get_full_optimizer_state(one, kind) for kind in ("exp_avg", "exp_avg_sq")]
        found[name] = [tensor.clone() for tensor in (safe_get_full_fp32_param(one), *moments)]
    return found


def go_on(rank: int, learner: RLLearner, space: str, out: str):
    """Continue from the checkpoint of two ranks; returns the loaded state and the final weights."""
    learner.load(last_checkpoint(Path(out)).folder)
    loaded = state_of(learner)
    for parts in batches(learner.zero.world_size, space)[10:]:
        learner.step(parts[rank])
    policy = {name: tensor.clone() for name, tensor in learner.zero.stream(learner.policy.published())}
    return {"loaded": loaded, "policy": policy}


def train_and_check(rank: int, learner: RLLearner, space: str, out: str):
    published = learner.policy.published()
    assert learner.zero.zero_stage == 3
    for parts in batches(2, space)[:3]:  # a warm-up, which must not affect what follows, see plain()
        measured = learner.step(replace(parts[rank], trains=False))
        assert measured["policy/lr"] == measured["policy/grad_norm"] == 0.0
        assert not learner.zero.optimizer.optimizer.state, "Adam has seen no gradient"
    losses = []
    for step, parts in enumerate(batches(2, space)):
        metrics = learner.step(parts[rank])
        assert metrics["learner/computed_share"] == parts[rank].computed_share(True)
        if step % 2 and not parts[rank].mini_batches:
            assert parts[rank].computed_share(True) < parts[rank].computed_share(False), "prompts are shared"
        losses.append(metrics["q/error" if space == "actor_free" else "policy/loss"])
        if step == 9:  # half-way
            save_checkpoint(Path(out), learner.version, learner.save, pytest.fail)
            saved = state_of(learner)
    straight = {name: tensor.clone() for name, tensor in learner.zero.stream(published)}
    checkpoint = last_checkpoint(Path(out))
    assert (checkpoint.step, checkpoint.ranks) == (13, 2)
    for each in range(2):
        assert any(
            f"pp_rank_{each}_" in file for file in json.loads((checkpoint.folder / MANIFEST).read_text())["files"]
        )
    learner.load(checkpoint.folder)
    assert (learner.version, learner.trained_steps) == (13, 10)
    for parts in batches(2, space)[10:]:
        learner.step(parts[rank])
    resumed = {name: tensor.clone() for name, tensor in learner.zero.stream(published)}
    learner.config = override(learner.config, {"rl.kl_target": 1e-6, "rl.algorithm": "grpo"})
    learner.step(replace(batches(2, space)[0][rank], trains=False))
    assert learner.kl_coef == settings(space).rl.kl_coef, "nor does the coefficient follow what did not train"
    learner.config = settings(space)
    for name, tensor in learner.zero.stream(published):
        assert torch.equal(tensor, resumed[name]), f"{name} moved in a step that does not train"
    poisoned = batches(2, space)[0][rank]
    if rank == 1:
        poisoned.advantages[:] = np.nan  # so that the first of several mini-batches contains a NaN
    with pytest.raises(NonFiniteError):  # on both ranks, though only one has seen it
        learner.step(poisoned)
    for name, tensor in learner.zero.stream(published):
        assert torch.equal(tensor, resumed[name]), name
    return {"losses": losses, "policy": straight, "resumed": resumed, "saved": saved}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(one, marks=[pytest.mark.slow] * (one in ("adapters", "tbrm", "actor_free"))) for one in SPACES
    ],
)
def space(request):
    return request.param


@pytest.fixture(scope="module")
def model_dir(space, cola_dir, base_dir, tmp_path_factory):
    if space == "steering":
        words().save_pretrained(base_dir)
        return with_mlp_biases(base_dir, tmp_path_factory.mktemp("steered") / "llama")
    return cola_dir if space in LATENT else base_dir


@pytest.fixture(scope="module")
def out(space, tmp_path_factory):
    """Output folder of the two ranks."""
    folder = tmp_path_factory.mktemp("zero")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def two_ranks(space, model_dir, out):
    return spawned(train_and_check, 2, space, model_dir, out)


def plain(space, model_dir):
    config, module = settings(space), policy_of(space, model_dir)
    if space == "actor_free":
        return plain_q(config, module)
    parameters = [parameter for name, parameter in module.named_parameters() if name.startswith(module.trained)]
    optimizer = torch.optim.AdamW(parameters, lr=config.rl.lr, betas=config.rl.adam_betas, weight_decay=0.0)
    losses, level = [], None
    for (batch,) in batches(1, space):
        before, first = copy.deepcopy(module), []
        if level is None:  # of the first batch, as a whole
            whole = MicroBatch.cut(batch, *batch.micro_batches[0], torch.device("cpu"))
            rewards, discounts = whole.rewards[whole.action_mask], whole.discounts[whole.action_mask]
            level = float(rewards.mean() / (1 - discounts.mean()))
        for number, parts in enumerate(batch.mini_batches or ((None,),)):
            for part in (batch if one is None else batch.part(one) for one in parts):
                whole = MicroBatch.cut(part, *part.micro_batches[0], torch.device("cpu"), score_last=space == "tbrm")
                follows, weights, old = Advantages(whole.advantages), None, None
                if space == "tbrm":  # the mean over sequences, but below it is divided by the number of actions
                    follows = Rewards(whole.rewards, whole.discounts, level)
                    weights = torch.full((1, 1), part.num_actions_global / len(whole.input_ids))
                if batch.mini_batches:  # ratios refer to the policy before the first mini-batch
                    with torch.no_grad():
                        logits, frozen = forward(before, whole, Frozen())
                        scores = score(logits, frozen.reference_logits, whole, 0.8, 0)
                        old = before_updates(scores, whole, None, config.rl)
                logits, frozen = forward(module, whole, Frozen())
                loss, _ = policy_objective(
                    logits, whole, frozen, follows, old, rl=config.rl, kl_coef=config.rl.kl_coef, temperature=0.8,
                    top_k=0, loss_weights=weights,
                )  # fmt: skip
                optimizer.zero_grad()
                (loss / part.num_actions_global).backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.rl.grad_clip)
                optimizer.step()
                first.append(float(loss) if number == 0 else 0.0)
        losses.append(sum(first) / batch.num_actions_global)
    return losses, {one.name: one.merged(*(p.detach() for p in one.parameters)) for one in module.published()}


def plain_q(config, module):
    target, rl = copy.deepcopy(module.q), config.rl
    optimizer = torch.optim.AdamW(module.q.parameters(), lr=rl.value_lr, betas=rl.adam_betas, weight_decay=0.0)
    losses = []
    for (batch,) in batches(1, "actor_free"):
        whole = MicroBatch.cut(batch, *batch.micro_batches[0], torch.device("cpu"), score_last=True)
        mask = whole.action_mask
        for step in range(rl.value_steps):
            _, frozen = forward(module, whole, Frozen())
            e, reference = frozen.hidden_states, frozen.reference_logits.log_softmax(-1)
            goals = one_step_targets(target, Encoded(whole, e, whole.rewards), reference, rl.kl_coef)[mask]
            error = (module.q(e[mask]).gather(-1, whole.actions[mask][:, None])[:, 0] - goals).square().mean()
            optimizer.zero_grad()
            error.backward()
            torch.nn.utils.clip_grad_norm_(module.q.parameters(), rl.grad_clip)
            optimizer.step()
            polyak_(target.parameters(), module.q.parameters(), rl.target_tau)
            if step == 0:
                losses.append(float(error))
    return losses, {one.name: one.parameters[0].detach() for one in module.published()}


def test_two_zero3_ranks_equal_one_plain_process(space, model_dir, two_ranks):
    losses, policy = plain(space, model_dir)
    np.testing.assert_allclose(two_ranks["losses"], losses, atol=TOLERANCE)
    assert policy.keys() == two_ranks["policy"].keys()
    for name, tensor in policy.items():
        torch.testing.assert_close(
            two_ranks["policy"][name],
            tensor,
            atol=WEIGHT_TOLERANCE,
            rtol=0,
            msg=lambda said, name=name: f"{name}: {said}",
        )


def test_saved_and_loaded_equals_straight_through_bit_for_bit(two_ranks):
    for name, tensor in two_ranks["policy"].items():
        assert torch.equal(tensor, two_ranks["resumed"][name]), name


@pytest.mark.slow
def test_three_ranks_go_on_from_the_checkpoint_of_two(space, model_dir, two_ranks, out):
    """They load its float32 weights and moments bit for bit; afterwards sums are in another order."""
    three = spawned(go_on, 3, space, model_dir, out)
    assert three["loaded"].keys() == two_ranks["saved"].keys()
    for name, tensors in three["loaded"].items():
        assert all(map(torch.equal, tensors, two_ranks["saved"][name])), name
    for name, tensor in three["policy"].items():
        difference = (tensor - two_ranks["policy"][name]).abs().max()
        assert difference <= WEIGHT_TOLERANCE, f"{name}: {difference}"


def test_what_trains_changes_and_nothing_else(space, model_dir, two_ranks, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    latent = space in LATENT
    kind = CoLAForCausalLM if latent else LlamaForCausalLM
    before, start = kind.from_pretrained(model_dir), tmp_path / "start"
    before.save_pretrained(start)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(start)
    export(str(start), two_ranks["policy"], tmp_path / "model", soft_q_beta=0.05 * (space == "actor_free"))
    after = kind.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in two_ranks["policy"].items():
        assert torch.equal(after[name], tensor), name
    for name, tensor in before.state_dict().items():
        of_policy = name.startswith("policy.")
        trains = {"latent": of_policy, "mini_batches": of_policy, "tbrm": of_policy, "token": True,
                  "adapters": "_proj" in name, "steering": name.endswith("down_proj.bias")}  # fmt: skip
        assert torch.equal(after[name], tensor) != trains.get(space, False), name


def tell(rank: int, learner: RLLearner, space: str, out: str):
    """What archer_soft's learner reports about the sequences of six steps, the first two of which train only Q."""
    steps, found, world = batches(learner.zero.world_size, space)[:6], [], learner.zero.world_size
    for step, parts in enumerate(steps):
        metrics = learner.step(replace(parts[rank], trains=step >= 2))
        assert (metrics["policy/grad_norm"] > 0) == (step >= 2)
        found.append(torch.from_numpy(learner.of_sequences))
        if step == 3:
            save_checkpoint(Path(out), learner.version, learner.save, pytest.fail)
    policy = {name: tensor.clone() for name, tensor in learner.zero.stream(learner.policy.published())}
    learner.load(last_checkpoint(Path(out)).folder)
    for step, parts in enumerate(steps[4:], 4):
        learner.step(parts[rank])
        assert np.array_equal(learner.of_sequences, found[step].numpy()), "as if it had not been interrupted"
    for name, tensor in learner.zero.stream(learner.policy.published()):
        assert torch.equal(tensor, policy[name]), name
    return {"told": torch.stack(found), "policy": policy, "world": world}


def test_two_ranks_tell_archer_softs_critic_what_one_does(cola_dir, tmp_path):
    one, two = (tmp_path / str(ranks) for ranks in (1, 2))
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    alone, both = spawned(tell, 1, "archer_soft", cola_dir, one), spawned(tell, 2, "archer_soft", cola_dir, two)
    assert (alone["world"], both["world"]) == (1, 2)
    assert alone["told"].shape == (6, 10)
    assert alone["told"].std(1).min() > 0
    torch.testing.assert_close(both["told"], alone["told"], atol=1e-3, rtol=0)
    for name, tensor in alone["policy"].items():
        torch.testing.assert_close(both["policy"][name], tensor, atol=WEIGHT_TOLERANCE, rtol=0)
