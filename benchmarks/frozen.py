"""Compares three RL steps of every algorithm with another revision, bit for bit, to check that runs are unchanged.

    python benchmarks/frozen.py REVISION              # e.g. the commit before a refactoring; a minute per run
    python benchmarks/frozen.py REVISION --runs grpo archer

    REVISION, in a worktree ──> start models (made once) ──> runs ──┐ compares the metrics of every step, except times
    this working tree ───────────────────────────────────> runs ──┴─> and memory, and the tensors of the final models

No reference numbers are stored in the project, because processors differ in the last bit. Results of REVISION are kept
in outputs/frozen/<commit>, so it runs only once.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from record import ROOT
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "tests" / "system"))
from runs import Run, metrics

FOLDER = ROOT / "outputs" / "frozen"
SHORT = ["--pretrain.steps.base", "60", "--pretrain.steps.actions", "20", "--pretrain.steps.policy", "20"]
AGENT = ["--task.name", "twenty_questions", "--task.num-problems", "300"]
STARTS = {"rl_math": SHORT, "rl_agent": [*SHORT, *AGENT]}
THREE = ["--rl.max-steps", "3", "--rl.eval-every", "2", "--rl.eval-problems", "8"]
PROBLEMS = [*THREE, "--rl.prompts-per-step", "8", "--rl.group-size", "4"]
EPISODES = [*THREE, "--task.name", "twenty_questions", "--rl.prompts-per-step", "8", "--critic.steps", "4",
            "--critic.batch-size", "64", "--critic.fresh-states", "64", "--critic.warmup-iterations", "1"]  # fmt: skip
RUNS = {
    "grpo": ("rl_math", [*PROBLEMS, "--rl.kl-coef", "0.01"]),
    "ppo": ("rl_math", [*PROBLEMS, "--rl.algorithm", "ppo"]),
    "etpo": ("rl_math", [*PROBLEMS, "--rl.algorithm", "etpo", "--rl.kl-coef", "0.05"]),
    "actor_free": ("rl_math", [*PROBLEMS, "--rl.algorithm", "etpo", "--rl.kl-coef", "0.05", "--rl.actor-free"]),
    "token": ("rl_math", [*PROBLEMS, "--rl.action-space", "token"]),
    "archer": ("rl_agent", EPISODES),
}


def finished(code: Path, job: str, where: Path, args: Sequence[str]) -> Path:
    """Run a checkout's job to its end, with its output in ``where/log``; returns the run's folder.

    Raises:
        AssertionError: the job failed; the message has the end of its log.
    """
    run = Run(job, where, "--overwrite", *args, code=code)
    run.finish()
    return run.output


def start_model(code: Path, job: str) -> Path:
    """The model that a job's runs start from, made once."""
    where = FOLDER / "start" / job
    for summary in where.glob("outputs/pretrain-tiny-*/summary.json"):
        return summary.parent / "model"
    return finished(code, "pretrain", where, STARTS[job]) / "model"


def differences(one: Path, other: Path) -> list[str]:
    """Differences between two runs, one line each."""
    curves: tuple[Mapping[int, Mapping[str, float]], ...] = (metrics(one), metrics(other))
    lines = [] if curves[0].keys() == curves[1].keys() else [f"steps {[*curves[0]]} and {[*curves[1]]}"]
    for step in curves[0].keys() & curves[1].keys():
        before, after = curves[0][step], curves[1][step]
        lines += [
            f"step {step}, {name}: {before.get(name)} before, {after.get(name)} now"
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        ]
    models = [{f.name: load_file(f) for f in (run / "model").glob("*.safetensors")} for run in (one, other)]
    for file in sorted(models[0].keys() | models[1].keys()):
        before_, after_ = (model.get(file, {}) for model in models)
        lines += [
            f"model/{file}: {name} differs"
            for name in sorted(before_.keys() | after_.keys())
            if name not in before_ or name not in after_ or not torch.equal(before_[name], after_[name])
        ]
    return lines


def checkout(revision: str) -> Path:
    """A git worktree of a revision, made if needed."""
    where = FOLDER / revision / "code"
    if not where.exists():
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(where), revision], cwd=ROOT, check=True)
    return where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="the revision to compare this working tree with")
    parser.add_argument("--runs", nargs="+", default=[*RUNS], choices=[*RUNS], metavar="RUN", help=", ".join(RUNS))
    args = parser.parse_args()
    named = ["git", "rev-parse", "--short", f"{args.revision}^{{commit}}"]
    revision = subprocess.run(named, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    before, differ = FOLDER / revision, 0
    for name in args.runs:
        job, settings = RUNS[name]
        start = ["--model.path", str(start_model(checkout(revision), job))]
        there = before / name / "outputs" / f"{job}-tiny-seed0"
        if not (there / "summary.json").exists():
            finished(checkout(revision), job, before / name, [*start, *settings])
        lines = differences(there, finished(ROOT, job, FOLDER / "now" / name, [*start, *settings]))
        differ += bool(lines)
        print(f"{name:12}", "the same, bit for bit" if not lines else "\n".join(["differs:", *lines[:20]]), flush=True)
    raise SystemExit(f"{differ} of {len(args.runs)} runs differ from {revision}" if differ else 0)


if __name__ == "__main__":
    main()
