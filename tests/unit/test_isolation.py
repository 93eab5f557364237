"""User code in its own process: raised, overdue, NaN, and a process that dies; always one answer each, in order."""

import functools
import os
import signal
import time

import pytest

from cola_ray.rollout.isolation import EnvironmentProcess
from cola_ray.rollout.reward_process import Reward, RewardProcess
from cola_ray.settings.config import TaskConfig
from cola_ray.tasks import make_task
from cola_ray.tasks.guessing import TwentyQuestions


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

    def answer_of(self, response):
        return response.upper() if response.isalpha() and self.score("train", 0, "0") == 0 else str(float(response))


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


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_held_costs_no_sample(rewards, sent):
    assert rewards.score([("train", 0, "1")]) == [Reward(1.0)]
    os.kill(rewards.process.pid, sent)
    assert rewards.score([("train", 0, "1"), ("train", 1, "1")]) == [Reward(1.0), Reward(2.0)]


def test_answers_are_read_beside_rewards(rewards):
    assert rewards.answers(["a", "1.50", "b c", "2"]) == ["A", "1.5", "", "2.0"], "unreadable where reading raised"


def test_thousands_at_once(rewards):
    found = rewards.score([("train", index, "0.5") for index in range(5000)])
    assert [reward.value for reward in found] == [index + 0.5 for index in range(5000)]


def test_a_task_that_cannot_be_built_says_so():
    process = RewardProcess(functools.partial(Moody, broken=True), timeout_s=1.0)
    with pytest.raises(RuntimeError, match="could not be built: OSError: no such data"):
        process.score([("train", 0, "1")])
    process.close()


class Trap(TwentyQuestions):
    """A game that does what is said."""

    def step(self, utterance):
        if utterance == "hang":
            time.sleep(60)
        if utterance == "exit":
            os._exit(4)
        if utterance == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if utterance == "nan":
            return "", float("nan"), False, False, {}
        return super().step(utterance)


def test_an_environment_that_fails_costs_its_own_episode():
    """Episode 1 goes on after each failure of another, in a new process where the old one had to be killed."""
    games = EnvironmentProcess(Trap, timeout_s=1.0)
    alone = TwentyQuestions()
    assert games.reset(1, seed=5).value.observation == alone.reset(seed=5)[0]
    state = games.reset(1, seed=5).value.state
    failures = []
    for fault in ("hang", "exit", "nan", "killed", ""):
        other = games.reset(2, seed=6).value
        failures.append(games.step(2, other.state, fault).failure)
        outcome = games.step(1, state, "Is it alive?").value
        state = outcome.state
        expected = alone.step("Is it alive?")
        assert (outcome.observation, outcome.reward, outcome.terminated, outcome.truncated) == expected[:4]
    ended = "ended its process with exit code"
    assert failures == ["took longer than 1 s", f"{ended} 4", "returned the reward nan", f"{ended} -9", ""]
    assert state == alone.get_state()
    games.close()


class Formula:
    """A verifier that calls ``eval`` on what a model wrote, as several of reasoning-gym's do."""

    executes_responses = True

    def score(self, split, index, response):
        return float(eval(response))


@pytest.mark.parametrize(
    "response",
    [
        "open('/etc/passwd').read() and 1",
        "__import__('os').system('true') == 0",
        "__import__('socket').socket() and 1",
        "__import__('os').fork() or 1",
        "open('/tmp/escaped', 'w') and 1",
    ],
)
def test_a_verifier_that_executes_answers_can_do_no_harm(response):
    process = RewardProcess(Formula, timeout_s=30.0)
    bad, good = process.score([("train", 0, response), ("train", 0, "2 * 3")])
    process.close()
    assert bad.value == 0.0
    assert "PermissionError" in bad.failure or "BlockingIOError" in bad.failure or not bad.failure
    assert good == Reward(6.0)
    assert not os.path.exists("/tmp/escaped")


def test_countdowns_verifier_is_confined_and_still_scores():
    config = TaskConfig(name="countdown", num_problems=8)
    process = RewardProcess(functools.partial(make_task, config, 0), timeout_s=60.0)
    problem = make_task(config, 0).problems("train")[0]
    right, evil = process.score([("train", 0, problem.solution), ("train", 0, "open('/tmp/escaped', 'w').fileno()")])
    process.close()
    assert right == Reward(1.0)
    assert evil.value < 0.1
    assert not os.path.exists("/tmp/escaped")
