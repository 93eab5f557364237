"""One in-process vLLM engine: prompt ids in; tokens, actions and log-probabilities out.

    submit(request) ... ─> step() ─> {request id: completion}     continuous batching: submit at any time between steps
                             │
                     update_weights(version, buckets)              between two steps; requests in flight carry on

    LatentEngine   serves a CoLA checkpoint: actions are latent codes, and updates replace the policy
    TokenEngine    serves a plain base: actions are tokens, and updates replace all weights, or only those that
                   LoRA adapters change

A request in flight at an update keeps the tokens that it has. The key/value entries of the updated layers are stale, so
vLLM preempts the request and recomputes them with the new weights. ``Completion.versions`` records which version of the
policy chose each action.

On GPUs vLLM schedules asynchronously: when ``step`` returns the results of one forward pass, the next pass is already
under way. An update is queued on the device behind that pass. vLLM drops the pass's tokens and draws them again with
the new weights, so a new version begins after the tokens that the scheduler has recorded for a request. vLLM turns
asynchronous scheduling off on CPUs, where there is nothing to overlap with.
"""

import abc
import dataclasses
import functools
import heapq
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cola_ray.model.action_requests import sampling_args
from cola_ray.rollout.weight_loading import (
    Loader,
    load_base,
    load_buckets,
    load_policy,
    load_projections,
    load_soft_q,
    load_vectors,
    receive_broadcast,
)
from cola_ray.tasks.endings import Endings
from cola_ray.weights import Bucket, Offer, WeightTransferError


@dataclass(frozen=True)
class Request:
    """One prompt to complete, and how to sample."""

    prompt_ids: Sequence[int]
    seed: int
    temperature: float
    top_k: int
    max_new_tokens: int
    actions: Sequence[int] = ()  # forced at the first steps, in place of sampled ones
    stop: Sequence[str] = ()  # strings that end the completion, in addition to the engine's end tokens
    response_prefix: int = 0  # how many of the prompt's last tokens already belong to the response
    top_p: float = 1.0
    held: int = -1  # the action at the prompt's last token, which may go on if the model's actions have learnt ends


@dataclass
class _InFlight:
    request: Request
    engine_id: str  # vLLM's own id of the request
    slot: int  # of the table that keeps its actions
    versions: list[tuple[int, int]]  # (first output position that it chose, policy version), ascending
    settled: "Completion | None" = None  # finished except for its states, which this request computes again

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)


@dataclass(frozen=True)
class Completion:
    """What the engine generated for one request: L tokens after a prompt of P."""

    token_ids: np.ndarray  # (L,) int64; includes the end token, or the tokens of the stop string
    actions: np.ndarray  # (L,) int64
    # (L,) float32, of the actions, under the distribution from which they were sampled; 0 where an action is held
    log_probs: np.ndarray
    versions: np.ndarray  # (L,) int64, the policy version that chose each action
    truncated: bool  # cut by the token limit rather than stopped
    hidden_states: np.ndarray | None  # (P + L - 1, H): e, if the engine keeps it; bfloat16 is stored as int16
    computed_tokens: int = 0  # P + L, minus the prompt tokens that the prefix cache held


def as_float(states: np.ndarray) -> np.ndarray:
    """Return a completion's hidden states as float32."""
    if states.dtype == np.int16:  # bfloat16, which NumPy does not know
        import torch

        return torch.from_numpy(states).view(torch.bfloat16).float().numpy()
    return states.astype(np.float32, copy=False)


class Engine(abc.ABC):
    """vLLM in this process. Subclasses define what an action is and which weights change.

    Args:
        model_path: a directory that vLLM can serve.
        dtype: "float32" or "bfloat16".
        max_model_len: most tokens of prompt and completion together.
        stop_token_ids: ids that each end a completion.
        tokenizer: needed only for requests with stop strings.
        max_num_seqs: most sequences in one step.
        kv_cache_mb: size of the key/value cache in MB, on CPU.
        tensor_parallel_size: GPUs of this engine; above 1 each has a process of its own.
        num_threads: CPU threads of this process.
        engine_args: further arguments of ``vllm.LLM``.
    """

    keeps_states = False

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        max_model_len: int,
        stop_token_ids: Sequence[int],
        tokenizer: Any = None,
        max_num_seqs: int = 64,
        kv_cache_mb: int = 256,
        tensor_parallel_size: int = 1,
        num_threads: int = 1,
        **engine_args: object,
    ) -> None:
        prepare_process(num_threads)
        import torch
        import vllm

        from cola_ray.model.vllm_rows import action_every, read_actions

        torch.set_num_threads(num_threads)
        self.vllm = vllm
        self.endings = Endings(tokenizer, tuple(stop_token_ids))
        self.version = 0
        self.in_flight: dict[str, _InFlight] = {}
        self.num_submitted = 0
        self.free_slots: list[int] = []  # free rows of the action table below num_slots, as a heap
        self.num_slots = 0
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            engine_args.setdefault("kv_cache_memory_bytes", kv_cache_mb << 20)
            engine_args.setdefault("enforce_eager", True)
            # vLLM's default of 128 on CPU would share no prefix shorter than that; its kernels need at least 32.
            engine_args.setdefault("block_size", 32)
        # In a Ray actor's placement group vLLM would otherwise ask Ray for more GPUs than the engine's own.
        engine_args.setdefault("distributed_executor_backend", "uni" if tensor_parallel_size == 1 else "mp")
        self.llm = vllm.LLM(
            model_path,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            seed=0,
            **engine_args,
        )
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.action_every = action_every(self.llm.llm_engine.model_config)
        self.learnt_ends = bool(getattr(self.llm.llm_engine.model_config.hf_config, "learnt_ends", False))
        self.read_actions = functools.partial(read_actions, instance_id=self.llm.llm_engine.vllm_config.instance_id)
        self.llm.llm_engine.output_processor.tokenizer = tokenizer  # finds stop strings

    # --- for subclasses -------------------------------------------------------------------------------------------

    def _states(self, request: _InFlight, num_actions: int) -> np.ndarray | None:
        """Return the hidden states of a request that has finished, if the engine keeps them."""
        return None

    @abc.abstractmethod
    def _loader(self) -> Loader:
        """Return the function that loads new weights, which each of the engine's processes imports by its name."""

    # --- requests -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completions of all requests, in order; nothing else may be in flight."""
        ids = [self.submit(request) for request in requests]
        finished: dict[str, Completion] = {}
        while self.num_in_flight:
            finished |= self.step()
        return [finished[request_id] for request_id in ids]

    def submit(self, request: Request) -> str:
        """Queue a request and return its id, under which ``step`` returns the completion.

        Raises:
            ValueError: vLLM refuses the request, e.g. because the prompt exceeds the model's context; the request has
                stop strings and the engine has no tokenizer; or it starts within an action that lasts several tokens.
        """
        if request.stop and self.endings.tokenizer is None:
            raise ValueError(f"stop = {list(request.stop)!r}: the engine has no tokenizer; pass one when creating it")
        if request.response_prefix % self.action_every:
            raise ValueError(
                f"response_prefix = {request.response_prefix}: an action lasts {self.action_every} tokens, and the "
                "prompt ends amid one; continue a multiple of that"
            )
        self.num_submitted += 1
        name = str(self.num_submitted)
        self._add(name, request)
        return name

    def _add(self, name: str, request: Request, settled: Completion | None = None) -> None:
        """Hand a request to vLLM; ``step`` returns its completion under ``name``."""
        if not self.free_slots:
            heapq.heappush(self.free_slots, self.num_slots)
            self.num_slots += 1
        params = self.vllm.SamplingParams(
            max_tokens=request.max_new_tokens,
            stop_token_ids=list(self.endings.token_ids),
            ignore_eos=True,  # only the ids above end a completion, not the checkpoint's configured end token
            stop=list(request.stop) or None,
            detokenize=bool(request.stop),
            skip_special_tokens=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # nothing else uses the object; a deep copy would take a fifth of a short rollout's time
            **sampling_args(
                temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, seed=request.seed,
                actions=request.actions, slot=self.free_slots[0], held=request.held,
            ),
        )  # fmt: skip
        engine_id = self.llm.llm_engine.add_request(name, {"prompt_token_ids": list(request.prompt_ids)}, params)
        slot = heapq.heappop(self.free_slots)
        self.in_flight[name] = _InFlight(request, engine_id, slot, [(0, self.version)], settled)

    @property
    def num_in_flight(self) -> int:
        return len(self.in_flight)

    def abort(self, name: str) -> None:
        """Drop a request in flight. Call it between two steps."""
        self.llm.llm_engine.abort_request([name])
        heapq.heappush(self.free_slots, self.in_flight.pop(name).slot)

    def step(self) -> dict[str, Completion]:
        """Run one forward pass over the running batch; return the completions that finished in it.

        Under asynchronous scheduling vLLM may preempt a request whose last token is on its way. Its blocks then belong
        to others, so its states are computed again, and the completion comes with a later step.
        """
        finished = self.llm.llm_engine.step()
        if not finished:
            return {}
        requests = [self.in_flight.pop(output.request_id) for output in finished]
        slots, longest = [one.slot for one in requests], max(len(output.outputs[0].token_ids) for output in finished)
        kept = self.llm.apply_model(functools.partial(self.read_actions, slots=slots, num_steps=longest))[0]
        for slot in slots:
            heapq.heappush(self.free_slots, slot)
        completions = {}
        for request, output, taken in zip(requests, finished, kept, strict=True):
            made = self._complete(request, output, taken)
            if self.keeps_states and made.hidden_states is None:
                self._compute_states(output.request_id, request, made)
            else:
                completions[output.request_id] = made
        return completions

    def _compute_states(self, name: str, request: _InFlight, made: Completion) -> None:
        ids = list(request.request.prompt_ids)
        if request.settled is None:  # else it was itself such a request, and was preempted too
            ids = [*ids, *made.token_ids.tolist()][:-1]
        self._add(name, Request(ids, seed=0, temperature=0.0, top_k=0, max_new_tokens=1), made)

    def _complete(self, request: _InFlight, finished: Any, taken: np.ndarray) -> Completion:
        """``taken`` (steps, 2) is the request's row of the action table."""
        output = finished.outputs[0]
        token_ids = np.asarray(output.token_ids, np.int64)
        actions = taken[: len(token_ids), 0].astype(np.int64)
        log_probs = np.ascontiguousarray(taken[: len(token_ids), 1]).view(np.float32)
        states = self._states(request, len(actions))
        if request.settled is not None:
            return dataclasses.replace(request.settled, hidden_states=states)
        starts, versions = zip(*request.versions, strict=True)
        lengths = np.diff([*starts, len(actions)])
        places = np.arange(len(actions))
        chosen_at = places - places % self.action_every
        computed_tokens = request.prompt_length + len(actions) - (finished.num_cached_tokens or 0)
        made = Completion(
            token_ids, actions, log_probs, np.repeat(np.array(versions, np.int64), lengths)[chosen_at],
            truncated=output.finish_reason == "length", hidden_states=states, computed_tokens=computed_tokens,
        )  # fmt: skip
        if not request.request.stop or not request.request.response_prefix:
            return made
        return self._cut_at_stop(made, request.request)

    def _cut_at_stop(self, made: Completion, request: Request) -> Completion:
        """Cut at a stop string that begins within the response's prefix in the prompt, where vLLM does not look."""
        before = list(request.prompt_ids[-request.response_prefix :])
        whole = dataclasses.replace(self.endings, strings=tuple(request.stop)).length([*before, *made.token_ids])
        if whole is None:
            return made
        length = max(whole - request.response_prefix, 1)
        states = made.hidden_states
        return dataclasses.replace(
            made, token_ids=made.token_ids[:length], actions=made.actions[:length], log_probs=made.log_probs[:length],
            versions=made.versions[:length], truncated=False,
            hidden_states=None if states is None else states[: len(request.prompt_ids) + length - 1],
        )  # fmt: skip

    # --- weights --------------------------------------------------------------------------------------------------

    def update_weights(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Replace the policy by ``version`` and drop the prefix cache, which is stale from then on.

        Raises:
            WeightTransferError: the buckets do not hold exactly the policy's tensors; nothing was changed.
        """
        self._load(load_buckets, version, tuple(buckets))
        self._continue_with(version)

    def receive_weights(self, offer: Offer) -> None:
        """Replace the policy by a broadcast version; return once everything has been received and loaded.

        Raises:
            WeightTransferError: the offer does not announce exactly the policy's tensors; nothing was changed.
        """
        self._load(receive_broadcast, offer)
        self._continue_with(offer.version)

    def _load(self, function: Callable[..., str | None], *args: Any) -> None:
        """Call ``function(worker, loader, *args)`` in each of the engine's processes."""
        refusals = self.llm.collective_rpc(function, args=(self._loader(), *args))
        if any(refusals):
            raise WeightTransferError(next(filter(None, refusals)))

    def _continue_with(self, version: int) -> None:
        self.reset_prefix_cache()
        self.version = version
        # Until a request has finished, only the scheduler knows how far it has come; a pass under way does not count.
        for request in self.in_flight.values():
            request.versions.append((self.scheduler.requests[request.engine_id].num_output_tokens, version))

    def reset_prefix_cache(self) -> None:
        """Drop all keys and values; requests in flight recompute theirs and draw nothing again.

        Raises:
            RuntimeError: vLLM did not reset its cache.
        """
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not reset its prefix cache after a weight update")

    def close(self) -> None:
        """Shut vLLM down, so that another engine can start in this process."""
        from cola_ray.model.vllm_rows import RowTable

        RowTable.forget(self.llm.llm_engine.vllm_config.instance_id)
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.scheduler


class LatentEngine(Engine):
    """Serves a directory of :class:`CoLAForCausalLM`.

    Args:
        keep_hidden_states: return the base's hidden states with each completion.
        soft_q_beta: if above 0, sample actions from ``rho exp(Q / beta) / Z``; updates then replace Q alone.
    """

    def __init__(
        self, model_path: str, *, keep_hidden_states: bool = False, soft_q_beta: float = 0.0, **engine_args: Any
    ) -> None:
        prepare_process(engine_args.get("num_threads", 1))
        import cola_ray  # noqa: F401
        from cola_ray.model.vllm_cola import engine_overrides
        from cola_ray.model.vllm_rows import processor, settle_vllm

        settle_vllm()
        overrides = engine_overrides(keep_hidden_states, soft_q_beta)
        if keep_hidden_states:
            # Otherwise layers with a sliding window get a block table of their own, with another block size than e's.
            engine_args.setdefault("disable_hybrid_kv_cache_manager", True)
        self.soft_q_beta = soft_q_beta
        super().__init__(model_path, logits_processors=[processor("tracker")], hf_overrides=overrides, **engine_args)
        self.last_blocks: dict[str, list[int]] = {}
        self.keeps_states = keep_hidden_states
        if keep_hidden_states:
            self._remember_blocks(self.scheduler.kv_cache_manager)

    def _remember_blocks(self, manager: Any) -> None:
        """Record each request's cache blocks: they are freed in its last step, but still hold its states."""
        free = manager.free

        def remember_and_free(request: Any) -> None:
            self.last_blocks[request.request_id] = manager.get_block_ids(request.request_id)[0]
            free(request)

        manager.free = remember_and_free

    def abort(self, name: str) -> None:
        engine_id = self.in_flight[name].engine_id
        super().abort(name)
        self.last_blocks.pop(engine_id, None)

    def _states(self, request: _InFlight, num_actions: int) -> np.ndarray | None:
        blocks = self.last_blocks.pop(request.engine_id, None)
        if not blocks:  # not kept; or freed earlier, by a preemption
            return None
        computed = request.prompt_length + num_actions - 1
        states: np.ndarray = self.llm.collective_rpc(read_states, args=(blocks, computed))[0]
        return states

    def _loader(self) -> Loader:
        return load_soft_q if self.soft_q_beta else load_policy


class TokenEngine(Engine):
    """Serves a plain base: the token is the action.

    Args:
        adapters: updates bring only the linear layers, with LoRA adapters merged into them.
        steering: "all" or "last": updates bring only the biases to which steering vectors are added.
    """

    def __init__(self, model_path: str, *, adapters: bool = False, steering: str = "off", **engine_args: Any) -> None:
        prepare_process(engine_args.get("num_threads", 1))
        from cola_ray.model.vllm_rows import processor, settle_vllm

        settle_vllm()
        super().__init__(model_path, logits_processors=[processor("tokens")], **engine_args)
        self.adapters, self.steering = adapters, steering

    def _loader(self) -> Loader:
        if self.steering != "off":
            return functools.partial(load_vectors, steering=self.steering)
        return load_projections if self.adapters else load_base


def read_states(worker: Any, blocks: list[int], length: int) -> np.ndarray | None:
    """States of a sequence, from the first of the engine's processes; all processes hold the same."""
    return worker.get_model().states.read(blocks, length) if worker.rank == 0 else None


def prepare_process(num_threads: int) -> None:
    """Set the environment that vLLM reads on import: engine in this process, number of threads."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the size that the engine is given
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else an engine of n processes asks for n NUMA nodes
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
