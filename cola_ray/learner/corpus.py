"""Documents for pre-training: rows of ``data.path`` or a task's demonstrations, as token ids.

    a row ──document──> text, or prompt and response ──encoded──> ids ──pack──> rows of whole documents side by side

Training data from ``data.path`` goes through shards on disk (``tokenise.py``); a task's demonstrations, and the texts
of studies, are few and stay in memory.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cola_ray.learner.packed import PackedRows
from cola_ray.learner.shards import TEXT
from cola_ray.settings.config import DataConfig
from cola_ray.tasks import PlayedTask, Prompts
from cola_ray.tasks.chat import ChatTokenizer, Prompt, as_prompt
from cola_ray.tasks.environment import Dialogue
from cola_ray.tasks.rows import Row, cell, open_rows, plain_text, read_rows
from cola_ray.tasks.transcript import Transcript

Document = tuple[list[int], list[bool]]
"""Token ids, and which of them the model itself has to say: a response, an agent's utterances."""


def load_documents(
    data: DataConfig, task: Prompts | PlayedTask | None, chat: ChatTokenizer, max_tokens: int
) -> tuple[list[Document], bool]:
    """Documents of ``data.path``, or the task's demonstrations if it is empty; and whether any tokens are the model's.

    Prompts are text or chat messages. Responses are text or one message; a text column may hold whole conversations,
    whose last message is the response.

    Raises:
        ValueError: the data has neither the prompt/response columns nor the text column, or a row is none of these.
    """
    if not data.path:
        assert task is not None
        return _demonstrated(task, chat, max_tokens), True
    rows = open_rows(data.path, "data.path")
    for used in ([data.prompt_field, data.response_field], [data.text_field]):
        if set(used) <= set(rows.column_names):
            rows = rows.select_columns(used)
            break
    read = read_rows(rows, data.path, "data.path", lambda row: document(row, data))
    pairs = [one for one in read if isinstance(one, tuple)]
    if pairs:
        return _pair_documents(pairs, chat, max_tokens), True
    ids = (encoded(text, chat)[0] for text in read if isinstance(text, str))
    pieces = [text[i : i + max_tokens] for text in ids for i in range(0, len(text), max_tokens)]
    return [(piece, [True] * len(piece)) for piece in pieces if len(piece) > 1], False


def document(row: Row, data: DataConfig) -> tuple[Prompt, str] | str:
    """A row's prompt and response (also from a conversation in the text column), or its text.

    Raises:
        ValueError: names the field that is missing or wrong.
    """
    if data.prompt_field in row and data.response_field in row:
        return cell(row, data.prompt_field, as_prompt), cell(row, data.response_field, _response)
    if data.text_field not in row:
        raise ValueError(
            f"has columns {', '.join(row)}; name the right ones with data.prompt_field and data.response_field, or "
            "data.text_field"
        )
    text = cell(row, data.text_field, as_prompt)
    return text if isinstance(text, str) else (text[:-1], cell(row, data.text_field, lambda _: _response(text[-1:])))


def encoded(said: tuple[Prompt, str] | str, chat: ChatTokenizer) -> tuple[list[int], int]:
    """The ids of what :func:`document` read, and the number of prompt tokens; :data:`TEXT` if there is no prompt.

    Raises:
        ValueError: the chat template refuses the prompt.
    """
    if isinstance(said, str):
        return [*chat.begin, *chat.response_ids(said)], TEXT
    prompt_ids = chat.prompt_ids(said[0])
    return [*prompt_ids, *chat.response_ids(said[1])], len(prompt_ids)


def _response(value: object) -> str:
    """Text, a number as text, or one message's content."""
    if isinstance(value, int | float):
        return plain_text(value)
    said = as_prompt(value)
    if isinstance(said, str):
        return said
    if len(said) > 1:
        raise ValueError(f"a response of {len(said)} messages; one is needed")
    return str(said[0]["content"])


def pack(documents: Sequence[Document], length: int, pad_id: int, response_only: bool) -> PackedRows:
    """First-fit over a few open rows, in the documents' order; a document longer than a row is cut."""
    rows: list[list[Document]] = []
    open_rows: list[tuple[int, int]] = []  # (row, space left), newest last
    for ids, own in documents:
        ids, own = ids[:length], own[:length]
        for slot, (row, space) in enumerate(open_rows):
            if space >= len(ids):
                rows[row].append((ids, own))
                open_rows[slot] = (row, space - len(ids))
                break
        else:
            rows.append([(ids, own)])
            open_rows = [*open_rows[-7:], (len(rows) - 1, length - len(ids))]
    found = PackedRows.empty(len(rows), length, pad_id)
    for row, packed in enumerate(rows):
        start = 0
        for ids, own in packed:
            begins = np.flatnonzero(np.diff(np.array(own, np.int8), prepend=0) == 1).tolist()
            found.place(row, start, ids, np.array(own[1:], bool) if response_only else True, begins)
            start += len(ids)
        found.close(row, start)
    return found


def _demonstrated(task: Prompts | PlayedTask, chat: ChatTokenizer, max_tokens: int) -> list[Document]:
    if not isinstance(task, PlayedTask):
        pairs = task.demonstrations()
        if not pairs:
            raise ValueError("the task has no responses to learn from; give texts as data.path, or name the column of "
                             "responses with task.columns")  # fmt: skip
        return _pair_documents(pairs, chat, max_tokens)
    dialogues = task.dialogues()
    if not dialogues:
        raise ValueError("the environment has no demonstrations to learn from; give texts as data.path")
    return [document for dialogue in dialogues for document in _windows(dialogue, chat, max_tokens)]


def _windows(dialogue: Dialogue, chat: ChatTokenizer, max_tokens: int) -> Iterator[Document]:
    """A dialogue, tokenised piece by piece as in an episode; a long one is split, and each part has the opening."""
    if dialogue.chats and chat.tokenizer.chat_template:
        yield from _stretches(dialogue, chat, max_tokens)
        return
    opening = [*chat.begin, *chat.text_ids(dialogue.opening)]
    ids, own = list(opening), [False] * len(opening)
    for utterance, observation in dialogue.turns:
        said, heard = chat.response_ids(utterance), chat.text_ids(observation)
        if len(ids) > len(opening) and len(ids) + len(said) + len(heard) > max_tokens:
            yield ids[:max_tokens], own[:max_tokens]
            ids, own = list(opening), [False] * len(opening)
        ids, own = [*ids, *said, *heard], [*own, *[True] * len(said), *[False] * len(heard)]
    yield ids[:max_tokens], own[:max_tokens]


def _stretches(dialogue: Dialogue, chat: ChatTokenizer, max_tokens: int) -> Iterator[Document]:
    """The same in the chat template; a new document begins where a state does not continue the one before it."""
    transcript, ids, own = Transcript(chat, (chat.end,), dialogue.chats[0]), list[int](), list[bool]()
    for (utterance, _), heard in zip(dialogue.turns, dialogue.chats[1:], strict=True):
        said = chat.response_ids(utterance)
        state = transcript.ids(max(max_tokens - len(said), 1))
        if ids and state[: len(ids)] != ids:
            yield ids, own
            own = [False] * len(state)
        own = [*own, *[False] * (len(state) - len(own)), *[True] * len(said)]
        ids = [*state, *said]
        transcript.say(said)
        transcript.hear(heard)
    yield ids[:max_tokens], own[:max_tokens]


def _pair_documents(pairs: Iterable[tuple[Prompt, str]], chat: ChatTokenizer, max_tokens: int) -> list[Document]:
    documents = []
    for pair in pairs:
        ids, prompt_tokens = encoded(pair, chat)
        own = [False] * prompt_tokens + [True] * (len(ids) - prompt_tokens)
        if prompt_tokens < max_tokens:
            documents.append((ids[:max_tokens], own[:max_tokens]))
    return documents
