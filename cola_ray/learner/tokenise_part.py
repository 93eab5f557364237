"""A child process that makes shards of parts of a corpus, and counts the rows of bundles. ``tokenise.py`` starts it.

stdin   {"chat", "data"}                 once, with the tokenizer as a pickle; then requests:
        {"part", "target"}               ──> {"tokens", "rows", "done": false} ... {"file", "documents", ..., "done"}
        {"count"}                        ──> {"rows": [...], "done"}
stdout  one answer per line; {"error"} is the last. The child ends with its stdin, or with the process that started it.
"""

import base64
import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from cola_ray.learner.corpus import document, encoded
from cola_ray.learner.packed import Bundles, count_rows
from cola_ray.learner.shards import TEXT, Documents, ShardWriter
from cola_ray.settings.config import DataConfig
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.parts import Part, read_part
from cola_ray.tasks.rows import Row

NOTED = 5
"""Broken rows of a part that are recorded with their place."""
_SAID_S = 1.0


def main() -> None:
    answers = _own_stdout()
    parent = os.getppid()
    setup = json.loads(sys.stdin.readline())
    chat: ChatTokenizer | None = None

    def say(answer: dict[str, Any], done: bool = False) -> None:
        if os.getppid() != parent:
            os._exit(1)
        answers.write(json.dumps(answer | {"done": done}) + "\n")
        answers.flush()

    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "count" in request:
                say({"rows": _counted(**request["count"])}, done=True)
                continue
            chat = chat or pickle.loads(base64.b64decode(setup["chat"]))
            data = DataConfig.model_validate(setup["data"])
            say(make_shard(Part(**request["part"]), data, chat, Path(request["target"]), say), done=True)
        except (ValueError, OSError) as error:
            say({"error": str(error)}, done=True)
            return


def make_shard(
    part: Part, data: DataConfig, chat: ChatTokenizer, target: Path, say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Tokenise a part; returns its description, and the first of its broken rows as [row, why].

    Raises:
        ValueError: the part's file does not have the format that its name says.
    """
    found: dict[str, Any] = {"rows": 0, "broken": 0, "texts": 0, "first_broken": []}
    said = time.monotonic()
    with ShardWriter(target, small=len(chat.tokenizer) <= 1 << 16) as writer:
        for number, row in enumerate(read_part(part, (data.prompt_field, data.response_field, data.text_field)), 1):
            found["rows"] = number
            try:
                ids, prompt_tokens = encoded(document(_whole(row), data), chat)
            except ValueError as error:
                found["broken"] += 1
                if len(found["first_broken"]) < NOTED:
                    found["first_broken"].append([number, str(error)])
                continue
            if len(ids) > 1:  # one token predicts nothing
                writer.add(ids, prompt_tokens)
                found["texts"] += prompt_tokens == TEXT
            if time.monotonic() - said > _SAID_S:
                said = time.monotonic()
                say({"tokens": writer.tokens, "rows": number})
    return found | {"file": target.name, "documents": writer.documents, "tokens": writer.tokens}


def _whole(row: Row | ValueError) -> Row:
    if isinstance(row, ValueError):
        raise row
    return row


def _counted(folders: list[str], seed: int, length: int, first: int, end: int) -> list[int]:
    return count_rows(Bundles(Documents([Path(folder) for folder in folders]), seed, length), first, end)


def _own_stdout() -> TextIO:
    """The pipe to the process that started this one; output of libraries goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
