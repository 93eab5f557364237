"""Ray's own processes under a run: started outside the run's process group, watched, and ended with the run.

    with head.started(num_cpus=8, ...):     # a cluster of this machine alone
    with head.attached(address, ...):       # an existing one
        ...
        head.raise_if_lost()                # RunFailedError if GCS or raylet is gone, or silent for long
    with head.blamed(): ...                 # exceptions that follow from their loss are reported as this loss

A signal to the whole process group, as sent by timeout and batch systems, reaches only the run, which still needs Ray
for its last step and checkpoint. If GCS is gone, Ray would wait for a minute and then end the process without a
message; here a thread checks every second, and the run ends with its usual line.
"""

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import auto_init_hook, services, worker

from cola_ray.settings.config import RunFailedError

_LOOK_S = 1.0
_STOPPED_S = 15.0  # how long GCS or raylet may be stopped (SIGSTOP) before the run is ended
_SILENT_S = 25.0  # how long another machine's GCS may be silent; a busy one is no reason to end
_SHUTDOWN_S = 30.0  # how long Ray may take to end its processes before they are killed
_KEPT_S = 86_400.0  # how long Ray's logs of a dead run are kept
_WATCHED = {"gcs_server": "the Ray cluster's head (GCS)", "raylet": "Ray's process on this machine (raylet)"}
_THEN = "see to the Ray cluster, or to what ended it"


class _Watch:
    """Watches GCS and raylet from its own thread; sets ``lost`` once they are lost.

    Args:
        node: holds the processes that were started here; None for an existing cluster.
    """

    def __init__(self, node: Any) -> None:
        self.node = node
        self.lost: RunFailedError | None = None
        self.since: dict[str, float] = {}
        self.closed = threading.Event()
        self.waits = threading.current_thread() is threading.main_thread()  # the main thread can be interrupted
        threading.Thread(target=self._work, name="ray-watch", daemon=True).start()

    def look(self) -> RunFailedError | None:
        """Check once, without waiting for an answer."""
        for kind, who in _WATCHED.items() if self.lost is None and not self.closed.is_set() else ():
            for process in self._processes(kind):
                if process.poll() is not None:
                    self.lost = RunFailedError(f"{who} died", _THEN)
                elif self._lasts(kind, _is_stopped(process.pid), _STOPPED_S):
                    self.lost = RunFailedError(f"{who} is stopped", _THEN)
        return self.lost

    def _processes(self, kind: str) -> list[Any]:
        infos = [] if self.node is None else self.node.all_processes.get(kind, [])
        return [info.process for info in infos]

    def _lasts(self, what: str, now: bool, most: float) -> bool:
        """Whether the condition ``what``, which holds ``now`` or not, has held for more than ``most`` seconds."""
        if not now:
            self.since.pop(what, None)
            return False
        return time.monotonic() - self.since.setdefault(what, time.monotonic()) > most

    def _work(self) -> None:
        while not self.closed.wait(_LOOK_S):
            lost = self.look()
            if lost is None and self.node is None and self._lasts("silence", not self._answers(), _SILENT_S):
                self.lost = RunFailedError("the Ray cluster's head (GCS) does not answer", _THEN)
            if self.lost is not None:
                if self.waits and not self.closed.is_set():  # perhaps for an answer that never comes
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    def _answers(self) -> bool:
        try:
            worker.global_worker.gcs_client.internal_kv_exists(b"cola_ray", None, timeout=5)
        except (ray.exceptions.RayError, OSError):
            return self.closed.is_set()
        return True


_WATCHES: list[_Watch] = []


def raise_if_lost() -> None:
    """Raise RunFailedError if this process's cluster has lost its head or this machine's raylet."""
    for watch in _WATCHES:
        lost = watch.look()
        if lost is not None:
            raise lost


@contextlib.contextmanager
def blamed() -> Iterator[None]:
    """Report exceptions that follow from the cluster's loss, e.g. an interrupted wait, as this loss.

    If the wait was part of cleaning up after another failure, that failure is reported.
    """
    try:
        yield
    except RunFailedError:
        raise
    except BaseException as error:
        lost = _WATCHES[0].look() if _WATCHES else None
        if lost is None:
            raise
        before = error.__context__
        while before is not None and not isinstance(before, RunFailedError):
            before = before.__context__
        if before is not None:
            raise before  # noqa: B904  it was raised first, not because of the interruption
        raise lost from error


@contextlib.contextmanager
def attached(address: str, **options: Any) -> Iterator[None]:
    """Use an existing cluster within the block. Raises ConnectionError if none answers."""
    _init(address=address, **options)
    with _watched(None if "://" in address else _Watch(None)):
        yield


@contextlib.contextmanager
def started(environment: dict[str, Any], **options: Any) -> Iterator[None]:
    """Use a cluster of this machine alone, which ends with the block.

    Its folder and its processes' temporary files are below :func:`own_folder` and are removed; after a failure, Ray's
    logs stay there for a day.

    Args:
        environment: Ray's runtime environment.
        options: arguments of ``ray.init``.
    """
    folder = Path(own_folder()["RAY_TMPDIR"])
    ours = "RAY_TMPDIR" not in os.environ
    os.environ.update(own_folder())
    if ours:
        _remove_old(folder)
    temporary = folder / f"tmp-{os.getpid()}"
    temporary.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    # Compiled kernels stay in their usual place, so that later runs find them.
    kernels = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    variables = environment.setdefault("env_vars", {})
    variables |= {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": kernels}
    failed = False
    try:
        with _apart():
            _init(address="local", runtime_env=environment, **options)
        with _without_essays(), _watched(_Watch(worker._global_node)):
            yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException:
        failed = True
        raise
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)
        if ours:
            del os.environ["RAY_TMPDIR"]
            remove_own_folder(but_logs=failed)


def own_folder() -> dict[str, str]:
    """Ray's environment variable for the folder of a cluster that a run starts; a value set by the user is kept.

    Helpers of Ray Train ask the most recently started cluster on this machine whether a controller is alive, and remove
    its ranks if that cluster knows none. With its own folder, this cluster is not confused with others. The path is
    short, because sockets are created below it.
    """
    return {"RAY_TMPDIR": os.environ.get("RAY_TMPDIR", f"/tmp/cola_ray-{os.getpid()}")}


def remove_own_folder(but_logs: bool = False) -> None:
    """Remove the folder after the cluster's end; a folder that the user has set is kept.

    Args:
        but_logs: keep the logs of Ray's processes.
    """
    if "RAY_TMPDIR" in os.environ:
        return
    folder = Path(own_folder()["RAY_TMPDIR"])
    if not but_logs:
        shutil.rmtree(folder, ignore_errors=True)
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder's contents before the folder
        if "logs" not in path.relative_to(folder).parts and not (path.is_symlink() and path.is_dir()):
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                path.rmdir() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _watched(watch: _Watch | None) -> Iterator[None]:
    """Watch the cluster until the end of the block, then shut Ray down, waiting for a limited time."""
    _WATCHES.extend([watch] if watch else [])
    try:
        with blamed():
            yield
    finally:
        if watch is not None:
            watch.closed.set()
            _WATCHES.remove(watch)
        _shut_down(watch)


def _shut_down(watch: _Watch | None) -> None:
    below: list[psutil.Process] = []
    lost = watch is not None and watch.lost is not None
    if watch is not None and watch.node is not None:
        pids = [process.pid for infos in watch.node.all_processes.values() for process in (i.process for i in infos)]
        below = _trees(pids)
    if lost:
        _kill(below)
    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(5.0 if lost else _SHUTDOWN_S)
    if thread.is_alive():  # it waits for a GCS that will not answer, and would do so again when Python exits
        _kill(below)
        atexit.unregister(worker.shutdown)
    _, left = psutil.wait_procs(below, timeout=5.0)
    _kill(left)


def _trees(pids: list[int]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found += [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return found


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _init(**options: Any) -> None:
    """Initialise Ray, and restore the SIGTERM handler, since Ray's own exits with code 15."""
    before = signal.getsignal(signal.SIGTERM)
    auto_init_hook.enable_auto_connect = False  # otherwise a late call to Ray would start another cluster
    try:
        ray.init(**options)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Give processes that Ray starts within the block their own sessions; they still end with this process."""
    usual = services.ConsolePopen

    class Apart(usual):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, start_new_session=True)

    services.ConsolePopen = Apart
    try:
        yield
    finally:
        services.ConsolePopen = usual


@contextlib.contextmanager
def _without_essays() -> Iterator[None]:
    """Suppress Ray's reports of deaths, which include the ends of logs; the run's own line reports them."""
    usual = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = usual


def _remove_old(folder: Path) -> None:
    """Remove unused folders of runs that were killed, or that failed more than a day ago."""
    for old in folder.parent.glob("cola_ray-*"):
        number = re.fullmatch(r"cola_ray-(\d+)", old.name)
        with contextlib.suppress(OSError):
            seen = old.stat()
            if not number or old == folder or seen.st_uid != os.getuid() or psutil.pid_exists(int(number[1])):
                continue
            was_killed = (old / f"tmp-{number[1]}").exists()  # after any other end it has been removed
            if not was_killed and time.time() - seen.st_mtime < _KEPT_S:
                continue
            held = os.open(old, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(held)
