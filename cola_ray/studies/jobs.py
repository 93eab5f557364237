"""What a model is like, without training it: every study runs engines, keeps what they said, and sums it up.

    evaluate(config)   Evaluator actor ─> AnswerWorker actors                 -> predictions, figures with intervals
    diversity(config)  ContinuationWorker actors: latent actions, then tokens -> texts, how different they are
    atlas(config)      the model by itself                                    -> what each action does, a page
    capabilities(config) the evaluation harness over model and bare base      -> what CoLA kept

All return the summary they write to ``output_dir/summary.json``, and track into MLflow.
"""

import contextlib
import difflib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from cola_ray.algorithms.intervals import share_interval
from cola_ray.checks.refusals import check
from cola_ray.cluster import actors
from cola_ray.rollout.agent import AgentWorker
from cola_ray.rollout.answers import AnswerWorker
from cola_ray.rollout.continuations import CHANCES, Chance, ContinuationWorker
from cola_ray.runs import launch, resume
from cola_ray.runs.display import current, shown, tell
from cola_ray.runs.ending import in_words
from cola_ray.runs.run_folder import write_json
from cola_ray.runs.saved import write_whole
from cola_ray.runs.tracking import Tracker, plot_against_tokens, print_summary, print_ways
from cola_ray.settings.config import Config, ConfigError, RunFailedError, is_environment, override
from cola_ray.studies.atlas import Atlas
from cola_ray.studies.diversity import measure, open_encoder
from cola_ray.studies.evaluation import Evaluator, chunks, episode_figures, figures, remarks
from cola_ray.tasks import least_right_reward, to_pretrain_on
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.train import served, tracked

if TYPE_CHECKING:
    from cola_ray.learner.corpus import Document

_STEERED = 8  # actions that the atlas shows texts of


@dataclass
class _Study:
    """One under way; what it finds goes into ``summary``."""

    config: Config
    start: Path | None  # the model that is looked at; None for a plain base
    output: Path
    tracker: Tracker
    summary: dict[str, Any]

    def found(self, ways: Mapping[str, Mapping[str, float]]) -> None:
        """Figures of each way, for tracker and summary."""
        for way, of_way in ways.items():
            self.tracker.log(0, {f"{way}/{name}": value for name, value in of_way.items()})
        self.summary |= ways


@contextlib.contextmanager
def _study(config: Config, job: str) -> Iterator[_Study]:
    """A study's folder and tracker; leaves its summary."""
    begun = launch.begin(config, job)
    with begun.folder.failing():
        resume.check_inputs(begun.config, begun.start)
    start, config = begun.start, override(begun.config, {"model.path": str(begun.start or "")})
    model = str(start or config.model.base)
    about = {"preset": config.preset, "task": config.task.name, "model": model, "seed": config.seed}
    with begun.folder.failing(), tracked(begun, lambda _: about) as tracker:
        yield _Study(config, start, begun.folder.path, tracker, about)


@shown()
@in_words()
def evaluate(config: Config) -> dict[str, Any]:
    """Answer problems, or play episodes, in all of ``eval.ways``; leaves ``predictions``. Returns the summary.

    With ``resume``, chunks that an earlier run with the same settings has answered are not asked again.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: the message names the cause.
    """
    check(config, "evaluate")
    plays = is_environment(config.task.name)
    with _study(config, "evaluate") as study, actors.cluster(config):
        config, folder = study.config, study.output / "predictions"
        judge = actors.judge(config)
        worker = AgentWorker if plays else AnswerWorker
        pool = actors.RayWorkers(config, served(config, study.start), worker, *([judge] if judge else []))
        evaluator = actors.controller(Evaluator, config, pool)
        try:
            current().doing(f"starting {config.rollout.num_workers} engine(s)")
            facts = ray.get(evaluator.open.remote())
            left = list(chunks(config.eval, facts[f"num_{config.eval.split}"], folder))
            for number, (way, indices, file) in enumerate(left):
                current().update(f"evaluate: {way}", number, len(left))
                rows = ray.get(evaluator.answer.remote(indices, way))
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, functools.partial(pq.write_table, rows))
                current().update(f"evaluate: {way}", number + 1, len(left), milestone=True)
            current().doing("writing the summary")
        finally:
            ray.kill(evaluator)
        right_from = least_right_reward(config.task)
        if plays:
            found = episode_figures(config.eval, folder, config.seed)
        else:
            found = figures(config.eval, folder, config.seed, right_from)
        study.found(found)
        of_answers = ("reward", "best_reward") if right_from is None else ("accuracy", "majority", "best")
        names = ("return", "best_return") if plays else of_answers
        plot_against_tokens(study.output / "accuracy.png", found, names)
    print_ways(f"{config.task.name}: {folder}", found)
    for line in remarks(config.eval, found):
        tell(line)
    return study.tracker.summary


@shown()
@in_words()
def diversity(config: Config) -> dict[str, Any]:
    """Continue texts by chance in all of ``CHANCES``; leaves ``output_dir/continuations.parquet``. Returns the summary.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: the message names the cause.
    """
    check(config, "diversity")
    disable_progress_bar()
    current().doing("opening the sentence encoder")
    embed = open_encoder(config.diversity.encoder)
    found: dict[str, dict[str, float]] = {}
    rows = []
    with _study(config, "diversity") as study, actors.cluster(config):
        config = study.config
        prefixes = _beginnings(config, _texts(config, study.start)[1])
        if not prefixes:
            raise RunFailedError("no text to begin with", "give texts of two tokens or more as data.path")
        for space, chances in itertools.groupby(CHANCES, key=_action_space):
            of_space = override(config, {"rl.action_space": space})
            pool = actors.RayWorkers(of_space, served(of_space, study.start), ContinuationWorker)
            worker = pool.spawn()
            for chance in chances:
                current().update(f"diversity: {chance}", len(found), len(CHANCES))
                groups = ray.get(worker.continue_prefixes.remote(prefixes, config.diversity.continuations, chance))
                found[chance] = measure(groups, embed, config.seed)
                rows += [{"chance": chance, "prefix": i, "texts": texts} for i, texts in enumerate(groups)]
                current().update(f"diversity: {chance}", len(found), len(CHANCES), milestone=True)
            pool.kill(worker)
        current().doing("writing the summary")
        pq.write_table(pa.Table.from_pylist(rows), study.output / "continuations.parquet")
        study.summary["prefixes"] = len(prefixes)
        study.found(found)
    print_ways(f"diversity of continuations: {study.output}", found)
    return study.tracker.summary


def _action_space(chance: Chance) -> str:
    return "latent" if chance in ("policy", "random_actions") else "token"


@shown()
@in_words()
def atlas(config: Config) -> dict[str, Any]:
    """What each latent action does where the model learnt; leaves ``output_dir/atlas.html``.

    On ``diversity.prefixes`` x 8 texts, in this process, on a GPU where ``cluster.use_gpu`` says so. Returns the
    summary.

    Raises:
        ConfigError: before anything is loaded.
    """
    import torch

    from cola_ray.learner.corpus import pack
    from cola_ray.model.modeling_cola import CoLAForCausalLM

    check(config, "atlas")
    device, dtype = torch.device("cuda" if config.cluster.use_gpu else "cpu"), getattr(torch, config.model.dtype)
    with _study(config, "atlas") as study:
        config = study.config
        current().doing("opening the model and its texts")
        tokenizer, texts = _texts(config, study.start)
        disable_progress_bar()
        model = CoLAForCausalLM.from_pretrained(config.model.path, dtype=dtype).eval().to(device)
        few = texts[: 8 * config.diversity.prefixes]
        rows = pack(few, config.pretrain.sequence_length, 0, config.pretrain.response_only)
        found, size = Atlas(model.config.num_actions), config.pretrain.micro_batch_size
        for first in range(0, len(rows), size):
            piece = [torch.from_numpy(a[first : first + size]).to(device) for a in astuple(rows)]
            found.add(model, *piece)
            current().update("atlas: actions in the texts", min(first + size, len(rows)), len(rows))
        current().doing("atlas: texts that one action steers")
        most = found.by_usage[:_STEERED]
        for prefix in _beginnings(config, texts)[:3]:
            found.steer(model, tokenizer, prefix, most, config.rollout.max_new_tokens)
        page = study.output / "atlas.html"
        page.write_text(found.html(f"Latent actions of {study.start}", tokenizer))
        study.tracker.log(0, found.summary())
        study.summary |= {"texts": len(few), **found.summary()}
    print_summary(f"action atlas: {page}", study.tracker.summary)
    return study.tracker.summary


@shown()
@in_words()
def capabilities(config: Config) -> dict[str, Any]:
    """Score a CoLA model and its bare base on tasks of the evaluation harness; leaves ``output_dir/harness.json``.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: the message names the cause.
    """
    check(config, "capabilities")
    harness = config.harness
    current().doing("opening the evaluation harness")
    from lm_eval.tasks import TaskManager

    from cola_ray.studies.harness import score

    known = TaskManager(include_path=harness.include_path or None).all_tasks
    for name in harness.tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or ["lm_eval ls tasks"]
            raise ConfigError(f"harness.tasks = {name!r}: no such task; did you mean {near[0]}?")
    found: dict[str, dict[str, float]] = {}
    said: dict[str, Any] = {}
    with _study(config, "capabilities") as study, actors.cluster(config):
        for likelihood in harness.likelihoods:
            current().update(f"capabilities: {likelihood}", len(found), len(harness.likelihoods))
            said[likelihood] = ray.get(actors.alone(config, score, study.config, likelihood))
            found[likelihood] = _scores(said[likelihood])
            current().update(f"capabilities: {likelihood}", len(found), len(harness.likelihoods), milestone=True)
        current().doing("writing the summary")
        write_json(study.output / "harness.json", said)
        study.found(found)
    print_ways(f"kept capabilities: {study.output}", found)
    return study.tracker.summary


def _scores(said: Mapping[str, Any]) -> dict[str, float]:
    """``task metric`` of every figure, with the filter of answers where it has one, and 95 % intervals.

    Wilson's for shares of questions, which the harness gives the standard error sqrt(p (1 - p) / (n - 1)); 1.96 of its
    standard errors for others.
    """
    scores: dict[str, float] = {}
    for task, metrics in said["results"].items():
        count = said["n-samples"].get(task, {}).get("effective", 0)
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            title = f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})")
            scores[title] = float(value)
            error = metrics.get(f"{metric}_stderr,{filtered}")
            if not isinstance(error, int | float):
                continue
            if count > 1 and 0 <= value <= 1 and math.isclose(
                error, math.sqrt(value * (1 - value) / (count - 1)), rel_tol=1e-6, abs_tol=1e-12
            ):  # fmt: skip
                low, high = share_interval(round(value * count), count)
            else:
                low, high = value - 1.96 * error, value + 1.96 * error
            scores |= {f"{title}_low": float(low), f"{title}_high": float(high)}
    return scores


def _beginnings(config: Config, texts: Sequence["Document"]) -> list[list[int]]:
    """``diversity.prefixes`` different ones: up to where the last answer within reach starts, or half of the text."""
    most = config.diversity.prefix_tokens

    def beginning(ids: list[int], own: list[bool]) -> tuple[int, ...]:
        starts = [i for i in range(1, min(most + 1, len(ids))) if own[i] and not own[i - 1]]
        return tuple(ids[: starts[-1] if starts else min(most, len(ids) // 2)])

    cut = (beginning(*text) for text in texts)
    return [list(one) for one in itertools.islice(dict.fromkeys(filter(None, cut)), config.diversity.prefixes)]


def _texts(config: Config, start: Path | None) -> tuple[PreTrainedTokenizerBase, list["Document"]]:
    """The tokenizer, and texts of ``data.path`` or the task's demonstrations in an order that the seed decides."""
    from transformers import AutoTokenizer

    from cola_ray.learner.corpus import load_documents

    tokenizer = AutoTokenizer.from_pretrained(start or config.model.base)
    task = None if config.data.path else to_pretrain_on(config.task, config.seed)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    documents, _ = load_documents(config.data, task, ChatTokenizer(tokenizer, config.data.date), longest)
    order = np.random.default_rng(config.seed).permutation(len(documents))
    return tokenizer, [documents[i] for i in order]
