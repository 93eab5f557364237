"""Arithmetic in text, evaluated without executing anything: Python's numbers and operators, and nothing else.

    evaluate("(23 + 17) / 4")   10.0
    in_words(10.0)              "10"

Expressions and numbers are limited in size, so no expression takes long.
"""

import ast
import math
import operator
from collections.abc import Callable

MAX_LENGTH = 400
"""Largest number of characters of an expression."""
MAX_BITS = 4096
"""Limit for whole numbers, including intermediate results."""
_DIGITS = 40  # a longer result is shown in powers of ten

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_SIGNS = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-", "^": "**"})


def evaluate(expression: str) -> int | float:
    """Return the value of an expression of numbers, + - * / // % ** and parentheses.

    Raises:
        ValueError: it is something else, or has no finite real value of moderate size; the message says what.
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"an expression has at most {MAX_LENGTH} characters, this one has {len(expression)}")
    try:
        tree = ast.parse(expression.translate(_SIGNS).strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError("not an arithmetic expression") from None
    try:
        return _checked(_value(tree.body))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("the result is too large") from None
    except RecursionError:
        raise ValueError("the expression is nested too deeply") from None


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _checked(value)
        case ast.BinOp(left, operation, right) if type(operation) in _BINARY:
            first, second = _value(left), _value(right)
            if isinstance(operation, ast.Pow):
                _check_power(first, second)
            return _checked(_BINARY[type(operation)](first, second))
        case ast.UnaryOp(operation, operand) if type(operation) in _UNARY:
            return _checked(_UNARY[type(operation)](_value(operand)))
    raise ValueError(f"{ast.unparse(node)[:40]!r} is not arithmetic: use numbers, + - * / // % ** and parentheses")


def _check_power(base: float, exponent: float) -> None:
    """Refuse a power of whole numbers before it is computed, if it would be too large."""
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and abs(base) > 1 and int(base).bit_length() * abs(exponent) > MAX_BITS:
        raise OverflowError


def _checked(value: object) -> int | float:
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise OverflowError
        return value
    if not isinstance(value, float):  # a root of a negative number
        raise ValueError("the result is not a real number")
    if not math.isfinite(value):
        raise OverflowError
    return value


def in_words(value: float) -> str:
    """Return a number as text: a float that is whole as a whole number, a very long one in powers of ten."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    text = str(value)
    if len(text) <= _DIGITS:
        return text
    sign, digits = ("-", text[1:]) if value < 0 else ("", text)
    return f"{sign}{digits[0]}.{digits[1:16]}e+{len(digits) - 1}"
