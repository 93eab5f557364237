"""Pre-training stages on two ranks against one plain process; and stored states, some of which one rank lacks."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import NUM_ACTIONS, VOCAB_SIZE, free_port

from cola_ray import CoLAForCausalLM
from cola_ray.learner import pieces
from cola_ray.learner.corpus import pack
from cola_ray.learner.engine import join_group
from cola_ray.learner.pretrain import CorpusStage
from cola_ray.learner.stage_module import TRAINED, StageModule, noise_seeds
from cola_ray.learner.states import kept_states
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

STEPS, LENGTH = 4, 24


def settings(folder, **changes):
    return override(preset("tiny"), {
        "model.num_actions": NUM_ACTIONS, "pretrain.batch_size": 4, "pretrain.micro_batch_size": 1,
        "pretrain.sequence_length": LENGTH, "pretrain.balance_coef": 0.0, "output_dir": str(Path(folder) / "run"),
    } | {f"pretrain.{name}": value for name, value in changes.items()})  # fmt: skip


def rows():
    draw = np.random.default_rng(0)
    documents = [(draw.integers(3, VOCAB_SIZE, n).tolist(), [True] * n) for n in draw.integers(2, LENGTH + 1, 40)]
    return pack(documents, LENGTH, 0, response_only=False)


def losses_of(stage, config, source, watched=None):
    model, mine = CoLAForCausalLM.from_pretrained(source), rows()
    learner = CorpusStage(
        config, stage, StageModule(model, stage, config), mine, [], kept_states(config, stage, source, mine)
    )
    runs = []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    losses = [learner.step(number, 1e-3)[f"{stage}/loss"] for number in range(STEPS)]
    learner.zero.close()
    if watched is not None:
        watched.append(len(runs))
    return losses


def rank_of(rank, port, source, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    torch.set_num_threads(1)
    pieces.AT_ONCE = 5 * VOCAB_SIZE
    join_group("gloo")
    found = {stage: losses_of(stage, settings(folder), source) for stage in TRAINED if stage != "base"}
    kept = settings(folder, states="model")
    for stage in ("actions", "policy"):
        assert losses_of(stage, kept, source) == found[stage]
    # The states of one row, which the second rank reads in the first step, are gone: both ranks run the base once.
    if rank == 1:
        lost = int(rows().step_indices(0, 0, 4)[1])
        for file in (Path(folder) / "states").glob("*/000000.checks"):
            with file.open("r+b") as checks:
                checks.seek(4 * lost * LENGTH)
                checks.write(bytes(4))
    torch.distributed.barrier()
    watched = []
    assert losses_of("actions", kept, source, watched) == found["actions"]
    assert losses_of("policy", kept, source, watched) == found["policy"]
    assert watched == [1, 0]  # on both ranks
    if rank == 0:
        torch.save(found, f"{folder}/losses.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def plain(stage, source):
    config, model, mine = settings("."), CoLAForCausalLM.from_pretrained(source), rows()
    module = StageModule(model, stage, config)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[stage]))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=config.pretrain.adam_betas, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        picked = mine.step_indices(config.seed, step, 4)
        batch = mine.read(picked)
        given = [torch.from_numpy(one) for one in (batch.input_ids, batch.position_ids, batch.loss_mask)]
        loss, sums = module(*given, noise_seeds(config.seed, step, picked), False)
        count = int(given[2][:, :-1].sum())
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(sums["loss"]) / count)
    return losses


@pytest.mark.timeout(1800)
def test_stages_on_two_ranks_train_as_a_plain_process(cola_dir, tmp_path):
    mp.start_processes(rank_of, (free_port(), str(cola_dir), str(tmp_path)), nprocs=2, start_method="fork")
    for stage, losses in torch.load(tmp_path / "losses.pt").items():
        assert losses == pytest.approx(plain(stage, cola_dir), rel=1e-5), stage
