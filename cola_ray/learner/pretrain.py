"""From a base to a model that RL can start on: one Ray Train worker's loop over the stages.

    base        (tiny only) a small Llama is trained on the task's problems
    actions     IDM + codebook + world model, base frozen; straight-through Gumbel actions
    policy      behaviour cloning of the IDM's actions
    fta_idm     the base alone, under the IDM's actions; response tokens only
    fta_policy  the base alone, under actions sampled from the policy

Each stage starts from the directory the one before left and leaves one of its own, so a run resumes at a stage, and
within it at the last checkpoint. Legend: B rows, T positions, K actions, V vocabulary.
Source: Jia et al. 2025, stages 1 and 2; departures are named where they are made.
"""

import functools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cola_ray.algorithms.latent_actions import (
    negative_entropy,
    straight_through_gumbel,
    usage,
    usage_imbalance,
)
from cola_ray.learner.corpus import PackedRows, load_documents, pack
from cola_ray.learner.engine import (
    Published,
    Report,
    ZeroEngine,
    last_checkpoint,
    save_checkpoint,
    warmup_cosine,
)
from cola_ray.model import conversion
from cola_ray.model.modeling_cola import CoLAForCausalLM, gumbel_noise, sample_actions
from cola_ray.runs.saved import fault_of_stage, seal_stage
from cola_ray.settings.config import Config
from cola_ray.settings.training import OWN_BASE_POSITIONS, PretrainStage
from cola_ray.tasks import PlayedTask, Prompts, to_pretrain_on
from cola_ray.tasks.chat import ChatTokenizer, as_text

TRAINED: dict[PretrainStage, tuple[str, ...]] = {
    "base": ("model.",),
    "actions": ("model.idm.", "model.codebook.", "model.world_model."),
    "policy": ("model.policy.",),
    "fta_idm": ("model.model.", "model.lm_head."),
    "fta_policy": ("model.model.", "model.lm_head."),
}
"""What a stage trains: name prefixes inside :class:`StageModule`."""

DONE = "done.json"
"""Of a stage that came to its end: its last metrics, and what its files are."""
MEASURED_STATES = 32  # states a rank on which all K actions are tried, for the reachable-tokens metric


class StageModule(nn.Module):
    """A stage's loss on packed rows, so that ZeRO-3 sees one forward."""

    def __init__(self, model: CoLAForCausalLM | LlamaForCausalLM, stage: PretrainStage, config: Config) -> None:
        super().__init__()
        self.model: Any = model  # a CoLA model, or a plain Llama in the stage that makes the base
        self.stage, self.settings = stage, config.pretrain

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        loss_mask: Tensor,
        noise_seed: Tensor,
        measure: bool,
        mean_usage: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss *sum* over masked-in positions, and sums.

        Args:
            input_ids, position_ids, loss_mask: (B, T).
            noise_seed: (B,) int64.
            measure: whether to try all actions on some states.
            mean_usage: (K,), the relaxed actions' mean over the step's batch; None where no rank has more than one
                micro-batch, and all compute theirs at the same time.
        """
        labels = input_ids[:, 1:]
        mask = loss_mask[:, :-1]
        if self.stage == "base":
            # Without use_cache=False transformers would not see that rows are packed and attend across documents.
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits[mask].float(), labels[mask], reduction="sum")
            return loss, {"loss": loss.detach()}
        base_trains = self.stage.startswith("fta")
        with torch.set_grad_enabled(base_trains and torch.is_grad_enabled()):
            e = self.model.encode(input_ids, position_ids=position_ids)
        if self.stage == "actions":
            return self._actions_loss(e, position_ids, labels, mask, noise_seed, measure, mean_usage)
        if self.stage == "policy":
            with torch.no_grad():
                wanted = self.model.inverse_dynamics_actions(e, position_ids=position_ids)
            logits = self.model.policy_logits(e, position_ids=position_ids)[:, :-1]
            loss = F.cross_entropy(logits[mask], wanted[mask], reduction="sum")
            return loss, {"loss": loss.detach(), "counts": self._counts(wanted[mask])}
        with torch.no_grad():
            if self.stage == "fta_idm":
                actions = self.model.inverse_dynamics_actions(e, position_ids=position_ids)
            else:
                actions = self._sampled_actions(e, position_ids, noise_seed)
        logits = self.model.world_model_logits(e[:, :-1], actions)
        loss = F.cross_entropy(logits[mask].float(), labels[mask], reduction="sum")
        return loss, {"loss": loss.detach(), "counts": self._counts(actions[mask])}

    @torch.no_grad()
    def usage(self, input_ids: Tensor, position_ids: Tensor, loss_mask: Tensor, noise_seed: Tensor) -> Tensor:
        """Of the stage actions: the relaxed actions' sum over masked-in positions, (K,)."""
        e = self.model.encode(input_ids, position_ids=position_ids)
        return self._drawn(e, position_ids, loss_mask[:, :-1], noise_seed)[1].sum(0)

    def _drawn(self, e: Tensor, position_ids: Tensor, mask: Tensor, noise_seed: Tensor) -> tuple[Tensor, Tensor]:
        """Actions at the N masked-in positions, one-hot and relaxed, (N, K) each."""
        logits = self.model.inverse_dynamics_logits(e, position_ids=position_ids)[:, 1:]
        batch, steps, num_actions = logits.shape
        index = torch.arange(steps, device=e.device)
        noise = gumbel_noise(noise_seed.repeat_interleave(steps), index.repeat(batch), num_actions)
        return straight_through_gumbel(logits[mask], noise.view_as(logits)[mask].float(), self.settings.gumbel_tau)

    def _actions_loss(
        self,
        e: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        mask: Tensor,
        noise_seed: Tensor,
        measure: bool,
        mean_usage: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``CE(logits_t, x_{t+1}) + entropy_coef * sum p log p`` (paper), plus the optional balance term (ours)."""
        settings = self.settings
        one_hot, relaxed = self._drawn(e, position_ids, mask, noise_seed)
        states, targets = e[:, :-1][mask], labels[mask]
        cross_entropy = F.cross_entropy(
            self.model.world_model_logits(states, one_hot).float(), targets, reduction="sum"
        )
        loss = cross_entropy + settings.entropy_coef * negative_entropy(relaxed).sum()
        if settings.balance_coef:
            mean = _mean_over_ranks(relaxed) if mean_usage is None else mean_usage
            loss = loss + settings.balance_coef * usage_imbalance(relaxed, mean)
        sums = {"loss": cross_entropy.detach(), "counts": self._counts(one_hot.argmax(-1))}
        with torch.no_grad():
            base = self.model.lm_head(states).float()
            sums["base_loss"] = F.cross_entropy(base, targets, reduction="sum")
            if measure:
                sums |= self._reachable(states[:MEASURED_STATES], targets[:MEASURED_STATES])
        return loss, sums

    def _reachable(self, states: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Over all K actions in each state: how many distinct next tokens, and is the right one among them?"""
        num_actions = self.model.config.num_actions
        tried = states[:, None].expand(-1, num_actions, -1)
        actions = torch.arange(num_actions, device=states.device).expand(len(states), -1)
        tokens = self.model.world_model_logits(tried, actions).argmax(-1)  # (S, K)
        ordered = tokens.sort(-1).values
        distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)
        return {
            "reachable": distinct.float().sum(),
            "covered": (tokens == targets[:, None]).any(-1).float().sum(),
            "states": torch.tensor(float(len(states)), device=states.device),
        }

    def _sampled_actions(self, e: Tensor, position_ids: Tensor, noise_seed: Tensor) -> Tensor:
        logits = self.model.policy_logits(e, position_ids=position_ids)[:, :-1]
        batch, steps, num_actions = logits.shape
        rows = batch * steps
        zero = torch.zeros(rows, dtype=torch.int64, device=e.device)
        index = torch.arange(steps, device=e.device).repeat(batch)
        seeds = noise_seed.repeat_interleave(steps)
        flat = logits.reshape(rows, num_actions)
        actions, _ = sample_actions(flat, torch.ones(rows, device=e.device), zero, seeds, index, zero - 1)
        return actions.view(batch, steps)

    def _counts(self, actions: Tensor) -> Tensor:
        return torch.bincount(actions, minlength=self.model.config.num_actions).float()

    @torch.no_grad()
    def correct(self, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
        """Is greedy decoding right? (B,) bool.

        Greedy decoding gives the reference answer if and only if, fed that answer, every argmax is its next token;
        so one forward tells, without generating.
        """
        if self.stage == "base":
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        else:
            e = self.model.encode(input_ids, attention_mask)
            logits = self.model.world_model_logits(e, self.model.policy_logits(e, attention_mask).argmax(-1))
        right = logits[:, :-1].argmax(-1) == input_ids[:, 1:]
        return (right | ~answer_mask[:, :-1]).all(-1)


def train_loop(config: Config, report: Report) -> None:
    """All stages, on every rank; leaves ``output_dir/model``, of a run that is stopped as far as it came.

    ``report(metrics)`` is a collective, and is true where the run is to stop.
    """
    rank = torch.distributed.get_rank()
    output = Path(config.output_dir)
    # With a corpus of its own and a base that brings its tokenizer, a run needs no task at all.
    needs_task = not config.data.path or not (config.model.base or config.model.path)
    task = to_pretrain_on(config.task, config.seed) if needs_task else None
    checkpoint = last_checkpoint(output)
    resumed = json.loads((checkpoint.folder / "notes.json").read_text())["stage"] if checkpoint else ""
    report.doing("making the model to start from")
    current, made = start_model(config, task, report)
    for stage in config.pretrain.stages:
        target = output / "stages" / stage
        made = made or not _is_done(target, report)
        if made:
            same = checkpoint.folder if checkpoint and resumed == stage else None
            checkpoint = None  # of this stage, or of one after it that is made anew
            if not _run_stage(config, stage, task, current, target, same, report):
                return
        current = target
    if rank == 0:
        _replace(current, output / "model")
    torch.distributed.barrier()


def _is_done(stage: Path, report: Report) -> bool:
    """Whether a stage has left its folder, whole; a collective. One that was damaged since is said, and made again."""
    found = [True]
    if torch.distributed.get_rank() == 0:
        found = [(stage / DONE).exists()]
        if found[0] and (fault := fault_of_stage(stage, DONE)):
            report.say(f"{stage}: {fault}; the stage is made again")
            found = [False]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def start_model(config: Config, task: Prompts | PlayedTask | None, report: Report) -> tuple[Path, bool]:
    """The directory that the first stage reads: the given base with CoLA attached, or a fresh tiny Llama.

    Returns whether it was made just now, too. A collective.
    """
    target = Path(config.output_dir) / "stages" / "start"
    made = not _is_done(target, report)
    if made and torch.distributed.get_rank() == 0:
        staging = _staging(target)
        if config.model.path:
            model: Any = CoLAForCausalLM.from_pretrained(config.model.path, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        elif config.model.base:
            model = attach(config, config.model.base)
            tokenizer = conversion.load_tokenizer(config.model.base)
        else:
            assert task is not None  # train_loop made one, since there is no base
            tokenizer = make_tokenizer(task)
            model = make_tiny_llama(len(tokenizer), tokenizer.eos_token_id, config.seed)
        conversion.save(model, tokenizer, staging)
        seal_stage(staging, DONE, {})
        _replace(staging, target)
    torch.distributed.barrier()
    return target, made


def attach(config: Config, base_path: str | Path) -> CoLAForCausalLM:
    sizes = config.model.model_dump(
        include={"num_actions", "num_idm_layers", "num_world_model_layers", "num_policy_layers"}
    )
    return conversion.attach(base_path, seed=config.seed, dtype=getattr(torch, config.model.dtype), **sizes)


def make_tokenizer(task: Prompts | PlayedTask) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 entries, trained on the task's own problems; numbers stay whole words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if isinstance(task, PlayedTask):
        texts = task.texts()
    else:
        texts = [text for p in task.problems("train") for text in (as_text(p.question), p.solution)]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_tiny_llama(vocab_size: int, eos_token_id: int, seed: int) -> LlamaForCausalLM:
    """A Llama of 0.85 M parameters; heads of 32, the least that vLLM serves on CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size + -vocab_size % 8,
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=OWN_BASE_POSITIONS,
                tie_word_embeddings=True,
                initializer_range=0.06,
                bos_token_id=None,
                eos_token_id=eos_token_id,
                pad_token_id=0,
            )
        )


# --- one stage ----------------------------------------------------------------------------------------------------


def _run_stage(
    config: Config,
    stage: PretrainStage,
    task: Prompts | PlayedTask | None,
    source: Path,
    target: Path,
    checkpoint: Path | None,
    report: Report,
) -> bool:
    """Whether the stage came to its end; one that is stopped leaves a checkpoint, and its model as the run's."""
    settings = config.pretrain
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    report.doing(f"{stage}: reading the corpus")
    tokenizer = AutoTokenizer.from_pretrained(source)
    chat = ChatTokenizer(tokenizer, config.data.date)
    rows = _load_rows(config, stage, task, chat)
    base_trains = stage == "base" or stage.startswith("fta")
    peak_lr = settings.base_lr if base_trains else settings.lr
    report.doing(f"{stage}: opening the model")
    module = StageModule(_open_model(config, stage, source), stage, config)
    bfloat16 = config.model.dtype == "bfloat16"
    zero = ZeroEngine(
        module, TRAINED[stage], lr=peak_lr, betas=settings.adam_betas, weight_decay=0.01, bfloat16=bfloat16
    )
    notes: dict[str, Any] = zero.load(checkpoint) if checkpoint else {"step": 0}
    first_step, used = notes["step"], torch.tensor(notes.get("used", [0.0] * config.model.num_actions))
    total = settings.num_steps(stage)
    before = sum(settings.num_steps(one) for one in settings.stages[: settings.stages.index(stage)])
    heldout = []
    if task is not None and not isinstance(task, PlayedTask) and _has_answers(config):
        heldout = list(_heldout_batches(task, chat, rank, world_size))
    report.doing(f"{stage}: the first step")
    metrics: dict[str, Any] = {}
    for step in range(first_step, total):
        started = time.perf_counter()
        lr = peak_lr * warmup_cosine(step, total, min(settings.warmup_steps, total), settings.min_lr_ratio)
        metrics, counts = _train_step(config, zero, rows, stage, step, lr)
        seconds = time.perf_counter() - started
        metrics |= {"stage": stage, "step": step + 1, "steps": total, f"{stage}/lr": lr, "time/step": seconds}
        metrics[f"{stage}/tokens_per_second"] = settings.batch_size * rows.input_ids.shape[1] / seconds
        used += counts
        if stage == "actions" and settings.revive_every and (step + 1) % settings.revive_every == 0:
            metrics["actions/revived"] = revive_dead_codes(module.model, used, _mixed(config.seed, step))
            used.zero_()
        last = step + 1 == total
        if heldout and stage in ("base", "policy") and ((step + 1) % 100 == 0 or last):
            metrics[f"{stage}/accuracy"] = _accuracy(zero, heldout)
        due = (step + 1) % settings.save_every == 0 and not last
        stop = report(metrics, due) and not last
        if due or stop:
            notes = {"stage": stage, "step": step + 1, "used": used.tolist()}
            save = functools.partial(zero.save, notes=notes)
            save_checkpoint(Path(config.output_dir), before + step + 1, save, report.fail)
        if stop:
            report.doing(f"{stage}: saving the model")
            _leave(config, stage, zero, source, Path(config.output_dir) / "model", tokenizer, metrics)
            return False
    report.doing(f"{stage}: saving the model")
    _leave(config, stage, zero, source, target, tokenizer, metrics)
    return True


def _train_step(
    config: Config, zero: ZeroEngine, rows: PackedRows, stage: PretrainStage, step: int, lr: float
) -> tuple[dict[str, Any], Tensor]:
    settings = config.pretrain
    wanted = rows.step_indices(config.seed, step, settings.batch_size)
    num_tokens = max(int(rows.loss_mask[wanted, :-1].sum()), 1)  # over all ranks: the loss's one denominator
    mine = wanted[zero.rank :: zero.world_size]
    sums: dict[str, Tensor] = {}
    starts = range(0, len(mine), settings.micro_batch_size)
    pieces = []
    for start in starts:
        picked = mine[start : start + settings.micro_batch_size]
        tensors = [torch.from_numpy(a[picked]) for a in (rows.input_ids, rows.position_ids, rows.loss_mask)]
        pieces.append([tensor.to(zero.device) for tensor in (*tensors, noise_seeds(config.seed, step, picked))])
    mean_usage = None
    if stage == "actions" and settings.balance_coef and len(pieces) > 1:
        mean_usage = torch.stack([zero.engine.module.usage(*piece) for piece in pieces]).sum(0)
        torch.distributed.all_reduce(mean_usage)
        mean_usage /= num_tokens
    for start, piece in zip(starts, pieces, strict=True):
        loss, found = zero(*piece, start == 0 and (step + 1) % 10 == 0, mean_usage)
        zero.backward(loss / num_tokens, last=start == starts[-1])
        for name, value in found.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
    grad_norm = zero.step(lr)
    for value in sums.values():
        torch.distributed.all_reduce(value)
    metrics: dict[str, Any] = {f"{stage}/loss": float(sums["loss"]) / num_tokens, f"{stage}/grad_norm": grad_norm}
    if "base_loss" in sums:
        metrics["actions/base_loss"] = float(sums["base_loss"]) / num_tokens
    if "states" in sums:
        metrics["actions/reachable_tokens"] = float(sums["reachable"] / sums["states"])
        metrics["actions/covered"] = float(sums["covered"] / sums["states"])
    counts = sums.get("counts", torch.zeros(config.model.num_actions)).cpu()
    return metrics | (usage(counts) if "counts" in sums else {}), counts


def noise_seeds(seed: int, step: int, rows: np.ndarray) -> Tensor:
    """Of these rows' draws in a step, (B,) int64: what a row draws depends on it and the step, not on its rank."""
    return torch.from_numpy(rows.astype(np.int64)) + _mixed(seed, step)


def _mixed(*numbers: int) -> int:
    """A seed of 62 bits for a place in a run."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def _mean_over_ranks(rows: Tensor) -> Tensor:
    """Of the (N, K) rows of all ranks: (K,), without gradient; all ranks call."""
    sums = torch.cat([rows.detach().double().sum(0), rows.new_full((1,), len(rows), dtype=torch.float64)])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return (sums[:-1] / sums[-1].clamp_min(1.0)).to(rows.dtype)


def revive_dead_codes(model: CoLAForCausalLM, counts: Tensor, seed: int) -> int:
    """Give codes that were never used the most used code's row, and its IDM logit row, plus a little noise.

    The most used code is thereby split, and training can tell the halves apart. All ranks call with the same
    arguments; works on ZeRO-3's full-precision copies. Returns how many codes were revived.
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
    config: Config, stage: PretrainStage, task: Prompts | PlayedTask | None, chat: ChatTokenizer
) -> PackedRows:
    settings = config.pretrain
    documents, are_pairs = load_documents(config.data, task, chat, settings.sequence_length)
    if stage.startswith("fta") and not are_pairs:
        raise ValueError(
            f"pretrain.stages: {stage} needs prompt/response pairs; data.path = {config.data.path!r} has text"
        )
    response_only = are_pairs and (settings.response_only or stage.startswith("fta"))
    pad = chat.tokenizer.pad_token_id or chat.end
    return pack(documents, settings.sequence_length, pad, response_only)


def _has_answers(config: Config) -> bool:
    """Tasks whose solution is the one right response, so that teacher forcing measures greedy accuracy."""
    return config.task.name not in ("gsm8k", "math500", "preference") and not config.data.path


def _heldout_batches(
    task: Prompts, chat: ChatTokenizer, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's share of 512 held-out problems: ids, attention mask, answer mask; every rank the same number."""
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


def _accuracy(zero: ZeroEngine, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    module = zero.engine.module
    right = torch.zeros(2)
    for batch in batches:
        correct = module.correct(*(tensor.to(zero.device) for tensor in batch))
        right += torch.tensor([float(correct.sum()), float(len(correct))])
    torch.distributed.all_reduce(right)
    return float(right[0] / right[1])


def _leave(
    config: Config,
    stage: PretrainStage,
    zero: ZeroEngine,
    source: Path,
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict,
) -> None:
    """Rank 0 writes the stage's model: the one it started from with the trained tensors in place. All ranks call."""
    published = [Published(name.removeprefix("model."), (parameter,)) for name, parameter in zero.trained]
    trained = {name: tensor.cpu().clone() for name, tensor in zero.stream(published)}
    zero.close()
    if zero.rank == 0:
        staging = _staging(target)
        model = _open_model(config, stage, source)
        model.load_state_dict(model.state_dict() | trained)
        conversion.save(model, tokenizer, staging)
        seal_stage(staging, DONE, metrics)
        _replace(staging, target)
    torch.distributed.barrier()


def _open_model(config: Config, stage: PretrainStage, source: Path) -> CoLAForCausalLM | LlamaForCausalLM:
    """What a stage starts from. Attaching is deterministic in the seed, so it may be done again."""
    dtype = getattr(torch, config.model.dtype)
    if stage == "base":
        return LlamaForCausalLM.from_pretrained(source, dtype=dtype)
    if json.loads((source / "config.json").read_text())["model_type"] == "llama":
        return attach(config, source)
    return CoLAForCausalLM.from_pretrained(source, dtype=dtype)


def _staging(target: Path) -> Path:
    staging = target.with_name(target.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def _replace(source: Path, target: Path) -> None:
    """Put ``source`` at ``target`` in one rename; ``source`` stays where it is not a staging folder."""
    if source.suffix != ".tmp":
        staging = _staging(target)
        shutil.copytree(source, staging, dirs_exist_ok=True)
        source = staging
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)
