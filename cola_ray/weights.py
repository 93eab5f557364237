"""Versioned weights from the learner to the engines: bucketed, complete, checked.

    learner rank 0:  WeightSender.buckets(named tensors)  ->  Bucket, Bucket, ...
    engine:          WeightReceiver.add(bucket) ...  ->  finish(expected names) -> [(name, tensor)]

A bucket travels through Ray's object store: shared memory on a node, any node otherwise. Its arrays are the tensors'
own memory on CPU, so the one copy made is the one into the store; the receiver reads from there. It raises on a
missing, double or unknown name and on a checksum that does not match; nothing is loaded unless all of it arrived.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor


class WeightTransferError(RuntimeError):
    """A weight update that must not be loaded."""


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
        wanted = set(expected)
        missing, unknown = sorted(wanted - self.tensors.keys()), sorted(self.tensors.keys() - wanted)
        if missing or unknown:
            raise WeightTransferError(f"version {self.version}: missing {missing[:3]}, unknown {unknown[:3]}")
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
