"""The shop's products, generated from a seed, with a search; the customer's instructions; and the reward.

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
"""Smallest number of products with which both splits have instructions."""
_K1, _B = 0.9, 0.4
"""BM25's parameters: the defaults of Anserini, which WebShop's search uses."""


@dataclass(frozen=True)
class Product:
    id: str
    department: Department
    type: str
    material: str
    feature: str
    """Mentioned only in the description."""
    price: int
    """In dollars; never a multiple of 10. All limits are multiples of 10, so "less than" and "at most" are the same."""
    options: Mapping[str, tuple[str, ...]]
    """The available values of each option, by its name."""

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
    """What a customer wants: an existing product, with one value for each of its options.

    Attributes:
        feature: "" if any will do.
        limit: limit of the price.
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
        """All words that a search can use."""
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

    U are the wanted attributes, options and price limit, Y those of the bought product, with the chosen options.
    WebShop derives r_type, one of 0, 0.1, 0.5 and 1, from nouns that two titles share and from the products'
    categories. Here types are known: 1 for the wanted one, 0.5 for another of its department, 0 for all others.
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

    for N products, of which n contain the word, with f occurrences in this product. (No installed library has BM25.)
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
        """Products with any of the words, best first; equally good ones are in the catalogue's order."""
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
    """``num_products`` products, determined by the seed: types in turn, everything else drawn at random."""
    draw = random.Random(seed)
    types = [(department, type_) for department in DEPARTMENTS for type_ in department.types]
    digits = len(str(num_products - 1))
    numbers = draw.sample(range(num_products), num_products)  # so that ids reveal nothing
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
    """What the seed's customer wants; customers of seeds from ``HELD_OUT`` on want what no other customer wants."""
    draw, split = random.Random(seed), "heldout" if seed >= HELD_OUT else "train"
    while True:
        product = draw.choice(goods.products)
        options = {name: draw.choice(values) for name, values in product.options.items()}
        limit = product.price - product.price % 10 + 10 * draw.randint(1, 2)
        goal = Goal(product, product.feature if draw.random() < 0.5 else "", options, limit)
        if split_of(goal.instruction) == split:
            return goal
