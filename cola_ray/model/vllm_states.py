"""Keeps e of every cached position, as one more layer of vLLM's key/value cache.

    engine starts    get_kv_cache_spec ─> vLLM counts H values a token beside keys and values, within its memory share
    cache is made    bind_kv_cache(blocks) for each size that vLLM profiles with, and then for the real one
    every step       write(e) ─> slots of the step's tokens, the same as those of their keys and values
    a request ends   read(its blocks, length)

The layer's cache specification is that of full attention with a "key" of width H and no "value", so vLLM puts it into
the group of the attention layers: one block table, one slot per token. (vLLM's own ``HiddenStateCacheSpec`` gets a
separate block table.) Blocks therefore exist before CUDA graphs are captured, at the addresses that the graphs use;
they sleep and wake with the cache; and requests that share a block share its states. Prefix caching, chunked prefill
and preemption need no special treatment, and since the base is frozen, states stay valid across weight updates.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.extract_hidden_states import (
    CacheOnlyAttentionBackend,
    CacheOnlyAttentionMetadataBuilder,
)
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec


class StateMetadataBuilder(CacheOnlyAttentionMetadataBuilder):
    """Declares that writing states is compatible with a CUDA graph of the whole model."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS


class StateBackend(CacheOnlyAttentionBackend):
    """Declares the builder above; nothing is computed from states, so there is no kernel."""

    @staticmethod
    def get_name() -> str:
        return "COLA_STATES"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        return StateMetadataBuilder


class StateStore(AttentionLayerBase):
    """The layer of the cache that holds e.

    With ``rl.cache_hidden_states`` the engine returns states with the tokens, and the learner holds no base. This costs
    H values per token in transit and saves 2 x base parameters FLOPs: for Llama-3.1-8B in bfloat16, 8 KB against 16
    GFLOP, so it pays above 0.2 GB/s at 400 TFLOP/s. It is off by default because it fills host memory: 64 groups of 4
    with 2000 tokens are 4 GB per step. In the cache, a token then takes 8 KB in addition to its 136 KB of keys and
    values (34 layers).

    Args:
        hidden: width of e.
        name: of this layer; like the name of any layer with a cache, it contains a unique integer.
    """

    def __init__(self, vllm_config: VllmConfig, hidden: int, name: str) -> None:
        self.dtype, self.hidden, self.name = vllm_config.model_config.dtype, hidden, name
        self.cache_config = vllm_config.cache_config
        self.kv_cache = torch.empty(0)  # (blocks, 1, tokens per block, H), once vLLM has bound it
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[StateBackend]:
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.hidden,
            head_size_v=0,
            dtype=self.dtype,
        )

    def write(self, e: Tensor) -> None:
        """Keep the states of a step's tokens, (N, H). Without a cache, as in vLLM's first profiling run, do nothing."""
        mappings: Any = get_forward_context().slot_mapping
        slots = mappings.get(self.name) if mappings else None
        if slots is None or not self.kv_cache.numel():
            return
        # Padded rows have slot -1. They go to block 0, which vLLM gives to no request.
        slots = slots[: e.shape[0]].long().clamp_min(0)
        size = self.kv_cache.shape[2]
        self.kv_cache[slots // size, 0, slots % size] = e[: len(slots)]

    def read(self, blocks: list[int], length: int) -> np.ndarray:
        """(length, H) states of a sequence whose cache lies in ``blocks``; bfloat16 as int16 bits, for NumPy."""
        device, width, size = self.kv_cache.device, self.cache_config.block_size, self.kv_cache.shape[2]
        starts = torch.tensor(blocks, device=device) * width
        slots = (starts[:, None] + torch.arange(width, device=device)).flatten()[:length]
        states = self.kv_cache[slots // size, 0, slots % size].cpu()
        return (states.view(torch.int16) if states.dtype is torch.bfloat16 else states).numpy()
