r"""Answers that are expressions rather than numbers: found in a response, compared through math-verify.

    response ─> last \boxed{}, else the last formula ─> both numbers? compared exactly ─> else math-verify, with limits

math-verify passes expressions to SymPy, which would compute towers of powers forever. Expressions that could grow like
that are only compared as text. math-verify's own time limits are also used where its signals work, i.e. in a process's
main thread.
"""

import re
import threading
from typing import Any

from cola_ray.tasks.final_answer import last_box, own_parts
from cola_ray.tasks.numerals import number_in

MAX_LENGTH = 1000
"""Characters of an expression; longer ones are compared as text only."""
_SECONDS = 3
_EXPANDED = 50  # largest product of exponents that is multiplied out in canonical texts


def final_expression(response: str) -> str | None:
    r"""Return the LaTeX expression that a response commits to: its last ``\boxed{}``, or its last formula or number.

    Text after an invented next question does not count. None if there is no expression, or the box is empty.
    """
    for part in own_parts(response):
        box, tail = last_box(part), part[-MAX_LENGTH:]
        if box is not None:
            return box or None
        found = [one for one in _parsed(tail) if isinstance(one, str)] if not _may_grow(tail) else []
        if found:
            return found[0]
    return None


def same_expression(gold: str, answer: str | None) -> bool:
    """Whether two pieces of LaTeX have the same value; False if ``answer`` is None."""
    if answer is None or not gold.strip():
        return False
    numbers = number_in(gold, latex=True, bare=True), number_in(answer, latex=True, bare=True)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _compact(gold) == _compact(answer):
        return True
    if any(_may_grow(text) for text in (gold, answer)):
        return False
    from math_verify import verify

    left, right = (_parsed(f"$\\boxed{{{text}}}$") for text in (gold, answer))
    return bool(verify(left, right, timeout_seconds=_limit()))


def canonical(expression: str) -> str:
    """Return one text for expressions of equal value, as far as SymPy's evaluation and expansion show it."""
    number = number_in(expression, latex=True, bare=True)
    if number is not None:
        return str(number)
    if _may_grow(expression):
        return _compact(expression)
    import sympy

    found = _parsed(f"$\\boxed{{{expression}}}$")
    if not found or isinstance(found[0], str):
        return _compact(expression)
    try:
        value = found[0].doit()
        return str(sympy.expand(value) if _growth(expression) <= _EXPANDED else value)
    except Exception:  # SymPy raises errors of any class for what it cannot do
        return str(found[0])


def _parsed(text: str) -> list[Any]:
    """Parse with math-verify: [expression, its text], or less."""
    from math_verify import parse

    return parse(text, parsing_timeout=_limit())


def _limit() -> int | None:
    return _SECONDS if threading.current_thread() is threading.main_thread() else None


def _compact(text: str) -> str:
    return (
        re.sub(r"\s+|\\[,;:! ]|\\(?:left|right)(?![A-Za-z])", "", text)
        .replace("\\dfrac", "\\frac")
        .replace("\\tfrac", "\\frac")
    )


def _may_grow(text: str) -> bool:
    """Whether evaluating this expression could take long."""
    nested = sum(text.count(bracket) for bracket in "({[")
    return len(text) > MAX_LENGTH or nested > 100 or _growth(text) > 100_000


def _growth(text: str) -> int:
    """Return the product of all numbers in exponents, and of those whose factorial or binomial is taken.

    ``_TOWER`` stands for towers: a power or a factorial within an exponent or another factorial.
    """
    plain = re.sub(r"\s|\\left|\\right", "", text).replace("**", "^")
    product = 1
    for place in (found.end() for found in re.finditer(r"\^", plain)):
        exponent = _exponent(plain, place)
        if re.search(r"[\d)}]\^|!|\d[eE]\d", exponent):
            return _TOWER
        for digits in re.findall(r"\d+", exponent):
            product *= max(int(digits[:9]), 1)
            if product > _TOWER:
                return _TOWER
    if re.search(r"![)}]*!|\d{5,}[)}]*!|[)}]!", plain) or (
        re.search(r"\\[dt]?binom|\\choose", plain) and re.search(r"\d{4}", plain)
    ):
        return _TOWER
    for digits in re.findall(r"(\d+)!", plain):
        product *= max(int(digits), 1)
    return min(product, _TOWER)


_TOWER = 10**9


def _exponent(text: str, start: int) -> str:
    """Return what follows a ^: a group in braces or parentheses, or digits, and a further ^ with its own exponent."""
    opened = re.match(r"-?[{(]", text[start : start + 2])
    if opened is None:
        found = re.match(r"-?(?:\d+|.)?(?:\^.)?", text[start:])
        return found[0] if found else ""
    depth = 0
    for place in range(start + opened.end() - 1, len(text)):
        depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return text[start : place + 1] + ("9^9" if text[place + 1 : place + 2] == "^" else "")
    return text[start:]
