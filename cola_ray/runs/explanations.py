"""Exceptions in plain words: what went wrong and what to do about it, one line each.

    explain(error)     ("no space is left on the disk of /data/x", "make room on it")
    one_line(error)    both parts in one line, as one process reports them to another

Exceptions of Ray, Ray Train, MLflow, the operating system and file formats are recognised by the names of their classes
along the MRO, so nothing heavy is imported for them. Exceptions that are not in the table keep their message and type.
"""

import errno
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MAX_LENGTH = 400  # characters of an explanation

Explanation = tuple[str, str]
"""What went wrong, and what to do about it; the second is empty if resuming is all there is to do."""


def explain(error: BaseException) -> Explanation:
    """Return what went wrong and what to do, each in one line."""
    for kind in type(error).__mro__:
        known = _KINDS.get(f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}")
        if known is not None:
            what, then = known(error) if callable(known) else known
            return _line(what), then
    what, then = _from_text(str(error))
    return _line(f"{what} ({_message(error)})" if what else _message(error)), then


def one_line(error: BaseException) -> str:
    """Return both parts of the explanation in one line."""
    what, then = explain(error)
    return f"{what}; {then}" if then else what


def last_error(text: str) -> str:
    """Return the end of a remote traceback in one line, from the last line that names an exception."""
    lines = text.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return _line(" ".join(line.strip() for line in lines[starts[-1] if starts else -1 :]))


_ACTORS = {
    "Controller": "the controller", "Evaluator": "the controller",
    "RolloutWorker": "a rollout worker", "AgentWorker": "a rollout worker", "EvaluationWorker": "a rollout worker",
    "ContinuationWorker": "a rollout worker", "ReplayShard": "a replay shard", "CriticService": "a critic",
    "RewardModel": "the reward model", "RayTrainWorker": "a learner rank",
    "TrainController": "Ray Train's controller", "_QueueActor": "the queue between learner and driver",
}  # fmt: skip
_MEMORY = "use fewer processes, smaller batches or a smaller rollout.kv_cache_mb"
_CLUSTER = "check the Ray cluster"
_DISK = "make room on it"
_COPY = "copy it again, or remove it if this run wrote it"


def _line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _MAX_LENGTH else words[: _MAX_LENGTH - 3] + "..."


def _message(error: BaseException) -> str:
    """Return the exception's message, preceded by the class name unless the exception is this package's own."""
    message = str(error).strip()
    name = type(error).__name__
    if not message:
        return name
    ours = type(error).__module__.startswith("cola_ray") or type(error) in (RuntimeError, ValueError)
    return _before_traceback(message) if ours else f"{name}: {_before_traceback(message)}"


def _before_traceback(text: str) -> str:
    """Return the part of a message before a traceback or a list of stack frames."""
    parts = re.split(r"\n\s*\n|\nTraceback |\nException raised from|\nStack trace|\n\[stacktrace\]", text, maxsplit=1)
    return parts[0] if parts[0].strip() else text


def _of_actor(error: Any) -> Explanation:
    """Explain which actor died, and why, as far as Ray knows."""
    text = str(error)
    found = re.search(r"class_name: (\S+)", text)
    who = _ACTORS.get(found[1], f"the process of {found[1]}") if found else "a process of the run"
    if "creation task" in text:
        named = re.search(r"ray::(\w+)\.__init__|actor_repr=<[\w.]*?(\w+) object", text)
        who = _ACTORS.get((named[1] or named[2]) if named else "", who)
        return f"{who} could not start: {last_error(text)}", _from_text(text)[1]
    if "memory" in text.lower() and "OOM killer due to" not in text:
        return f"{who} was killed, since the machine ran out of memory", _MEMORY
    if re.search(r"node (has )?died|node.*(dead|terminated|was removed)|node failure", text, re.IGNORECASE):
        return f"{who} died with its machine", ""
    if "ray.kill" in text or "intentional" in text.lower():
        return f"{who} was killed: it did not answer within cluster.answer_timeout_s, or someone killed it", ""
    if "owner" in text.lower() and "died" in text.lower():
        return f"{who} died with the process that started it", ""
    return f"{who} died without an error message: it crashed, or was killed, perhaps for lack of memory", ""


def _of_task(error: Any) -> Explanation:
    """Explain the innermost cause of a failure in another process."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException) and cause is not error and type(cause).__qualname__ != "RayError":
        return explain(cause)
    text = str(error)  # a cause that cannot be pickled arrives as its traceback alone
    if re.search(r"^ray\.exceptions\.(ActorDied|RayActor)Error:", text, re.MULTILINE):
        return _of_actor(text)
    return last_error(text), _from_text(text)[1]


_AFTERMATH = re.compile(r"closed by peer|connection reset|gloo|nccl|socket|broken pipe|timed? ?out", re.IGNORECASE)


def _of_ranks(error: Any) -> Explanation:
    """Explain the learner rank that failed first, rather than those that then lost their connection to it."""
    found = {rank: explain(_inner(one)) for rank, one in sorted(error.worker_failures.items())}
    if not found:
        return f"the learner's ranks failed: {last_error(str(error))}", ""
    first = next((rank for rank, words in found.items() if not _AFTERMATH.search(words[0])), min(found))
    what, then = found[first]
    return what.replace("a learner rank", f"learner rank {first}", 1) if what.startswith("a learner rank") else (
        f"learner rank {first}: {what}"), then  # fmt: skip


def _inner(error: Any) -> Any:
    """Return the exception that Ray Train has wrapped."""
    for name in ("_base_exc", "health_check_failure"):
        error = getattr(error, name, None) or error
    return error


def _of_group(error: Any) -> Explanation:
    return explain(error.exceptions[0])


def _of_train_controller(error: Any) -> Explanation:
    what, then = explain(error.controller_failure)
    return f"the learner could not be started or supervised: {what}", then


def _of_os_error(error: OSError) -> Explanation:
    where = error.filename if isinstance(error.filename, str | bytes) else None
    where = os.fsdecode(where) if where is not None else ""
    words = _ERRNO.get(error.errno or 0)
    if words is None:
        what, then = _from_text(str(error))
        return what or _message(error), then
    return words[0].format(where or words[2]), words[1]


_ERRNO: dict[int, tuple[str, str, str]] = {  # what, what to do, and what to call a file without a name
    errno.ENOSPC: ("no space is left on the disk of {}", _DISK, "the run"),
    errno.EDQUOT: ("the quota on the disk of {} is used up", _DISK, "the run"),
    errno.EROFS: ("{} is on a read-only file system", "mount it read-write", "the run's folder"),
    errno.EACCES: ("no permission to read or write {}", "change its permissions", "a file"),
    errno.EPERM: ("the system does not permit it: {}", "change its permissions", "a file or a process"),
    errno.ENOENT: ("{} is gone", "do not remove files of a run in progress", "a file"),
    errno.ENOTDIR: ("{} is below something that is not a folder", "give another path", "a file"),
    errno.EISDIR: ("{} is a folder, not a file", "give another path", "a path"),
    errno.ENAMETOOLONG: ("the name {} is too long for the file system", "give a shorter --output-dir", "of a file"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n 65536)", ""),
    errno.ENFILE: ("too many files are open on this machine", "raise its limit (sysctl fs.file-max)", ""),
    errno.EAGAIN: ("the system allows no more processes or memory", "raise the limit (ulimit -u)", ""),
    errno.ENOMEM: ("the machine is out of memory", _MEMORY, ""),
    errno.EIO: ("the disk of {} reports an I/O error", "check the disk", "the run"),
    errno.ESTALE: ("the network file system has lost {}", "mount it again", "a file"),
    errno.EFBIG: ("{} exceeds the file size limit", "raise the limit (ulimit -f)", "a file"),
    errno.EPIPE: ("the reader of {} is gone", "", "a pipe"),
    errno.ECONNREFUSED: ("a service refuses connections", "start it again", ""),
    errno.ECONNRESET: ("the other side closed a connection", "", ""),
    errno.ETIMEDOUT: ("a service does not answer", "check it", ""),
    errno.EHOSTUNREACH: ("a machine cannot be reached", "check the network", ""),
    errno.ENETUNREACH: ("the network cannot be reached", "check the network", ""),
    errno.EADDRINUSE: ("a port is taken by another program", "", ""),
}

_TEXTS: tuple[tuple[str, str, str], ...] = (  # of any exception; the first match counts
    (r"no space left on device|StorageFull|os error 28|code: 28\b", "no space is left on a disk", _DISK),
    (r"disk quota exceeded|os error 122", "the quota on a disk is used up", _DISK),
    (r"database or disk is full", "no space is left on the disk of MLflow's database", _DISK),
    (r"read-only file system|os error 30\b", "a file system is read-only", "mount it read-write"),
    (r"too many open files|os error 24\b", "too many files are open", "raise the limit (ulimit -n 65536)"),
    (r"database is locked", "MLflow's database is locked by another program", "end that program"),
    (r"CUDA out of memory|CUDA error: out of memory", "a GPU is out of memory", _MEMORY),
    (r"can't allocate memory|cannot allocate memory|std::bad_alloc|os error 12\b", "the machine is out of memory",
     _MEMORY),
    (r"magic bytes not found|not a parquet file|parquet file size is|invalid arrow|not an arrow file",
     "a file of tables is truncated or damaged", _COPY),
    (r"PytorchStreamReader|failed finding central directory", "a file of tensors is truncated or damaged", _COPY),
    (r"PytorchStreamWriter|unexpected pos", "a file of tensors could not be written", "check the disk"),
    (r"config file at '([^']+)' is not a valid JSON file", "{} is truncated or damaged", _COPY),
    (r"failed to connect to Ray|could not find any running Ray", "the Ray cluster does not answer", _CLUSTER),
    (r"failed to connect to GCS|GCS.*(?:unreachable|unavailable|not reachable|connection)",
     "the Ray cluster's head (GCS) does not answer", _CLUSTER),
)  # fmt: skip


def _from_text(text: str) -> Explanation:
    for sign, what, then in _TEXTS:
        found = re.search(sign, text, re.IGNORECASE)
        if found:
            return what.format(*found.groups()), then
    return "", ""


def _by_text(otherwise: str, then: str = "") -> Callable[[Any], Explanation]:
    """Explain by the text of the exception; if that is not known, by ``otherwise`` and the text itself."""

    def explanation(error: Any) -> Explanation:
        known = _from_text(str(error))
        return (
            known if known[0] else (f"{otherwise}: {_before_traceback(str(error))}" if str(error) else otherwise, then)
        )

    return explanation


def _damaged(what: str, *endings: str) -> Callable[[Any], Explanation]:
    """Explain a damaged file, whose path is looked up in the local variables of the traceback's frames."""

    def explanation(error: Any) -> Explanation:
        known = _from_text(str(error))
        if known[0] and known[0] != "a file of tables is truncated or damaged":
            return known
        file = _file_in(error, endings)
        return (
            f"{file or what} is truncated or damaged ({_before_traceback(str(error)) or type(error).__name__})",
            _COPY,
        )

    return explanation


def _file_in(error: BaseException, endings: tuple[str, ...]) -> str:
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    for names in reversed(frames):
        for value in names.values():
            if isinstance(value, str | Path) and str(value).endswith(endings) and os.path.isfile(value):
                return str(value)
    return ""


def _of_mlflow(error: Any) -> Explanation:
    """Explain an error of MLflow, which wraps urllib3's message about a connection several times."""
    text = str(error)
    found = re.search(r"connection[^:]*: \[Errno -?\d+\] ([\w ,]+)|\((Read|Connect) timed? ?out|Name or service", text)
    if found:
        return f"MLflow does not answer ({(found[1] or 'no answer in time').lower()})", "check the tracking server"
    return _by_text("MLflow failed", "check the tracking server")(error)


def _of_run_failure(error: Any) -> Explanation:
    """Return the explanation that a failure got where it happened."""
    return error.what, error.then


_KINDS: dict[str, Explanation | Callable[[Any], Explanation]] = {
    "cola_ray.RunFailedError": _of_run_failure,
    # Ray
    "ray.RayTaskError": _of_task,
    "ray.RayActorError": _of_actor,
    "ray.ActorUnavailableError": ("a process of the run cannot be reached", _CLUSTER),
    "ray.WorkerCrashedError": ("a process of the run crashed, or was killed, perhaps for lack of memory", ""),
    "ray.OutOfMemoryError": ("a machine ran out of memory, and Ray killed a process of the run", _MEMORY),
    "ray.NodeDiedError": ("a machine of the Ray cluster died", _CLUSTER),
    "ray.LocalRayletDiedError": ("Ray's process on this machine (raylet) died", _CLUSTER),
    "ray.ObjectStoreFullError": ("Ray's object store is full", "give it more memory (ray start --object-store-memory)"),
    "ray.OutOfDiskError": ("the disk that Ray spills to is full", "make room, or set RAY_TMPDIR to another"),
    "ray.OwnerDiedError": ("data in Ray's object store died with the process that made it", ""),
    "ray.ObjectLostError": ("data in Ray's object store was lost with its process or machine", ""),
    "ray.GetTimeoutError": ("a process of the run did not answer in time", ""),
    "ray.AuthenticationError": ("the Ray cluster did not accept the token", "set RAY_AUTH_TOKEN to the cluster's"),
    "ray.RuntimeEnvSetupError": _by_text("Ray could not set up the environment of the run's processes"),
    "ray.TaskUnschedulableError": ("no machine of the Ray cluster can hold a process of the run", "add machines"),
    "ray.ActorUnschedulableError": ("no machine of the Ray cluster can hold a process of the run", "add machines"),
    "ray.TaskPlacementGroupRemoved": ("the learner's placement group was removed", ""),
    "ray.ActorPlacementGroupRemoved": ("the learner's placement group was removed", ""),
    "ray.RpcError": _by_text("the Ray cluster does not answer", _CLUSTER),
    "ray.RaySystemError": _by_text("Ray failed", _CLUSTER),
    "ray.RayError": _by_text("Ray failed", _CLUSTER),
    # Ray Train and Tune
    "ray.WorkerGroupError": _of_ranks,
    "ray.ControllerError": _of_train_controller,
    "ray.NCCLHangError": ("the learner's ranks hang in NCCL", ""),
    "ray.PreemptionError": ("machines of the learner were preempted", ""),
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
    "json.JSONDecodeError": _damaged("a JSON file", ".json", ".jsonl"),
    "safetensors.SafetensorError": _damaged("a file of weights", ".safetensors"),
    "pyarrow.ArrowInvalid": _damaged("a file of tables", ".parquet", ".arrow"),
    "zipfile.BadZipFile": _damaged("a file of tensors", ".pt", ".bin", ".zip"),
    "_pickle.UnpicklingError": _damaged("a file of tensors", ".pt", ".bin", ".pkl"),
    "builtins.EOFError": _damaged("a file", ".pt", ".bin", ".pkl"),
    # trackers and databases
    "mlflow.MlflowException": _of_mlflow,
    "sqlalchemy.SQLAlchemyError": _by_text("MLflow's database failed", "check the database"),
    "sqlite3.Error": _by_text("MLflow's database failed", "check the database"),
    # the hub and other services
    "requests.RequestException": _by_text("a service does not answer", "check it"),
    "httpx.HTTPError": _by_text("a service does not answer", "check it"),
    # this machine
    "torch.OutOfMemoryError": ("a GPU is out of memory", _MEMORY),
    "builtins.MemoryError": ("the machine is out of memory", _MEMORY),
    "builtins.OSError": _of_os_error,
    "builtins.BaseExceptionGroup": _of_group,
    "builtins.SystemExit": _by_text("a part of the run called sys.exit"),
    "builtins.RecursionError": ("something is nested too deeply for Python", "see the traceback"),
    "concurrent.BrokenExecutor": ("a process of the run died without an error message", ""),
    "subprocess.CalledProcessError": lambda error: (
        f"the command {Path(str(error.cmd if isinstance(error.cmd, str) else error.cmd[0])).name} failed with code "
        f"{error.returncode}", ""),
}  # fmt: skip
