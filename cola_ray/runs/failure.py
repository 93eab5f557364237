"""How a run ends when it fails: with one line that says what went wrong and what to do, and an exit code.

    with explained_failures(folder): ...    raises RunFailedError("WHAT; WHAT TO DO (traceback in FILE)") instead

The whole traceback goes to ``error.txt`` in the run's folder, and to its ``log.jsonl`` as one event.
"""

import contextlib
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from cola_ray.runs.event_log import EventLog
from cola_ray.runs.explanations import explain
from cola_ray.runs.redaction import redacted
from cola_ray.settings.config import ConfigError, RunFailedError

EXIT_CODES: Mapping[int, str] = {
    0: "finished",
    1: "failed: one line says what went wrong and what to do, and names the file that has the traceback",
    2: "refused: one line for each mistake in the settings; nothing was started",
    130: "stopped by Ctrl-C, SIGTERM or SIGHUP, with a checkpoint; continue with --resume",
}
ERROR_FILE = "error.txt"
RESUME = "the same command with --resume continues from the last checkpoint"


@contextlib.contextmanager
def explained_failures(folder: Path | None = None) -> Iterator[None]:
    """Turn any exception within the block into a :class:`RunFailedError`, except stops and refused settings.

    Used as a decorator of a job, it also makes SIGTERM and SIGHUP act like Ctrl-C, unless another handler is set.

    Args:
        folder: of the run; without one, the traceback goes to a temporary file.
    """
    with _stopped_by_signals():
        try:
            yield
        except (ConfigError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            failed = run_failure(error, folder)
            if failed is error:
                raise
            raise failed from error


def run_failure(error: BaseException, folder: Path | None = None) -> RunFailedError:
    """Explain an error and keep its traceback; an error for which this has been done is returned as it is."""
    if isinstance(error, RunFailedError) and error.file:
        return error
    what, then = explain(error)
    trace = "".join(traceback.format_exception(error))
    next_step = f"{then}; then {RESUME}" if then else RESUME
    failed = RunFailedError(redacted(what), redacted(next_step), _keep(redacted(trace), folder))
    if folder is not None:
        with contextlib.suppress(Exception):  # a full disk may be what ended the run
            EventLog(folder).append("fail", reason=str(failed), traceback=trace)
    return failed


def _keep(trace: str, folder: Path | None) -> str:
    """Write the traceback to a file and return its name, or "" if no disk takes it."""
    with contextlib.suppress(OSError):
        if folder is not None:
            (folder / ERROR_FILE).write_text(trace)
            return str(folder / ERROR_FILE)
    with (
        contextlib.suppress(OSError),
        tempfile.NamedTemporaryFile("w", prefix="cola_ray-error-", suffix=".txt", delete=False) as file,
    ):
        file.write(trace)
        return file.name
    return ""


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt, except where they are ignored (nohup) or have a handler."""
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
    """Whether this is the handler that importing Ray installs, which makes a SIGTERM an exit with code 15."""
    return str(getattr(handler, "__module__", "")).startswith("ray.")
