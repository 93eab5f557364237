"""Twenty Questions and Guess My City: find a hidden thing by asking; answers come from tables, not from a service.

Rewards and limits are those of the ArCHer paper (Zhou et al. 2024, section 5): -1 for every question, 0 for the one
that names the hidden thing, twenty questions. Unlike in the paper's environments, a name of several words can win, and
running out of questions truncates an episode rather than terminating it.
"""

import functools
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Protocol

from pydantic import Field

from cola_ray.settings.limits import Share
from cola_ray.tasks.environment import Dialogue, Transition

MAX_TURNS = 20
INVALID = "Invalid Question."
REFUSAL = "I can't tell you the name of my city."


@dataclass(frozen=True)
class Thing:
    """An object or a city: its names, and what is true of it."""

    names: tuple[str, ...]
    attributes: Mapping[str, str]


class Oracle(Protocol):
    """Answers a question about the hidden thing."""

    def __call__(self, hidden: Thing, question: str) -> str: ...


class GuessingGame:
    """The rules that both games share.

    Args:
        things: one of these is hidden.
        oracle: answers questions.
        opening: the first observation.
        answered_yes: whether the answer to the winning question must also be "Yes.".
    """

    max_turns = MAX_TURNS

    def __init__(self, things: Sequence[Thing], oracle: Oracle, opening: str, answered_yes: bool) -> None:
        self.things, self.oracle, self.opening, self.answered_yes = things, oracle, opening, answered_yes
        self.hidden, self.turn = things[0], 0

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        self.hidden, self.turn = self.things[random.Random(seed).randrange(len(self.things))], 0
        return self.opening, {"hidden": self.hidden.names[0]}

    def step(self, utterance: str) -> Transition:
        question = " ".join(utterance.split())
        answer = self.oracle(self.hidden, question)
        self.turn += 1
        won = names(question, self.hidden) and (answer == "Yes." or not self.answered_yes)
        if not self.answered_yes and any(word_of(name, answer) for name in self.hidden.names):
            answer = REFUSAL  # in place of an oracle's answer that gives away the name
        out_of_turns = self.turn >= self.max_turns and not won
        return f"{answer}\n", 0.0 if won else -1.0, won, out_of_turns, {}

    def get_state(self) -> list[Any]:
        return [self.hidden.names[0], self.turn]

    def set_state(self, state: Sequence[Any]) -> None:
        name, self.turn = state
        self.hidden = next(thing for thing in self.things if thing.names[0] == name)


# --- Twenty Questions -----------------------------------------------------------------------------------------------


class TwentyQuestions(GuessingGame):
    """157 objects of 17 categories; answers are "Yes.", "No." or "Invalid Question.".

    Args:
        objects: how many of them to play with, spread over the categories; by default all.
        skill: share of the demonstrations' questions that are well chosen; 0.3 gives returns of about -17, as in the
            paper.
        oracle: answers questions; by default the table.
    """

    def __init__(
        self,
        objects: Annotated[int, Field(strict=True, ge=2, le=157)] = 157,
        skill: Share = 0.3,
        oracle: Oracle | None = None,
    ) -> None:
        table = objects_table()
        super().__init__(table[:: len(table) // objects][:objects], oracle or table_oracle, "Questions:\n", True)
        self.skill = skill

    def demonstrations(self, count: int, seed: int) -> list[Dialogue]:
        """Return games of a player who sometimes asks a question that halves the candidates, else any not asked yet."""
        draw = random.Random(seed)
        return [self._demonstration(draw) for _ in range(count)]

    def _demonstration(self, draw: random.Random) -> Dialogue:
        _, phrasing = phrases()
        opening, _ = self.reset(seed=draw.randrange(1 << 30))
        left, turns = list(self.things), []
        anything = [(phrase, attribute) for attribute, phrase in sorted(phrasing.items())]
        guesses = [(f"Is it {article(thing.names[0])}?", "") for thing in self.things]
        while True:
            if draw.random() < self.skill:
                utterance, attribute = self._good_question(left, phrasing, draw)
            else:
                utterance, attribute = draw.choice(anything if draw.random() < 0.5 else guesses)
            for questions in (anything, guesses):
                if (utterance, attribute) in questions:
                    questions.remove((utterance, attribute))
            answer, _, terminated, truncated, _ = self.step(utterance)
            turns.append((utterance, answer))
            if terminated or truncated:
                return Dialogue(opening, tuple(turns))
            is_yes = answer.strip() == "Yes."
            left = [thing for thing in left if self._fits(thing, utterance, attribute, is_yes)]

    def _good_question(self, left: list[Thing], phrasing: Mapping[str, str], draw: random.Random) -> tuple[str, str]:
        splits = {a: sum(a in thing.attributes for thing in left) for a in phrasing}
        useful = {a: abs(2 * n - len(left)) for a, n in splits.items() if 0 < n < len(left)}
        if len(left) <= 2 or not useful:
            return f"Is it {article(draw.choice(left or list(self.things)).names[0])}?", ""
        best = sorted(useful, key=lambda a: (useful[a], a))[:3]
        attribute = draw.choice(best)
        return phrasing[attribute], attribute

    def _fits(self, thing: Thing, utterance: str, attribute: str, is_yes: bool) -> bool:
        return (attribute in thing.attributes if attribute else names(utterance, thing)) == is_yes


def table_oracle(hidden: Thing, question: str) -> str:
    """Answer from the table; a question must name an object or ask for an attribute, or it is invalid."""
    known, _ = phrases()
    words = _words(question)
    negated = not {"not", "isn't", "doesn't", "can't"}.isdisjoint(words)
    asked = _longest_phrase(words, known)
    named = _named(words)
    if named and (asked is None or not _ends_with(words, asked) or len(asked.split()) < 2):
        is_it = hidden.names[0] in named
    elif asked is not None:
        is_it = bool(known[asked] & hidden.attributes.keys())
    else:
        return INVALID
    return "Yes." if is_it != negated else "No."


# --- Guess My City --------------------------------------------------------------------------------------------------

FIELDS = ("country", "continent", "language", "climate", "water", "food", "sight", "capital")
CITY_QUESTIONS = {
    "country": ("What country is your city in?", "My city is in {}."),
    "continent": ("Which continent is your city on?", "My city is in {}."),
    "language": ("What language do people speak there?", "People there speak {}."),
    "climate": ("What is the weather like?", "The weather is {}."),
    "water": ("Is your city by the water?", "My city has {}."),
    "food": ("What food is your city known for?", "My city is known for {}."),
    "sight": ("What is your city famous for?", "Visitors come to see {}."),
    "capital": ("Is your city a capital?", "{}"),
}
CITY_WORDS = {  # the first field with a word in the question is answered
    "capital": ("capital",),
    "language": ("language", "speak", "spoken"),
    "food": ("food", "dish", "eat", "cuisine", "restaurant"),
    "climate": ("weather", "climate", "hot", "cold", "rain", "warm", "temperature"),
    "water": ("water", "sea", "ocean", "river", "coast", "lake", "beach"),
    "sight": ("famous", "known", "landmark", "sight", "visit", "attraction", "tourist", "monument", "popular"),
    "country": ("country", "nation", "state"),
    "continent": ("continent", "part of the world", "region", "located", "where"),
}


class GuessCity(GuessingGame):
    """91 cities; answers are sentences. A question that names the city wins, whatever its answer."""

    def __init__(self, skill: Share = 0.5, oracle: Oracle | None = None) -> None:
        super().__init__(cities_table(), oracle or city_oracle, "Where are you from?\n", False)
        self.skill = skill

    def demonstrations(self, count: int, seed: int) -> list[Dialogue]:
        """Return games of a player who asks at random; a share ``skill`` of guesses fits the answers so far."""
        draw = random.Random(seed)
        return [self._demonstration(draw) for _ in range(count)]

    def _demonstration(self, draw: random.Random) -> Dialogue:
        opening, _ = self.reset(seed=draw.randrange(1 << 30))
        left, turns = list(self.things), []
        while True:
            field = draw.choice(FIELDS)
            utterance = CITY_QUESTIONS[field][0]
            if draw.random() < 0.4:
                pool = left if draw.random() < self.skill else self.things
                field, utterance = "", f"Is it {draw.choice(pool).names[0]}?"
            hidden = self.hidden
            answer, _, terminated, truncated, _ = self.step(utterance)
            turns.append((utterance, answer))
            if terminated or truncated:
                return Dialogue(opening, tuple(turns))
            if field:
                left = [thing for thing in left if thing.attributes[field] == hidden.attributes[field]]
            else:
                left = [thing for thing in left if not names(utterance, thing)]


def city_oracle(hidden: Thing, question: str) -> str:
    """Answer from the table of cities, by the first field that the question asks for."""
    if _named(_words(question)):
        return "Yes." if names(question, hidden) else "No."
    for field, asked in CITY_WORDS.items():
        if any(word_of(word, question) for word in asked):
            return CITY_QUESTIONS[field][1].format(_as_answer(field, hidden.attributes[field]))
    return INVALID


def _as_answer(field: str, value: str) -> str:
    if field != "capital":
        return value
    return "Yes, it is a capital." if value == "capital" else "No, it is not a capital."


# --- an oracle behind an endpoint -----------------------------------------------------------------------------------


class ChatOracle:
    """Answers by an OpenAI-compatible endpoint; the key comes from OPENAI_API_KEY, the address from OPENAI_BASE_URL.

    Args:
        model: its name at the endpoint.
        instruction: the system message, with {name} for the hidden thing.
        fixed: the only answers allowed; any other answer becomes the last of them.
    """

    def __init__(self, model: str, instruction: str, fixed: Sequence[str] = ()) -> None:
        import openai

        if "OPENAI_BASE_URL" not in os.environ:
            raise ValueError("OPENAI_BASE_URL is not set: give the address of an OpenAI-compatible endpoint")
        self.client, self.model = openai.OpenAI(max_retries=5, timeout=30), model
        self.instruction, self.fixed = instruction, fixed

    def __call__(self, hidden: Thing, question: str) -> str:
        system = self.instruction.format(name=hidden.names[0])
        messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        reply = self.client.chat.completions.create(model=self.model, messages=messages, temperature=0, max_tokens=64)
        answer = " ".join((reply.choices[0].message.content or "").split())
        return nearest_answer(answer, self.fixed) if self.fixed else answer


def nearest_answer(answer: str, fixed: Sequence[str]) -> str:
    """Return the fixed answer whose words the answer begins with, or else the last fixed answer.

    Example: "**No**, it is not." -> "No."; "Not a question." -> "Invalid Question.".
    """
    given = _words(answer)
    return next((one for one in fixed if given[: len(_words(one))] == _words(one)), fixed[-1])


# --- tables and words -----------------------------------------------------------------------------------------------


@functools.cache
def objects_table() -> tuple[Thing, ...]:
    things, category, shared = [], "", set[str]()
    for line in _lines("objects.txt"):
        if line.startswith("["):
            category, _, rest = line[1:].partition("]")
            shared = {category, *rest.split()}
            continue
        title, _, rest = line.partition(":")
        own = rest.split()
        true = (shared | {a for a in own if a[0] != "-"}) - {a[1:] for a in own if a[0] == "-"}
        things.append(Thing(tuple(name.strip() for name in title.split(",")), dict.fromkeys(sorted(true), "yes")))
    return tuple(things)


@functools.cache
def cities_table() -> tuple[Thing, ...]:
    rows = ([cell.strip() for cell in line.split(";")] for line in _lines("cities.txt"))
    return tuple(Thing((name,), dict(zip(FIELDS, cells, strict=True))) for name, *cells in rows)


@functools.cache
def phrases() -> tuple[dict[str, set[str]], dict[str, str]]:
    """Return {phrase: attributes that it asks for} and {attribute: the plain question for it}."""
    known: dict[str, set[str]] = {}
    plain: dict[str, str] = {}
    for thing in objects_table():
        for attribute in thing.attributes:
            known.setdefault(" ".join(_words(attribute.replace("_", " "))), set()).add(attribute)
    for line in _lines("phrases.txt"):
        attribute, _, rest = line.partition(":")
        listed, _, question = rest.partition(";")
        for phrase in filter(None, (phrase.strip() for phrase in listed.split(","))):
            known.setdefault(" ".join(_words(phrase)), set()).add(attribute)
        if question.strip():
            plain[attribute] = question.strip()
    for attribute, question in plain.items():
        known[" ".join(_words(question))] = {attribute}
    return known, plain


def names(question: str, thing: Thing) -> bool:
    """Whether the question's last words are one of the thing's names, singular or plural."""
    return thing.names[0] in _named(_words(question))


def article(name: str) -> str:
    if name.endswith("s") or name in ("paper", "corn", "lego", "toothpaste", "broccoli", "spinach", "celery", "glue"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def word_of(phrase: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(phrase.lower())}\b", text.lower()) is not None


_SMALL_WORDS = {"a", "an", "the", "some"}


@functools.lru_cache(maxsize=4096)
def _words(text: str) -> tuple[str, ...]:
    """Split into words in lower case, without punctuation, articles and the plural s."""
    found = re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower().replace("-", " ").replace("\u2019", "'"))
    return tuple(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
        for word in found
        if word not in _SMALL_WORDS
    )


def _named(words: Sequence[str]) -> set[str]:
    """Return the first names of what the last words name. The longest name counts: a bedside table is no table."""
    endings = (" ".join(words[-length:]) for length in range(4, 0, -1))
    return next((_all_names()[ending] for ending in endings if ending in _all_names()), set())


@functools.cache
def _all_names() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for thing in (*objects_table(), *cities_table()):
        for name in thing.names:
            found.setdefault(" ".join(_words(name)), set()).add(thing.names[0])
    return found


def _longest_phrase(words: Sequence[str], known: Mapping[str, set[str]]) -> str | None:
    for length in range(min(len(words), 10), 0, -1):
        for start in range(len(words) - length + 1):
            phrase = " ".join(words[start : start + length])
            if phrase in known:
                return phrase
    return None


def _ends_with(words: Sequence[str], phrase: str) -> bool:
    wanted = phrase.split()
    return len(words) >= len(wanted) and list(words[len(words) - len(wanted) :]) == wanted


def _lines(name: str) -> list[str]:
    text = (files("cola_ray.tasks") / "games" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
