"""Docstrings as Markdown, for the reference: they are written to be read in a terminal, as ``help()`` shows them.

Example:                  ─> Examples:, which the reference shows as a session
:class:`~a.B`             ─> `B`
<job>                     ─> &lt;job>, which is no tag
a table between ===       ─> a block as it is typed
"""

import re

from griffe import Extension, Object


class Docstrings(Extension):
    """Named in mkdocs.yml."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    text = re.sub(r"^Example(?: \([^\n]*\))?:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r"^(={9,}.*?={9,})$", r"```text\n\1\n```", text, flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"(```.*?```|``.*?``|`[^`]*`)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else re.sub(r"<(?=/?\w)", "&lt;", part) for part in parts)
