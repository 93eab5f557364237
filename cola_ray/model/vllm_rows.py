"""Maps rows of a vLLM batch to requests, and draws tokens in place of vLLM's sampler.

request ─> RowTracker mirrors the batch ─> RowTable ─┬─> CoLAForCausalLM.compute_logits draws latent actions
                                                     └─> TokenSampler draws tokens of a plain Llama
"""

import os
import secrets
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from cola_ray.model.action_columns import LOWEST_LOG_PROB, ActionRequest
from cola_ray.model.modeling_cola import sample_actions

ROW_TRACKER, TOKEN_SAMPLER = f"{__name__}:RowTracker", f"{__name__}:TokenSampler"
"""Import paths for an engine's ``logits_processors``: for a CoLA model, and for a plain Llama."""
REQUEST_SAMPLER = f"{__name__}:RequestSampler"
"""The same for a CoLA model that is served through OpenAI's API."""


class RowTable:
    """Which request owns which row of ``compute_logits``; one table per engine, by the instance id of its config."""

    _by_engine: ClassVar[dict[str, "RowTable"]] = {}

    def __init__(self) -> None:
        self.requests: list[tuple[ActionRequest, int, list[int]]] | None = None  # V1: request, prompt length, output
        self.on_device: tuple[Tensor, ...] | None = None  # V2: the result of params

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> "RowTable":
        return cls._by_engine.setdefault(vllm_config.instance_id, cls())

    def params(self, num_rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """temperature, top_k, seed, position, forced action: each (N,). Greedy if rows are unknown (profiling runs)."""
        if self.on_device is not None and self.on_device[0].shape[0] == num_rows:
            return self.on_device
        if self.requests is None or len(self.requests) != num_rows:
            zero = torch.zeros(num_rows, dtype=torch.int64, device=device)
            return zero.float(), zero, zero, zero, zero - 1
        temperature = np.empty(num_rows, np.float32)
        integers = np.empty((4, num_rows), np.int64)
        for row, (request, prompt_length, output) in enumerate(self.requests):
            step = len(output)
            temperature[row] = request.temperature
            forced = request.forced[step] if step < len(request.forced) else -1
            integers[:, row] = request.top_k, request.seed, prompt_length - 1 + step, forced
        columns = torch.from_numpy(integers).to(device, non_blocking=True)
        return torch.from_numpy(temperature).to(device, non_blocking=True), *columns.unbind(0)


class RowTracker(LogitsProcessor):
    """For the V1 model runner: a logits processor that leaves logits unchanged and mirrors the persistent batch."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        args = sampling_params.extra_args or {}
        if args.get("action_temperature", 1.0) < 0:
            raise ValueError("action_temperature: must be >= 0 (0 is greedy)")
        if sampling_params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: a prompt's positions have no actions to score; leave it unset")

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.table = RowTable.of(vllm_config)
        self.rows: dict[int, tuple[ActionRequest, int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    @staticmethod
    def action_request(params: SamplingParams) -> ActionRequest:
        return ActionRequest.from_params(params.extra_args, params.seed)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        rows = self.rows
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            rows[index] = (self.action_request(params), len(prompt or ()), output)
        for source, target, way in batch_update.moved:
            moved, replaced = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if replaced is not None and way is MoveDirectionality.SWAP:
                rows[source] = replaced
        self.table.requests = [rows[index] for index in range(batch_update.batch_size)]


class TokenSampler(RowTracker):
    """Draws the token of each row and leaves it as the only finite logit, whose value is its log-probability.

    vLLM then takes the greedy token and returns its logit (``logprobs_mode="processed_logits"``). The draw is
    :func:`sample_actions` over the vocabulary, a pure function of seed and position, so it is the same under chunked
    prefill (where vLLM's seeded sampler differs on CPU), after a preemption, and in any batch.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: Tensor) -> Tensor:
        tokens, log_probs = sample_actions(logits, *self.table.params(logits.shape[0], logits.device))
        logits.fill_(float("-inf"))
        return logits.scatter_(1, tokens[:, None], log_probs.clamp_min(LOWEST_LOG_PROB)[:, None].to(logits.dtype))


class RequestSampler(RowTracker):
    """For requests through OpenAI's API and ``vllm serve``, by the rule of ``CoLAForCausalLM.generate``.

    ``temperature``, ``top_k`` and ``seed`` apply to the latent action, whose most probable token is taken.
    ``logit_bias``, ``bad_words``, ``min_tokens`` and structured outputs change the token logits given the action.
    Returned log-probabilities are those of the token given the action, before these changes. :class:`ServedConfig`
    names this processor for every CoLA model, so plain ``vllm serve`` follows the rule, too.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        neutral = {
            "top_p": (1.0, "CoLA draws latent actions by temperature and top_k"),
            "min_p": (0.0, "CoLA draws latent actions by temperature and top_k"),
            "presence_penalty": (0.0, "a token follows from its latent action"),
            "frequency_penalty": (0.0, "a token follows from its latent action"),
            "repetition_penalty": (1.0, "a token follows from its latent action"),
            "prompt_logprobs": (None, "a prompt's positions have no actions to score"),
            "extra_args": (None, "a server takes no actions from its clients"),
        }
        for name, (value, why) in neutral.items():
            found = getattr(sampling_params, name)
            if found and found != value:
                raise VLLMValidationError(f"{name} = {found}: {why}; leave it out", parameter=name, value=found)
        if sampling_params.prompt_logprobs is not None:
            raise VLLMValidationError(f"prompt_logprobs: {neutral['prompt_logprobs'][1]}; leave out echo with logprobs")

    @staticmethod
    def action_request(params: SamplingParams) -> ActionRequest:
        """A request without a seed gets a random one; with a seed, vLLM gives each of n completions its own."""
        seed = secrets.randbits(63) if params.seed is None else params.seed
        args = {"action_temperature": params.temperature, "action_top_k": max(params.top_k, 0)}
        return ActionRequest.from_params(args, seed)

    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: Tensor) -> Tensor:
        """Leave only the most probable token, so that vLLM takes it at any temperature."""
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter_(1, best, 0.0)


class ServedConfig(VerifyAndUpdateConfig):
    """Settings that vLLM applies to every CoLA model that it serves."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        if not model_config.logits_processors:  # engines used in training pass their own
            model_config.logits_processors = [REQUEST_SAMPLER]
        # Logits processors of the V2 model runner have a different interface.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative_config: drafts are accepted by token probabilities, which CoLA does not draw")
        vllm_config.scheduler_config.async_scheduling = False  # a row's position comes from the length of its output
