"""Common parts of studies of a finished model: folder, tracker and summary, and the texts that they work on.

A study does not train. It runs engines or the model itself, keeps their raw outputs in its folder, and sums them up:

    evaluation.py     evaluate(config)      answers problems or plays episodes -> predictions, figures with intervals
    diversity.py      diversity(config)     continues texts in several ways    -> texts, and how much they differ
    atlas.py          atlas(config)         runs the model by itself           -> a page about each latent action
    capabilities.py   capabilities(config)  runs the evaluation harness        -> scores of the model and its base

Each returns the summary that it writes to ``output_dir/summary.json``, and logs its figures to MLflow.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from cola_ray.runs import launch, resume
from cola_ray.runs.tracking import Tracker
from cola_ray.settings.config import Config, override
from cola_ray.tasks import to_pretrain_on
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.training.tracked_run import tracked

if TYPE_CHECKING:
    from cola_ray.learner.corpus import Document


@dataclass
class Study:
    """A study in progress.

    Args:
        config: the settings, with ``model.path`` set to the model under study.
        start: directory of the model under study; None for a plain base.
        output: the study's folder.
        tracker: of its run.
        summary: content of ``summary.json``; studies add their results to it.
    """

    config: Config
    start: Path | None
    output: Path
    tracker: Tracker
    summary: dict[str, Any]

    def add(self, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Log the figures of each way of answering as ``<way>/<name>``, and add them to the summary."""
        for way, by_name in figures.items():
            self.tracker.log(0, {f"{way}/{name}": value for name, value in by_name.items()})
        self.summary |= figures


@contextlib.contextmanager
def open_study(config: Config, job: str) -> Iterator[Study]:
    """Open a study's folder and tracker; on exit the summary is written."""
    begun = launch.begin(config, job)
    with begun.folder.failing():
        resume.check_inputs(begun.config, begun.start)
    start, config = begun.start, override(begun.config, {"model.path": str(begun.start or "")})
    model = str(start or config.model.base)
    summary = {"preset": config.preset, "task": config.task.name, "model": model, "seed": config.seed}
    with begun.folder.failing(), tracked(begun, lambda _: summary) as tracker:
        yield Study(config, start, begun.folder.path, tracker, summary)


def load_texts(config: Config, start: Path | None) -> tuple[PreTrainedTokenizerBase, list["Document"]]:
    """The tokenizer, and the texts of ``data.path`` or else the task's demonstrations, shuffled by the seed."""
    from transformers import AutoTokenizer

    from cola_ray.learner.corpus import load_documents

    tokenizer = AutoTokenizer.from_pretrained(start or config.model.base)
    task = None if config.data.path else to_pretrain_on(config.task, config.seed)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    chat = ChatTokenizer(tokenizer, config.data.date, config.data.chat_options)
    documents, _ = load_documents(config.data, task, chat, longest)
    order = np.random.default_rng(config.seed).permutation(len(documents))
    return tokenizer, [documents[i] for i in order]


def text_prefixes(config: Config, texts: Sequence["Document"]) -> list[list[int]]:
    """The first ``diversity.prefixes`` different prefixes of these texts, of at most ``diversity.prefix_tokens`` ids.

    A prefix ends where the last response within this length starts; in a text without responses it is at most half.
    """
    most = config.diversity.prefix_tokens

    def prefix(ids: list[int], own: list[bool]) -> tuple[int, ...]:
        starts = [i for i in range(1, min(most + 1, len(ids))) if own[i] and not own[i - 1]]
        return tuple(ids[: starts[-1] if starts else min(most, len(ids) // 2)])

    prefixes = (prefix(*text) for text in texts)
    return [list(ids) for ids in itertools.islice(dict.fromkeys(filter(None, prefixes)), config.diversity.prefixes)]
