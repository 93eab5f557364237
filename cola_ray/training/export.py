"""``cola_ray export RUN [--step N | --best] --to FOLDER``: a model of a run as a folder that transformers opens.

    neither    RUN/model, written at the end of the run; if there is none, the newest checkpoint, as with --step
    --step N   RUN/checkpoints/step-N/zero  ─> float32 weights of what trained ─┐
    --best     the kept checkpoint that held-out problems rate highest          ├─> FOLDER, by one rename
               the start model, unchanged since the run began ──────────────────┘

The model from a checkpoint is, bit for bit, the one that the run would have written if it had ended there: weights are
cast to the run's dtype as in the learner, and adapters are merged by the same code, here on the CPU.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cola_ray.learner import policies, repartition
from cola_ray.model import conversion
from cola_ray.runs import checkpoints, event_log, folder_lock, provenance, resume, run_folder
from cola_ray.runs.checkpoints import CheckpointError
from cola_ray.runs.redaction import redacted
from cola_ray.settings.config import Config, ConfigError
from cola_ray.training.tracked_run import card_facts

_RL = ("rl_math", "rl_agent", "rl_preference")
MEASURES = ("eval/accuracy", "eval/return", "eval/reward")
"""Metrics on held-out problems; a run has one of them."""
_SHOWN = (*MEASURES, "reward/mean", "policy/kl")
"""Metrics of a checkpoint that a model card shows."""


def main(argv: Sequence[str]) -> int:
    """Run ``cola_ray export``; return the exit code."""
    parser = argparse.ArgumentParser(prog="cola_ray export", description="a run's model as a folder for transformers")
    parser.add_argument("run", type=Path, help="a run's folder, e.g. outputs/demo")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="of a kept checkpoint; without it, the model that the run left")
    which.add_argument("--best", action="store_true", help="the kept checkpoint that held-out problems rate highest")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a folder that is new or empty")
    arguments = parser.parse_args(argv)
    try:
        print(export(arguments.run, arguments.to, arguments.step, arguments.best))
    except (ConfigError, CheckpointError) as error:
        print(redacted(str(error)), file=sys.stderr)
        return 2
    return 0


def export(run: Path, target: Path, step: int | None = None, best: bool = False) -> str:
    """Write a model of ``run`` to ``target``; returns a line that describes it.

    Raises:
        ConfigError: there is no such model, its start model has changed, or something is at ``target``.
        CheckpointError: the checkpoint is damaged.
    """
    record = run_folder.read_record(run)
    if record is None or not (run / "config.json").exists():
        raise ConfigError(f"{run}: no run there; give a run's --output-dir, e.g. outputs/demo")
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ConfigError(f"--to = {str(target)!r}: is there already; give a folder that is new or empty")
    left, note = run / "model", ""
    if best:
        step, note = _best(run, record["job"])
    if step is None and (left / "config.json").exists() and not folder_lock.is_in_use(run):
        _put(lambda staging: shutil.copytree(left, staging, dirs_exist_ok=True), target)
        return f"{target}: the model that {run} left"
    kept = _kept(run, record["job"])
    if step is None:
        step = kept[-1]
    if step not in kept:
        raise ConfigError(f"--step = {step}: {run} has no checkpoint of it; use one of {_listed(kept)}")
    checkpoint = checkpoints.read(checkpoints.path_of(run, step))
    _put(lambda staging: _rebuilt(run, record, checkpoint, staging), target)
    return f"{target}: the model of {run} at step {step}{note}"


def _kept(run: Path, job: str) -> list[int]:
    """Steps of the run's checkpoints. Raises ConfigError if it is no run of RL, or has no checkpoint yet."""
    if job not in _RL:
        raise ConfigError(f"{run}: a run of {job}, of whose checkpoints none is a model by itself; leave out --step "
                          "and --best for the one that it left, or finish it with --resume")  # fmt: skip
    kept = checkpoints.steps_of(run)
    if not kept:
        raise ConfigError(f"{run}: has neither a model nor a checkpoint yet; wait for one, see rl.save_every")
    return kept


def _best(run: Path, job: str) -> tuple[int, str]:
    """The kept step with the highest held-out score (the later of equals), and a note about it."""
    kept, history = _kept(run, job), event_log.history(event_log.read(run))
    measure = next((name for name in MEASURES if any(name in one for one in history.values())), "")
    rated = {step: one[measure] for step, one in history.items() if step and measure in one}
    here = {step: value for step, value in rated.items() if step in kept}
    if not here:
        raise ConfigError(f"--best: none of the kept steps {_listed(kept)} was evaluated, but "
                          f"{_listed(sorted(rated)) or 'none'}; let rl.save_every divide rl.eval_every, or use "
                          "--step")  # fmt: skip
    step = max(here, key=lambda one: (here[one], one))
    note, highest = f", {measure} {here[step]:.4g}", max(rated, key=lambda one: (rated[one], one))
    if rated[highest] > here[step]:
        note += f"; step {highest} had {rated[highest]:.4g}, and its checkpoint is not kept"
    return step, note


def _rebuilt(run: Path, record: dict[str, Any], checkpoint: checkpoints.Checkpoint, target: Path) -> None:
    """Write the model that the run would have left at this checkpoint."""
    config = Config.model_validate_json((run / "config.json").read_text())
    if lines := resume.changed_start(record):
        raise ConfigError("\n".join(lines))
    start = resume.start_of(record)
    with tempfile.TemporaryDirectory(prefix="cola_ray-export-") as folder:
        model = _served(config, run, start, Path(folder))
        trained = dict(_published(config, model, repartition.weights(checkpoint.folder / "zero")))
        beta = config.rl.kl_coef if config.rl.actor_free else 0.0
        policies.export(model, trained, target, beta)
    provenance.write(target, config, record["job"], start)
    known = event_log.history(event_log.read(run)).get(checkpoint.step, {})
    figures = {f"{record['job']}, step {checkpoint.step}: {name}": round(known[name], 4)
               for name in _SHOWN if name in known}  # fmt: skip
    conversion.describe(target, card_facts(config, record["job"]), figures)


def _served(config: Config, run: Path, start: Path | None, folder: Path) -> str:
    """The model that the run's engines and learner opened. A plain base that is missing in the run's folder is written
    to ``folder``.
    """
    made = run / ("base" if config.rl.steering == "off" else "steered")
    if config.rl.action_space == "token" and (made / "config.json").exists():
        return str(made)
    return policies.served(config, start, folder)


def _published(config: Config, model: str, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a learner with these weights publishes, under their names in the exported model."""
    rl, dtype = config.rl, getattr(torch, config.model.dtype)
    kind: Any = policies.TokenPolicy
    if rl.action_space == "latent":
        kind = policies.SoftQPolicy if rl.actor_free else policies.LatentPolicy
    if rl.trains_all_weights:
        for name, tensor in weights.items():
            yield kind.stored(name), tensor.to(dtype)
        return
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)  # trained weights are merged into its weights
    policy = policies.TokenPolicy(base, lora_rank=rl.lora_rank, steering=rl.steering, with_reference=False)
    parameters = dict(policy.named_parameters())
    for name, tensor in weights.items():
        parameters[name].data.copy_(tensor)
    for one in policy.published():
        yield one.name, one.merged(*(parameter.detach() for parameter in one.parameters))


def _put(write: Any, target: Path) -> None:
    """Write into a folder beside ``target`` and rename it, so that ``target`` is never incomplete."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        staging.chmod(0o755)
        write(staging)
        staging.rename(target)  # replaces an empty folder at most: one that was filled meanwhile raises
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))
