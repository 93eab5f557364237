"""What the shop has and what a customer wants: products made from a number, a search, instructions, and the reward.

catalogue(48, seed=0) ─> Catalogue.products             the same ones for the same numbers, in every process
                             │    Catalogue.search("red cotton shirt") ─> products, best first
                             v
instruction(catalogue, seed) ─> Goal ─┐
             a purchase: Product, chosen options ─> reward ─> 0 to 1
"""

import functools
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cola_ray.tasks.environment import HELD_OUT
from cola_ray.tasks.protocol import split_of


@dataclass(frozen=True)
class Department:
    """Types of products that come in the same materials, with the same features and options."""

    types: tuple[str, ...]
    materials: tuple[str, ...]
    features: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]


_COLORS: dict[str, tuple[str, ...]] = {"color": ("red", "blue", "green", "black")}
_SIZES: dict[str, tuple[str, ...]] = {"size": ("small", "medium", "large")}
DEPARTMENTS = (
    Department(("shirt", "jacket", "dress"), ("cotton", "wool", "linen"), ("soft", "warm", "washable"),
               _COLORS | _SIZES),
    Department(("mug", "bowl", "kettle"), ("steel", "glass", "clay"), ("light", "strong", "stackable"), _COLORS),
    Department(("lamp", "chair", "shelf"), ("wood", "metal", "bamboo"), ("sturdy", "foldable", "compact"),
               _COLORS | _SIZES),
)  # fmt: skip
FEWEST = 12
"""Products with which both splits have instructions."""
_K1, _B = 0.9, 0.4
"""BM25's parameters, as in Anserini, whose defaults WebShop's search has."""


@dataclass(frozen=True)
class Product:
    id: str
    department: Department
    type: str
    material: str
    feature: str
    """Only the description names it."""
    price: int
    """In dollars; never a multiple of 10, as all limits are, so that "less than" and "at most" are the same."""
    options: Mapping[str, tuple[str, ...]]
    """By name, the values that it comes in."""

    @property
    def title(self) -> str:
        return f"{self.material} {self.type}"

    @property
    def description(self) -> str:
        return f"This {self.title} is {self.feature}."

    @property
    def attributes(self) -> frozenset[str]:
        return frozenset((self.material, self.feature))


@dataclass(frozen=True)
class Goal:
    """What a customer wants: a product that there is, with one of each of its options.

    Attributes:
        feature: "" where any will do.
        limit: of the price.
    """

    product: Product
    feature: str
    options: Mapping[str, str]
    limit: int

    @property
    def attributes(self) -> frozenset[str]:
        return frozenset(filter(None, (self.product.material, self.feature)))

    @property
    def words(self) -> str:
        """All that a search can look for."""
        words = self.options["color"], self.product.title, self.feature, self.options.get("size", "")
        return " ".join(filter(None, words))

    @property
    def instruction(self) -> str:
        """Example: "I want a red cotton shirt that is soft, size large, for less than 30 dollars"."""
        feature = f" that is {self.feature}" if self.feature else ""
        size = f", size {self.options['size']}" if "size" in self.options else ""
        return (
            f"I want a {self.options['color']} {self.product.title}{feature}{size}, for less than {self.limit} dollars"
        )


def reward(goal: Goal, bought: Product, chosen: Mapping[str, str]) -> float:
    """WebShop's reward for a purchase (Yao et al. 2022, arXiv 2207.01206, equation 1), from 0 to 1.

        r = r_type * (|U_att ∩ Y_att| + |U_opt ∩ Y_opt| + 1[y_price <= u_price]) / (|U_att| + |U_opt| + 1)

    U are the attributes, options and price limit that were wanted, Y those of what was bought, its options as chosen.
    WebShop reads r_type, one of 0, 0.1, 0.5 and 1, off the nouns that two titles share and the products' categories.
    Here types are known: 1 for the wanted one, 0.5 for another of its department, 0 for all others.
    """
    r_type = 0.5 if bought.department is goal.product.department else 0.0
    if bought.type == goal.product.type:
        r_type = 1.0
    met = len(goal.attributes & bought.attributes) + len(goal.options.items() & chosen.items())
    return r_type * (met + (bought.price <= goal.limit)) / (len(goal.attributes) + len(goal.options) + 1)


class Catalogue:
    """Products, and BM25 over their titles, descriptions and options (Robertson & Zaragoza 2009, equation 3.15).

    A product's score is the sum over the words of a query of

        log(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 * (1 - b + b * length / mean length))

    for N products, n of which have the word, f times in this one. (No library that is installed has BM25.)
    """

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products
        self.by_id = {product.id: product for product in products}
        documents = [Counter(_words(_document(product))) for product in products]
        having = Counter(itertools.chain.from_iterable(documents))
        mean_length = sum(document.total() for document in documents) / len(documents)
        self._scores: dict[str, dict[int, float]] = {word: {} for word in having}
        for index, document in enumerate(documents):
            norm = _K1 * (1 - _B + _B * document.total() / mean_length)
            for word, count in document.items():
                rarity = math.log1p((len(documents) - having[word] + 0.5) / (having[word] + 0.5))
                self._scores[word][index] = rarity * count / (count + norm)

    def search(self, query: str) -> list[Product]:
        """Products with any of the words, best first, and in the catalogue's order where they are equally good."""
        found = Counter[int]()
        for word in _words(query):
            found.update(self._scores.get(word, {}))
        return [self.products[index] for index in sorted(found, key=lambda index: (-found[index], index))]


def _document(product: Product) -> str:
    return " ".join((product.title, product.description, *itertools.chain(*product.options.values())))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


@functools.lru_cache(maxsize=4)
def catalogue(num_products: int, seed: int) -> Catalogue:
    """As many products, which the seed determines: all types in turn, everything else drawn."""
    draw = random.Random(seed)
    types = [(department, type_) for department in DEPARTMENTS for type_ in department.types]
    digits = len(str(num_products - 1))
    numbers = draw.sample(range(num_products), num_products)  # so that an id tells nothing
    products = []
    for number, (department, type_) in zip(numbers, itertools.cycle(types), strict=False):
        options = {
            name: tuple(sorted(draw.sample(values, draw.randint(2, len(values))), key=values.index))
            for name, values in department.options.items()
        }
        price = 10 * draw.randint(1, 5) + draw.randint(1, 9)
        products.append(Product(f"b{number:0{digits}}", department, type_, draw.choice(department.materials),
                                draw.choice(department.features), price, options))  # fmt: skip
    return Catalogue(products)


def instruction(goods: Catalogue, seed: int) -> Goal:
    """What the seed's customer wants; those of seeds from ``HELD_OUT`` on want what no other does."""
    draw, split = random.Random(seed), "heldout" if seed >= HELD_OUT else "train"
    while True:
        product = draw.choice(goods.products)
        options = {name: draw.choice(values) for name, values in product.options.items()}
        limit = product.price - product.price % 10 + 10 * draw.randint(1, 2)
        goal = Goal(product, product.feature if draw.random() < 0.5 else "", options, limit)
        if split_of(goal.instruction) == split:
            return goal
