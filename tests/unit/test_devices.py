"""Collectives of a learner on GPUs are given tensors that lie there; nccl refuses others, and gloo does not show it."""

import types

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from cola_ray.learner import sums
from cola_ray.learner.pretrain import CorpusStage
from cola_ray.learner.reward_model import RewardStage
from cola_ray.learner.stage_module import mean_over_ranks
from cola_ray.learner.value import _summed

GPU = torch.device("cuda", 0)


class OnGpu(Tensor):
    """A tensor in host memory that says it lies on a GPU; what mixes it with others is refused, as CUDA does."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == Tensor.device.__get__:  # a new object at each access
            return GPU
        if function is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(type(tensor) is not cls and tensor.dim() for tensor in tensors):
            raise RuntimeError(f"{function.__name__}: expected all tensors to be on the same device")
        return super().__torch_function__(function, types, args, kwargs)


class Gpu(TorchFunctionMode):
    """Tensors that are made on or moved to the GPU are ``OnGpu``."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.to and args[1] == GPU:
            return args[0].as_subclass(OnGpu)
        if kwargs.get("device") == GPU:
            return function(*args, **kwargs | {"device": "cpu"}).as_subclass(OnGpu)
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    """nccl's sum over one rank, which refuses what is not on its GPU; yields the sizes of what it was given."""
    sizes = []

    def all_reduce(tensor, *_):
        assert isinstance(tensor, OnGpu), "no backend type associated with device type cpu"
        sizes.append(tensor.numel())

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with Gpu():
        yield sizes


def on_gpu(*values):
    return torch.tensor(values, device=GPU)


def without_init(kind, **attributes):
    made = object.__new__(kind)
    made.__dict__.update(attributes)
    return made


def test_the_emulation_refuses_what_a_gpu_refuses():
    with pytest.raises(AssertionError, match="no backend type associated with device type cpu"):
        torch.distributed.all_reduce(torch.zeros(2))
    with pytest.raises(RuntimeError, match="on the same device"):
        on_gpu(1.0, 2.0) + torch.zeros(2)
    assert (on_gpu(1.0, 2.0) + 1).device == GPU


def test_accuracy_of_pretraining(reduced):
    module = types.SimpleNamespace(correct=lambda ids, attention, answers: ids[:, 0] == 1)
    zero = types.SimpleNamespace(device=GPU, engine=types.SimpleNamespace(module=module))
    heldout = [tuple(torch.tensor([[first], [1]]) for _ in range(3)) for first in (0, 1)]
    assert without_init(CorpusStage, zero=zero, heldout=heldout, name="base").measure() == {"base/accuracy": 0.75}
    assert reduced == [2]


def test_accuracy_of_a_reward_model(reduced):
    class Zero:
        device, rank, world_size = GPU, 0, 1

        def engine(self, ids, mask):
            return ids[:, 0].float().view(2, -1)

    config = types.SimpleNamespace(pretrain=types.SimpleNamespace(micro_batch_size=2))
    pairs = [((2,), (1,)), ((1,), (2,)), ((3,), (1,)), ((4,), (1,))]
    found = without_init(RewardStage, zero=Zero(), heldout=pairs, config=config, pad=0).measure()
    assert found == {"reward/accuracy": 0.75}
    assert reduced == [1]


def test_sums_and_means_over_ranks(reduced):
    assert sums.means({"a": on_gpu(3.0)[0], "b_max": on_gpu(5.0)[0]}, 2) == {"a": 1.5, "b_max": 5.0}
    assert mean_over_ranks(on_gpu([1.0, 2.0], [3.0, 4.0])).tolist() == [2.0, 3.0]
    assert _summed(*on_gpu(1.0, 2.0)).tolist() == [1.0, 2.0]
    assert reduced == [1, 1, 3, 2]
