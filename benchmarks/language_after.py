"""What else RL has changed in a real language model: plausibility of its answers, and what it keeps of the base.

python benchmarks/language_after.py --folder outputs/language --gsm8k DATA/gsm8k [--seeds 0 1 2]

Reads the runs of benchmarks/language.py in the folder, and needs the packages of `make evals`.

    answers sampled in the first and in the last step ─> the bare base ─> nats per token: language_answers
    models before and after RL ─> the evaluation harness: which of four first sentences begins the solution of a
                                  problem of GSM8K? accuracy, and nats of the right sentence: language_kept

A rule of the task reads words, not meaning. Where RL exploits that, rewarded answers become implausible to the base, or
repetitive. A model over tokens is scored by the harness's own class for transformers' models, one over latent actions
with the probability of a token summed over all actions. Intervals are Student's t over seeds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from record import record
from studies import write_first_sentences
from transformers import AutoModelForCausalLM
from uncertainty import over_seeds

from cola_ray.studies.harness import HarnessModel
from cola_ray.tasks.instructions import words

Row = dict[str, Any]
PROBLEMS = 64


def sampled(run: Path, step: int) -> list[Row]:
    """The kept completions of a step."""
    return pq.read_table(run / "samples" / f"{step:08d}-train.parquet").to_pylist()


@torch.inference_mode()
def nats_per_token(base: Any, answers: Sequence[Row]) -> list[float]:
    """The base's mean negative log-likelihood of each answer's tokens."""
    found = []
    for answer in answers:
        prompt, own = list(answer["prompt_ids"]), list(answer["token_ids"])
        logits = base(input_ids=torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1]
        found.append(float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(own))))
    return found


def distinct_words(answers: Sequence[Row]) -> float:
    """Mean share of an answer's words that do not repeat an earlier one."""
    said = [words(answer["completion"]) for answer in answers]
    return float(np.mean([len({*one}) / len(one) for one in said if one]))


def answers_of(base: Any, runs: Sequence[Path]) -> Row:
    """A row of language_answers: sampled answers of the first and the last step, and the rewarded ones of the last."""
    row: Row = {}
    last = [max(int(file.name[:8]) for file in (run / "samples").glob("*-train.parquet")) for run in runs]
    steps = {"first": [1] * len(runs), "last": last}
    for when, at in steps.items():
        answers = [sampled(run, step) for run, step in zip(runs, at, strict=True)]
        row[f"rewarded_{when}"] = float(np.mean([one["reward"] for of_run in answers for one in of_run]))
        nats = [float(np.mean(nats_per_token(base, of_run))) for of_run in answers]
        row |= {**over_seeds(f"nats_{when}", nats), f"each_nats_{when}": nats}
        right = [one for of_run in answers for one in of_run if one["reward"] >= 1]
        row[f"nats_rewarded_{when}"] = float(np.mean(nats_per_token(base, right))) if right else None
        row[f"distinct_words_{when}"] = float(np.mean([distinct_words(of_run) for of_run in answers]))
    return row


def scores(model: Any, tasks: Path) -> tuple[float, float]:
    """Accuracy on first_sentences, and the mean negative log-likelihood of the right sentence in nats."""
    found = simple_evaluate(model, tasks=["first_sentences"], task_manager=TaskManager(include_path=str(tasks)))
    samples = found["samples"]["first_sentences"]
    return (
        float(np.mean([sample["acc"] for sample in samples])),
        -float(np.mean([float(sample["filtered_resps"][0][0]) for sample in samples])),
    )


def kept_of(models: Sequence[Any], tasks: Path) -> Row:
    """A row of language_kept, from one model per seed."""
    found = [scores(model, tasks) for model in models]
    accuracies, nats = ([one[place] for one in found] for place in (0, 1))
    return {**over_seeds("accuracy", accuracies), **over_seeds("nats", nats), "each_accuracy": accuracies}


def plain(path: Path) -> HFLM:
    """A transformers model for the harness."""
    return HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the folder of benchmarks/language.py")
    parser.add_argument("--gsm8k", type=Path, required=True, help="a folder with train.jsonl and test.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    folder, tasks = args.folder.resolve(), args.folder.resolve() / "tasks"
    runs = {
        space: [folder / f"{space}-{seed}" / "outputs" / "run" for seed in args.seeds] for space in ("latent", "token")
    }
    base_path = runs["token"][0] / "base"

    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()
    answers = {space: answers_of(base, own) for space, own in runs.items()}
    record("language_answers", answers, args.seeds, "Sampled answers before and after RL, as the bare base sees them.")

    write_first_sentences(tasks, args.gsm8k.resolve(), PROBLEMS)
    start = folder / "start" / "outputs" / "run" / "model"
    kept = {
        "base": kept_of([plain(base_path)], tasks),
        "token": kept_of([plain(run / "model") for run in runs["token"]], tasks),
        "latent before RL": kept_of([HarnessModel(str(start))], tasks),
        "latent": kept_of([HarnessModel(str(run / "model")) for run in runs["latent"]], tasks),
    }
    record("language_kept", kept, args.seeds, f"Which of four sentences begins a solution: {PROBLEMS} problems.")


if __name__ == "__main__":
    main()
