"""Requests of agent programs, in the JSON of OpenAI's API: read, and refused if they cannot be served as meant.

POST  chat/completions  ─> choices()     how many answers, and how long
POST  reward            ─> Reward
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cola_ray.tasks.protocol import not_a_reward

Body = Mapping[str, Any]
_MAX_CHOICES = 64
_AS_SAMPLED = "what the policy samples is trained on, and nothing may force it"
_UNSERVED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "stream": ((False,), "answers come whole while a model is trained"),
    "tool_choice": (("auto", "none"), f'{_AS_SAMPLED}; use "auto" or "none"'),
    "parallel_tool_calls": ((True,), f"{_AS_SAMPLED}, so a message may have several calls"),
    "response_format": (({"type": "text"},), f"{_AS_SAMPLED}; ask for a form in the messages"),
    "structured_outputs": (({},), f"{_AS_SAMPLED}; ask for a form in the messages"),
    **{f"guided_{form}": ((), f"{_AS_SAMPLED}; ask for a form in the messages")
       for form in ("json", "regex", "choice", "grammar")},
    "continue_final_message": ((False,), "what the policy says begins a message"),
    "logit_bias": (({},), _AS_SAMPLED),
    "top_logprobs": ((0,), "only what was sampled has a log-probability"),
    "functions": (([],), "an older form; use tools"),
    "function_call": (("auto", "none"), "an older form; use tools"),
    "modalities": ((["text"],), "the policy writes text"),
    "web_search_options": ((), "there is no search"),
    "chat_template_kwargs": (({},), "data.chat_options has them, for the whole run"),
}  # fmt: skip
"""Fields that would change what an answer means: the values without an effect, and why others are not served."""
TOO_LONG = "this model's maximum context length is"
"""OpenAI's words, by which clients recognise that a conversation is too long: not all of them read an error's code."""


class RefusedError(ValueError):
    """A request that cannot be served; the message says why, in OpenAI's words if there are any.

    Args:
        code: OpenAI's error code, for programs that act on it.
    """

    def __init__(self, why: str, code: str = "invalid_request_error") -> None:
        super().__init__(why)
        self.code = code


@dataclass(frozen=True)
class Reward:
    """The reward that a program reports for an answer."""

    value: float
    answer: str | None  # id of the completion; None: the last one
    choice: int | None  # its index there; None: the last one
    done: bool  # the episode ends with it
    truncated: bool | None  # whether a limit ended it; None: the run's limits tell


def as_body(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RefusedError("the body is not a JSON object")
    return body


def choices(body: Body) -> tuple[int, int]:
    """The number of answers that a request wants, and the most tokens of each; 0: the run decides.

    Raises:
        RefusedError: it also wants something that is not served.
    """
    for name, (harmless, why) in _UNSERVED.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            raise RefusedError(f"{name} = {value!r:.60}: {why}")
    longest = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    return _whole(body, "n", _MAX_CHOICES) or 1, _whole(body, longest, 1 << 30)


def model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "cola_ray"}


def not_served(method: str, path: str) -> str:
    """The message for a client that uses another of OpenAI's APIs, or a wrong address."""
    asked = path.rpartition("/v1/")[2]
    return f"{method} {asked}: not served; below OPENAI_BASE_URL are chat/completions, reward, episodes and models"


def reward(body: Body) -> Reward:
    """Raises RefusedError."""
    unknown = body.keys() - {"reward", "id", "index", "done", "truncated", "messages", "tools"}
    if unknown:
        raise RefusedError(f"{min(unknown)}: a reward has no such field")
    if why := not_a_reward(body.get("reward")):
        raise RefusedError(f"reward = {why}")
    answer, choice, truncated = body.get("id"), body.get("index"), body.get("truncated")
    if not isinstance(answer, str | None):
        raise RefusedError(f"id = {answer!r:.60}: give a completion's")
    if choice is not None and (not isinstance(choice, int) or isinstance(choice, bool)):
        raise RefusedError(f"index = {choice!r:.60}: give that of a choice")
    for name in ("done", "truncated"):
        if not isinstance(body.get(name), bool | None):
            raise RefusedError(f"{name} = {body[name]!r:.60}: give true or false")
    done = body.get("done") is not False
    if truncated and not done:
        raise RefusedError('truncated = True: the episode ends with that; leave out "done": false')
    if "messages" in body and not truncated:
        raise RefusedError('messages: where the episode was cut, so say "truncated": true; leave them out elsewhere')
    return Reward(float(body["reward"]), answer, choice, done, truncated)


def _whole(body: Body, name: str, most: int) -> int:
    value = body.get(name)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise RefusedError(f"{name} = {value!r:.60}: give a whole number from 1 to {most}")
    return value
