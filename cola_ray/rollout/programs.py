"""Episodes that an external agent program plays: it calls the policy through OpenAI's API, and reports rewards.

    ticket ─> Programs.play ─> a process of task.command, with this episode's OPENAI_BASE_URL in its environment
                                   │   POST  chat/completions  {"messages": [...], ...}   as often as it likes
                                   v
                    Conversation.state ─> generate ─> Utterance ─> Conversation.answer     one turn each
                                   │   POST  reward            {"reward": 1.0}            the end
                                   v
                                Episode

By default a process plays its own episode and ends. One that plays many, also at the same time, asks for each:

    POST  episodes  {}  ─>  {"base_url": "http://...", "seed": 7}       waits until there is one

Whatever a program does costs only its own episode: if it ends without a reward, hangs or sends nonsense, the episode
has failed, and counts for ``task.max_failed_rewards``. A program runs with the rights of the run, as its owner's code.
"""

import asyncio
import os
import shlex
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from aiohttp import web

from cola_ray.experience import Episode
from cola_ray.rollout import program_requests
from cola_ray.rollout.conversation import Conversation, State
from cola_ray.rollout.episode import Generate
from cola_ray.rollout.playing import Playing
from cola_ray.rollout.program_process import Process
from cola_ray.rollout.program_requests import RefusedError

T = TypeVar("T")
START_S = 300.0
"""Seconds that a program may take until its first request: it may have much to import."""
_MAX_BODY = 4 << 20  # bytes of a request


@dataclass(frozen=True)
class Limits:
    """Limits that all episodes of a worker share.

    Attributes:
        processes: of the program, at the same time.
        quiet_s: seconds that a program may take between an answer and its next request.
        max_turns: of an episode; further turns are refused.
        max_state_tokens: of a turn's state.
    """

    processes: int
    quiet_s: float
    max_turns: int
    max_state_tokens: int


class Programs:
    """A server for agent programs, which also starts the program's processes.

    Args:
        command: of the program, split as a shell would.
        converse: makes an episode's conversation.
    """

    def __init__(self, command: str, converse: Callable[[], Conversation], limits: Limits) -> None:
        self.command, self.converse, self.limits = shlex.split(command), converse, limits
        self.playing: dict[str, Playing] = {}
        self.waiting: deque[Playing] = deque()  # episodes without a program
        self.homes: dict[str, Process] = {}  # the process of each episode under way, by the episode's key
        self.askers: deque[tuple[Process, asyncio.Future[Playing]]] = deque()
        self.processes: dict[str, Process] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.opening, self.address = asyncio.Lock(), ""
        self.runner: web.AppRunner | None = None

    async def play(self, position: int, seed: int, generate: Generate, read_state: Generate | None = None) -> Episode:
        """Have an episode played to its end; errors become its ``failure``.

        Args:
            position: of the ticket.
            seed: given to the program.
            read_state: called for the last state of an episode that a limit cut; its features stand for the rest.
        """
        await self._open()
        ended: asyncio.Future[Episode] = asyncio.get_running_loop().create_future()
        episode = Playing(position, seed, generate, read_state, self.converse(), ended)
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

    def _forget(self, episode: Playing) -> None:
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
        """Give waiting episodes to programs that ask for one, and start programs for the others."""
        while self.waiting and self.askers:
            process, asked = self.askers.popleft()
            if not asked.done():
                episode = self.waiting.popleft()
                self._give(episode, process)
                asked.set_result(episode)
        while self.waiting and len(self.processes) < self.limits.processes:
            episode = self.waiting.popleft()
            process = self.processes[episode.key] = Process(episode.key, episode)
            self._give(episode, process)
            self._spawn(self._run(process, episode))

    def _give(self, episode: Playing, process: Process) -> None:
        process.playing.add(episode)
        self.homes[episode.key] = process
        episode.quiet_since = time.monotonic()
        self._spawn(self._watch(episode, process))

    def _take_back(self, episode: Playing, process: Process) -> None:
        """Give an episode that its program has not heard of to another program."""
        process.playing.discard(episode)
        self.homes.pop(episode.key, None)
        if not episode.ended.done():
            self.waiting.appendleft(episode)
            self._hand_out()

    async def _run(self, process: Process, episode: Playing) -> None:
        """Start a program, and wait until it ends."""
        direct = dict.fromkeys([os.environ.get("no_proxy"), os.environ.get("NO_PROXY"), "127.0.0.1"])
        no_proxy = ",".join(filter(None, direct))
        told = {"OPENAI_BASE_URL": self._url(episode), "OPENAI_API_KEY": "none", "COLA_RAY_SEED": str(episode.seed),
                "NO_PROXY": no_proxy, "no_proxy": no_proxy}  # fmt: skip
        try:
            listening = await process.start(self.command, told)
            assert process.running is not None
            code = await process.running.wait()
            await asyncio.wait([listening], timeout=1.0)  # another user's process may hold its output open
            listening.cancel()
            words = process.last_words.strip().splitlines()
            why = f"its program ended with exit code {code} and no reward" + (f": {words[-1]}" if words else "")
        except OSError as error:
            why = f"its program could not be started: {error}"
        del self.processes[process.key]
        for one in [*process.playing]:
            one.end(why)
        self._hand_out()

    async def _watch(self, episode: Playing, process: Process) -> None:
        """End an episode whose program sends no request for too long."""
        while not episode.ended.done() and self.homes.get(episode.key) is process:
            limit = self.limits.quiet_s if episode.heard else START_S
            left = limit if episode.busy else episode.quiet_since + limit - time.monotonic()
            if left > 0:
                await asyncio.wait([episode.ended], timeout=min(left, self.limits.quiet_s))  # a request may still come
                continue
            process.playing.discard(episode)
            if process.is_idle:
                process.kill()
            episode.end(f"its program took longer than {limit:g} s")

    async def _send_home(self, process: Process) -> None:
        """End a program that has been idle for long (no episode, no request for one) and does not end by itself."""
        idle_since = process.idle_since = time.monotonic()
        await asyncio.sleep(self.limits.quiet_s)
        if process.is_idle and process.idle_since == idle_since:
            process.kill()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        """An error in our own code ends every episode: otherwise none would notice it."""
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
                web.get("/{key}/v1/models/{name:.+}", self._model),
            ])  # fmt: skip
            self.runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", 0)
            await site.start()
            host, port = self.runner.addresses[0][:2]
            self.address = f"http://{host}:{port}"

    def _url(self, episode: Playing) -> str:
        return f"{self.address}/{episode.key}/v1"

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        episode, body = self._episode(request), program_requests.as_body(await request.read())
        with episode.working():
            count, longest = program_requests.choices(body)
            state = self._state(episode, body)
            if len(episode.taken) + count > self.limits.max_turns:
                episode.left_in = state
                raise RefusedError(
                    f"this would be turn {len(episode.taken) + count}, and task.options.max_turns is "
                    f"{self.limits.max_turns}; send the reward", "max_turns",
                )  # fmt: skip
            with episode.turns(count) as turns:
                generated = (episode.generate(state.ids, turn, longest) for turn in turns)
                said = await _engines(episode, asyncio.gather(*generated))
                answer = episode.conversation.answer(body, state, said, turns)
                episode.said(state, turns, said, answer["id"])
                return await _sent(web.json_response(answer), request)

    async def _reward(self, request: web.Request) -> web.Response:
        episode, body = self._episode(request), program_requests.as_body(await request.read())
        with episode.working():
            if episode.ended.done():
                raise _over()
            given = program_requests.reward(body)
            episode.rewarded(given)  # before the engine is called
            cut_in, final = None, None
            if given.done and (episode.left_in is not None if given.truncated is None else given.truncated):
                cut_in = self._state(episode, body) if "messages" in body else episode.last_state()
                if episode.read_state is not None:
                    seen = cut_in.ids[-self.limits.max_state_tokens :]
                    read = await _engines(episode, episode.read_state(seen, len(episode.taken)))
                    final = read.features()[0]
            episode.reward(episode.rewarded(given), given.value)
            if given.done:
                episode.end(cut_in=cut_in, final=final)
            return web.json_response({"return": episode.total_reward})

    def _state(self, episode: Playing, body: program_requests.Body) -> State:
        state, most = episode.conversation.state(body), self.limits.max_state_tokens
        if len(state.ids) > most:
            raise RefusedError(
                f"messages: {len(state.ids)} tokens, and {program_requests.TOO_LONG} {most} tokens "
                f"(rollout.max_prompt_tokens is {most}); leave some out", "context_length_exceeded",
            )  # fmt: skip
        return state

    async def _ask(self, request: web.Request) -> web.Response:
        process = self.processes.get(request.match_info["key"])
        if process is None:
            raise RefusedError("episodes: ask at the address that the program was started with")
        episode, process.own = process.own, None
        if episode is None or episode.ended.done():
            asked: asyncio.Future[Playing] = asyncio.get_running_loop().create_future()
            self.askers.append((process, asked))
            process.asking += 1
            try:
                self._hand_out()
                episode = await asked
            except asyncio.CancelledError:  # the client is gone
                if asked.done() and not asked.cancelled():
                    self._take_back(asked.result(), process)
                raise
            finally:
                process.asking -= 1
        return web.json_response({"base_url": self._url(episode), "seed": episode.seed})

    async def _models(self, request: web.Request) -> web.Response:
        self._episode(request)
        return web.json_response({"object": "list", "data": [program_requests.model("cola_ray")]})

    async def _model(self, request: web.Request) -> web.Response:
        """Any name means the policy: programs look it up before they begin."""
        self._episode(request)
        return web.json_response(program_requests.model(request.match_info["name"]))

    def _episode(self, request: web.Request) -> Playing:
        episode = self.playing.get(request.match_info["key"])
        if episode is None or episode.ended.done():
            raise _over()
        process = self.homes.get(episode.key)
        if process is not None and process.own is episode:
            process.own = None  # the program plays this episode itself
        return episode


def _over() -> RefusedError:
    return RefusedError("this episode is over", "episode_over")


async def _engines(episode: Playing, made: Awaitable[T]) -> T:
    """The engine's result; an error of the engine is not the program's fault, and ends the run."""
    try:
        done = await made
    except Exception as error:
        if not episode.ended.done():
            episode.ended.set_exception(error)
        raise _over() from None
    if episode.ended.done():
        raise _over()
    return done


async def _sent(response: web.Response, request: web.Request) -> web.Response:
    """Send an answer; raises ConnectionError if the client is gone."""
    await response.prepare(request)
    await response.write_eof()
    return response


@web.middleware
async def _in_openais_words(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except RefusedError as error:
        status, why, code = 400, str(error), error.code
    except web.HTTPNotFound:
        status, why, code = 404, program_requests.not_served(request.method, request.path), "not_found"
    except web.HTTPException as error:
        status, why, code = error.status, error.reason, "invalid_request_error"
    except RecursionError:
        status, why, code = 400, "the body is nested too deeply", "invalid_request_error"
    told = {"message": why, "type": "invalid_request_error", "param": None, "code": code}
    return web.json_response({"error": told}, status=status)
