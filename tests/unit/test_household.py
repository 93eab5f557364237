"""The household's commands: ALFWorld's, by transcripts, what each task takes, and what cannot be done."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
from runs import ROOT

from cola_ray.tasks.household import Household
from cola_ray.tasks.household_player import LONGEST
from cola_ray.tasks.household_rooms import FEWEST_OBJECTS, FEWEST_RECEPTACLES, Goal, House, State
from cola_ray.tasks.household_rules import NOTHING, Scene

KITCHEN = ("cabinet 1", "countertop 1", "fridge 1", "microwave 1", "shelf 1", "sinkbasin 1")
IN_KITCHEN = {"bread 1": "countertop 1", "egg 1": "fridge 1", "mug 1": "countertop 1", "mug 2": "cabinet 1"}
BEDROOM = ("bed 1", "desk 1", "drawer 1", "shelf 1")
IN_BEDROOM = {"book 1": "bed 1", "pen 1": "desk 1", "pen 2": "bed 1", "desklamp 1": "desk 1"}


def placed(goal, receptacles=KITCHEN, where=None, **options):
    """A household with a room of one's own."""
    household, where = Household(**options), IN_KITCHEN if where is None else where
    household.scene = Scene(House(receptacles, where, goal), State(where=dict(where)))
    return household


def plays(household, transcript):
    """Says what follows each "> ", and compares what comes; returns the rewards."""
    rewards = []
    for turn in re.split(r"^> ", transcript.lstrip("\n"), flags=re.MULTILINE)[1:]:
        said, _, seen = turn.partition("\n")
        observation, reward, *_ = household.step(said)
        assert observation == seen, said
        rewards.append(reward)
    return rewards


# --- commands -----------------------------------------------------------------------------------------------------


def test_a_mug_that_is_not_clean_is_not_enough():
    rewards = plays(placed(Goal("clean", "mug", "cabinet", 0)), """
> go to countertop 1
You arrive at countertop 1. On the countertop 1, you see a bread 1, and a mug 1.
> inventory
You are not carrying anything.
> take mug 1 from countertop 1
You pick up the mug 1 from the countertop 1.
> inventory
You are carrying: a mug 1.
> look
You are facing the countertop 1. Next to it, you see nothing.
> examine countertop 1
On the countertop 1, you see a bread 1.
> go to cabinet 1
You arrive at cabinet 1. The cabinet 1 is closed.
> move mug 1 to cabinet 1
Nothing happens.
> examine cabinet 1
The cabinet 1 is closed.
> open cabinet 1
You open the cabinet 1. The cabinet 1 is open. In it, you see a mug 2.
> move mug 1 to cabinet 1
You move the mug 1 to the cabinet 1.
> take mug 2 from cabinet 1
You pick up the mug 2 from the cabinet 1.
> close cabinet 1
You close the cabinet 1.
> go to sinkbasin 1
You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.
> examine mug 2
There's nothing special about mug 2.
> clean mug 2 with sinkbasin 1
You clean the mug 2 using the sinkbasin 1.
> examine mug 2
This is a clean mug 2.
> go to cabinet 1
You arrive at cabinet 1. The cabinet 1 is closed.
> open cabinet 1
You open the cabinet 1. The cabinet 1 is open. In it, you see a mug 1.
> put mug 2 in/on cabinet 1
You move the mug 2 to the cabinet 1.
""")  # fmt: skip
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]


def test_heat_and_cold_undo_each_other():
    for task, treated, again in (("heat", "cool", "heat"), ("cool", "heat", "cool")):
        household = placed(Goal(task, "mug", "shelf", 0))
        appliance = {"heat": "microwave 1", "cool": "fridge 1"}
        said = ["go to countertop 1", "take mug 1 from countertop 1"]
        for verb in (again, treated):
            said += [f"go to {appliance[verb]}", f"{verb} mug 1 with {appliance[verb]}"]
        said += ["go to shelf 1", "move mug 1 to shelf 1", "take mug 1 from shelf 1", f"go to {appliance[again]}",
                 f"{again} mug 1 with {appliance[again]}", "go to shelf 1", "move mug 1 to shelf 1"]  # fmt: skip
        steps = [household.step(one) for one in said]
        assert NOTHING not in [step[0] for step in steps]
        assert [step[1] for step in steps] == [0.0] * (len(said) - 1) + [1.0]
        assert household.step("look") == (NOTHING, 0.0, True, False, steps[-1][4] | {
            "admissible_commands": household.scene.admissible()
        })  # fmt: skip


def test_an_object_can_be_clean_and_hot():
    rewards = plays(placed(Goal("heat", "mug", "shelf", 0)), """
> go to countertop 1
You arrive at countertop 1. On the countertop 1, you see a bread 1, and a mug 1.
> take mug 1 from countertop 1
You pick up the mug 1 from the countertop 1.
> go to microwave 1
You arrive at microwave 1. The microwave 1 is closed.
> heat mug 1 with microwave 1
You heat the mug 1 using the microwave 1.
> go to sinkbasin 1
You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.
> clean mug 1 with sinkbasin 1
You clean the mug 1 using the sinkbasin 1.
> examine mug 1
This is a clean and hot mug 1.
> go to shelf 1
You arrive at shelf 1. On the shelf 1, you see nothing.
> put mug 1 on shelf 1
You move the mug 1 to the shelf 1.
""")  # fmt: skip
    assert sum(rewards) == rewards[-1] == 1.0


def test_looking_takes_a_lamp_that_is_on_and_the_thing_in_hand():
    rewards = plays(placed(Goal("look", "book", "desklamp", 0), BEDROOM, IN_BEDROOM), """
> go to desk 1
You arrive at desk 1. On the desk 1, you see a pen 1, and a desklamp 1.
> take desklamp 1 from desk 1
Nothing happens.
> examine desklamp 1
This desklamp 1 is off.
> use desklamp 1
You turn on the desklamp 1.
> examine desklamp 1
This desklamp 1 is on.
> use desklamp 1
You turn off the desklamp 1.
> go to bed 1
You arrive at bed 1. On the bed 1, you see a book 1, and a pen 2.
> use desklamp 1
Nothing happens.
> take book 1 from bed 1
You pick up the book 1 from the bed 1.
> go to desk 1
You arrive at desk 1. On the desk 1, you see a pen 1, and a desklamp 1.
> move book 1 to desk 1
You move the book 1 to the desk 1.
> use desklamp 1
You turn on the desklamp 1.
> take book 1 from desk 1
You pick up the book 1 from the desk 1.
""")  # fmt: skip
    assert sum(rewards) == rewards[-1] == 1.0


def test_two_are_put_into_the_same_receptacle_one_by_one():
    receptacles = ("bed 1", "desk 1", "drawer 1", "drawer 2")
    rewards = plays(placed(Goal("pick_two", "pen", "drawer", 0), receptacles, IN_BEDROOM), """
> go to desk 1
You arrive at desk 1. On the desk 1, you see a pen 1, and a desklamp 1.
> take pen 1 from desk 1
You pick up the pen 1 from the desk 1.
> go to bed 1
You arrive at bed 1. On the bed 1, you see a book 1, and a pen 2.
> take pen 2 from bed 1
Nothing happens.
> go to drawer 2
You arrive at drawer 2. The drawer 2 is closed.
> open drawer 2
You open the drawer 2. The drawer 2 is open. In it, you see nothing.
> move pen 1 to drawer 2
You move the pen 1 to the drawer 2.
> go to bed 1
You arrive at bed 1. On the bed 1, you see a book 1, and a pen 2.
> take pen 2 from bed 1
You pick up the pen 2 from the bed 1.
> go to drawer 1
You arrive at drawer 1. The drawer 1 is closed.
> open drawer 1
You open the drawer 1. The drawer 1 is open. In it, you see nothing.
> move pen 2 to drawer 1
You move the pen 2 to the drawer 1.
> take pen 2 from drawer 1
You pick up the pen 2 from the drawer 1.
> go to drawer 2
You arrive at drawer 2. The drawer 2 is open. In it, you see a pen 1.
> Put pen 2  in drawer 2
You move the pen 2 to the drawer 2.
""")  # fmt: skip
    assert sum(rewards) == rewards[-1] == 1.0


@pytest.mark.parametrize(
    "said",
    [
        "", "go to", "go to countertop 1", "go to cabinet 2", "go to cabinet", "open countertop 1", "open cabinet 1",
        "close countertop 1", "take bread 1 from countertop 1", "take mug 2 from cabinet 1", "take egg 3 from fridge 1",
        "take mug 1 from countertop 1", "move mug 1 to shelf 1", "move bread 1 to countertop 1", "put mug 1",
        "clean mug 1 with sinkbasin 1", "heat mug 1 with countertop 1", "use desklamp 1", "use mug 1", "examine mug 2",
        "examine shelf 1", "look mug 1", "I go to cabinet 1", "go to cabinet 1 > open cabinet 1", "slice bread 1",
    ],
)  # fmt: skip
def test_what_cannot_be_done_costs_a_turn_and_nothing_else(said):
    """Before the countertop, with its mug in hand."""
    household = placed(Goal("pick", "mug", "shelf", 0))
    household.step("go to countertop 1")
    household.step("take mug 1 from countertop 1")
    before = household.get_state()
    observation, *outcome, info = household.step(said)
    assert (observation, outcome) == (NOTHING, [0.0, False, False])
    assert household.get_state() == before | {"turn": before["turn"] + 1}
    assert info["metrics"] == {"success": 0.0, "success_pick": 0.0}


def test_admissible_commands_are_those_at_which_something_happens():
    """All commands of a room's words, against what the list has; what only looks changes nothing."""
    household, draw, tried = Household(FEWEST_RECEPTACLES, FEWEST_OBJECTS), random.Random(0), Counter()
    for seed in range(8):
        _, info = household.reset(seed=seed)
        places, things = household.scene.house.receptacles, [*household.scene.house.where]
        words = ["look", "inventory", *(f"{verb} {place}" for verb in ("go to", "open", "close") for place in places)]
        words += [f"examine {one}" for one in (*places, *things)] + [f"use {one}" for one in things]
        for one, place in itertools.product(things, places):
            words += [f"{verb} {one} with {place}" for verb in ("clean", "heat", "cool")]
            words += [f"take {one} from {place}", f"move {one} to {place}"]
        for _ in range(8):
            state, possible = household.get_state(), info["admissible_commands"]
            assert set(possible) <= set(words)
            assert len(set(possible)) == len(possible)
            for said in words:
                household.set_state(json.loads(json.dumps(state)))
                happens = household.step(said)[0] != NOTHING
                assert happens == (said in possible), said
                after = household.get_state() | {"turn": state["turn"]}
                looks = not happens or said.startswith(("look", "inventory", "examine"))
                assert (after == state) == looks, said
                tried[happens] += 1
            household.set_state(state)
            *_, terminated, _, info = household.step(draw.choice(possible))
            if terminated:
                break
    assert min(tried.values()) > 500


def test_a_limit_cuts_and_an_end_is_an_end():
    for spent, outcome in ((LONGEST - 4, (1.0, True, False)), (LONGEST - 3, (0.0, False, True))):
        household = placed(Goal("pick", "mug", "shelf", 0), max_turns=LONGEST)
        said = ["dance"] * spent
        said += ["go to countertop 1", "take mug 1 from countertop 1", "go to shelf 1", "move mug 1 to shelf 1"]
        steps = [household.step(one)[1:4] for one in said[:LONGEST]]
        assert steps == [(0.0, False, False)] * (LONGEST - 1) + [outcome]


def test_the_documents_show_the_household():
    (shown,) = re.findall(
        r"^```\n(You are in the middle of a room.*?)^```\n",
        (ROOT / "docs/agents.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    opening, household = shown.partition("> ")[0], Household()
    assert opening == next(seen for seen, _ in (household.reset(seed=seed) for seed in range(2000)) if seen == opening)
    assert sum(plays(household, shown)) == 0.0
