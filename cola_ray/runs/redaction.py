"""What nobody but the service itself is to read: passwords and tokens in addresses, and secrets of the environment.

    redacted("http://ann:pw@host/api?token=t")   "http://***@host/api?token=***"
    redacted_tree(config.model_dump())           the same for settings, at any depth

Everything that a run writes or prints of its settings and errors goes through here. What is used is never redacted: a
run that is resumed takes its secrets from the command line or the environment again.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY|(^|[_.])(KEY|PWD|AUTH)$", re.IGNORECASE)
_SHORTEST = 8  # characters of a value of the environment that can be no ordinary word
# An address ends at white space or a quote. Its user and password may hold anything up to the last @, its query hides
# whole: which parameter is a token only the service knows.
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s'\"<>]*@", re.IGNORECASE)
_QUERY = re.compile(
    r"(\b[a-z][a-z0-9+.-]*://[^\s'\"<>?#]*)([?#][^\s'\"<>]*?)(?=[.,:;)\]]*(?:[\s'\"<>]|$))", re.IGNORECASE
)
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)
_ASSIGNED = re.compile(  # a digit tells a value from the name of a variable, in the lines of a traceback
    r"""((?:api[_-]?key|token|secret|password|passwd|pwd)["']?\s*[=:]\s*["']?)(?=[\w.~+/%!-]*\d)[\w.~+/%!-]{6,}""",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """The text without secrets: ``user:password@`` and the values of queries in addresses, tokens of headers, and
    whatever the environment holds under a secret's name.
    """
    for value in _of_environment():
        text = text.replace(value, HIDDEN)
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(lambda found: found[1] + _hidden_query(found[2]), text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    return _ASSIGNED.sub(rf"\1{HIDDEN}", text)


def redacted_tree(tree: Any) -> Any:
    """Settings, or whatever else is written as JSON; values under a secret's name are hidden whole."""
    if isinstance(tree, Mapping):
        return {
            name: HIDDEN if value and isinstance(value, str) and _SECRET.search(str(name)) else redacted_tree(value)
            for name, value in tree.items()
        }
    if isinstance(tree, tuple | list):
        return type(tree)(redacted_tree(value) for value in tree)
    return redacted(tree) if isinstance(tree, str) else tree


def _hidden_query(query: str) -> str:
    """``?a=1&b=2`` as ``?a=***&b=***``; what follows no name is hidden as it is."""
    pieces = re.split(r"([?#&;])", query)
    return "".join(
        piece
        if piece in ("?", "#", "&", ";", "")
        else f"{piece.partition('=')[0]}={HIDDEN}"
        if "=" in piece
        else HIDDEN
        for piece in pieces
    )


def _of_environment() -> list[str]:
    """Longest first, so that one which holds another is hidden whole."""
    values = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST}
    return sorted((value for value in values if not os.path.exists(value)), key=len, reverse=True)
