"""Versioned weights from the learner to the engines, by one of two ways. Complete and checked in both.

    object_store    WeightSender.buckets(named tensors) -> Bucket ... ── Ray ──> WeightReceiver.add(bucket)
    nccl            Broadcast.send(named tensors) ────────── NCCL ─────────────> BroadcastReceiver(offer)
                                                                                       └─> finish(expected names)

A bucket travels through Ray's object store: shared memory on a node, any node otherwise. Its arrays are the tensors'
own memory on CPU, so the one copy made is the one into the store; the receiver reads from there. It raises on a
missing, double or unknown name and on a checksum that does not match; nothing is loaded unless all of it arrived.

A broadcast goes from the learner's first rank to all engines' GPUs at once, tensor by tensor as ZeRO-3 gathers them,
straight into loading. All must take part, so the controller offers it first. Without GPUs gloo carries it.
"""

import datetime
import socket
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

Manifest = tuple[tuple[str, tuple[int, ...], str], ...]  # (name, shape, dtype) of each tensor, in the order of sending


class WeightTransferError(RuntimeError):
    """A weight update that must not be loaded."""


# --- through Ray's object store -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """Several tensors; entry i is ``names[i]`` with its shape, dtype, bytes and their xxh3 checksum."""

    version: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    payload: tuple[np.ndarray, ...]  # uint8, one a tensor
    checksums: tuple[int, ...]


class WeightSender:
    """Packs tensors into buckets of at most ``bucket_bytes``; a larger tensor gets one of its own."""

    def __init__(self, bucket_bytes: int = 64 << 20) -> None:
        self.bucket_bytes = bucket_bytes

    def buckets(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
        pending: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in tensors:
            if pending and size + tensor.nbytes > self.bucket_bytes:
                yield _pack(version, pending)
                pending, size = [], 0
            pending.append((name, tensor))
            size += tensor.nbytes
        if pending:
            yield _pack(version, pending)


class WeightReceiver:
    """Collects the buckets of one version."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.tensors: dict[str, Tensor] = {}

    def add(self, bucket: Bucket) -> None:
        """Raises WeightTransferError for another version, a broken payload or a name seen before."""
        if bucket.version != self.version:
            raise WeightTransferError(f"bucket of version {bucket.version} in the update to version {self.version}")
        rows = zip(bucket.names, bucket.shapes, bucket.dtypes, bucket.payload, bucket.checksums, strict=True)
        for name, shape, dtype, data, checksum in rows:
            if xxhash.xxh3_64_intdigest(data.data) != checksum:
                raise WeightTransferError(f"checksum of {name} does not match what arrived")
            if name in self.tensors:
                raise WeightTransferError(f"{name} arrived twice in version {self.version}")
            with warnings.catch_warnings():
                # Ray's memory is read-only, which torch warns of; whoever loads the tensor copies out of it.
                warnings.simplefilter("ignore", UserWarning)
                self.tensors[name] = torch.from_numpy(data).view(getattr(torch, dtype)).view(shape)

    def finish(self, expected: Iterable[str]) -> list[tuple[str, Tensor]]:
        """All tensors, in order of arrival; raises unless their names are exactly the expected ones."""
        _check_names(self.version, self.tensors, expected)
        return list(self.tensors.items())


def _pack(version: int, tensors: list[tuple[str, Tensor]]) -> Bucket:
    payload = tuple(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, tensor in tensors)
    return Bucket(
        version=version,
        names=tuple(name for name, _ in tensors),
        shapes=tuple(tuple(tensor.shape) for _, tensor in tensors),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors),
        payload=payload,
        checksums=tuple(xxhash.xxh3_64_intdigest(data.data) for data in payload),
    )


# --- by broadcast ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Channel:
    """Processes that form a group. For weights: the learner's first rank, as rank 0, and every engine's GPUs."""

    host: str  # of rank 0
    port: int
    world_size: int


@dataclass(frozen=True)
class Offer:
    """A version that will be sent over ``channel``, and what it consists of."""

    version: int
    channel: Channel
    rank: int  # of the receiving engine's first GPU
    manifest: Manifest


class Broadcast:
    """This process's end of a channel, kept for as long as the channel stays the same."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.group: Any = None

    def join(self, channel: Channel, rank: int, device: torch.device) -> None:
        """Returns when all members have come."""
        if channel != self.channel:
            self.group = join(channel, rank, device) if channel.world_size > 1 else None
            self.channel = channel

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes ``tensors`` on, each sent to the other members first."""
        for name, tensor in tensors:
            self._carry(tensor.contiguous())
            yield name, tensor

    def receive(self, manifest: Manifest, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        for name, shape, dtype in manifest:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            self._carry(tensor)
            yield name, tensor

    def _carry(self, tensor: Tensor) -> None:
        if self.group is not None:
            work = self.group.broadcast(tensor, 0)  # NCCL's is ordered by its stream and returns nothing
            if work is not None:
                work.wait()


class BroadcastReceiver:
    """Receives what an offer announces, tensor by tensor, while whoever reads ``finish`` loads them."""

    def __init__(self, offer: Offer, end: Broadcast, local_rank: int, device: torch.device) -> None:
        self.offer, self.end, self.local_rank, self.device = offer, end, local_rank, device

    def finish(self, expected: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """As of :class:`WeightReceiver`; names are checked before anything is received."""
        _check_names(self.offer.version, [name for name, _, _ in self.offer.manifest], expected)
        self.end.join(self.offer.channel, self.offer.rank + self.local_rank, self.device)
        return self.end.receive(self.offer.manifest, self.device)


def join(channel: Channel, rank: int, device: torch.device) -> Any:
    """A process group of all the channel's members; returns when they have come."""
    if device.type == "cuda":
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        return stateless_init_process_group(channel.host, channel.port, rank, channel.world_size, device)
    gloo: Any = torch.distributed.ProcessGroupGloo  # whose options have no public types
    options = gloo._Options()
    options._timeout = datetime.timedelta(minutes=30)
    # By itself gloo would listen where the machine's name leads, which is itself on many.
    options._devices = [gloo.create_device(hostname=_own_address())]
    store = torch.distributed.TCPStore(channel.host, channel.port, channel.world_size, rank == 0, options._timeout)
    return gloo(store, rank, channel.world_size, options)


def meeting_point() -> tuple[str, int]:
    """(address, free port) where other machines can reach this process."""
    with socket.socket() as free:
        free.bind(("", 0))
        return _own_address(), free.getsockname()[1]


def _own_address() -> str:
    """Of this machine in its cluster, as Ray has it; a machine's own name often means 127.0.0.1 to itself."""
    import ray.util

    return ray.util.get_node_ip_address()


def _check_names(version: int, names: Iterable[str], expected: Iterable[str]) -> None:
    wanted, given = set(expected), set(names)
    missing, unknown = sorted(wanted - given), sorted(given - wanted)
    if missing or unknown:
        raise WeightTransferError(f"version {version}: missing {missing[:3]}, unknown {unknown[:3]}")
