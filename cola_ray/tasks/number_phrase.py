"""A phrase with one number: its sign, the number itself, and how the words before and after change it.

lead (sign, words before)  ─>  amount (digits, mixed numbers, fractions, powers)  ─>  tail (scale, units, words after)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from cola_ray.tasks.number_tokens import MAX_DIGITS, Token, power_of_ten
from cola_ray.tasks.number_words import (
    AMBIGUOUS,
    ARITHMETIC,
    CHANGES,
    CLAUSES,
    FRACTION_WORDS,
    FUNCTIONS,
    LEADS,
    LETTERS,
    PARTS,
    SCALES,
    SHARES,
    UNIT_LETTERS,
    WHOLES,
)  # fmt: skip

MAX_SCALE = 10**30
"""The largest product of words such as "million" after a number."""
AMOUNTS = ("number", "fraction", "power")
"""Kinds of tokens that are numbers."""
GLUED = re.compile(r"[eEbBoO]\d|[A-Za-z]+\d+[A-Za-z]")
"""Directly after a number: a second number, as in 5h30m, but not a unit, as in 5m2."""


def _grouped(groups: Sequence[str], indian: bool) -> bool:
    """Whether digits are grouped by thousands (1,234,567) or, if ``indian``, by lakhs and crores (12,34,567)."""
    first, *rest = groups
    if not rest or first.startswith("0") or len(rest[-1]) != 3:
        return False
    if len(first) <= 3 and all(len(group) == 3 for group in rest):
        return True
    return indian and len(first) <= 2 and all(len(group) == 2 for group in rest[:-1])


def _decimal(text: str, comma: bool) -> Fraction | None:
    """Return the value of digits with separators, such as "1,234.5", "1.234,5", "1'234" or "0.5"; None if ambiguous.

    Args:
        text: digits with separators, and perhaps an exponent.
        comma: whether a single comma may be a decimal comma (unless exactly three digits follow); a single point
            before exactly three digits is ambiguous then.
    """
    digits, _, exponent = text.replace("E", "e").partition("e")
    scale = power_of_ten(exponent) if exponent else Fraction(1)
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


@dataclass(frozen=True)
class NumberPhrase:
    """Tokens without an equals sign that should contain one number.

    Args:
        tokens: of the phrase.
        latex: a letter directly after a number is a variable.
        bare: no words or units may stand beside the number, and a comma separates a list.
    """

    tokens: list[Token]
    latex: bool
    bare: bool

    def number(self) -> Fraction | None:
        """Return the phrase's number; None if there is none, or it is ambiguous."""
        start = next((place for place, token in enumerate(self.tokens) if token.kind in AMOUNTS), None)
        if start is None:
            return None
        sign = self._lead(start)
        value, end = self.amount(start)
        scale = self._tail(end, value) if value is not None and sign else None
        if value is None or scale is None:
            return None
        found = sign * value * scale
        limit = 4 * MAX_DIGITS
        return found if max(abs(found.numerator), found.denominator).bit_length() < 3 * limit else None

    def kind(self, place: int) -> str:
        """Return the kind of the token at a place; "" outside of the phrase."""
        return self.tokens[place].kind if 0 <= place < len(self.tokens) else ""

    def word(self, place: int) -> str:
        """Return the word at a place in lower case; "" if the token is not a word."""
        return self.tokens[place].text.lower() if self.kind(place) == "word" else ""

    # --- before the number -------------------------------------------------------------------------------------------

    def _lead(self, start: int) -> int:
        """Return the sign, 1 or -1; 0 if the words before the number change its value."""
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
            if self.tokens[place].text in LETTERS:
                return 0
        elif self.kind(place) == "comma" and place == 0 and self.tokens[start].spaces == 0:
            return 0
        if self.is_changed(place):
            return 0
        unknown_words = 0
        for token in self.tokens[: place + 1]:
            if token.kind == "word":
                if self.bare or token.text.lower() in FUNCTIONS or _is_symbol(token.text):
                    return 0
                unknown_words += token.text.lower() not in LEADS
            elif token.kind not in ("currency", "mark", "colon", "comma", "stop"):
                return 0
        others = sum(token.kind in AMOUNTS for token in self.tokens[self.amount(start)[1] :])
        return 0 if unknown_words and others else sign

    def is_changed(self, place: int) -> bool:
        """Whether a word at this place, or before "of" and articles, changes the value of the number after it."""
        share = False
        while self.word(place) in ("of", "the", "a") or self.kind(place) == "currency":
            share, place = share or self.word(place) == "of", place - 1
        if share and (self.kind(place) in (*AMOUNTS, "unit") or self.word(place) in SHARES):
            return True
        if self.word(place) == "and" and self.word(place - 1) in SCALES:  # one hundred and 5
            place -= 1
        word = self.word(place)
        return word in CHANGES or word in SCALES or word[-1:] in SCALES

    # --- the number ---------------------------------------------------------------------------------------------------

    def amount(self, place: int) -> tuple[Fraction | None, int]:
        """Return the unsigned number that begins at this place (None if ambiguous), and the place after it."""
        token = self.tokens[place]
        if token.kind != "number":
            return token.value, place + 1
        text, end, grouped = token.text, place + 1, False
        while self._is_group(end, text):
            text, end, grouped = f"{text}_{self.tokens[end].text}", end + 1, True
        if self.bare and "," in text and not re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
            return None, end  # a list
        value = _decimal(text, comma=self._has_currency(place))
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
        """Whether another group of three digits follows after one space."""
        if self.kind(place) != "number" or self.tokens[place].spaces != 1 or re.search(r"[.,'eE]", text):
            return False
        first = text.partition("_")[0]
        return bool(len(first) <= 3 and first[0] != "0" and re.fullmatch(r"\d{3}(?:[.,]\d+)?", self.tokens[place].text)
                    and all(len(group) == 3 for group in text.split("_")[1:]))  # fmt: skip

    def _mixed(self, whole: Fraction, end: int) -> tuple[Fraction | None, int]:
        """Read mixed numbers with a proper fraction: "3 1/2", "3 and 1/2", "3 and a half"."""
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

    def _has_currency(self, place: int) -> bool:
        """Whether a currency stands beside the number; the dollar does not count, since LaTeX uses its sign, too."""
        near = [token for token in (self.tokens[place - 1 : place] + self.tokens[place + 1 : place + 2])]
        return any(
            (token.kind == "currency" and token.text != "$") or token.text.lower() in ("eur", "euro", "euros", "chf")
            for token in near
        )

    # --- after the number --------------------------------------------------------------------------------------------

    def _tail(self, place: int, value: Fraction) -> int | None:
        """Return the factor that the words after the number multiply it by; None if they change it in another way."""
        start = place
        scale, place = self.scale_after(place)
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
            return scale if text == "-" and hyphen and not self._has_amounts_after(place) else None
        if kind == "operator":
            return scale if text == "/" and self.is_unit(place + 1) else None
        if kind in ("factorial", "bad", "command", "open", "close", "equals", *AMOUNTS):
            return None
        if kind == "dots":
            return scale if value.denominator == 1 and place == len(self.tokens) - 1 else None
        if kind == "colon":
            return scale if self.kind(place + 1) == "word" and self.tokens[place + 1].spaces else None
        if kind in ("comma", "stop"):
            attached = place + 1 < len(self.tokens) and self.tokens[place + 1].spaces == 0
            cut = kind == "stop" and attached and self.kind(place + 1) in ("command", "open")  # 0.\overline{3}, 0.(3)
            return None if cut or self._begins_another(place + 1) else scale
        return scale if self._words_keep(place, value, percent) else None

    def scale_after(self, place: int) -> tuple[int, int]:
        """Return the product of "hundred", "million", "万" and the like, and the place after them and any units."""
        scale = 1
        while self.kind(place) in ("currency", "unit", "mark") or self.word(place) in SCALES:
            scale, place = scale * SCALES.get(self.word(place), 1), place + 1
        return scale, place

    def belongs_to_another(self, place: int, stop: int) -> bool:
        """Whether the number between this place and ``stop`` is an operand, the end of a range, or a second part.

        Examples: 18 in "5 times 18" and "5 to 18", 30 in "3:30", 3 in "5 ft 3 inches".
        """
        word, numbered = self.word(place), self.kind(place - 1) in AMOUNTS
        if self.kind(place) == "colon":
            return numbered and self.tokens[place].spaces == self.tokens[place + 1].spaces
        if word in ("times", "plus") or (word == "by" and self.word(place - 1) in ARITHMETIC):
            return True
        if word in ("and", "to") and numbered:
            return True
        if word == "and" or self.kind(place) == "comma":
            place -= 1
        return self.word(place) in WHOLES and self.kind(place - 1) in AMOUNTS and self.word(stop) in PARTS

    def is_unit(self, place: int) -> bool:
        """Whether a unit follows a slash: km/h and /hour, but not /x."""
        return self.kind(place) == "word" and (len(self.tokens[place].text) > 1 or self.tokens[place].text in "hsdL")

    def _has_amounts_after(self, place: int) -> bool:
        return any(token.kind in AMOUNTS for token in self.tokens[place:])

    def _begins_another(self, place: int) -> bool:
        """Whether a second number, or a word for one, comes next."""
        while self.kind(place) in ("currency", "sign", "mark") or self.word(place) in ("and", "or", "to"):
            place += 1
        second = self.word(place) in ("a", "one", "three", "some") and self.word(place + 1) in FRACTION_WORDS
        return second or self.kind(place) in AMOUNTS or self.word(place) in FRACTION_WORDS

    def _words_keep(self, place: int, value: Fraction, percent: bool) -> bool:
        """Whether the words after the number leave it as it is."""
        token = self.tokens[place]
        if token.spaces == 0 and GLUED.match(token.text):
            return False
        if len(token.text) == 1 and token.text.isascii() and token.text != "a":
            variable = self.latex and token.spaces == 0
            if variable or token.text not in UNIT_LETTERS:
                return False
        first = place
        while place < len(self.tokens):
            kind, word = self.kind(place), self.word(place)
            if kind == "word":
                if self.tokens[place].text in AMBIGUOUS or word in AMBIGUOUS or _is_symbol(self.tokens[place].text):
                    return False
                if word in ARITHMETIC and self._has_amounts_after(place):
                    return False
                if word == "and":
                    return not self._begins_another(place)
                if word in CLAUSES:
                    partial = word == "of" and place == first and (percent or value.denominator > 1)
                    comparison = any(self.word(after) == "than" for after in range(place, len(self.tokens)))
                    return not ((partial or comparison) and self._has_amounts_after(place))
            elif kind in ("comma", "stop"):
                return not self._begins_another(place + 1)
            elif (kind in AMOUNTS and not self.is_unit_exponent(place)) or kind in ("bad", "command", "equals"):
                return False
            place += 1
        return True

    def is_unit_exponent(self, place: int) -> bool:
        """Whether the number here is the exponent of a unit: m^2, m^(2)."""
        before = place - 1 - (self.kind(place - 1) == "open")
        return self.kind(before) == "operator" and self.tokens[before].text == "^" and self.kind(before - 1) == "word"


def _is_symbol(word: str) -> bool:
    """Whether this is a Greek letter that does not stand for a unit."""
    return len(word) == 1 and "\u0370" <= word <= "\u03ff" and word not in "μΩ"
