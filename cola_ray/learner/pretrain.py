"""Pre-training, from a base to a model on which RL can start: one Ray Train worker's loop over the stages.

    base        the base alone, as a language model: the given one, or a small Llama that the preset tiny makes
    actions     IDM + codebook + world model, base frozen; straight-through Gumbel actions
    policy      behaviour cloning of the IDM's actions
    fta_idm     only the base, under the IDM's actions; response tokens only
    fta_policy  only the base, under actions sampled from the policy

Each stage starts from the previous stage's folder and writes its own, so a run resumes at a stage, and within it at the
last checkpoint. The stages' losses are in ``stage_module.py``.
Source: Jia et al. 2025, stages 1 and 2. Legend: B rows, T positions, K actions.
"""

import datetime
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cola_ray.algorithms.latent_actions import usage
from cola_ray.algorithms.spans import starts_of
from cola_ray.learner import supervised
from cola_ray.learner.corpus import load_documents, pack
from cola_ray.learner.engine import Report, ZeroEngine, last_checkpoint, placement
from cola_ray.learner.packed import Bundles, Pool, Rows, ShardedRows
from cola_ray.learner.published import Published
from cola_ray.learner.sharding import checkpoint_layers, fill
from cola_ray.learner.shards import Documents
from cola_ray.learner.stage_folder import finish, is_done, put, staging_for
from cola_ray.learner.stage_module import TRAINED, StageModule, mixed, noise_seeds
from cola_ray.learner.start_model import attached, start_model
from cola_ray.learner.states import NOTHING_KEPT, KeptStates, kept_states
from cola_ray.learner.tokenise import Say, counted_rows, tokenise
from cola_ray.model import conversion
from cola_ray.model.modeling_cola import CoLAForCausalLM
from cola_ray.model.tensors import empty
from cola_ray.settings.config import Config
from cola_ray.settings.training import PretrainStage
from cola_ray.tasks import PlayedTask, Prompts, to_pretrain_on
from cola_ray.tasks.chat import ChatTokenizer

MEASURED_EVERY = 10  # steps of the stage actions between measurements; the base's loss also at its first and last step
Heldout = tuple[Tensor, Tensor, Tensor]
"""Ids, attention mask and answer mask of held-out problems, (B, T) each."""


def train_loop(config: Config, report: Report) -> None:
    """Run all stages, on every rank; writes ``output_dir/model``, which in a stopped run is the model so far.

    ``report(metrics)`` is a collective, and is true if the run is to stop.
    """
    rank = torch.distributed.get_rank()
    output = Path(config.output_dir)
    # With its own corpus, and a base that brings its tokenizer, a run needs no task.
    needs_task = not config.data.path or not (config.model.base or config.model.path)
    task = to_pretrain_on(config.task, config.seed) if needs_task else None
    checkpoint = last_checkpoint(output)
    resumed = json.loads((checkpoint.folder / "notes.json").read_text())["stage"] if checkpoint else ""
    report.doing("making the model to start from")
    current, made = start_model(config, task, report)
    for stage in config.pretrain.stages:
        target = output / "stages" / stage
        made = made or not is_done(target, report)
        if made:
            if stage != "base":
                current = attached(config, current)
            same = checkpoint.folder if checkpoint and resumed == stage else None
            checkpoint = None  # it belongs to this stage, or to a later one that is made anew
            if not _run_stage(config, stage, task, current, target, same, report):
                return
        current = target
    if rank == 0:
        put(current, output / "model")
    torch.distributed.barrier()


def _run_stage(
    config: Config,
    stage: PretrainStage,
    task: Prompts | PlayedTask | None,
    source: Path,
    target: Path,
    checkpoint: Path | None,
    report: Report,
) -> bool:
    """Whether the stage came to its end; if stopped, it leaves a checkpoint, and its model as the run's."""
    stages, rank = config.pretrain.stages, torch.distributed.get_rank()
    report.doing(f"{stage}: reading the corpus")
    tokenizer = AutoTokenizer.from_pretrained(source)
    chat = ChatTokenizer(tokenizer, config.data.date, config.data.chat_options)
    rows = _load_rows(config, stage, task, chat, report)
    report.doing(f"{stage}: opening the model")
    shape, tensors = conversion.opened(source)
    model = empty(_kind(stage), shape, getattr(torch, config.model.dtype))
    trained = tuple(prefix.removeprefix("model.") for prefix in TRAINED[stage])
    fill(model, tensors, on_host=lambda name: config.cluster.offload_frozen and not name.startswith(trained))
    if config.cluster.gradient_checkpointing:
        checkpoint_layers(model)
    module = StageModule(model, stage, config)
    heldout: list[Heldout] = []
    if task is not None and not isinstance(task, PlayedTask) and _has_answers(config):
        heldout = list(_heldout_batches(task, chat, rank, torch.distributed.get_world_size()))
    if config.pretrain.states != "off":
        report.doing(f"{stage}: looking for written states")
    learner = CorpusStage(config, stage, module, rows, heldout, kept_states(config, stage, source, rows))
    first = learner.load(checkpoint) if checkpoint else 0
    before = sum(config.pretrain.num_steps(one) for one in stages[: stages.index(stage)])
    report.doing(f"{stage}: the first step")
    ended, metrics = supervised.train(config, learner, report, first_step=first, steps_before=before)
    report.doing(f"{stage}: saving the model")
    left = target if ended else Path(config.output_dir) / "model"
    _leave(config, learner, source, left, tokenizer, metrics)
    return ended


def _kind(stage: PretrainStage) -> Any:
    """The model class that a stage opens."""
    return AutoModelForCausalLM if stage == "base" else CoLAForCausalLM


class CorpusStage:
    """The :class:`~cola_ray.learner.supervised.Stage` of packed rows of text.

    Args:
        module: taken over.
        heldout: this rank's share of problems whose greedy answers are compared with the right ones.
        kept: outputs of frozen modules that are written and read instead of being recomputed.
    """

    def __init__(
        self, config: Config, name: PretrainStage, module: StageModule, rows: Rows, heldout: Sequence[Heldout],
        kept: KeptStates = NOTHING_KEPT,
    ) -> None:  # fmt: skip
        settings = config.pretrain
        self.config, self.name, self.rows, self.kept = config, name, rows, kept
        self.heldout = heldout if name in ("base", "policy") else ()
        self.measure_every = 100
        self.peak_lr = settings.base_lr if name == "base" or name.startswith("fta") else settings.lr
        self.zero = ZeroEngine(
            module, TRAINED[name], lr=self.peak_lr, betas=settings.adam_betas, weight_decay=0.01, fused=True,
            **placement(config),
        )  # fmt: skip
        self.used = torch.zeros(config.model.num_actions)  # how often each code was used since codes were last revived

    def step(self, number: int, lr: float) -> dict[str, Any]:
        settings, started = self.config.pretrain, time.perf_counter()
        metrics, counts = corpus_step(self.config, self.zero, self.rows, self.name, number, lr, self.kept)
        tokens = settings.batch_size * self.rows.width
        metrics[f"{self.name}/tokens_per_second"] = tokens / (time.perf_counter() - started)
        self.used += counts
        if self.name == "actions" and settings.revive_every and (number + 1) % settings.revive_every == 0:
            model, seed = self.zero.engine.module.model, mixed(self.config.seed, number)
            metrics["actions/revived"] = revive_dead_codes(model, self.used, seed)
            self.used.zero_()
        return metrics

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Greedy accuracy on the held-out problems."""
        if not self.heldout:
            return {}
        right = torch.zeros(2, device=self.zero.device)
        for batch in self.heldout:
            correct = self.zero.engine.module.correct(*(tensor.to(self.zero.device) for tensor in batch))
            right += right.new_tensor([float(correct.sum()), float(len(correct))])
        torch.distributed.all_reduce(right)
        return {f"{self.name}/accuracy": float(right[0] / right[1])}

    def save(self, folder: Path, step: int) -> None:
        self.zero.save(folder, {"stage": self.name, "step": step, "used": self.used.tolist()})

    def load(self, folder: Path) -> int:
        """Returns the step to continue from."""
        notes = self.zero.load(folder)
        self.used = torch.tensor(notes["used"])
        return int(notes["step"])


def corpus_step(
    config: Config, zero: ZeroEngine, rows: Rows, stage: PretrainStage, step: int, lr: float,
    kept: KeptStates = NOTHING_KEPT,
) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """One optimizer step on ``pretrain.batch_size`` rows; returns metrics, and each action's number of uses, (K,)."""
    settings = config.pretrain
    picked = rows.step_indices(config.seed, step, settings.batch_size)[zero.rank :: zero.world_size]
    mine = rows.read(picked)
    tensors = [torch.from_numpy(a) for a in (mine.input_ids, mine.position_ids, mine.loss_mask)]
    tensors.append(noise_seeds(config.seed, step, picked))
    tensors.append(tensors[1] if mine.steps is None else torch.from_numpy(mine.steps))
    # The policy learns decisions, all other stages learn each token.
    mask, every = tensors[2][:, :-1], zero.engine.module.every if stage == "policy" else 1
    learned = starts_of(mask, tensors[1][:, :-1], tensors[4][:, :-1], every).sum().to(zero.device)
    torch.distributed.all_reduce(learned)
    num_tokens = max(int(learned), 1)  # the denominator of the whole loss
    cuts = supervised.micro_batches(torch.arange(len(picked)), config)
    batches = [[tensor[some].to(zero.device) for tensor in tensors] for some in cuts]

    def known(index: int) -> tuple[Tensor | None, Tensor | None]:
        return kept.of(picked[cuts[index].numpy()], zero.device, zero.engine.module, *batches[index][:2])

    mean_usage = None
    if zero.engine.module.needs_mean_usage and len(batches) > 1:
        of_each = [zero.engine.module.usage(*batch[:4], known(index)[0], batch[4])
                   for index, batch in enumerate(batches)]  # fmt: skip
        mean_usage = torch.stack(of_each).sum(0)
        torch.distributed.all_reduce(mean_usage)
        mean_usage /= num_tokens

    measured = step in (0, settings.num_steps(stage) - 1) or (step + 1) % MEASURED_EVERY == 0

    def loss_of(index: int, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        reach = index == 0 and (step + 1) % MEASURED_EVERY == 0
        loss, found = zero.engine(*batch[:4], measured, mean_usage, reach, *known(index), batch[4])
        return loss, found

    sums, grad_norm = supervised.zero_step(zero, batches, loss_of, num_tokens, lr)
    metrics: dict[str, Any] = {f"{stage}/loss": float(sums["loss"]) / num_tokens, f"{stage}/grad_norm": grad_norm}
    if "base_loss" in sums:
        metrics["actions/base_loss"] = float(sums["base_loss"]) / num_tokens
    if "states" in sums:
        metrics["actions/reachable_tokens"] = float(sums["reachable"] / sums["states"])
        metrics["actions/covered"] = float(sums["covered"] / sums["spans"])
    if "pairs" in sums:
        metrics["actions/changes"] = float(sums["changes"] / max(float(sums["pairs"]), 1.0))
    counts = sums.get("counts", torch.zeros(config.model.num_actions)).cpu()
    return metrics | (usage(counts) if "counts" in sums else {}), counts


def revive_dead_codes(model: CoLAForCausalLM, counts: Tensor, seed: int) -> int:
    """Give codes that were never used the most used code's row, and its row of IDM logits, plus a little noise.

    This splits the most used code, and training can tell the halves apart. All ranks call with the same arguments;
    works on ZeRO-3's full-precision copies. Returns how many codes were revived.
    """
    dead = (counts == 0).nonzero()[:, 0]
    if not len(dead):
        return 0
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    generator = torch.Generator().manual_seed(seed)
    for parameter in (model.codebook.weight, model.idm.head.weight):
        table = safe_get_full_fp32_param(parameter).clone()
        row = table[counts.argmax()]
        noise = torch.randn(len(dead), table.shape[1], generator=generator).to(table) * 0.1 * row.std()
        table[dead.to(table.device)] = row + noise
        safe_set_full_fp32_param(parameter, table)
    return len(dead)


def _load_rows(
    config: Config, stage: PretrainStage, task: Prompts | PlayedTask | None, chat: ChatTokenizer,
    report: Report,
) -> Rows:  # fmt: skip
    settings = config.pretrain
    length, pad = settings.sequence_length, chat.tokenizer.pad_token_id or chat.end
    responses = settings.response_only or stage.startswith("fta")
    if not config.data.path:
        documents, _ = load_documents(config.data, task, chat, length)
        return pack(documents, length, pad, responses)
    bundles, counts = _shared_by_ranks(config, chat, lambda line: report.doing(f"{stage}: {line}"))
    if stage.startswith("fta") and not all(one.documents.are_pairs for one in bundles):
        raise ValueError(
            f"pretrain.stages: {stage} needs prompt/response pairs; data.path = {config.data.path!r} has text"
        )
    pools = [Pool(*one) for one in zip(bundles, counts, strict=True)]
    return ShardedRows(pools, config.data.weights or (1.0,), pad, responses)


def _shared_by_ranks(config: Config, chat: ChatTokenizer, say: Say) -> tuple[list[Bundles], list[np.ndarray]]:
    """The corpus of ``data.path`` and its bundles' row counts, which the first rank makes on disk; a collective.

    Sources with weights are shuffled separately, those without are shuffled together.
    """
    data, cache = config.data, Path(config.data.cache or Path(config.output_dir).parent / "corpus")
    # The first rank may need hours, longer than the default group would wait.
    group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    rank, found = torch.distributed.get_rank(), list[Any]([None])
    if rank == 0:
        found = [tokenise(data, chat, cache, say)]
    torch.distributed.broadcast_object_list(found, group=group)
    pools = [[folder] for folder in found[0]] if data.weights else [found[0]]
    bundles = [Bundles(Documents(folders), config.seed, config.pretrain.sequence_length) for folders in pools]
    if rank == 0:
        found = [[counted_rows(one, folders, cache, data.processes, say)
                  for one, folders in zip(bundles, pools, strict=True)]]  # fmt: skip
    torch.distributed.broadcast_object_list(found, group=group)
    torch.distributed.destroy_process_group(group)
    return bundles, found[0]


def _has_answers(config: Config) -> bool:
    """Whether the task has one right response per problem, so that teacher forcing measures greedy accuracy."""
    return config.task.name not in ("gsm8k", "math500", "instructions", "preference") and not config.data.path


def _heldout_batches(task: Prompts, chat: ChatTokenizer, rank: int, world_size: int) -> Iterator[Heldout]:
    """This rank's share of 512 held-out problems: ids, attention mask, answer mask; the same number on every rank."""
    problems = list(task.problems("heldout"))[:512]
    problems = problems[: len(problems) // world_size * world_size][rank::world_size]
    pad = chat.tokenizer.pad_token_id or chat.end
    for start in range(0, len(problems), 64):
        some = problems[start : start + 64]
        pairs = [(chat.prompt_ids(problem.question), chat.response_ids(problem.solution)) for problem in some]
        width = max(len(p) + len(a) for p, a in pairs)
        ids = torch.full((len(pairs), width), pad)
        attention, answers = (
            torch.zeros(len(pairs), width, dtype=torch.int64),
            torch.zeros(len(pairs), width, dtype=torch.bool),
        )
        for row, (prompt, answer) in enumerate(pairs):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            attention[row, :end] = 1
            answers[row, len(prompt) - 1 : end - 1] = True
        yield ids, attention, answers


def _leave(
    config: Config,
    stage: CorpusStage,
    source: Path,
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict[str, Any],
) -> None:
    """Rank 0 writes the stage's model: the start model with the trained tensors in it. All ranks call."""
    zero = stage.zero
    published = [Published(name.removeprefix("model."), (parameter,)) for name, parameter in zero.trained]
    trained = zero.collect(published)
    zero.close()
    if zero.rank == 0:
        staging = staging_for(target)
        model = _kind(stage.name).from_pretrained(source, dtype=getattr(torch, config.model.dtype))
        model.load_state_dict(model.state_dict() | trained)
        conversion.save(model, tokenizer, staging)
        finish(staging, target, metrics)
    torch.distributed.barrier()
