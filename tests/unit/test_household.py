"""The household: ALFWorld's commands by transcripts, six tasks that a planner can do, and no reward for anything else."""

import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from runs import ROOT

from cola_ray.settings.config import TaskConfig, is_environment
from cola_ray.tasks import make_environment
from cola_ray.tasks.environment import HELD_OUT
from cola_ray.tasks.household import Household
from cola_ray.tasks.household_player import LONGEST, Player
from cola_ray.tasks.household_rooms import (
    FEWEST_OBJECTS, FEWEST_RECEPTACLES, RECEPTACLES, WORDINGS, Goal, House, State,
)  # fmt: skip
from cola_ray.tasks.household_rules import NOTHING, Scene

TASKS = ("pick", "look", "clean", "heat", "cool", "pick_two")
KITCHEN = ("cabinet 1", "countertop 1", "fridge 1", "microwave 1", "shelf 1", "sinkbasin 1")
IN_KITCHEN = {"bread 1": "countertop 1", "egg 1": "fridge 1", "mug 1": "countertop 1", "mug 2": "cabinet 1"}
BEDROOM = ("bed 1", "desk 1", "drawer 1", "shelf 1")
IN_BEDROOM = {"book 1": "bed 1", "pen 1": "desk 1", "pen 2": "bed 1", "desklamp 1": "desk 1"}


def placed(goal, receptacles=KITCHEN, where=None):
    """A household with a room of one's own."""
    household, where = Household(), IN_KITCHEN if where is None else where
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


def solved(household, seed, seen=()):
    """Steps of an episode that the planner plays alone."""
    household.reset(seed=seed)
    player, steps = Player(household.scene, seen), []
    while not steps or not (steps[-1][1][2] or steps[-1][1][3]):
        command = player.command()
        steps.append((command, household.step(command)))
    return steps


# --- commands -----------------------------------------------------------------------------------------------------


def test_a_mug_that_is_not_clean_is_not_enough():
    rewards = plays(placed(Goal("clean", "mug", "cabinet", 0)), """
> look
You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a countertop 1, a fridge 1, a microwave 1, a shelf 1, and a sinkbasin 1.
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
    household = Household(max_turns=LONGEST)
    household.reset(seed=3)
    steps = [household.step("dance") for _ in range(LONGEST)]
    assert [step[1:4] for step in steps] == [(0.0, False, False)] * (LONGEST - 1) + [(0.0, False, True)]
    needed = len(solved(Household(), 3))
    household = Household(max_turns=LONGEST)
    household.reset(seed=3)
    for _ in range(max(LONGEST - needed, 0)):
        household.step("look")
    household.scene.state.turn = LONGEST - needed
    player = Player(household.scene)
    last = [household.step(player.command()) for _ in range(needed)][-1]
    assert last[1:4] == (1.0, True, False), "also on the last turn"


# --- rooms and tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "seeds"), [((6, 6), 150), ((5, 3), 60), ((14, 20), 40)])
def test_a_planner_does_every_task(sizes, seeds):
    """In as many turns as its docstring says, whether it has to look for things or knows where they are."""
    household = Household(*sizes, max_turns=2 * sizes[0] + 7)
    done = Counter()
    for first, number in itertools.product((0, HELD_OUT), range(seeds)):
        steps = solved(household, first + number)
        assert [reward for _, (_, reward, *_) in steps] == [0.0] * (len(steps) - 1) + [1.0], first + number
        _, (observation, _, terminated, truncated, info) = steps[-1]
        assert (observation != NOTHING, terminated, truncated) == (True, True, False)
        task = household.scene.house.goal.task
        assert info["metrics"] == {"success": 1.0, f"success_{task}": 1.0}
        done[first, task] += 1
        assert len(solved(household, first + number, seen=household.scene.house.receptacles)) <= LONGEST
    assert set(done) == {*itertools.product((0, HELD_OUT), TASKS)}
    assert min(done.values()) >= seeds / 6 / 3


def test_the_default_limit_leaves_room_for_a_search_of_everything():
    household = Household()
    assert 2 * household.num_receptacles + 7 <= household.max_turns


def test_rooms_are_as_large_as_they_should_be_and_hold_what_they_may():
    for sizes in ((6, 6), (5, 3), (60, 200)):
        household = Household(*sizes)
        for seed in range(20):
            opening, info = household.reset(seed=seed)
            seen, task = re.fullmatch(
                r"You are in the middle of a room\. Looking quickly around you, you see (.+)\.\nYour task is to: (.+)\.\n",
                opening,
            ).groups()
            names = re.split(r", and a |, a ", seen.removeprefix("a "))
            assert len(names) == len({*names}) == sizes[0]
            where = household.get_state()["where"]
            assert len(where) - ("desklamp 1" in where) == sizes[1]
            assert {*where.values()} <= {*names}
            for one, place in where.items():
                assert one.rsplit(" ", 1)[0] in RECEPTACLES[place.rsplit(" ", 1)[0]].holds
            assert info["instruction"] == task
            assert not household.scene.house.goal.met(household.scene.state)


def meaning(instruction):
    """What a task asks for, read from its words: (task, thing, target)."""
    for task, wordings in WORDINGS.items():
        for wording in wordings:
            pattern = wording.format(thing="(?P<thing>[a-z]+)", target="(?P<target>[a-z]+)")
            found = re.fullmatch(pattern, instruction)
            if found and not found["thing"] == "some":
                return task, found["thing"], found["target"]
    raise AssertionError(instruction)


def test_held_out_seeds_have_tasks_that_no_other_seed_has():
    household = Household()
    train, held_out = (
        {meaning(household.reset(seed=first + seed)[1]["instruction"]) for seed in range(600)}
        for first in (0, HELD_OUT)
    )
    assert not train & held_out
    assert {task for task, *_ in held_out} == {task for task, *_ in train} == {*TASKS}
    assert len(train) > 2 * len(held_out) > 60
    cloned = {dialogue.opening.partition("to: ")[2][:-2] for dialogue in household.demonstrations(60, seed=0)}
    assert not held_out & {*map(meaning, cloned)}


def test_an_episode_follows_from_its_seed_alone():
    """In other processes, too, whatever their hash seed; and none of them loads what agent programs do without."""
    program = """
import sys
from cola_ray.tasks.household import Household
household = Household(num_receptacles=9, num_objects=12)
print([household.reset(seed=3), household.get_state(), household.reset(seed=2**30 + 3), household.demonstrations(5, 1)])
assert not {"torch", "vllm", "ray", "transformers", "openai"} & {*sys.modules}
"""
    first, second = (
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT,
                       env={"PYTHONHASHSEED": number, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}).stdout
        for number in ("1", "2")
    )  # fmt: skip
    assert first == second
    household = Household()
    assert len({household.reset(seed=seed)[0] for seed in range(50)}) > 40


def test_a_state_goes_on_in_another_household():
    household, other, draw = Household(), Household(), random.Random(0)
    for seed in range(20):
        household.reset(seed=seed)
        for _ in range(household.max_turns):
            said = draw.choice(household.scene.admissible())
            other.set_state(json.loads(json.dumps(household.get_state())))
            ours = household.step(said)
            assert other.step(said) == ours
            assert other.get_state() == household.get_state()
            if ours[2]:
                break


# --- the reward ---------------------------------------------------------------------------------------------------


def fulfils(instruction, history):
    """Whether commands and their answers, told one after the other, did what was asked; from the words alone.

    Returns nothing for what is not told: where things were before anyone touched them.
    """
    task, thing, target = meaning(instruction)
    places, done, held, at, lamp, lit = {}, {}, "", "", "", False
    for said, seen in history:
        at = said.removeprefix("go to ") if said.startswith("go to ") else at
        lamp = at if "desklamp 1" in seen and at in seen else lamp
        if taken := re.match(r"You pick up the (.+) from the (.+)\.", seen):
            held = taken[1]
            places.pop(held, None)
        elif moved := re.match(r"You move the (.+) to the (.+)\.", seen):
            places[moved[1]], held = moved[2], ""
        elif treated := re.match(r"You (clean|heat|cool) the (.+) using the (.+)\.", seen):
            results = done.setdefault(treated[2], set())
            results.add(treated[1])
            results -= {"heat": {"cool"}, "cool": {"heat"}}.get(treated[1], set())
        elif turned := re.match(r"You turn (on|off)", seen):
            lit, lamp = turned[1] == "on", at
        for one in re.findall(r"a ([a-z]+ \d+)", seen) if re.search(r"(On|In it)", seen) else ():
            places.setdefault(one, at)
    if task == "look":
        return lit and held.startswith(f"{thing} ") and at == lamp
    right = Counter(
        place for one, place in places.items()
        if one.startswith(f"{thing} ") and place.startswith(f"{target} ")
        and (task in ("pick", "pick_two") or task in done.get(one, ()))
    )  # fmt: skip
    return max(right.values(), default=0) >= (2 if task == "pick_two" else 1)


@pytest.mark.parametrize("first", [0, HELD_OUT])
def test_random_commands_are_rewarded_only_for_what_was_asked(first):
    household, draw, rewarded = Household(5, 4, max_turns=60), random.Random(1), 0
    for seed in range(first, first + 150):
        opening, info = household.reset(seed=seed)
        history, player = [("look", opening)], Player(household.scene)
        while True:
            well = player.command()
            said = well if draw.random() < 0.3 else draw.choice(household.scene.admissible())
            observation, reward, terminated, truncated, _ = household.step(said)
            history.append((said, observation))
            assert fulfils(info["instruction"], history) == (reward == 1.0) == terminated, history
            rewarded += terminated
            if terminated or truncated:
                break
    assert rewarded > 75


@pytest.mark.parametrize("task", TASKS)
def test_no_way_to_the_reward_is_shorter_than_the_task(task):
    """All commands, breadth first, up to the first rewarded ones: each of those has done what was asked."""
    household, least = Household(5, 3, max_turns=50), {"pick": 4, "look": 3, "pick_two": 4}.get(task, 5)
    seeds = (
        seed for seed in itertools.count() if household.reset(seed=seed) and household.scene.house.goal.task == task
    )
    for seed in itertools.islice(seeds, 2):
        _, info = household.reset(seed=seed)
        layer, known, ends = [(household.get_state(), ())], set(), []
        while not ends:
            deeper = []
            for state, history in layer:
                household.set_state(json.loads(json.dumps(state)))
                for said in household.scene.admissible():
                    if said.startswith(("look", "inventory", "examine", "close")):
                        continue
                    household.set_state(json.loads(json.dumps(state)))
                    observation, reward, *_ = household.step(said)
                    if reward:
                        ends.append((*history, (said, observation)))
                    after = household.get_state()
                    key = json.dumps(after | {"turn": 0, "open": sorted(after["open"])}, sort_keys=True)
                    if key not in known:
                        known.add(key)
                        deeper.append((after, (*history, (said, observation))))
            layer = deeper
        assert all(fulfils(info["instruction"], history) for history in ends)
        assert least <= len(ends[0]) <= len(solved(household, seed, seen=household.scene.house.receptacles)) <= LONGEST


# --- demonstrations, documents and settings -----------------------------------------------------------------------


def successes(skill, count=250):
    household = Household() if skill is None else Household(skill=skill)
    draw, found = random.Random(0), []
    for seed in draw.sample(range(10_000), count):
        (dialogue,) = household.demonstrations(1, seed)
        assert len(dialogue.turns) <= household.max_turns
        found.append(household.scene.state.over)
    return sum(found) / count


def test_demonstrations_are_as_good_as_the_docstring_says():
    assert "six tasks in ten are fulfilled" in " ".join(Household.demonstrations.__doc__.split())
    assert 0.52 < successes(None) < 0.68
    shares = [successes(skill, 100) for skill in (0.0, 0.4, 0.7)]
    assert shares == sorted(shares)
    assert successes(1.0, 100) == 1


def test_what_demonstrations_show_is_short_for_a_tiny_base():
    """With the tokenizer that a tiny base gets: 512 entries, made of the demonstrations."""
    from cola_ray.learner.start_model import make_tokenizer
    from cola_ray.settings.presets import preset
    from cola_ray.tasks import PlayedTask

    config = preset("tiny", agents=True, task="household")
    task = PlayedTask(TaskConfig(name="household", num_problems=400), seed=0)
    tokenizer, dialogues = make_tokenizer(task), task.dialogues()
    openings = [len(tokenizer.encode(one.opening)) for one in dialogues]
    seen = [len(tokenizer.encode(text)) for text in {seen for one in dialogues for _, seen in one.turns}]
    said = [len(tokenizer.encode(text)) for text in {said for one in dialogues for said, _ in one.turns}]
    print(max(openings), max(seen), max(said))
    assert max(said) < config.rollout.max_new_tokens, "with an end token"
    assert max(openings) + 3 * (max(seen) + max(said)) < config.rollout.max_prompt_tokens


def test_the_documents_show_the_household():
    (shown,) = re.findall(
        r"^```\n(You are in the middle of a room.*?)^```\n",
        (ROOT / "docs/agents.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    opening, household = shown.partition("> ")[0], Household()
    assert opening == next(seen for seen, _ in (household.reset(seed=seed) for seed in range(2000)) if seen == opening)
    assert sum(plays(household, shown)) == 0.0


def test_the_household_is_known_by_its_name():
    assert is_environment("household")
    household = make_environment(TaskConfig(name="household", options={"num_receptacles": 9, "max_turns": 50}))
    assert (household.num_receptacles, household.num_objects, household.max_turns) == (9, 6, 50)
    for name, least in (
        ("num_receptacles", FEWEST_RECEPTACLES), ("num_objects", FEWEST_OBJECTS), ("max_turns", LONGEST),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} = {least - 1}: out of range"):
            make_environment(TaskConfig(name="household", options={name: least - 1}))
