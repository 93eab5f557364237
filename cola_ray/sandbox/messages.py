"""Data between processes that do not trust each other: one JSON value per line, bounded in size and in time.

    Channel.send(value) ──line──> Channel.receive(seconds) ─> value, or BrokenError

Only numbers, text, true, false, null, lists and objects can cross, so a receiver executes nothing. If a peer sends
anything else, too much, half a message or nothing, the receiver raises :class:`BrokenError` and should stop listening.
"""

import json
import os
import select
import time
from collections.abc import Callable, Mapping
from typing import Any

_MAX_DEPTH = 64  # of nested lists and objects
_ENVELOPE_DEPTH = 8  # further levels, for what a message wraps around the data that it carries


class BrokenError(Exception):
    """The other side is gone or late, or sent something that is not a message."""


class LateError(BrokenError):
    """No complete message came in time."""


class GoneError(BrokenError):
    """The other side closed its end."""


class Channel:
    """One end of a connection.

    Args:
        reading: file descriptor to read from; -1 at an end that only writes.
        writing: file descriptor to write to; may be the same, or -1 at an end that only reads.
        max_bytes: size limit of a message, including the end of its line.
    """

    def __init__(self, reading: int, writing: int, max_bytes: int) -> None:
        self.reading, self.writing, self.max_bytes = reading, writing, max_bytes
        self.unread = b""

    def send(self, value: Any, seconds: float | None = None) -> None:
        """Send one message.

        Args:
            value: JSON data.
            seconds: time limit; without it, wait as long as it takes.

        Raises:
            ValueError: the message is too large.
            BrokenError: the other side is gone, or did not read it in time.
        """
        line = json.dumps(value).encode() + b"\n"
        if len(line) > self.max_bytes:
            raise ValueError(f"a message of {len(line)} bytes; at most {self.max_bytes} are allowed")
        deadline = _deadline(seconds)
        while line:
            _wait(self.writing, select.POLLOUT, deadline)
            try:
                line = line[os.write(self.writing, line[: select.PIPE_BUF]) :]
            except OSError as error:
                raise GoneError(str(error)) from None

    def receive(self, seconds: float | None = None) -> Any:
        """Return the value of the next message.

        Args:
            seconds: time limit for the whole message; without it, wait as long as it takes.

        Raises:
            BrokenError: the other side is gone or late, or sent something that is not a message.
        """
        deadline = _deadline(seconds)
        while b"\n" not in self.unread:
            if len(self.unread) >= self.max_bytes:
                raise BrokenError(f"sent more than {self.max_bytes} bytes")
            _wait(self.reading, select.POLLIN, deadline)
            try:
                more = os.read(self.reading, min(1 << 16, self.max_bytes))
            except OSError as error:
                raise GoneError(str(error)) from None
            if not more:
                raise GoneError("closed the connection" + (" within a message" if self.unread else ""))
            self.unread += more
        line, _, self.unread = self.unread.partition(b"\n")
        if len(line) >= self.max_bytes:
            raise BrokenError(f"sent more than {self.max_bytes} bytes")
        try:
            return as_data(json.loads(line.decode("ascii")), "the message", depth=-_ENVELOPE_DEPTH)
        except (ValueError, RecursionError):
            raise BrokenError("sent something that is not JSON") from None
        except TypeError as error:
            raise BrokenError(f"sent too much: {error}") from None

    def silent(self) -> bool:
        """Whether no message is waiting to be received."""
        poll = select.poll()
        poll.register(self.reading, select.POLLIN)
        return not self.unread and not poll.poll(0)


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


def _wait(descriptor: int, event: int, deadline: float | None) -> None:
    """Wait until the descriptor is ready. Uses poll, since descriptors may be too high for select."""
    poll = select.poll()
    poll.register(descriptor, event)
    left = None if deadline is None else max(deadline - time.monotonic(), 0.0) * 1000
    if not poll.poll(left):
        raise LateError("took too long")


def as_data(value: Any, name: str = "value", depth: int = 0) -> Any:
    """Return ``value`` as JSON would give it back: tuples become lists, NumPy's and PyTorch's scalars become numbers.

    Args:
        value: numbers, text, lists and dicts.
        name: of the value in errors.
        depth: levels of nesting around the value.

    Raises:
        TypeError: it holds something else (bytes, arrays, objects, keys that are not text); the message says where.
    """
    if depth > _MAX_DEPTH:
        raise TypeError(f"{name} is nested more than {_MAX_DEPTH} deep; flatten it")
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
                raise TypeError(f"{name} has the key {key!r:.60}; keys must be text")
        return {str(key): as_data(one, f"{name}[{key!r:.60}]", depth + 1) for key, one in value.items()}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return as_data(value.item(), name, depth + 1)
    raise TypeError(f"{name} is {type(value).__name__}; only numbers, text, lists and dicts can be sent")


def as_text(value: object, max_length: int) -> str:
    """Return the value as one line of valid, printable Unicode of at most ``max_length`` characters."""
    whole = str(value)[:max_length].encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() else " " for letter in whole)


def reply_of(call: Callable[[], Any]) -> dict[str, Any]:
    """Return ``{"value": ...}`` with the result of a call as data, or ``{"failure": why}``."""
    try:
        return {"value": as_data(call())}
    except Exception as error:
        return {"failure": f"raised {type(error).__name__}: {error_text(error)}"}


def error_text(error: BaseException) -> str:
    """Return the error's message, or "no message" if its own ``__str__`` raises."""
    try:
        return as_text(error, 300)
    except Exception:
        return "no message"


def is_reply(reply: Any) -> bool:
    """Whether a message has the form that :func:`reply_of` returns."""
    if not isinstance(reply, dict) or len(reply) != 1:
        return False
    return "value" in reply or isinstance(reply.get("failure"), str)
