r"""The number that a response commits to.

    response ─> its own part ─> marked text, else the last number ─> numerals.py ─> Fraction

A response's own part ends where it invents a next question ("Question:", "Problem 2:", "Human:" at the start of a
line). Within it, these count, in this order:

1. The first line after ``####``, since it ends a response, and what follows is a next problem that the model has
   invented. A heading (``#### Step 1: ...`` with text below) is not an answer.
2. The last ``\boxed{}``: intermediate results may be boxed, too, and the final one comes last (as in Hendrycks et al.
   and Minerva).
3. What follows the last "answer is" or "answer:", if it begins with a number.
4. The last number of the text, if it stands alone: nothing is read from ``3:30``, ``5 hours and 30 minutes``,
   ``5 to 6``, ``10% of 50``, ``not 5`` or ``twice 5``.

Graders that use a single regular expression err on both sides: for them ``\boxed{\frac{7}{2}}`` is 2. Here an answer
that can be read in several ways has no value, is not right, and never wins a majority.

A mark decides: if marked text cannot be read, no other number of the text takes its place.

Reading takes time linear in the length of the response, whatever that contains.
"""

import re
from fractions import Fraction

from cola_ray.tasks.number_tokens import latex_argument
from cola_ray.tasks.numerals import begins_with_number, is_heading, last_digit, number_at, number_in


def final_number(response: str) -> Fraction | None:
    """Return the number that a response commits to; None if there is none, or it can be read in several ways.

    Example: "48 + 24, so #### 72 clips" -> 72.
    """
    for part in own_parts(response):
        marked, digit = _marked(part), last_digit(part)
        if marked is not None:
            text, latex = marked
            return number_in(text, latex=latex)
        if digit is not None:
            return number_at(part, digit)
    return None


def last_box(response: str) -> str | None:
    r"""Return the content of the last ``\boxed{}``, braces balanced; "" if empty or never closed, None without a box.

    Example: r"\boxed{1} or \boxed{\frac{1}{2}}" -> r"\frac{1}{2}".
    """
    found = max(response.rfind(r"\boxed"), response.rfind(r"\fbox"))
    if found < 0:
        return None
    start = found + len(r"\boxed" if response.startswith(r"\boxed", found) else r"\fbox")
    held = latex_argument(response, start)
    return "" if held is None else held[0].strip()


def own_parts(response: str) -> list[str]:
    """Cut the response before each question that it invents; its own part is the first one that answers anything."""
    beginning = len(response) - len(response.lstrip())
    cuts = [found.start() for found in _NEXT_QUESTION.finditer(response) if found.start() > beginning]
    return [response[start:end] for start, end in zip([0, *cuts], [*cuts, len(response)], strict=True)]


_NEXT_QUESTION = re.compile(
    r"^[ \t]{0,8}[*_#]{0,4}[ \t]?(?:next )?(?:question|problem|exercise|q|human|user)\b[ \t]?\d{0,4}[*_]{0,2}[ \t]?[:.]"
    r"|<\|im_start\|>|<\|start_header_id\|>",
    re.IGNORECASE | re.MULTILINE,
)
_MARK = re.compile(r"#{4,}")
_LINE = re.compile(r"[^\s].*")
_PHRASE = re.compile(r"\banswer\b[*_ \t]{0,4}(?:is|was|equals|[:=])[*_: \t]{0,6}", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|\Z)")


def _marked(part: str) -> tuple[str, bool] | None:
    """Return the text that a mark points to, and whether it is LaTeX; None if there is no mark."""
    last = len(part.rstrip())
    for mark in _MARK.finditer(part):
        found = _LINE.search(part, mark.end())
        line = _MARK.split(found[0], maxsplit=1)[0] if found else ""
        box = last_box(line)
        if box is not None:
            return box, True
        if found and found.end() < last and is_heading(line):
            continue
        return line, _is_latex(line)
    box = last_box(part)
    if box is not None:
        return box, True
    *_, phrase = (None, *_PHRASE.finditer(part))
    if phrase is not None:
        end = _SENTENCE_END.search(part, phrase.end())
        said = part[phrase.end() : end.start() if end else len(part)]
        if begins_with_number(said):
            return said, _is_latex(said)
    return None


def _is_latex(text: str) -> bool:
    return "\\" in text or (text.strip().startswith("$") and text.strip().endswith("$") and len(text.strip()) > 1)
