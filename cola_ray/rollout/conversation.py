"""An agent program's requests and the model's answers: OpenAI's JSON on one side, token ids on the other.

    body {"messages": [...], "tools": [...]} ── state() ──> ids: earlier answers keep the ids that were sampled
    ids of the utterance                     ── answer() ─> {"choices": [{"message": {content, tool_calls}, ...}]}

A conversation belongs to one episode. An assistant's message that comes back as it was answered is recognised and keeps
its ids; any other message is tokenised like any text. A message counts as retokenised if the model was asked for an
answer after exactly the messages before it: then the program has changed that answer. A program's own examples do not
count.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cola_ray.rollout.program_requests import Body, RefusedError
from cola_ray.rollout.tool_parser import ToolCalls
from cola_ray.tasks.chat import ROLES, ChatTokenizer, as_content
from cola_ray.tasks.endings import Endings
from cola_ray.tasks.transcript import tells_tools

Array = np.ndarray


@dataclass(frozen=True)
class State:
    """The state in which an utterance is requested."""

    ids: list[int]
    messages: bytes = b""  # a digest of the messages before the utterance
    retokenised: int = 0  # the model's messages among them that came back changed
    ends: Mapping[int, int] = field(default_factory=dict)  # turns among them -> the number of ids up to their end


@dataclass(frozen=True)
class _Said:
    """An utterance as it was sampled, with the token that ended it, and its number in the episode."""

    ids: list[int]
    turn: int


class Conversation:
    """One episode's messages, with the ids that they were sampled as.

    Args:
        calls: finds tool calls; None leaves them in the text.
    """

    def __init__(self, chat: ChatTokenizer, endings: Endings, calls: ToolCalls | None = None) -> None:
        self.chat, self.endings, self.calls = chat, endings, calls
        self.said: dict[str, dict[bytes, _Said]] = {}  # answer -> messages before it -> as it was sampled
        self.asked: set[bytes] = set()  # messages after which the model has answered
        self.num_answers = itertools.count()

    def state(self, body: Body) -> State:
        """Read a request's messages.

        Raises:
            RefusedError: they do not follow OpenAI's API, or the model's chat template refuses them.
        """
        messages = [_message(one) for one in _listed(body, "messages")]
        if not messages:
            raise RefusedError("messages: empty; give at least one")
        said, retokenised, before = dict[int, _Said](), 0, b""
        for place, message in enumerate(messages):
            key = _key(message)
            known = self.said.get(key, {}) if message["role"] == "assistant" else {}
            if known:
                said[place] = known.get(before) or [*known.values()][-1]
            elif message["role"] == "assistant" and before in self.asked:
                retokenised += 1
            before = hashlib.sha256(before + f"{message['role']}{key}".encode()).digest()
        tools = [_tool(one) for one in _tools(body)]
        if tools:
            self._check_tools(tools)
        try:
            sampled = {place: one.ids for place, one in said.items()}
            found = self.chat.conversation(messages, sampled, tools, self.endings.token_ids)
        except Exception as error:  # a template may raise any error
            raise RefusedError(f"messages: {str(error) or type(error).__name__}") from None
        if not found.ids:
            raise RefusedError("messages: there is nothing in them")
        ends = {said[place].turn: end for place, end in found.ends.items()}
        return State(found.ids, before, retokenised, ends)

    def _check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises RefusedError if the model would not see these tools, or could not call them."""
        template = str(self.chat.tokenizer.chat_template or "")
        if not template:
            raise RefusedError(
                "tools: the model has no chat template, which would show them; describe them in a message"
            )
        if not tells_tools(template):
            raise RefusedError("tools: this model's chat template does not show them; describe them in a message")
        if self.calls is None:
            raise RefusedError("tools: set task.tool_parser to the format in which this model writes calls; or describe"
                               " tools in a message, and read calls from the text")  # fmt: skip
        self.calls.check(tools)

    def answer(
        self, body: Body, state: State, utterances: Sequence[Any], turns: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """The JSON for utterances in this state, one per choice; they are recognised as answers from here on.

        Log-probabilities are those of the latent actions that gave the tokens, or of the tokens if these are actions.

        Args:
            turns: numbers of the utterances in their episode, under which later states have what follows them.
        """
        self.asked.add(state.messages)
        numbers = range(len(utterances)) if turns is None else turns
        choices = [self._choice(body, state, *one) for one in zip(itertools.count(), utterances, numbers)]
        length = sum(len(one.token_ids) for one in utterances)
        return {
            "id": f"chatcmpl-{next(self.num_answers)}", "object": "chat.completion", "created": int(time.time()),
            "model": str(body.get("model", "")), "choices": choices,
            "usage": {"prompt_tokens": len(state.ids), "completion_tokens": length,
                      "total_tokens": len(state.ids) + length},
        }  # fmt: skip

    def _choice(self, body: Body, state: State, index: int, said: Any, turn: int) -> dict[str, Any]:
        ids = [int(token) for token in said.token_ids]
        text = self.endings.text(ids)
        message = {"role": "assistant", "content": text, **self._calls(body, text)}
        self.said.setdefault(_key(_message(message)), {})[state.messages] = _Said(ids, turn)
        stopped = self.endings.length(ids) is not None
        choice: dict[str, Any] = {
            "index": index, "message": message, "logprobs": None,
            "finish_reason": "tool_calls" if message.get("tool_calls") else "stop" if stopped else "length",
        }  # fmt: skip
        if body.get("logprobs"):
            choice["logprobs"] = {"content": self._log_probs(ids, said.log_probs), "refusal": None}
        asked = body.get("cola")
        if isinstance(asked, Mapping) and asked.get("return_actions"):
            choice["cola"] = {"actions": said.actions.tolist(), "log_probs": said.log_probs.tolist()}
        return choice

    def _log_probs(self, ids: Sequence[int], log_probs: Array) -> list[dict[str, Any]]:
        tokens = [str(self.chat.tokenizer.decode([token])) for token in ids]
        return [
            # A token may be a part of a character, of which the tokenizer tells no bytes.
            {
                "token": token,
                "logprob": float(value),
                "bytes": None if "\ufffd" in token else [*token.encode()],
                "top_logprobs": [],
            }
            for token, value in zip(tokens, log_probs, strict=True)
        ]

    def _calls(self, body: Body, text: str) -> dict[str, Any]:
        """The tool calls in a text, and the rest of the text; {} if it has none, or the request has no tools."""
        tools = _tools(body)
        return self.calls.within(text, tools) if self.calls and tools else {}


def _tools(body: Body) -> list[Any]:
    return [] if body.get("tool_choice") == "none" else _listed(body, "tools")


def _listed(body: Body, name: str) -> list[Any]:
    value = body.get(name) or []
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise RefusedError(f"{name} = {value!r:.60}: give a list of objects")
    return value


def _tool(value: Mapping[str, Any]) -> Mapping[str, Any]:
    function = value.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RefusedError(f"tools: {dict(value)!r:.60}; give functions, each with a name")
    return value


def _message(value: Mapping[str, Any]) -> dict[str, Any]:
    """A message in the form that chat templates read: content as text, arguments of tool calls as objects."""
    role, content, calls = value.get("role"), value.get("content"), value.get("tool_calls")
    if role not in ROLES:
        raise RefusedError(f"messages: role = {role!r:.60}; use one of {', '.join(ROLES)}")
    try:
        text = "" if content is None else as_content(content)
    except ValueError as error:
        raise RefusedError(f"messages: {error}") from None
    further = {name: value[name] for name in ("name", "tool_call_id") if isinstance(value.get(name), str)}
    role = "system" if role == "developer" else role  # OpenAI's newer name for it, which templates do not know
    return {"role": role, "content": text, **further, **({"tool_calls": _as_read(calls)} if calls else {})}


def _as_read(calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RefusedError(f"messages: tool_calls = {calls!r:.60}; give a list")
    try:
        return [
            {"id": str(call.get("id", "")), "type": "function",
             "function": {"name": call["function"]["name"], "arguments": _arguments(call["function"]["arguments"])}}
            for call in calls
        ]  # fmt: skip
    except (AttributeError, KeyError, TypeError) as error:
        raise RefusedError(f"messages: a tool call has no {error}; give function.name and function.arguments") from None


def _arguments(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _key(message: Mapping[str, Any]) -> str:
    """A key that is equal for a message as it was answered and as it comes back, both read by :func:`_message`."""
    calls = message.get("tool_calls") or []
    return json.dumps([message["content"], [call["function"] for call in calls]], sort_keys=True)
