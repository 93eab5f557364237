"""Tokenises prompts and responses in one place for training, rollouts and reward models, so that all do it alike.

    chat = ChatTokenizer(tokenizer, "2026-01-31")
    chat.prompt_ids("3 + 4 =")               # a question, or a conversation with its roles
    chat.text_ids("some text")               # the text alone
    chat.exchange_ids(prompt, response)      # a prompt with its complete response
    chat.conversation(messages, {1: ids})    # the sampled ids of the message at place 1 stay as they are

Control tokens come from the chat template and the tokenizer alone. One that a user typed, such as ``<|im_end|>`` in a
question, is tokenised as ordinary characters.
"""

import functools
import itertools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``."""
Prompt = str | Sequence[Message]
"""A question, or a conversation whose next message the model writes."""

ROLES = ("system", "developer", "user", "assistant", "tool")


def as_prompt(value: object) -> Prompt:
    """Read a column's value: text, or chat messages with text contents, of which only role and content are kept.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray) or not value:
        raise ValueError(f"{str(value)[:80]!r} is neither text nor a list of chat messages")
    return tuple(_as_message(one) for one in value)


def as_question(value: object) -> Prompt:
    """Read a prompt like :func:`as_prompt`; also raises ValueError if it is blank."""
    prompt = as_prompt(value)
    if not (prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)).strip():
        raise ValueError(f"{str(value)[:80]!r} asks nothing; text or chat messages are expected")
    return prompt


def _as_message(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or value.get("role") not in ROLES:
        raise ValueError(f"{str(value)[:80]!r} is no chat message; one has a role ({', '.join(ROLES)}) and a content")
    if value.get("tool_calls"):
        raise ValueError("a chat message has tool_calls, which are not supported; leave such rows out")
    return {"role": value["role"], "content": as_content(value.get("content"))}


def as_content(value: object) -> str:
    """Read a chat message's content: text, or parts of text as in OpenAI's API.

    Raises:
        ValueError: it is neither.
    """
    content = value
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise ValueError(f"the content of a chat message is {str(value)[:80]!r}, not text")
    return content


def as_text(prompt: Prompt) -> str:
    """Return a prompt as text, to show, compare or checksum: a question by itself, a conversation with its roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def followed_by(prompt: Prompt, text: str) -> Prompt:
    """Return the prompt with ``text`` appended to its last user message."""
    if isinstance(prompt, str):
        return prompt + text
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)
    return tuple(
        {**message, "content": message["content"] + text} if i == last else message for i, message in enumerate(prompt)
    )


_TOLD = ("messages", "tools", "documents", "tokenize", "strftime_now", "add_generation_prompt",
         "continue_final_message")  # fmt: skip
"""Arguments that templates always get, or never."""


def unknown_options(options: Mapping[str, Any], template: str) -> list[str]:
    """A line for each option that a chat template does not read."""
    return [
        f"data.chat_options.{name} = {value!r}: the model's chat template takes no {name}; leave it out"
        for name, value in options.items()
        if name in _TOLD or not re.search(rf"\b{re.escape(name)}\b", template)
    ]


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids, up to where the next message begins."""

    ids: list[int]
    ends: dict[int, int]
    """By the place of each sampled message: how many ids there are up to its end, its end token included."""


class ChatTokenizer:
    """Turns prompts and responses into ids.

    With a chat template, prompts are conversations, and the template adds any tokens that begin a text. Without one, a
    prompt is its text, with roles written out, after the BOS token if the tokenizer uses one.

    Args:
        tokenizer: of the model.
        date: YYYY-MM-DD, shown by templates that show a date, since prompts would otherwise change from day to day;
            "" for today.
        options: further arguments of the template, such as ``enable_thinking``.

    Raises:
        ValueError: the template does not have one of the options.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", date: str, options: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.date, self.options = tokenizer, date, dict(options or {})
        for line in unknown_options(self.options, str(tokenizer.chat_template or "")):
            raise ValueError(line)
        self._day = datetime.fromisoformat(date) if date else datetime.now()
        added = tokenizer.added_tokens_decoder.values()
        control = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._control = re.compile("|".join(re.escape(one) for one in sorted(control, key=len, reverse=True)) or r"\Z.")
        self._control_ids = set(tokenizer.convert_tokens_to_ids(sorted(control))) - {tokenizer.unk_token_id}
        empty = tokenizer("")["input_ids"]
        self.begin: list[int] = list(empty[:1]) if empty and empty[0] == tokenizer.bos_token_id else []
        """Ids that texts begin with if there is no template: [BOS] or nothing."""

    @property
    def end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of the text, without any control token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        typed = [*self._control.finditer(text)] if self._control_ids.intersection(ids) else []
        if not typed:
            return ids
        # A vocabulary of whole words still finds the control token, so the text is cut after its first character.
        cuts = [0, *(match.start() + 1 for match in typed), len(text)]
        return [
            i for start, end in itertools.pairwise(cuts)
            for i in self.tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ]  # fmt: skip

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids up to where the response begins; if the last message is the assistant's, it is continued.

        Raises:
            ValueError: the template refuses this conversation.
        """
        messages = _messages(prompt)
        if self.tokenizer.chat_template:
            goes_on = messages[-1]["role"] == "assistant"
            return self._conversation_ids(messages, add_generation_prompt=not goes_on, continue_final_message=goes_on)
        text = as_text(prompt)
        if not isinstance(prompt, str) and len(prompt) > 1 and messages[-1]["role"] != "assistant":
            text += "\nAssistant: "
        return [*self.begin, *self.text_ids(text)]

    def response_ids(self, response: str) -> list[int]:
        """Return the ids of a response and the end token."""
        return [*self.text_ids(response), self.end]

    def exchange_ids(self, prompt: Prompt, response: str) -> list[int]:
        """Return the ids of a prompt with its response, as a reward model reads them."""
        if self.tokenizer.chat_template:
            messages = _messages(prompt)
            if messages[-1]["role"] == "assistant":
                answer = {"role": "assistant", "content": messages[-1]["content"] + response}
                return self._conversation_ids([*messages[:-1], answer])
            return self._conversation_ids([*messages, {"role": "assistant", "content": response}])
        return [*self.prompt_ids(prompt), *self.response_ids(response)]

    def conversation(
        self, messages: Sequence[Message], said: Mapping[int, Sequence[int]], tools: Sequence[Mapping[str, Any]] = (),
        end_ids: Container[int] = (),
    ) -> "Rendered":  # fmt: skip
        """Return the ids up to where the next message begins, in a conversation with a model that is being trained.

        Without a template the ids are those of the contents, one after the other, like an environment's transcript.

        Args:
            said: ids of messages that the model has sampled, by place. They are not tokenised again, since text does
                not always give the same ids, and directly follow the generation prompt. Their tool calls are part of
                them; the template only sees that there are some if it would refuse the conversation otherwise.
            tools: functions that the model may call, in the form of OpenAI's API.
            end_ids: ids that each end a sampled message. A template writes its own in place of such an id.

        Raises:
            ValueError: the template refuses this conversation; or there are tools, but no template to describe them.
        """
        if self.tokenizer.chat_template:
            open_ids = {place: ids[:-1] if ids and ids[-1] in end_ids else ids for place, ids in said.items()}
            found = self._filled(messages, open_ids, tools=list(tools) or None, add_generation_prompt=True)
            for place, end in found.ends.items():
                closed = len(open_ids[place]) < len(said[place])
                if closed and end < len(found.ids) and found.ids[end] in end_ids:
                    found.ends[place] += 1
            return found
        if tools:
            raise ValueError("the model has no chat template, which would tell it of tools; leave them out")
        found, first = self._filled(messages, said), len(self.begin)
        return Rendered([*self.begin, *found.ids], {place: first + end for place, end in found.ends.items()})

    # --- the template ---------------------------------------------------------------------------------------------

    def _conversation_ids(self, messages: Sequence[Message], **options: bool) -> list[int]:
        """Tokenise as ``apply_chat_template`` does, except that control tokens within contents become characters."""
        if self._control.search("".join(message["content"] for message in messages)):
            return self._filled(messages, {}, **options).ids
        ids: list[int] = self.tokenizer(self._render(messages, **options), add_special_tokens=False)["input_ids"]
        return ids

    def _filled(self, messages: Sequence[Message], said: Mapping[int, Sequence[int]], **options: Any) -> "Rendered":
        """Tokenise piece by piece, between the template's control tokens and messages that already have ids."""
        whole = "".join(_strings([messages, options]))
        # While the template's control tokens are searched, placeholders hide typed text and stand for sampled ids.
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in whole)
        typed: list[str] = []

        def hide(match: re.Match[str]) -> str:
            typed.append(match.group())
            return f"{mark}{len(typed) - 1}{mark}"

        hidden = [_with_strings(message, lambda text: self._control.sub(hide, text)) for message in messages]
        options = _with_strings(options, lambda text: self._control.sub(hide, text))
        text, held = self._held(hidden, said, mark, **options)
        found, ends, start = list[int](), dict[int, int](), 0
        for token in [*re.finditer(f"{held}|{self._control.pattern}", text, re.DOTALL), None]:
            piece = text[start : token.start() if token else len(text)]
            found += self.text_ids(re.sub(f"{mark}(\\d+){mark}", lambda m: typed[int(m[1])], piece)) if piece else []
            if token:
                place = token["text"] or token.groupdict().get("calls")
                found += said[int(place)] if place else [self.tokenizer.convert_tokens_to_ids(token.group())]
                start = token.end()
                if place:
                    ends[int(place)] = len(found)
        return Rendered(found, ends)

    def _held(self, messages: Sequence[Message], places: Iterable[int], mark: str, **options: Any) -> tuple[str, str]:
        """Render with placeholders for sampled messages. Returns the text, and a pattern that matches a placeholder
        with everything around it that the template had not written when the model was asked.
        """
        shown, holders = [dict(one) for one in messages], {place: f"{mark}ids{place}{mark}" for place in places}
        for place, holder in holders.items():
            shown[place] = {**messages[place], "content": holder}
            shown[place].pop("tool_calls", None)
        of_text, of_calls = self._added if holders else (("", ""), None)
        before, after = map(re.escape, of_text)
        held = f"(?:{before})?{mark}ids(?P<text>\\d+){mark}(?:{after})?"
        called = [place for place in holders if messages[place].get("tool_calls")]
        try:
            return self._render(shown, **options), held
        except ValueError:
            if not called or of_calls is None:
                raise
            for place in called:
                shown[place] = _calling(holders[place])
            text, (before, after) = self._render(shown, **options), map(re.escape, of_calls)
            calls = f"{before}{mark}ids(?P<calls>\\d+){mark}(?:.*?{mark}ids(?P=calls){mark})?{after}"
            if len(re.findall(calls, text, re.DOTALL)) != len(called):
                raise
            return text, f"{calls}|{held}"

    @functools.cached_property
    def _added(self) -> tuple[tuple[str, str], tuple[str, str] | None]:
        """What the template puts before and after an answer, between the point where the model begins it and its end.

        Around a text, e.g. a space; and around tool calls, or None if that cannot be determined.
        """
        text, calls = self._around({"role": "assistant", "content": _HERE}), self._around(_calling(_HERE))
        if text is None:
            return ("", ""), None
        end = self._control.search(text[1])
        ending = text[1][end.start() if end else 0 :]
        of_calls = (calls[0], calls[1].removesuffix(ending)) if calls and calls[1].endswith(ending) else None
        return (text[0], text[1].removesuffix(ending)), of_calls

    def _around(self, answer: Message) -> tuple[str, str] | None:
        """What is before and after an answer, from the point where the model begins it; None if this is not clear."""
        question = {"role": "user", "content": "?"}
        try:
            opened = self._render([question], add_generation_prompt=True)
            text = self._render([question, answer])
        except ValueError:
            return None
        if not text.startswith(opened) or _HERE not in text[len(opened) :]:
            return None
        before, _, rest = text[len(opened) :].partition(_HERE)
        return before, rest.rpartition(_HERE)[2]

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        """Render the template; a system message that it refuses or drops is put before the first user message."""
        if not self.tokenizer.chat_template:
            return "".join(message["content"] for message in messages)
        try:
            text = self._apply(messages, **options)
            if messages[0]["role"] != "system" or messages[0]["content"].strip() in text:
                return text
        except jinja2.TemplateError as error:
            if messages[0]["role"] != "system" or len(messages) == 1:
                raise ValueError(f"the chat template refuses this conversation: {error}") from None
        system, first, *rest = messages
        folded = {"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}
        try:
            return self._apply([folded, *rest], **options)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def _apply(self, messages: Sequence[Message], **options: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, strftime_now=self._day.strftime, **self.options, **options
            )  # type: ignore[arg-type]
        )


_HERE = "\ue000"


def _calling(text: str) -> dict[str, Any]:
    """An answer with a tool call, both with this text; the call's id has a form that all templates accept."""
    call = {"id": "call00000", "type": "function", "function": {"name": text, "arguments": {}}}
    return {"role": "assistant", "content": text, "tool_calls": [call]}


def _strings(value: Any) -> Iterator[str]:
    """All texts in lists and objects, including names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(name)
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def _with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with each text changed, except names of fields."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _with_strings(inner, change) for name, inner in value.items()}
    return [_with_strings(inner, change) for inner in value] if isinstance(value, Sequence) else value


def _messages(prompt: Prompt) -> Sequence[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
