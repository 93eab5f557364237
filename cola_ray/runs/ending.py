"""How a run ends: whatever ended it becomes one line that says what it was and what to do, and an exit code.

    explain(error)                 ("a learner rank died: ...", "")       in our words, from whoever's exception
    with in_words(folder): ...     raises RunFailedError("WHAT; NEXT STEP (traceback in FILE)") in place of it

Ray's errors, Ray Train's, MLflow's, the operating system's and those of files that were cut are known by the names of
their classes, so that nothing heavy is imported for them. The whole traceback goes to ``error.txt`` in the run's
folder, and to its ``log.jsonl`` as one event.
"""

import contextlib
import errno
import os
import re
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cola_ray.runs.event_log import EventLog
from cola_ray.runs.redaction import redacted
from cola_ray.settings.config import ConfigError, RunFailedError

EXIT_CODES: Mapping[int, str] = {
    0: "finished",
    1: "failed: one line says what it was and what to do, and names the file that has the traceback",
    2: "refused: settings, a line for each mistake; nothing was begun",
    130: "stopped by Ctrl-C, SIGTERM or SIGHUP, with a checkpoint; --resume goes on",
}
FILE = "error.txt"
RESUME = "the same command with --resume goes on from the last checkpoint"
_LONGEST = 400  # characters of what an exception says that fit into a line

Words = tuple[str, str]
"""What it was, and what to do about it; the second is empty where going on is all there is to do."""


@contextlib.contextmanager
def in_words(folder: Path | None = None) -> Iterator[None]:
    """Whatever ends the block, but for a stop and for refused settings, ends it as a :class:`RunFailedError`.

    As a decorator of a job it also makes SIGTERM and SIGHUP stops like Ctrl-C, where nobody else has seen to them.

    Args:
        folder: of the run; without one the traceback goes to a file of its own.
    """
    with _stopped_by_signals():
        try:
            yield
        except (ConfigError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            failed = failure(error, folder)
            if failed is error:
                raise
            raise failed from error


def failure(error: BaseException, folder: Path | None = None) -> RunFailedError:
    """The error in words, with its traceback kept; itself where that has been done."""
    if isinstance(error, RunFailedError) and error.file:
        return error
    what, then = explain(error)
    told = "".join(traceback.format_exception(error))
    failed = RunFailedError(redacted(what), redacted(_steps(then)), _keep(redacted(told), folder))
    if folder is not None:
        with contextlib.suppress(Exception):  # the disk may be what ended the run
            EventLog(folder).append("fail", reason=str(failed), traceback=told)
    return failed


def explain(error: BaseException) -> Words:
    """An exception in our words, each of one line."""
    for kind in type(error).__mro__:
        words = _KINDS.get(f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}")
        if words is not None:
            what, then = words(error) if callable(words) else words
            return _line(what), then
    known, then = _of_text(str(error))
    return _line(f"{known} ({_said(error)})" if known else _said(error)), then


def reason(error: BaseException) -> str:
    """Both parts, as one process tells another."""
    what, then = explain(error)
    return f"{what}; {then}" if then else what


def last_error(text: str) -> str:
    """What a remote traceback ends in: from its last line that names an exception on, in one line."""
    lines = text.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return _line(" ".join(line.strip() for line in lines[starts[-1] if starts else -1 :]))


def _steps(then: str) -> str:
    return f"{then}; then {RESUME}" if then else RESUME


def _keep(told: str, folder: Path | None) -> str:
    """Write the traceback to a file; its name, or empty where no disk takes it."""
    with contextlib.suppress(OSError):
        if folder is not None:
            (folder / FILE).write_text(told)
            return str(folder / FILE)
    with (
        contextlib.suppress(OSError),
        tempfile.NamedTemporaryFile("w", prefix="cola_ray-error-", suffix=".txt", delete=False) as file,
    ):
        file.write(told)
        return file.name
    return ""


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, but where they are ignored (nohup) or somebody waits for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    ours = [number for number, handler in before.items() if handler is signal.SIG_DFL or _is_rays(handler)]
    for number in ours:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _is_rays(handler: object) -> bool:
    """Importing Ray makes a SIGTERM an exit with code 15."""
    return str(getattr(handler, "__module__", "")).startswith("ray.")


# --- words --------------------------------------------------------------------------------------------------------

_ACTORS = {
    "Controller": "the controller", "Evaluator": "the controller",
    "RolloutWorker": "a rollout worker", "AgentWorker": "a rollout worker", "EvaluationWorker": "a rollout worker",
    "ContinuationWorker": "a rollout worker", "ReplayShard": "a replay shard", "CriticService": "a critic",
    "RewardModel": "the reward model", "RayTrainWorker": "a learner rank",
    "TrainController": "the learner's supervisor", "_QueueActor": "the queue between learner and driver",
}  # fmt: skip
_MEMORY = "use fewer processes, smaller batches or a smaller rollout.kv_cache_mb"
_CLUSTER = "see to the Ray cluster"
_DISK = "make room on it"
_COPY = "copy it again, or remove it if this run wrote it"


def _line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST else words[: _LONGEST - 3] + "..."


def _said(error: BaseException) -> str:
    """The exception's own words: under its class's name, unless it is one that this package words itself."""
    said = str(error).strip()
    name = type(error).__name__
    if not said:
        return name
    worded = type(error).__module__.startswith("cola_ray") or type(error) in (RuntimeError, ValueError)
    return _first_words(said) if worded else f"{name}: {_first_words(said)}"


def _first_words(said: str) -> str:
    """Of a text that goes on with a traceback or a list of stack frames, what comes before it."""
    cut = re.split(r"\n\s*\n|\nTraceback |\nException raised from|\nStack trace|\n\[stacktrace\]", said, maxsplit=1)
    return cut[0] if cut[0].strip() else said


def _of_actor(error: Any) -> Words:
    """A dead actor: who it was, and how it went as far as Ray knows."""
    text = str(error)
    found = re.search(r"class_name: (\S+)", text)
    who = _ACTORS.get(found[1], f"the process of {found[1]}") if found else "a process of the run"
    if "creation task" in text:
        named = re.search(r"ray::(\w+)\.__init__|actor_repr=<[\w.]*?(\w+) object", text)
        who = _ACTORS.get((named[1] or named[2]) if named else "", who)
        return f"{who} could not start: {last_error(text)}", _of_text(text)[1]
    if "memory" in text.lower() and "OOM killer due to" not in text:
        return f"{who} was ended, since the machine ran out of memory", _MEMORY
    if re.search(r"node (has )?died|node.*(dead|terminated|was removed)|node failure", text, re.IGNORECASE):
        return f"{who} died with its machine", ""
    if "ray.kill" in text or "intentional" in text.lower():
        return f"{who} was ended: it had not answered for cluster.answer_timeout_s, or somebody killed it", ""
    if "owner" in text.lower() and "died" in text.lower():
        return f"{who} died with the process that had started it", ""
    return f"{who} died without a word: killed, perhaps for memory, or crashed", ""


def _of_task(error: Any) -> Words:
    """What failed in another process: the innermost cause."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException) and cause is not error and type(cause).__qualname__ != "RayError":
        return explain(cause)
    text = str(error)  # a cause that cannot be sent is left as its traceback alone
    if re.search(r"^ray\.exceptions\.(ActorDied|RayActor)Error:", text, re.MULTILINE):
        return _of_actor(text)
    return last_error(text), _of_text(text)[1]


_AFTERMATH = re.compile(r"closed by peer|connection reset|gloo|nccl|socket|broken pipe|timed? ?out", re.IGNORECASE)


def _of_ranks(error: Any) -> Words:
    """Learner ranks: the one that failed first of all, not those that then missed it."""
    found = {rank: explain(_inner(one)) for rank, one in sorted(error.worker_failures.items())}
    if not found:
        return f"the learner's ranks failed: {last_error(str(error))}", ""
    first = next((rank for rank, words in found.items() if not _AFTERMATH.search(words[0])), min(found))
    what, then = found[first]
    return what.replace("a learner rank", f"learner rank {first}", 1) if what.startswith("a learner rank") else (
        f"learner rank {first}: {what}"), then  # fmt: skip


def _inner(error: Any) -> Any:
    """What Ray Train has wrapped."""
    for name in ("_base_exc", "health_check_failure"):
        error = getattr(error, name, None) or error
    return error


def _of_group(error: Any) -> Words:
    return explain(error.exceptions[0])


def _of_supervisor(error: Any) -> Words:
    what, then = explain(error.controller_failure)
    return f"the learner could not be started or supervised: {what}", then


def _of_system(error: OSError) -> Words:
    where = error.filename if isinstance(error.filename, str | bytes) else None
    where = os.fsdecode(where) if where is not None else ""
    words = _ERRNO.get(error.errno or 0)
    if words is None:
        what, then = _of_text(str(error))
        return what or _said(error), then
    return words[0].format(where or words[2]), words[1]


_ERRNO: dict[int, tuple[str, str, str]] = {  # what, next step, and what stands for a file without a name
    errno.ENOSPC: ("no space is left on the disk of {}", _DISK, "the run"),
    errno.EDQUOT: ("the quota on the disk of {} is used up", _DISK, "the run"),
    errno.EROFS: ("{} is on a file system that cannot be written", "mount it for writing", "the run's folder"),
    errno.EACCES: ("{} may not be read or written", "change its permissions", "a file"),
    errno.EPERM: ("the system does not permit it: {}", "change its permissions", "a file or a process"),
    errno.ENOENT: ("{} is gone", "do not remove what a run works with", "a file"),
    errno.ENOTDIR: ("{} lies below something that is no folder", "give another path", "a file"),
    errno.EISDIR: ("{} is a folder, not a file", "give another path", "a path"),
    errno.ENAMETOOLONG: ("the name {} is too long for the file system", "give a shorter --output-dir", "of a file"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n 65536)", ""),
    errno.ENFILE: ("too many files are open on this machine", "raise its limit (sysctl fs.file-max)", ""),
    errno.EAGAIN: ("the system gives no more processes or memory", "raise the limit (ulimit -u)", ""),
    errno.ENOMEM: ("the machine is out of memory", _MEMORY, ""),
    errno.EIO: ("the disk of {} has a fault", "look at the disk", "the run"),
    errno.ESTALE: ("the network file system has lost {}", "mount it again", "a file"),
    errno.EFBIG: ("{} grew over the limit of files", "raise the limit (ulimit -f)", "a file"),
    errno.EPIPE: ("nobody reads what is written to {} any more", "", "a pipe"),
    errno.ECONNREFUSED: ("a service refuses connections", "start it again", ""),
    errno.ECONNRESET: ("a connection was cut by the other side", "", ""),
    errno.ETIMEDOUT: ("a service does not answer", "see to it", ""),
    errno.EHOSTUNREACH: ("a machine cannot be reached", "see to the network", ""),
    errno.ENETUNREACH: ("the network cannot be reached", "see to the network", ""),
    errno.EADDRINUSE: ("a port is taken by another program", "", ""),
}

_TEXTS: tuple[tuple[str, str, str], ...] = (  # in whoever's exception; the first that is found
    (r"no space left on device|StorageFull|os error 28|code: 28\b", "no space is left on a disk", _DISK),
    (r"disk quota exceeded|os error 122", "the quota on a disk is used up", _DISK),
    (r"database or disk is full", "no space is left on the disk of MLflow's database", _DISK),
    (r"read-only file system|os error 30\b", "a file system cannot be written", "mount it for writing"),
    (r"too many open files|os error 24\b", "too many files are open", "raise the limit (ulimit -n 65536)"),
    (r"database is locked", "MLflow's database is locked by another program", "end that program"),
    (r"CUDA out of memory|CUDA error: out of memory", "a GPU is out of memory", _MEMORY),
    (r"can't allocate memory|cannot allocate memory|std::bad_alloc|os error 12\b", "the machine is out of memory",
     _MEMORY),
    (r"magic bytes not found|not a parquet file|parquet file size is|invalid arrow|not an arrow file",
     "a file of tables is cut or damaged", _COPY),
    (r"PytorchStreamReader|failed finding central directory", "a file of tensors is cut or damaged", _COPY),
    (r"PytorchStreamWriter|unexpected pos", "a file of tensors could not be written", "look at the disk"),
    (r"config file at '([^']+)' is not a valid JSON file", "{} is cut or damaged", _COPY),
    (r"failed to connect to Ray|could not find any running Ray", "the Ray cluster does not answer", _CLUSTER),
    (r"failed to connect to GCS|GCS.*(?:unreachable|unavailable|not reachable|connection)",
     "the Ray cluster's head (GCS) does not answer", _CLUSTER),
)  # fmt: skip


def _of_text(text: str) -> Words:
    for sign, what, then in _TEXTS:
        found = re.search(sign, text, re.IGNORECASE)
        if found:
            return what.format(*found.groups()), then
    return "", ""


def _by_text(otherwise: str, then: str = "") -> Callable[[Any], Words]:
    """Words for what only the text tells apart; else ``otherwise`` with what the exception says."""

    def words(error: Any) -> Words:
        known = _of_text(str(error))
        return known if known[0] else (f"{otherwise}: {_first_words(str(error))}" if str(error) else otherwise, then)

    return words


def _cut(what: str, *endings: str) -> Callable[[Any], Words]:
    """A file that is not whole, which the innermost frames of the traceback name."""

    def words(error: Any) -> Words:
        known = _of_text(str(error))
        if known[0] and known[0] != "a file of tables is cut or damaged":
            return known
        file = _file_in(error, endings)
        return f"{file or what} is cut or damaged ({_first_words(str(error)) or type(error).__name__})", _COPY

    return words


def _file_in(error: BaseException, endings: tuple[str, ...]) -> str:
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    for names in reversed(frames):
        for value in names.values():
            if isinstance(value, str | Path) and str(value).endswith(endings) and os.path.isfile(value):
                return str(value)
    return ""


def _of_tracker(error: Any) -> Words:
    """MLflow's, which wraps what urllib3 said of a connection several times."""
    text = str(error)
    found = re.search(r"connection[^:]*: \[Errno -?\d+\] ([\w ,]+)|\((Read|Connect) timed? ?out|Name or service", text)
    if found:
        return f"MLflow does not answer ({(found[1] or 'no answer in time').lower()})", "see to the tracking server"
    return _by_text("MLflow failed", "see to the tracking server")(error)


def _ours(error: Any) -> Words:
    """A failure that was worded where it happened."""
    return error.what, error.then


_KINDS: dict[str, Words | Callable[[Any], Words]] = {
    "cola_ray.RunFailedError": _ours,
    # Ray
    "ray.RayTaskError": _of_task,
    "ray.RayActorError": _of_actor,
    "ray.ActorUnavailableError": ("a process of the run cannot be reached", _CLUSTER),
    "ray.WorkerCrashedError": ("a process of the run crashed, or was killed, perhaps for memory", ""),
    "ray.OutOfMemoryError": ("a machine ran out of memory, and Ray ended a process of the run", _MEMORY),
    "ray.NodeDiedError": ("a machine of the Ray cluster died", _CLUSTER),
    "ray.LocalRayletDiedError": ("Ray's process on this machine (raylet) died", _CLUSTER),
    "ray.ObjectStoreFullError": ("Ray's object store is full", "give it more memory (ray start --object-store-memory)"),
    "ray.OutOfDiskError": ("the disk that Ray spills to is full", "make room, or set RAY_TMPDIR to another"),
    "ray.OwnerDiedError": ("data in Ray's object store died with the process that made it", ""),
    "ray.ObjectLostError": ("data in Ray's object store was lost with its process or machine", ""),
    "ray.GetTimeoutError": ("a process of the run did not answer in time", ""),
    "ray.AuthenticationError": ("the Ray cluster did not take the token", "set RAY_AUTH_TOKEN to the cluster's"),
    "ray.RuntimeEnvSetupError": _by_text("Ray could not set up the environment of the run's processes"),
    "ray.TaskUnschedulableError": ("no machine of the Ray cluster can hold a process of the run", "add machines"),
    "ray.ActorUnschedulableError": ("no machine of the Ray cluster can hold a process of the run", "add machines"),
    "ray.TaskPlacementGroupRemoved": ("the learner's places on the cluster were taken back", ""),
    "ray.ActorPlacementGroupRemoved": ("the learner's places on the cluster were taken back", ""),
    "ray.RpcError": _by_text("the Ray cluster does not answer", _CLUSTER),
    "ray.RaySystemError": _by_text("Ray failed", _CLUSTER),
    "ray.RayError": _by_text("Ray failed", _CLUSTER),
    # Ray Train and Tune
    "ray.WorkerGroupError": _of_ranks,
    "ray.ControllerError": _of_supervisor,
    "ray.NCCLHangError": ("the learner's ranks hang in NCCL", ""),
    "ray.PreemptionError": ("machines of the learner were taken back", ""),
    "ray.WorkerHealthCheckTimeoutError": ("a learner rank does not answer", ""),
    "ray.WorkerHealthCheckFailedError": lambda error: explain(_inner(error)),
    "ray.UserExceptionWithTraceback": lambda error: explain(_inner(error)),
    "ray.WorkerGroupStartupTimeoutError": ("the learner's ranks found no place on the cluster in time", "add machines"),
    "ray.WorkerGroupStartupFailedError": _by_text("the learner's ranks could not start"),
    "ray.InsufficientClusterResourcesError": ("the cluster has no room for the learner's ranks", "add machines"),
    "ray.CheckpointManagerInitializationError": _by_text("Ray Train cannot read its record of checkpoints"),
    "ray.RayTrainError": _by_text("the learner failed"),
    "ray.TuneError": _by_text("the sweep's runs could not be supervised"),
    # files
    "json.JSONDecodeError": _cut("a JSON file", ".json", ".jsonl"),
    "safetensors.SafetensorError": _cut("a file of weights", ".safetensors"),
    "pyarrow.ArrowInvalid": _cut("a file of tables", ".parquet", ".arrow"),
    "zipfile.BadZipFile": _cut("a file of tensors", ".pt", ".bin", ".zip"),
    "_pickle.UnpicklingError": _cut("a file of tensors", ".pt", ".bin", ".pkl"),
    "builtins.EOFError": _cut("a file", ".pt", ".bin", ".pkl"),
    # trackers and databases
    "mlflow.MlflowException": _of_tracker,
    "sqlalchemy.SQLAlchemyError": _by_text("MLflow's database failed", "see to the database"),
    "sqlite3.Error": _by_text("MLflow's database failed", "see to the database"),
    # the hub and other services
    "requests.RequestException": _by_text("a service does not answer", "see to it"),
    "httpx.HTTPError": _by_text("a service does not answer", "see to it"),
    # this machine
    "torch.OutOfMemoryError": ("a GPU is out of memory", _MEMORY),
    "builtins.MemoryError": ("the machine is out of memory", _MEMORY),
    "builtins.OSError": _of_system,
    "builtins.BaseExceptionGroup": _of_group,
    "builtins.SystemExit": _by_text("a part of the run called for an exit"),
    "builtins.RecursionError": ("something is nested too deeply for Python", "see the traceback"),
    "concurrent.BrokenExecutor": ("a process of the run died without a word", ""),
    "subprocess.CalledProcessError": lambda error: (
        f"the command {Path(str(error.cmd if isinstance(error.cmd, str) else error.cmd[0])).name} failed with code "
        f"{error.returncode}", ""),
}  # fmt: skip
