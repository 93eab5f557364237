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

from cola_ray.algorithms.intervals import with_intervals
from cola_ray.algorithms.search import majority, pass_at_k, vote_weights
from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.workers import WorkerGroup, WorkerPool
from cola_ray.settings.config import Config, EvalConfig

Row = dict[str, Any]


class Evaluator:
    """A group of workers without a learner."""

    def __init__(self, config: Config, pool: WorkerPool) -> None:
        self.config, self.supervisor = config, Supervisor(config.cluster.stall_timeout_s)
        self.workers = WorkerGroup(config.rollout, pool, self.supervisor)

    async def open(self) -> dict[str, Any]:
        """Wait for the workers; returns facts of the task. ValueError where it has nothing to ask."""
        async with self.supervisor.opening(f"starting {self.workers}"):
            facts = await self.workers.start()
            split = self.config.eval.split
            if not facts[f"num_{split}"]:
                raise ValueError(
                    f"eval.split = {split!r}: {self.config.task.name} has no such problem, or none within "
                    f"rollout.max_prompt_tokens = {self.config.rollout.max_prompt_tokens}; give the other split, or a "
                    "longer prompt"
                )
        return facts

    async def answer(self, indices: Sequence[int], way: str) -> pa.Table:
        """One row a problem, or environment seed, in order; a worker's death costs its share's time.

        Raises:
            RuntimeError: a worker gave no answer for ``cluster.stall_timeout_s``, or died too often.
        """
        answered = await self.supervisor.guard(self.workers.dispatch(indices, "answer", way))
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


def figures(config: EvalConfig, folder: Path, seed: int, right_from: float | None = 1.0) -> dict[str, dict[str, float]]:
    """Of each way: shares and means over problems, with their 95 % intervals as ``<name>_low`` and ``<name>_high``.

    ``accuracy`` and ``reward`` are of the first response, ``majority`` is of the answer that most responses give, by
    value, ``best`` and ``best_reward`` are of the response of the highest value; where a reward model gives values,
    ``weighted_majority`` counts votes by them, and the verifier's ``best`` is ``any_right``. ``pass_at_<k>`` is
    unbiased. A problem that got no response in its time is ``unanswered``, wrong, and has the reward 0. ``failed``
    counts responses that verifier or reward model could not score; those of the verifier are not right, and in no mean
    of rewards.

    Args:
        right_from: the least reward of a right response; None where the task does not say what is right.
    """
    found: dict[str, dict[str, float]] = {}
    for way in config.ways:
        rows = _rows(config, folder / way)
        if not rows:
            continue
        means = {"reward": _rewards(rows, [0] * len(rows))}
        if max(len(row["rewards"]) for row in rows) > 1:
            means["best_reward"] = _rewards(rows, [_best(row) for row in rows])
        shares = {} if right_from is None else _shares(config, rows, way, right_from)
        found[way] = {
            "problems": float(len(rows)),
            **with_intervals(shares, seed, shares=True),
            **with_intervals(means, seed),
            "failed": float(sum(_failed(row) for row in rows)),
            "unanswered": float(sum(not row["rewards"] for row in rows)),
            **{name: float(np.mean([row[name] for row in rows])) for name in _SPENT},
        }
    return found


_SPENT = ("generated_tokens", "computed_tokens", "seconds")


def _shares(config: EvalConfig, rows: Sequence[Row], way: str, right_from: float) -> dict[str, list[float]]:
    """1 or 0 a problem, or for ``pass_at_<k>`` a probability."""
    scored = [list(zip(row["rewards"], _failures(row), strict=True)) for row in rows]
    right = [[reward >= right_from and not failure for reward, failure in row] for row in scored]
    shares = {"accuracy": [float(any(one[:1])) for one in right]}
    fewest, most = (of(len(one) for one in right) for of in (min, max))
    if most > 1:
        pairs = list(zip(rows, right, strict=True))
        shares["majority"] = [_voted(row["answers"], one) for row, one in pairs]
        shares["best"] = [float(any(one) and one[_best(row)]) for row, one in pairs]
        if any(_is_led(row) for row in rows):
            weighted = [_voted(row["answers"], one, vote_weights(row["values"])) for row, one in pairs]
            shares |= {"weighted_majority": weighted, "any_right": [float(any(one)) for one in right]}
    if way == "sample":
        shares |= {
            f"pass_at_{k}": [pass_at_k(len(one), sum(one), k) for one in right] for k in config.ks if k <= fewest
        }
    return shares


def remarks(config: EvalConfig, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What figures do not say by themselves, a line each."""
    lines = []
    sample = found.get("sample", {})
    too_few = [str(k) for k in config.ks if "accuracy" in sample and f"pass_at_{k}" not in sample]
    if too_few:
        lines.append(
            f"pass@k of k = {', '.join(too_few)} is left out: some problem has fewer samples; give more "
            "--search.simulations, or smaller --eval.ks"
        )
    for way, figures in found.items():
        if figures.get("unanswered"):
            lines.append(
                f"{way}: {figures['unanswered']:.0f} of {figures['problems']:.0f} problems had no answer within "
                "search.max_seconds and count as wrong"
            )
        if figures.get("failed"):
            lines.append(f"{way}: {figures['failed']:.0f} responses or episodes failed to be scored or played")
    return lines


def episode_figures(config: EvalConfig, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Of each way of playing: means over environment seeds, with intervals as :func:`figures` has them.

    ``return``, ``solved`` and ``turns`` are means over a seed's episodes, ``best_return`` is of the best of them.
    Episodes that their environment failed are counted in ``failed`` and nowhere else.
    """
    found: dict[str, dict[str, float]] = {}
    for way in config.ways:
        rows = _rows(config, folder / way)
        if not rows:
            continue
        means: dict[str, list[float]] = {"return": [], "best_return": [], "turns": []}
        solved: list[float] = []
        for row in rows:
            counted = [place for place, failure in enumerate(row["failures"]) if not failure]
            if not counted:
                continue
            returns = [row["returns"][place] for place in counted]
            means["return"].append(float(np.mean(returns)))
            means["best_return"].append(max(returns))
            means["turns"].append(float(np.mean([row["turns"][place] for place in counted])))
            solved.append(float(np.mean([row["solved"][place] for place in counted])))
        failed = sum(bool(failure) for row in rows for failure in row["failures"])
        found[way] = {"problems": float(len(rows)), "failed": float(failed), **with_intervals(means, seed)}
        found[way] |= with_intervals({"solved": solved}, seed, shares=True)
        for name in ("generated_tokens", "seconds"):
            found[way][name] = float(np.mean([row[name] for row in rows]))
    return found


def _rows(config: EvalConfig, folder: Path) -> list[Row]:
    """Of the chunks that these settings make; an earlier run with others may have left more."""
    files = [file for file in sorted(folder.glob("*.parquet"))
             if int(file.stem) % config.chunk == 0 and int(file.stem) < config.problems]  # fmt: skip
    tables = [pq.read_table(file) for file in files]
    # A chunk without a single answer does not know the type of its columns.
    return pa.concat_tables(tables, promote_options="permissive").to_pylist()[: config.problems] if tables else []


def _failures(row: Row) -> list[str]:
    """Why the verifier did not score a response, "" where it did."""
    return row.get("failures") or [""] * len(row["rewards"])


def _failed(row: Row) -> int:
    """Responses without a reward or a value."""
    pairs = zip(_failures(row), row["values"], strict=True)
    return sum(bool(failure) or not np.isfinite(value) for failure, value in pairs)


def _is_led(row: Row) -> bool:
    """Whether something else than the verifier gave the values."""
    pairs = zip(row["values"], row["rewards"], strict=True)
    return any(value != reward for value, reward in pairs if np.isfinite(value))


def _best(row: Row) -> int:
    """Of the highest value; of equals, and of none, the first."""
    return int(np.argmax(row["values"])) if row["values"] else 0


def _rewards(rows: Sequence[Row], places: Sequence[int]) -> list[float]:
    """The reward of one response of each problem, where there is one."""
    pairs = zip(rows, places, strict=True)
    return [row["rewards"][place] if row["rewards"] else 0.0
            for row, place in pairs if not any(_failures(row)[place : place + 1])]  # fmt: skip


def _voted(answers: Sequence[str], right: Sequence[bool], weights: Sequence[float] | None = None) -> float:
    """Whether the majority's answer is right: one of the responses that give it."""
    chosen = majority([answer or None for answer in answers], weights)
    return float(any(one for answer, one in zip(answers, right, strict=True) if answer == chosen))
