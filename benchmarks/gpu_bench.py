"""Shared by the measurements of benchmarks/gpu.py: models by size, timing, and figures with their floor."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from record import ROOT
from torch import Tensor
from transformers.modeling_utils import local_torch_dtype

from cola_ray.studies.planned_time import Gpu

REPEATS = 5
_LLAMA = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False}
_ACTIONS = {"num_actions": 64, "num_idm_layers": 4, "num_world_model_layers": 2, "num_policy_layers": 8}


@dataclass(frozen=True)
class Size:
    """A model's shape, and a micro-batch's rows x tokens."""

    shape: dict[str, Any]
    rows: int
    tokens: int


SIZES = {
    "8b": Size(_LLAMA | _ACTIONS | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
                                    "num_attention_heads": 32}, 4, 2048),
    "1b": Size(_LLAMA | _ACTIONS | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                                    "num_attention_heads": 16}, 4, 2048),
    "toy": Size({"vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False,
                 "num_actions": 16, "num_idm_layers": 1, "num_world_model_layers": 1, "num_policy_layers": 1}, 4, 32),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A measured number, and what it is compared with."""

    name: str
    value: float
    unit: str
    against: str = ""  # what the share is of
    share: float | str = ""


@dataclass(frozen=True)
class Bench:
    """Device and size of the measurements."""

    device: torch.device
    name: str  # the size's
    card: str
    sheet: Gpu | None  # the card's data sheet, if known
    known: dict[str, Any]  # rows measured before
    file: Path

    @property
    def size(self) -> Size:
        return SIZES[self.name]

    def seconds(self, action: Callable[[], object], repeats: int = REPEATS) -> float:
        """Median duration after a warm-up."""
        times = []
        for _ in range(repeats + 1):
            self.wait()
            started = time.perf_counter()
            action()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def of_bytes(self, name: str, seconds: float, moved: float) -> Figure:
        share = moved / seconds / (self.sheet.bandwidth_gbs * 1e9) if self.sheet else ""
        return Figure(name, seconds * 1e3, "ms", f"{moved / 1e9:.3g} GB of memory read or written", share)

    def of_flops(self, name: str, seconds: float, flops: float) -> Figure:
        share = flops / seconds / (self.sheet.tflops * 1e12) if self.sheet else ""
        return Figure(name, seconds * 1e3, "ms", f"{flops / 1e12:.3g} TFLOP; the share is MFU", share)

    def peak(self, action: Callable[[], object]) -> float | None:
        """Peak of allocated bytes during the action, including what was allocated before; None on a CPU."""
        if self.device.type != "cuda":
            action()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        action()
        return float(torch.cuda.max_memory_allocated(self.device))

    def model(self, dtype: torch.dtype = torch.bfloat16, **changes: int) -> Any:
        """A CoLA model with random weights, on the device."""
        from cola_ray.model.modeling_cola import CoLAConfig, CoLAForCausalLM

        torch.manual_seed(0)
        with self.device, local_torch_dtype(dtype):
            return CoLAForCausalLM(CoLAConfig(**(self.size.shape | changes), max_position_embeddings=8192))

    def sizes(self) -> Any:
        """The model's sizes for the plan's formulas."""
        from cola_ray.settings.config import override
        from cola_ray.settings.presets import preset
        from cola_ray.studies import planned_work

        paper = override(preset("llama-3.1-8b"), {f"model.{name}": self.size.shape[name] for name in _ACTIONS})
        with mock.patch.dict(planned_work._KNOWN, {paper.model.base: self.size.shape}):
            return planned_work.sizes(paper)

    def saved(self, dtype: torch.dtype, plain: bool = False, **changes: int) -> str:
        """A directory with a random CoLA model, or its base alone; made once, below outputs/gpu."""
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = self.size.shape | changes
        name = "-".join([self.name, "llama" if plain else "cola", str(dtype).removeprefix("torch."),
                         f"{shape['num_hidden_layers']}x{shape['hidden_size']}"])  # fmt: skip
        folder = ROOT / "outputs" / "gpu" / name
        if not (folder / "config.json").is_file():
            if plain:
                known = {key: value for key, value in shape.items() if key not in _ACTIONS}
                config = LlamaConfig(**known, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None)
                torch.manual_seed(0)
                with self.device, local_torch_dtype(dtype):
                    model: Any = LlamaForCausalLM(config)
            else:
                model = self.model(dtype, **changes)
            model.save_pretrained(folder)
            del model
            self.free()
        return str(folder)

    def free(self) -> None:
        """Free the device's cached memory for an engine in this process."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tokens(self) -> Tensor:
        shape = (self.size.rows, self.size.tokens)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, self.size.shape["vocab_size"], shape, generator=generator).to(self.device)


Measurement = Callable[[Bench], Iterator[Figure]]
