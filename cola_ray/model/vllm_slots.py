"""The counterpart of vllm_rows.py for vLLM's V2 model runner, which identifies a request by its own slot, not by a row.

    add_request(index) ─> SlotSettings ─> rows(index and position of each) ─┬─> CoLAModelState: before compute_logits
                                                                            └─> SlotTokenSampler: as a processor

Positions come from the device, so a step can be prepared before the one before it has ended (asynchronous scheduling).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from cola_ray.model.action_requests import ActionRequest
from cola_ray.model.vllm_rows import (
    Rows,
    RowTable,
    Settings,
    check_action_request,
    check_served_request,
    served_request,
)


class SlotSettings:
    """Settings of the requests in V2's slots; those of a step's rows are gathered on the device."""

    def __init__(self, table: RowTable, num_slots: int, device: torch.device) -> None:
        self.table, self.device = table, device
        self.settings = Settings(num_slots)
        self.on_device: tuple[Tensor, Tensor] | None = None
        self.forced = torch.full((num_slots, 0), -1, dtype=torch.int64, device=device)  # grows with the longest
        self.known = torch.zeros(num_slots, dtype=torch.int64, device=device)

    def add_request(self, index: int, request: ActionRequest, prompt_length: int, known: int) -> None:
        """Put a request into a slot, replacing what was there.

        Args:
            known: number of its tokens that are to be read before the next one is drawn: those of the prompt and, after
                a preemption, those already drawn.
        """
        self.settings.put(index, request, prompt_length)
        self.known[index : index + 1] = async_tensor_h2d([known], self.device, torch.int64)
        self.on_device = None
        if request.slot >= 0:
            self.table.kept.reserve(request.slot, self.device)
        length, held = len(request.forced), self.forced.shape[1]
        if length > held:
            more = max(length, 2 * held) - held
            self.forced = torch.cat([self.forced, self.forced.new_full((len(self.forced), more), -1)], 1)
        if self.forced.shape[1]:
            self.forced[index] = -1
        if length:
            self.forced[index, :length] = async_tensor_h2d(list(request.forced), self.device, torch.int64)

    def rows(self, index: Tensor, index_on_host: np.ndarray, position: Tensor) -> Rows:
        """Settings of rows, given their requests' slots (N,) and their positions (N,)."""
        if self.on_device is None:
            self.on_device = self.settings.to(self.device, len(self.settings.forced))
        index, position = index.long(), position.long()
        temperature, top_p = self.on_device[0][:, index]
        top_k, seed, prompt_length, slot, held = self.on_device[1][:, index]
        step = position - (prompt_length - 1)
        settings, used = self.settings, position >= self.known[index] - 1  # vLLM drops draws amid known tokens
        return Rows(
            temperature if settings.floats[0, index_on_host].any() else None,
            top_k if settings.integers[0, index_on_host].any() else None,
            seed,
            position,
            self._forced(index, step) if any(settings.forced[one] for one in index_on_host.tolist()) else None,
            top_p if (settings.floats[1, index_on_host] < 1).any() else None,
            torch.where(used, slot, -1) if (settings.integers[3, index_on_host] >= 0).any() else None,
            step.clamp_min(0),
            held if (settings.integers[4, index_on_host] >= 0).any() else None,
        )

    def _forced(self, index: Tensor, step: Tensor) -> Tensor:
        last = self.forced.shape[1] - 1
        found = self.forced[index, step.clamp(0, last)]
        return torch.where((step >= 0) & (step <= last), found, -1)


class CoLAModelState(DefaultModelState):
    """Prepares the rows of ``compute_logits``; :class:`~cola_ray.model.vllm_cola.CoLAForCausalLM` names this class."""

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.table = RowTable.of(vllm_config)
        self.slots = SlotSettings(self.table, self.max_num_reqs, device)
        self.served = vllm_config.model_config.logits_processors == [f"{__name__}:SlotRequestSampler"]

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        if self.served:
            request = served_request(params, self.table.seeds)
        else:
            request = ActionRequest.from_params(params.extra_args, params.seed)
        self.slots.add_request(req_index, request, new_req_data.prompt_len, len(new_req_data.prefill_token_ids))

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        position = input_batch.positions[input_batch.logits_indices]
        self.table.prepared = self.slots.rows(input_batch.idx_mapping, input_batch.idx_mapping_np, position)
        return super().prepare_inputs(input_batch, req_states)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        self.table.prepared = None
        return super().prepare_dummy_inputs(num_reqs, num_tokens)


class SlotTracker(LogitsProcessor):
    """Only checks requests; :class:`CoLAModelState` keeps track of them."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check_action_request(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        return logits


class SlotTokenSampler(LogitsProcessor):
    """:class:`~cola_ray.model.vllm_rows.TokenSampler` for V2."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check_action_request(sampling_params)

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self.req_states = req_states
        self.table = RowTable.of(vllm_config)
        self.slots = SlotSettings(self.table, req_states.max_num_reqs, req_states.device)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        request = ActionRequest.from_params(sampling_params.extra_args, sampling_params.seed)
        lengths = (self.req_states.prompt_len, self.req_states.prefill_len)
        self.slots.add_request(req_idx, request, *(int(one.np[req_idx]) for one in lengths))
        return True

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        self.table.prepared = self.slots.rows(ctx.expanded_idx_mapping, ctx.idx_mapping_np, ctx.pos)
        tokens, _ = self.table.draw(logits)
        return logits.fill_(float("-inf")).scatter_(1, tokens[:, None], 0.0)


class SlotRequestSampler(LogitsProcessor):
    """:class:`~cola_ray.model.vllm_rows.RequestSampler` for V2; :class:`CoLAModelState` knows how requests draw."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check_served_request(sampling_params)

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        best = logits.argmax(-1, keepdim=True)
        return logits.fill_(float("-inf")).scatter_(1, best, 0.0)
