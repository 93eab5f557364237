"""The first hour on a GPU: are results right, how fast is it, how much memory does it take, and what bounds it.

    python benchmarks/gpu.py 1                          only torch >= 2.11 and transformers, Python 3.12, and the small
                                                        packages wrapt, pydantic and xxhash
    python benchmarks/gpu.py 2                          also DeepSpeed
    python benchmarks/gpu.py 3                          also vLLM and Ray; whole runs need two GPUs
    python benchmarks/gpu.py                            all parts, which is `make gpu`
    python benchmarks/gpu.py 1 --only update sampling   only some measurements of a part
    python benchmarks/gpu.py --device cpu --size toy    everything on a CPU, to check that it runs

Each part takes less than 8 minutes on an H100, prints each figure as soon as it is measured, and continues where it was
stopped: figures that docs/results/gpu.json has for this card and size are not measured again without --again. The table
in docs/benchmarks.md is made from that file. A measurement that fails is named, and the others continue.

Times are compared with their floor: the bytes that have to be moved, or the FLOPs, at the data sheet's rate
(studies/planned_time.py). Memory is compared with `cola_ray plan`. Weights are random: nothing is downloaded.
"""

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_engines
import gpu_learning
import torch
from gpu_bench import SIZES, Bench, Figure
from record import RESULTS, ROOT, record

from cola_ray.studies.planned_time import GPUS

Measurement = Callable[[Bench], Iterator[Figure]]

PARTS: dict[str, tuple[tuple[str, ...], dict[str, Measurement]]] = {
    "1": ((), {"sampling": gpu_learning.sampling, "model": gpu_learning.model, "update": gpu_learning.update,
               "vocabulary": gpu_learning.vocabulary, "pretraining": gpu_learning.pretraining,
               "critic": gpu_learning.critic, "host_copy": gpu_learning.host_copy}),
    "2": (("deepspeed",), {"zero": gpu_learning.zero}),
    "3": (("vllm", "ray"), {"parity": gpu_engines.parity, "decoding": gpu_engines.decoding, "plain": gpu_engines.plain,
                            "whole_tiny": gpu_engines.whole_tiny, "whole_smollm2": gpu_engines.whole_smollm2}),
}  # fmt: skip
"""Part -> packages that it needs besides torch and transformers, and its measurements."""

_LIMIT_S = 480  # time limit of a measurement in its own process


def measured(bench: Bench, name: str, measure: Measurement) -> dict[str, dict[str, Any]]:
    """Print each figure as it is measured; returns rows for the table."""
    rows = {}
    for figure in measure(bench):
        share = "" if isinstance(figure.share, str) else f"{figure.share:.3g} of "
        held = f"  ({share}{figure.against})" if figure.against else ""
        print(f"{name}: {figure.name}: {figure.value:.4g} {figure.unit}{held}", flush=True)
        rows[f"{name}: {figure.name}"] = {
            "value": figure.value, "unit": figure.unit, "share": figure.share, "of": figure.against,
            "card": bench.card,
        }  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="1, 2 or 3; all by default")
    parser.add_argument("--only", nargs="+", metavar="MEASUREMENT", help="; ".join(
        f"part {part}: {', '.join(measurements)}" for part, (_, measurements) in PARTS.items()))  # fmt: skip
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="8b", choices=SIZES)
    parser.add_argument("--results", type=Path, help="default: docs/results/gpu.json on a GPU, else outputs/gpu.json")
    parser.add_argument("--here", action="store_true", help="run parts 2 and 3 in this process, too")
    parser.add_argument("--again", action="store_true", help="also repeat known measurements")
    args = parser.parse_args()
    wrong = [part for part in args.parts if part not in PARTS]
    if wrong:
        parser.error(f"{', '.join(wrong)}: no such part; there are {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is there; --device cpu --size toy runs the same on a CPU")
    sys.exit(run(args))


def run(args: argparse.Namespace) -> int:
    """Run the measurements; returns how many failed."""
    bench = _bench(args)
    failed = 0
    print(f"{bench.card}; results go to {bench.file}", flush=True)
    for part in args.parts or PARTS:
        packages, measurements = PARTS[part]
        absent = [one for one in packages if importlib.util.find_spec(one) is None]
        if absent:
            print(f"part {part} needs {', '.join(absent)}: left out", flush=True)
            continue
        for name in measurements:
            bench = dataclasses.replace(bench, known=_known(bench.file))
            done = any(key.startswith(f"{name}: ") and row["card"] == bench.card for key, row in bench.known.items())
            if (args.only and name not in args.only) or (done and not args.again):
                continue
            right = _here(bench, part, name) if part == "1" or args.here else _apart(args, part, name)
            failed += not right
    return failed


def _here(bench: Bench, part: str, name: str) -> bool:
    """Measure in this process and keep the figures; returns whether this succeeded."""
    try:
        rows = measured(bench, name, PARTS[part][1][name])
    except Exception:
        traceback.print_exc()
        print(f"{name}: failed, see above", flush=True)
        return False
    finally:
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    others = {key: row for key, row in bench.known.items() if not key.startswith(f"{name}: ")}
    _keep(bench.file, others | rows)
    return True


def _apart(args: argparse.Namespace, part: str, name: str) -> bool:
    """The same in a separate process, which frees the device's memory whatever happens."""
    command = [sys.executable, __file__, part, "--only", name, "--here", "--again", "--device", args.device,
               "--size", args.size, *(["--results", str(args.results)] if args.results else [])]  # fmt: skip
    try:
        return subprocess.run(command, check=False, timeout=_LIMIT_S).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: not done in {_LIMIT_S} s", flush=True)
        return False


def _bench(args: argparse.Namespace) -> Bench:
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    sheet = next((sheet for part, sheet in GPUS.items() if part in name.lower()), None)
    file = args.results or (RESULTS / "gpu.json" if args.device == "cuda" else ROOT / "outputs" / "gpu.json")
    return Bench(torch.device(args.device), args.size, f"{name}, {args.size}", sheet, _known(file), file)


def _known(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())["figures"] if file.is_file() else {}
    return found


def _keep(file: Path, figures: dict[str, Any]) -> None:
    if file == RESULTS / "gpu.json":
        record("gpu", figures, [0], "Correctness, speed and memory on a GPU, with random weights.")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
