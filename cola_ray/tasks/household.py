"""A household, as text: a small stand-in for ALFWorld (Shridhar et al. 2021, arXiv 2010.03768) without a download.

    seed ──> house (household_rooms.py): receptacles, things, a task
               │
               v                     household_rules.py
    "You are in the middle of a room ... Your task is to: put a clean mug in cabinet."
    > go to R    > open R    > take O from R    > clean O with R    > move O to R    > use O    > inventory    ...
               │
               v
    the task is fulfilled: reward 1, and the end          Player (household_player.py) ──> demonstrations

Commands, answers and the six tasks are ALFWorld's: Pick & Place, Examine in Light, Clean & Place, Heat & Place, Cool &
Place, Pick Two & Place. An impossible command is answered with "Nothing happens." and costs a turn. Unlike ALFWorld's,
rooms are generated (kitchens and bedrooms with few kinds of things), and nothing is sliced. The task is only in the
first observation, since the caller keeps the transcript.

    from cola_ray.tasks.household import Household      # in a program of your own; loads neither torch nor vLLM

    household = Household()
    opening, info = household.reset(seed=7)
    observation, reward, terminated, truncated, info = household.step("go to cabinet 1")
"""

import random
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field

from cola_ray.settings.limits import MOST, Share
from cola_ray.tasks.environment import HELD_OUT, Dialogue, Transition
from cola_ray.tasks.household_player import LONGEST, Player
from cola_ray.tasks.household_rooms import FEWEST_OBJECTS, FEWEST_RECEPTACLES, House, State, house
from cola_ray.tasks.household_rules import NOTHING, Scene


class Household:
    """One task per episode.

    Args:
        num_receptacles: number of receptacles in a room.
        num_objects: number of objects in a room, not counting a bedroom's desklamp.
        max_turns: turns after which an episode is truncated; 50 in ALFWorld.
        skill: share of the demonstrations' decisions that are well made, see :meth:`demonstrations`.
    """

    def __init__(
        self,
        num_receptacles: Annotated[int, Field(strict=True, ge=FEWEST_RECEPTACLES, le=60)] = 6,
        num_objects: Annotated[int, Field(strict=True, ge=FEWEST_OBJECTS, le=50)] = 6,
        max_turns: Annotated[int, Field(strict=True, ge=LONGEST, le=MOST)] = 20,
        skill: Share = 0.4,
    ) -> None:
        self.num_receptacles, self.num_objects = num_receptacles, num_objects
        self.max_turns, self.skill = max_turns, skill
        self.reset(seed=0)

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        found = self._house(seed)
        self.scene = Scene(found, found.begin(seed))
        instruction = self.scene.house.goal.instruction
        return f"{self.scene.overview()}Your task is to: {instruction}.\n", self._info() | {"instruction": instruction}

    def step(self, utterance: str) -> Transition:
        state, over = self.scene.state, self.scene.state.over
        state.turn += 1
        observation = NOTHING if over else self.scene.do(utterance)
        state.over = over or self.scene.house.goal.met(state)
        reward = float(state.over and not over)
        return observation, reward, state.over, state.turn >= self.max_turns and not state.over, self._info()

    def get_state(self) -> dict[str, Any]:
        return asdict(self.scene.state)

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.scene = Scene(self._house(state["seed"]), State(**state))

    def demonstrations(self, count: int, seed: int) -> list[Dialogue]:
        """Return episodes of a player who makes a share ``skill`` of decisions well, and the others at random.

        A decision is a command. A good one is the next command of :class:`~cola_ray.tasks.household_player.Player`, who
        knows what was seen so far; a random one is any that has an effect. With the defaults six tasks in ten are
        fulfilled; with a skill of 1 all are.
        """
        draw = random.Random(seed)
        return [self._demonstration(draw) for _ in range(count)]

    def _demonstration(self, draw: random.Random) -> Dialogue:
        opening, _ = self.reset(seed=draw.randrange(HELD_OUT))
        player, turns = Player(self.scene), list[tuple[str, str]]()
        while True:
            well = player.command()
            command = well if draw.random() < self.skill else draw.choice(self.scene.admissible())
            observation, _, terminated, truncated, _ = self.step(command)
            turns.append((command, observation))
            if terminated or truncated:
                return Dialogue(opening, tuple(turns))

    def _house(self, seed: int) -> House:
        return house(seed, self.num_receptacles, self.num_objects)

    def _info(self) -> dict[str, Any]:
        """What ALFWorld returns with an observation; success also by task, as papers report it."""
        success = float(self.scene.state.over)
        return {
            "admissible_commands": self.scene.admissible(),
            "metrics": {"success": success, f"success_{self.scene.house.goal.task}": success},
        }
