"""Trains a reward model on preference pairs: one Ray Train worker's loop.

    (prompt, chosen), (prompt, rejected) ─> sequence classifier ─> r_c, r_r ─> -log sigmoid(r_c - r_r) ─> ZeRO-3 step

Bradley and Terry 1952; Ouyang et al. 2022, eq. 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from cola_ray.learner import supervised
from cola_ray.learner.engine import Report, ZeroEngine, last_checkpoint, placement
from cola_ray.learner.published import Published
from cola_ray.learner.sharding import checkpoint_layers, fill
from cola_ray.model.conversion import plain_base
from cola_ray.model.tensors import Tensors, empty
from cola_ray.settings.config import Config
from cola_ray.settings.training import REWARD_STAGE
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.preference import Pair, Preference

Ids = tuple[list[int], list[int]]
"""Token ids of a prompt with its chosen response, and with its rejected one."""


class PairedRewards(nn.Module):
    """Rewards of both sides of B pairs in one forward pass."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(2B, T), chosen first -> (2, B)."""
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].float().view(2, -1)


def preference_loss(rewards: Tensor) -> Tensor:
    """``sum -log sigmoid(r_chosen - r_rejected)``: (2, B) -> scalar. Example: equal rewards -> log 2 per pair."""
    return -F.logsigmoid(rewards[0] - rewards[1]).sum()


class RewardStage:
    """The :class:`~cola_ray.learner.supervised.Stage` of preference pairs.

    Args:
        classifier: taken over.
    """

    name, measure_every = REWARD_STAGE, 25

    def __init__(self, config: Config, classifier: Any, train: Sequence[Ids], heldout: Sequence[Ids]) -> None:
        settings = config.pretrain
        self.config, self.train, self.heldout = config, train, heldout
        self.pad, self.peak_lr = classifier.config.pad_token_id, settings.base_lr
        self.zero = ZeroEngine(
            PairedRewards(classifier), ("classifier.",), lr=settings.base_lr, betas=settings.adam_betas,
            **placement(config),
        )  # fmt: skip

    def step(self, number: int, lr: float) -> dict[str, Any]:
        wanted = supervised.drawn(self.config, number, len(self.train))
        mine = [self.train[i] for i in wanted[self.zero.rank :: self.zero.world_size]]

        def loss_of(_: int, pairs: Sequence[Ids]) -> tuple[Tensor, dict[str, Tensor]]:
            rewards = self.zero.engine(*self._tensors(pairs))
            loss, gap = preference_loss(rewards), (rewards[0] - rewards[1]).detach()
            return loss, {"loss": loss.detach(), "train_accuracy": (gap > 0).float().sum(), "margin": gap.sum()}

        size = self.config.pretrain.batch_size
        found, grad_norm = supervised.zero_step(
            self.zero, supervised.micro_batches(mine, self.config), loss_of, size, lr
        )
        means = {f"reward/{name}": float(value / size) for name, value in found.items()}
        return {**means, "reward/grad_norm": grad_norm}

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """The share of held-out pairs (at most 512) whose chosen response has the higher reward."""
        if not self.heldout:
            return {}
        some, size = self.heldout[:512], self.config.pretrain.micro_batch_size
        mine, right = some[self.zero.rank :: self.zero.world_size], torch.zeros((), device=self.zero.device)
        rounds = -(-len(some) // (self.zero.world_size * size))  # ZeRO-3: the same number of passes on every rank
        for number in range(rounds):
            pairs = mine[number * size : (number + 1) * size]
            rewards = self.zero.engine(*self._tensors(pairs or some[:1]))
            right += (rewards[0] > rewards[1]).float().sum() if pairs else 0.0
        torch.distributed.all_reduce(right)
        return {"reward/accuracy": float(right) / len(some)}

    def save(self, folder: Path, step: int) -> None:
        self.zero.save(folder, {"step": step})

    def load(self, folder: Path) -> int:
        """Returns the step to continue from."""
        return int(self.zero.load(folder)["step"])

    def _tensors(self, pairs: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask of B pairs, (2B, T), chosen first."""
        rows = [*(chosen for chosen, _ in pairs), *(rejected for _, rejected in pairs)]
        ids = torch.full((len(rows), max(map(len, rows))), self.pad)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(rows):
            ids[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
        return ids.to(self.zero.device), mask.to(self.zero.device)


def train_loop(config: Config, report: Report) -> None:
    """Run on every rank; writes ``output_dir/model``. ``report`` is a collective.

    Raises:
        ValueError: there are no pairs to learn from.
    """
    output, rank = Path(config.output_dir), torch.distributed.get_rank()
    report.doing("reading the pairs")
    start = config.model.path or config.model.base
    if rank == 0:
        plain_base(start, output / "base", config.model.family)
    torch.distributed.barrier()
    source = output / "base" if (output / "base").exists() else Path(start)
    tokenizer = AutoTokenizer.from_pretrained(source)
    task = Preference(config.task.path, config.seed)
    if not task.pairs("train"):
        raise ValueError(f"task.path = {config.task.path!r}: has no columns chosen and rejected to learn from")
    chat = ChatTokenizer(tokenizer, config.data.date)
    train, heldout = ([_ids(chat, pair, config) for pair in task.pairs(split)] for split in ("train", "heldout"))
    report.doing("opening the model")
    classifier = open_classifier(source, tokenizer, config)
    if config.cluster.gradient_checkpointing:
        checkpoint_layers(classifier)
    stage = RewardStage(config, classifier, train, heldout)
    checkpoint = last_checkpoint(output)
    first = stage.load(checkpoint.folder) if checkpoint else 0
    report.doing("the first step")
    supervised.train(config, stage, report, first_step=first)
    report.doing("saving the model")
    published = [Published(name.removeprefix("classifier."), (parameter,)) for name, parameter in stage.zero.trained]
    tensors = stage.zero.collect(published)
    if rank == 0:
        model = open_classifier(source, tokenizer, config, whole=True)
        model.load_state_dict(model.state_dict() | tensors)
        model.save_pretrained(output / "model")
        tokenizer.save_pretrained(output / "model")
    torch.distributed.barrier()


def open_classifier(source: Path, tokenizer: PreTrainedTokenizerBase, config: Config, whole: bool = False) -> Any:
    """The base with a head of one output, randomly initialised; the same on every rank.

    Args:
        whole: open all of it in this process; else each rank loads its shards if the files have transformers' names
            for this architecture.
    """
    torch.manual_seed(config.seed)
    dtype, shape = getattr(torch, config.model.dtype), AutoConfig.from_pretrained(source, num_labels=1)
    model = empty(AutoModelForSequenceClassification, shape, dtype)
    tensors = Tensors(source)
    named = {f"{model.base_model_prefix}.{name}" for name, _ in model.base_model.named_parameters()}
    if whole or not named <= {*tensors}:
        model = AutoModelForSequenceClassification.from_pretrained(source, config=shape, dtype=dtype)
    else:
        fill(model, tensors, initialise=model._init_weights)
    known = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    model.config.pad_token_id = next(token for token in known if token is not None)
    return model


def _ids(chat: ChatTokenizer, pair: Pair, config: Config) -> Ids:
    limit = config.pretrain.sequence_length
    chosen, rejected = (chat.exchange_ids(pair.prompt, said)[-limit:] for said in (pair.chosen, pair.rejected))
    return chosen, rejected
