"""The shop: WebShop's reward and pages, instructions that can be satisfied by reading, demonstrations, the example."""

import asyncio
import itertools
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from runs import ROOT
from test_programs import played, tokens, utterance

from cola_ray.rollout.conversation import Conversation
from cola_ray.rollout.episode import EpisodeSetting, play
from cola_ray.rollout.isolation import EnvironmentProcess
from cola_ray.settings.config import TaskConfig, is_environment
from cola_ray.tasks import make_environment
from cola_ray.tasks.environment import HELD_OUT
from cola_ray.tasks.shop import INVALID, Shop
from cola_ray.tasks.shop_catalogue import FEWEST, Goal, Product, catalogue, instruction, reward

INSTRUCTION = re.compile(
    r"Instruction: I want a (\w+) (\w+) (\w+)(?: that is (\w+))?(?:, size (\w+))?, for less than (\d+) dollars\n"
)
NO_SUCCESS = {"metrics": {"success": 0.0}}
ITEM = re.compile(r"^\[(b\d+)\] (.+) \$(\d+)$", re.MULTILINE)
EXAMPLE = (ROOT / "examples" / "shop_agent.py").read_text()


def reading(opening):
    """Buys the right thing, and knows nothing but the pages: is sent each, and yields actions."""
    color, material, kind, feature, size, limit = INSTRUCTION.match(opening).groups()
    options = [value for value in (color, size) if value]
    page = yield f"search[{' '.join(filter(None, (material, kind, feature, *options)))}]"
    rejected = set()
    while True:
        fitting = [
            one for one, title, price in ITEM.findall(page)
            if title == f"{material} {kind}" and int(price) < int(limit) and one not in rejected
        ]  # fmt: skip
        if not fitting:
            page = yield "click[Next >]"
            continue
        item = yield f"click[{fitting[0]}]"
        right = all(f"[{value}]" in item for value in options)
        if right and feature:
            right = f" {feature}." in (yield "click[Description]")
            yield "click[< Prev]"
        if right:
            for value in options:
                yield f"click[{value}]"
            yield "click[Buy Now]"
        rejected.add(fitting[0])
        page = yield "click[< Prev]"


def bought_by_reading(shop, seed):
    """Steps of an episode."""
    opening, _ = shop.reset(seed=seed)
    customer = reading(opening)
    steps = [shop.step(next(customer))]
    while not (steps[-1][2] or steps[-1][3]):
        steps.append(shop.step(customer.send(steps[-1][0])))
    return steps


# --- the reward ---------------------------------------------------------------------------------------------------


def by_hand(goal, product, chosen):
    """Equation 1 of WebShop's paper, term by term."""
    wanted_attributes = [goal.product.material] + ([goal.feature] if goal.feature else [])
    number = 0
    for attribute in wanted_attributes:
        if attribute == product.material or attribute == product.feature:
            number += 1
    for name in goal.options:
        if name in chosen and chosen[name] == goal.options[name]:
            number += 1
    if product.price <= goal.limit:
        number += 1
    share = number / (len(wanted_attributes) + len(goal.options) + 1)
    if product.type == goal.product.type:
        return share
    return 0.5 * share if goal.product.type in product.department.types else 0.0


def test_the_reward_is_the_papers_for_any_purchase():
    goods, draw, seen = catalogue(100, 3), random.Random(0), set()
    for seed in range(100):
        goal = instruction(goods, seed)
        for product in goods.products:
            chosen = {name: draw.choice(values) for name, values in product.options.items() if draw.random() < 0.7}
            found = reward(goal, product, chosen)
            assert found == pytest.approx(by_hand(goal, product, chosen), abs=1e-12)
            seen.add(round(found, 3))
    assert {0.0, 1.0, 0.5} <= seen
    assert len(seen) > 8


def test_the_reward_of_one_instruction_counted_by_hand():
    shirts, mugs, lamps = (catalogue(FEWEST, 0).products[index].department for index in (0, 3, 6))
    colors, sizes = ("red", "blue"), ("small", "large")
    shirt = Product("b1", shirts, "shirt", "cotton", "soft", 24, {"color": colors, "size": sizes})
    goal = Goal(shirt, "soft", {"color": "red", "size": "large"}, 30)
    right = {"color": "red", "size": "large"}
    assert goal.instruction == "I want a red cotton shirt that is soft, size large, for less than 30 dollars"
    assert reward(goal, shirt, right) == 1.0
    assert reward(goal, shirt, {}) == 3 / 5, "cotton, soft and cheap enough, of these and two options"
    assert reward(goal, shirt, {"color": "red", "size": "small"}) == 4 / 5
    dear = Product("b2", shirts, "shirt", "wool", "soft", 31, shirt.options)
    assert reward(goal, dear, right) == 3 / 5
    assert reward(goal, replace(shirt, price=30), right) == 1.0, "a price may be the limit"
    assert reward(goal, replace(shirt, price=31), right) == 4 / 5
    jacket = Product("b3", shirts, "jacket", "cotton", "soft", 24, shirt.options)
    assert reward(goal, jacket, right) == 1 / 2, "another type of the department, everything else right"
    mug = Product("b4", mugs, "mug", "steel", "light", 11, {"color": colors})
    lamp = Product("b5", lamps, "lamp", "wood", "compact", 11, shirt.options)
    assert reward(goal, mug, {"color": "red"}) == reward(goal, lamp, right) == 0.0


# --- the search ---------------------------------------------------------------------------------------------------


def test_the_search_ranks_by_bm25():
    """Robertson & Zaragoza's formula, document by document, with what Anserini adds in its idf."""
    goods = catalogue(60, 1)
    texts = [
        [*one.title.split(), "This", *one.title.split(), "is", one.feature, *itertools.chain(*one.options.values())]
        for one in goods.products
    ]
    mean = sum(map(len, texts)) / len(texts)
    for query in ("wool jacket", "red steel kettle light", "green", "shelf nothing"):
        scores = []
        for text in texts:
            score = 0.0
            for word in query.split():
                n = sum(word in other for other in texts)
                f = text.count(word)
                idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
                score += idf * f / (f + 0.9 * (1 - 0.4 + 0.4 * len(text) / mean))
            scores.append(score)
        order = sorted((index for index in range(60) if scores[index] > 0), key=lambda index: (-scores[index], index))
        found = goods.search(query)
        assert len(found) == len(order) > 3
        place = {product.id: index for index, product in enumerate(goods.products)}
        np.testing.assert_allclose([scores[place[one.id]] for one in found], [scores[index] for index in order])
    assert goods.search("a thing that nobody sells") == []
    assert goods.search("Wool JACKET!") == goods.search("wool jacket")


# --- instructions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_products", "seeds"), [(48, 300), (FEWEST, 100), (300, 100)])
def test_every_instruction_can_be_satisfied_by_reading_the_pages(num_products, seeds):
    shop = Shop(num_products=num_products)
    for seed in (*range(seeds), *range(HELD_OUT, HELD_OUT + seeds)):
        steps = bought_by_reading(shop, seed)
        assert [reward for _, reward, *_ in steps] == [0.0] * (len(steps) - 1) + [1.0], seed
        observation, _, terminated, truncated, info = steps[-1]
        assert (observation, terminated, truncated) == ("Your score: 1.00\n", True, False)
        assert info["metrics"] == {"success": 1.0}


def test_held_out_seeds_want_what_no_other_seed_does():
    for num_products in (FEWEST, 48):
        shop = Shop(num_products=num_products)
        train, held_out = (
            {shop.reset(seed=first + seed)[1]["instruction"] for seed in range(2000)} for first in (0, HELD_OUT)
        )
        assert not train & held_out
        assert len(train) > 3 * len(held_out) > 60
        cloned = {dialogue.opening for dialogue in shop.demonstrations(500, seed=0)}
        assert not {f"Instruction: {one}\n[Search]\n" for one in held_out} & cloned


def assert_same_in_other_processes(program):
    """It prints the same under each hash seed; and none of them loads what agent programs do without."""
    program += """
import sys
assert not {"torch", "vllm", "ray", "transformers", "openai"} & {*sys.modules}
"""
    first, second = (
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT,
                       env={"PYTHONHASHSEED": number, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}).stdout
        for number in ("1", "2")
    )  # fmt: skip
    assert first == second


def test_a_catalogue_follows_from_its_number_alone():
    program = """
from cola_ray.tasks.shop import Shop
shop = Shop(num_products=30, catalogue_seed=5)
print([shop.catalogue.products, shop.reset(seed=3), shop.reset(seed=2**30 + 3), shop.demonstrations(5, 1)])
"""
    assert_same_in_other_processes(program)
    ids = {product.id for product in catalogue(30, 5).products}
    assert len(ids) == 30
    assert catalogue(30, 5).products != catalogue(30, 6).products


# --- pages --------------------------------------------------------------------------------------------------------


def at(page):
    """A shop where the seed's customer has come to a page."""
    shop = Shop()
    shop.reset(seed=3)
    if page != "search":
        results = shop.step("search[lamp]")[0]
    if page in ("item", "description"):
        shop.step(f"click[{ITEM.search(results)[1]}]")
    if page == "description":
        shop.step("click[Description]")
    assert shop.visit.page == page
    return shop


@pytest.mark.parametrize(
    ("page", "action"),
    [
        ("search", "click[Search]"), ("search", "click[Buy Now]"), ("search", "search[]"), ("search", "search[ ]"),
        ("search", "search lamp"), ("search", ""), ("search", "click[]"), ("search", "I search[lamp]"),
        ("results", "search[lamp]"), ("results", "click[< Prev]"), ("results", "click[Buy Now]"),
        ("results", "click[b9999]"), ("results", "click[Description]"), ("item", "click[purple]"),
        ("item", "click[Next >]"), ("item", "click[lamp]"), ("item", "search[lamp]"), ("item", "look[Description]"),
        ("description", "click[Buy Now]"), ("description", "click[red]"), ("description", "click[Description]"),
    ],
)  # fmt: skip
def test_an_invalid_action_costs_a_turn_and_nothing_else(page, action):
    shop = at(page)
    before = shop.get_state()
    assert shop.step(action) == (INVALID, 0.0, False, False, NO_SUCCESS)
    assert shop.get_state() == before | {"turn": before["turn"] + 1}


def test_pages_lead_where_they_say():
    shop = at("results")
    first, after = shop._page(), []
    assert re.fullmatch(
        r"\[Back to Search\] Page 1 \(\d results\)\n(\[b\d\d\] \w+ lamp \$\d\d\n){3}\[Next >\]\n", first
    )
    while "[Next >]" in shop._page():
        after.append(shop.step("click[next >]")[0])
    assert re.match(r"\[Back to Search\] Page 2 .*\n.*\[< Prev\]", after[0], re.DOTALL)
    shown = [one for page in (first, *after) for one, _, _ in ITEM.findall(page)]
    assert shown == [product.id for product in shop.catalogue.search("lamp")]
    for page in [first, *after][-2::-1]:
        assert shop.step("click[< Prev]")[0] == page
    item = shop.step(f" CLICK[{shown[1].upper()}]\n")[0]
    product = shop.catalogue.by_id[shown[1]]
    assert item.splitlines()[1] == f"{product.title} ${product.price}"
    for name, values in product.options.items():
        assert f"\n{name}: {' '.join(f'[{value}]' for value in values)}\n" in item
    assert shop.step("click[Description]")[0].endswith(f"\n{product.description}\n")
    assert shop.step("click[< Prev]")[0] == item
    assert shop.step("click[< Prev]")[0] == first
    assert shop.step("click[Back to Search]")[0] == "[Search]\n"
    assert shop.step("search[nothing]")[0] == "[Back to Search] Page 1 (0 results)\n"


def test_the_last_value_of_an_option_counts_and_another_item_has_none():
    shop = at("item")
    product = shop.catalogue.by_id[shop.visit.item]
    first, second, *_ = product.options["color"]
    for value in (first, second):
        assert shop.step(f"click[{value}]")[0] == f"You have clicked {value}.\n"
    assert shop.visit.chosen == {"color": second}
    shop.step("click[Description]")
    shop.step("click[< Prev]")
    assert shop.visit.chosen == {"color": second}
    results = shop.step("click[< Prev]")[0]
    shop.step(f"click[{ITEM.findall(results)[1][0]}]")
    assert shop.visit.chosen == {}


def test_a_limit_cuts_and_an_end_is_an_end():
    shop = Shop(max_turns=3)
    shop.reset(seed=3)
    steps = [shop.step("look") for _ in range(3)]
    assert [step[1:4] for step in steps] == [(0.0, False, False)] * 2 + [(0.0, False, True)]
    shop = Shop(max_turns=3)
    shop.reset(seed=3)
    shop.step(f"click[{ITEM.search(shop.step('search[lamp]')[0])[1]}]")
    observation, worth, *ended, _ = shop.step("click[Buy Now]")
    assert ended == [True, False], "also on the last turn"
    assert observation == f"Your score: {worth:.2f}\n"
    assert shop.step("click[Buy Now]") == (INVALID, 0.0, True, False, NO_SUCCESS)


def test_a_state_goes_on_in_another_shop():
    shop, other = Shop(), Shop()
    for dialogue in shop.demonstrations(30, seed=2):
        seed = next(seed for seed in range(20_000) if f"{shop.reset(seed=seed)[0]}" == dialogue.opening)
        shop.reset(seed=seed)
        for action, observation in dialogue.turns:
            other.set_state(json.loads(json.dumps(shop.get_state())))
            assert shop.step(action)[0] == observation
            assert other.step(action)[0] == observation
            assert other.get_state() == shop.get_state()


def test_the_documents_show_the_shop():
    (shown,) = re.findall(
        r"^```\n(Instruction: .*?)^```\n", (ROOT / "docs/agents.md").read_text(), re.DOTALL | re.MULTILINE
    )
    opening, *turns = re.split(r"^> ", shown, flags=re.MULTILINE)
    shop = Shop()
    assert opening == next(page for page, _ in (shop.reset(seed=seed) for seed in range(20_000)) if page == opening)
    for turn in turns:
        action, _, page = turn.partition("\n")
        assert shop.step(action)[0] == page


# --- demonstrations and settings ----------------------------------------------------------------------------------


def returns_of(skill, count=1000):
    shop = Shop() if skill is None else Shop(skill=skill)
    found = []
    for dialogue in shop.demonstrations(count, seed=0):
        score = re.fullmatch(r"Your score: (.+)\n", dialogue.turns[-1][1])
        found.append(float(score[1]) if score else 0.0)
    return np.array(found)


def test_demonstrations_are_as_good_as_the_docstring_says():
    assert "mean return is about 0.6, and one purchase in seven is entirely right" in " ".join(
        Shop.demonstrations.__doc__.split()
    )
    usual = returns_of(None)
    assert 0.57 < usual.mean() < 0.64
    assert 1 / 9 < (usual == 1).mean() < 1 / 5
    means = [returns_of(skill, 300).mean() for skill in (0.0, 0.3, 0.6, 1.0)]
    assert means == sorted(means)
    assert (returns_of(1.0, 300) == 1).all()


def test_what_demonstrations_show_is_short_for_a_tiny_base():
    """With the tokenizer that a tiny base gets: 512 entries, made of the demonstrations."""
    from cola_ray.learner.start_model import make_tokenizer
    from cola_ray.tasks import PlayedTask

    task = PlayedTask(TaskConfig(name="shop", num_problems=600), seed=0)
    tokenizer = make_tokenizer(task)
    dialogues = task.dialogues()
    shown = [text for one in dialogues for text in (one.opening, *(observation for _, observation in one.turns))]
    said = [action for one in dialogues for action, _ in one.turns]
    assert max(len(tokenizer.encode(text)) for text in {*shown}) < 60
    assert max(len(tokenizer.encode(text)) for text in {*said}) < 16


def test_the_shop_is_known_by_its_name():
    assert is_environment("shop")
    shop = make_environment(TaskConfig(name="shop", options={"num_products": 100, "skill": 1.0}))
    assert (len(shop.catalogue.products), shop.skill, shop.max_turns) == (100, 1.0, 15)
    with pytest.raises(ValueError, match=f"num_products = {FEWEST - 1}: out of range"):
        make_environment(TaskConfig(name="shop", options={"num_products": FEWEST - 1}))


# --- the example --------------------------------------------------------------------------------------------------

CHAT, ENDINGS, END = tokens(None)


def reader_as_policy():
    """Generates what a customer by instruction would say to the last page."""
    customers = {}

    async def generate(ids, turn, longest=0):
        text = CHAT.tokenizer.decode(ids)
        opening, page = INSTRUCTION.search(text)[0], text.rsplit(CHAT.tokenizer.eos_token, 1)[-1]
        if turn == 0:
            customers[opening] = reading(opening)
            action = next(customers[opening])
        else:
            action = customers[opening].send(page)
        return utterance(ids, [*CHAT.text_ids(action), END])

    return generate


def played_by_the_example(tmp_path, seeds, **limits):
    return played(
        tmp_path, EXAMPLE, seeds=seeds, processes=1, max_turns=50, generate=reader_as_policy(),
        converse=lambda: Conversation(CHAT, ENDINGS), **limits,
    )  # fmt: skip


def test_the_example_plays_the_shop_with_whom_it_is_told_to(tmp_path):
    seeds = [0, 1, 2, 3, HELD_OUT, HELD_OUT + 1]
    episodes = played_by_the_example(tmp_path, seeds)
    assert [(one.failure, one.terminated, one.total_reward) for one in episodes] == [("", True, 1.0)] * len(seeds)
    process = EnvironmentProcess(Shop, timeout_s=20.0)
    setting = EpisodeSetting([process], CHAT.text_ids, ENDINGS.text, 2000, tuple(CHAT.begin))
    try:
        for place, (seed, of_program) in enumerate(zip(seeds, episodes, strict=True)):
            of_environment = asyncio.run(play(place, seed, setting, reader_as_policy()))
            assert [turn.reward for turn in of_environment.turns] == [turn.reward for turn in of_program.turns]
            for ours, theirs in zip(of_program.turns, of_environment.turns, strict=True):
                np.testing.assert_array_equal(ours.state_ids, theirs.state_ids)
                np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    finally:
        process.close()


def test_the_example_leaves_its_oldest_turns_out_where_there_is_no_room(tmp_path):
    (whole,) = played_by_the_example(tmp_path, [3])
    opening, longest = len(whole.turns[0].state_ids), max(len(turn.state_ids) for turn in whole.turns)
    room = longest - 40
    (short,) = played_by_the_example(tmp_path, [3], max_state_tokens=room)
    assert (short.failure, short.total_reward, len(short.turns)) == ("", 1.0, len(whole.turns))
    assert max(len(turn.state_ids) for turn in short.turns) <= room < longest
    for turn in short.turns:
        np.testing.assert_array_equal(turn.state_ids[:opening], whole.turns[0].state_ids)
