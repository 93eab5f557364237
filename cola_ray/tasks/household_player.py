"""A player that can do every task of a household: it plans the next command from what has been seen so far.

    holds what is wanted? ── no ──> seen one? ── yes ──> go there, open, take ─┐
             │                        └ no ──> look into the next receptacle   │
             └ yes ──> treat it at its appliance ──> go to the target, open, move; or to the lamp, use it

Every command is planned anew from where things are now, so other commands may come in between. In a room with R
receptacles a task takes at most 2 R + 7 commands, and at most :data:`LONGEST` if everything was seen beforehand.
"""

from collections.abc import Iterable, Sequence

from cola_ray.tasks.household_rooms import LAMP, RECEPTACLES, kind_of
from cola_ray.tasks.household_rules import Scene

LONGEST = 11
"""Most commands of a task if the player knows where everything is: bringing two things, one after the other, each from
a closed receptacle into a third one."""


class Player:
    """Plays one episode.

    Args:
        scene: of the episode. Only contents of receptacles that were seen are used.
        seen: receptacles whose contents are known already.
    """

    def __init__(self, scene: Scene, seen: Iterable[str] = ()) -> None:
        self.scene, self.seen = scene, {*seen}

    def command(self) -> str:
        """The next command. Must be called at every turn, even if another command is given instead."""
        goal, state, places = self.scene.house.goal, self.scene.state, self.scene.house.receptacles
        if state.at and self.scene.accessible(state.at):
            self.seen.add(state.at)
        if not state.held:
            return self._fetch()
        if kind_of(state.held) != goal.thing:
            return self._put([place for place in places if _may_hold(place, kind_of(state.held))])
        if goal.task == "look":
            return self._light()
        treatment = goal.treatment
        if treatment and treatment.result not in state.done.get(state.held, ()):
            appliance = next(place for place in places if kind_of(place) == treatment.appliance)
            return self._at(appliance, f"{treatment.verb} {state.held} with {appliance}")
        target = self._target()
        return self._put([target] if target else [place for place in places if kind_of(place) == goal.target])

    def _fetch(self) -> str:
        """Take a thing of the wanted kind that is not yet where it should be."""
        thing, at, target = self.scene.house.goal.thing, self.scene.state.at, self._target()
        for place in sorted(self.seen - {target}, key=lambda place: (place != at, place)):
            for one in self.scene.inside(place):
                if kind_of(one) == thing:
                    return self._reach(place, f"take {one} from {place}")
        return self._search(thing)

    def _target(self) -> str:
        """The receptacle seen so far with most wanted things as they should be; "" if there is none."""
        placed = self.scene.house.goal.placed(self.scene.state)
        return max(sorted(self.seen & {*placed}), key=lambda place: placed[place], default="")

    def _light(self) -> str:
        lamp = f"{LAMP} 1"
        place = self.scene.state.where[lamp]
        return self._reach(place, f"use {lamp}") if place in self.seen else self._search(LAMP)

    def _search(self, kind: str) -> str:
        """Look into the next receptacle that may hold such a thing."""
        left = [place for place in self.scene.house.receptacles if place not in self.seen and _may_hold(place, kind)]
        place = self.scene.state.at if self.scene.state.at in left else left[0]
        return self._reach(place, f"examine {place}")

    def _put(self, places: Sequence[str]) -> str:
        """Put the held thing into one of these receptacles, preferably the current one."""
        place = self.scene.state.at if self.scene.state.at in places else places[0]
        return self._reach(place, f"move {self.scene.state.held} to {place}")

    def _reach(self, place: str, command: str) -> str:
        """A command that needs an open receptacle, or one that leads to it: go there, or open it."""
        return self._at(place, command if self.scene.accessible(place) else f"open {place}")

    def _at(self, place: str, command: str) -> str:
        return command if self.scene.state.at == place else f"go to {place}"


def _may_hold(place: str, kind: str) -> bool:
    return kind in RECEPTACLES[kind_of(place)].holds
