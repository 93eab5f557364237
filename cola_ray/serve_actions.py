"""Latent actions through OpenAI's API: return the ones taken, and force given ones.

    extra_body={"cola": {"return_actions": True}}         choices[i].cola = {"actions": [...], "log_probs": [...]}
    extra_body={"cola": {"actions": [5, -1, 9]}}          the first steps' actions; -1 leaves one to the policy
    extra_body={"cola": {"actions": 5}}                   the same one at every step

    client ─> ActionMiddleware ─ "cola" becomes vllm_xargs, with a slot of the engine's table ─> vLLM's own endpoints
           <─ the slot's content, read once at the end ─────────────────────────────────────────┘

A streamed answer ends with a chunk without choices, whose ``cola`` has a list for each choice, before ``[DONE]``.
Log-probabilities are those of the actions under the policy at the request's temperature, in the order of the tokens.
If the model's actions last several tokens, a held action's log-probability is 0, and forced actions there are ignored.
"""

import json
import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from cola_ray.model.action_requests import SERVED_SLOTS

_PATHS = ("/v1/completions", "/v1/chat/completions")
_KEYS = ("return_actions", "actions")


class ActionMiddleware:
    """ASGI middleware around vLLM's application, given to vLLM by its import path."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.free = deque(range(SERVED_SLOTS))
        self.seeds = random.Random()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(_PATHS):
            await self.app(scope, receive, send)
            return
        content = await _body(receive)
        try:
            body = json.loads(content)
        except ValueError:
            body = None  # vLLM's to refuse
        if not isinstance(body, dict) or ("cola" not in body and "vllm_xargs" not in body):
            await self.app(scope, _again(content, receive), send)
            return
        state = scope["app"].state
        why = refusal(body, state.vllm_config)
        if why:
            await _answer(send, 400, why)
            return
        asked, slots = body.pop("cola"), list[int]()
        if asked.get("return_actions"):
            count = body.get("n") or 1
            if count > len(self.free):
                await _answer(send, 503, "cola.return_actions: too many requests ask for it at once; try again")
                return
            slots = [self.free.popleft() for _ in range(count)]
        try:
            _translate(body, asked, slots, self.seeds.getrandbits(31), state.vllm_config.model_config.max_model_len)
            reader = _Reader(send, slots, state.engine_client, bool(asked.get("keep_token_ids")))
            await self.app(scope, _again(json.dumps(body).encode(), receive), reader if slots else send)
        finally:
            self.free.extend(slots)


def refusal(body: dict[str, Any], vllm_config: Any) -> str:
    """Why this body cannot be served, in one line; empty if it can."""
    if "vllm_xargs" in body:
        return 'vllm_xargs: a server takes no actions from its clients this way; use "cola"'
    asked, known = body["cola"], vllm_config.model_config
    if not isinstance(asked, dict):
        return f"cola = {asked!r:.60}: give an object, with return_actions or actions"
    for key in asked:
        if key not in _KEYS:
            return f"cola.{key}: unknown; use return_actions or actions"
    returned, actions = asked.get("return_actions", False), asked.get("actions", [])
    if not isinstance(returned, bool):
        return f"cola.return_actions = {returned!r:.60}: give true or false"
    count, longest = known.hf_config.num_actions, known.max_model_len
    if not isinstance(actions, list):
        if not _is_whole(actions) or not 0 <= actions < count:
            return f"cola.actions = {actions!r:.60}: give an action from 0 to {count - 1}, or a list of them"
    elif len(actions) > longest:
        return f"cola.actions: {len(actions)} of them, and the model has {longest} positions; give fewer"
    elif wrong := [one for one in actions if not _is_whole(one) or not -1 <= one < count]:
        return f"cola.actions: {wrong[0]!r:.60} is none; give actions from 0 to {count - 1}, or -1 for the policy's own"
    if not returned:
        return ""
    choices, prompt, seed = body.get("n") or 1, body.get("prompt"), body.get("seed")
    if not _is_whole(choices) or not 1 <= choices <= SERVED_SLOTS:
        return f"n = {choices!r:.60}: give a number from 1 to {SERVED_SLOTS} with cola.return_actions"
    if seed is not None and not (_is_whole(seed) and -(2**62) < seed < 2**62):
        return f"seed = {seed!r:.60}: give a whole number of at most 62 bits with cola.return_actions"
    if isinstance(prompt, list) and len(prompt) != 1 and not all(map(_is_whole, prompt)):
        return f"prompt: a list of {len(prompt)}, and actions are returned of one; send a request for each"
    if vllm_config.parallel_config.data_parallel_size > 1:
        return "cola.return_actions: engines of a data-parallel server keep actions apart; use one engine"
    return ""


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _translate(body: dict[str, Any], asked: dict[str, Any], slots: Sequence[int], seed: int, longest: int) -> None:
    """Translate a request for vLLM: forced actions, and for choice i, whose seed is seed + i, the i-th slot."""
    extra: dict[str, Any] = {}
    actions = asked.get("actions", [])
    if actions != []:
        limit: Any = body.get("max_completion_tokens") or body.get("max_tokens")
        steps = min(limit, longest) if _is_whole(limit) else longest
        extra["actions"] = actions if isinstance(actions, list) else [actions] * max(steps, 0)
    if slots:
        if body.get("seed") is None:
            body["seed"] = seed
        asked["keep_token_ids"] = bool(body.get("return_token_ids"))
        body["return_token_ids"] = True  # their number is the number of actions
        extra |= {"action_slots": list(slots), "action_first_seed": body["seed"]}
    if extra:
        body["vllm_xargs"] = extra


class _Reader:
    """Passes an answer on, with the actions that the engine's table holds for it.

    Args:
        keep_token_ids: the client asked for token ids, too.
    """

    def __init__(self, send: Any, slots: Sequence[int], engine: Any, keep_token_ids: bool) -> None:
        self.send, self.slots, self.engine, self.keep_token_ids = send, slots, engine, keep_token_ids
        self.start: dict[str, Any] = {}
        self.streams, self.waiting = False, b""
        self.counts = [0] * len(slots)
        self.last: dict[str, Any] = {}

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.streams = kind.startswith(b"text/event-stream")
            if self.streams:
                await self.send(message)
            return
        self.waiting += message.get("body", b"")
        if self.streams:
            *whole, self.waiting = self.waiting.split(b"\n\n")
            sent = b"".join([await self._event(event) + b"\n\n" for event in whole])
            if not message.get("more_body"):
                sent += self.waiting
            await self.send(message | {"body": sent})
        elif not message.get("more_body"):
            content = self.waiting if self.start["status"] != 200 else await self._answer(self.waiting)
            length = (b"content-length", str(len(content)).encode())
            headers = [pair for pair in self.start["headers"] if pair[0] != b"content-length"]
            await self.send(self.start | {"headers": [*headers, length]})
            await self.send({"type": "http.response.body", "body": content})

    async def _answer(self, content: bytes) -> bytes:
        answer = json.loads(content)
        self._count(answer)
        found = await self._read()
        for choice in answer["choices"]:
            choice["cola"] = found[choice["index"]]
        return json.dumps(answer).encode()

    async def _event(self, event: bytes) -> bytes:
        data = event.removeprefix(b"data: ")
        if data == b"[DONE]":
            names = ("id", "object", "created", "model")
            last = {name: self.last[name] for name in names if name in self.last}
            told = json.dumps(last | {"choices": [], "cola": await self._read()}).encode()
            return b"data: " + told + b"\n\n" + event
        try:
            self.last = json.loads(data)
        except ValueError:  # a comment that keeps the connection alive
            return event
        self._count(self.last)
        return b"data: " + json.dumps(self.last).encode()

    def _count(self, answer: dict[str, Any]) -> None:
        """Count each choice's tokens; the ids are removed unless the client asked for them."""
        for choice in answer.get("choices", ()):
            self.counts[choice["index"]] += len(choice.get("token_ids") or ())
            if not self.keep_token_ids:
                choice.pop("token_ids", None)
        if not self.keep_token_ids:
            for holder in (answer, *answer.get("choices", ())):
                holder.pop("prompt_token_ids", None)

    async def _read(self) -> list[dict[str, Any]]:
        (kept, *_) = await self.engine.collective_rpc("served_actions", args=(list(self.slots), max(self.counts)))
        return [
            {"actions": actions[:count], "log_probs": log_probs[:count]}
            for (actions, log_probs), count in zip(kept, self.counts, strict=True)
        ]


async def _body(receive: Any) -> bytes:
    content, more = b"", True
    while more:
        message = await receive()
        content, more = content + message.get("body", b""), message.get("more_body", False)
    return content


def _again(content: bytes, receive: Any) -> Any:
    """A ``receive`` that first returns a body that was already read."""
    first: Iterator[dict[str, Any]] = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def received() -> Any:
        return next(first, None) or await receive()

    return received


async def _answer(send: Any, status: int, message: str) -> None:
    kind = "BadRequestError" if status == 400 else "ServiceUnavailableError"
    content = json.dumps({"error": {"message": message, "type": kind, "param": "cola", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
