"""Tokens per second of latent pre-training: our steps against a bare loop, another revision, and the floor.

    python benchmarks/pretraining.py [--threads 2] [--against REVISION]     (the shape of SmolLM2-135M, random weights)

    ours      CorpusStage and ZeroEngine, as in a run, on one rank
    states    like ours, with the base's states and the IDM's labels read from disk (pretrain.states)
    bare      the same module and rows with torch.optim.AdamW: no DeepSpeed, no process group, no metrics
    before    ours at the revision --against, in a worktree
    floor     time for the plan's FLOPs at the rate of matrix products of the same shapes, measured between steps

Each runs in its own process, and they take steps in turns, so that other load on the machine affects all alike.
Medians over the rounds are recorded. In a run, every tenth step also evaluates the bare base; no such step is measured.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ranks
import torch
from record import ROOT, record
from torch.nn.functional import linear

from cola_ray import CoLAConfig, CoLAForCausalLM
from cola_ray.learner import corpus, supervised
from cola_ray.learner.pretrain import CorpusStage
from cola_ray.learner.stage_module import TRAINED, StageModule, noise_seeds
from cola_ray.settings.config import Config, override
from cola_ray.settings.presets import preset
from cola_ray.studies import planned_work

STAGES = ("actions", "policy")
VARIANTS = ("ours", "states", "bare", "before")
STEPS = range(1, 3)
"""Numbers of the steps that are repeated in each round; schedules depend only on the step number."""
_SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
_TOY = _SMOLLM2 | {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smollm2": (_SMOLLM2, {}),
    "toy": (_TOY, {"pretrain.sequence_length": 32, "model.num_actions": 8}),
}
"""The base, and changes to the preset smollm2-135m (batches of 4 rows of 256 tokens, one at a time, float32)."""


def settings(shape: str, folder: Path, variant: str = "ours") -> Config:
    changes = SHAPES[shape][1] | {"output_dir": str(folder / "run"), "model.base": "a base with random weights"}
    if variant == "states":
        changes |= {"pretrain.states": "model", "pretrain.states_cache": str(folder / "states")}
    return override(preset("smollm2-135m"), changes)


def model_of(shape: str, config: Config) -> CoLAForCausalLM:
    sizes = config.model.model_dump(include={"num_actions", "num_idm_layers", "num_world_model_layers",
                                             "num_policy_layers"})  # fmt: skip
    torch.manual_seed(0)
    return CoLAForCausalLM(CoLAConfig(**SHAPES[shape][0], **sizes)).eval()


def rows_of(shape: str, config: Config) -> Any:
    """Documents of 20 to 300 random tokens, in rows of 256."""
    draw, length = np.random.default_rng(0), config.pretrain.sequence_length
    lengths = draw.integers(max(2, length // 12), length * 300 // 256, 64)
    ids = [draw.integers(3, SHAPES[shape][0]["vocab_size"], size).tolist() for size in lengths]
    return corpus.pack([(one, [True] * len(one)) for one in ids], length, 0, False)


# --- a process that takes steps ---------------------------------------------------------------------------------------


def stepper(variant: str, stage: Any, shape: str, folder: Path) -> Callable[[int], float]:
    """A variant's function from step number to loss; all but the bare loop need a process group."""
    config = settings(shape, folder, variant)
    model, rows = model_of(shape, config), rows_of(shape, config)
    if variant == "bare":
        return _bare(config, stage, StageModule(model, stage, config), rows)
    given: list[Any] = []
    if variant == "states":
        from cola_ray.learner.states import kept_states  # earlier revisions do not have it

        if not (folder / "model").exists():
            model.save_pretrained(folder / "model")
        given = [kept_states(config, stage, folder / "model", rows)]
    learner = CorpusStage(config, stage, StageModule(model, stage, config), rows, [], *given)
    return lambda number: float(learner.step(number, 1e-4)[f"{stage}/loss"])


def _bare(config: Config, stage: Any, module: StageModule, rows: Any) -> Callable[[int], float]:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[stage]))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=config.pretrain.adam_betas, weight_decay=0.01)

    def step(number: int) -> float:
        picked = rows.step_indices(config.seed, number, config.pretrain.batch_size)
        ids, places, mask = (torch.from_numpy(one[picked]) for one in (rows.input_ids, rows.position_ids,
                                                                       rows.loss_mask))  # fmt: skip
        seeds, learned, total = noise_seeds(config.seed, number, picked), int(mask[:, :-1].sum()), 0.0
        for some in supervised.micro_batches(torch.arange(len(picked)), config):
            loss, sums = module(ids[some], places[some], mask[some], seeds[some], False)
            (loss / learned).backward()
            total += float(sums["loss"]) / learned
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def serve(variant: str, stage: str, shape: str, folder: str, threads: int) -> None:
    """Read a step's number from each line and answer with the step's seconds and loss."""
    torch.set_num_threads(threads)
    if variant != "bare":
        ranks.join("gloo")
    step = stepper(variant, stage, shape, Path(folder))
    print("READY", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        loss = step(int(line))
        print("STEP", time.perf_counter() - started, loss, flush=True)


class _Process:
    """One variant, with the package as it is in ``source``."""

    def __init__(self, source: Path, *asked: object) -> None:
        environment = os.environ | {"PYTHONPATH": f"{source}:{Path(__file__).parent}", "DS_ACCELERATOR": "cpu",
                                    "OMP_NUM_THREADS": str(asked[-1])}  # fmt: skip
        code = f"import pretraining; pretraining.serve(*{asked!r})"
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=source, env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        self._answer("READY")

    def step(self, number: int) -> tuple[float, float]:
        """The step's seconds and its loss."""
        assert self.process.stdin is not None
        print(number, file=self.process.stdin, flush=True)
        seconds, loss = self._answer("STEP")
        return float(seconds), float(loss)

    def _answer(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()[1:]
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


# --- the floor --------------------------------------------------------------------------------------------------------


def products(shape: str, tokens: int) -> dict[str, tuple[float, Callable[[], object]]]:
    """The FLOPs of a decoder layer's and the head's matrix products, with functions that compute them."""
    base, _ = SHAPES[shape]
    width, inner = base["hidden_size"], base["intermediate_size"]
    keys = width * base["num_key_value_heads"] // base["num_attention_heads"]
    layer = [torch.randn(out, into) for into, out in [(width, width)] * 2 + [(width, keys)] * 2
             + [(width, inner)] * 2 + [(inner, width)]]  # fmt: skip
    head = [torch.randn(base["vocab_size"], width)]
    inputs = {size: torch.randn(tokens, size) for size in (width, inner)}

    def of(weights: list[torch.Tensor]) -> tuple[float, Callable[[], object]]:
        flops = 2.0 * tokens * sum(weight.numel() for weight in weights)
        return flops, lambda: [linear(inputs[weight.shape[1]], weight) for weight in weights]

    return {"layer": of(layer), "head": of(head)}


def flops_of(stage: Any, shape: str, config: Config, scored: float) -> dict[str, float]:
    """FLOPs per token according to the plan: all, the head's, and those of frozen modules, which stored states save.

    Args:
        scored: share of positions that are scored.
    """
    base = SHAPES[shape][0]
    with mock.patch.dict(planned_work._KNOWN, {config.model.base: base}):
        m = planned_work.sizes(config)
    length = float(config.pretrain.sequence_length)
    work = planned_work.pretraining(stage, m, planned_work.Rows(length, length, scored * length))
    head = 4.0 * m.width * m.vocabulary * scored if stage == "actions" else 0.0
    return {"all": (work.look + work.forward + work.backward) / length, "head": head, "spared": work.look / length}


# --- the measurement --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", where, revision], cwd=ROOT, check=True)
        try:
            yield where
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", where], cwd=ROOT, check=True)


def measure(stage: str, shape: str, folder: Path, threads: int, rounds: int, before: Path | None) -> dict[str, Any]:
    """A stage's figures; every variant first takes all of STEPS to warm up, which also writes the states."""
    torch.set_num_threads(threads)
    config, sources = settings(shape, folder), {name: ROOT for name in VARIANTS if name != "before"}
    if before is not None:
        sources["before"] = before
    rows = rows_of(shape, config)
    tokens = config.pretrain.batch_size * rows.width
    gemm = products(shape, rows.width)
    seconds: dict[str, list[float]] = {name: [] for name in (*sources, *gemm)}
    losses: dict[str, list[float]] = {name: [] for name in sources}
    processes = {name: _Process(source, name, stage, shape, str(folder), threads) for name, source in sources.items()}
    try:
        for turn in range(rounds + 1):
            for number in STEPS:
                for name, process in processes.items():
                    spent, loss = process.step(number)
                    losses[name].append(loss)
                    if turn:
                        seconds[name].append(spent)
                for name, (_, compute) in gemm.items():
                    started = time.perf_counter()
                    compute()
                    seconds[name].append(time.perf_counter() - started)
    finally:
        for process in processes.values():
            process.end()
    median = {name: statistics.median(spent) for name, spent in seconds.items()}
    scored = float(rows.loss_mask[:, :-1].sum() / rows.loss_mask.size)
    flops, rates = flops_of(stage, shape, config, scored), {name: gemm[name][0] / median[name] for name in gemm}

    def floor(spared: float) -> float:
        """Seconds of a step at the rate of its matrix products."""
        return tokens * ((flops["all"] - flops["head"] - spared) / rates["layer"] + flops["head"] / rates["head"])

    figures: dict[str, Any] = {f"{name}: tokens a second": tokens / median[name] for name in sources}
    figures |= {"ours / bare": median["bare"] / median["ours"], "states / ours": median["ours"] / median["states"]}
    if before is not None:
        figures |= {f"{name} / before": median["before"] / median[name] for name in ("ours", "states")}
    figures |= {
        "MFLOPs a token": flops["all"] / 1e6,
        "of which written states spare": flops["spared"] / 1e6,
        "products of a layer, GFLOP/s": rates["layer"] / 1e9,
        "products of the head, GFLOP/s": rates["head"] / 1e9,
        "ours: share of the products' rate": floor(0.0) / median["ours"],
        "states: share of the products' rate": floor(flops["spared"]) / median["states"],
        "losses apart, relative": max(abs(one / two - 1) for name in losses
                                      for one, two in zip(losses[name], losses["bare"], strict=True)),
    }  # fmt: skip
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--threads", type=int, default=2, help="threads of each process; only one computes at a time")
    parser.add_argument("--rounds", type=int, default=2, help=f"rounds of {len(STEPS)} steps, after one to warm up")
    parser.add_argument("--against", metavar="REVISION", help="a revision to measure as well")
    args = parser.parse_args()
    by_stage = {}
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(worktree(args.against)) if args.against else None
        for stage in args.stages:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            by_stage[stage] = measure(stage, args.shape, folder, args.threads, args.rounds, before)
            print(stage, json.dumps(by_stage[stage], indent=2), flush=True)
    if args.shape != "toy" and set(args.stages) == set(STAGES):
        figures = {name: {stage: of[name] for stage, of in by_stage.items()} for name in by_stage[STAGES[0]]}
        record("pretraining", figures, [0], "Steps of latent pre-training on one rank, taken in turns.")


if __name__ == "__main__":
    main()
