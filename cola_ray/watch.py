"""What hangs is ended, so that it counts as lost: nothing has to know a stopped process from a dead one.

    watch(actor, seconds)       an actor, asked now and then whether it answers, from a thread of whoever depends on it

Asked is what Ray itself answers beside an actor's methods; one that is busy, with threads or coroutines, answers.
"""

import contextlib
import threading
import time
from typing import Any

import ray


def watch(actor: Any, seconds: float, restarts: bool = False) -> None:
    """End an actor that has not answered for so long, from its first answer on.

    Args:
        restarts: Ray starts it again whenever it has ended.
    """
    threading.Thread(target=_watch, args=(actor, seconds, restarts), daemon=True).start()


def _watch(actor: Any, seconds: float, restarts: bool) -> None:
    again = actor.__ray_ready__.options(max_task_retries=-1 if restarts else 0)
    while True:
        try:
            ray.get(again.remote())  # it is up, however long that has taken
            _ask_until_silent(actor, seconds)
        except ray.exceptions.RayActorError:
            if not restarts:
                return
            time.sleep(min(1.0, seconds / 4))
        except Exception:  # the run is over, and Ray with it
            return


def _ask_until_silent(actor: Any, seconds: float) -> None:
    """Four questions in a row without an answer, since a process that asks may have been held itself meanwhile."""
    once, silent = actor.__ray_ready__.options(max_task_retries=0), 0
    while silent < 4:
        try:
            ray.get(once.remote(), timeout=seconds / 4)
            silent = 0
            time.sleep(min(5.0, seconds / 4))
        except ray.exceptions.GetTimeoutError:
            silent += 1
    with contextlib.suppress(Exception):
        ray.kill(actor, no_restart=False)
