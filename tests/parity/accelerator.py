"""Emulates on a CPU what vLLM does to a model only on a GPU; engines.py selects it for the engines of these tests.

    AcceleratorWorker      profiles before there is a cache, and again with two caches that are not the real one
      AcceleratorRunner    pads each step as for CUDA graphs and poisons the padding; overwrites what a step returned
                           when the next one runs, because graphs write into the same buffers each time
    IN_PLACE               the fused norm overwrites its input and its residual, as the CUDA kernel does
    piecewise              compiles like a GPU: pieces between attention calls, each through vLLM's own passes, which
                           decide what may be overwritten; then run as they are, because Inductor's C++ takes minutes

Not emulated, because it is the same on both: vLLM's rotary embedding works in place, its activations do not.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from vllm import ir
from vllm.compilation.backends import split_graph
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.passes.ir.inplace_functionalization import VllmIRInplaceFunctionalizationPass
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.config import CompilationConfig, get_current_vllm_config, set_current_vllm_config
from vllm.config.utils import Range
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

COMPILED = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 2,  # trace once, without guards
        "backend": f"{__name__}.piecewise",
        "custom_ops": ["all"],
        "ir_enable_torch_wrap": True,
        "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
    },
}
"""Additional engine arguments for a compiled engine."""
PADDED_TO = 8  # tokens; the sizes of vLLM's graphs from 8 on are multiples of 8
IN_PLACE = "in_place"

if IN_PLACE not in ir.ops.fused_add_rms_norm.impls:

    @ir.ops.fused_add_rms_norm.register_impl(IN_PLACE, inplace=True)
    def _fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual


class AcceleratorRunner(CPUModelRunner):
    """Runs a step as a CUDA graph would."""

    num_tokens = 0  # tokens of the step, without padding
    returned: Tensor | None = None  # the previous step's output

    def _determine_batch_execution_and_padding(self, num_tokens: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        mode, batch, *others = super()._determine_batch_execution_and_padding(num_tokens, *args, **kwargs)
        self.num_tokens = num_tokens
        padded = min(-(-num_tokens // PADDED_TO) * PADDED_TO, self.max_num_tokens)
        return mode, dataclasses.replace(batch, num_tokens=padded), *others

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.model_config.enforce_eager:
            self.get_model().model.embed_tokens.register_forward_hook(self._poison)

    def _poison(self, _: Any, __: Any, embedded: Tensor) -> None:
        embedded[self.num_tokens :] = torch.nan

    def _model_forward(self, input_ids: Tensor | None = None, **inputs: Any) -> Tensor:
        assert input_ids is not None
        if self.returned is not None:
            self.returned.fill_(torch.nan)
        if not self.model_config.enforce_eager:  # a hook would be traced, so use a row behind the vocabulary
            table = self.get_model().model.embed_tokens.weight
            table.data[-1] = torch.nan
            input_ids[self.num_tokens :] = len(table) - 1
        self.returned = super()._model_forward(input_ids, **inputs)
        assert self.returned[: self.num_tokens].isfinite().all(), "padding has leaked into a token's row"
        return self.returned

    @torch.inference_mode()
    def profile_with_cache(self, num_blocks: int) -> None:
        """Like ``profile_cudagraph_memory``: make a small cache, run with it, and drop it."""
        groups = get_kv_cache_groups(self.vllm_config, self.get_kv_cache_spec())
        with mock.patch.object(self.cache_config, "num_gpu_blocks_override", num_blocks):
            small = get_kv_cache_config_from_groups(self.vllm_config, groups, available_memory=0)
        self.initialize_kv_cache(small, is_profiling=True)
        self.cache_config.num_gpu_blocks = small.num_blocks
        self._dummy_run(min(32, self.max_num_tokens), force_attention=True)
        self._cleanup_profiling_kv_cache()


class AcceleratorWorker(cpu_worker.CPUWorker):
    """An engine process under the GPU's contract."""

    def init_device(self) -> None:
        with mock.patch.object(cpu_worker, "CPUModelRunner", AcceleratorRunner):
            super().init_device()
        ir.ops.fused_add_rms_norm.set_default([IN_PLACE])  # the next engine's worker sets its own

    def determine_available_memory(self) -> int:
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.profile_run()
            for num_blocks in (2, 5):
                self.model_runner.profile_with_cache(num_blocks)
        return super().determine_available_memory()


def piecewise(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend for ``torch.compile``: ``VllmBackend`` without Inductor."""
    config = get_current_vllm_config()
    split, items = split_graph(graph, list(CompilationConfig._attention_ops))
    for item in items:
        if not item.is_splitting_graph:
            inputs = [node.meta["example_value"] for node in item.graph.graph.find_nodes(op="placeholder")]
            setattr(split, item.submod_name, _Piece(through_passes(item.graph, inputs, config)))
    return split


class _Piece(torch.nn.Module):
    def __init__(self, compiled: Callable[..., Any]) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, *inputs: Any) -> Any:
        return self.compiled(*inputs)


def through_passes(piece: fx.GraphModule, inputs: Sequence[Any], config: Any) -> Callable[..., Any]:
    """One piece, interpreted after vLLM's passes before and after AOTAutograd."""
    passes = PostGradPassManager()
    passes.configure(config)
    # The last pass names kernels that a CPU build has not. It unwraps operators that write their results in place.
    passes.fix_functionalization = lambda graph: None

    def interpreted(lowered: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        passes(lowered.graph)
        lowered.recompile()
        return make_boxed_func(lowered.forward)

    with (
        pass_context(Range(1, config.scheduler_config.max_num_batched_tokens)),
        torch._inductor.config.patch(enable_auto_functionalized_v2=False),
    ):
        VllmIRInplaceFunctionalizationPass(config)(piece.graph)
        piece.recompile()
        return aot_module_simplified(piece, inputs, interpreted, decompositions=select_decomp_table())
