"""Safe parsers for answers that reasoning-gym's verifiers would pass to ``eval``: arithmetic, formulas, lists.

    countdown, puzzle24                          arithmetic("(3 + 4) * 2")            Fraction(14)
    integration, polynomials                     formula("3*x**2 + C")                an expression of SymPy
    matrices, strings, queens                    literal("[[1, 0], [0, 1]]")          lists of numbers and text

:func:`read_instead_of_executing` replaces ``eval`` and ``parse_expr`` in the verifiers by these; SymPy's own
``parse_expr`` would evaluate its text as Python. All of them parse with ``ast``, accept a short list of node types, and
raise ValueError for any other. Sizes are checked before anything that could grow is computed.
"""

import ast
import importlib
import operator
import re
import types
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

MAX_LENGTH = 4000
"""Characters of an answer."""
_DEPTH = 50  # of nesting
_DIGITS = 100  # of a number in the answer
_BITS = 4096  # of a power of numbers
_POWER = 100  # exponent of a power of symbols
_FUNCTIONS = (
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "exp", "log", "ln", "sqrt", "Abs",
)  # fmt: skip
_CONSTANTS = ("pi", "E")
_PLAIN: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul
}  # fmt: skip


def arithmetic(text: str) -> Fraction:
    """Return the exact value of whole numbers joined by + - * / ** and parentheses. Raises ValueError.

    Other ways to write numbers, such as 1e2 or 0x64, are refused: verifiers that look for digits would miss them.
    """
    if not re.fullmatch(r"[0-9\s+*/()-]+", text):
        raise ValueError("expected only whole numbers, + - * / and parentheses")
    return _number(_tree(text), 0)


def whole(text: str) -> Fraction:
    """Return the value of :func:`arithmetic` if that is an integer: 24.1 must not pass as 24. Raises ValueError."""
    value = arithmetic(text)
    if value.denominator != 1:
        raise ValueError(f"{value} is not an integer")
    return value


def literal(text: str) -> Any:
    """Return numbers, text, true, false, None, or lists and tuples of these. Raises ValueError."""
    return _literal(_tree(text), 0)


def formula(text: str, local_dict: Mapping[str, Any] | None = None) -> Any:
    """Return a SymPy expression of arithmetic, symbols and elementary functions. Raises ValueError.

    Args:
        text: the expression.
        local_dict: symbols by their names, as for ``sympy.parse_expr``.
    """
    return _formula(_tree(text), local_dict or {}, 0)


def read_instead_of_executing() -> None:
    """Make reasoning-gym's verifiers in this process parse answers with this module rather than evaluate them."""
    for name, (old, new) in _REPLACEMENTS.items():
        module = importlib.import_module(f"reasoning_gym.{name}")
        if "." not in old:
            setattr(module, old, new)
            continue
        package, _, attribute = old.partition(".")
        theirs = getattr(module, package)
        ours = types.ModuleType(theirs.__name__)
        ours.__dict__.update(theirs.__dict__, **{attribute: new})
        setattr(module, package, ours)


_REPLACEMENTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "games.countdown": ("parse_expr", arithmetic),
    "games.puzzle24": ("parse_expr", whole),
    "games.n_queens": ("eval", literal),
    "algorithmic.binary_matrix": ("eval", literal),
    "algorithmic.spiral_matrix": ("eval", literal),
    "algorithmic.string_insertion": ("eval", literal),
    "algebra.simple_integration": ("sympy.parse_expr", formula),
    "algebra.intermediate_integration": ("sympy.parse_expr", formula),
    "algebra.polynomial_multiplication": ("sp.parse_expr", formula),
}


def _tree(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"more than {MAX_LENGTH} characters")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not a formula") from None


def _number(node: ast.expr, depth: int) -> Fraction:
    if depth > _DEPTH:
        raise ValueError("nested too deep")
    match node:
        case ast.Constant(value=value):
            return _written(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, depth + 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _number(operand, depth + 1)
        case ast.BinOp(left=left, op=op, right=right):
            return _joined(op, _number(left, depth + 1), _number(right, depth + 1))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def _written(value: object) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{type(value).__name__} is not a number")
    if abs(value) >= 10**_DIGITS:  # including infinity
        raise ValueError(f"more than {_DIGITS} digits")
    return Fraction(str(value))


def _joined(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if plain := _PLAIN.get(type(op)):
        return plain(left, right)
    match op:
        case ast.Div() if right:
            return left / right
        case ast.Pow() if right.denominator == 1 and (left or right >= 0):
            bits = max(left.numerator.bit_length(), left.denominator.bit_length())
            if bits * abs(right.numerator) <= _BITS:
                return Fraction(left ** int(right))
    raise ValueError(f"{type(op).__name__} of these numbers is not supported")


def _literal(node: ast.expr, depth: int) -> Any:
    if depth > _DEPTH:
        raise ValueError("nested too deep")
    match node:
        case ast.Constant(value=bool() | str() | None as value):
            return value
        case ast.Constant(value=int() | float() as number):
            _written(number)
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            _written(number)
            return -number
        case ast.List(elts=elements):
            return [_literal(one, depth + 1) for one in elements]
        case ast.Tuple(elts=elements):
            return tuple(_literal(one, depth + 1) for one in elements)
    raise ValueError(f"{type(node).__name__} is not a list of numbers and text")


def _formula(node: ast.expr, names: Mapping[str, Any], depth: int) -> Any:
    import sympy

    if depth > _DEPTH:
        raise ValueError("nested too deep")
    match node:
        case ast.Constant(value=value):
            exact = _written(value)
            return sympy.Integer(value) if isinstance(value, int) else sympy.Float(str(value) if exact else "0.0")
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name) if name in _CONSTANTS:
            return getattr(sympy, name)
        case ast.Name(id=name) if len(name) <= 16 and name not in _FUNCTIONS:
            return sympy.Symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_formula(operand, names, depth + 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _formula(operand, names, depth + 1)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            return getattr(sympy, name)(_formula(argument, names, depth + 1))
        case ast.BinOp(left=left, op=op, right=right):
            return _combined(op, _formula(left, names, depth + 1), _formula(right, names, depth + 1))
    raise ValueError(f"{type(node).__name__} is not part of a formula")


def _combined(op: ast.operator, left: Any, right: Any) -> Any:
    if plain := _PLAIN.get(type(op)):
        return plain(left, right)
    match op:
        case ast.Div():
            return left / right
        case ast.Pow() if _may_be_raised(left, right):
            return left**right
    raise ValueError(f"{type(op).__name__} of these is not supported")


def _may_be_raised(base: Any, exponent: Any) -> bool:
    """Whether a power has few digits or few factors; what SymPy leaves unevaluated costs nothing."""
    if not exponent.is_Rational:
        return True
    if base.is_Rational:
        bits = max(int(base.p).bit_length(), int(base.q).bit_length())
        return bool(bits * abs(exponent) <= _BITS)
    return bool(abs(exponent) <= _POWER)
