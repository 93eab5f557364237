"""Maps rows of a vLLM batch to requests, draws their actions and keeps them; and the processors of the V1 model runner.

request ─> RowTracker mirrors the batch (V1) ─┐
        ─> CoLAModelState / samplers (V2)     ├─> RowTable.draw ─┬─> CoLAForCausalLM.compute_logits: latent actions
                                              ┘        │         └─> TokenSampler: tokens of a plain base
                                                       v
                                                  ActionTable ─> read_actions, once a completion

If an action lasts n tokens (the model's ``action_every``), a row at a step between n s and n (s + 1) takes the action
that the table holds for step n s in the request's slot. So a request that was preempted, split into chunks or moved to
another row still finds the action that it chose. If the policy learns when actions end (``learnt_ends``), the table
holds the action of the step before, which may go on.

Nothing here waits for the device: everything that a step's control flow depends on is known on the host.
"""

import os
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config import ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from cola_ray.model.action_requests import LOWEST_LOG_PROB, SERVED_ARGS, TAKES_ACTIONS, UNSERVED, ActionRequest
from cola_ray.model.modeling_cola import held_or_new, sample_actions


class Rows(NamedTuple):
    """Settings of the N rows of ``compute_logits``, (N,) each as :func:`sample_actions` takes them, and addresses."""

    temperature: Tensor | None
    top_k: Tensor | None
    seed: Tensor
    position: Tensor
    forced: Tensor | None
    top_p: Tensor | None
    slot: Tensor | None  # int64, slot in the ActionTable; -1 is a row that nobody reads; None: no row keeps its action
    step: Tensor  # int64, index of the action within its completion
    held: Tensor | None = None  # int64, the action before the first step, -1 for none; None: no row has any


class ActionTable:
    """The action taken and its log-probability, for every step of each request that holds a slot.

    8 bytes a step: 512 requests of up to 3072 tokens are 12.6 MB, which vLLM's memory share does not count.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.table: Tensor | None = None  # (slots + 1, num_steps, 2) int32: action, and the bits of a float32

    def reserve(self, slot: int, device: torch.device) -> None:
        """Make sure that the table has a row for this slot. The last row receives actions that nobody reads."""
        held = 0 if self.table is None else len(self.table) - 1
        if slot < held:
            return
        grown = torch.zeros(max(64, 2 * held, slot + 1) + 1, self.num_steps, 2, dtype=torch.int32, device=device)
        if self.table is not None:
            grown[:held] = self.table[:held]
        self.table = grown

    def write(self, slot: Tensor, step: Tensor, actions: Tensor, log_probs: Tensor) -> None:
        """Keep actions (N,) and their log-probabilities (N,) float32."""
        assert self.table is not None
        bits = log_probs.clamp_min(LOWEST_LOG_PROB).view(torch.int32)
        self.table.index_put_((slot, step), torch.stack([actions.to(torch.int32), bits], -1))

    def read(self, slots: Sequence[int], num_steps: int) -> np.ndarray:
        """The first steps of some slots, (slots, num_steps, 2) int32, in one transfer."""
        assert self.table is not None
        chosen = async_tensor_h2d(list(slots), device=self.table.device, dtype=torch.int64)
        return self.table[chosen, :num_steps].cpu().numpy()


class Settings:
    """Settings of requests by index, on the host and, until a request arrives or moves, on the device."""

    def __init__(self, size: int) -> None:
        self.floats = np.zeros((2, size), np.float32)  # temperature, top_p
        self.floats[1] = 1.0
        self.integers = np.zeros((5, size), np.int64)  # top_k, seed, prompt length, slot, held action
        self.integers[3:] = -1
        self.forced: list[tuple[int, ...]] = [()] * size

    def put(self, index: int, request: ActionRequest, prompt_length: int) -> None:
        self.floats[:, index] = request.temperature, request.top_p
        self.integers[:, index] = request.top_k, request.seed, prompt_length, request.slot, request.held
        self.forced[index] = request.forced

    def move(self, source: int, target: int, swap: bool) -> None:
        for columns in (self.floats, self.integers):
            replaced = columns[:, target].copy()
            columns[:, target] = columns[:, source]
            if swap:
                columns[:, source] = replaced
        self.forced[source], self.forced[target] = self.forced[target] if swap else (), self.forced[source]

    def to(self, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
        """Return the settings of the first ``count`` requests: floats (2, count) and integers (5, count)."""
        # Copies, because on CPU the device's tensors would be these arrays.
        whole = async_tensor_h2d(self.integers[:, :count].copy(), device=device)
        return async_tensor_h2d(self.floats[:, :count].copy(), device=device), whole


class RowTable:
    """Which request owns which row of ``compute_logits``; one table per engine, by the instance id of its config."""

    _by_engine: ClassVar[dict[str, "RowTable"]] = {}

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.kept = ActionTable(vllm_config.model_config.max_model_len)
        self.every = action_every(vllm_config.model_config)
        self.settings = Settings(vllm_config.scheduler_config.max_num_seqs)  # V1: by row
        self.outputs: list[list[int]] = []  # V1: each row's tokens so far
        self.fixed: tuple[Tensor, Tensor] | None = None  # V1: settings on the device
        self.forcing: list[int] = []  # V1: rows with forced actions
        self.prepared: Rows | None = None  # V2: rows of the current step
        # Seeds for served requests without one. Tensor-parallel ranks share the id and see requests in the same order,
        # so they draw the same actions.
        self.seeds = random.Random(f"{vllm_config.instance_id}/{vllm_config.parallel_config.data_parallel_rank}")

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> "RowTable":
        if vllm_config.instance_id not in cls._by_engine:
            cls._by_engine[vllm_config.instance_id] = cls(vllm_config)
        return cls._by_engine[vllm_config.instance_id]

    @classmethod
    def forget(cls, instance_id: str) -> None:
        """Free the table of an engine that has shut down."""
        cls._by_engine.pop(instance_id, None)

    def draw(self, logits: Tensor, end_logits: Tensor | None = None) -> tuple[Tensor, Rows]:
        """Draw an action for each row of logits (N, K), keep it, and return the actions (N,) and the rows' settings.

        Args:
            end_logits: (N, K), if the policy learns when actions end.
        """
        rows = self.rows(len(logits), logits.device)
        if end_logits is not None:
            logits = held_or_new(logits, end_logits, self._held(rows))
        actions, log_probs = sample_actions(logits, *rows[:6])
        if rows.slot is None:
            return actions, rows
        if self.every > 1:
            assert self.kept.table is not None
            between = rows.step % self.every != 0
            held = self.kept.table[rows.slot, rows.step - rows.step % self.every, 0]
            actions, log_probs = torch.where(between, held.long(), actions), log_probs.masked_fill(between, 0.0)
        self.kept.write(rows.slot, rows.step, actions, log_probs)
        return actions, rows

    def _held(self, rows: Rows) -> Tensor | None:
        """The action of each row's step before, (N,); -1 where there is none."""
        if rows.slot is None:
            return None
        assert self.kept.table is not None
        before = self.kept.table[rows.slot, (rows.step - 1).clamp_min(0), 0].long()
        return torch.where(rows.step > 0, before, -1 if rows.held is None else rows.held)

    def rows(self, num_rows: int, device: torch.device) -> Rows:
        """Settings of all rows; if rows are unknown, as in profiling runs, draws are greedy and not kept."""
        if self.prepared is not None and len(self.prepared.seed) == num_rows:
            return self.prepared
        if not num_rows or len(self.outputs) != num_rows:
            zero = torch.zeros(num_rows, dtype=torch.int64, device=device)
            return Rows(None, None, zero, zero, None, None, None, zero)
        if self.fixed is None:
            self.fixed = self.settings.to(device, num_rows)
        steps = np.fromiter(map(len, self.outputs), np.int64, num_rows)
        (temperature, top_p), (top_k, seed, prompt_length, slot, held) = self.fixed
        step, forced = async_tensor_h2d(steps, device=device), self._forced(steps)
        return Rows(
            temperature if self.settings.floats[0, :num_rows].any() else None,
            top_k if self.settings.integers[0, :num_rows].any() else None,
            seed,
            prompt_length + (step - 1),
            None if forced is None else async_tensor_h2d(forced, device=device),
            top_p if (self.settings.floats[1, :num_rows] < 1).any() else None,
            slot if (self.settings.integers[3, :num_rows] >= 0).any() else None,
            step,
            held if (self.settings.integers[4, :num_rows] >= 0).any() else None,
        )

    def _forced(self, steps: np.ndarray) -> np.ndarray | None:
        """Forced actions of all rows at their steps; None if no row has any."""
        forced = None
        for row in self.forcing:
            actions = self.settings.forced[row]
            if steps[row] < len(actions):
                forced = np.full(len(steps), -1, np.int64) if forced is None else forced
                forced[row] = actions[steps[row]]
        return forced

    def mirror(self, outputs: list[list[int]], device: torch.device) -> None:
        """V1: take over the rows of a batch that has changed; :attr:`settings` already has their settings."""
        self.outputs, self.fixed = outputs, None
        self.forcing = [row for row, actions in enumerate(self.settings.forced[: len(outputs)]) if actions]
        if (highest := self.settings.integers[3, : len(outputs)].max(initial=-1)) >= 0:
            self.kept.reserve(int(highest), device)


def read_actions(model: Any, instance_id: str, slots: Sequence[int], num_steps: int) -> np.ndarray:
    """:meth:`ActionTable.read`, called through ``vllm.LLM.apply_model`` in an engine's processes."""
    return RowTable._by_engine[instance_id].kept.read(slots, num_steps)


class ServedActions:
    """Mixed into a server's workers by vLLM (``worker_extension_cls``)."""

    get_model: Callable[[], Any]

    def served_actions(self, slots: Sequence[int], num_steps: int) -> list[tuple[list[int], list[float]]]:
        """Actions and log-probabilities of the first steps of some slots."""
        # Use the model's own table: vLLM renews the configuration's instance id if the worker runs in the engine's
        # process.
        found = self.get_model().rows.kept.read(slots, num_steps)
        return [(one[:, 0].tolist(), one[:, 1].copy().view(np.float32).tolist()) for one in found]


def check_action_request(params: SamplingParams) -> None:
    """Refuse an invalid request to an engine that is used in training, under either model runner."""
    args = params.extra_args or {}
    if args.get("action_temperature", 1.0) < 0:
        raise ValueError("action_temperature: must be >= 0 (0 is greedy)")
    if not 0 < args.get("action_top_p", 1.0) <= 1:
        raise ValueError("action_top_p: must be above 0 and at most 1 (all actions)")
    if params.prompt_logprobs is not None:
        raise ValueError("prompt_logprobs: a prompt's positions have no actions to score; leave it unset")


def check_served_request(params: SamplingParams) -> None:
    """Refuse a request through OpenAI's API that asks for something meaningless, under either model runner."""
    neutral = {
        "min_p": (0.0, "CoLA draws latent actions by temperature, top_k and top_p"),
        "presence_penalty": (0.0, "a token follows from its latent action"),
        "frequency_penalty": (0.0, "a token follows from its latent action"),
        "repetition_penalty": (1.0, "a token follows from its latent action"),
        "prompt_logprobs": (None, "a prompt's positions have no actions to score"),
    }
    for name, (value, why) in neutral.items():
        found = getattr(params, name)
        if found and found != value:
            raise VLLMValidationError(f"{name} = {found}: {why}; leave it out", parameter=name, value=found)
    if set(params.extra_args or ()) - set(SERVED_ARGS if TAKES_ACTIONS in os.environ else ()):
        raise VLLMValidationError(
            f"extra_args = {params.extra_args}: a server takes no actions from its clients this way; leave it out",
            parameter="extra_args",
            value=params.extra_args,
        )
    if params.prompt_logprobs is not None:
        raise VLLMValidationError(f"prompt_logprobs: {neutral['prompt_logprobs'][1]}; leave out echo with logprobs")


def served_request(params: SamplingParams, seeds: random.Random) -> ActionRequest:
    """How a request through OpenAI's API draws; if it has no seed, one of ``seeds``. vLLM gives each of n its own."""
    seed = seeds.getrandbits(63) if params.seed is None else params.seed
    args: dict[str, Any] = {
        "action_temperature": params.temperature, "action_top_k": max(params.top_k, 0), "action_top_p": params.top_p
    }  # fmt: skip
    asked = params.extra_args or {}
    args["actions"] = asked.get("actions")
    if "action_slots" in asked:
        args["action_slot"] = asked["action_slots"][seed - asked["action_first_seed"]]
    return ActionRequest.from_params(args, seed)


# --- processors of the V1 model runner; vllm_slots.py has those of V2 -------------------------------------------------


class RowTracker(LogitsProcessor):
    """Leaves logits unchanged and mirrors V1's persistent batch."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check_action_request(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.table, self.device = RowTable.of(vllm_config), device
        self.outputs: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def action_request(self, params: SamplingParams) -> ActionRequest:
        return ActionRequest.from_params(params.extra_args, params.seed)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.outputs.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self.table.settings.put(index, self.action_request(params), len(prompt or ()))
            self.outputs[index] = output
        for source, target, way in batch_update.moved:
            swap = way is MoveDirectionality.SWAP and target in self.outputs
            self.table.settings.move(source, target, swap)
            moved, replaced = self.outputs.pop(source), self.outputs.pop(target, [])
            self.outputs[target] = moved
            if swap:
                self.outputs[source] = replaced
        self.table.mirror([self.outputs[index] for index in range(batch_update.batch_size)], self.device)


class TokenSampler(RowTracker):
    """Draws the token of each row of a plain base and leaves it as the only finite logit, which vLLM then takes.

    The draw is :func:`sample_actions` over the vocabulary, a pure function of seed and position, so it is the same
    under chunked prefill (where vLLM's seeded sampler differs on CPU), after a preemption, and in any batch.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: Tensor) -> Tensor:
        tokens, _ = self.table.draw(logits)
        return logits.fill_(float("-inf")).scatter_(1, tokens[:, None], 0.0)


class RequestSampler(RowTracker):
    """Samples for OpenAI's API and ``vllm serve`` as ``CoLAForCausalLM.generate`` does.

    ``temperature``, ``top_k``, ``top_p`` and ``seed`` apply to the latent action, whose most probable token is taken.
    ``logit_bias``, ``bad_words``, ``min_tokens`` and structured outputs change the token logits given the action.
    Returned log-probabilities are those of the token given the action, before these changes. :class:`ServedConfig`
    names this processor for every CoLA model, so plain ``vllm serve`` follows the rule, too.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check_served_request(sampling_params)

    def action_request(self, params: SamplingParams) -> ActionRequest:
        return served_request(params, self.table.seeds)

    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: Tensor) -> Tensor:
        """Leave only the most probable token, so that vLLM takes it at any temperature."""
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter_(1, best, 0.0)


_PROCESSORS = {
    "tracker": (f"{__name__}:RowTracker", "cola_ray.model.vllm_slots:SlotTracker"),
    "tokens": (f"{__name__}:TokenSampler", "cola_ray.model.vllm_slots:SlotTokenSampler"),
    "served": (f"{__name__}:RequestSampler", "cola_ray.model.vllm_slots:SlotRequestSampler"),
}
"""Processors for V1 and V2, by use: a CoLA model in training, a plain base in training, a CoLA model behind OpenAI's
API."""


def processor(use: str) -> str:
    """Import path for an engine's ``logits_processors``, for the model runner that this process will use."""
    return _PROCESSORS[use][os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"]


def settle_vllm() -> None:
    """Choose this process's model runner and real float32 arithmetic, unless the environment sets them.

    V2 on GPUs and V1 on CPUs: V2's kernels are written in Triton, which has no CPU backend in the pinned versions.
    By default Triton multiplies float32 matrices in TF32, also in vLLM's attention. On an H100, completions of 128
    tokens then equal PyTorch's in 3 of 16 cases, and in all 16 without TF32 (docs/benchmarks.md).
    """
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1" if current_platform.is_cuda_alike() else "0")


def action_every(model_config: ModelConfig) -> int:
    """Number of tokens that an action of the model lasts; 1 for a plain base."""
    return int(getattr(model_config.hf_config, "action_every", 1))


class ServedConfig(VerifyAndUpdateConfig):
    """Settings that vLLM applies to every CoLA model that it serves."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        settle_vllm()
        if not model_config.logits_processors:  # engines used in training pass their own
            if lasting := getattr(model_config.hf_config, "lasting", ""):
                raise ValueError(f"{lasting}: {UNSERVED}")
            model_config.logits_processors = [processor("served")]

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative_config: drafts are accepted by token probabilities, which CoLA does not draw")
