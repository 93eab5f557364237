"""Loading new weights into a model that vLLM serves; everything here runs in vLLM's processes, beside the model.

    load_buckets | receive_broadcast (worker, loader, ...)     called by the engine in each of its processes
        └─> loader(model, receiver, model config)
                load_policy        CoLA's policy: layers, norm, head, and the Q head where the model has one
                load_soft_q        the Q head alone (actor-free RL)
                load_base          all weights of a plain base
                load_projections   a plain base's linear layers alone, which merged LoRA adapters change
                load_vectors       biases of a plain base's last projections, to which steering vectors are added

The names of the expected tensors are read off transformers' modules, built on the meta device from the served model's
configuration: biases, norms of queries and keys, and whatever else the base's family has. Each function takes its
tensors from a receiver and raises :class:`WeightTransferError` before it changes anything, if the receiver does not
hold exactly the tensors that the model expects. With tensor parallelism every process takes whole tensors and keeps its
part of them. Functions and arguments are pickled on their way to these processes, so functions are module-level and
arguments plain.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cola_ray.settings.rl import steered_layers
from cola_ray.weights import Broadcast, BroadcastReceiver, Bucket, Offer, WeightReceiver, WeightTransferError

if TYPE_CHECKING:
    from cola_ray.model.vllm_cola import CoLAForCausalLM

Receiver = WeightReceiver | BroadcastReceiver
Loader = Callable[[Any, Receiver, Any], None]
"""(served model, receiver of weights, vLLM's ModelConfig) -> None; loads all of them, or raises before any change."""


def load_buckets(worker: Any, load: Loader, version: int, buckets: Sequence[Bucket]) -> str | None:
    """Load ``version`` from buckets. Return, rather than raise, why they are refused: vLLM loses exceptions' types."""
    receiver = WeightReceiver(version)
    try:
        for bucket in buckets:
            receiver.add(bucket)
        load(worker.get_model(), receiver, worker.model_config)
    except WeightTransferError as failure:
        return str(failure)
    return None


def receive_broadcast(worker: Any, load: Loader, offer: Offer) -> str | None:
    """Take part in the broadcast of ``offer`` and load what arrives; return why the offer is refused, if it is."""
    from vllm.distributed import get_tensor_model_parallel_rank

    model = worker.get_model()
    end = model.__dict__.setdefault("broadcast", Broadcast())  # kept, because the channel outlives an update
    receiver = BroadcastReceiver(offer, end, get_tensor_model_parallel_rank(), worker.device)
    try:
        load(model, receiver, worker.model_config)
    except WeightTransferError as failure:
        return str(failure)
    return None


def load_policy(model: "CoLAForCausalLM", receiver: Receiver, model_config: Any) -> None:
    """Load a new policy into a served CoLA model."""
    expected = [*_policy_tensors(model.config), *_soft_q_tensors(model)]
    _reload(model, receiver, expected, model.policy_modules(), model_config)


def load_soft_q(model: "CoLAForCausalLM", receiver: Receiver, model_config: Any) -> None:
    """Load a new Q head into a served CoLA model; the policy that it reweights stays as it is."""
    _reload(model, receiver, _soft_q_tensors(model), [model.soft_q], model_config)


def _soft_q_tensors(model: "CoLAForCausalLM") -> list[str]:
    return [] if model.soft_q is None else [f"policy.soft_q.{name}" for name, _ in model.soft_q.named_parameters()]


def load_base(model: Any, receiver: Receiver, model_config: Any) -> None:
    """Load all weights of a served base."""
    expected = [name for name, _ in _without_memory(model.config).named_parameters()]
    if not model.config.tie_word_embeddings:
        _reload(model, receiver, expected, [model], model_config)
        return
    _reload(model, receiver, expected, [model.model], model_config)
    # On CPU a tied head holds a packed copy of the embeddings, which the reload of model.model does not renew.
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def load_projections(model: Any, receiver: Receiver, model_config: Any) -> None:
    """Load the linear layers of a served base, with their biases, since vLLM reloads whole modules."""
    from torch import nn
    from vllm.model_executor.layers.linear import LinearBase

    expected = [
        f"model.{name}.{of}"
        for name, module in _without_memory(model.config).model.named_modules()
        if isinstance(module, nn.Linear)
        for of, _ in module.named_parameters()
    ]
    modules = [module for module in model.model.layers.modules() if isinstance(module, LinearBase)]
    _reload(model, receiver, expected, modules, model_config)


def load_vectors(model: Any, receiver: Receiver, model_config: Any, steering: str) -> None:
    """Load the steering vectors of ``rl.steering`` as biases.

    In place: unlike weights, biases are not repacked, and are passed with every call. With several processes, each
    holds all of these biases whole.
    """
    layers = model.model.layers
    chosen = steered_layers(steering, len(layers))
    biases = {f"model.layers.{index}.mlp.down_proj.bias": layers[index].mlp.down_proj.bias for index in chosen}
    for name, tensor in receiver.finish(list(biases)):
        biases[name].data.copy_(tensor)


def _policy_tensors(config: Any) -> list[str]:
    import torch

    from cola_ray.model.modeling_cola import CoLAForCausalLM

    with torch.device("meta"):
        policy = CoLAForCausalLM(config).policy
    return [f"policy.{name}" for name, _ in policy.named_parameters() if not name.startswith("soft_q.")]


def _without_memory(config: Any) -> Any:
    """transformers' model of a plain base, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _reload(
    model: Any,
    receiver: Receiver,
    expected: Sequence[str],
    modules: Sequence[Any],
    model_config: Any,
) -> None:
    """Reload ``modules`` from exactly the tensors named in ``expected``, or raise before anything is changed.

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
