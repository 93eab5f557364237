"""Text for pre-training: loaded through ``datasets``, tokenised once, packed, and dealt out by step and rank.

A packed row holds whole documents side by side; ``position_ids`` restart at each, which is also what keeps their
attention apart. Which rows a step trains on is a pure function of (seed, step): a resumed run needs no cursor.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cola_ray.settings.config import DataConfig
from cola_ray.tasks import PlayedTask, Prompts
from cola_ray.tasks.chat import ChatTokenizer, Prompt, as_prompt
from cola_ray.tasks.environment import Dialogue
from cola_ray.tasks.rows import Row, cell, open_rows, plain_text, read_rows

Document = tuple[list[int], list[bool]]
"""Token ids, and which of them are the model's own to say: a response, an agent's utterances."""


@dataclass(frozen=True)
class PackedRows:
    """R rows of T tokens.

    ``loss_mask[r, t]`` is true where position t predicts a token worth learning, namely the one at t + 1: never
    across documents, never in a row's padding, and only response tokens where ``response_only``.
    """

    input_ids: np.ndarray  # (R, T) int64
    position_ids: np.ndarray  # (R, T) int64
    loss_mask: np.ndarray  # (R, T) bool

    def __len__(self) -> int:
        return len(self.input_ids)

    def step_indices(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Rows of a step: each epoch is a permutation of its own; the last short batch runs into the next epoch."""
        first = step * batch_size
        epochs = range(first // len(self), (first + batch_size - 1) // len(self) + 1)
        order = np.concatenate([np.random.default_rng((seed, epoch)).permutation(len(self)) for epoch in epochs])
        offset = first - epochs.start * len(self)
        return order[offset : offset + batch_size]


def load_documents(
    data: DataConfig, task: Prompts | PlayedTask | None, chat: ChatTokenizer, max_tokens: int
) -> tuple[list[Document], bool]:
    """Documents of ``data.path``, or the task's demonstrations where it is empty; and whether they have own tokens.

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
    ids = ([*chat.begin, *chat.response_ids(text)] for text in read if isinstance(text, str))
    pieces = [text[i : i + max_tokens] for text in ids for i in range(0, len(text), max_tokens)]
    return [(piece, [True] * len(piece)) for piece in pieces if len(piece) > 1], False


def document(row: Row, data: DataConfig) -> tuple[Prompt, str] | str:
    """A row's prompt and response, also of a conversation in the text column; else its text.

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
    shape = (len(rows), length)
    input_ids = np.full(shape, pad_id, np.int64)
    position_ids, loss_mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for row, packed in enumerate(rows):
        start = 0
        for ids, own in packed:
            end = start + len(ids)
            input_ids[row, start:end] = ids
            position_ids[row, start:end] = np.arange(len(ids))
            loss_mask[row, start : end - 1] = own[1:] if response_only else True
            start = end
        position_ids[row, start:] = np.arange(length - start)
    return PackedRows(input_ids, position_ids, loss_mask)


def _demonstrated(task: Prompts | PlayedTask, chat: ChatTokenizer, max_tokens: int) -> list[Document]:
    if not isinstance(task, PlayedTask):
        return _pair_documents(task.demonstrations(), chat, max_tokens)
    return [document for dialogue in task.dialogues() for document in _windows(dialogue, chat, max_tokens)]


def _windows(dialogue: Dialogue, chat: ChatTokenizer, max_tokens: int) -> Iterator[Document]:
    """A dialogue, tokenised piece by piece as in an episode; a long one in stretches, each after the opening."""
    opening = [*chat.begin, *chat.text_ids(dialogue.opening)]
    ids, own = list(opening), [False] * len(opening)
    for utterance, observation in dialogue.turns:
        said, heard = chat.response_ids(utterance), chat.text_ids(observation)
        if len(ids) > len(opening) and len(ids) + len(said) + len(heard) > max_tokens:
            yield ids[:max_tokens], own[:max_tokens]
            ids, own = list(opening), [False] * len(opening)
        ids, own = [*ids, *said, *heard], [*own, *[True] * len(said), *[False] * len(heard)]
    yield ids[:max_tokens], own[:max_tokens]


def _pair_documents(pairs: Iterable[tuple[Prompt, str]], chat: ChatTokenizer, max_tokens: int) -> list[Document]:
    documents = []
    for prompt, response in pairs:
        prompt_ids = chat.prompt_ids(prompt)
        ids = [*prompt_ids, *chat.response_ids(response)]
        own = [False] * len(prompt_ids) + [True] * (len(ids) - len(prompt_ids))
        if len(prompt_ids) < max_tokens:
            documents.append((ids[:max_tokens], own[:max_tokens]))
    return documents
