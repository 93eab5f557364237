"""Transfer of versioned weights from the learner to the engines, through one of two transports.

    object_store    WeightSender.buckets(named tensors) -> Bucket ... ── Ray ──> WeightReceiver.add(bucket)
    nccl            Broadcast.send(named tensors) ────────── NCCL ─────────────> BroadcastReceiver(offer)
                                                                                       └─> finish(expected names)

Both deliver a complete and checked version or raise: nothing is loaded unless every expected tensor has arrived.

A bucket travels through Ray's object store, which is shared memory within a node and reaches other nodes. Its arrays
are views of the tensors' CPU memory, so the only copy is the one into the store, which the receiver reads from.
A missing, duplicate or unknown name, or a checksum that does not match, raises :class:`WeightTransferError`.

A broadcast goes from the learner's first rank to the GPUs of all engines at once, tensor by tensor as ZeRO-3 gathers
them, and each tensor is loaded as it arrives. Every member must take part, so the controller first offers the version
to all workers that are ready. Without GPUs, gloo carries the broadcast, which is how it is tested. The channel is kept
until a worker is replaced; the buckets are also put into the object store, for workers that start later. If a worker
is lost during a broadcast the run ends, because NCCL cannot cancel the collective on the others; ``--resume``
continues it. A broadcast pays off if engines are on other nodes than the learner. With ``rl.update_mode drain`` and
overlap it waits for the longest completion; use ``continue``.
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

Manifest = tuple[tuple[str, tuple[int, ...], str], ...]  # (name, shape, dtype) of each tensor, in sending order


class WeightTransferError(RuntimeError):
    """A weight update is incomplete or damaged and must not be loaded."""


# --- Ray's object store ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """Several tensors of one version; entry i of each field belongs to tensor ``names[i]``."""

    version: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    payload: tuple[np.ndarray, ...]  # the tensors' bytes, uint8
    checksums: tuple[int, ...]  # xxh3 of the payload


class WeightSender:
    """Packs tensors into buckets of at most ``bucket_bytes``; a larger tensor gets its own bucket."""

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
        """Check and keep a bucket's tensors.

        Raises:
            WeightTransferError: the bucket is of another version, a checksum does not match, or a name was seen before.
        """
        if bucket.version != self.version:
            raise WeightTransferError(f"bucket of version {bucket.version} in the update to version {self.version}")
        rows = zip(bucket.names, bucket.shapes, bucket.dtypes, bucket.payload, bucket.checksums, strict=True)
        for name, shape, dtype, data, checksum in rows:
            if xxhash.xxh3_64_intdigest(data.data) != checksum:
                raise WeightTransferError(f"checksum of {name} does not match what arrived")
            if name in self.tensors:
                raise WeightTransferError(f"{name} arrived twice in version {self.version}")
            with warnings.catch_warnings():
                # torch warns that Ray's memory is read-only; loading a tensor only reads it.
                warnings.simplefilter("ignore", UserWarning)
                self.tensors[name] = torch.from_numpy(data).view(getattr(torch, dtype)).view(shape)

    def finish(self, expected: Iterable[str]) -> list[tuple[str, Tensor]]:
        """All tensors in order of arrival; WeightTransferError unless their names are exactly the expected ones."""
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


# --- broadcast ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Channel:
    """Address of a process group. For weights, rank 0 is the learner's first rank; the others are the engines' GPUs."""

    host: str  # of rank 0
    port: int  # on that host
    world_size: int


@dataclass(frozen=True)
class Offer:
    """Announces a version that will be broadcast over ``channel``."""

    version: int
    channel: Channel
    rank: int  # rank in the channel of the receiving engine's first GPU
    manifest: Manifest


class Broadcast:
    """This process as a member of a channel; the process group is kept until the channel changes."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.group: Any = None

    def join(self, channel: Channel, rank: int, device: torch.device) -> None:
        """Form the process group unless it exists; returns when all members have joined."""
        if channel != self.channel:
            self.group = join(channel, rank, device) if channel.world_size > 1 else None
            self.channel = channel

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Send each tensor to the other members, then yield it."""
        for name, tensor in tensors:
            self._broadcast(tensor.contiguous())
            yield name, tensor

    def receive(self, manifest: Manifest, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the manifest as they arrive."""
        for name, shape, dtype in manifest:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            self._broadcast(tensor)
            yield name, tensor

    def _broadcast(self, tensor: Tensor) -> None:
        if self.group is not None:
            work = self.group.broadcast(tensor, 0)  # None with NCCL, whose stream keeps the order
            if work is not None:
                work.wait()


class BroadcastReceiver:
    """Receives the tensors that an offer announces, one at a time while the caller of ``finish`` loads them."""

    def __init__(self, offer: Offer, end: Broadcast, local_rank: int, device: torch.device) -> None:
        self.offer, self.end, self.local_rank, self.device = offer, end, local_rank, device

    def finish(self, expected: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """As in :class:`WeightReceiver`, but names are checked before any tensor is received."""
        _check_names(self.offer.version, [name for name, _, _ in self.offer.manifest], expected)
        self.end.join(self.offer.channel, self.offer.rank + self.local_rank, self.device)
        return self.end.receive(self.offer.manifest, self.device)


def join(channel: Channel, rank: int, device: torch.device) -> Any:
    """Form the process group of a channel; returns when all members have joined."""
    if device.type == "cuda":
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        return stateless_init_process_group(channel.host, channel.port, rank, channel.world_size, device)
    gloo: Any = torch.distributed.ProcessGroupGloo  # Any: its options have no public types
    options = gloo._Options()
    options._timeout = datetime.timedelta(minutes=30)
    # By default gloo listens at the address of the machine's name, which is often 127.0.0.1.
    options._devices = [gloo.create_device(hostname=_own_address())]
    store = torch.distributed.TCPStore(channel.host, channel.port, channel.world_size, rank == 0, options._timeout)
    return gloo(store, rank, channel.world_size, options)


def meeting_point() -> tuple[str, int]:
    """Address and a free port at which other machines can reach this process."""
    with socket.socket() as free:
        free.bind(("", 0))
        return _own_address(), free.getsockname()[1]


def _own_address() -> str:
    """This machine's address in the Ray cluster; its own name often resolves to 127.0.0.1."""
    import ray.util

    return ray.util.get_node_ip_address()


def _check_names(version: int, names: Iterable[str], expected: Iterable[str]) -> None:
    wanted, received = set(expected), set(names)
    missing, unknown = sorted(wanted - received), sorted(received - wanted)
    if missing or unknown:
        raise WeightTransferError(f"version {version}: missing {missing[:3]}, unknown {unknown[:3]}")
