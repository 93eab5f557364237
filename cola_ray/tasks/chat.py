"""From words to token ids, in one place: what is trained on, asked and judged is tokenised alike.

    chat = ChatTokenizer(tokenizer, "2026-01-31")
    chat.prompt_ids("3 + 4 =")                               # a question, or a conversation with its roles
    chat.text_ids("some text")                               # nothing added
    chat.exchange_ids(prompt, response)                        # a finished exchange

Control tokens come from the chat template and the tokenizer alone. One that somebody typed, ``<|im_end|>`` in a
question say, is tokenised as the characters that it consists of.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
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
    """A column's value: text, or chat messages with plain-text contents, of which only role and content are kept.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray) or not value:
        raise ValueError(f"{str(value)[:80]!r} is neither text nor a list of chat messages")
    return tuple(_as_message(one) for one in value)


def as_question(value: object) -> Prompt:
    """A prompt that asks something: as :func:`as_prompt`, and not blank. Raises ValueError."""
    prompt = as_prompt(value)
    if not (prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)).strip():
        raise ValueError(f"{str(value)[:80]!r} asks nothing; text or chat messages are wanted")
    return prompt


def _as_message(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or value.get("role") not in ROLES:
        raise ValueError(f"{str(value)[:80]!r} is no chat message: one has a role ({', '.join(ROLES)}) and a content")
    if value.get("tool_calls"):
        raise ValueError("a chat message has tool_calls, which are not read here; leave such rows out")
    content = value.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts, as OpenAI's interface has them
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise ValueError(f"the content of a chat message is {str(value.get('content'))[:80]!r}, not text")
    return {"role": value["role"], "content": content}


def as_text(prompt: Prompt) -> str:
    """A prompt to show, to compare and to checksum: a question by itself, a conversation with its roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def followed_by(prompt: Prompt, text: str) -> Prompt:
    """The prompt with ``text`` at the end of its last message from a user."""
    if isinstance(prompt, str):
        return prompt + text
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)
    return tuple(
        {**message, "content": message["content"] + text} if i == last else message for i, message in enumerate(prompt)
    )


class ChatTokenizer:
    """A tokenizer's way to ids.

    With a chat template, prompts are conversations and the template says what begins a text. Without one, a prompt is
    its text after the token that the tokenizer begins texts with, if it does; roles are written out.

    Args:
        date: YYYY-MM-DD, which a template is given that shows a date; else prompts would change from day to day.
            Empty: today.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", date: str) -> None:
        self.tokenizer = tokenizer
        self._day = datetime.fromisoformat(date) if date else datetime.now()
        added = tokenizer.added_tokens_decoder.values()
        control = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._control = re.compile("|".join(re.escape(one) for one in sorted(control, key=len, reverse=True)) or r"\Z.")
        self._control_ids = set(tokenizer.convert_tokens_to_ids(sorted(control))) - {tokenizer.unk_token_id}
        empty = tokenizer("")["input_ids"]
        self.begin: list[int] = list(empty[:1]) if empty and empty[0] == tokenizer.bos_token_id else []
        """What texts begin with where there is no template: [BOS] or nothing."""

    @property
    def end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def text_ids(self, text: str) -> list[int]:
        """The text alone, without any control token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        typed = [*self._control.finditer(text)] if self._control_ids.intersection(ids) else []
        if not typed:
            return ids
        # A vocabulary of whole words finds the token even so: it is cut after its first character.
        cuts = [0, *(match.start() + 1 for match in typed), len(text)]
        return [
            i for start, end in itertools.pairwise(cuts)
            for i in self.tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ]  # fmt: skip

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Up to where the model's answer begins; a last message from the assistant is one that the model goes on with.

        Raises:
            ValueError: the template does not take this conversation.
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
        """What follows a prompt, to its end."""
        return [*self.text_ids(response), self.end]

    def exchange_ids(self, prompt: Prompt, response: str) -> list[int]:
        """A prompt with its response, as a reward model reads them."""
        if self.tokenizer.chat_template:
            messages = _messages(prompt)
            if messages[-1]["role"] == "assistant":
                answer = {"role": "assistant", "content": messages[-1]["content"] + response}
                return self._conversation_ids([*messages[:-1], answer])
            return self._conversation_ids([*messages, {"role": "assistant", "content": response}])
        return [*self.prompt_ids(prompt), *self.response_ids(response)]

    # --- the template ---------------------------------------------------------------------------------------------

    def _conversation_ids(self, messages: Sequence[Message], **options: bool) -> list[int]:
        """As ``apply_chat_template`` has them, but for control tokens that a message's content spells out."""
        whole = "".join(message["content"] for message in messages)
        if not self._control.search(whole):
            text = self._render(messages, **options)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        # Marks stand for what was typed while the template's own tokens are found.
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in whole)
        typed: list[str] = []

        def hide(match: re.Match[str]) -> str:
            typed.append(match.group())
            return f"{mark}{len(typed) - 1}{mark}"

        hidden = [{**message, "content": self._control.sub(hide, message["content"])} for message in messages]
        text, found, start = self._render(hidden, **options), list[int](), 0
        for token in [*self._control.finditer(text), None]:
            piece = text[start : token.start() if token else len(text)]
            found += self.text_ids(re.sub(f"{mark}(\\d+){mark}", lambda m: typed[int(m[1])], piece)) if piece else []
            if token:
                found.append(self.tokenizer.convert_tokens_to_ids(token.group()))
                start = token.end()
        return found

    def _render(self, messages: Sequence[Message], **options: bool) -> str:
        """The template's text; a system message that it refuses or drops goes before the first message of the user."""
        try:
            text = self._apply(messages, **options)
            if messages[0]["role"] != "system" or messages[0]["content"].strip() in text:
                return text
        except jinja2.TemplateError as error:
            if messages[0]["role"] != "system" or len(messages) == 1:
                raise ValueError(f"the chat template does not take this conversation: {error}") from None
        system, first, *rest = messages
        folded = {"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}
        try:
            return self._apply([folded, *rest], **options)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not take this conversation: {error}") from None

    def _apply(self, messages: Sequence[Message], **options: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, strftime_now=self._day.strftime, **options
            )  # type: ignore[arg-type]
        )


def _messages(prompt: Prompt) -> Sequence[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
