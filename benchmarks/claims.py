"""Every claim about latent actions that was tried here, and whether it holds: one table, from docs/results/*.json.

python benchmarks/claims.py

    docs/results/TABLE.json ─> a difference with its 95 % interval ─> holds, does not hold, cannot be said at this scale
                                                                      ─> docs/small-scale.md

A claim says that a difference is above a threshold. It holds, or does not, if the whole interval lies on one side of
the threshold. Differences are taken within each seed, and intervals are Student's t over seeds. Where a table has
figures of one model with intervals over problems, the interval of the difference is Newcombe's (1998, method 10), which
takes the two for independent and is therefore too wide for answers to the same problems. Nothing is run here: the
tables' own commands are in docs/benchmarks.md.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from record import RESULTS, record

from cola_ray.algorithms.intervals import seed_interval
from cola_ray.studies.report import verdict

Interval = tuple[float, float]
Found = tuple[float, Interval | None]
"""A difference, and its interval; None with one seed."""
Figures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """What is claimed, and where it was tried.

    Args:
        model: what it was tried with.
        says: the claim.
        table: the file in docs/results that it is read from.
        found: computes the difference from the table's figures.
        above: the claim holds if the difference is above this.
        unit: of the difference.
    """

    model: str
    says: str
    table: str
    found: Callable[[Figures], Found]
    above: float = 0.0
    unit: str = "points"


def over_seeds(differences: Sequence[float]) -> Found:
    return float(np.mean(differences)), seed_interval(differences)


def within_seeds(row: str, other: str, column: str = "ends", scale: float = 100.0) -> Callable[[Figures], Found]:
    """``row`` minus ``other``, from a column that has a value for each seed."""
    return lambda figures: over_seeds([
        scale * (one - another) for one, another in zip(figures[row][column], figures[other][column], strict=True)
    ])  # fmt: skip


def known(row: str, column: str) -> Callable[[Figures], Found]:
    """A column that has its own interval."""

    def found(figures: Figures) -> Found:
        low, high = figures[row][f"{column}_low"], figures[row][f"{column}_high"]
        return figures[row][column], None if low is None else (low, high)

    return found


def newcombe(row: str, other: str) -> Callable[[Figures], Found]:
    """``row`` minus ``other`` in points, from shares of problems with Wilson's intervals."""

    def found(figures: Figures) -> Found:
        (share, low, high), (share_2, low_2, high_2) = (
            [figures[name][column] for column in ("right", "low", "high")] for name in (row, other)
        )
        below = math.hypot(share - low, high_2 - share_2)
        over = math.hypot(high - share, share_2 - low_2)
        return 100 * (share - share_2), (100 * (share - share_2 - below), 100 * (share - share_2 + over))

    return found


def _against_base(row: str) -> Callable[[Figures], Found]:
    """A row's accuracy of each seed minus the base's, in points."""
    return lambda figures: over_seeds([
        100 * (one - figures["base"]["accuracy"]) for one in figures[row]["each_accuracy"]
    ])  # fmt: skip


def _less_plausible(figures: Figures) -> Found:
    """By how many nats per token more the base's surprise at sampled answers grows over tokens."""
    grows = {
        space: np.subtract(figures[space]["each_nats_last"], figures[space]["each_nats_first"])
        for space in ("token", "latent")
    }
    return over_seeds(list(grows["token"] - grows["latent"]))


CLAIMS = (
    Claim("SmolLM2-135M", "RL over latent actions gains at least 15 points", "language",
          known("latent", "gain_points"), above=15.0),
    Claim("SmolLM2-135M", "RL over tokens gains at least 15 points", "language", known("token", "gain_points"),
          above=15.0),
    Claim("SmolLM2-135M", "latent actions end as high as tokens, or higher, after as many samples", "language",
          within_seeds("latent", "token")),
    Claim("SmolLM2-135M", "latent actions end at most 5 points below tokens in as many seconds (100 steps against 40)",
          "language", within_seeds("latent_100_steps", "token"), above=-5.0),
    Claim("SmolLM2-135M", "adapters (LoRA) end at most 5 points below all weights", "language",
          within_seeds("lora", "token"), above=-5.0),
    Claim("SmolLM2-135M", "steering vectors for all layers gain at least 5 points", "language",
          known("steering_all", "gain_points"), above=5.0),
    Claim("SmolLM2-135M", "without a KL penalty, latent actions end at most 5 points below a coefficient of 0.01",
          "language", within_seeds("latent", "latent_kl"), above=-5.0),
    Claim("SmolLM2-135M", "a KL coefficient of 0.01 costs tokens at most 5 points", "language",
          within_seeds("token_kl", "token"), above=-5.0),
    Claim("SmolLM2-135M", "RL makes answers less plausible to the base over tokens than over latent actions",
          "language_answers", _less_plausible, unit="nats"),
    Claim("SmolLM2-135M", "RL over tokens loses at most 5 points of a capability", "language_kept",
          _against_base("token"), above=-5.0),
    Claim("SmolLM2-135M", "RL over latent actions loses at most 5 points of a capability", "language_kept",
          _against_base("latent"), above=-5.0),
    Claim("tiny", "latent actions end at most 5 points below tokens", "trained_parts", within_seeds("latent", "token"),
          above=-5.0),
    Claim("tiny", "adapters (LoRA) end at most 5 points below all weights", "trained_parts",
          within_seeds("lora", "token"), above=-5.0),
    Claim("tiny", "steering vectors for all layers end at most 5 points below all weights", "trained_parts",
          within_seeds("steering_all", "token"), above=-5.0),
    Claim("tiny", "without a KL penalty, latent actions fall less into a reward's hole than tokens", "reward_hole",
          within_seeds("token KL 0", "latent KL 0", "each_hole")),
    Claim("tiny", "a KL coefficient of 0.01 keeps tokens at least 5 points more out of the hole than none",
          "reward_hole", within_seeds("token KL 0", "token KL 0.01", "each_hole"), above=5.0),
    Claim("tiny", "a KL coefficient of 0.1 keeps tokens at least 5 points more out of the hole than none",
          "reward_hole", within_seeds("token KL 0", "token KL 0.1", "each_hole"), above=5.0),
    Claim("tiny", "a KL coefficient of 0.1 keeps latent actions at least 5 points more out of the hole than none",
          "reward_hole", within_seeds("latent KL 0", "latent KL 0.1", "each_hole"), above=5.0),
    Claim("tiny", "ETPO ends higher than GRPO after as many samples", "algorithms", within_seeds("etpo", "grpo")),
    Claim("tiny", "ETPO without an actor ends at most 5 points below ETPO", "algorithms",
          within_seeds("actor_free", "etpo"), above=-5.0),
    Claim("tiny, agents", "ArCHer's return ends higher than PPO's after as many episodes", "agents",
          within_seeds("archer", "ppo", "each_last", 1.0), unit="return"),
    Claim("tiny, agents", "ArCHer as in the paper ends higher than PPO", "agents",
          within_seeds("archer_alone", "ppo", "each_last", 1.0), unit="return"),
    Claim("tiny, agents", "GiGPO ends higher than GRPO", "agents",
          within_seeds("gigpo", "grpo", "each_last", 1.0), unit="return"),
    Claim("tiny", "actions that last four tokens end at most 2 points below actions of one", "lasting",
          within_seeds("4", "1"), above=-2.0),
    Claim("tiny", "MCTS with 16 responses finds more right answers than greedy decoding", "search",
          newcombe("mcts, 16 responses", "greedy")),
    Claim("tiny", "MCTS-Q finds more right answers than the best of as many samples", "search",
          newcombe("mcts_q, 16 responses", "best-of-n, 16 responses")),
    Claim("tiny", "with a perfect judge, MCTS finds more than samples contain", "search",
          newcombe("mcts (oracle), 16 responses", "pass@n (oracle), 16 responses")),
)  # fmt: skip


def row_of(claim: Claim) -> dict[str, Any]:
    """The claim's row; its verdict is "not measured" if there is no such table yet."""
    file = RESULTS / f"{claim.table}.json"
    result = json.loads(file.read_text()) if file.exists() else {"figures": {}, "seeds": []}
    try:
        difference, interval = claim.found(result["figures"])
    except KeyError:
        return {"model": claim.model, "found": "-", "interval": "-", "seeds": 0, "verdict": "not measured",
                "table": claim.table}  # fmt: skip
    form = "{:+.2f}" if claim.unit == "nats" else "{:+.1f}"
    shown = "-" if interval is None else " to ".join(map(form.format, interval))
    return {
        "model": claim.model,
        "found": f"{form.format(difference)} {claim.unit}",
        "interval": shown,
        "seeds": len(result["seeds"]),
        "verdict": verdict(interval, claim.above),
        "table": claim.table,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    seeds = sorted({seed for claim in CLAIMS if (file := RESULTS / f"{claim.table}.json").exists()
                    for seed in json.loads(file.read_text())["seeds"]})  # fmt: skip
    about = "Differences that claims are about, with 95 % intervals, and whether the claims hold."
    record("claims", {claim.says: row_of(claim) for claim in CLAIMS}, seeds, about)


if __name__ == "__main__":
    main()
