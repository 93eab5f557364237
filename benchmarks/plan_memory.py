"""Planned against measured peak memory of the learner and engine processes, with tiny and smollm2-135m.

python benchmarks/plan_memory.py --folder outputs/plan-memory [--gsm8k DATA/gsm8k]

Short runs on CPU, from models that are hardly trained, since memory does not depend on the policy's quality. Without
--gsm8k, the larger preset is trained on sums, whose texts are too short to fill a micro-batch.
"""

import argparse
from pathlib import Path

from cached_run import run_once
from record import record

from cola_ray.cli.arguments import from_command_line
from cola_ray.studies.planned_memory import host_memory
from cola_ray.studies.planned_work import sizes

PRETRAINED = {"tiny": "30", "smollm2-135m": "1"}  # steps of pre-training
RL = {
    "tiny": ["--rl.max-steps", "8", "--rl.eval-every", "0", "--rl.eval-problems", "64"],
    "smollm2-135m": ["--rl.max-steps", "2"],
}


def compare(folder: Path, name: str, task: list[str]) -> dict[str, float]:
    """Measured and planned memory of both kinds of process, in GiB."""
    of_task = ["--preset", name, *task]
    run_once(folder / f"{name}-start", "pretrain", *of_task, "--pretrain.max-steps", PRETRAINED[name])
    model = str(folder / f"{name}-start" / "outputs" / "run" / "model")
    run = [*of_task, *RL[name], "--model.path", model]
    found = run_once(folder / name, "rl_math", *run)
    config = from_command_line("plan", run)
    planned = host_memory(config, sizes(config))
    figures = {}
    for ours, theirs in (("learner", "learner"), ("engine", "worker")):
        measured = found[f"peak_memory_{theirs}_gb"]
        figures |= {f"{name}_{ours}_measured_gib": measured, f"{name}_{ours}_planned_gib": planned[ours] / 2**30,
                    f"{name}_{ours}_planned_over_measured": planned[ours] / 2**30 / measured}  # fmt: skip
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path)
    args = parser.parse_args()
    folder = args.folder.resolve()
    task = ["--task.name", "gsm8k", "--task.path", str(args.gsm8k.resolve())] if args.gsm8k else [
        "--task.name", "arithmetic"]  # fmt: skip
    figures = compare(folder, "tiny", []) | compare(folder, "smollm2-135m", task)
    record("plan", figures, [0], "Peak resident memory of learner and engine on CPU, and what the plan says")


if __name__ == "__main__":
    main()
