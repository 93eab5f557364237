"""A step's tokens by reference, across two machines: they outlive their worker and its machine."""

import asyncio
import os
import signal
import sys
import tempfile

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from runs import descendants

from cola_ray.batch import Picked, apart, as_groups, collate
from cola_ray.cluster import watch
from cola_ray.cluster.actors import RayWorkers
from cola_ray.experience import Ticket, Trajectory
from cola_ray.loop.workers import WorkerLostError
from cola_ray.packing import pack
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset

pytestmark = pytest.mark.timeout(300)
LENGTH, SIZE = 2000, 8  # large enough for the object store: small data travel with the answer


class Worker:
    def __init__(self, config):
        self.hidden = config.rl.cache_hidden_states

    async def generate_groups(self, tickets):
        return as_groups([(ticket.position, completions(ticket, self.hidden), None) for ticket in tickets])

    async def generate_in_parts(self, tickets):
        groups, data = apart(await self.generate_groups(tickets))
        return [groups, *data]


def completions(ticket, hidden):
    draw, made = np.random.default_rng(ticket.position), []
    for _ in range(SIZE):
        length = int(draw.integers(LENGTH // 2, LENGTH))
        states = draw.integers(-9, 9, (length + 2, 64)).astype(np.int16) if hidden else None
        made.append(Trajectory(
            draw.integers(0, 9999, 3), draw.integers(0, 9999, length), draw.integers(0, 64, length),
            draw.normal(size=length).astype(np.float32), np.zeros(length, np.int64), 1.0, False, "",
            hidden_states=states,
        ))  # fmt: skip
    return made


def rank(batch):
    """A learner rank on its own machine."""
    fetched = batch.fetched(ray.get)
    return {name: array for name, array in vars(fetched.padded()).items() if array is not None}


@pytest.fixture
def nodes(monkeypatch):
    """A head node, which this process belongs to, and a node for a rollout worker."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TMPDIR", tempfile.mkdtemp(prefix="nodes-"))  # a short path: sockets are made below it
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20})
    there = cluster.add_node(num_cpus=1, resources={"rollout": 1}, object_store_memory=100 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, there
    watch.end()
    ray.shutdown()
    cluster.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.parametrize("hidden", [False, True])
def test_what_a_worker_made_outlives_it_and_its_machine(nodes, hidden):
    cluster, there = nodes
    changes = {"rl.cache_hidden_states": hidden, "rl.group_size": SIZE, "cluster.rollout_group": "rollout"}
    config = override(preset("tiny"), changes)
    pool, tickets = RayWorkers(config, "", Worker), [Ticket(position, 0) for position in range(4)]
    pool.args = (config,)
    worker = pool.spawn()
    groups = asyncio.run(pool.call(worker, "generate_groups", tickets))
    picked, advantages = Picked.of_groups(groups), np.linspace(-1, 1, 4 * SIZE).tolist()
    batches = collate(picked, advantages, 2, 0, 0, 8192)
    assert all(one.reference is not None for one in (*picked.sources, *(picked.states or ())))
    ray.kill(worker)
    first = ray.get(ray.remote(rank).options(num_cpus=1).remote(batches[0]))
    raylet = there.all_processes["raylet"][0].process.pid
    for pid in [raylet, *(pid for pid, _, _ in descendants(raylet))]:
        os.kill(pid, signal.SIGKILL)
    cluster.remove_node(there, allow_graceful=False)
    second = ray.get(ray.remote(rank).options(num_cpus=1).remote(batches[1]))
    made = [one for ticket in tickets for one in completions(ticket, hidden)]
    for batch, found in zip(collate(pack(made), advantages, 2, 0, 0, 8192), (first, second), strict=True):
        for name, array in vars(batch.padded()).items():
            assert array is None or array.tobytes() == found[name].tobytes(), name
    with pytest.raises(WorkerLostError):
        asyncio.run(pool.call(worker, "generate_groups", tickets))
