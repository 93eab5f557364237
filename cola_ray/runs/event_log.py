"""``log.jsonl``: a run's events, one JSON object per line, written to the run's own disk before anything else.

    log = EventLog(folder)
    log.append("step", version=3, **metrics)     {"time": ..., "run": ..., "event": "step", "version": 3, ...}
    read(folder)                                 all complete lines; one that a kill or a full disk cut off is skipped

Every event has the run's id, which is chosen at the first event and kept when the run is resumed.
"""

import contextlib
import json
import secrets
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cola_ray.runs.redaction import redacted_tree

NAME = "log.jsonl"


class EventLog:
    """The log of one run; thread-safe.

    Args:
        folder: of the run; must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self.lock = threading.Lock()
        self.run: str = next((event["run"] for event in read(folder) if event.get("run")), secrets.token_hex(16))

    def append(self, event: str, **facts: Any) -> None:
        """Append an event; facts are redacted.

        Raises:
            OSError: the line could not be written.
        """
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps(redacted_tree({"time": when, "run": self.run, "event": event, **facts}), default=str)
        with self.lock, self.file.open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                line = "\n" + line  # so that a line that was cut off does not spoil this one
            file.write(line.encode() + b"\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Return all complete events in order; [] if there is no log."""
    return [event for _, event in read_from(folder, 0)]


def read_from(folder: Path, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the events after the first ``start`` bytes, each with the number of bytes up to its end."""
    with contextlib.suppress(FileNotFoundError), (folder / NAME).open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return  # it is still being written
            start += len(line)
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    yield start, event


def history(events: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Return metrics by step from the step events; if a step was repeated, the last value counts."""
    found: dict[int, dict[str, float]] = {}
    for event in events:
        if event["event"] == "step":
            metrics = {
                name: float(value) for name, value in event.items()
                if name not in ("time", "run", "event", "version") and isinstance(value, int | float)
            }  # fmt: skip
            found.setdefault(int(event["version"]), {}).update(metrics)
    return found


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")
