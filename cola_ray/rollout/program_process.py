"""A process of an agent program: starting it, keeping the end of its output, and killing it with all its children."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cola_ray.rollout import process_tree
from cola_ray.rollout.playing import Playing

_TAIL = 2000  # characters of a program's output that are kept, from its end


@dataclass(eq=False)
class Process:
    """A running program."""

    key: str  # of the episode that it was started for; it uses this key to ask for other episodes
    own: Playing | None  # that episode, until the program plays it or asks for it
    running: asyncio.subprocess.Process | None = None
    playing: set[Playing] = field(default_factory=set)
    asking: int = 0  # pending requests for an episode
    idle_since: float = 0.0  # when it last had an episode
    last_words: str = ""

    @property
    def is_idle(self) -> bool:
        return not self.playing and not self.asking

    async def start(self, command: Sequence[str], told: Mapping[str, str]) -> "asyncio.Task[None]":
        """Start the program; return the task that keeps the end of its output.

        Its output goes to a pipe made here: with asyncio's own pipe, ``wait`` would also wait until every process that
        holds the other end has closed it.
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
        """Kill the program and all processes that it started (process_tree.py)."""
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                self.running.terminate()
