"""Evaluations: every way of answering over held-out problems, kept as Parquet, summed up with intervals.

problems, in chunks ─> Evaluator ─> AnswerWorkers ─> predictions/<way>/<first>.parquet, one file a chunk
(or seeds)                          (AgentWorkers)      │ a chunk that is there is not asked again
                                                        v
                                 figures: accuracy, pass@k, majority, best; tokens and seconds a problem
                                          (of episodes: return, best return, share solved, turns)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cola_ray.algorithms.search import majority, mean_interval, pass_at_k
from cola_ray.config import EvalConfig
from cola_ray.controller import Controller


class Evaluator(Controller):
    """The controller's workers without its learner."""

    async def open(self) -> dict[str, Any]:
        """Wait for the workers; returns facts of the task."""
        self._spawn(self._watch_for_stalls())
        self.facts = await self._ask(self.seats[0], "facts")
        return self.facts

    async def answer(self, indices: Sequence[int], way: str) -> pa.Table:
        """One row a problem, or environment seed, in order; a worker's death costs its share's time."""
        answered = await self._share_out(indices, "answer", way)
        return pa.Table.from_pylist([{"way": way, **asdict(one)} for one in answered])


def chunks(config: EvalConfig, num_heldout: int, folder: Path) -> Iterator[tuple[str, list[int], Path]]:
    """(way, problems, file) of what is still to be asked."""
    last = min(config.problems, num_heldout)
    for way in config.ways:
        for first in range(0, last, config.chunk):
            file = folder / way / f"{first:06d}.parquet"
            indices = list(range(first, min(first + config.chunk, last)))
            if not (file.exists() and pq.read_metadata(file).num_rows == len(indices)):
                yield way, indices, file


def figures(config: EvalConfig, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Of each way: shares of problems, each with the half-width of its 95 % bootstrap interval as ``<name>_ci``.

    ``accuracy`` is of the first response, ``majority`` of the answer that most responses give, ``best`` of the response
    of the highest value; where a reward model gives values, ``weighted_majority`` counts votes by them, and the
    verifier's ``best`` is ``any_right``. ``pass_at_<k>`` is unbiased. A right response has reward 1.
    """
    draw = np.random.default_rng(seed)
    found: dict[str, dict[str, float]] = {}
    for way in config.ways:
        rows = _rows(folder / way)
        shares: dict[str, list[float]] = {"accuracy": [float(row["rewards"][0] >= 1.0) for row in rows]}
        if max(len(row["rewards"]) for row in rows) > 1:
            shares["majority"] = [_voted(row["answers"], row["rewards"]) for row in rows]
            shares["best"] = [float(row["rewards"][int(np.argmax(row["values"]))] >= 1.0) for row in rows]
            if any(row["values"] != row["rewards"] for row in rows):
                weighted = [_voted(row["answers"], row["rewards"], _weights(row["values"])) for row in rows]
                shares |= {"weighted_majority": weighted, "any_right": [float(max(r["rewards"]) >= 1.0) for r in rows]}
        if way == "sample":
            for k in config.ks:
                if k <= min(len(row["rewards"]) for row in rows):
                    right = [(len(row["rewards"]), sum(r >= 1.0 for r in row["rewards"])) for row in rows]
                    shares[f"pass_at_{k}"] = [pass_at_k(n, c, k) for n, c in right]
        of_way = {"problems": float(len(rows))} | _with_intervals(shares, draw)
        for name in ("generated_tokens", "computed_tokens", "seconds"):
            of_way[name] = float(np.mean([row[name] for row in rows]))
        found[way] = of_way
    return found


def episode_figures(config: EvalConfig, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Of each way of playing: means over environment seeds, with intervals as :func:`figures` has them.

    ``return``, ``solved`` and ``turns`` are means over a seed's episodes, ``best_return`` is of the best of them.
    Episodes that their environment failed are counted in ``failed`` and nowhere else.
    """
    draw = np.random.default_rng(seed)
    found: dict[str, dict[str, float]] = {}
    for way in config.ways:
        rows = _rows(folder / way)
        means: dict[str, list[float]] = {"return": [], "best_return": [], "solved": [], "turns": []}
        for row in rows:
            counted = [place for place, failure in enumerate(row["failures"]) if not failure]
            if not counted:
                continue
            returns = [row["returns"][place] for place in counted]
            means["return"].append(float(np.mean(returns)))
            means["best_return"].append(max(returns))
            for name in ("solved", "turns"):
                means[name].append(float(np.mean([row[name][place] for place in counted])))
        failed = sum(bool(failure) for row in rows for failure in row["failures"])
        of_way = {"problems": float(len(rows)), "failed": float(failed)}
        found[way] = of_way | (_with_intervals(means, draw) if means["return"] else {})
        for name in ("generated_tokens", "seconds"):
            found[way][name] = float(np.mean([row[name] for row in rows]))
    return found


def _rows(folder: Path) -> list[dict[str, Any]]:
    return pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("*.parquet"))).to_pylist()


def _with_intervals(samples: Mapping[str, Sequence[float]], draw: np.random.Generator) -> dict[str, float]:
    """Means, and half the width of their intervals as ``<name>_ci``."""
    out: dict[str, float] = {}
    for name, values in samples.items():
        low, high = mean_interval(values, draw)
        out |= {name: float(np.mean(values)), f"{name}_ci": (high - low) / 2}
    return out


def _voted(answers: Sequence[str], rewards: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Whether the majority's answer is right."""
    return float(rewards[answers.index(majority(answers, weights))] >= 1.0)


def _weights(values: Sequence[float]) -> list[float]:
    """Votes by a reward model: logits have any sign, so by its odds."""
    return [float(weight) for weight in np.exp(np.subtract(values, max(values)))]
