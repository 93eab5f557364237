"""How long the driver waits for the controller's answers, and where a rank begins."""

import os
import types

import pytest
import ray.train.torch
import torch

from cola_ray.learner import engine
from cola_ray.settings.config import RunFailedError, override
from cola_ray.settings.presets import preset
from cola_ray.training import ranks, rl


class Clocked:
    """Ray and a clock: a question is answered once ``answers``, and each look takes ``look_s``."""

    def __init__(self, monkeypatch):
        self.now, self.answers, self.look_s, self.asked_after = 0.0, False, 0.5, list[int]()
        ray = types.SimpleNamespace(wait=self.wait, get=lambda _: ([{"say": "hello"}], None))
        monkeypatch.setattr(rl, "ray", ray)
        monkeypatch.setattr(rl, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        asked = types.SimpleNamespace(remote=self.asked_after.append)
        self.talk = rl._Talk(types.SimpleNamespace(drain=asked), start_s=100.0, patience_s=10.0)

    def wait(self, questions, timeout):
        self.now += self.look_s
        return (questions, []) if self.answers else ([], questions)

    def looks(self, count):
        return [self.talk.drained(last=False) for _ in range(count)]


@pytest.fixture
def clocked(monkeypatch):
    return Clocked(monkeypatch)


def test_the_first_answer_may_take_as_long_as_a_start(clocked):
    assert clocked.looks(199) == [([], None)] * 199
    clocked.answers = True
    assert clocked.looks(1) == [([{"say": "hello"}], None)]
    clocked.answers = False
    clocked.looks(19)
    with pytest.raises(RunFailedError, match="the controller has not answered for 10 s"):
        clocked.looks(1)


def test_time_in_which_the_driver_itself_was_stopped_does_not_count(clocked):
    clocked.answers = True
    clocked.looks(1)
    clocked.answers, clocked.look_s = False, 3600.0
    clocked.looks(4)
    with pytest.raises(RunFailedError, match="has not answered"):
        clocked.looks(1)


def test_whoever_asks_for_more_has_read_what_was_returned_before(clocked):
    """And not yet what this answer brought: it is handled once ``drained`` has returned."""
    clocked.answers = True
    clocked.looks(3)
    clocked.talk.drained(last=True)
    assert clocked.asked_after == [0, 0, 1, 2, 3, 3]


def test_a_rank_takes_the_gpu_that_ray_gave_it(monkeypatch):
    """Not that of its number among the ranks: Ray may show it only its own GPU, or some that engines use."""
    joined = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda:3"))
    monkeypatch.setattr(engine, "join_group", joined.append)
    config = override(preset("tiny"), {"cluster.use_gpu": True})
    assert ranks.enter_rank({"config": config.model_dump()}) == config
    assert (os.environ["LOCAL_RANK"], joined) == ("3", ["nccl"])
