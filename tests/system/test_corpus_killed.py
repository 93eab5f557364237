"""Pre-training on a corpus on disk is killed and reads the same documents again, on as many ranks and on more."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from runs import Run, kill, metrics
from safetensors.torch import load_file

from cola_ray.runs import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STEPS = {"base": 8, "actions": 12, "policy": 4}
SETTINGS = ["--pretrain.save-every", "4", "--pretrain.batch-size", "12", "--pretrain.micro-batch-size", "2",
            "--task.num-problems", "300", "--output-dir", "outputs/run", "--data.weights", "1", "3"]  # fmt: skip
SETTINGS += [word for stage, steps in STEPS.items() for word in (f"--pretrain.steps.{stage}", str(steps))]
KILLED_AT = STEPS["base"] + 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Texts, and fewer pairs with three times the weight."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)

    def total():
        terms = [draw.randrange(1, 30) for _ in range(draw.randrange(2, 9))]
        return " + ".join(map(str, terms)), str(sum(terms))

    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("\n".join(" = ".join(total()) for _ in range(2000)))
    pairs = [dict(zip(("question", "answer"), total(), strict=True)) for _ in range(300)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return ["--data.path", str(folder / "*.txt"), "--data.more-paths", str(folder / "pairs.jsonl")]


def output(run: Run) -> Path:
    return run.where / "outputs" / "run"


def in_cache(run: Run) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in (run.where / "outputs" / "corpus").rglob("part-*.arrow")}


def tensors(run: Run) -> dict[str, torch.Tensor]:
    return load_file(output(run) / "model" / "model.safetensors")


def test_a_killed_run_reads_the_same_documents_on_any_number_of_ranks(sources, tmp_path):
    straight = Run("pretrain", tmp_path / "straight", *sources, *SETTINGS)
    straight.finish()
    killed = Run("pretrain", tmp_path / "killed", *sources, *SETTINGS)
    deadline = time.monotonic() + 1200
    while KILLED_AT not in metrics(output(killed)) or checkpoints.newest(output(killed)).checkpoint.step < KILLED_AT:
        assert killed.process.poll() is None, killed.log
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill(killed)
    reached = checkpoints.newest(output(killed)).checkpoint.step
    assert KILLED_AT <= reached < sum(STEPS.values()) - STEPS["policy"]
    shutil.copytree(tmp_path / "killed", tmp_path / "wider")
    made = in_cache(killed)
    assert len(made) == 3

    resumed = Run("pretrain", tmp_path / "killed", *sources, *SETTINGS, "--resume")
    assert f"resuming from the checkpoint of step {reached}" in " ".join(resumed.finish().split())
    assert in_cache(resumed) == made, "what is tokenised stays"
    assert metrics(output(resumed)) == metrics(output(straight))
    one, other = tensors(resumed), tensors(straight)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name

    wider = Run("pretrain", tmp_path / "wider", *sources, *SETTINGS, "--cluster.learner-ranks", "3", "--resume")
    assert f"step {reached}, which 2 learner ranks saved, on 3" in " ".join(wider.finish().split())
    of_two, of_three = metrics(output(straight)), metrics(output(wider))
    assert of_two.keys() == of_three.keys()
    losses = [{step: found[f"{stage}/loss"] for step, found in of_run.items() for stage in STEPS
               if f"{stage}/loss" in found and step > reached} for of_run in (of_two, of_three)]  # fmt: skip
    assert len(losses[0]) >= 3
    for step, loss in losses[0].items():
        # Sums are in another order. Other documents in a step of twelve rows would change its loss by whole percents.
        assert losses[1][step] == pytest.approx(loss, rel=1e-4), step
