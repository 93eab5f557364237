"""Splits text into numbers, words, signs and other tokens, after replacing special characters and LaTeX by plain ones.

    tokens(text, read)  ─>  [Token(kind, text, spaces before it, value of a fraction or a power of ten), ...]

The digits of every script, LaTeX commands, typographic signs and invisible characters become their plain equivalents.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000
"""Most digits of a number, and the largest power of ten."""
MAX_LENGTH = 2000
"""Most characters of a text; longer texts are not read."""

Read = Callable[[list["Token"]], Fraction | None]
"""Reads a numerator or denominator: its number, or None."""


# --- plain characters ---------------------------------------------------------------------------------------------

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_PLAIN = {
    **dict.fromkeys("−﹣－–‒‐‑—―➖", "-"), **dict.fromkeys("×✕✖⨯⋅·∙•∗＊", "*"), **dict.fromkeys("⁄∕／", "/"),
    **dict.fromkeys("≈≃≅→⇒⟹＝", "="), **dict.fromkeys("’‘ʼ′＇`´", "'"), **dict.fromkeys("“”″„", '"'),
    **dict.fromkeys("°º˚", " ° "), "÷": " ÷ ", "٫": ".", "٬": ",", "٪": "%", "。": ". ", "、": ", ", "℃": " °C ",
    "℉": " °F ", "\n": "  ", "\r": "  ", "\t": " ",
}  # fmt: skip


@functools.cache
def _plain_character(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    if kind == "Cf":  # joiners, marks of direction, soft hyphens
        return ""
    if kind.startswith("Z"):
        return " "
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return f" {unicodedata.normalize('NFKC', character).replace(chr(0x2044), '/')} "
    if kind == "No":  # encircled digits and the like are labels, not numbers
        return "□"
    return unicodedata.normalize("NFKC", character)


_WRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<<[^<>]{0,200}>>|<\|?/?[A-Za-z][\w-]{0,30}\|?>", " "),  # GSM8K's calculations; tags and control tokens
        (r"\\(?:text)?color ?\{\w{1,20}\}", " "),
        (r"\\!", ""),
        (r"\\[,;: ]|~|\\q?quad\b|\\(?:thin|med|thick|en)space\b", " "),
        (r"\{([,.])\}", r"\1"),
        (r"\\([$%])", r"\1"),
        (r"\\[#&_]", " "),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\[()\[\]]", " "),
        (r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|boldsymbol|bm|emph|underline"
         r"|operatorname|displaystyle|textstyle|bf|rm|it)(?![A-Za-z])", " "),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])", " * "),
        (r"\\div(?![A-Za-z])", " ÷ "),
        (r"\\(?:approx|to|rightarrow|Rightarrow|implies|simeq)(?![A-Za-z])", " = "),
        (r"\\(?:ldots|dots|cdots)(?![A-Za-z])", "..."),
        (r"\\(?:pounds|euro|yen|textdollar|cents|texteuro|textsterling)(?![A-Za-z])", "¤"),
        (r"\^ ?\{? ?\\(?:circ|degree)(?![A-Za-z]) ?\}?|\\degree(?![A-Za-z])", " ° "),
        (r"\^ ?\{ ?([^{}]{1,20}?) ?\}", r"^(\1)"),
        (r"(?<=[\d)]) ?[xX] ?(?=[-\d.$(])", " * "),
        (r"(\d{1,20}) ?\\over ?(\d{1,20})(?!\d)", r"\1/\2"),
        (r"(?i)\b(?:us|a|c|nz|hk|s)(?=\$)|\b(?:usd|eur|gbp|jpy|inr|cad|aud|chf|rs|rmb|cny)\.? ?(?=[-\d])", "¤"),
    )
]  # fmt: skip
# Stars and underscores of emphasis; between two numbers they mean multiplication, and are kept.
_EMPHASIS = re.compile(r"(?<![\d)*])(?<![\d)] )[*_]{1,3}(?=[^\s*_])|(?<=[^\s*_])[*_]{1,3}(?![*_]| ?[\d(])")


def _plain(text: str) -> str:
    if not text.isascii():
        text = re.sub(r"[⁰¹²³⁴-⁹⁺⁻]+", lambda found: f"^({found[0].translate(_SUPERSCRIPTS)})", text)
        text = re.sub(r"[₀-₉]+", "□", text)
    text = "".join(map(_plain_character, text)) if not text.isascii() else text.translate(_LINES)
    for pattern, replacement in _WRITTEN:
        text = pattern.sub(replacement, text)
    return _EMPHASIS.sub("", text)


_LINES = str.maketrans({"\n": "  ", "\r": "  ", "\t": " ", "`": "'"})


# --- tokens -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    spaces: int  # before the token
    value: Fraction | None = None  # of a fraction or a power of ten


_TOKEN = re.compile(
    r"(?P<power>(?<![\w.,'])10 ?(?:\^|\*\*) ?\(? ?(?P<exponent>[-+]?\d+) ?\)?(?!\w))"
    r"|(?P<number>(?:\d+(?:[.,'_]\d+)*|(?<![\w.,])\.\d+)(?:[eE][-+]?\d+(?!\w))?)"
    r"|(?P<fraction>\\[dtc]?frac(?![A-Za-z]))"
    r"|(?P<command>\\[A-Za-z]+|\\.?)"
    r"|(?P<word>[A-Za-z][A-Za-z0-9]*(?:'[A-Za-z]+)?"
    r"|[万萬만亿億억백천]|[百千](?![克米瓦卡])"  # in 千克 (kilogram) and the like it is part of a unit
    r"|[^\W\d_A-Za-z]+)"
    r"|(?P<bad>[<>!]=|\*\*)"
    r"|(?P<equals>[-=]>|:?=+)"
    r"|(?P<dots>\.{2,}|…)"
    r"|(?P<other>.)",
    re.DOTALL,
)
_KINDS = {
    **dict.fromkeys("-+", "sign"), **dict.fromkeys("*/^÷<>±|", "operator"), "!": "factorial", ":": "colon", "%": "unit",
    "°": "unit", "(": "open", ")": "close", **dict.fromkeys(",;", "comma"), ".": "stop",
    **dict.fromkeys("\"'?[]&#@", "mark"), "{": "space", "}": "space", "_": "operator",
}  # fmt: skip


def tokens(text: str, read: Read, depth: int = 0) -> list[Token]:
    """Return the tokens of a text; [] if it is longer than :data:`MAX_LENGTH`.

    Args:
        text: as a person or a model wrote it.
        read: reads numerator and denominator of LaTeX's fractions.
        depth: number of fractions around the text; fractions nested deeper than four have no value.
    """
    if len(text) > MAX_LENGTH:
        return []
    text = _plain(text)
    found: list[Token] = []
    place, spaces = 0, 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        assert match is not None
        kind, piece, value = match.lastgroup or "", match[0], None
        place = match.end()
        if match["power"] is not None:
            kind, value = "power", power_of_ten(match["exponent"])
        elif kind == "fraction":
            value, place = _fraction(text, place, read, depth)
        elif kind == "other":
            kind = _kind_of(piece)
        if kind == "space":
            spaces += 1
            continue
        found.append(Token(kind, piece, spaces, value))
        spaces = 0
    return found


def _kind_of(character: str) -> str:
    if character.isspace():
        return "space"
    if character in _KINDS:
        return _KINDS[character]
    category = unicodedata.category(character)
    if category == "Sc" or character == "¤":
        return "currency"
    return "word" if category[0] in "LM" else "mark" if category[0] == "P" else "bad"


def latex_argument(text: str, start: int) -> tuple[str, int] | None:
    """Return a LaTeX argument (a group in braces, or one character) and the place after it; None if there is none."""
    while start < len(text) and text[start] in " \t\n":
        start += 1
    if start == len(text) or text[start] == "}":
        return None
    if text[start] != "{":
        return text[start], start + 1
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()], brace.end()
    return None


def _fraction(text: str, start: int, read: Read, depth: int) -> tuple[Fraction | None, int]:
    upper = latex_argument(text, start)
    lower = upper and latex_argument(text, upper[1])
    if upper is None or lower is None:
        return None, len(text)
    if depth >= 4:
        return None, lower[1]
    above, below = (read(tokens(part[0], read, depth + 1)) for part in (upper, lower))
    return (above / below if above is not None and below else None), lower[1]


def power_of_ten(exponent: str) -> Fraction | None:
    digits = exponent.lstrip("+-").lstrip("0") or "0"
    if len(digits) > 4 or int(digits) > MAX_DIGITS:
        return None
    return Fraction(10) ** int(exponent)
