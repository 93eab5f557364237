"""What becomes of an actor that does not answer; with Ray's own errors, and no cluster."""

import types

import pytest
import ray

from cola_ray import watch

GONE, LATE = ray.exceptions.RayActorError(), ray.exceptions.GetTimeoutError("late")


class Actor:
    """Gives these answers one after the other; then the run is over."""

    def __init__(self, *answers):
        self.answers, self.asked, self.killed = list(answers), [], 0
        self.__ray_ready__ = types.SimpleNamespace(options=self._options)

    def _options(self, max_task_retries):
        return types.SimpleNamespace(remote=lambda: (self, max_task_retries))

    def answer(self, question, timeout=None):
        self.asked.append((question[1], timeout))
        if not self.answers:
            raise SystemError("Ray has ended")
        answer = self.answers.pop(0)
        if answer is not None:
            raise answer


@pytest.fixture
def watched(monkeypatch):
    def watched(*answers, restarts=False):
        actor = Actor(*answers)

        def kill(_, no_restart):
            assert not no_restart
            actor.killed += 1

        stub = types.SimpleNamespace(get=actor.answer, kill=kill, exceptions=ray.exceptions)
        monkeypatch.setattr(watch, "ray", stub)
        monkeypatch.setattr(watch, "time", types.SimpleNamespace(sleep=lambda _: None))
        watch._watch(actor, 20.0, restarts)
        return actor

    return watched


def test_who_answers_now_and_then_is_left_alone(watched):
    assert not watched(None, LATE, LATE, LATE, None, LATE, None).killed


def test_who_is_silent_four_times_in_a_row_is_killed(watched):
    actor = watched(None, None, LATE, LATE, LATE, LATE, GONE)
    assert actor.killed == 1
    assert actor.asked[0] == (0, None), "a start may take its time"
    assert actor.asked[1:6] == [(0, 5.0)] * 5
    assert not actor.answers, "and is watched no longer"


def test_who_is_started_again_is_watched_again(watched):
    silent = [None, LATE, LATE, LATE, LATE]
    actor = watched(*silent, None, GONE, *silent, restarts=True)
    assert actor.killed == 2
    assert [retries for retries, timeout in actor.asked if timeout is None] == [-1] * 4
