"""A process of an agent program: it is started, its last output is kept, and it is ended with all it has started."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cola_ray.rollout import process_tree
from cola_ray.rollout.playing import Playing

_TAIL = 2000  # characters of a program's last output that are kept


@dataclass(eq=False)
class Process:
    """A running program."""

    key: str  # of the episode that it was started for; the program asks for further episodes under this key
    own: Playing | None  # that episode, until the program plays it or asks for it
    running: asyncio.subprocess.Process | None = None
    playing: set[Playing] = field(default_factory=set)
    asking: int = 0  # pending requests for an episode
    idle_since: float = 0.0  # when its last episode ended
    last_words: str = ""

    @property
    def is_idle(self) -> bool:
        return not self.playing and not self.asking

    async def start(self, command: Sequence[str], told: Mapping[str, str]) -> "asyncio.Task[None]":
        """Start the program; returns the task that keeps the end of its output.

        Its output is a pipe of our own: with asyncio's pipe, ``wait`` would also wait for all others that hold its end.
        """
        reading, writing = os.pipe()
        stream = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb")
        )
        try:
            self.running = await asyncio.create_subprocess_exec(
                sys.executable, "-SE", process_tree.__file__, str(os.getpid()), *command, env={**os.environ, **told},
                start_new_session=True, stdin=asyncio.subprocess.DEVNULL, stdout=writing, stderr=writing,
            )  # fmt: skip
        finally:
            os.close(writing)
        return asyncio.create_task(self._listen(stream))

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        while said := await stream.read(4096):
            self.last_words = (self.last_words + said.decode(errors="replace"))[-_TAIL:]

    def kill(self) -> None:
        """Kill the program with everything it has started (process_tree.py)."""
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                self.running.terminate()
