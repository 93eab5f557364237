"""The household's rooms and tasks: a planner can do all, only what was asked is rewarded, demonstrations."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
from test_shop import assert_same_in_other_processes

from cola_ray.settings.config import TaskConfig, is_environment
from cola_ray.tasks import make_environment
from cola_ray.tasks.environment import HELD_OUT
from cola_ray.tasks.household import Household
from cola_ray.tasks.household_player import LONGEST, Player
from cola_ray.tasks.household_rooms import FEWEST_OBJECTS, FEWEST_RECEPTACLES, RECEPTACLES, WORDINGS
from cola_ray.tasks.household_rules import NOTHING

TASKS = ("pick", "look", "clean", "heat", "cool", "pick_two")


def solved(household, seed, seen=()):
    """Steps of an episode that the planner plays alone."""
    household.reset(seed=seed)
    player, steps = Player(household.scene, seen), []
    while not steps or not (steps[-1][1][2] or steps[-1][1][3]):
        command = player.command()
        steps.append((command, household.step(command)))
    return steps


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
                r"You are in the middle of a room\. Looking quickly around you, you see (.+)\.\n"
                r"Your task is to: (.+)\.\n",
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
            if found and found["thing"] != "some":
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
    program = """
from cola_ray.tasks.household import Household
household = Household(num_receptacles=9, num_objects=12)
print([household.reset(seed=3), household.get_state(), household.reset(seed=2**30 + 3), household.demonstrations(5, 1)])
"""
    assert_same_in_other_processes(program)
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
    for seed in range(first, first + 80):
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
    assert rewarded > 40


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
    assert max(said) < config.rollout.max_new_tokens, "with an end token"
    assert max(openings) + 3 * (max(seen) + max(said)) < config.rollout.max_prompt_tokens


def test_the_household_is_known_by_its_name():
    assert is_environment("household")
    household = make_environment(TaskConfig(name="household", options={"num_receptacles": 9, "max_turns": 50}))
    assert (household.num_receptacles, household.num_objects, household.max_turns) == (9, 6, 50)
    for name, least in (
        ("num_receptacles", FEWEST_RECEPTACLES), ("num_objects", FEWEST_OBJECTS), ("max_turns", LONGEST),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} = {least - 1}: out of range"):
            make_environment(TaskConfig(name="household", options={name: least - 1}))
