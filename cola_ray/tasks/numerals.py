"""The exact number that a text is, or none.

    text ─> characters and LaTeX made plain ─> tokens ─> what stands before, the number itself, what stands after

Numbers as people and models write them: fractions, mixed numbers, grouped thousands, powers of ten, currencies, units,
the digits of every script; ``tests/unit/test_final_answer.py`` has the table. Values are exact, no float comes between.
``%`` is a unit: 50% is 50. Of ``48 + 24 = 72`` the last side counts. What reads in several ways has no value: ``3,4``
(3.4, or 3 and 4), ``1.234 €``, ``5 or 6``, ``5-6``, ``2:3``, ``5 ft 3 in``, ``5k``, ``4 x 5``, ``1/2 of 10``,
``half of 18``, ``more than 18``, and ``(5)`` outside of LaTeX (an accountant's -5). Nor has a number of more than a
thousand digits or decimal places.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000
"""Of a number, and the largest power of ten."""
MAX_SCALE = 10**30
"""Of words such as "million" behind a number."""
MAX_LENGTH = 2000
"""Characters of a text; longer ones are not read."""


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
    if kind == "No":  # encircled and the like: labels
        return "□"
    return unicodedata.normalize("NFKC", character)


_WRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<<[^<>]{0,200}>>|<\|?/?[A-Za-z][\w-]{0,30}\|?>", " "),  # GSM8K's calculations; tags, control tokens
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
# Stars and underscores of emphasis: never between two numbers, where they multiply.
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
class _Token:
    kind: str
    text: str
    spaces: int  # before it
    value: Fraction | None = None  # of a fraction or a power of ten


_TOKEN = re.compile(
    r"(?P<power>(?<![\w.,'])10 ?(?:\^|\*\*) ?\(? ?(?P<exponent>[-+]?\d+) ?\)?(?!\w))"
    r"|(?P<number>(?:\d+(?:[.,'_]\d+)*|(?<![\w.,])\.\d+)(?:[eE][-+]?\d+(?!\w))?)"
    r"|(?P<fraction>\\[dtc]?frac(?![A-Za-z]))"
    r"|(?P<command>\\[A-Za-z]+|\\.?)"
    r"|(?P<word>[A-Za-z][A-Za-z0-9]*(?:'[A-Za-z]+)?"
    r"|[万萬만亿億억백천]|[百千](?![克米瓦卡])"  # of 千克, a kilogram, it is a part
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


def _tokens(text: str, depth: int = 0) -> list[_Token]:
    """At most as many as :data:`MAX_LENGTH` characters hold; of more text none."""
    if len(text) > MAX_LENGTH:
        return []
    text = _plain(text)
    found: list[_Token] = []
    place, spaces = 0, 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        assert match is not None
        kind, piece, value = match.lastgroup or "", match[0], None
        place = match.end()
        if match["power"] is not None:
            kind, value = "power", _power_of_ten(match["exponent"])
        elif kind == "fraction":
            value, place = _fraction(text, place, depth)
        elif kind == "other":
            kind = _kind_of(piece)
        if kind == "space":
            spaces += 1
            continue
        found.append(_Token(kind, piece, spaces, value))
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
    """A LaTeX argument: a group in braces, or one character. Its text and its end; None where there is none."""
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


def _fraction(text: str, start: int, depth: int) -> tuple[Fraction | None, int]:
    upper = latex_argument(text, start)
    lower = upper and latex_argument(text, upper[1])
    if upper is None or lower is None:
        return None, len(text)
    if depth >= 4:
        return None, lower[1]
    above, below = (_read(_tokens(part[0], depth + 1), True, True) for part in (upper, lower))
    return (above / below if above is not None and below else None), lower[1]


# --- numbers ------------------------------------------------------------------------------------------------------


def _power_of_ten(exponent: str) -> Fraction | None:
    digits = exponent.lstrip("+-").lstrip("0") or "0"
    if len(digits) > 4 or int(digits) > MAX_DIGITS:
        return None
    return Fraction(10) ** int(exponent)


def _grouped(groups: Sequence[str], indian: bool) -> bool:
    """Whether digits are grouped as thousands are, or as lakhs and crores: 1,234,567 and 12,34,567."""
    first, *rest = groups
    if not rest or first.startswith("0") or len(rest[-1]) != 3:
        return False
    if len(first) <= 3 and all(len(group) == 3 for group in rest):
        return True
    return indian and len(first) <= 2 and all(len(group) == 2 for group in rest[:-1])


def _decimal(text: str, comma: bool) -> Fraction | None:
    """Digits with separators: "1,234.5", "1.234,5", "1'234", "0.5".

    Args:
        comma: a single comma before one, two or more than three digits is a decimal comma; a single point before three
            may be either mark, so that there is no value.
    """
    digits, _, exponent = text.replace("E", "e").partition("e")
    scale = _power_of_ten(exponent) if exponent else Fraction(1)
    if scale is None or sum(map(str.isdigit, digits)) > MAX_DIGITS:
        return None
    groups, separators = re.split(r"[.,'_]", digits), re.findall(r"[.,'_]", digits)
    whole, part = groups, ""
    if separators and separators[-1] in ".," and separators.count(separators[-1]) == 1:
        *whole, part = groups
        if len(separators) == 1 and separators[0] == ",":
            if _grouped(groups, indian=False):
                whole, part = groups, ""
            elif not comma and groups[0] != "0":
                return None
        if comma and separators == ["."] and _grouped(groups, indian=False):
            return None
    others = set(separators[: len(whole) - 1])
    if len(others) > 1 or (others and not _grouped(whole, indian=others == {","})):
        return None
    joined = "".join(whole)
    return Fraction(int(joined + part or "0"), 10 ** len(part)) * scale


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_FUNCTIONS = _set("""
    sqrt log ln sin cos tan exp abs mod base root step question problem part case page chapter section not
    """)
_LEADS = _set("""
    the final answer result total is are was equals equal to about approximately approx around roughly nearly almost
    exactly only just a an therefore so thus hence value sum he she it they there minus negative positive of
    """)
_CHANGES = _set("half twice thrice double triple square cube root not than")
"""Before a number they make it another one, with "of" and articles between or without: half of 18, more than 18."""
_SHARES = _set("half third thirds quarter quarters fourth fourths fifth fifths eighth tenth percent out")
"""Before "of" they take a part of the number."""
_WHOLES = _set("""
    h hr hrs hour hours m min mins minute minutes week weeks year years day days ft foot feet km kg lb lbs pound pounds
    dollar dollars
    """)
_PARTS = _set("""
    m min mins minutes s sec secs seconds in inch inches cm g grams oz ounces cents pence hours days months
    """)
"""Units of a quantity with two numbers: 5 hours and 30 minutes."""
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "lakh": 10**5,
    "crore": 10**7, **dict.fromkeys("百백", 10**2), **dict.fromkeys("千천", 10**3), **dict.fromkeys("万萬만", 10**4),
    **dict.fromkeys("亿億억", 10**8),
}  # fmt: skip
_AMBIGUOUS = _set("""
    k K M B bn mn mln mio dozen dozens score gross half halves third thirds quarter quarters fourth fourths fifth
    fifths sixth sixths eighth eighths tenth tenths hundredth hundredths thousandth thousandths squared cubed point
    choose factorial hundreds thousands millions billions
    """)
_ARITHMETIC = {"times", "multiplied", "plus", "minus", "divided", "over", "x", "X", "than", "to", "or", "modulo", "by"}
_CLAUSES = _set("""
    in of per for at out with on from by after before every each a an because since as which that is are was were left
    if when while where during under into within among altogether so but the would will
    """)
_LETTERS = set("bcdefghijklmnopqrstuvwxyzBCDEFGHIJKLMNOPQRSTUVWXYZ")
_UNIT_LETTERS = set("mgshlLtVAWJNCF")
_FRACTION_WORDS = {"half", "third", "quarter", "fourth", "fifth", "eighth", "tenth", "some", "change"}
_AMOUNTS = ("number", "fraction", "power")


def number_in(text: str, *, latex: bool = False, bare: bool = False) -> Fraction | None:
    r"""The one number that an answer's text is; None where it is none, or ambiguous.

    Args:
        latex: parentheses group, and a letter at a number is a variable.
        bare: words beside the number, units included, make it no number: ``3m`` may be algebra; nor is there a
            decimal comma, which may separate a list.

    Example: r"\$1{,}234.50" -> 2469/2.
    """
    return _read(_tokens(text), latex, bare)


def _read(tokens: list[_Token], latex: bool, bare: bool) -> Fraction | None:
    side = _last_side(_without_remarks(tokens, bare))
    if side is None:
        return None
    inner = _inside(side)
    if inner is not side:
        if not latex and inner[:1] and inner[0].kind != "sign":
            return None
        side = inner
    return _Side(side, latex, bare).number()


def _without_remarks(tokens: list[_Token], bare: bool) -> list[_Token]:
    """Without parentheses that hold words or an equation; bare texts have none to lose."""
    if bare:
        return tokens
    kept: list[_Token] = []
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


def _last_side(tokens: list[_Token]) -> list[_Token] | None:
    """What stands after the last sign of equality; None for a list of equations."""
    places = [place for place, token in enumerate(tokens) if token.kind == "equals"]
    if not places:
        return tokens
    between = tokens[places[0] : places[-1]]
    if any(token.kind in ("comma", "stop") or token.text.lower() in ("and", "or") for token in between):
        return None
    if any(token.kind == "bad" for token in tokens):
        return None
    return tokens[places[-1] + 1 :]


def _inside(tokens: list[_Token]) -> list[_Token]:
    """Without parentheses around all of it."""
    core = [token for token in tokens if token.kind not in ("currency", "stop")]
    kinds = [token.kind for token in core]
    if kinds[:1] == ["open"] and kinds[-1] == "close" and kinds.count("open") == kinds.count("close") == 1:
        return core[1:-1]
    return tokens


def begins_with_number(text: str) -> bool:
    """Whether a number comes first, but for words such as \"about\"."""
    return _begins_with_number(_tokens(text))


def _begins_with_number(tokens: Sequence[_Token]) -> bool:
    for token in tokens:
        if token.kind in (*_AMOUNTS, "sign", "command"):
            return True
        if token.kind not in ("currency", "mark", "open", "colon", "equals") and token.text.lower() not in _LEADS:
            return False
    return False


def is_heading(line: str) -> bool:
    """Of a line with text below it: words, or the number of a step with words after it."""
    tokens = _tokens(line)
    kinds = [token.kind for token in tokens[:4]]
    if kinds[:2] == ["word", "equals"]:
        return False
    if kinds[:2] in (["number", "stop"], ["number", "close"], ["number", "colon"]) and kinds[2:3] == ["word"]:
        return True
    return bool(tokens) and not _begins_with_number(tokens)


@dataclass(frozen=True)
class _Side:
    """Tokens without a sign of equality, as one number with what may stand around it."""

    tokens: list[_Token]
    latex: bool
    bare: bool

    def number(self) -> Fraction | None:
        start = next((place for place, token in enumerate(self.tokens) if token.kind in _AMOUNTS), None)
        if start is None:
            return None
        sign = self._lead(start)
        value, end = self._amount(start)
        scale = self._tail(end, value) if value is not None and sign else None
        if value is None or scale is None:
            return None
        found = sign * value * scale
        limit = 4 * MAX_DIGITS
        return found if max(abs(found.numerator), found.denominator).bit_length() < 3 * limit else None

    def kind(self, place: int) -> str:
        return self.tokens[place].kind if 0 <= place < len(self.tokens) else ""

    def word(self, place: int) -> str:
        return self.tokens[place].text.lower() if self.kind(place) == "word" else ""

    # --- before it ------------------------------------------------------------------------------------------------

    def _lead(self, start: int) -> int:
        """1 or -1; 0 where what stands before the number forbids to read it."""
        place, sign = start - 1, 1
        while self.kind(place) == "currency":
            place -= 1
        if self.kind(place) == "sign":
            sign = -1 if self.tokens[place].text == "-" else 1
            attached = self.tokens[place + 1].spaces == 0
            before = self.kind(place - 1)
            if before in ("sign", "operator", "close", "bad") or (
                before == "word" and (not attached or self.tokens[place].spaces == 0)
            ):
                return 0
            place -= 1
        elif self.word(place) in ("minus", "negative"):
            sign, place = -1, place - 1
        elif self.kind(place) == "word" and self.kind(start) == "number":
            if self.tokens[place].text in _LETTERS:
                return 0
        elif self.kind(place) == "comma" and place == 0 and self.tokens[start].spaces == 0:
            return 0
        if self._changed(place):
            return 0
        strangers = 0
        for token in self.tokens[: place + 1]:
            if token.kind == "word":
                if self.bare or token.text.lower() in _FUNCTIONS or _is_symbol(token.text):
                    return 0
                strangers += token.text.lower() not in _LEADS
            elif token.kind not in ("currency", "mark", "colon", "comma", "stop"):
                return 0
        others = sum(token.kind in _AMOUNTS for token in self.tokens[self._amount(start)[1] :])
        return 0 if strangers and others else sign

    def _changed(self, place: int) -> bool:
        """Whether a word that makes another number of the one behind it stands here, or before "of" and articles."""
        share = False
        while self.word(place) in ("of", "the", "a") or self.kind(place) == "currency":
            share, place = share or self.word(place) == "of", place - 1
        if share and (self.kind(place) in (*_AMOUNTS, "unit") or self.word(place) in _SHARES):
            return True
        if self.word(place) == "and" and self.word(place - 1) in _SCALES:  # one hundred and 5
            place -= 1
        word = self.word(place)
        return word in _CHANGES or word in _SCALES or word[-1:] in _SCALES

    # --- itself ---------------------------------------------------------------------------------------------------

    def _amount(self, place: int) -> tuple[Fraction | None, int]:
        """The unsigned number that begins here, and the place after it."""
        token = self.tokens[place]
        if token.kind != "number":
            return token.value, place + 1
        text, end, grouped = token.text, place + 1, False
        while self._is_group(end, text):
            text, end, grouped = f"{text}_{self.tokens[end].text}", end + 1, True
        if self.bare and "," in text and not re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
            return None, end  # a list
        value = _decimal(text, comma=self._costs(place))
        if value is None:
            return None, end
        if self.kind(end) == "operator" and self.tokens[end].text == "/" and self.kind(end + 1) == "number":
            below = _decimal(self.tokens[end + 1].text, comma=False)
            return (value / below if below and not grouped else None), end + 2
        if self.kind(end) == "operator" and self.tokens[end].text == "*" and self.kind(end + 1) == "power":
            scale = self.tokens[end + 1].value
            return (None if scale is None else value * scale), end + 2
        if text.isdigit():
            return self._mixed(value, end)
        return value, end

    def _is_group(self, place: int, text: str) -> bool:
        """Whether a next group of three digits follows after one space."""
        if self.kind(place) != "number" or self.tokens[place].spaces != 1 or re.search(r"[.,'eE]", text):
            return False
        first = text.partition("_")[0]
        return bool(len(first) <= 3 and first[0] != "0" and re.fullmatch(r"\d{3}(?:[.,]\d+)?", self.tokens[place].text)
                    and all(len(group) == 3 for group in text.split("_")[1:]))  # fmt: skip

    def _mixed(self, whole: Fraction, end: int) -> tuple[Fraction | None, int]:
        """3 1/2 and 3 and 1/2, with a proper fraction."""
        place = end + (self.word(end) == "and")
        part, after = None, place
        if self.kind(place) == "fraction":
            part, after = self.tokens[place].value, place + 1
        elif (
            self.kind(place) == self.kind(place + 2) == "number"
            and self.tokens[place].spaces
            and self.tokens[place + 1].text == "/"
            and self.tokens[place].text.isdigit()
            and self.tokens[place + 2].text.isdigit()
            and len(self.tokens[place].text) + len(self.tokens[place + 2].text) <= MAX_DIGITS
        ):
            upper, lower = int(self.tokens[place].text), int(self.tokens[place + 2].text)
            part, after = Fraction(upper, lower) if lower else None, place + 3
        if self.word(end) == "and" and self.word(end + 1) in ("a", "one") and self.word(end + 2) == "half":
            part, after = Fraction(1, 2), end + 3
        if after == place:
            return whole, end
        return (whole + part if part is not None and 0 < part < 1 else None), after

    def _costs(self, place: int) -> bool:
        """Whether a currency other than the dollar, whose sign LaTeX uses too, stands at the number."""
        near = [token for token in (self.tokens[place - 1 : place] + self.tokens[place + 1 : place + 2])]
        return any(
            (token.kind == "currency" and token.text != "$") or token.text.lower() in ("eur", "euro", "euros", "chf")
            for token in near
        )

    # --- after it -------------------------------------------------------------------------------------------------

    def _tail(self, place: int, value: Fraction) -> int | None:
        """What the words behind the number multiply it by; None where what follows makes it another number."""
        start = place
        scale, place = self._scale(place)
        percent = any(token.text == "%" for token in self.tokens[start:place])
        if scale > MAX_SCALE or (self.bare and scale > 1):
            return None
        kind, text = self.kind(place), self.tokens[place].text if place < len(self.tokens) else ""
        if not kind:
            return scale
        if self.bare:
            return scale if kind == "stop" and place == len(self.tokens) - 1 else None
        if kind == "sign":  # 72-year-old; 72 - all of them
            joined = self.tokens[place].spaces == 0
            hyphen = self.word(place + 1) and joined == (self.tokens[place + 1].spaces == 0)
            return scale if text == "-" and hyphen and not self._amounts_after(place) else None
        if kind == "operator":
            return scale if text == "/" and self._unit(place + 1) else None
        if kind in ("factorial", "bad", "command", "open", "close", "equals", *_AMOUNTS):
            return None
        if kind == "dots":
            return scale if value.denominator == 1 and place == len(self.tokens) - 1 else None
        if kind == "colon":
            return scale if self.kind(place + 1) == "word" and self.tokens[place + 1].spaces else None
        if kind in ("comma", "stop"):
            attached = place + 1 < len(self.tokens) and self.tokens[place + 1].spaces == 0
            cut = kind == "stop" and attached and self.kind(place + 1) in ("command", "open")  # 0.\overline{3}, 0.(3)
            return None if cut or self._listed(place + 1) else scale
        return scale if self._words(place, value, percent) else None

    def _scale(self, place: int) -> tuple[int, int]:
        """The product of "hundred", "million", "万" and the like, and the place after them, currencies and units."""
        scale = 1
        while self.kind(place) in ("currency", "unit", "mark") or self.word(place) in _SCALES:
            scale, place = scale * _SCALES.get(self.word(place), 1), place + 1
        return scale, place

    def _belongs_to_another(self, place: int, stop: int) -> bool:
        """Whether the number from behind this place up to ``stop`` is an operand, an end of a range, or a second part.

        Example: 5 times 18, 5 to 18, 3:30, 5 ft 3 inches.
        """
        word, numbered = self.word(place), self.kind(place - 1) in _AMOUNTS
        if self.kind(place) == "colon":
            return numbered and self.tokens[place].spaces == self.tokens[place + 1].spaces
        if word in ("times", "plus") or (word == "by" and self.word(place - 1) in _ARITHMETIC):
            return True
        if word in ("and", "to") and numbered:
            return True
        if word == "and" or self.kind(place) == "comma":
            place -= 1
        return self.word(place) in _WHOLES and self.kind(place - 1) in _AMOUNTS and self.word(stop) in _PARTS

    def _unit(self, place: int) -> bool:
        """km/h, /hour, but not /x."""
        return self.kind(place) == "word" and (len(self.tokens[place].text) > 1 or self.tokens[place].text in "hsdL")

    def _amounts_after(self, place: int) -> bool:
        return any(token.kind in _AMOUNTS for token in self.tokens[place:])

    def _listed(self, place: int) -> bool:
        """Whether a second number, or a word for one, comes next."""
        while self.kind(place) in ("currency", "sign", "mark") or self.word(place) in ("and", "or", "to"):
            place += 1
        second = self.word(place) in ("a", "one", "three", "some") and self.word(place + 1) in _FRACTION_WORDS
        return second or self.kind(place) in _AMOUNTS or self.word(place) in _FRACTION_WORDS

    def _words(self, place: int, value: Fraction, percent: bool) -> bool:
        """Whether the words behind the number leave it as it is."""
        token = self.tokens[place]
        if token.spaces == 0 and _GLUED.match(token.text):
            return False
        if len(token.text) == 1 and token.text.isascii() and token.text != "a":
            variable = self.latex and token.spaces == 0
            if variable or token.text not in _UNIT_LETTERS:
                return False
        first = place
        while place < len(self.tokens):
            kind, word = self.kind(place), self.word(place)
            if kind == "word":
                if self.tokens[place].text in _AMBIGUOUS or word in _AMBIGUOUS or _is_symbol(self.tokens[place].text):
                    return False
                if word in _ARITHMETIC and self._amounts_after(place):
                    return False
                if word == "and":
                    return not self._listed(place)
                if word in _CLAUSES:
                    partial = word == "of" and place == first and (percent or value.denominator > 1)
                    comparison = any(self.word(after) == "than" for after in range(place, len(self.tokens)))
                    return not ((partial or comparison) and self._amounts_after(place))
            elif kind in ("comma", "stop"):
                return not self._listed(place + 1)
            elif (kind in _AMOUNTS and not self._is_unit_exponent(place)) or kind in ("bad", "command", "equals"):
                return False
            place += 1
        return True

    def _is_unit_exponent(self, place: int) -> bool:
        """m^2, m^(2)."""
        before = place - 1 - (self.kind(place - 1) == "open")
        return self.kind(before) == "operator" and self.tokens[before].text == "^" and self.kind(before - 1) == "word"


_GLUED = re.compile(r"[eEbBoO]\d|[A-Za-z]+\d+[A-Za-z]")
"""Right behind a number: a second one, as in 5h30m, but no unit, as in 5m2."""


def _is_symbol(word: str) -> bool:
    """A Greek letter that is no unit's."""
    return len(word) == 1 and "\u0370" <= word <= "\u03ff" and word not in "μΩ"


# --- the last number of a text ------------------------------------------------------------------------------------

_WINDOW = 1200


def last_digit(part: str) -> int | None:
    """Its place in a text."""
    return next(
        (place for place in range(len(part) - 1, -1, -1) if part[place].isdecimal() or part[place] in _VULGAR), None
    )


_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"


def number_at(part: str, end: int) -> Fraction | None:
    """The number that the digit at ``end`` belongs to; None where it is an operand or cannot be read."""
    start = max(part.rfind("\n", 0, end) + 1, end - _WINDOW)
    if start == end - _WINDOW:  # not amid a number
        start = part.find(" ", start, end) + 1
        if not start:
            return None
    after = part.find("\n", end)
    tokens = _tokens(part[start : min(after if after >= 0 else len(part), end + 200)])
    side = _Side(tokens, latex=False, bare=False)
    place, last = 0, None
    while place < len(tokens):
        if tokens[place].kind in _AMOUNTS and not side._is_unit_exponent(place):
            value, stop = side._amount(place)
            last = (place, value, stop)
            place = stop
        else:
            place += 1
    if last is None:
        return None
    place, value, stop = last
    before = place - 1
    while side.kind(before) == "currency":
        before -= 1
    if side._changed(before) or side._belongs_to_another(before, stop):
        return None
    sign = -1 if side.word(before) in ("minus", "negative") and side.kind(before - 1) != "number" else 1
    if side.kind(before) in ("sign", "operator", "bad"):
        joined = side.tokens[before + 1].spaces == 0
        if side.kind(before - 1) in (*_AMOUNTS, "close") or side.kind(before) != "sign":
            return None
        if (joined and side.kind(before - 1) != "word") or (joined and side.tokens[before].spaces):
            sign = -1 if side.tokens[before].text == "-" else 1
    if stop < len(tokens) and tokens[stop].spaces == 0 and _GLUED.match(tokens[stop].text):
        return None
    if side.kind(stop) in ("operator", "bad") and not side._unit(stop + 1):
        return None
    if side.kind(stop) == "dots" and value is not None and value.denominator > 1:  # 8.333...
        return None
    if value is None or side.word(stop) in _AMBIGUOUS or (stop < len(tokens) and tokens[stop].text in _AMBIGUOUS):
        return None
    scale, _ = side._scale(stop)
    return sign * value * scale if scale <= MAX_SCALE else None
