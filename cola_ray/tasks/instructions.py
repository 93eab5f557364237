"""Short instructions, where a rule can check each response, like IFEval (Zhou et al. 2023, arXiv 2311.07911).

    kind           instruction                                                              fulfilled by
    ends_with      Write one short headline that ends with the word river.                  Ship Runs Aground in River
    first_letter   Name one animal that begins with the letter b. Answer with one word.     Bear
    at_most        Write one short headline with the word river, in at most 6 words.        River Floods the Old Town

Small instruction-tuned models follow such instructions sometimes but rarely always, so RL can learn from them; their
rates are in docs/benchmarks.md. A rule reads words, not meaning: any word with the right first letter passes as an
animal. But a response that only repeats a piece of the instruction is wrong.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence

from cola_ray.settings.config import TaskConfig
from cola_ray.tasks.chat import Prompt
from cola_ray.tasks.guessing import objects_table
from cola_ray.tasks.protocol import Problem, Split, split_of

FORMS = ("sentence", "headline", "slogan", "question", "proverb", "story title", "line of a poem", "warning", "promise",
         "excuse")  # fmt: skip
THINGS = (
    "animal", "bird", "body part", "city", "colour", "country", "dance", "dessert", "dish", "drink", "feeling", "fish",
    "flower", "fruit", "game", "garment", "gemstone", "hobby", "insect", "instrument", "job", "language", "metal",
    "mountain", "piece of furniture", "river", "school subject", "spice", "sport", "tool", "toy", "tree", "vegetable",
    "vehicle",
)  # fmt: skip
LETTERS = "abcdefghilmnoprstw"
LIMITS = (4, 5, 6, 7, 8)
"""Limits in at_most: the most words that a response may have."""
LONGEST = 20
"""The most words that a response to ends_with may have."""
_WORD = re.compile("[^\\W\\d_]+(?:['\u2019][^\\W\\d_]+)*")
Rule = tuple[str, Callable[[str], bool]]
"""An instruction, and a function that tells whether a response follows it."""


def words(text: str) -> list[str]:
    """A text's words in lower case, without accents, numbers or punctuation: "It's 5 o'clock!" -> it's, o'clock."""
    plain = "".join(one for one in unicodedata.normalize("NFKD", text) if not unicodedata.combining(one))
    return _WORD.findall(plain.lower())


def _rule(instruction: str, follows: Callable[[list[str]], bool]) -> Rule:
    """A rule for a response's words; they must not, as a whole, be a piece of the instruction."""

    def follows_in_its_own_words(response: str) -> bool:
        said = words(response)
        return follows(said) and f" {' '.join(said)} " not in f" {' '.join(words(instruction))} "

    return instruction, follows_in_its_own_words


def ends_with(form: str, word: str) -> Rule:
    """The response has three to :data:`LONGEST` words, at least three of them different, and ends with ``word``."""
    return _rule(
        f"Write one short {form} that ends with the word {word}.",
        lambda said: len({*said}) >= 3 and len(said) <= LONGEST and said[-1] == word,
    )


def first_letter(thing: str, letter: str) -> Rule:
    """The response is one word of at least three characters that begins with ``letter``."""
    return _rule(
        f"Name one {thing} that begins with the letter {letter}. Answer with one word.",
        lambda said: len(said) == 1 and len(said[0]) >= 3 and said[0][0] == letter,
    )


def at_most(form: str, word: str, limit: int) -> Rule:
    """The response has three to ``limit`` words, at least three of them different, one of them ``word``."""
    return _rule(
        f"Write one short {form} with the word {word}, in at most {limit} words.",
        lambda said: len({*said}) >= 3 and len(said) <= limit and word in said,
    )


def nouns() -> list[str]:
    """The objects of Twenty Questions whose name is one word."""
    return [thing.names[0] for thing in objects_table() if thing.names[0].isalpha()]


def _ends_with() -> Iterator[Rule]:
    yield from (ends_with(form, word) for form in FORMS for word in nouns())


def _first_letter() -> Iterator[Rule]:
    yield from (first_letter(thing, letter) for thing in THINGS for letter in LETTERS)


def _at_most() -> Iterator[Rule]:
    draw = random.Random(0)
    yield from (at_most(form, word, draw.choice(LIMITS)) for form in FORMS for word in nouns())


KINDS: Mapping[str, Callable[[], Iterator[Rule]]] = {
    "ends_with": _ends_with, "first_letter": _first_letter, "at_most": _at_most,
}  # fmt: skip
"""Every instruction of each kind."""


class Instructions:
    """Instructions of the kinds in :data:`KINDS`; the reward is 1 for a response that follows its instruction, else 0.

    There are no solutions, and so no demonstrations: pre-train on the base's own answers (answers.jsonl of `cola_ray
    evaluate --rl.action-space token --eval.split train --eval.ways sample`), or on text.

    Args:
        num_problems: the most instructions, both splits together.
        seed: for shuffling them.
        kinds: names of kinds, separated by spaces; by default all. Metrics are kept apart by kind.

    Raises:
        ValueError: an unknown kind, none at all, or an unknown option.
    """

    right_from = 1.0

    @classmethod
    def of(cls, config: TaskConfig, seed: int) -> "Instructions":
        if unknown := next((option for option in config.options if option != "kinds"), ""):
            raise ValueError(f"task.options.{unknown} = {config.options[unknown]!r}: instructions takes kinds")
        return cls(config.num_problems, seed, str(config.options.get("kinds", " ".join(KINDS))))

    def __init__(self, num_problems: int, seed: int, kinds: str = " ".join(KINDS)) -> None:
        chosen = list(dict.fromkeys(kinds.split()))
        if not chosen or not {*chosen} <= {*KINDS}:
            raise ValueError(f"task.options.kinds = {kinds!r}: one or more of {', '.join(KINDS)}, separated by spaces")
        rules = [(kind, *rule) for kind in chosen for rule in KINDS[kind]()]
        random.Random(seed).shuffle(rules)
        self._problems: dict[Split, list[Problem]] = {"train": [], "heldout": []}
        self._follows: dict[Split, list[Callable[[str], bool]]] = {"train": [], "heldout": []}
        for kind, question, follows in rules[:num_problems]:
            split = split_of(question)
            self._problems[split].append(Problem(len(self._problems[split]), question, "", source=kind))
            self._follows[split].append(follows)

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._problems[split]

    def demonstrations(self) -> Sequence[tuple[Prompt, str]]:
        return []

    def score(self, split: Split, index: int, response: str) -> float:
        return float(self._follows[split][index](response))
