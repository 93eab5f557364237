"""A reward model from preference pairs: one Ray Train worker's loop.

    (prompt, chosen), (prompt, rejected) ─> sequence classifier ─> r_c, r_r ─> -log sigmoid(r_c - r_r) ─> ZeRO-3 step

Bradley and Terry 1952; Ouyang et al. 2022, eq. 1. Which pairs a step trains on is a pure function of (seed, step).
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from cola_ray.learner.engine import (
    Published,
    Report,
    ZeroEngine,
    last_checkpoint,
    save_checkpoint,
    warmup_cosine,
)
from cola_ray.model.conversion import plain_base
from cola_ray.settings.config import Config
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.preference import Pair, Preference


class PairedRewards(nn.Module):
    """Rewards of both sides of B pairs in one forward pass."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(2B, T), chosen first -> (2, B)."""
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].float().view(2, -1)


def preference_loss(rewards: Tensor) -> Tensor:
    """``sum -log sigmoid(r_chosen - r_rejected)``: (2, B) -> scalar. Example: equal rewards -> log 2 a pair."""
    return -F.logsigmoid(rewards[0] - rewards[1]).sum()


def train_loop(config: Config, report: Report) -> None:
    """On every rank; leaves ``output_dir/model``. ``report`` is a collective."""
    settings, output = config.pretrain, Path(config.output_dir)
    rank = torch.distributed.get_rank()
    report.doing("reading the pairs")
    start = config.model.path or config.model.base
    if rank == 0:
        plain_base(start, output / "base")
    torch.distributed.barrier()
    source = output / "base" if (output / "base").exists() else Path(start)
    tokenizer = AutoTokenizer.from_pretrained(source)
    task = Preference(config.task.path, config.seed)
    if not task.pairs("train"):
        raise ValueError(f"task.path = {config.task.path!r}: has no columns chosen and rejected to learn from")
    chat = ChatTokenizer(tokenizer, config.data.date)
    train, heldout = ([_both(chat, pair, config) for pair in task.pairs(split)] for split in ("train", "heldout"))
    report.doing("opening the model")
    classifier = open_classifier(source, tokenizer, config)
    bfloat16 = config.model.dtype == "bfloat16"
    zero = ZeroEngine(
        PairedRewards(classifier), ("classifier.",), lr=settings.base_lr, betas=settings.adam_betas, bfloat16=bfloat16
    )
    checkpoint = last_checkpoint(output)
    first = zero.load(checkpoint.folder)["step"] if checkpoint else 0
    total, pad = settings.num_steps("reward"), classifier.config.pad_token_id
    report.doing("the first step")
    for step in range(first, total):
        started = time.perf_counter()
        lr = settings.base_lr * warmup_cosine(step, total, min(settings.warmup_steps, total), settings.min_lr_ratio)
        metrics = _step(config, zero, train, step, lr, pad)
        last = step + 1 == total
        if heldout and ((step + 1) % 25 == 0 or last):
            metrics["reward/accuracy"] = _accuracy(zero, heldout, settings.micro_batch_size, pad)
        metrics |= {"stage": "reward", "step": step + 1, "steps": total, "time/step": time.perf_counter() - started}
        due = (step + 1) % settings.save_every == 0 and not last
        stop = report(metrics, due)
        if due or stop:
            save = functools.partial(zero.save, notes={"step": step + 1})
            save_checkpoint(output, step + 1, save, report.fail)
        if stop:
            break
    report.doing("saving the model")
    published = [Published(name.removeprefix("classifier."), (parameter,)) for name, parameter in zero.trained]
    tensors = {name: tensor.cpu().clone() for name, tensor in zero.stream(published)}
    if rank == 0:
        model = open_classifier(source, tokenizer, config)
        model.load_state_dict(model.state_dict() | tensors)
        model.save_pretrained(output / "model")
        tokenizer.save_pretrained(output / "model")
    torch.distributed.barrier()


def open_classifier(source: Path, tokenizer: PreTrainedTokenizerBase, config: Config) -> Any:
    """The base with a head of one output, which starts at random; the same on every rank."""
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=1, dtype=getattr(torch, config.model.dtype)
    )
    known = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    model.config.pad_token_id = next(token for token in known if token is not None)
    return model


def _both(chat: ChatTokenizer, pair: Pair, config: Config) -> tuple[list[int], list[int]]:
    limit = config.pretrain.sequence_length
    chosen, rejected = (chat.judged_ids(pair.prompt, said)[-limit:] for said in (pair.chosen, pair.rejected))
    return chosen, rejected


def _step(
    config: Config, zero: ZeroEngine, pairs: Sequence[tuple[list[int], list[int]]], step: int, lr: float, pad: int
) -> dict[str, Any]:
    settings = config.pretrain
    draw = np.random.default_rng((config.seed, step))
    wanted = draw.choice(len(pairs), settings.batch_size, replace=len(pairs) < settings.batch_size)
    mine = [pairs[i] for i in wanted[zero.rank :: zero.world_size]]
    sums = torch.zeros(3, device=zero.device)
    starts = range(0, len(mine), settings.micro_batch_size)
    for start in starts:
        rewards = zero(*_batch(mine[start : start + settings.micro_batch_size], pad, zero.device))
        loss = preference_loss(rewards)
        zero.backward(loss / settings.batch_size, last=start == starts[-1])
        gap = (rewards[0] - rewards[1]).detach()
        sums += torch.stack([loss.detach(), (gap > 0).float().sum(), gap.sum()])
    grad_norm = zero.step(lr)
    torch.distributed.all_reduce(sums)
    loss_mean, right, margin = (sums / settings.batch_size).tolist()
    return {
        "reward/loss": loss_mean, "reward/train_accuracy": right, "reward/margin": margin, "reward/lr": lr,
        "reward/grad_norm": grad_norm,
    }  # fmt: skip


def _batch(pairs: Sequence[tuple[list[int], list[int]]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = [*(chosen for chosen, _ in pairs), *(rejected for _, rejected in pairs)]
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(rows):
        ids[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def _accuracy(zero: ZeroEngine, pairs: Sequence[tuple[list[int], list[int]]], size: int, pad: int) -> float:
    """Share of held-out pairs, 512 at most, whose chosen response is worth more."""
    some = pairs[:512]
    mine, right = some[zero.rank :: zero.world_size], torch.zeros((), device=zero.device)
    rounds = -(-len(some) // (zero.world_size * size))  # ZeRO-3: every rank as many passes
    for number in range(rounds):
        batch = mine[number * size : (number + 1) * size]
        rewards = zero(*_batch(batch or some[:1], pad, zero.device))
        right += (rewards[0] > rewards[1]).float().sum() if batch else 0.0
    torch.distributed.all_reduce(right)
    return float(right) / len(some)
