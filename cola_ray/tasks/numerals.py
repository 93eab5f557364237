"""The exact number that a text states, or none.

    text ─> tokens (number_tokens.py) ─> the side after the last "=" ─> one number and its words (number_phrase.py)

    number_in(text)           the one number that an answer is
    number_at(text, place)    the number around a digit somewhere in a text

Numbers as people and models write them: fractions, mixed numbers, grouped thousands, powers of ten, currencies, units,
the digits of every script; ``tests/unit/test_final_answer.py`` has the table. Values are exact: no float is involved.
``%`` is a unit: 50% is 50. In ``48 + 24 = 72`` the last side counts. A text that can be read in several ways has no
value: ``3,4`` (3.4, or 3 and 4), ``1.234 €``, ``5 or 6``, ``5-6``, ``2:3``, ``5 ft 3 in``, ``5k``, ``4 x 5``,
``1/2 of 10``, ``half of 18``, ``more than 18``, and ``(5)`` outside of LaTeX (an accountant's -5). A number with more
than a thousand digits or decimal places has no value either.
"""

from collections.abc import Sequence
from fractions import Fraction

from cola_ray.tasks.number_phrase import AMOUNTS, GLUED, MAX_SCALE, NumberPhrase
from cola_ray.tasks.number_tokens import Token, tokens
from cola_ray.tasks.number_words import AMBIGUOUS, LEADS


def number_in(text: str, *, latex: bool = False, bare: bool = False) -> Fraction | None:
    r"""Return the one number that an answer's text states; None if there is none, or it is ambiguous.

    Args:
        text: of the answer.
        latex: parentheses group, and a letter directly after a number is a variable.
        bare: there must be nothing but the number: with words or units beside it (``3m`` may be algebra) it has no
            value, nor with a decimal comma, which may separate a list.

    Example: r"\$1{,}234.50" -> 2469/2.
    """
    return _read(_tokens(text), latex, bare)


def _tokens(text: str) -> list[Token]:
    return tokens(text, lambda part: _read(part, latex=True, bare=True))


def _read(found: list[Token], latex: bool, bare: bool) -> Fraction | None:
    side = _last_side(_without_remarks(found, bare))
    if side is None:
        return None
    inner = _inside(side)
    if inner is not side:
        if not latex and inner[:1] and inner[0].kind != "sign":
            return None
        side = inner
    return NumberPhrase(side, latex, bare).number()


def _without_remarks(tokens: list[Token], bare: bool) -> list[Token]:
    """Remove parentheses that hold words or an equation, unless the text must be bare."""
    if bare:
        return tokens
    kept: list[Token] = []
    opened: list[int] = []
    for token in tokens:
        kept.append(token)
        if token.kind == "open":
            opened.append(len(kept) - 1)
        elif token.kind == "close" and opened:
            start = opened.pop()
            spaced = kept[start].spaces > 0 or start == 0
            if spaced and any(one.kind in ("word", "equals") for one in kept[start:]):
                del kept[start:]
    return kept


def _last_side(tokens: list[Token]) -> list[Token] | None:
    """Return the tokens after the last equals sign; None for a list of equations."""
    places = [place for place, token in enumerate(tokens) if token.kind == "equals"]
    if not places:
        return tokens
    between = tokens[places[0] : places[-1]]
    if any(token.kind in ("comma", "stop") or token.text.lower() in ("and", "or") for token in between):
        return None
    if any(token.kind == "bad" for token in tokens):
        return None
    return tokens[places[-1] + 1 :]


def _inside(tokens: list[Token]) -> list[Token]:
    """Remove parentheses around the whole text."""
    core = [token for token in tokens if token.kind not in ("currency", "stop")]
    kinds = [token.kind for token in core]
    if kinds[:1] == ["open"] and kinds[-1] == "close" and kinds.count("open") == kinds.count("close") == 1:
        return core[1:-1]
    return tokens


def begins_with_number(text: str) -> bool:
    """Whether a number comes first, apart from words such as "about"."""
    return _begins_with_number(_tokens(text))


def _begins_with_number(tokens: Sequence[Token]) -> bool:
    for token in tokens:
        if token.kind in (*AMOUNTS, "sign", "command"):
            return True
        if token.kind not in ("currency", "mark", "open", "colon", "equals") and token.text.lower() not in LEADS:
            return False
    return False


def is_heading(line: str) -> bool:
    """Whether a line with text below it is a heading: words, or the number of a step followed by words."""
    found = _tokens(line)
    kinds = [token.kind for token in found[:4]]
    if kinds[:2] == ["word", "equals"]:
        return False
    if kinds[:2] in (["number", "stop"], ["number", "close"], ["number", "colon"]) and kinds[2:3] == ["word"]:
        return True
    return bool(found) and not _begins_with_number(found)


# --- the last number of a text ------------------------------------------------------------------------------------

_WINDOW = 1200  # characters before a digit that are read


def last_digit(part: str) -> int | None:
    """Return the place of the last digit or vulgar fraction in a text; None if there is none."""
    return next(
        (place for place in range(len(part) - 1, -1, -1) if part[place].isdecimal() or part[place] in _VULGAR), None
    )


_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"


def number_at(part: str, end: int) -> Fraction | None:
    """Return the number that the digit at ``end`` belongs to; None if it is an operand or cannot be read."""
    start = max(part.rfind("\n", 0, end) + 1, end - _WINDOW)
    if start == end - _WINDOW:  # do not begin within a number
        start = part.find(" ", start, end) + 1
        if not start:
            return None
    after = part.find("\n", end)
    found = _tokens(part[start : min(after if after >= 0 else len(part), end + 200)])
    phrase = NumberPhrase(found, latex=False, bare=False)
    place, last = 0, None
    while place < len(found):
        if found[place].kind in AMOUNTS and not phrase.is_unit_exponent(place):
            value, stop = phrase.amount(place)
            last = (place, value, stop)
            place = stop
        else:
            place += 1
    if last is None:
        return None
    place, value, stop = last
    before = place - 1
    while phrase.kind(before) == "currency":
        before -= 1
    if phrase.is_changed(before) or phrase.belongs_to_another(before, stop):
        return None
    sign = -1 if phrase.word(before) in ("minus", "negative") and phrase.kind(before - 1) != "number" else 1
    if phrase.kind(before) in ("sign", "operator", "bad"):
        joined = phrase.tokens[before + 1].spaces == 0
        if phrase.kind(before - 1) in (*AMOUNTS, "close") or phrase.kind(before) != "sign":
            return None
        if (joined and phrase.kind(before - 1) != "word") or (joined and phrase.tokens[before].spaces):
            sign = -1 if phrase.tokens[before].text == "-" else 1
    if stop < len(found) and found[stop].spaces == 0 and GLUED.match(found[stop].text):
        return None
    if phrase.kind(stop) in ("operator", "bad") and not phrase.is_unit(stop + 1):
        return None
    if phrase.kind(stop) == "dots" and value is not None and value.denominator > 1:  # 8.333...
        return None
    if value is None or phrase.word(stop) in AMBIGUOUS or (stop < len(found) and found[stop].text in AMBIGUOUS):
        return None
    scale, _ = phrase.scale_after(stop)
    return sign * value * scale if scale <= MAX_SCALE else None
