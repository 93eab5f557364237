"""TRL's side of vs_trl.sh, run in TRL's environment: GRPOTrainer on our task; writes what it measured.

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
    wishes = json.loads(sys.argv[1])
    task = make_task(TaskConfig(num_problems=wishes["num_problems"]), wishes["seed"])
    tokenizer = AutoTokenizer.from_pretrained(wishes["base"])
    rows = [{"prompt": problem.question, "index": problem.index} for problem in task.problems("train")]

    def reward(completions: list[str], index: list[int], **_: Any) -> list[float]:
        return [task.score("train", i, text) for i, text in zip(index, completions, strict=True)]

    size = wishes["prompts"] * wishes["group"]
    clock = Clock()
    trainer = trl.GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(wishes["base"]),
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        args=trl.GRPOConfig(
            output_dir="trl-output", use_cpu=True, seed=wishes["seed"], max_steps=wishes["steps"],
            learning_rate=wishes["lr"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
            adam_beta1=wishes["betas"][0], adam_beta2=wishes["betas"][1], max_grad_norm=wishes["max_grad_norm"],
            per_device_train_batch_size=size, num_generations=wishes["group"],
            max_completion_length=wishes["new_tokens"], temperature=1.0, beta=0.0,
            gradient_checkpointing=False, bf16=False, save_strategy="no", report_to=[], logging_steps=1,
        ),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    ends = [started, *clock.ends]
    result = {
        "accuracy": heldout_accuracy(trainer.model, tokenizer, task, wishes),
        "rewards": [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        "step_seconds": [after - before for before, after in itertools.pairwise(ends)],
        "version": trl.__version__,
    }
    with open(sys.argv[2], "w") as file:
        json.dump(result, file)


@torch.no_grad()
def heldout_accuracy(model: Any, tokenizer: Any, task: Any, wishes: dict[str, Any]) -> float:
    """Of greedy answers to the held-out problems that our runs are evaluated on."""
    model.eval()
    problems = task.problems("heldout")[: wishes["eval_problems"]]
    tokenizer.padding_side = "left"
    batch = tokenizer([p.question for p in problems], return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ids = model.generate(**inputs, max_new_tokens=wishes["new_tokens"], do_sample=False)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(task.score("heldout", p.index, text) >= 1 for p, text in zip(problems, texts, strict=True)) / len(texts)


if __name__ == "__main__":
    main()
