"""The model that pre-training starts from: the given base, alone or with CoLA attached, or a new small Llama.

Attaching and making are deterministic in the seed, so either may be repeated.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cola_ray.learner.engine import Report
from cola_ray.learner.stage_folder import finish, is_done, staging_for
from cola_ray.model import conversion
from cola_ray.model.modeling_cola import CoLAForCausalLM
from cola_ray.settings.config import Config
from cola_ray.settings.training import OWN_BASE_POSITIONS, SIZES
from cola_ray.tasks import PlayedTask, Prompts
from cola_ray.tasks.chat import as_text


def start_model(config: Config, task: Prompts | PlayedTask | None, report: Report) -> tuple[Path, bool]:
    """Make the directory that the first stage reads: the given base, or a new tiny Llama.

    CoLA is attached to the base here, unless the first stage trains the base by itself.

    Also returns whether it was made just now. A collective.
    """
    target = Path(config.output_dir) / "stages" / "start"
    made = not is_done(target, report)
    if made and torch.distributed.get_rank() == 0:
        staging = staging_for(target)
        if config.model.path:
            model: Any = CoLAForCausalLM.from_pretrained(config.model.path, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        elif config.model.base:
            alone = config.pretrain.stages[0] == "base"
            dtype, family = getattr(torch, config.model.dtype), config.model.family
            base = config.model.base
            model = conversion.load_base(base, dtype, family) if alone else attach(config, base)
            tokenizer = conversion.load_tokenizer(base)
        else:
            assert task is not None  # train_loop made one, since there is no base
            tokenizer = make_tokenizer(task)
            model = make_tiny_llama(len(tokenizer), tokenizer.eos_token_id, config.seed)
        conversion.save(model, tokenizer, staging)
        finish(staging, target, {})
    torch.distributed.barrier()
    return target, made


def attach(config: Config, base_path: str | Path) -> CoLAForCausalLM:
    sizes = config.model.model_dump(include=set(SIZES))
    dtype, family = getattr(torch, config.model.dtype), config.model.family
    return conversion.attach(base_path, seed=config.seed, dtype=dtype, family=family, **sizes)


def attached(config: Config, source: Path) -> Path:
    """A new directory with ``source`` and CoLA around it; ``source`` itself if it already has CoLA.

    A collective.
    """
    if json.loads((source / "config.json").read_text())["model_type"] == "cola":
        return source
    target = source.with_name("attached")
    if torch.distributed.get_rank() == 0:
        staging = staging_for(target)
        conversion.save(attach(config, source), conversion.load_tokenizer(source), staging)
        finish(staging, target, {})
    torch.distributed.barrier()
    return target


def make_tokenizer(task: Prompts | PlayedTask) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 entries, trained on the task's own problems; each number is one word for it."""
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
    """A Llama of 0.85 M parameters; its heads have width 32, the least that vLLM serves on CPU."""
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
