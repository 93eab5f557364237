"""Token ids of an episode as a conversation in the model's chat template: environment's messages and utterances.

    Transcript(chat, end_ids, opening) ─ hear(Chat) ─ say(ids) ─ hear(Chat) ─ ...      in order
                                       └ ids(most) ─> up to where the next utterance begins

For environments whose observations have roles (``info["chat"]``, environment.py) and models that have a template.
Utterances keep their sampled ids. The template describes tools; if it does not support tools, a system message
describes them in words, and if it has no role ``tool``, results of tools become user messages.
"""

import functools
import re
from collections.abc import Sequence

from cola_ray.tasks.chat import ChatTokenizer, Message, Rendered
from cola_ray.tasks.environment import Chat


class Transcript:
    """One episode's messages.

    Args:
        chat: with a tokenizer that has a chat template.
        end_ids: ids that end an utterance; the template writes them itself.
        opening: the first observation.
    """

    def __init__(self, chat: ChatTokenizer, end_ids: Sequence[int], opening: Chat) -> None:
        self.chat, self.end_ids = chat, end_ids
        tells = tells_tools(str(chat.tokenizer.chat_template))
        self.tools = [*opening.tools] if tells else []
        self.opening = _with_system(opening) if opening.tools_text and not tells else [*opening.messages]
        self.turns: list[tuple[list[int], list[Message]]] = []  # an utterance, and the messages that followed it
        self.heard: list[int] = []
        """The ids that follow the last utterance in the state that ``ids`` returned last."""

    def say(self, token_ids: Sequence[int]) -> None:
        """Add an utterance, with the token that ended it."""
        self.turns.append((list(token_ids), []))

    def hear(self, observation: Chat) -> None:
        """Add the observation that follows an utterance."""
        heard = [*observation.messages]
        if not _knows_tools(self.chat):
            texts = [str(message["content"]) for message in heard]
            heard = [{"role": "user", "content": "\n".join(texts)}] if texts else []
        self.turns[-1][1].extend(heard)

    def ids(self, most: int) -> list[int]:
        """Return the opening and as many of the last turns as fit into ``most`` ids, or at least the last turn's end.

        Raises:
            ValueError: the template refuses this conversation.
        """
        for first in range(max(len(self.turns), 1)):
            found = self._rendered(first)
            if len(found.ids) <= most:
                break
        if self.turns:
            self.heard = found.ids[max(found.ends.values(), default=len(found.ids)) :][-most:]
        return found.ids[-most:]

    def _rendered(self, first: int) -> Rendered:
        messages, said = [*self.opening], dict[int, list[int]]()
        for ids, heard in self.turns[first:]:
            said[len(messages)] = ids
            messages += [{"role": "assistant", "content": ""}, *heard]
        return self.chat.conversation(messages, said, self.tools, self.end_ids)


def tells_tools(template: str) -> bool:
    """Whether a chat template shows the tools that it is given."""
    return re.search(r"\btools\b", template) is not None


def _with_system(opening: Chat) -> list[Message]:
    """The messages, with the description of tools in the system message."""
    messages = [*opening.messages]
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{opening.tools_text}"}, *messages[1:]]
    return [{"role": "system", "content": opening.tools_text}, *messages]


@functools.lru_cache(maxsize=8)
def _knows_tools(chat: ChatTokenizer) -> bool:
    """Whether the template accepts a tool's result, even without a call that it wrote itself, and shows it."""
    asked: list[Message] = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    try:
        found = chat.conversation([*asked, {"role": "tool", "name": "lookup", "content": "shown"}], {}).ids
    except Exception:  # templates raise what they like
        return False
    return "shown" in str(chat.tokenizer.decode(found))
