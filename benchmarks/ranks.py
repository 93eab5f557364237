"""Groups of ranks on this machine, for benchmarks that take the learner's steps without a driver."""

import os
import socket


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join(backend: str, rank: int = 0, ranks: int = 1, port: int | None = None) -> None:
    """Make this process a rank of a group; by itself, of one of its own.

    Args:
        backend: ``gloo`` or ``nccl``.
        port: that all ranks of the group know; may be left out where there is one.
    """
    from cola_ray.learner.engine import join_group  # with PyTorch, which a process may have to be prepared for

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port or free_port())}  # fmt: skip
    join_group(backend)
