"""``cola_ray export``: a checkpoint's model is that which the run would have left, and nothing is written over."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import words
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cola_ray import CoLAForCausalLM
from cola_ray.learner import repartition
from cola_ray.learner.policies import export as export_policy
from cola_ray.learner.policies import make_policy, served
from cola_ray.learner.rl import RLLearner
from cola_ray.model import conversion
from cola_ray.runs import checkpoints, event_log, resume, run_folder
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset
from cola_ray.training.export import main

SPACES = {
    "latent": {},
    "bfloat16": {"model.dtype": "bfloat16"},
    "actor_free": {"rl.algorithm": "etpo", "rl.kl_coef": 0.05, "rl.actor_free": True},
    "token": {"rl.action_space": "token"},
    "lora": {"rl.action_space": "token", "rl.lora_rank": 2},
    "steering": {"rl.action_space": "token", "rl.steering": "all"},
}


def started(space, cola_dir, base_dir, run, tmp_path):
    """A run's folder with settings and inputs, as it is when its learner begins; and what the learner opens."""
    start = tmp_path / "start"
    shutil.copytree(base_dir if SPACES[space].get("rl.action_space") else cola_dir, start)
    words().save_pretrained(start)
    changes = {"model.path": str(start), "output_dir": str(run), **SPACES[space]}
    config = override(preset("tiny"), changes)
    run_folder.claim(config, "rl_math", start)
    resume.check_inputs(config, start)
    return config, served(config, start, run)


def trained(learner):
    """Two optimizer steps that pull logits towards 1; a Q begins at 0."""
    ids = torch.randint(3, 90, (2, 7))
    mask = torch.ones_like(ids)
    for _ in range(2):
        logits, *_ = learner.zero.engine(ids, mask, mask.bool())
        learner.zero.backward((logits.float() - 1).square().mean(), last=True)
        learner.zero.step(0.01)


def kept(run, learner, step):
    folder = checkpoints.staging_path(run, step)
    checkpoints.make_empty(folder)
    learner.zero.save(folder, {})
    files = checkpoints.checksums(folder, (file for file in folder.rglob("*") if file.is_file()))
    checkpoints.seal(folder, step, 1, "", files, {})


def ended(run, *events):
    log = event_log.EventLog(run)
    for step, metrics in events:
        log.append("step", version=step, **metrics)
    record = run_folder.read_record(run)
    run_folder.write_json(run / run_folder.RECORD, record | {"state": "finished"})


def tensors(folder: Path):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("space", SPACES)
def test_a_checkpoints_model_is_what_the_run_would_have_left(space, cola_dir, base_dir, one_rank, tmp_path, capsys):
    config, start = started(space, cola_dir, base_dir, run := tmp_path / "run", tmp_path)
    learner = RLLearner(config, make_policy(config, start))
    trained(learner)
    kept(run, learner, 2)
    beta = config.rl.kl_coef if config.rl.actor_free else 0.0
    export_policy(start, learner.zero.collect(learner.policy.published()), tmp_path / "left", beta)
    trained(learner)
    kept(run, learner, 4)
    ended(run, (2, {"eval/accuracy": 0.5, "reward/mean": 0.25}), (4, {"reward/mean": 0.75}))

    assert main([str(run), "--step", "2", "--to", str(tmp_path / "to" / "two")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'to' / 'two'}: the model of {run} at step 2\n"
    left, made = tensors(tmp_path / "left"), tensors(tmp_path / "to" / "two")
    assert left.keys() == made.keys()
    assert all(torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype for name, tensor in left.items())
    begun = tensors(Path(start))
    assert any(name not in begun or not torch.equal(begun[name], tensor) for name, tensor in made.items())
    kind = AutoModelForCausalLM if config.rl.action_space == "token" else CoLAForCausalLM
    assert kind.from_pretrained(tmp_path / "to" / "two").dtype == torch.float32, "as the start model"
    assert json.loads((tmp_path / "to" / "two" / "provenance.json").read_text())["start_path"] == config.model.path
    card = huggingface_hub.ModelCard.load(tmp_path / "to" / "two" / "README.md")
    assert card.data.library_name == "transformers"
    assert "| rl_math, step 2: eval/accuracy | 0.5 |" in card.text
    assert str(tmp_path) not in card.text

    assert main([str(run), "--best", "--to", str(tmp_path / "best")]) == 0
    assert capsys.readouterr().out.endswith("at step 2, eval/accuracy 0.5\n")
    assert main([str(run), "--to", str(tmp_path / "last")]) == 0
    assert capsys.readouterr().out.endswith("at step 4\n"), "the run left no model"
    last = tensors(tmp_path / "last")
    assert any(not torch.equal(last[name], tensor) for name, tensor in made.items())
    learner.zero.close()


def test_weights_of_several_ranks_are_whole(tmp_path):
    """Slices written down by hand: of each parameter a q-th part a rank, padded to a multiple of the ranks."""
    whole = {"a.weight": torch.arange(15.0).view(3, 5), "b": torch.arange(4.0) + 100}
    for rank in range(2):
        halves = [torch.cat([one.flatten(), torch.zeros(one.numel() % 2)]).chunk(2)[rank] for one in whole.values()]
        name = tmp_path / f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": {"fp32_flat_groups": [torch.cat(halves)]}}, f"{name}_optim_states.pt")
        shapes = {name: one.shape for name, one in whole.items()}
        torch.save({"param_shapes": [shapes]}, f"{name}_model_states.pt")
    found = repartition.weights(tmp_path)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@pytest.fixture
def run(cola_dir, base_dir, tmp_path):
    """A run that left a model, and two checkpoints of which nothing has to be read."""
    _, start = started("latent", cola_dir, base_dir, run := tmp_path / "run", tmp_path)
    shutil.copytree(start, run / "model")
    for step in (20, 30):
        checkpoints.make_empty(folder := checkpoints.staging_path(run, step))
        (folder / "notes.json").write_text("{}")
        checkpoints.seal(folder, step, 1, "", checkpoints.checksums(folder, [folder / "notes.json"]), {})
    ended(run, (0, {"eval/accuracy": 0.1}), (10, {"eval/accuracy": 0.9}))
    return run


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert not said.out
    (line,) = said.err.splitlines()
    return line


def test_the_model_that_a_run_left_is_copied(run, tmp_path, capsys):
    assert main([str(run), "--to", str(tmp_path / "to")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'to'}: the model that {run} left\n"
    assert {file.name: file.read_bytes() for file in (tmp_path / "to").iterdir()} == {
        file.name: file.read_bytes() for file in (run / "model").iterdir()
    }
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")], "nothing half-made stays"


def test_nothing_is_written_over(run, tmp_path, capsys):
    (to := tmp_path / "to").mkdir()
    (to / "mine.txt").write_text("mine")
    why = f"--to = {str(to)!r}: is there already; give a folder that is new or empty"
    assert refused(capsys, run, "--to", to) == why
    assert refused(capsys, run, "--to", to / "mine.txt") == why.replace(str(to), str(to / "mine.txt"))
    assert [file.name for file in to.iterdir()] == ["mine.txt"]
    (to / "mine.txt").unlink()
    assert main([str(run), "--to", str(to)]) == 0, "an empty folder is nobody's"


def test_the_command_prints_its_line_alone(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "cola_ray", "export", str(tmp_path), "--to", str(tmp_path / "to")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    why = f"{tmp_path}: no run there; give a run's --output-dir, e.g. outputs/demo\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", why)


def test_what_is_not_there_is_refused_in_a_line(run, tmp_path, capsys):
    to = ("--to", tmp_path / "to")
    assert refused(capsys, tmp_path, *to) == f"{tmp_path}: no run there; give a run's --output-dir, e.g. outputs/demo"
    assert refused(capsys, run, "--step", 10, *to) == f"--step = 10: {run} has no checkpoint of it; use one of 20, 30"
    assert refused(capsys, run, "--best", *to) == (
        "--best: none of the kept steps 20, 30 was evaluated, but 10; let rl.save_every divide "
        "rl.eval_every, or use --step"
    )
    (checkpoints.path_of(run, 20) / "notes.json").write_text("{} ")
    assert refused(capsys, run, "--step", 20, *to) == "notes.json has 3 bytes, not 2"
    config = json.loads((start := tmp_path / "start" / "config.json").read_text())
    start.write_text(json.dumps(config | {"pad_token_id": 1}))
    line = refused(capsys, run, "--step", 30, *to)
    assert line.startswith(f"model.path = {str(start.parent)!r}: {start} has changed since the run began; restore it")
    record = run_folder.read_record(run)
    run_folder.write_json(run / run_folder.RECORD, record | {"job": "pretrain"})
    assert refused(capsys, run, "--step", 30, *to).startswith(f"{run}: a run of pretrain, of whose checkpoints none is")
    assert not (tmp_path / "to").exists()


def test_a_better_step_that_is_gone_is_named(run, tmp_path, capsys):
    event_log.EventLog(run).append("step", version=20, **{"eval/accuracy": 0.5})
    from cola_ray.training.export import _best

    assert _best(run, "rl_math") == (20, ", eval/accuracy 0.5; step 10 had 0.9, and its checkpoint is not kept")


def test_a_card_names_the_bases_licence_where_its_own_card_does(base_dir, tmp_path):
    sizes = {"num_actions": 4, "num_idm_layers": 1, "num_policy_layers": 1}
    shutil.copytree(base_dir, tmp_path / "base")
    for card, licence in (
        ("", None),
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: [\n---\n", None),
    ):
        (tmp_path / "base" / "README.md").write_text(card)
        model = conversion.attach(tmp_path / "base", **sizes)
        model.save_pretrained(tmp_path / f"of {len(card)}")
        made = huggingface_hub.ModelCard.load(tmp_path / f"of {len(card)}" / "README.md")
        assert made.data.license == licence
        assert ("its licence (apache-2.0) applies" if licence else "(not known here, so look it up)") in made.text


def test_a_plain_models_card_is_ours_until_it_is_yours(base_dir, tmp_path):
    shutil.copytree(base_dir, tmp_path / "model")
    readme = tmp_path / "model" / "README.md"
    for reward in (0.1, 0.5):
        conversion.describe(tmp_path / "model", {"rl_math": "preset tiny"}, {"reward": reward})
        card = huggingface_hub.ModelCard.load(readme)
        assert card.data.tags == ["reinforcement-learning", "cola_ray"]
        assert f"| reward | {reward} |" in card.text
    readme.write_text("# Mine\n")
    conversion.describe(tmp_path / "model", {}, {"reward": 0.9})
    assert readme.read_text() == "# Mine\n"
