"""Data between processes that do not trust each other: one JSON value a line, bounded in size and in time.

    Channel.send(value) ──line──> Channel.receive(seconds) ─> value, or BrokenError

Numbers, text, true, false, null, lists and objects can cross, and nothing that a receiver would have to execute. A peer
that sends anything else, too much, half of it or nothing is not listened to any further.
"""

import json
import os
import select
import time
from collections.abc import Mapping
from typing import Any

_DEPTH = 64  # of lists and objects within each other
_AROUND = 8  # more of them, that a message has around what it carries


class BrokenError(Exception):
    """The other side is gone, is late, or sent what is no message."""


class LateError(BrokenError):
    """Nothing whole came in time."""


class GoneError(BrokenError):
    """The other side closed its end."""


class Channel:
    """One end of a connection.

    Args:
        reading: file descriptor to read from, as good as -1 at an end that only writes.
        writing: the one to write to; may be the same.
        most: bytes that a message may have, its line's end included.
    """

    def __init__(self, reading: int, writing: int, most: int) -> None:
        self.reading, self.writing, self.most = reading, writing, most
        self.rest = b""

    def send(self, value: Any, seconds: float | None = None) -> None:
        """One message; without ``seconds`` for as long as it takes. ValueError where it is too long for a message."""
        line = json.dumps(value).encode() + b"\n"
        if len(line) > self.most:
            raise ValueError(f"{len(line)} bytes are more than the {self.most} that a message may have")
        deadline = _deadline(seconds)
        while line:
            _wait(self.writing, select.POLLOUT, deadline)
            try:
                line = line[os.write(self.writing, line[: select.PIPE_BUF]) :]
            except OSError as error:
                raise GoneError(str(error)) from None

    def receive(self, seconds: float | None = None) -> Any:
        """The next message's value; ``seconds`` count until all of it is there."""
        deadline = _deadline(seconds)
        while b"\n" not in self.rest:
            if len(self.rest) >= self.most:
                raise BrokenError(f"sent more than {self.most} bytes")
            _wait(self.reading, select.POLLIN, deadline)
            try:
                more = os.read(self.reading, min(1 << 16, self.most))
            except OSError as error:
                raise GoneError(str(error)) from None
            if not more:
                raise GoneError("closed its end" + (" within a message" if self.rest else ""))
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        if len(line) >= self.most:
            raise BrokenError(f"sent more than {self.most} bytes")
        try:
            return as_data(json.loads(line.decode("ascii")), "the message", depth=-_AROUND)
        except (ValueError, RecursionError):
            raise BrokenError("sent what is no JSON") from None
        except TypeError as error:
            raise BrokenError(f"sent too much: {error}") from None

    def silent(self) -> bool:
        """Whether the other side has said nothing that was not received yet."""
        poll = select.poll()
        poll.register(self.reading, select.POLLIN)
        return not self.rest and not poll.poll(0)


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


def _wait(descriptor: int, event: int, deadline: float | None) -> None:
    """Until something can be done with it; poll, for descriptors may be too many for select."""
    poll = select.poll()
    poll.register(descriptor, event)
    left = None if deadline is None else max(deadline - time.monotonic(), 0.0) * 1000
    if not poll.poll(left):
        raise LateError("took too long")


def as_data(value: Any, name: str = "value", depth: int = 0) -> Any:
    """``value`` as JSON gives it back: tuples become lists, scalars of NumPy and PyTorch numbers.

    Raises TypeError, naming the place, for what is no data: bytes, arrays, objects, keys that are no text.
    """
    if depth > _DEPTH:
        raise TypeError(f"{name} is nested more than {_DEPTH} deep; flatten it")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list | tuple):
        return [as_data(one, f"{name}[{index}]", depth + 1) for index, one in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r:.60}; keys are text")
        return {str(key): as_data(one, f"{name}[{key!r:.60}]", depth + 1) for key, one in value.items()}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return as_data(value.item(), name, depth + 1)
    raise TypeError(f"{name} is {type(value).__name__}; only numbers, text, lists and dicts of them can be kept")


def as_text(value: object, most: int) -> str:
    """Text that can be stored and shown anywhere: Unicode, of one line, not too long."""
    whole = str(value)[:most].encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() else " " for letter in whole)
