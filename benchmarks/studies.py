"""Diversity and kept capabilities of tiny and of smollm2-135m: ways of continuing, and a harness task on both models.

python benchmarks/studies.py --folder outputs/studies --gsm8k DATA/gsm8k

Needs the packages of `make evals`. tiny is pre-trained as its preset says, smollm2-135m for half an hour on GSM8K: what
is checked is the order of ways and whether anything broke, not the paper's scale. The harness asks tiny for sums, and
smollm2-135m which of four first sentences begins the solution of a problem.
"""

import argparse
import json
import random
import re
from pathlib import Path

from record import record
from trial import trial

from cola_ray.studies.reproduce import write_choices, write_sums

SHORT = ["--cluster.learner-ranks", "1", "--pretrain.steps.actions", "80", "--pretrain.steps.policy", "80"]
SMALL_SAMPLE = ["--diversity.prefixes", "16", "--diversity.continuations", "4", "--rollout.max-new-tokens", "48"]
PROBLEMS = 32


def write_first_sentences(folder: Path, gsm8k: Path) -> None:
    """GSM8K as choices: the other three begin the solutions of other problems."""
    draw = random.Random(0)
    rows = [json.loads(line) for line in (gsm8k / "test.jsonl").read_text().splitlines()]
    first = [re.sub("<<.*?>>", "", row["answer"].split("\n")[0]) for row in rows]
    chosen = draw.sample(range(len(rows)), PROBLEMS)
    write_choices(folder, "first_sentences", [
        (rows[one]["question"] + "\n", [first[one], *(first[other] for other in draw.sample(range(len(rows)), 3))])
        for one in chosen
    ])  # fmt: skip


def look_at(folder: Path, name: str, pretraining: list[str], sample: list[str], task: str) -> dict[str, float]:
    """Figures of one preset's model, each with its name before it."""
    model = folder / f"{name}-start"
    trial(model, "pretrain", "--preset", name, *pretraining)
    about = ["--preset", name, "--model.path", str(model / "outputs" / "run" / "model")]
    different = trial(folder / f"{name}-diversity", "diversity", *about, *sample)
    kept = trial(folder / f"{name}-capabilities", "capabilities", *about, "--harness.tasks", task,
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
    write_first_sentences(folder / "tasks", gsm8k)
    train, test = (["--data.path", str(gsm8k / f"{split}.jsonl")] for split in ("train", "test"))
    figures = look_at(folder, "tiny", [], [], "sums")
    figures |= look_at(folder, "smollm2-135m", [*SHORT, *train], [*SMALL_SAMPLE, *test], "first_sentences")
    record("studies", figures, [0], "Diversity of continuations (1 over the mean cosine), and a harness task on both")


if __name__ == "__main__":
    main()
