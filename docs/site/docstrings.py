"""Docstrings as Markdown, for the reference: they are written to be read in a terminal, as ``help()`` shows them.

Example:                  ─> Examples:, which the reference shows as a session
:class:`~a.B`             ─> `B`
<job>                     ─> &lt;job>, which is no tag
a table between ===       ─> a block as it is typed

Properties of a ``...Config`` are left out: they follow from settings, and nobody can set them.
"""

import re

from griffe import Class, Extension, Object


class Docstrings(Extension):
    """Named in mkdocs.yml."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_class_members(self, *, cls: Class, **_: object) -> None:
        if cls.name.endswith("Config"):
            for name in [name for name, member in cls.members.items() if "property" in member.labels]:
                cls.del_member(name)


def as_markdown(text: str) -> str:
    text = re.sub(r"^Example(?: \([^\n]*\))?:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r"^(={9,}.*?={9,})$", r"```text\n\1\n```", text, flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"(```.*?```|``.*?``|`[^`]*`)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else re.sub(r"<(?=/?\w)", "&lt;", part) for part in parts)
