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
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from cola_ray.settings.config import TaskConfig
from cola_ray.tasks import make_task
from cola_ray.tasks.chat import ChatTokenizer


class Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


class TimedTrainer(trl.GRPOTrainer):
    """Measures the time of each batch of completions and their rewards; the rest of a step is the update."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        begun = time.perf_counter()
        outputs = super()._generate_and_score_completions(inputs)
        self.rollout_seconds = [*getattr(self, "rollout_seconds", []), time.perf_counter() - begun]
        return outputs


def main() -> None:
    settings = json.loads(sys.argv[1])
    task = make_task(TaskConfig(**settings["task"]), settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    problems = task.problems("train")
    rows = [{"prompt": prompt(tokenizer, p.question), "index": p.index} for p in problems]
    check_prompt(tokenizer, problems[0].question)

    def reward(completions: list[Any], index: list[int], **_: Any) -> list[float]:
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        return [task.score("train", i, text) for i, text in zip(index, texts, strict=True)]

    clock = Clock()
    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        args=trl.GRPOConfig(
            output_dir="trl-output", use_cpu=True, seed=settings["seed"], max_steps=settings["steps"],
            learning_rate=settings["lr"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
            adam_beta1=settings["betas"][0], adam_beta2=settings["betas"][1], max_grad_norm=settings["max_grad_norm"],
            per_device_train_batch_size=settings["micro_batch"],
            gradient_accumulation_steps=settings["prompts"] * settings["group"] // settings["micro_batch"],
            num_generations=settings["group"], max_completion_length=settings["new_tokens"], temperature=1.0, beta=0.0,
            gradient_checkpointing=False, bf16=False, save_strategy="no", report_to=[], logging_steps=1,
        ),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    steps = [after - before for before, after in itertools.pairwise([started, *clock.ends])]
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    result = {
        "rewards": [entry["reward"] for entry in logged],
        "response_length": [entry["completions/mean_length"] for entry in logged],
        "step_seconds": steps,
        "learn_seconds": [step - rollout for step, rollout in zip(steps, trainer.rollout_seconds, strict=True)],
        "version": trl.__version__,
    }
    if settings["eval_problems"]:
        result["accuracy"] = heldout_accuracy(trainer.model, tokenizer, task, settings)
    with open(sys.argv[2], "w") as file:
        json.dump(result, file)


def prompt(tokenizer: Any, question: str) -> Any:
    """A prompt in TRL's form: a conversation if the model has a chat template, else text."""
    return [{"role": "user", "content": question}] if tokenizer.chat_template else question


def check_prompt(tokenizer: Any, question: str) -> None:
    """Check that both trainers read the same token ids."""
    if tokenizer.chat_template:
        theirs = tokenizer.apply_chat_template(
            prompt(tokenizer, question), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    else:
        theirs = tokenizer(question)
    if theirs["input_ids"] != ChatTokenizer(tokenizer, "").prompt_ids(question):
        raise SystemExit("the two trainers would read different prompts")


@torch.no_grad()
def heldout_accuracy(model: Any, tokenizer: Any, task: Any, settings: dict[str, Any]) -> float:
    """Accuracy of greedy answers to the held-out problems of our runs; without a chat template."""
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
