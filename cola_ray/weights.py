"""Versioned weights from the learner to the engines: bucketed, complete, checked.

    learner rank 0:  WeightSender.buckets(named tensors)  ->  Bucket, Bucket, ... , each one flat byte array
    engine:          WeightReceiver.add(bucket) ...  ->  finish(expected names) -> [(name, tensor)]

A bucket travels through Ray's object store: shared memory on a node, any node otherwise. The receiver raises on a
missing, double or unknown name and on a checksum that does not match; nothing is loaded unless all of it arrived.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class WeightTransferError(RuntimeError):
    """A weight update that must not be loaded."""


@dataclass(frozen=True)
class Bucket:
    """Several tensors in one byte array; entry i is ``names[i]`` with its shape and dtype, end to end."""

    version: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    payload: np.ndarray  # uint8
    checksum: int


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
        if zlib.crc32(bucket.payload.data) != bucket.checksum:
            raise WeightTransferError(f"checksum of the bucket with {bucket.names[0]} does not match its payload")
        for name, tensor in _unpack(bucket):
            if name in self.tensors:
                raise WeightTransferError(f"{name} arrived twice in version {self.version}")
            self.tensors[name] = tensor

    def finish(self, expected: Iterable[str]) -> list[tuple[str, Tensor]]:
        """All tensors, in order of arrival; raises unless their names are exactly the expected ones."""
        wanted = set(expected)
        missing, unknown = sorted(wanted - self.tensors.keys()), sorted(self.tensors.keys() - wanted)
        if missing or unknown:
            raise WeightTransferError(f"version {self.version}: missing {missing[:3]}, unknown {unknown[:3]}")
        return list(self.tensors.items())


def _pack(version: int, tensors: list[tuple[str, Tensor]]) -> Bucket:
    payload = np.empty(sum(tensor.nbytes for _, tensor in tensors), np.uint8)
    offset = 0
    for _, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        payload[offset : offset + flat.nbytes] = flat
        offset += flat.nbytes
    return Bucket(
        version=version,
        names=tuple(name for name, _ in tensors),
        shapes=tuple(tuple(tensor.shape) for _, tensor in tensors),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors),
        payload=payload,
        checksum=zlib.crc32(payload.data),
    )


def _unpack(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    # Ray hands out read-only memory; torch wants to know that it may write. One copy a bucket settles it.
    data = torch.from_numpy(np.array(bucket.payload))
    offset = 0
    for name, shape, dtype_name in zip(bucket.names, bucket.shapes, bucket.dtypes, strict=True):
        dtype: torch.dtype = getattr(torch, dtype_name)
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # A slice may start off the dtype's alignment when dtypes are mixed; clone gives it its own memory.
        yield name, data[offset : offset + length].clone().view(dtype).view(shape)
        offset += length
