"""The possible commands in a household and their observations: ALFWorld's commands and answers.

    "put mug 1 in/on cabinet 1" ── today's form ──> "move mug 1 to cabinet 1"
                                                         │ one of what is possible now?
                  "Nothing happens." <────────────── no ─┴─ yes ──> changes the state ──> what is seen

One thing can be held at a time. Commands act at the current place, and the contents of a closed receptacle can neither
be seen nor reached. Appliances treat the held thing, whether they are open or not.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from cola_ray.tasks.household_rooms import LAMP, RECEPTACLES, TREATMENTS, House, State, Treatment, kind_of

NOTHING = "Nothing happens.\n"
_OLD_MOVE = re.compile(r"put (.+?) (?:in/on|in|on|into|onto) (.+)")


class Scene:
    """A house and its state, which commands change."""

    def __init__(self, house: House, state: State) -> None:
        self.house, self.state = house, state

    def do(self, command: str) -> str:
        """Execute a command; returns the observation."""
        said = _OLD_MOVE.sub(r"move \1 to \2", " ".join(command.lower().split()))
        action = dict(self._possible()).get(said)
        return action() if action else NOTHING

    def admissible(self) -> list[str]:
        """Commands that have an effect now."""
        return [command for command, _ in self._possible()]

    def accessible(self, place: str) -> bool:
        """Whether a receptacle is not closed."""
        return place in self.state.open or not RECEPTACLES[kind_of(place)].opens

    def inside(self, place: str) -> list[str]:
        return [one for one in self.house.where if self.state.where.get(one) == place]

    def overview(self) -> str:
        """The view from the middle of the room."""
        seen = _listed(self.house.receptacles)
        return f"You are in the middle of a room. Looking quickly around you, you see {seen}.\n"

    def _possible(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """All commands that are possible now, with functions that execute them."""
        state, at, held = self.state, self.state.at, self.state.held
        yield "look", self._look
        yield "inventory", self._inventory
        yield from ((f"go to {place}", partial(self._go, place)) for place in self.house.receptacles if place != at)
        if held:
            yield f"examine {held}", partial(self._examine, held)
        if not at:
            return
        yield f"examine {at}", partial(self._contents, at)
        for treatment in TREATMENTS:
            if kind_of(at) == treatment.appliance and kind_of(held) in treatment.things:
                yield f"{treatment.verb} {held} with {at}", partial(self._treat, treatment)
        if RECEPTACLES[kind_of(at)].opens:
            yield (f"close {at}", self._close) if at in state.open else (f"open {at}", self._open)
        if not self.accessible(at):
            return
        for one in self.inside(at):
            yield f"examine {one}", partial(self._examine, one)
            if kind_of(one) == LAMP:
                yield f"use {one}", partial(self._use, one)
            elif not held:
                yield f"take {one} from {at}", partial(self._take, one)
        if kind_of(held) in RECEPTACLES[kind_of(at)].holds:
            yield f"move {held} to {at}", self._move

    # --- commands -----------------------------------------------------------------------------------------------------

    def _look(self) -> str:
        at = self.state.at
        return f"You are facing the {at}. Next to it, you see nothing.\n" if at else self.overview()

    def _inventory(self) -> str:
        held = self.state.held
        return f"You are carrying: a {held}.\n" if held else "You are not carrying anything.\n"

    def _go(self, place: str) -> str:
        self.state.at = place
        return f"You arrive at {place}. {self._contents(place)}"

    def _open(self) -> str:
        self.state.open.append(self.state.at)
        return f"You open the {self.state.at}. {self._contents(self.state.at)}"

    def _close(self) -> str:
        self.state.open.remove(self.state.at)
        return f"You close the {self.state.at}.\n"

    def _take(self, one: str) -> str:
        self.state.held = one
        return f"You pick up the {one} from the {self.state.where.pop(one)}.\n"

    def _move(self) -> str:
        one, self.state.held = self.state.held, ""
        self.state.where[one] = self.state.at
        return f"You move the {one} to the {self.state.at}.\n"

    def _treat(self, treatment: Treatment) -> str:
        held = self.state.held
        kept = {*self.state.done.get(held, ())} - {treatment.undoes}
        self.state.done[held] = sorted(kept | {treatment.result})
        return f"You {treatment.verb} the {held} using the {self.state.at}.\n"

    def _use(self, lamp: str) -> str:
        self.state.lit = not self.state.lit
        return f"You turn {'on' if self.state.lit else 'off'} the {lamp}.\n"

    def _examine(self, one: str) -> str:
        if kind_of(one) == LAMP:
            return f"This {one} is {'on' if self.state.lit else 'off'}.\n"
        done = " and ".join(self.state.done.get(one, ()))
        return f"This is a {done} {one}.\n" if done else f"There's nothing special about {one}.\n"

    def _contents(self, place: str) -> str:
        if not self.accessible(place):
            return f"The {place} is closed.\n"
        seen = _listed(self.inside(place))
        if RECEPTACLES[kind_of(place)].opens:
            return f"The {place} is open. In it, you see {seen}.\n"
        return f"On the {place}, you see {seen}.\n"


def _listed(names: Sequence[str]) -> str:
    """ALFWorld's lists: "nothing", "a mug 1", "a mug 1, and a egg 1", "a mug 1, a egg 1, and a egg 2"."""
    named = [f"a {name}" for name in names]
    return ", ".join([*named[:-1], f"and {named[-1]}"]) if len(named) > 1 else "".join(named) or "nothing"
