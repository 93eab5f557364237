"""A process of an agent program: it starts, says its last words, and ends with all that it has started."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cola_ray.rollout import process_tree
from cola_ray.rollout.playing import Playing

_TAIL = 2000  # characters of a program's last words that are kept


@dataclass(eq=False)
class Process:
    """A program that runs."""

    key: str  # of the episode that it was started for, by which it asks for others
    own: Playing | None  # that episode, until it plays it or asks for it
    running: asyncio.subprocess.Process | None = None
    playing: set[Playing] = field(default_factory=set)
    asking: int = 0  # requests for an episode that wait
    idle_since: float = 0.0  # when it last had an episode
    last_words: str = ""

    @property
    def is_idle(self) -> bool:
        return not self.playing and not self.asking

    async def start(self, command: Sequence[str], told: Mapping[str, str]) -> "asyncio.Task[None]":
        """Start it; returns who keeps the end of what it prints.

        Its output is a pipe of ours: asyncio's would have its ``wait`` wait for all that hold the other end, too.
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
        """With whatever it has started (process_tree.py)."""
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                self.running.terminate()
