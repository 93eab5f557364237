"""DeepSpeed ZeRO-3 around a module of which only the named parameters train.

Only trained parameters have gradients or optimizer state, by construction: everything else is frozen before the
optimizer exists, and the optimizer is built over the trained parameters alone.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.utils import safe_get_local_grad, set_z3_leaf_module
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cola_ray.algorithms.gradients import NonFiniteError
from cola_ray.learner import repartition
from cola_ray.learner.published import Published
from cola_ray.learner.sharding import Shards, zero_config
from cola_ray.model.modeling_cola import WorldModelBlock
from cola_ray.runs import checkpoints, resume
from cola_ray.runs.checkpoints import Checkpoint, CheckpointError, Checksums
from cola_ray.settings.config import Config
from cola_ray.weights import Manifest


class Report(Protocol):
    """How a training loop reports progress."""

    def __call__(self, metrics: dict[str, Any], saved: bool = False) -> bool | None:
        """Report a step's metrics, and whether a checkpoint was made of it; a collective. True: the run is to stop."""
        ...

    def fail(self, reason: str) -> None:
        """Report that training cannot go on, and that a retry would not help."""
        ...

    def doing(self, what: str) -> None:
        """Report something that takes a while before the next step."""
        ...

    def say(self, line: str) -> None:
        """Show a line to the user."""
        ...


def save_checkpoint(
    run: Path, step: int, save: Callable[[Path], Checksums | None], fail: Callable[[str], None]
) -> None:
    """Make the run's checkpoint at ``step``; a collective.

    Args:
        save: writes this rank's part into a folder; returns the checkpoint's files elsewhere in the run, by their paths
            from the run's folder.
        fail: receives the reason if saving fails: training cannot go on, and a retry would not help.

    Raises:
        OSError: it could not be written, e.g. for lack of space; earlier checkpoints stay.
        RuntimeError: another rank has died. The group of ranks that replaces this one makes the checkpoint again.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    folder = checkpoints.staging_path(run, step)
    try:
        if rank == 0:
            checkpoints.make_empty(folder)
        torch.distributed.barrier()
        beside = save(folder) or {}
        torch.distributed.barrier()
        mine = checkpoints.checksums(
            folder, (file for file in folder.rglob("*") if file.is_file() and _writer(file) == rank)
        )
        of_ranks: list[Any] = [None] * size
        torch.distributed.all_gather_object(of_ranks, (mine, beside))
        if rank == 0:
            files, others = ({name: what for one in of_ranks for name, what in one[part].items()} for part in (0, 1))
            settings = resume.digest(json.loads((run / "config.json").read_text()))
            checkpoints.seal(folder, step, size, settings, files, others)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)  # makes room for the run's last output
        if _tells_of_a_lost_rank(error):
            raise
        why = f"the checkpoint of step {step} could not be written to {folder.parent}: {error}"
        fail(why)
        raise OSError(why) from error
    torch.distributed.barrier()


def _tells_of_a_lost_rank(error: Exception) -> bool:
    """Whether a collective failed, rather than the disk; gloo's error has no class of its own, only its source file."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport/" in str(error)


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint; a collective. The first rank looks."""
    found: list[Any] = [checkpoints.newest(run).checkpoint if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    checkpoint: Checkpoint | None = found[0]
    return checkpoint


def _writer(file: Path) -> int:
    """The rank that wrote a file, by DeepSpeed's names: the rank in the name, or else the first."""
    match = re.search(r"pp_rank_(\d+)_mp_rank", file.name)
    return int(match[1]) if match else 0


def join_group(backend: str) -> None:
    """Initialise ``torch.distributed`` through DeepSpeed, among the ranks that the environment names."""
    # On CPU DeepSpeed would first compile an all-reduce for inference (minutes on two cores), which ZeRO-3 never uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend)


def placement(config: Config) -> dict[str, bool]:
    """Arguments of :class:`ZeroEngine` that follow from the weights' dtype and the cluster settings."""
    cluster = config.cluster
    return {
        "bfloat16": config.model.dtype == "bfloat16",
        "offload_optimizer": cluster.offload_optimizer,
        "offload_frozen": cluster.offload_frozen,
    }


class ZeroEngine:
    """One rank of a ZeRO-3 group. ``torch.distributed`` must be initialised.

    Args:
        module: whole and identical on all ranks, and then divided in place; or already divided (``sharding.py``).
        trained: name prefixes of the parameters that train, e.g. ``("cola.policy.",)``.
        lr: peak; ``step(lr)`` may override it, so that a schedule is a pure function of the step.
        fused: Adam in one pass over its numbers, rounded a little differently; always used in host memory.
        offload_optimizer: float32 weights, gradients and moments stay in host memory, where Adam steps.
        offload_frozen: shares of frozen parameters stay in host memory.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Sequence[str],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        bfloat16: bool = False,
        fused: bool = False,
        offload_optimizer: bool = False,
        offload_frozen: bool = False,
    ) -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(tuple(trained)))
        self.trained: list[tuple[str, Any]] = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not self.trained:
            raise ValueError(f"no parameter's name starts with any of {tuple(trained)}")
        if offload_frozen:  # parts not divided yet, e.g. adapters, must not follow frozen weights to the host
            shards = Shards()
            for parameter in module.parameters():
                if not hasattr(parameter, "ds_id"):
                    torch.distributed.broadcast(parameter.data, 0)
                    shards.take(parameter, on_host=not parameter.requires_grad)
        optimizer = torch.optim.AdamW(
            [p for _, p in self.trained], lr=lr, betas=betas, weight_decay=weight_decay,
            fused=True if fused or offload_optimizer else None,
        )  # fmt: skip
        _gather_whole(module)
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=zero_config(dtype, offload_optimizer) | {"gradient_clipping": grad_clip},
        )
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = self.engine.device
        for buffer in module.buffers():  # DeepSpeed does not move them if parameters were divided before
            buffer.data = buffer.data.to(self.device)

    @property
    def zero_stage(self) -> int:
        return int(self.engine.zero_optimization_stage())

    def backward(self, loss_share: Tensor, *, last: bool) -> None:
        """Accumulate a micro-batch. ``loss_share`` is this rank's share of the global loss: shares *add up*.

        Raises:
            NonFiniteError: on every rank, if the share of any rank is not finite.
        """
        finite = torch.isfinite(loss_share.detach()).to(torch.int32)
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if not bool(finite):
            raise NonFiniteError(f"loss is not finite (rank {self.rank}: {loss_share.item()})")
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks; shares add up, hence the factor.
        self.engine.backward(loss_share * self.world_size)

    def step(self, lr: float | None = None) -> float:
        """Clip, step, clear. Returns the gradient norm before clipping.

        Raises:
            NonFiniteError: on every rank, if a gradient is not finite; the weights are untouched.
        """
        # DeepSpeed looks for overflow in fp16 only, and would step on a NaN.
        finite = torch.ones((), dtype=torch.int32, device=self.device)
        for _, parameter in self.trained:
            gradient = safe_get_local_grad(parameter)
            if gradient is not None:
                finite &= torch.isfinite(gradient).all().to(finite)
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if not bool(finite):
            raise NonFiniteError("a gradient is not finite")
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def stream(self, wanted: Sequence[Published], bucket_bytes: int = 64 << 20) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, bucket by bucket, as (name, tensor). A collective: every rank must iterate to the end."""
        for bucket in _buckets(wanted, bucket_bytes):
            with deepspeed.zero.GatheredParameters([p for one in bucket for p in one.parameters]):
                for one in bucket:
                    yield one.name, one.merged(*(parameter.detach() for parameter in one.parameters))

    def collect(self, wanted: Sequence[Published]) -> dict[str, Tensor]:
        """Copies of ``stream``'s tensors in the first rank's host memory; empty on the others. All ranks call."""
        copies: dict[str, Tensor] = {}
        for name, tensor in self.stream(wanted):
            if self.rank == 0:
                copies[name] = torch.empty_like(tensor, device="cpu").copy_(tensor)
        return copies

    @staticmethod
    def manifest(wanted: Sequence[Published]) -> Manifest:
        """Names, shapes and types of ``stream``'s tensors, without gathering; a merged tensor has its first part's."""
        return tuple(
            (one.name, tuple(one.parameters[0].ds_shape), str(one.parameters[0].dtype).removeprefix("torch."))
            for one in wanted
        )

    def trained_parameters(self) -> int:
        return sum(parameter.ds_numel for _, parameter in self.trained)

    def optimizer_mb(self) -> float:
        """Size of Adam's moments and float32 weights over all ranks, in MiB."""
        moments = [value for state in self.optimizer.optimizer.state.values() for value in state.values()]
        held = [*moments, *self.optimizer.fp32_partitioned_groups_flat]
        mine = sum(one.nbytes for one in held if isinstance(one, Tensor) and one.dim())
        return mine * self.world_size / 2**20

    def save(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Save this rank's shard of parameters and optimizer; all ranks call.

        Args:
            notes: contents of ``notes.json`` beside them, which the first rank writes.
        """
        self.engine.save_checkpoint(str(folder), tag="zero", exclude_frozen_parameters=True)
        if self.rank == 0:
            (folder / "notes.json").write_text(json.dumps(notes))

    def load(self, folder: Path) -> dict[str, Any]:
        """Returns the notes. Any number of ranks may have saved; weights and optimizer are restored bit for bit."""
        if repartition.saved_ranks(folder / "zero") not in (0, self.world_size):
            self._load_of_other_ranks(folder / "zero")
        elif self.engine.load_checkpoint(str(folder), tag="zero", load_module_strict=False)[0] is None:
            raise CheckpointError(f"no DeepSpeed checkpoint in {folder}")
        notes: dict[str, Any] = json.loads((folder / "notes.json").read_text())
        return notes

    def _load_of_other_ranks(self, folder: Path) -> None:
        """Like ``load_checkpoint``, which refuses other rank counts. Checkpoints lack frozen parameters and buffers."""
        groups = [[parameter.ds_numel for parameter in group] for group in self.optimizer.fp16_groups]
        self.optimizer.checkpoint_event_prologue()
        state = repartition.state_of_rank(folder, groups, self.rank, self.world_size)
        self.optimizer.load_state_dict([state] * self.world_size)
        self.optimizer.checkpoint_event_epilogue()

    def close(self) -> None:
        self.engine.destroy()


def _gather_whole(module: nn.Module) -> None:
    """Let DeepSpeed gather each frozen decoder layer at once, instead of the dozen modules inside it.

    At each of those it would run four hooks, for a small base about as long as the arithmetic of a short row. Trained
    layers are left alone: they may be recomputed in the backward pass, where DeepSpeed frees each module by itself. So
    are the world model's blocks, through which gradients pass even if they are frozen.
    """
    for layer in module.modules():
        of_a_decoder = isinstance(layer, GradientCheckpointingLayer) and not isinstance(layer, WorldModelBlock)
        if of_a_decoder and not any(one.requires_grad for one in layer.parameters()):
            set_z3_leaf_module(layer, True)


def _buckets(wanted: Iterable[Published], limit: int) -> Iterator[list[Published]]:
    bucket: list[Published] = []
    size = 0
    for one in wanted:
        if bucket and size + one.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(one)
        size += one.nbytes
    if bucket:
        yield bucket
