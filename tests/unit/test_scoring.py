"""Rewards in their own process: raised, overdue, NaN, and a process that dies; always one answer each, in order."""

import functools
import os
import time

import pytest

from cola_ray.rollout.scoring import Reward, RewardProcess


class Moody:
    """A task whose reward does what the response says."""

    def __init__(self, broken=False):
        if broken:
            raise OSError("no such data")

    def score(self, split, index, response):
        if response == "hang":
            time.sleep(60)
        if response == "exit":
            os._exit(3)
        if response == "raise":
            raise ValueError("what is this")
        return float(response) + index


@pytest.fixture(scope="module")
def rewards():
    process = RewardProcess(Moody, timeout_s=1.0)
    yield process
    process.close()


def test_each_failure_costs_its_own_sample(rewards):
    responses = ["1", "raise", "hang", "nan", "exit", "2"]
    found = rewards.score([("train", index, response) for index, response in enumerate(responses)])
    assert found == [
        Reward(1.0),
        Reward(0.0, "raised ValueError: what is this"),
        Reward(0.0, "took longer than 1 s"),
        Reward(0.0, "returned nan"),
        Reward(0.0, "ended its process with exit code 3"),
        Reward(7.0),
    ]


def test_thousands_at_once(rewards):
    found = rewards.score([("train", index, "0.5") for index in range(5000)])
    assert [reward.value for reward in found] == [index + 0.5 for index in range(5000)]


def test_a_task_that_cannot_be_built_says_so():
    process = RewardProcess(functools.partial(Moody, broken=True), timeout_s=1.0)
    with pytest.raises(RuntimeError, match="could not be built: OSError: no such data"):
        process.score([("train", 0, "1")])
    process.close()
