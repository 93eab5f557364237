"""TRL's part of vs_trl.sh, run in TRL's environment: trains with GRPOTrainer on our task and writes measurements.

python trl_peer.py '{"base": ..., "steps": ...}' RESULT.json
"""

import itertools
import json
import sys
import time
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback

from cola_ray.settings.config import TaskConfig
from cola_ray.tasks import make_task


class Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    settings = json.loads(sys.argv[1])
    task = make_task(TaskConfig(num_problems=settings["num_problems"]), settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    rows = [{"prompt": problem.question, "index": problem.index} for problem in task.problems("train")]

    def reward(completions: list[str], index: list[int], **_: Any) -> list[float]:
        return [task.score("train", i, text) for i, text in zip(index, completions, strict=True)]

    size = settings["prompts"] * settings["group"]
    clock = Clock()
    trainer = trl.GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(settings["base"]),
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        args=trl.GRPOConfig(
            output_dir="trl-output", use_cpu=True, seed=settings["seed"], max_steps=settings["steps"],
            learning_rate=settings["lr"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
            adam_beta1=settings["betas"][0], adam_beta2=settings["betas"][1], max_grad_norm=settings["max_grad_norm"],
            per_device_train_batch_size=size, num_generations=settings["group"],
            max_completion_length=settings["new_tokens"], temperature=1.0, beta=0.0,
            gradient_checkpointing=False, bf16=False, save_strategy="no", report_to=[], logging_steps=1,
        ),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    ends = [started, *clock.ends]
    result = {
        "accuracy": heldout_accuracy(trainer.model, tokenizer, task, settings),
        "rewards": [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        "step_seconds": [after - before for before, after in itertools.pairwise(ends)],
        "version": trl.__version__,
    }
    with open(sys.argv[2], "w") as file:
        json.dump(result, file)


@torch.no_grad()
def heldout_accuracy(model: Any, tokenizer: Any, task: Any, settings: dict[str, Any]) -> float:
    """Accuracy of greedy answers to the held-out problems that our runs are evaluated on."""
    model.eval()
    problems = task.problems("heldout")[: settings["eval_problems"]]
    tokenizer.padding_side = "left"
    batch = tokenizer([p.question for p in problems], return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ids = model.generate(**inputs, max_new_tokens=settings["new_tokens"], do_sample=False)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(task.score("heldout", p.index, text) >= 1 for p, text in zip(problems, texts, strict=True)) / len(texts)


if __name__ == "__main__":
    main()
