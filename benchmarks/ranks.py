"""Process groups on this machine, for benchmarks that take learner steps without a driver."""

import os
import socket


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join(backend: str, rank: int = 0, ranks: int = 1, port: int | None = None) -> None:
    """Make this process a rank of a process group; by default, of a group with one rank.

    Args:
        backend: ``gloo`` or ``nccl``.
        port: the same one for all ranks of the group; may be left out if there is only one rank.
    """
    from cola_ray.learner.engine import join_group  # imports PyTorch, for which a process may need preparation

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port or free_port())}  # fmt: skip
    join_group(backend)
