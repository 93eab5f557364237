"""What becomes of an actor that does not answer; with Ray's own errors, and no cluster."""

import os
import signal
import subprocess
import threading
import types

import pytest
import ray

from cola_ray.cluster import watch

GONE, LATE = ray.exceptions.RayActorError(), "late"


class Actor:
    """Gives these answers one after the other; then the run is over."""

    def __init__(self, *answers):
        self.answers, self.asked, self.killed, self.now = list(answers), [], 0, 0.0
        self.__ray_ready__ = types.SimpleNamespace(options=self._options)

    def _options(self, max_task_retries):
        def remote():
            self.asked.append(max_task_retries)
            if not self.answers:
                raise SystemError("Ray has ended")
            return self.answers.pop(0)

        return types.SimpleNamespace(remote=remote)

    def wait(self, questions, timeout):
        if questions == [LATE]:
            self.now += timeout
            return [], questions
        return questions, []

    def get(self, answer):
        if answer is not None:
            raise answer

    def kill(self, actor, no_restart):
        assert not no_restart
        self.killed += 1


@pytest.fixture
def watched(monkeypatch):
    def watched(*answers, restarts=False, over=False):
        actor = Actor(*answers)
        stub = types.SimpleNamespace(wait=actor.wait, get=actor.get, kill=actor.kill, exceptions=ray.exceptions)
        monkeypatch.setattr(watch, "ray", stub)
        monkeypatch.setattr(watch, "time", types.SimpleNamespace(monotonic=lambda: actor.now))
        one = watch._Watch(actor, 20.0, restarts)
        one.over = types.SimpleNamespace(wait=lambda _: over, is_set=lambda: over)
        one.run()
        return actor

    return watched


def test_who_answers_now_and_then_is_left_alone(watched):
    assert not watched(None, LATE, LATE, LATE, None, LATE, None).killed


def test_who_is_silent_four_times_in_a_row_is_killed(watched):
    actor = watched(None, None, LATE, LATE, LATE, LATE, GONE)
    assert actor.killed == 1
    assert actor.now == 20.0, "the time it was given"
    assert not actor.answers, "and is watched no longer"


def test_a_start_may_take_its_time(watched):
    actor = watched(LATE, over=True)  # asked until the run is over
    assert (actor.killed, len(actor.asked)) == (0, 1)


def test_who_is_started_again_is_watched_again(watched):
    silent = [None, LATE, LATE, LATE, LATE]
    actor = watched(*silent, None, GONE, *silent, restarts=True)
    assert actor.killed == 2
    assert actor.asked.count(-1) == 4, "a start is waited for"


@pytest.mark.parametrize("answers", [[None], [LATE], [None, LATE]], ids=["between questions", "starting", "waiting"])
def test_nobody_calls_ray_after_the_end(answers, monkeypatch):
    actor = Actor(*answers, *[LATE] * 9)
    waits, left = threading.Event(), threading.Event()

    def wait(questions, timeout):
        assert not left.is_set(), "Ray has been left"
        waits.set()
        return actor.wait(questions, 0.0)

    stub = types.SimpleNamespace(wait=wait, get=actor.get, kill=actor.kill, exceptions=ray.exceptions)
    monkeypatch.setattr(watch, "ray", stub)
    watch.begin(actor, 20.0)
    assert waits.wait(10)
    watch.end()
    left.set()
    asked = len(actor.asked)
    assert not watch._WATCHES
    assert not [one for one in threading.enumerate() if isinstance(one, watch._Watch)]
    assert len(actor.asked) == asked <= 2


@pytest.mark.parametrize("held", [True, False])
def test_an_actor_without_a_handle_is_ended_once_it_is_stopped_for_long(held, monkeypatch):
    with subprocess.Popen(["sleep", "60"]) as process:
        actors = {
            "elsewhere": {
                "ActorClassName": "TrainController",
                "State": "ALIVE",
                "Pid": os.getpid(),
                "Address": {"NodeID": "b"},
            },
            "another": {
                "ActorClassName": "Controller",
                "State": "ALIVE",
                "Pid": os.getpid(),
                "Address": {"NodeID": "a"},
            },
            "ours": {
                "ActorClassName": "TrainController",
                "State": "ALIVE",
                "Pid": process.pid,
                "Address": {"NodeID": "a"},
            },
        }
        context = types.SimpleNamespace(get_job_id=lambda: "01000000", get_node_id=lambda: "a")
        monkeypatch.setattr(watch.ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(watch, "state", types.SimpleNamespace(actors=lambda job_id: actors))
        now = 0.0
        monkeypatch.setattr(watch, "time", types.SimpleNamespace(monotonic=lambda: now))
        supervisor = watch.Unreachable("TrainController", 10.0)
        if held:
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
        for now in range(1, 9):  # noqa: B007
            supervisor.look()
        now = 1000.0  # this process itself was held meanwhile
        supervisor.look()
        assert process.poll() is None
        now = 1002.0
        supervisor.look()
        if held:
            assert process.wait(10) == -signal.SIGKILL
            now = 1003.0
            supervisor.look()  # there is nobody any more
        else:
            assert process.poll() is None
            process.kill()
