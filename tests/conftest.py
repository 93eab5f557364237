"""Small models and seeded draws for all tests, and quiet, single-threaded libraries."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: beside another test a run's processes would starve

import copy
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cola_ray import CoLAForCausalLM, registry
from cola_ray.model.modeling_cola import Linear32

# Emulations of a GPU on a CPU, in modules of vLLM that cannot be imported beside those for GPUs.
_EMULATIONS = ("accelerator", "async_engine", "tensor_parallel")
collect_ignore = [f"parity/test_{name}.py" for name in _EMULATIONS if torch.cuda.is_available()]
torch.set_num_threads(1)
VOCAB_SIZE, NUM_ACTIONS = 96, 16
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # as in a shell's background jobs; what tests start would inherit it
        signal.signal(number, handler)
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """What a fixture draws depends on nothing that ran before."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Nor does what a test draws: alone, in any order, the numbers are the same."""
    _seed()


def folder_of_ones_own(files: Mapping[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with these files, from which a job starts; what is imported from it is forgotten afterwards."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(registry, "_MODULE_OF", {})
    before = {*sys.modules}
    yield folder
    for name in {*sys.modules} - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def small_llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=tied, eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()  # fmt: skip


_SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 32}
BASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"rope_parameters": _LLAMA_3, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 64}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": _PLAIN, "full_attention": _LINEAR},
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "bos_token_id": 1}),
    "phi3": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
    ),
}
"""Small bases, by what is tested with them: model_type, and settings beside the usual sizes."""
GIVEN: dict[str, str] = {}
"""Families that ``--family`` names, by their model_type."""


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "a family of your own, which parity/test_bases.py then runs with those that are built in"
    parser.addoption("--family", metavar="MODEL_TYPE=FILE.py:NAME", help=what)


def pytest_configure(config: pytest.Config) -> None:
    if given := config.getoption("--family"):
        kind, _, path = given.partition("=")
        BASES.setdefault(kind, (kind, {}))
        GIVEN[kind] = path


def small_base(name: str) -> PreTrainedModel:
    """One of :data:`BASES` with random weights, all of them in use: norms, biases and scales too."""
    return random_base(*BASES[name])


def random_base(kind: str, settings: dict) -> PreTrainedModel:
    torch.manual_seed(0)
    model = scramble(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(_SIZES | settings))))
    embeddings = model.get_input_embeddings()
    if model.config.tie_word_embeddings:  # else the token that was read would always come next
        embeddings.weight.data *= 0.5 / float(getattr(embeddings, "embed_scale", 1.0))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def drawn_shape(kind: str, draw: random.Random, heads: Sequence[int] = (8, 16, 32)) -> dict:
    """Settings of a small base of a built-in family, for :func:`random_base`: all that its checkpoints differ in.

    Args:
        heads: sizes of heads to draw from.
    """
    layers, head, count = draw.randint(1, 3), draw.choice(heads), draw.choice([2, 4])
    shape = {
        "num_hidden_layers": layers, "num_attention_heads": count, "head_dim": head, "hidden_size": head * count,
        "num_key_value_heads": draw.choice([one for one in (1, 2, 4) if one <= count]),
        "intermediate_size": draw.choice([48, 96]), "tie_word_embeddings": draw.random() < 0.5,
        "rms_norm_eps": draw.choice([1e-6, 1e-3]), "rope_parameters": draw.choice([_PLAIN, _LINEAR, _YARN, _LLAMA_3]),
    }  # fmt: skip
    if kind not in ("qwen2", "smollm3"):  # of which heads are as wide as the hidden size allows
        shape["hidden_size"] = draw.choice([32, 64])
    if kind in ("llama", "gemma3_text", "smollm3"):
        shape["attention_bias"] = draw.random() < 0.5
    if kind in ("llama", "smollm3"):
        shape["mlp_bias"] = draw.random() < 0.5
    if kind == "mistral":
        shape["sliding_window"] = draw.choice([None, 4, 9])
    if kind == "gemma3_text":
        kinds = draw.choices(["sliding_attention", "full_attention"], k=layers)
        rope = {"full_attention": shape["rope_parameters"], "sliding_attention": _PLAIN}
        scale = {"query_pre_attn_scalar": draw.choice([head, 24])}
        shape |= {"layer_types": kinds, "sliding_window": draw.choice([4, 9]), "rope_parameters": rope} | scale
    if kind == "smollm3":
        shape |= {"no_rope_layers": draw.choices([0, 1], k=layers), "bos_token_id": 1}
        shape |= {"use_sliding_window": draw.random() < 0.5, "sliding_window": draw.choice([4, 9])}
    return shape


def scramble(model: PreTrainedModel, keep: tuple[str, ...] = ()) -> PreTrainedModel:
    """Weights large enough that actions, tokens and states all differ; those stay whose names begin with ``keep``."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not name.startswith(keep):
            scale = 1.0 if "embed" in name or "codebook" in name else 1.5 * parameter.shape[1] ** -0.5
            parameter.data.normal_(std=scale, generator=generator)
    return model


def assert_near(found: torch.Tensor, wanted: torch.Tensor, terms: int = 64) -> None:
    """Equal but for the order in which kernels add up, which shapes, threads and instruction sets choose.

    A sum of n products in float32 is off by at most n eps times the size of its partial sums.

    Args:
        terms: products in the longest sum; of the small models, the hidden size.
    """
    bound = terms * torch.finfo(torch.float32).eps * max(float(wanted.detach().abs().max()), 1.0)
    torch.testing.assert_close(found, wanted, atol=bound, rtol=0)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    small_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def cola(base_dir: Path) -> CoLAForCausalLM:
    """A CoLA model with random weights, all of them in use."""
    model = CoLAForCausalLM.attach(
        base_dir, num_actions=NUM_ACTIONS, num_idm_layers=1, num_world_model_layers=2, num_policy_layers=2
    )
    return scramble(model).eval()


def ending(model: CoLAForCausalLM) -> CoLAForCausalLM:
    """The same model, whose policy ends actions."""
    model = copy.deepcopy(model)
    model.config.learnt_ends = True
    head = Linear32(model.config.hidden_size, NUM_ACTIONS, bias=False)
    torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    model.policy.end_head = head
    return model.eval()


def letters(first: int = 0x4E00) -> PreTrainedTokenizerFast:
    """One character a token, for all of the vocabulary."""
    words = {chr(first + token): token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=chr(first)))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def words(**special: str) -> PreTrainedTokenizerFast:
    """One word a token, w3 to the last; the first three are <pad>, <s> and </s>.

    Args:
        special: further arguments of the tokenizer.
    """
    names = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{token}": token for token in range(3, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", **special)


@pytest.fixture(scope="session")
def cola_dir(cola: CoLAForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cola")
    cola.save_pretrained(path)
    return path


def on_ranks(function: Callable[..., None], size: int, *args: object) -> None:
    """Call ``function(rank, *args)`` in each of ``size`` processes that are one group, forked from this one."""
    together = (size, free_port(), function, args)
    torch.multiprocessing.start_processes(_as_rank, together, nprocs=size, start_method="fork")


def _as_rank(rank: int, size: int, port: int, function: Callable[..., None], args: Sequence[object]) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    function(rank, *args)
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def alone() -> Iterator[None]:
    """torch's process group with nobody else in it."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A learner's process group with nobody else in it."""
    import deepspeed

    from cola_ray.learner.engine import join_group

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    join_group("gloo")
    yield
    torch.distributed.destroy_process_group()
    deepspeed.comm.comm.cdb = deepspeed.utils.groups._WORLD_GROUP = None
