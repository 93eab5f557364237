"""One in-process vLLM engine: prompt ids in, tokens, actions and log-probabilities out; weights applied between steps.

    submit(request) ... ─> step() ─> [(id, completion)]        continuous batching: submit at any time between steps
                             │
                 update_weights(version, buckets)               between two steps; requests in flight go on with it

    LatentEngine   a CoLA checkpoint: actions are latent, the policy is what updates replace
    TokenEngine    a plain Llama: actions are tokens, updates replace all of it, or what adapters change

A request in flight at an update keeps its tokens. Its key/value entries of layers that trained are stale, so it is
preempted and computed again under the new weights; ``Completion.versions`` tells which version chose each action.
"""

import abc
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cola_ray.model.action_columns import acting_args, decode, sampling_args
from cola_ray.tasks.endings import Endings
from cola_ray.weights import Broadcast, BroadcastReceiver, Bucket, Offer, WeightReceiver

if TYPE_CHECKING:
    from cola_ray.model.vllm_cola import CoLAForCausalLM


@dataclass(frozen=True)
class Request:
    prompt_ids: Sequence[int]
    seed: int
    temperature: float
    top_k: int
    max_new_tokens: int
    actions: Sequence[int] = ()  # forced at the first steps
    stop: Sequence[str] = ()  # strings that end it, beside the engine's end tokens
    said: int = 0  # of the prompt's last tokens: a response's beginning, which this one goes on with


@dataclass
class _InFlight:
    request: Request
    engine_id: str  # vLLM's own name of the request
    versions: list[tuple[int, int]]  # (first output position, version), ascending

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)


@dataclass(frozen=True)
class Completion:
    token_ids: np.ndarray  # (L,) int64, what ended it included: a token, or those that make a string
    actions: np.ndarray  # (L,) int64
    log_probs: np.ndarray  # (L,) float32, of the actions, under the distribution sampled from
    versions: np.ndarray  # (L,) int64, the policy version that chose each action
    truncated: bool  # out of budget, not stopped
    hidden_states: np.ndarray | None  # (P + L - 1, H), e where the engine keeps it; bfloat16 as int16
    computed_tokens: int = 0  # P + L, less what the prefix cache held


def as_float(states: np.ndarray) -> np.ndarray:
    """A completion's hidden states as float32."""
    if states.dtype == np.int16:  # bfloat16, which NumPy does not know
        import torch

        return torch.from_numpy(states).view(torch.bfloat16).float().numpy()
    return states.astype(np.float32, copy=False)


Loader = Callable[[Any, WeightReceiver | BroadcastReceiver], None]
"""(served model, receiver): a complete update, or an error before any change."""


class Engine(abc.ABC):
    """vLLM in this process; what heirs add is what an action is and which weights change.

    Args:
        model_path: a directory that vLLM can serve.
        dtype: "float32" or "bfloat16".
        max_model_len: prompt plus completion, in tokens.
        stop_token_ids: each ends a completion.
        tokenizer: for requests with strings that end them.
        kv_cache_mb: key/value cache on CPU.
    """

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

        torch.set_num_threads(num_threads)
        self.vllm = vllm
        self.endings = Endings(tokenizer, tuple(stop_token_ids))
        self.version = 0
        self.in_flight: dict[str, _InFlight] = {}
        self.num_submitted = 0
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            engine_args.setdefault("kv_cache_memory_bytes", kv_cache_mb << 20)
            engine_args.setdefault("distributed_executor_backend", "uni")
            engine_args.setdefault("enforce_eager", True)
            # vLLM's blocks of 128 on CPU would share no prefix shorter than that; 32 is the least its kernels take.
            engine_args.setdefault("block_size", 32)
        self.llm = vllm.LLM(
            model_path,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            seed=0,
            async_scheduling=False,  # a weight update must know exactly how far each request is
            **engine_args,
        )
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.llm.llm_engine.output_processor.tokenizer = tokenizer  # looks for strings, where a request has some

    # --- what heirs say -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _sampling(self, request: Request) -> dict[str, Any]:
        """Arguments for ``vllm.SamplingParams`` that make it act."""

    @abc.abstractmethod
    def _read(self, request: _InFlight, output: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """vLLM's ``CompletionOutput`` -> tokens, actions, log-probabilities, hidden states."""

    @abc.abstractmethod
    def _loader(self) -> Loader:
        """What takes new weights in beside the served model; sent to all of an engine's GPUs."""

    # --- requests -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All completions, in the order of the requests; nothing else may be in flight."""
        ids = [self.submit(request) for request in requests]
        finished: dict[str, Completion] = {}
        while self.num_in_flight:
            finished |= self.step()
        return [finished[request_id] for request_id in ids]

    def submit(self, request: Request) -> str:
        """Queue a request; returns its id, under which ``step`` will hand out the completion.

        Raises:
            ValueError: vLLM refuses it, e.g. a prompt longer than the model's context; or it is to end at a string and
                the engine has no tokenizer.
        """
        if request.stop and self.endings.tokenizer is None:
            raise ValueError(f"stop = {list(request.stop)!r}: the engine was made without a tokenizer")
        params = self.vllm.SamplingParams(
            max_tokens=request.max_new_tokens,
            stop_token_ids=list(self.endings.token_ids),
            ignore_eos=True,  # the end tokens above, not a default of the checkpoint's configuration
            stop=list(request.stop) or None,
            detokenize=bool(request.stop),
            skip_special_tokens=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # made for this request alone; a deep copy would be a fifth of a short rollout
            **self._sampling(request),
        )
        self.num_submitted += 1
        name, prompt = str(self.num_submitted), {"prompt_token_ids": list(request.prompt_ids)}
        engine_id = self.llm.llm_engine.add_request(name, prompt, params)
        if request.stop:  # log-probabilities stay numbers: no vocabulary spells the columns that carry actions
            self.llm.llm_engine.output_processor.request_states[engine_id].logprobs_processor.tokenizer = None
        self.in_flight[name] = _InFlight(request, engine_id, [(0, self.version)])
        return name

    @property
    def num_in_flight(self) -> int:
        return len(self.in_flight)

    def abort(self, name: str) -> None:
        """Forget a request in flight; called between two steps."""
        self.llm.llm_engine.abort_request([name])
        del self.in_flight[name]

    def step(self) -> dict[str, Completion]:
        """One forward pass over the running batch; returns what finished in it."""
        return {
            output.request_id: self._complete(self.in_flight.pop(output.request_id), output)
            for output in self.llm.llm_engine.step()
        }

    def _complete(self, request: "_InFlight", answer: Any) -> Completion:
        output = answer.outputs[0]
        token_ids, actions, log_probs, states = self._read(request, output)
        starts, versions = zip(*request.versions, strict=True)
        lengths = np.diff([*starts, len(actions)])
        computed_tokens = request.prompt_length + len(actions) - (answer.num_cached_tokens or 0)
        made = Completion(
            token_ids, actions, log_probs, np.repeat(np.array(versions, np.int64), lengths),
            truncated=output.finish_reason == "length", hidden_states=states, computed_tokens=computed_tokens,
        )  # fmt: skip
        return self._cut(made, request.request)

    def _cut(self, made: Completion, request: Request) -> Completion:
        """Up to a string that began in what was said before, which vLLM does not see."""
        if not request.stop or not request.said:
            return made
        before = list(request.prompt_ids[-request.said :])
        whole = dataclasses.replace(self.endings, strings=tuple(request.stop)).length([*before, *made.token_ids])
        if whole is None:
            return made
        length = max(whole - request.said, 1)
        states = made.hidden_states
        return dataclasses.replace(
            made, token_ids=made.token_ids[:length], actions=made.actions[:length], log_probs=made.log_probs[:length],
            versions=made.versions[:length], truncated=False,
            hidden_states=None if states is None else states[: len(request.prompt_ids) + length - 1],
        )  # fmt: skip

    # --- weights --------------------------------------------------------------------------------------------------

    def update_weights(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Replace the policy by ``version`` and drop the prefix cache, which is stale now.

        Raises:
            WeightTransferError: the buckets are not exactly the policy's tensors; nothing was changed.
        """
        receiver, load = WeightReceiver(version), self._loader()
        for bucket in buckets:
            receiver.add(bucket)
        self.llm.apply_model(lambda model: load(model, receiver))
        self._go_on_with(version)

    def receive_weights(self, offer: Offer) -> None:
        """The same from a broadcast; returns when all of it has been sent and loaded."""

        load = self._loader()

        def receive(model: Any) -> None:
            import torch
            from vllm.distributed import get_tensor_model_parallel_rank

            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
            end = model.__dict__.setdefault("broadcast", Broadcast())
            rank = get_tensor_model_parallel_rank()
            load(model, BroadcastReceiver(offer, end, rank, torch.device(device)))

        self.llm.apply_model(receive)
        self._go_on_with(offer.version)

    def _go_on_with(self, version: int) -> None:
        self.reset_prefix_cache()
        self.version = version
        # How far each request is, is known to the scheduler alone before the request ends.
        for request in self.in_flight.values():
            request.versions.append((self.scheduler.requests[request.engine_id].num_output_tokens, version))

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values; requests in flight are computed again, without new draws."""
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM kept its prefix cache during a weight update")

    def close(self) -> None:
        """End vLLM here and now, so that another engine can start in this process."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.scheduler

    def sleep(self) -> None:
        """Free the GPU for a colocated learner: weights to host memory, cache dropped."""
        self.llm.sleep(level=1)

    def wake_up(self) -> None:
        self.llm.wake_up()


class LatentEngine(Engine):
    """vLLM over a directory of :class:`CoLAForCausalLM`.

    Args:
        keep_hidden_states: completions bring the base's states along.
        soft_q_beta: above 0, actions come from ``rho exp(Q / beta) / Z``, and updates bring Q alone.
    """

    def __init__(
        self, model_path: str, *, keep_hidden_states: bool = False, soft_q_beta: float = 0.0, **engine_args: Any
    ) -> None:
        prepare_process(engine_args.get("num_threads", 1))
        from transformers import AutoConfig

        import cola_ray  # noqa: F401
        from cola_ray.model.vllm_cola import engine_overrides
        from cola_ray.model.vllm_rows import ROW_TRACKER

        self.vocab_size = AutoConfig.from_pretrained(model_path).vocab_size
        overrides = engine_overrides(self.vocab_size, keep_hidden_states, soft_q_beta)
        self.soft_q_beta = soft_q_beta
        super().__init__(model_path, logits_processors=[ROW_TRACKER], hf_overrides=overrides, **engine_args)
        self.last_blocks: dict[str, list[int]] = {}
        if keep_hidden_states:
            self._remember_blocks(self.scheduler.kv_cache_manager)

    def _remember_blocks(self, manager: Any) -> None:
        """A finished request's cache is freed within its last step; its states are still there, if one knows where."""
        free = manager.free

        def remember_and_free(request: Any) -> None:
            self.last_blocks[request.request_id] = manager.get_block_ids(request.request_id)[0]
            free(request)

        manager.free = remember_and_free

    def abort(self, name: str) -> None:
        engine_id = self.in_flight[name].engine_id
        super().abort(name)
        self.last_blocks.pop(engine_id, None)

    def _sampling(self, request: Request) -> dict[str, Any]:
        return sampling_args(
            self.vocab_size,
            temperature=request.temperature,
            top_k=request.top_k,
            seed=request.seed,
            actions=list(request.actions),
        )

    def _read(self, request: _InFlight, output: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        token_ids, actions, log_probs = decode(output)
        blocks, states = self.last_blocks.pop(request.engine_id, None), None
        if blocks is not None:
            computed = request.prompt_length + len(actions) - 1
            states = self.llm.apply_model(lambda model: model.states.read(blocks, computed))[0]
        return token_ids, actions, log_probs, states

    def _loader(self) -> Loader:
        return load_soft_q if self.soft_q_beta else load_policy


class TokenEngine(Engine):
    """vLLM over a plain Llama: the token is the action.

    Args:
        adapters: updates bring the linear layers alone, adapters merged into them.
    """

    def __init__(self, model_path: str, *, adapters: bool = False, **engine_args: Any) -> None:
        prepare_process(engine_args.get("num_threads", 1))
        from cola_ray.model.vllm_rows import TOKEN_SAMPLER

        super().__init__(model_path, logits_processors=[TOKEN_SAMPLER], logprobs_mode="processed_logits", **engine_args)
        self.adapters = adapters

    def _sampling(self, request: Request) -> dict[str, Any]:
        args = acting_args(request.temperature, request.top_k, request.seed, request.actions)
        return args | {"logprobs": 0}  # of the token drawn alone

    def _read(self, _: _InFlight, output: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, None]:
        tokens = np.asarray(output.token_ids, np.int64)
        return tokens, tokens, np.asarray(output.logprobs.logprobs, np.float32).reshape(len(tokens), -1)[:, 0], None

    def _loader(self) -> Loader:
        load = load_projections if self.adapters else load_llama
        return functools.partial(load, model_config=self.llm.llm_engine.model_config)


def prepare_process(num_threads: int) -> None:
    """Environment that vLLM reads on import: engine in this process, V1 model runner, our thread count."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule the size that the engine is given
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["OMP_NUM_THREADS"] = str(num_threads)


def load_policy(model: "CoLAForCausalLM", receiver: WeightReceiver | BroadcastReceiver) -> None:
    """A new policy into the served CoLA."""
    config = model.config
    layers = _layer_tensors("policy.", config.num_policy_layers, _PROJECTIONS + _NORMS)
    expected = [*layers, "policy.norm.weight", "policy.head.weight", *_soft_q_tensors(model)]
    _reload(model, receiver, expected, model.policy_modules(), model.model_config)


def load_soft_q(model: "CoLAForCausalLM", receiver: WeightReceiver | BroadcastReceiver) -> None:
    """A new Q into the served CoLA; what acts softly by it stays."""
    _reload(model, receiver, _soft_q_tensors(model), [model.soft_q], model.model_config)


def _soft_q_tensors(model: "CoLAForCausalLM") -> list[str]:
    return [] if model.soft_q is None else [f"policy.soft_q.{name}" for name, _ in model.soft_q.named_parameters()]


def load_llama(model: Any, receiver: WeightReceiver | BroadcastReceiver, model_config: Any) -> None:
    """All weights of a served Llama, which does not know its ``model_config``."""
    config = model.config
    layers = _layer_tensors("model.", config.num_hidden_layers, _PROJECTIONS + _NORMS)
    expected = [*layers, "model.embed_tokens.weight", "model.norm.weight"]
    if not config.tie_word_embeddings:
        _reload(model, receiver, [*expected, "lm_head.weight"], [model], model_config)
        return
    _reload(model, receiver, expected, [model.model], model_config)
    # On CPU a tied head has a packed copy of the embeddings, which nobody else renews.
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def load_projections(model: Any, receiver: WeightReceiver | BroadcastReceiver, model_config: Any) -> None:
    """The linear layers of a served Llama."""
    expected = _layer_tensors("model.", model.config.num_hidden_layers, _PROJECTIONS)
    held = [(layer.self_attn, layer.mlp) for layer in model.model.layers]
    modules = [
        module
        for attention, mlp in held
        for module in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    ]
    _reload(model, receiver, expected, modules, model_config)


_PROJECTIONS = (*(f"self_attn.{kind}_proj" for kind in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def _layer_tensors(prefix: str, count: int, names: Sequence[str]) -> list[str]:
    return [f"{prefix}layers.{layer}.{name}.weight" for layer in range(count) for name in names]


def _reload(
    model: Any,
    receiver: WeightReceiver | BroadcastReceiver,
    expected: Sequence[str],
    modules: Sequence[Any],
    model_config: Any,
) -> None:
    """Runs beside the served model: ``modules`` take exactly the tensors ``expected``, or nothing is changed.

    On CPU vLLM repacks linear weights at load and frees the originals, so writing into parameters would do nothing;
    its layer-wise reload restores, loads and repacks.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    tensors = receiver.finish(expected)
    for module in modules:
        initialize_layerwise_reload(module)
    model.load_weights(tensors)
    for module in modules:
        finalize_layerwise_reload(module, model_config)
