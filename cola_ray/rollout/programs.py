"""Episodes that a program of somebody's own plays: it talks to the policy as to OpenAI's API, and says what came of it.

    ticket ─> Programs.play ─> a process of task.command, in its environment OPENAI_BASE_URL: this episode's
                                   │   POST  chat/completions  {"messages": [...], ...}   as often as it likes
                                   v
                    Conversation.state ─> generate ─> Utterance ─> Conversation.answer     a turn each
                                   │   POST  reward            {"reward": 1.0}            the end
                                   v
                                Episode

A process plays its own episode and ends. One that would rather play many, and at once, asks for each:

    POST  episodes  {}  ─>  {"base_url": "http://...", "seed": 7}       waits until there is one

Whatever a program does costs its own episode alone: one that ends without a reward, that hangs or that sends nonsense
is a failed episode, counted by ``task.max_failed_rewards``. It runs with the rights of the run, as its owner's code.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from cola_ray.experience import Episode, Turn
from cola_ray.rollout.conversation import Conversation, RefusedError
from cola_ray.rollout.episode import Generate, Utterance
from cola_ray.tasks.protocol import not_a_reward

START_S = 300.0
"""Seconds that a program may take to its first request: it may have much to import."""
_MAX_BODY = 4 << 20  # bytes of a request
_MAX_CHOICES = 64
_TAIL = 2000  # characters of a program's last words that are kept
# Ends with its parent, however that ends.
_TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


@dataclass(frozen=True)
class Limits:
    """What all episodes of a worker share.

    Attributes:
        processes: of the program at a time.
        quiet_s: seconds that a program may take between an answer and its next request.
        max_turns: of an episode; further ones are refused.
        max_state_tokens: of what a turn is said in.
    """

    processes: int
    quiet_s: float
    max_turns: int
    max_state_tokens: int


@dataclass(eq=False)
class _Process:
    """A program that runs."""

    key: str  # of the episode that it was started for, by which it asks for others
    own: "_Playing | None"  # that episode, until it plays it or asks for it
    running: asyncio.subprocess.Process | None = None
    playing: "set[_Playing]" = field(default_factory=set)
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
                *command, env={**os.environ, **told}, start_new_session=True, stdin=asyncio.subprocess.DEVNULL,
                stdout=writing, stderr=writing,
            )  # fmt: skip
        finally:
            os.close(writing)
        return asyncio.create_task(self._listen(stream))

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        while said := await stream.read(4096):
            self.last_words = (self.last_words + said.decode(errors="replace"))[-_TAIL:]

    def kill(self) -> None:
        """With whatever it has started."""
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.running.pid, signal.SIGKILL)


@dataclass(eq=False)
class _Playing:
    """An episode that is under way."""

    position: int
    seed: int
    generate: Generate
    conversation: Conversation
    ended: asyncio.Future[Episode]
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    turns: list[tuple[list[int], Utterance]] = field(default_factory=list)  # (state, utterance)
    rewards: list[float] = field(default_factory=list)  # of each turn
    num_asked: int = 0  # turns so far, with those that are being generated
    num_retokenised: int = 0
    busy: int = 0  # requests that are being answered
    heard: bool = False
    quiet_since: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While a request is answered, it is not the program that is slow."""
        self.heard, self.busy = True, self.busy + 1
        try:
            yield
        finally:
            self.busy, self.quiet_since = self.busy - 1, time.monotonic()

    def end(self, failure: str = "") -> None:
        if not self.ended.done():
            self.ended.set_result(self._episode(failure))

    def _episode(self, failure: str) -> Episode:
        turns, text, before = list[Turn](), "", list[int]()
        decode = self.conversation.chat.tokenizer.decode
        following = [*(state for state, _ in self.turns[1:]), []]
        for (state, said), reward, after in zip(self.turns, self.rewards, following, strict=False):
            whole = [*state, *said.token_ids.tolist()]
            news = state[len(before) :] if state[: len(before)] == before else state
            text += decode(news) + decode(said.token_ids.tolist())
            answered = after[len(whole) :] if after[: len(whole)] == whole else []
            turns.append(said.as_turn(state, reward, answered))
            before = whole
        return Episode(
            self.position, tuple(turns), not failure, text, failure=failure, retokenised=self.num_retokenised
        )


class Programs:
    """A server for agent programs, and the processes of one that it starts.

    Args:
        command: of the program, split as a shell would.
        converse: makes the conversation of an episode.
    """

    def __init__(self, command: str, converse: Callable[[], Conversation], limits: Limits) -> None:
        self.command, self.converse, self.limits = shlex.split(command), converse, limits
        self.playing: dict[str, _Playing] = {}
        self.waiting: deque[_Playing] = deque()  # for a program
        self.homes: dict[str, _Process] = {}  # of each episode under way, by key
        self.askers: deque[tuple[_Process, asyncio.Future[_Playing]]] = deque()
        self.processes: dict[str, _Process] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.opening, self.address = asyncio.Lock(), ""
        self.runner: web.AppRunner | None = None

    async def play(self, position: int, seed: int, generate: Generate) -> Episode:
        """Have an episode played to its end; what goes wrong there is its ``failure``.

        Args:
            position: of the ticket.
            seed: that the program is told.
        """
        await self._open()
        ended: asyncio.Future[Episode] = asyncio.get_running_loop().create_future()
        episode = _Playing(position, seed, generate, self.converse(), ended)
        self.playing[episode.key] = episode
        self.waiting.append(episode)
        try:
            self._hand_out()
            return await ended
        finally:
            self._forget(episode)

    async def close(self) -> None:
        for process in self.processes.values():
            process.kill()
        if self.runner is not None:
            await self.runner.cleanup()

    def _forget(self, episode: _Playing) -> None:
        episode.end("was given up")
        del self.playing[episode.key]
        if episode in self.waiting:
            self.waiting.remove(episode)
        process = self.homes.pop(episode.key, None)
        if process is not None:
            process.playing.discard(episode)
            if process.is_idle:
                self._spawn(self._send_home(process))

    # --- processes ----------------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give episodes that wait to programs that ask for them, and start programs for others."""
        while self.waiting and self.askers:
            process, asked = self.askers.popleft()
            if not asked.done():
                episode = self.waiting.popleft()
                self._give(episode, process)
                asked.set_result(episode)
        while self.waiting and len(self.processes) < self.limits.processes:
            episode = self.waiting.popleft()
            process = self.processes[episode.key] = _Process(episode.key, episode)
            self._give(episode, process)
            self._spawn(self._run(process, episode))

    def _give(self, episode: _Playing, process: _Process) -> None:
        process.playing.add(episode)
        self.homes[episode.key] = process
        episode.quiet_since = time.monotonic()
        self._spawn(self._watch(episode, process))

    def _take_back(self, episode: _Playing, process: _Process) -> None:
        """An episode that its program has not heard of goes to the next one."""
        process.playing.discard(episode)
        self.homes.pop(episode.key, None)
        if not episode.ended.done():
            self.waiting.appendleft(episode)
            self._hand_out()

    async def _run(self, process: _Process, episode: _Playing) -> None:
        """Start a program and see it to its end."""
        told = {"OPENAI_BASE_URL": self._url(episode), "OPENAI_API_KEY": "none", "COLA_RAY_SEED": str(episode.seed),
                "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))}  # fmt: skip
        try:
            listening = await process.start([sys.executable, "-SEc", _TIED, *self.command], told)
            assert process.running is not None
            code = await process.running.wait()
            process.kill()  # what it has started may go on, and hold its output open
            await asyncio.wait([listening], timeout=1.0)
            listening.cancel()
            words = process.last_words.strip().splitlines()
            why = f"its program ended with exit code {code} and no reward" + (f": {words[-1]}" if words else "")
        except OSError as error:
            why = f"its program could not be started: {error}"
        del self.processes[process.key]
        for one in [*process.playing]:
            one.end(why)
        self._hand_out()

    async def _watch(self, episode: _Playing, process: _Process) -> None:
        """End an episode whose program is quiet for too long."""
        while not episode.ended.done() and self.homes.get(episode.key) is process:
            limit = self.limits.quiet_s if episode.heard else START_S
            left = limit if episode.busy else episode.quiet_since + limit - time.monotonic()
            if left > 0:
                await asyncio.wait([episode.ended], timeout=min(left, self.limits.quiet_s))  # it may be heard meanwhile
                continue
            process.playing.discard(episode)
            if process.is_idle:
                process.kill()
            episode.end(f"its program took longer than {limit:g} s")

    async def _send_home(self, process: _Process) -> None:
        """End a program that neither plays nor asks for long, and does not end by itself."""
        idle_since = process.idle_since = time.monotonic()
        await asyncio.sleep(self.limits.quiet_s)
        if process.is_idle and process.idle_since == idle_since:
            process.kill()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        """An error of ours ends every episode: none would hear of it otherwise."""
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            for episode in self.playing.values():
                if not episode.ended.done():
                    episode.ended.set_exception(error)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        async with self.opening:
            if self.runner is not None:
                return
            app = web.Application(client_max_size=_MAX_BODY, middlewares=[_in_openais_words])
            app.add_routes([
                web.post("/{key}/v1/chat/completions", self._complete),
                web.post("/{key}/v1/reward", self._reward),
                web.post("/{key}/v1/episodes", self._ask),
                web.get("/{key}/v1/models", self._models),
            ])  # fmt: skip
            self.runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", 0)
            await site.start()
            host, port = self.runner.addresses[0][:2]
            self.address = f"http://{host}:{port}"

    def _url(self, episode: _Playing) -> str:
        return f"{self.address}/{episode.key}/v1"

    async def _complete(self, request: web.Request) -> web.Response:
        episode, body, limits = self._episode(request), await _body(request), self.limits
        with episode.working():
            if body.get("stream"):
                raise RefusedError("stream: answers come whole while a model is trained; leave it out")
            count, most = (
                _whole(body, "n", 1, _MAX_CHOICES),
                body.get("max_completion_tokens") or body.get("max_tokens"),
            )
            longest = 0 if most is None else _whole({"max_tokens": most}, "max_tokens", 1, 1 << 30)
            state = episode.conversation.state(body)
            if len(state.ids) > limits.max_state_tokens:
                raise RefusedError(
                    f"messages: {len(state.ids)} tokens, and rollout.max_prompt_tokens is {limits.max_state_tokens}; "
                    "leave some out", "context_length_exceeded",
                )  # fmt: skip
            turns = range(episode.num_asked, episode.num_asked + count)
            if turns.stop > limits.max_turns:
                raise RefusedError(
                    f"this would be turn {turns.stop}, and task.options.max_turns is {limits.max_turns}; send the "
                    "reward", "max_turns",
                )  # fmt: skip
            episode.num_asked = turns.stop
            try:
                said = await asyncio.gather(*(episode.generate(state.ids, turn, longest) for turn in turns))
            except Exception as error:  # the engine's, and no fault of the program
                if not episode.ended.done():
                    episode.ended.set_exception(error)
                raise _over() from None
            if episode.ended.done():
                raise _over()
            answer = episode.conversation.answer(body, state, said)
            episode.turns += [(state.ids, one) for one in said]
            episode.rewards += [0.0] * count
            episode.num_retokenised += state.retokenised
            return web.json_response(answer)

    async def _reward(self, request: web.Request) -> web.Response:
        episode, body = self._episode(request), await _body(request)
        with episode.working():
            if episode.ended.done():
                raise _over()
            done = body.get("done", True)
            if not isinstance(done, bool):
                raise RefusedError(f"done = {done!r:.60}: give true or false")
            if why := not_a_reward(body.get("reward")):
                raise RefusedError(f"reward = {why}")
            if not episode.turns:
                raise RefusedError("there is nothing to reward: the model has not been asked anything yet")
            episode.rewards[-1] += float(body["reward"])
            if done:
                episode.end()
            return web.json_response({"return": sum(episode.rewards)})

    async def _ask(self, request: web.Request) -> web.Response:
        process = self.processes.get(request.match_info["key"])
        if process is None:
            raise RefusedError("episodes: ask at the address that the program was started with")
        episode, process.own = process.own, None
        if episode is None or episode.ended.done():
            asked: asyncio.Future[_Playing] = asyncio.get_running_loop().create_future()
            self.askers.append((process, asked))
            process.asking += 1
            try:
                self._hand_out()
                episode = await asked
            except asyncio.CancelledError:  # whoever asked is gone
                if asked.done() and not asked.cancelled():
                    self._take_back(asked.result(), process)
                raise
            finally:
                process.asking -= 1
        return web.json_response({"base_url": self._url(episode), "seed": episode.seed})

    async def _models(self, request: web.Request) -> web.Response:
        self._episode(request)
        return web.json_response({"object": "list", "data": [{"id": "cola_ray", "object": "model", "created": 0}]})

    def _episode(self, request: web.Request) -> _Playing:
        episode = self.playing.get(request.match_info["key"])
        if episode is None or episode.ended.done():
            raise _over()
        process = self.homes.get(episode.key)
        if process is not None and process.own is episode:
            process.own = None  # it plays this one itself
        return episode


def _over() -> RefusedError:
    return RefusedError("this episode is over", "episode_over")


@web.middleware
async def _in_openais_words(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except RefusedError as error:
        status, why, code = 400, str(error), error.code
    except web.HTTPException as error:
        status, why, code = error.status, error.reason, "invalid_request_error"
    told = {"message": why, "type": "invalid_request_error", "param": None, "code": code}
    return web.json_response({"error": told}, status=status)


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RefusedError("the body is not a JSON object")
    return body


def _whole(body: dict[str, Any], name: str, default: int, most: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise RefusedError(f"{name} = {value!r:.60}: give a whole number from 1 to {most}")
    return value
