"""The plan's arithmetic, by hand."""

from pathlib import Path

import pytest

from cola_ray.settings.config import ConfigError, override
from cola_ray.settings.presets import preset
from cola_ray.studies import plan


@pytest.fixture(scope="module")
def paper():
    return preset("llama-3.1-8b")


@pytest.fixture(scope="module")
def sizes(paper):
    return plan.sizes(paper)


def test_parameters_of_llama_by_hand(sizes):
    attention = 4096 * 4096 * 2 + 4096 * 1024 * 2
    layer = attention + 3 * 4096 * 14336 + 2 * 4096
    embeddings = 128256 * 4096
    assert sizes.base == 32 * layer + embeddings + 4096
    assert sizes.policy == 8 * layer + 4096 + 64 * 4096
    world_model = 2 * (3 * 4096 * 14336 + 2 * 4096 * 14336)
    assert sizes.served == sizes.base + embeddings + sizes.policy + 64 * 4096 + world_model


def test_a_ranks_share_by_hand(paper, sizes):
    parts = plan.learner_memory(override(paper, {"cluster.learner_ranks": 8}), sizes)
    assert parts["Adam"] == 12 * sizes.policy / 8
    assert parts["policy and its gradients"] == 4 * sizes.policy / 8
    assert parts["base and reference"] == 2 * (sizes.learner - sizes.policy) / 8
    assert parts["gathered parameters"] == 2e9 + 1e8
    # a token of a layer: two norms 2 x 4096 x 6, queries and keys 4 x (4096 + 2 x 1024), attention 8192, MLP 8 x 14336
    assert parts["activations of the policy"] == 16384 * 8 * (49152 + 24576 + 8192 + 114688)


def test_a_token_in_the_cache_by_hand(sizes):
    assert plan.kv_bytes(sizes) == 2 * 2 * 1024 * 40 + 2 * 4096


def test_the_largest_part_that_does_not_fit_is_named(paper, sizes):
    config = override(paper, {"rl.micro_batch_tokens": 65536})
    with pytest.raises(ConfigError, match=r"cluster.learner_ranks = 4: a rank needs \d+ GB of the 72 GB .* most for "
                       r"activations of the policy, 103 GB; lower rl.micro_batch_tokens"):  # fmt: skip
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
        plan.refuse(config, plan.sizes(config))


def test_the_best_split_is_the_shortest_step(paper, sizes):
    config = override(paper, {"hardware.gpus": 16})
    gpu = plan.GPUS["h100"]
    best = plan.step_time(plan.best_split(config, sizes), sizes, gpu).total(False)
    for ranks in (1, 2, 4, 8):
        other = override(config, {"cluster.learner_ranks": ranks, "rollout.num_workers": 16 - ranks})
        assert best <= plan.step_time(other, sizes, gpu).total(False)


def test_more_engines_decode_faster_and_nccl_is_quicker(paper, sizes):
    gpu = plan.GPUS["h100"]
    few, many = (plan.step_time(override(paper, {"rollout.num_workers": n}), sizes, gpu) for n in (4, 16))
    assert many.rollout < few.rollout
    by_nccl = plan.step_time(override(paper, {"cluster.weight_transport": "nccl"}), sizes, gpu)
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
        parts = plan.learner_memory(split(paper, *cluster), sizes)
        for name, value in (parts | {"together": sum(parts.values())}).items():
            assert float(stated[name][column]) == pytest.approx(value / 1e9, abs=0.006), name


def test_the_documents_times_are_what_the_plan_computes(paper, sizes):
    stated = table("Seconds of a step")
    for column, cluster in enumerate(SPLITS):
        config = split(paper, *cluster)
        gpu = plan.GPUS["h100"]
        step = plan.step_time(config, sizes, gpu)
        by_nccl = plan.step_time(override(config, {"cluster.weight_transport": "nccl"}), sizes, gpu)
        figures = {
            "tokens a second, all engines": step.decode_tokens_per_second, "rollout, s": step.rollout,
            "learning, s": step.learn, "weights by object store, s": step.sync, "weights by nccl, s": by_nccl.sync,
            "a step, s": step.total(overlapped=False),
        }  # fmt: skip
        for name, value in figures.items():
            assert float(stated[name][column].replace(" ", "")) == pytest.approx(value, rel=0.01, abs=0.05), name


def test_longer_answers_and_smaller_nodes_take_longer(paper, sizes):
    def step(**hardware):
        config = override(paper, {f"hardware.{name}": value for name, value in hardware.items()})
        return plan.step_time(config, sizes, plan.GPUS["h100"])

    usual = step()
    assert step(response_tokens=1024) == usual, "half of rollout.max_new_tokens"
    assert step(response_tokens=2048).rollout > usual.rollout
    assert step(gpus_per_node=4, network_gbs=1.0).learn == usual.learn, "four ranks are still on one node"
    assert step(gpus_per_node=2, network_gbs=1.0).learn > usual.learn
