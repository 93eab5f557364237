"""Collation's one shift, equal work, and weights in transit."""

import asyncio
import dataclasses
import socket
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import free_port
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ray.batch import collate
from cola_ray.cluster import actors
from cola_ray.experience import Trajectory
from cola_ray.packing import pack
from cola_ray.replay.critic_service import CriticService
from cola_ray.replay.service import Shards
from cola_ray.settings.config import CriticConfig
from cola_ray.weights import (
    Broadcast,
    BroadcastReceiver,
    Channel,
    Offer,
    WeightReceiver,
    WeightSender,
    WeightTransferError,
    meeting_point,
)


def trajectory(prompt, tokens, actions):
    return Trajectory(
        np.array(prompt), np.array(tokens), np.array(actions), np.full(len(actions), -0.5, np.float32),
        np.zeros(len(actions), np.int64), 1.0, False, "",
    )  # fmt: skip


def test_the_docstrings_example():
    (batch,) = collate(
        pack([trajectory([10, 11, 12], [13, 14], [5, 6])]), [2.0], 1, pad_id=0, policy_version=3, micro_batch_tokens=64
    )
    padded = batch.padded()
    assert padded.input_ids.tolist() == [[10, 11, 12, 13, 14]]
    assert padded.actions.tolist() == [[0, 0, 5, 6, 0]]
    assert padded.action_mask.tolist() == [[False, False, True, True, False]]
    assert padded.advantages.tolist() == [[0, 0, 2.0, 2.0, 0]]
    assert batch.num_actions_global == 2
    assert batch.policy_version == 3


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(1, 60),
)
def test_nothing_is_lost_and_ranks_share_evenly(sizes, ranks, budget):
    items = [trajectory(range(p), range(100, 100 + n), range(n)) for p, n in sizes]
    collated = collate(pack(items), [1.0] * len(items), ranks, pad_id=0, policy_version=0, micro_batch_tokens=budget)
    batches = [batch.padded() for batch in collated]
    cuts = {(batch.num_rows, batch.micro_batches) for batch in collated}
    assert len(cuts | {batch.input_ids.shape for batch in batches}) == 2, "ZeRO-3 needs equal work"
    assert sum(int(batch.action_mask.sum()) for batch in batches) == sum(n for _, n in sizes)
    assert all(batch.num_actions_global == sum(n for _, n in sizes) for batch in collated)
    micro_batches = collated[0].micro_batches
    for batch in batches:
        # an action sits one position before the token that it produced
        rows, columns = np.nonzero(batch.action_mask)
        assert np.array_equal(batch.input_ids[rows, columns + 1], 100 + batch.actions[rows, columns])
        # micro-batches hold every row once, whole, within the budget
        covered = [row for start, stop, _ in micro_batches for row in range(start, stop)]
        assert covered == list(range(len(batch.input_ids)))
        for start, stop, width in micro_batches:
            assert not batch.attention_mask[start:stop, width:].any()
            assert (stop - start) * width <= max(budget, width)
        assert (batch.attention_mask.sum(1) > 0).all(), "a row without tokens would be NaN in attention"


def test_sequences_that_do_not_divide_leave_a_row_without_actions():
    batches = collate(pack([trajectory([1], [2], [3])] * 3), [1.0] * 3, 2, 0, 0, 64)
    assert [batch.num_rows for batch in batches] == [2, 2]
    assert [int(batch.padded().action_mask.sum()) for batch in batches] == [2, 1]


def test_a_rank_without_sequences_has_states_of_the_same_kind():
    states = np.ones((2, 4), np.int16)
    one = dataclasses.replace(trajectory([1], [2, 3], [4, 5]), hidden_states=states)
    full, empty = collate(pack([one]), [1.0], 2, 0, 0, 64)
    states = [batch.padded().hidden_states for batch in (full, empty)]
    assert states[0].shape == states[1].shape == (1, 3, 4)
    assert states[0].dtype == states[1].dtype == np.int16
    assert states[0].sum() == 8
    assert not states[1].any()
    assert not empty.padded().action_mask.any()
    assert (empty.num_actions_global, empty.micro_batches) == (2, full.micro_batches)
    assert (full.num_tokens_global, empty.num_tokens_global) == (3, 3)
    assert (full.computed_share(False), empty.computed_share(False)) == (1.0, 3.0)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [
        ("a", torch.randn(7, 3, generator=generator)),
        ("b", torch.randn(5, generator=generator).bfloat16()),
        ("c", torch.randn(200, 4, generator=generator)),
    ]


@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
def test_weights_arrive_bit_for_bit(limit):
    receiver = WeightReceiver(4)
    buckets = list(WeightSender(limit).buckets(4, tensors()))
    assert len(buckets) == (1 if limit == 1 << 20 else 3 if limit == 1 else 2)
    for bucket in buckets:
        receiver.add(bucket)
    for (name, sent), (arrived_name, arrived) in zip(tensors(), receiver.finish(["a", "b", "c"]), strict=True):
        assert name == arrived_name
        assert torch.equal(sent, arrived)
        assert sent.dtype == arrived.dtype


def test_an_incomplete_or_broken_update_is_refused():
    first, *rest = WeightSender(1).buckets(4, tensors())
    receiver = WeightReceiver(4)
    receiver.add(first)
    with pytest.raises(WeightTransferError, match="twice"):
        receiver.add(first)
    with pytest.raises(WeightTransferError, match="missing"):
        receiver.finish(["a", "b", "c"])
    damaged = rest[0].payload[0].copy()
    damaged[0] ^= 1
    with pytest.raises(WeightTransferError, match="checksum of b"):
        receiver.add(dataclasses.replace(rest[0], payload=(damaged,)))
    with pytest.raises(WeightTransferError, match="version 5"):
        receiver.add(dataclasses.replace(rest[0], version=5))
    with pytest.raises(WeightTransferError, match="unknown"):
        receiver.finish([])


@pytest.fixture
def sent_over_a_channel():
    """Two versions over one channel from a sender to two receivers; returns (sent, what each receiver got)."""
    versions = [{"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16()} for _ in range(2)]
    manifest = tuple((n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in versions[0].items())
    channel, cpu = Channel("localhost", free_port(), 3), torch.device("cpu")

    def send():
        end = Broadcast()
        for tensors in versions:
            end.join(channel, 0, cpu)
            list(end.send(tensors.items()))

    def receive(rank):
        end = Broadcast()
        offers = [Offer(version, channel, rank, manifest) for version in range(2)]
        return [dict(BroadcastReceiver(offer, end, 0, cpu).finish(["a", "b"])) for offer in offers]

    with ThreadPoolExecutor() as threads:
        sending, *receiving = threads.submit(send), threads.submit(receive, 1), threads.submit(receive, 2)
        sending.result(timeout=30)
        return versions, [result.result(timeout=30) for result in receiving]


def test_a_broadcast_arrives_bit_for_bit_at_every_member(sent_over_a_channel):
    versions, received = sent_over_a_channel
    for member in received:
        for version, tensors in zip(versions, member, strict=True):
            assert all(torch.equal(tensors[name], tensor) for name, tensor in version.items())


def test_services_are_met_where_other_machines_reach_them(monkeypatch, tmp_path):
    """Not where the machine's own name leads, which may be 127.0.0.1; and at a port that is free."""
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.1.2.3")
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.0.1")
    critic = CriticService(CriticConfig(), 4, "", Shards(0, None, 0), str(tmp_path), seed=0)
    for host, port in (meeting_point(), asyncio.run(critic.address())):
        assert host == "10.1.2.3"
        with socket.socket() as free:
            free.bind(("", port))

    offered = []
    monkeypatch.setattr(actors.ray, "get", lambda found: found)
    offer = types.SimpleNamespace(remote=lambda *args: offered.append(args))
    actors.RemoteController(types.SimpleNamespace(offer=offer)).offer(3, ())
    assert offered[0][:3] == (3, (), "10.1.2.3")


def test_a_broadcast_of_other_tensors_is_refused_before_anything_is_received():
    offer = Offer(4, Channel("localhost", 1, 2), 1, (("a", (3,), "float32"),))
    with pytest.raises(WeightTransferError, match=r"version 4: missing \['b'\], unknown \['a'\]"):
        BroadcastReceiver(offer, Broadcast(), 0, torch.device("cpu")).finish(["b"])
