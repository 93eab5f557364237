"""Evaluation: answers held-out problems in several ways, keeps predictions as Parquet, and sums them up.

problems, in chunks ─> Evaluator ─> EvaluationWorkers ─> predictions/<way>/<first>.parquet, one file per chunk;
(or seeds)                          (AgentWorkers)      │ chunks that exist are not answered again
                                                        v
                                 figures: accuracy, pass@k, majority, best; tokens and seconds per problem
                                          (of episodes: return, best return, share terminated, turns)
                                 answers.jsonl: questions and sampled answers, to pre-train on
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cola_ray.algorithms.intervals import with_intervals
from cola_ray.algorithms.search import majority, pass_at_k, vote_weights
from cola_ray.checks.refusals import check
from cola_ray.cluster import actors
from cola_ray.learner.policies import served
from cola_ray.loop.supervisor import Supervisor
from cola_ray.loop.workers import WorkerGroup, WorkerPool
from cola_ray.rollout.agent_worker import AgentWorker
from cola_ray.rollout.evaluation_worker import EvaluationWorker
from cola_ray.runs.checkpoints import write_atomically
from cola_ray.runs.display import current, print_line, shown
from cola_ray.runs.failure import explained_failures
from cola_ray.runs.figures import plot_against_tokens, print_comparison
from cola_ray.settings.config import Config, EvalConfig, is_environment
from cola_ray.studies.study import Study, open_study
from cola_ray.tasks import least_right_reward, make_task

Row = dict[str, Any]


@shown()
@explained_failures()
def evaluate(config: Config) -> dict[str, Any]:
    """Answer problems, or play episodes, in all of ``eval.ways``; writes ``output_dir/predictions``, and with the way
    sample ``output_dir/answers.jsonl``, see :func:`write_answers`.

    With ``resume``, chunks that an earlier run with the same settings has answered are not answered again.

    Returns:
        The summary: by way, the result of :func:`figures` or :func:`episode_figures`.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: the run failed; the message says why.
    """
    check(config, "evaluate")
    with open_study(config, "evaluate") as study, actors.cluster(config):
        config, folder = study.config, study.output / "predictions"
        _predict(study, folder)
        right_from = least_right_reward(config.task)
        if is_environment(config.task.name):
            found = episode_figures(config.eval, folder, config.seed)
            plotted = ["return", "best_return"]
        else:
            found = figures(config.eval, folder, config.seed, right_from)
            plotted = ["reward", "best_reward"] if right_from is None else ["accuracy", "majority", "best"]
            if "sample" in config.eval.ways:
                write_answers(config, folder / "sample", study.output / "answers.jsonl")
        study.add(found)
        plot_against_tokens(study.output / "accuracy.png", found, plotted)
    print_comparison(f"{config.task.name}: {folder}", found)
    for line in remarks(config.eval, found):
        print_line(line)
    return study.tracker.summary


def _predict(study: Study, folder: Path) -> None:
    """Answer all chunks that are not in ``folder`` yet."""
    config = study.config
    reward_model = actors.reward_model(config)
    worker = AgentWorker if is_environment(config.task.name) else EvaluationWorker
    arguments = [reward_model] if reward_model else []
    pool = actors.RayWorkers(config, served(config, study.start, Path(config.output_dir)), worker, *arguments)
    evaluator = actors.controller(Evaluator, config, pool)
    try:
        current().doing(f"starting {config.rollout.num_workers} engine(s)")
        facts = ray.get(evaluator.open.remote())
        left = list(chunks(config.eval, facts[f"num_{config.eval.split}"], folder))
        for number, (way, indices, file) in enumerate(left):
            current().update(f"evaluate: {way}", number, len(left))
            rows = ray.get(evaluator.answer.remote(indices, way))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, functools.partial(pq.write_table, rows))
            current().update(f"evaluate: {way}", number + 1, len(left), milestone=True)
        current().doing("writing the summary")
    finally:
        ray.kill(evaluator)


class Evaluator:
    """A group of workers without a learner."""

    def __init__(self, config: Config, pool: WorkerPool) -> None:
        self.config, self.supervisor = config, Supervisor(config.cluster.stall_timeout_s)
        self.workers = WorkerGroup(config.rollout, pool, self.supervisor)

    async def open(self) -> dict[str, Any]:
        """Wait for the workers; returns facts about the task. ValueError if the task has no problems."""
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
        """One row per problem or environment seed, in order; if a worker dies, its share is answered again.

        Raises:
            RuntimeError: a worker gave no answer for ``cluster.stall_timeout_s``, or died too often.
        """
        answered = await self.supervisor.guard(self.workers.dispatch(indices, "answer", way))
        return pa.Table.from_pylist([{"way": way, **asdict(one)} for one in answered])


def write_answers(config: Config, folder: Path, file: Path) -> None:
    """Write one row per sampled answer, to pre-train on (``data.path``): question, answer and reward.

    Empty answers, and those cut off by ``rollout.max_new_tokens`` or ``search.max_tokens``, are left out. The reward is
    null where scoring failed.

    Args:
        folder: of the predictions.
    """
    problems, longest = make_task(config.task, config.seed).problems(config.eval.split), config.rollout.max_new_tokens

    def write(lines: IO[bytes]) -> None:
        for row in _rows(config.eval, folder):
            answers = zip(row["texts"], row["token_ids"], row["rewards"], _failures(row), strict=True)
            cut = row["ended_by"] == "tokens" and len(row["texts"]) == 1  # a cut one is only kept if it is alone
            for text, ids, reward, failure in answers:
                if text.strip() and len(ids) < longest and not cut:
                    found = {"question": problems[row["index"]].question, "answer": text,
                             "reward": None if failure else reward}  # fmt: skip
                    lines.write(f"{json.dumps(found)}\n".encode())

    write_atomically(file, write)


def chunks(config: EvalConfig, num_heldout: int, folder: Path) -> Iterator[tuple[str, list[int], Path]]:
    """The chunks that are not answered yet, as (way, problem indices, file)."""
    last = min(config.problems, num_heldout)
    for way in config.ways:
        for first in range(0, last, config.chunk):
            file = folder / way / f"{first:06d}.parquet"
            indices = list(range(first, min(first + config.chunk, last)))
            if not (file.exists() and pq.read_metadata(file).num_rows == len(indices)):
                yield way, indices, file


def figures(config: EvalConfig, folder: Path, seed: int, right_from: float | None = 1.0) -> dict[str, dict[str, float]]:
    """For each way, shares and means over problems, with 95 % intervals as ``<name>_low`` and ``<name>_high``.

    - ``accuracy`` and ``reward``: of the first response.
    - ``majority``: self-consistency (Wang et al. 2023), the answer that most responses give, or of several such answers
      the earliest; answers are compared by value.
    - ``best`` and ``best_reward``: of the response with the highest value. With a reward model this is best-of-n.
      Without one the verifier chooses, as an oracle: ``best`` is then pass@n of all n responses, which cannot be
      reached without knowing what is right.
    - ``pass_at_<k>``: the unbiased estimate.
    - ``weighted_majority`` and ``any_right``, if a reward model gives the values: votes weighted by value, and the
      share of problems with any right response.
    - ``responses``, ``generated_tokens`` and other costs: means over problems.
    - ``unanswered``: problems without a response in time; they are wrong and have reward 0.
    - ``failed``: responses that the verifier or the reward model could not score. Those that the verifier could not
      score are not right, and are left out of mean rewards.

    Args:
        folder: of the predictions.
        seed: of the bootstrap.
        right_from: the lowest reward of a right response; None if the task does not say what is right.
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
            "responses": float(np.mean([len(row["rewards"]) for row in rows])),
            **{name: float(np.mean([row[name] for row in rows])) for name in _COSTS},
        }
    return found


_COSTS = ("generated_tokens", "computed_tokens", "seconds")


def _shares(config: EvalConfig, rows: Sequence[Row], way: str, right_from: float) -> dict[str, list[float]]:
    """For each share, a value per problem: 0 or 1, or for ``pass_at_<k>`` a probability."""
    scored = [list(zip(row["rewards"], _failures(row), strict=True)) for row in rows]
    right = [[reward >= right_from and not failure for reward, failure in row] for row in scored]
    shares = {"accuracy": [float(any(one[:1])) for one in right]}
    fewest, most = min(map(len, right)), max(map(len, right))
    if most > 1:
        pairs = list(zip(rows, right, strict=True))
        shares["majority"] = [_voted(row["answers"], one) for row, one in pairs]
        shares["best"] = [float(any(one) and one[_best(row)]) for row, one in pairs]
        if any(_has_other_values(row) for row in rows):
            weighted = [_voted(row["answers"], one, vote_weights(row["values"])) for row, one in pairs]
            shares |= {"weighted_majority": weighted, "any_right": [float(any(one)) for one in right]}
    if way == "sample":
        shares |= {
            f"pass_at_{k}": [pass_at_k(len(one), sum(one), k) for one in right] for k in config.ks if k <= fewest
        }
    return shares


def remarks(config: EvalConfig, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Remarks on the figures, one line each: missing pass@k, who chose, unanswered and failed problems."""
    lines = []
    sample = found.get("sample", {})
    too_few = [str(k) for k in config.ks if "accuracy" in sample and f"pass_at_{k}" not in sample]
    if too_few:
        lines.append(
            f"pass@k of k = {', '.join(too_few)} is left out: some problem has fewer samples; give more "
            "--search.simulations, or smaller --eval.ks"
        )
    oracle = [way for way, figures in found.items() if "best" in figures and "any_right" not in figures]
    if oracle:
        lines.append(
            f"best of {', '.join(oracle)}: chosen by the verifier, which knows what is right (pass@n); what a user "
            "gets is majority, or best with --task.reward-model"
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
    """For each way of playing, means over environment seeds, with intervals as in :func:`figures`.

    ``return``, ``terminated`` and ``turns`` are means over a seed's episodes, ``best_return`` is that of the best one.
    Episodes whose environment failed are counted in ``failed`` and left out otherwise.
    """
    found: dict[str, dict[str, float]] = {}
    for way in config.ways:
        rows = _rows(config, folder / way)
        if not rows:
            continue
        means: dict[str, list[float]] = {"return": [], "best_return": [], "turns": []}
        terminated: list[float] = []
        for row in rows:
            counted = [place for place, failure in enumerate(row["failures"]) if not failure]
            if not counted:
                continue
            returns = [row["returns"][place] for place in counted]
            means["return"].append(float(np.mean(returns)))
            means["best_return"].append(max(returns))
            means["turns"].append(float(np.mean([row["turns"][place] for place in counted])))
            terminated.append(float(np.mean([row["terminated"][place] for place in counted])))
        failed = sum(bool(failure) for row in rows for failure in row["failures"])
        found[way] = {"problems": float(len(rows)), "failed": float(failed), **with_intervals(means, seed)}
        found[way] |= with_intervals({"terminated": terminated}, seed, shares=True)
        for name in ("generated_tokens", "seconds"):
            found[way][name] = float(np.mean([row[name] for row in rows]))
    return found


def _rows(config: EvalConfig, folder: Path) -> list[Row]:
    """Rows of the chunks that these settings have; an earlier run with other settings may have left more files."""
    files = [file for file in sorted(folder.glob("*.parquet"))
             if int(file.stem) % config.chunk == 0 and int(file.stem) < config.problems]  # fmt: skip
    tables = [pq.read_table(file) for file in files]
    # permissive: in a chunk without any answer the types of columns are unknown
    return pa.concat_tables(tables, promote_options="permissive").to_pylist()[: config.problems] if tables else []


def _failures(row: Row) -> list[str]:
    """For each response, why the verifier could not score it; "" if it could."""
    return row.get("failures") or [""] * len(row["rewards"])


def _failed(row: Row) -> int:
    """Number of responses without a reward or a value."""
    pairs = zip(_failures(row), row["values"], strict=True)
    return sum(bool(failure) or not np.isfinite(value) for failure, value in pairs)


def _has_other_values(row: Row) -> bool:
    """Whether the values come from a reward model rather than from the verifier."""
    pairs = zip(row["values"], row["rewards"], strict=True)
    return any(value != reward for value, reward in pairs if np.isfinite(value))


def _best(row: Row) -> int:
    """Index of the response with the highest value, the first of equals; 0 if there is none."""
    return int(np.argmax(row["values"])) if row["values"] else 0


def _rewards(rows: Sequence[Row], places: Sequence[int]) -> list[float]:
    """The reward of a response of each problem, 0 without responses; none if the verifier could not score it."""
    pairs = zip(rows, places, strict=True)
    return [row["rewards"][place] if row["rewards"] else 0.0
            for row, place in pairs if not any(_failures(row)[place : place + 1])]  # fmt: skip


def _voted(answers: Sequence[str], right: Sequence[bool], weights: Sequence[float] | None = None) -> float:
    """1 if the answer of the majority is right, i.e. a response that gives it is; else 0."""
    chosen = majority([answer or None for answer in answers], weights)
    return float(any(one for answer, one in zip(answers, right, strict=True) if answer == chosen))
