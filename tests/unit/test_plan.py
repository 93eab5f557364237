"""The plan's arithmetic, by hand."""

import dataclasses
import os
from pathlib import Path

import pytest

from cola_ray.settings.config import ConfigError, override
from cola_ray.settings.presets import preset
from cola_ray.studies import plan, planned_memory, planned_time, planned_work
from cola_ray.studies.planned_work import Rows

TOKENS = {"rl.action_space": "token"}
H100 = planned_time.GPUS["h100"]


@pytest.fixture(scope="module")
def paper():
    return preset("llama-3.1-8b")


@pytest.fixture(scope="module")
def sizes(paper):
    return planned_work.sizes(paper)


def test_parameters_of_llama_by_hand(sizes):
    attention = 4096 * 4096 * 2 + 4096 * 1024 * 2
    layer = attention + 3 * 4096 * 14336 + 2 * 4096
    embeddings = 128256 * 4096
    assert sizes.base == 32 * layer + embeddings + 4096
    assert sizes.policy == 8 * layer + 4096 + 64 * 4096
    world_model = 2 * (3 * 4096 * 14336 + 2 * 4096 * 14336)
    assert sizes.served == sizes.base + embeddings + sizes.policy + 64 * 4096 + world_model


def test_a_ranks_share_by_hand(paper, sizes):
    parts = planned_memory.learner_memory(override(paper, {"cluster.learner_ranks": 8}), sizes)
    assert parts["Adam"] == 12 * sizes.policy / 8
    assert parts["what trains, with gradients"] == (2 + 4) * sizes.policy / 8
    frozen = sizes.base + 128256 * 4096 + sizes.policy
    assert parts["what is frozen"] == 2 * frozen / 8
    assert parts["gathered parameters"] == 2e9 + 1e8
    # A token of a layer: two norms of 4 + 4 + 8 x 4096 / 2 each, four times the queries and a row of the mask, sums of
    # 32 heads, four of the MLP
    layer = 2 * (16384 + 16384) + 2 * (4 * 4096 + 3072) + 128 + 4 * 2 * 14336
    # The first norm keeps no input, the last one its three; e, and a few numbers of each action
    last = 16384 + 16384 - 16384 + 8192 + 64 * 20
    assert parts["activations"] == 16384 * (8 * layer + last)


def test_a_token_in_the_cache_by_hand(paper, sizes):
    assert planned_memory.kv_bytes(paper, sizes) == 2 * 2 * 1024 * 40
    assert planned_memory.kv_bytes(override(paper, TOKENS), sizes) == 2 * 2 * 1024 * 32
    with_e = override(paper, {"rl.cache_hidden_states": True, "rollout.kv_cache_dtype": "fp8"})
    assert planned_memory.kv_bytes(with_e, sizes) == 2 * 1024 * 40 + 2 * 4096


def test_an_engines_memory_by_hand(paper, sizes):
    config = override(paper, {"rollout.max_num_batched_tokens": 4096, "rollout.gpu_memory_utilization": 0.5,
                              "rollout.quantization": "fp8"})  # fmt: skip
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    weights = 2 * sizes.served - 40 * layer
    step = 4096 * 2 * (4 * 4096 + 3 * 14336)
    parts = planned_memory.engine_memory(config, sizes, 80)
    assert parts == {"weights": weights, "a step's tokens": step, "keys and values": 40e9 - weights - step}


def test_flops_by_hand(paper, sizes):
    work = planned_work.learning(paper, sizes, Rows(1, 1000, 1))
    layer = 2 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336) + 4 * 1000 * 4096
    head = 2 * 4096 * 64
    assert work.look == 40 * layer + head
    assert work.forward == 8 * layer + head
    tokens = planned_work.learning(override(paper, TOKENS), sizes, Rows(1, 1000, 1))
    assert tokens.look == tokens.forward == 32 * layer + 2 * 4096 * 128256
    cached = planned_work.learning(override(paper, {"rl.cache_hidden_states": True}), sizes, Rows(1, 1000, 1))
    assert cached.look == 8 * layer + head
    assert cached.frozen == sizes.policy


def test_what_is_held_of_a_batch_between_passes(paper, sizes):
    """256 sequences of 3072 tokens on 4 ranks are 12 micro-batches; e of 11 waits, and the reference's logits."""
    assert "states of the batch" not in planned_memory.learner_memory(paper, sizes)
    twice = planned_memory.learner_memory(override(paper, {"rl.updates_per_batch": 2}), sizes)
    assert twice["states of the batch"] == 11 * 16384 * (2 * 4096 + 4 * 64)
    tokens = planned_memory.learner_memory(override(paper, TOKENS | {"rl.updates_per_batch": 2}), sizes)
    assert tokens["states of the batch"] == 11 * 16384 * 2 * (4096 + 128256)
    parts = planned_memory.learner_memory(override(paper, {"rl.num_minibatches": 2}), sizes)
    assert parts["states of the batch"] == 12 * 16384 * (2 * 4096 + 4 * 64), "rows move to other micro-batches"


def test_weights_come_back_from_the_host_after_every_optimizer_step(paper, sizes):
    """bf16 weights of the policy, a fourth on each rank, over 25 GB/s; all else is as it is with two mini-batches."""
    offloads = override(paper, {"cluster.offload_optimizer": True})
    two, four = (planned_time.step_time(override(offloads, {"rl.num_minibatches": parts}), sizes, H100).learn
                 for parts in (2, 4))  # fmt: skip
    assert four - two == pytest.approx(2 * 2 * sizes.policy / 4 / 25e9, rel=1e-6)
    (one, again) = (planned_time.step_time(override(paper, {"rl.updates_per_batch": 1, "rl.num_minibatches": parts}),
                                           sizes, H100).learn for parts in (1, 2))  # fmt: skip
    assert again > one, "a batch is looked at first"


def test_a_critics_flops_are_those_of_its_step(paper, sizes):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cola_ray.algorithms.archer import TwinHeads
    from cola_ray.replay.critic import Critic, CriticBatch

    small, rows = dataclasses.replace(sizes, width=64), 16
    config = override(paper, {"task.name": "twenty_questions", "rl.algorithm": "archer", "critic.batch_size": rows,
                              "critic.steps": 1})  # fmt: skip
    critic = Critic(TwinHeads(65, 65), gamma=0.9, tau=0.1, lr=1e-3, grad_clip=1.0)
    batch = CriticBatch(*torch.zeros(3, rows, 65), torch.zeros(rows), torch.zeros(rows, dtype=torch.bool),
                        *torch.zeros(2, rows, 65))  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        critic.step(batch)
    planned = planned_time.critic_flops(config, small)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert planned_memory.critic_memory(paper, sizes) == {}
    parameters = sum(one.numel() for one in critic.online.parameters())
    assert planned_memory.critic_memory(config, small)["twin heads"] == pytest.approx(20 * parameters, rel=0.05)
    assert planned_time.step_time(paper, sizes, H100).critic == 0
    assert planned_time.step_time(config, sizes, H100).critic > 0


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (TOKENS, r"a rank needs 172 GB of the 72 GB .* lower rl.micro_batch_tokens, or set \S+gradient_checkpointing"),
        (TOKENS | {"rl.lora_rank": 64}, r"a rank needs 128 GB of the 72 GB"),
        ({"pretrain.stages": ["actions", "policy", "fta_idm"]},
         r"pre-training, fta_idm, needs \d+ GB .* for activations, 61 GB; lower pretrain.micro_batch_size, or set"),
    ],
)  # fmt: skip
def test_modes_that_do_not_fit_are_refused(paper, sizes, changes, refused):
    plan.refuse(paper, sizes)
    with pytest.raises(ConfigError, match=refused):
        plan.refuse(override(paper, changes), sizes)


def test_every_mode_is_planned_and_shown(paper, sizes, capsys):
    plan.show(override(paper, {"hardware.gpus": 8}))
    shown = " ".join(capsys.readouterr().out.split())
    for wanted in ("in pre-training, actions", "in pre-training, policy", "expected", "pessimistic", "MFU 0.15",
                   "waits for its longest answers", "engines idle", "learner idle", "NeMo RL 0.4",
                   "it fits"):  # fmt: skip
        assert wanted in shown, wanted
    seconds = {}
    for name, changes in {"latent": {}, "token": TOKENS | {"cluster.gradient_checkpointing": True},
                          "lora": TOKENS | {"rl.lora_rank": 8, "cluster.gradient_checkpointing": True},
                          "vectors": TOKENS | {"rl.steering": "all", "cluster.gradient_checkpointing": True},
                          "vector": TOKENS | {"rl.steering": "last"},
                          "cached": {"rl.cache_hidden_states": True}}.items():  # fmt: skip
        config = override(paper, changes)
        plan.refuse(config, sizes)
        expected, pessimistic = (planned_time.step_time(config, sizes, H100, one)
                                 for one in (planned_time.EXPECTED, planned_time.PESSIMISTIC))  # fmt: skip
        assert pessimistic.total(False) > 1.5 * expected.total(False)
        seconds[name] = expected.learn
    assert seconds["cached"] < seconds["latent"] < seconds["lora"] < seconds["token"]
    assert seconds["vector"] < seconds["vectors"] < seconds["lora"]
    assert planned_work.vectors(sizes, "all") == 32 * 4096


def test_the_largest_part_that_does_not_fit_is_named(paper, sizes):
    config = override(paper, {"rl.micro_batch_tokens": 65536})
    with pytest.raises(ConfigError, match=r"cluster.learner_ranks = 4: a rank needs \d+ GB of the 72 GB .* most for "
                       r"activations, 117 GB; lower rl.micro_batch_tokens"):  # fmt: skip
        plan.refuse(config, sizes)


def test_too_few_gpus(paper, sizes):
    with pytest.raises(ConfigError, match=r"hardware.gpus = 4: 4 learner ranks and 4 GPUs of engines need 8; e.g. "
                       r"--cluster.learner-ranks 2 --rollout.num-workers 2"):  # fmt: skip
        plan.refuse(override(paper, {"hardware.gpus": 4}), sizes)


def test_an_engine_needs_room_for_one_sequence(paper, sizes):
    small = override(paper, {"hardware.gpu": "l40s", "rl.micro_batch_tokens": 4096, "rollout.max_new_tokens": 131072})
    with pytest.raises(ConfigError, match=r"rollout.tensor_parallel_size = 1: weights of 21 GB leave no room"):
        plan.refuse(small, sizes)


def test_too_little_memory_on_cpu():
    config = override(preset("tiny"), {"hardware.memory_gb": 2.0})
    with pytest.raises(ConfigError, match=r"needs \d\.\d GiB of the 2.0 GiB there are"):
        plan.refuse(config, planned_work.sizes(config))


def test_the_best_split_is_the_shortest_step(paper, sizes):
    config = override(paper, {"hardware.gpus": 16})
    best = planned_time.step_time(plan.best_split(config, sizes), sizes, H100).total(False)
    for ranks in (1, 2, 4, 8):
        other = override(config, {"cluster.learner_ranks": ranks, "rollout.num_workers": 16 - ranks})
        assert best <= planned_time.step_time(other, sizes, H100).total(False)


def test_more_engines_decode_faster_and_nccl_is_quicker(paper, sizes):
    few, many = (planned_time.step_time(override(paper, {"rollout.num_workers": n}), sizes, H100) for n in (4, 16))
    assert many.rollout < few.rollout
    by_nccl = planned_time.step_time(override(paper, {"cluster.weight_transport": "nccl"}), sizes, H100)
    assert by_nccl.sync < few.sync


def table(heading):
    """First cell -> last cells, of the first table below a heading of docs/scaling.md."""
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[2:] for row in rows[2:]}


SPLITS = [(4, 4, 64), (8, 8, 64), (32, 32, 512)]


def split(paper, ranks, engines, prompts):
    changes = {"cluster.learner_ranks": ranks, "rollout.num_workers": engines, "rl.prompts_per_step": prompts}
    return override(paper, changes)


def test_the_documents_memory_is_what_the_plan_computes(paper, sizes):
    stated = table("Memory of a learner rank")
    for column, cluster in enumerate(SPLITS):
        parts = planned_memory.learner_memory(split(paper, *cluster), sizes)
        for name, value in (parts | {"together": sum(parts.values())}).items():
            assert float(stated[name][column]) == pytest.approx(value / 1e9, abs=0.006), name


def test_the_documents_times_are_what_the_plan_computes(paper, sizes):
    stated = table("Seconds of a step")
    for column, cluster in enumerate(SPLITS):
        config = split(paper, *cluster)
        step = planned_time.step_time(config, sizes, H100)
        by_nccl = planned_time.step_time(override(config, {"cluster.weight_transport": "nccl"}), sizes, H100)
        pessimistic = planned_time.step_time(config, sizes, H100, planned_time.PESSIMISTIC)
        figures = {
            "tokens a second, all engines": step.decode_tokens_per_second, "rollout, s": step.rollout,
            "learning, s": step.learn, "weights by object store, s": step.sync, "weights by nccl, s": by_nccl.sync,
            "a step, s": step.total(overlapped=False),
            "a step, pessimistic, s": pessimistic.total(overlapped=False),
        }  # fmt: skip
        for name, value in figures.items():
            assert float(stated[name][column].replace(" ", "")) == pytest.approx(value, rel=0.01, abs=0.05), name


def test_longer_answers_and_smaller_nodes_take_longer(paper, sizes):
    def step(**hardware):
        config = override(paper, {f"hardware.{name}": value for name, value in hardware.items()})
        return planned_time.step_time(config, sizes, H100)

    usual = step()
    assert step(response_tokens=1024) == usual, "half of rollout.max_new_tokens"
    assert step(response_tokens=2048).rollout > usual.rollout
    assert step(gpus_per_node=4, network_gbs=1.0).learn == usual.learn, "four ranks are still on one node"
    assert step(gpus_per_node=2, network_gbs=1.0).learn > usual.learn


def test_a_reader_that_goes_away_ends_no_plan(monkeypatch):
    """As with ``cola_ray plan | head -1``; rich would exit the process."""
    planned_work.sizes(preset("tiny"))  # imports what logs to the stream that it finds
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as nobody:
        monkeypatch.setattr("sys.stdout", nobody)
        plan.show(preset("tiny"))
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull)), "rich noticed, and what follows goes nowhere"
