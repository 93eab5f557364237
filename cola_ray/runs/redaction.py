"""Hiding secrets: passwords and tokens in addresses, and values of secret environment variables.

    redacted("http://ann:pw@host/api?token=t")   "http://***@host/api?token=***"
    redacted_tree(config.model_dump())           the same for settings, at any depth

All settings and errors that a run writes or prints go through here. Values in use are never redacted: a resumed run
takes its secrets from the command line or the environment again.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY|(^|[_.])(KEY|PWD|AUTH)$", re.IGNORECASE)
_MIN_LENGTH = 8  # characters; a shorter value in the environment may be an ordinary word
# An address ends at white space or a quote. Its user and password may hold anything up to the last @. All values of its
# query are hidden, since only the service knows which parameter is a token.
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s'\"<>]*@", re.IGNORECASE)
_QUERY = re.compile(
    r"(\b[a-z][a-z0-9+.-]*://[^\s'\"<>?#]*)([?#][^\s'\"<>]*?)(?=[.,:;)\]]*(?:[\s'\"<>]|$))", re.IGNORECASE
)
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)
_ASSIGNED = re.compile(  # in the lines of a traceback, only a value has a digit; a variable's name has none
    r"""((?:api[_-]?key|token|secret|password|passwd|pwd)["']?\s*[=:]\s*["']?)(?=[\w.~+/%!-]*\d)[\w.~+/%!-]{6,}""",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Return the text without secrets: users, passwords and query values in addresses, tokens of headers, and values of
    environment variables whose name suggests a secret.
    """
    return _redacted(text, _environment_secrets())


def redacted_tree(tree: Any) -> Any:
    """Redact settings or other JSON data; a value whose name suggests a secret is hidden entirely."""
    return _redacted_tree(tree, _environment_secrets())


def _redacted(text: str, secrets: Sequence[str]) -> str:
    for value in secrets:
        text = text.replace(value, HIDDEN)
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(lambda found: found[1] + _hidden_query(found[2]), text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    return _ASSIGNED.sub(rf"\1{HIDDEN}", text)


def _redacted_tree(tree: Any, secrets: Sequence[str]) -> Any:
    if isinstance(tree, Mapping):
        return {
            name: HIDDEN
            if value and isinstance(value, str) and _SECRET.search(str(name))
            else _redacted_tree(value, secrets)
            for name, value in tree.items()
        }
    if isinstance(tree, tuple | list):
        return type(tree)(_redacted_tree(value, secrets) for value in tree)
    return _redacted(tree, secrets) if isinstance(tree, str) else tree


def _hidden_query(query: str) -> str:
    """Turn ``?a=1&b=2`` into ``?a=***&b=***``; a value without a name is hidden entirely."""
    pieces = re.split(r"([?#&;])", query)
    return "".join(
        piece
        if piece in ("?", "#", "&", ";", "")
        else f"{piece.partition('=')[0]}={HIDDEN}"
        if "=" in piece
        else HIDDEN
        for piece in pieces
    )


def _environment_secrets() -> list[str]:
    """Return secret values of the environment, longest first, so that one that contains another is hidden entirely."""
    values = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _MIN_LENGTH}
    return sorted((value for value in values if not os.path.exists(value)), key=len, reverse=True)
