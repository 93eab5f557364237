"""The demo with several seeds: greedy held-out accuracy of base, cloned policy, and policy after RL.

python benchmarks/tiny_rl.py 0 1 2
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import ROOT, record

KEYS = ("base_accuracy", "bc_accuracy", "rl_accuracy", "wall_seconds", "seconds_per_step", "peak_memory_worker_gb")


def run_seed(seed: int, where: Path) -> dict:
    """Run the demo with one seed; returns its summary."""
    command = [sys.executable, str(ROOT / "jobs" / "rl_math.py"), "--preset", "tiny", "--seed", str(seed)]
    subprocess.run([*command, "--output-dir", f"outputs/{seed}"], cwd=where, check=True)
    return json.loads((where / "outputs" / str(seed) / "summary.json").read_text())


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        summaries = [run_seed(seed, Path(folder)) for seed in seeds]
    figures = {key: [summary[key] for summary in summaries] for key in KEYS}
    figures["gain_points"] = [100 * (s["rl_accuracy"] - s["bc_accuracy"]) for s in summaries]
    figures["eval_problems"] = summaries[0]["eval_problems"]
    record("tiny_rl", figures, seeds, "The tiny preset from nothing, one value a seed: `make demo` with three seeds.")
    return summaries


if __name__ == "__main__":
    main()
