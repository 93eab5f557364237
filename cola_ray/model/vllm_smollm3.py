"""SmolLM3's layers for vLLM: a Llama's, some of them without rotary embedding. vLLM by itself would serve this family
through transformers' modules."""

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import extract_layer_index


class Unrotated(nn.Module):
    """Replaces a rotary embedding and leaves queries and keys unchanged."""

    def forward(self, positions: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return queries, keys


class SmolLM3Attention(LlamaAttention):
    """Attention of a layer, with a rotary embedding where ``config.no_rope_layers`` has a 1."""

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        if not config.no_rope_layers[extract_layer_index(prefix)]:
            self.rotary_emb = Unrotated()


class SmolLM3DecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=SmolLM3Attention)


class SmolLM3Model(LlamaModel):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SmolLM3DecoderLayer)


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """A plain base, for RL over tokens. vLLM's own way would modify transformers' classes for the whole process."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> SmolLM3Model:
        return SmolLM3Model(vllm_config=vllm_config, prefix=prefix)
