"""A web shop as text: a small stand-in for WebShop (Yao et al. 2022, arXiv 2207.01206) without a download.

    instruction ── search[red cotton shirt] ──> results ── click[b07] ──> item ── click[Buy Now] ──> reward, 0 to 1
                                                 Next >                    click[red], click[large]: its options
                                                 < Prev                    click[Description]
       ^                                           │  ^                     │  │
       └─────────────── Back to Search ────────────┴──┼─────────────────────┘  │
                                                      └─────── < Prev ─────────┘

Actions are WebShop's, ``search[words]`` and ``click[value]`` with a value that the page shows in brackets. Anything
else is an invalid action, which costs a turn. The reward (:func:`shop_catalogue.reward`) comes with the purchase; an
episode that runs out of turns has none. A reward of 1 is a success, which every instruction allows.

Unlike WebShop's, products are generated (``shop_catalogue.py``), and they have no reviews or ratings. The instruction
is only on the first page, since the caller keeps the transcript.

    from cola_ray.tasks.shop import Shop          # in a program of your own; loads neither torch nor vLLM

    shop = Shop()
    page, info = shop.reset(seed=7)
    page, reward, terminated, truncated, info = shop.step("search[green metal chair]")
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from cola_ray.settings.limits import Count, Seed, Share
from cola_ray.tasks import shop_catalogue
from cola_ray.tasks.environment import HELD_OUT, Dialogue, Transition
from cola_ray.tasks.shop_catalogue import FEWEST, Goal, Product

INVALID = "Invalid action!\n"
BACK, NEXT, PREVIOUS, DESCRIPTION, BUY = "Back to Search", "Next >", "< Prev", "Description", "Buy Now"


@dataclass
class _Visit:
    """The complete state of an episode."""

    seed: int = 0
    turn: int = 0
    page: Literal["search", "results", "item", "description", "end"] = "search"
    query: str = ""
    number: int = 0  # of the page of results
    item: str = ""
    chosen: dict[str, str] = field(default_factory=dict)  # options of the item


class Shop:
    """One purchase per episode.

    Args:
        num_products: number of products in the shop.
        catalogue_seed: determines the products.
        max_turns: turns after which an episode is truncated.
        page_size: number of results on a page.
        skill: share of the demonstrations' decisions that are well made, see :meth:`demonstrations`.
    """

    def __init__(
        self,
        num_products: Annotated[int, Field(strict=True, ge=FEWEST, le=10_000)] = 48,
        catalogue_seed: Seed = 0,
        max_turns: Count = 15,
        page_size: Count = 3,
        skill: Share = 0.3,
    ) -> None:
        self.catalogue = shop_catalogue.catalogue(num_products, catalogue_seed)
        self.max_turns, self.page_size, self.skill = max_turns, page_size, skill
        self.visit = _Visit()
        self.goal = shop_catalogue.instruction(self.catalogue, 0)

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        self.set_state({"seed": seed})
        return f"Instruction: {self.goal.instruction}\n{self._page()}", {"instruction": self.goal.instruction}

    def step(self, utterance: str) -> Transition:
        visit, over = self.visit, self.visit.page == "end"
        visit.turn += 1
        observation = self._act(" ".join(utterance.split()))
        ended = visit.page == "end"
        reward = self._reward() if ended and not over else 0.0
        cut = visit.turn >= self.max_turns and not ended
        return observation, reward, ended, cut, {"metrics": {"success": float(reward == 1.0)}}

    def get_state(self) -> dict[str, Any]:
        return asdict(self.visit)

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.visit = _Visit(**state)
        self.goal = shop_catalogue.instruction(self.catalogue, self.visit.seed)

    def demonstrations(self, count: int, seed: int) -> list[Dialogue]:
        """Return purchases of a customer who makes a share ``skill`` of decisions well, and the others at random.

        The decisions: whether a search has all words or only the type; which result to open; whether to look at its
        options and its description, and go back if it is not the right one; and each option. With the defaults
        the mean return is about 0.6, and one purchase in seven is entirely right; with a skill of 1 all are.
        """
        draw = random.Random(seed)
        return [self._demonstration(draw) for _ in range(count)]

    def _reward(self) -> float:
        return shop_catalogue.reward(self.goal, self._item, self.visit.chosen)

    # --- pages --------------------------------------------------------------------------------------------------------

    @property
    def _item(self) -> Product:
        return self.catalogue.by_id[self.visit.item]

    def _results(self) -> tuple[list[Product], int]:
        """The results on the current page, and the number of all results."""
        found, first = self.catalogue.search(self.visit.query), self.visit.number * self.page_size
        return found[first : first + self.page_size], len(found)

    def _page(self) -> str:
        """The text of the current page, with everything that can be clicked in brackets."""
        visit = self.visit
        if visit.page == "search":
            return "[Search]\n"
        if visit.page == "description":
            return f"[{BACK}] [{PREVIOUS}]\n{self._item.description}\n"
        if visit.page == "item":
            offered = (
                f"{name}: {' '.join(f'[{value}]' for value in values)}\n" for name, values in self._item.options.items()
            )
            title = f"{self._item.title} ${self._item.price}\n"
            return f"[{BACK}] [{PREVIOUS}]\n{title}{''.join(offered)}[{DESCRIPTION}] [{BUY}]\n"
        shown, total = self._results()
        lines = [f"[{one.id}] {one.title} ${one.price}\n" for one in shown]
        turning = [f"[{PREVIOUS}]"] * (visit.number > 0) + [f"[{NEXT}]"] * self._has_next(total)
        below = f"{' '.join(turning)}\n" if turning else ""
        return f"[{BACK}] Page {visit.number + 1} ({total} results)\n{''.join(lines)}{below}"

    def _has_next(self, total: int) -> bool:
        return (self.visit.number + 1) * self.page_size < total

    def _act(self, action: str) -> str:
        """Execute an action; returns the next page."""
        visit = self.visit
        said = re.fullmatch(r"(search|click) ?\[(.+)\]", action, re.IGNORECASE)
        verb, value = (said[1].lower(), said[2].strip()) if said else ("", "")
        if verb == "search" and visit.page == "search" and value:
            visit.page, visit.query, visit.number = "results", value, 0
            return self._page()
        clickable = {shown.lower(): shown for shown in re.findall(r"\[(.+?)\]", self._page())}
        if verb != "click" or visit.page in ("search", "end") or value.lower() not in clickable:
            return INVALID
        return self._click(clickable[value.lower()])

    def _click(self, value: str) -> str:
        visit = self.visit
        if value == BACK:
            visit.page = "search"
        elif value == DESCRIPTION:
            visit.page = "description"
        elif value == BUY:
            visit.page = "end"
            return f"Your score: {self._reward():.2f}\n"
        elif value == PREVIOUS and visit.page != "results":
            visit.page = "item" if visit.page == "description" else "results"
        elif value in (PREVIOUS, NEXT):
            visit.number += 1 if value == NEXT else -1
        elif visit.page == "results":
            visit.page, visit.item, visit.chosen = "item", value, {}
        else:
            name = next(name for name, values in self._item.options.items() if value in values)
            visit.chosen[name] = value
            return f"You have clicked {value}.\n"
        return self._page()

    # --- demonstrations -----------------------------------------------------------------------------------------------

    def _demonstration(self, draw: random.Random) -> Dialogue:
        opening, _ = self.reset(seed=draw.randrange(HELD_OUT))
        turns = list[tuple[str, str]]()
        for action in self._customer(draw):
            observation, _, terminated, truncated, _ = self.step(action)
            turns.append((action, observation))
            if terminated or truncated:
                break
        return Dialogue(opening, tuple(turns))

    def _customer(self, draw: random.Random) -> Iterator[str]:
        """Yield actions, each decided by what the pages have shown so far."""

        def careful() -> bool:
            return draw.random() < self.skill

        goal, opened = self.goal, set[str]()
        yield f"search[{goal.words if careful() else goal.product.type}]"
        while True:
            results, total = self._results()
            new = [product for product in results if product.id not in opened]
            suit = [product for product in new if product.title == goal.product.title and product.price <= goal.limit]
            if not new or (not suit and self._has_next(total) and careful()):
                yield f"click[{NEXT}]"
                continue
            item = suit[0] if suit and careful() else draw.choice(new)
            opened.add(item.id)
            yield f"click[{item.id}]"
            if careful():
                if item not in suit or not _offers(item, goal):
                    yield f"click[{PREVIOUS}]"
                    continue
                if goal.feature:
                    yield f"click[{DESCRIPTION}]"
                    yield f"click[{PREVIOUS}]"
                    if item.feature != goal.feature:
                        yield f"click[{PREVIOUS}]"
                        continue
            for name, value in goal.options.items():
                offered = item.options.get(name, ())
                if value in offered and careful():
                    yield f"click[{value}]"
                elif offered and draw.random() < 0.5:
                    yield f"click[{draw.choice(offered)}]"
            yield f"click[{BUY}]"
            return


def _offers(item: Product, goal: Goal) -> bool:
    """Whether an item is available with the wanted options."""
    return all(value in item.options.get(name, ()) for name, value in goal.options.items())
