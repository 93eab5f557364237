"""The start of a household's episode: a room, the things in it and a task, all determined by a seed.

house(seed, num_receptacles, num_objects) ─> House      the same one for the same numbers, in every process
      receptacles: "cabinet 1", "fridge 1", ...                    │
      where: {"mug 1": "cabinet 1", ...}                           v  what changes
      goal: Goal("clean", "mug", "cabinet") ── met(state) <── State: at, held, open, where, done, lit

Tasks and their wordings are those of ALFWorld (Shridhar et al. 2021, arXiv 2010.03768, table 7), and the kinds of
things and receptacles are some of ALFWorld's.
"""

import functools
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from cola_ray.tasks.environment import HELD_OUT
from cola_ray.tasks.protocol import split_of

LAMP = "desklamp"
_FOOD = ("apple", "bread", "egg", "potato")
_DISHES = ("bowl", "cup", "mug", "plate")
_CUTLERY = ("knife", "spoon")
_ON_DESKS = ("alarmclock", "book", "cd", "keychain", "laptop", "pen")


@dataclass(frozen=True)
class Receptacle:
    """A kind of receptacle: which kinds of things may be in or on it, and whether it opens and closes."""

    holds: frozenset[str]
    opens: bool = False


RECEPTACLES: Mapping[str, Receptacle] = {
    "bed": Receptacle(frozenset(("book", "laptop"))),
    "cabinet": Receptacle(frozenset(_DISHES), opens=True),
    "countertop": Receptacle(frozenset((*_FOOD, *_DISHES, *_CUTLERY))),
    "desk": Receptacle(frozenset((*_ON_DESKS, LAMP))),
    "diningtable": Receptacle(frozenset((*_FOOD, *_DISHES, *_CUTLERY))),
    "drawer": Receptacle(frozenset((*_CUTLERY, "book", "cd", "keychain", "pen")), opens=True),
    "dresser": Receptacle(frozenset((*_ON_DESKS, LAMP))),
    "fridge": Receptacle(frozenset((*_FOOD, *_DISHES)), opens=True),
    "garbagecan": Receptacle(frozenset((*_FOOD, "cd", "pen"))),
    "microwave": Receptacle(frozenset((*_FOOD, *_DISHES)), opens=True),
    "shelf": Receptacle(frozenset((*_DISHES, "alarmclock", "book", "cd", "keychain", "pen"))),
    "sidetable": Receptacle(frozenset((*_ON_DESKS, LAMP))),
    "sinkbasin": Receptacle(frozenset((*_DISHES, *_CUTLERY, "apple", "potato"))),
}


@dataclass(frozen=True)
class Treatment:
    """What an appliance does to a thing that the player holds at it."""

    verb: str
    appliance: str
    result: str
    things: frozenset[str]
    undoes: str = ""


TREATMENTS = (
    Treatment("clean", "sinkbasin", "clean", frozenset((*_DISHES, *_CUTLERY, "apple", "potato"))),
    Treatment("heat", "microwave", "hot", frozenset((*_FOOD, "cup", "mug", "plate")), undoes="cool"),
    Treatment("cool", "fridge", "cool", frozenset((*_FOOD, *_DISHES)), undoes="hot"),
)

WORDINGS: Mapping[str, tuple[str, str]] = {
    "pick": ("put a {thing} in {target}", "put some {thing} on {target}"),
    "look": ("look at {thing} under the {target}", "examine the {thing} with the {target}"),
    "clean": ("put a clean {thing} in {target}", "clean some {thing} and put it in {target}"),
    "heat": ("put a hot {thing} in {target}", "heat some {thing} and put it in {target}"),
    "cool": ("put a cool {thing} in {target}", "cool some {thing} and put it in {target}"),
    "pick_two": ("put two {thing} in {target}", "find two {thing} and put them in {target}"),
}
"""The wordings of ALFWorld's six tasks, by their names here; both wordings of a task mean the same."""


@dataclass(frozen=True)
class _Room:
    always: tuple[str, ...]
    further: tuple[str, ...]
    things: tuple[str, ...]
    tasks: tuple[str, ...]


_ROOMS = (
    _Room(("countertop", "fridge", "microwave", "sinkbasin"),
          ("cabinet", "diningtable", "drawer", "garbagecan", "shelf"),
          (*_FOOD, *_DISHES, *_CUTLERY), ("pick", "clean", "heat", "cool", "pick_two")),
    _Room(("bed", "desk"), ("drawer", "dresser", "garbagecan", "shelf", "sidetable"),
          _ON_DESKS, ("pick", "look", "pick_two")),
)  # fmt: skip
FEWEST_RECEPTACLES, FEWEST_OBJECTS = 5, 3
"""The smallest numbers: everything that a kitchen always has and one more; two things of a kind and another one."""


@dataclass
class State:
    """The complete state of an episode."""

    seed: int = 0
    turn: int = 0
    at: str = ""  # a receptacle; "": the middle of the room
    held: str = ""
    open: list[str] = field(default_factory=list)
    where: dict[str, str] = field(default_factory=dict)  # receptacles by object, except the held one
    done: dict[str, list[str]] = field(default_factory=dict)  # results of treatments, by object
    lit: bool = False  # the lamp
    over: bool = False


@dataclass(frozen=True)
class Goal:
    """A task, such as ``Goal("clean", "mug", "cabinet", 0)``: "put a clean mug in cabinet".

    Attributes:
        thing: the wanted kind of thing.
        target: the kind of receptacle that it should be in; for the task look, the lamp.
        wording: which of the task's wordings.
    """

    task: str
    thing: str
    target: str
    wording: int

    @property
    def instruction(self) -> str:
        return WORDINGS[self.task][self.wording].format(thing=self.thing, target=self.target)

    @property
    def treatment(self) -> Treatment | None:
        return _treatment(self.task)

    @property
    def count(self) -> int:
        """How many things the task needs."""
        return 2 if self.task == "pick_two" else 1

    def met(self, state: State) -> bool:
        if self.task == "look":
            return state.lit and kind_of(state.held) == self.thing and state.at == state.where[f"{LAMP} 1"]
        return max(self.placed(state).values(), default=0) >= self.count

    def placed(self, state: State) -> Counter[str]:
        """The number of things that are as they should be, by the receptacle of the right kind that they are in."""
        wanted = {self.treatment.result} if self.treatment else set()
        return Counter(
            place for one, place in state.where.items()
            if kind_of(one) == self.thing and kind_of(place) == self.target and wanted <= {*state.done.get(one, ())}
        )  # fmt: skip


@dataclass(frozen=True)
class House:
    receptacles: tuple[str, ...]
    where: Mapping[str, str]
    goal: Goal

    def begin(self, seed: int) -> State:
        return State(seed, where=dict(self.where))


def kind_of(name: str) -> str:
    """Return the kind of a numbered thing or receptacle: "mug" for "mug 2"."""
    return name.rpartition(" ")[0]


@functools.lru_cache(maxsize=256)
def house(seed: int, num_receptacles: int, num_objects: int) -> House:
    """The house of a seed; seeds from ``HELD_OUT`` on have tasks that no other seed has, in any wording.

    All tasks are equally frequent, and none is fulfilled at the beginning.
    """
    draw, split = random.Random(seed), "heldout" if seed >= HELD_OUT else "train"
    task = draw.choice([*WORDINGS])
    while True:
        found = _house(draw, task, num_receptacles, num_objects)
        goal = found.goal
        if split_of(f"{goal.task} {goal.thing} {goal.target}") == split and not goal.met(found.begin(seed)):
            return found


def _house(draw: random.Random, task: str, num_receptacles: int, num_objects: int) -> House:
    room = draw.choice([room for room in _ROOMS if task in room.tasks])
    kinds = [*room.always, *draw.choices(room.further, k=num_receptacles - len(room.always))]
    receptacles, goal = _numbered(kinds), _goal(draw, task, room, kinds)
    things = [goal.thing] * goal.count
    things += draw.choices(room.things, k=num_objects - len(things))
    lamps = [LAMP] if "look" in room.tasks else []
    where = {
        one: draw.choice([place for place in receptacles if kind_of(one) in RECEPTACLES[kind_of(place)].holds])
        for one in (*_numbered(things), *_numbered(lamps))
    }
    return House(receptacles, where, goal)


def _goal(draw: random.Random, task: str, room: _Room, kinds: list[str]) -> Goal:
    wording = draw.randrange(len(WORDINGS[task]))
    if task == "look":
        return Goal(task, draw.choice(room.things), LAMP, wording)
    treatment = _treatment(task)
    able = [thing for thing in room.things if treatment is None or thing in treatment.things]
    targets = sorted({*kinds} - ({treatment.appliance} if treatment else set()))
    pairs = [(thing, target) for thing in able for target in targets if thing in RECEPTACLES[target].holds]
    return Goal(task, *draw.choice(pairs), wording)


def _treatment(task: str) -> Treatment | None:
    """The treatment that a thing needs before it is placed, if the task asks for one."""
    return next((one for one in TREATMENTS if one.verb == task), None)


def _numbered(kinds: list[str]) -> tuple[str, ...]:
    """Numbered names, sorted: "egg 1", "mug 1" and "mug 2" for ["mug", "egg", "mug"]."""
    return tuple(f"{kind} {number + 1}" for kind in sorted({*kinds}) for number in range(kinds.count(kind)))
