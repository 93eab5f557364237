"""Diversity and retained capabilities with tiny and smollm2-135m.

python benchmarks/studies.py --folder outputs/studies --gsm8k DATA/gsm8k

Needs the packages of `make evals`. tiny is pre-trained as in its preset, smollm2-135m for half an hour on GSM8K, so
this compares ways of continuing texts at a small scale, not at the paper's scale. The evaluation harness asks tiny for
sums, and asks smollm2-135m which of four first sentences begins the solution of a problem.
"""

import argparse
import json
import random
import re
from pathlib import Path

from cached_run import run_once
from record import record

from cola_ray.studies.reproduce import write_choices, write_sums

GSM8K = ["--task.name", "gsm8k"]
SHORT = [*GSM8K, "--cluster.learner-ranks", "1", "--pretrain.steps.actions", "80", "--pretrain.steps.policy", "80"]
SMALL_SAMPLE = [*GSM8K, "--diversity.prefixes", "16", "--diversity.continuations", "4",
                "--rollout.max-new-tokens", "48"]  # fmt: skip
PROBLEMS = 32


def write_first_sentences(folder: Path, gsm8k: Path, problems: int) -> None:
    """Multiple choice from GSM8K: the three wrong sentences begin the solutions of other problems."""
    draw = random.Random(0)
    rows = [json.loads(line) for line in (gsm8k / "test.jsonl").read_text().splitlines()]
    first = [re.sub("<<.*?>>", "", row["answer"].split("\n")[0]) for row in rows]
    chosen = draw.sample(range(len(rows)), problems)
    write_choices(folder, "first_sentences", [
        (rows[one]["question"] + "\n", [first[one], *(first[other] for other in draw.sample(range(len(rows)), 3))])
        for one in chosen
    ])  # fmt: skip


def measure(folder: Path, name: str, pretraining: list[str], sample: list[str], task: str) -> dict[str, float]:
    """Figures of a preset's model, with the preset's name as prefix."""
    model = folder / f"{name}-start"
    run_once(model, "pretrain", "--preset", name, *pretraining)
    about = ["--preset", name, "--model.path", str(model / "outputs" / "run" / "model")]
    different = run_once(folder / f"{name}-diversity", "diversity", *about, *sample)
    kept = run_once(folder / f"{name}-capabilities", "capabilities", *about, "--harness.tasks", task,
                 "--harness.include-path", str(folder / "tasks"))  # fmt: skip
    figures = {}
    measures = ("diversity", "diversity_low", "diversity_high", "distinct_1", "self_bleu")
    for way in ("random_actions", "policy", "base", "random_tokens"):
        figures |= {f"{name}_{way}_{measured}": different[way][measured] for measured in measures}
    return figures | {f"{name}_{likelihood}_{task}": kept[likelihood][f"{task} acc"]
                      for likelihood in ("base", "marginal")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, required=True, help="a folder with train.jsonl and test.jsonl")
    args = parser.parse_args()
    folder, gsm8k = args.folder.resolve(), args.gsm8k.resolve()
    write_sums(folder / "tasks")
    write_first_sentences(folder / "tasks", gsm8k, PROBLEMS)
    train, test = (["--data.path", str(gsm8k / f"{split}.jsonl")] for split in ("train", "test"))
    figures = measure(folder, "tiny", [], [], "sums")
    figures |= measure(folder, "smollm2-135m", [*SHORT, *train], [*SMALL_SAMPLE, *test], "first_sentences")
    record("studies", figures, [0], "Diversity of continuations (1 over the mean cosine), and a harness task on both")


if __name__ == "__main__":
    main()
