"""BASELINES: what a rating can be predicted from without a probe, on the probe's own folds.

Each is features of a row, and the same nested ridge as the probe's. What a probe adds to the stack of all of
them is its finding; what it reaches alone is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from interp.crossval import OutOfFold
    from interp.ridge import Cell

#: TF-IDF rows have norm 1; their kernel is scaled to this mean diagonal so that one range of lambdas serves all.
KERNEL_SCALE = 1000.0
#: Above this many rows TF-IDF is reduced to this many dimensions (truncated SVD) instead of a rows x rows kernel.
KERNEL_ROWS, SVD_DIMENSIONS = 4000, 512

REFUSAL = re.compile(
    r"\b(sorry|cannot|can't|can’t|unable|won't|won’t|not able|apologi[sz]e|regret|decline|as an ai|inappropriate)\b",
    re.I,
)
HEDGE = re.compile(
    r"\b(may|might|could|perhaps|possibly|generally|usually|often|likely|depends?|probably|seems?)\b", re.I
)


@dataclass(frozen=True)
class Rows:
    """What baselines may look at: texts, and two things the model gives without a probe.

    `embedding` [row, d_model]: mean of the completion's token embeddings (layer 0). `surprise` [row, 3]: mean,
    minimum and last-token log-probability (nats). Either may be None; their baselines are then left out.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    embedding: Any = None
    surprise: np.ndarray | None = None
    cache: dict[str, Any] = field(default_factory=dict)


#: Features for a fold: (rows, mask of rows that may be learned from) -> [row, feature], dense or sparse; None: not there.
Features = Callable[[Rows, np.ndarray], Any]


def log_length(rows: Rows, _learn: np.ndarray) -> np.ndarray:
    """Log of the completion's length in characters."""
    return np.log1p([[len(c)] for c in rows.completions])


def surface_features(text: str) -> list[float]:
    """Countable surface of a text: length, shape, punctuation, variety, a few word classes."""
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text)
    lower = [w.lower() for w in words]
    sentences = re.findall(r"[.!?…](?:\s|$)", text)
    n, lines = max(len(words), 1), text.splitlines() or [""]

    def rate(pattern: str) -> float:
        return len(re.findall(pattern, text)) / max(len(text), 1)

    return [
        np.log1p(len(text)),
        np.log1p(len(words)),
        np.log1p(len(lines)),
        n / max(len(sentences), 1),
        sum(map(len, words)) / n,
        len(set(lower)) / n,
        sum(bool(re.match(r"\s*([-*•]|\d+[.)])\s", line)) for line in lines),
        float("```" in text),
        text.count("`") / max(len(text), 1),
        text.count("**") / n,
        float(bool(re.search(r"^#+ ", text, re.M))),
        rate(r"\d"),
        rate(r"[A-Z]"),
        rate(r"[,;:]"),
        rate(r"!"),
        rate(r"\?"),
        rate(r"[()\[\]]"),
        rate(r"[\"“”‘’']"),
        rate(r"[^\x00-\x7f]"),
        len(REFUSAL.findall(text)) / n,
        len(HEDGE.findall(text)) / n,
        sum(w in ("i", "my", "me", "i'm", "i’m") for w in lower) / n,
        sum(w in ("you", "your") for w in lower) / n,
        float(bool(sentences) and text.rstrip()[-1:] in ".!?”\"'`)"),
    ]


def surface(rows: Rows, _learn: np.ndarray) -> np.ndarray:
    """`surface_features` of the completion."""
    return np.array([surface_features(c) for c in rows.completions])


def _tfidf(texts: Sequence[str], learn: np.ndarray, options: dict[str, Any]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    options = {"dtype": np.float32, **options}
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=50_000, **options)
    try:
        vectorizer.fit([t for t, keep in zip(texts, learn, strict=True) if keep])
    except ValueError:  # no word occurs twice: there is nothing to learn from
        return None
    return vectorizer.transform(texts)


WORDS = {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"}
CHARACTERS = {"analyzer": "char_wb", "ngram_range": (2, 4)}


def tfidf_prompt(rows: Rows, learn: np.ndarray) -> Any:
    """TF-IDF of the prompt's words and word pairs."""
    return _tfidf(rows.prompts, learn, WORDS)


def tfidf_words(rows: Rows, learn: np.ndarray) -> Any:
    """TF-IDF of the completion's words and word pairs."""
    return _tfidf(rows.completions, learn, WORDS)


def tfidf_characters(rows: Rows, learn: np.ndarray) -> Any:
    """TF-IDF of the completion's character 2- to 4-grams."""
    return _tfidf(rows.completions, learn, CHARACTERS)


def embedding(rows: Rows, _learn: np.ndarray) -> Any:
    """Mean token embedding of the completion: a bag of tokens."""
    return rows.embedding


def surprise(rows: Rows, _learn: np.ndarray) -> Any:
    """The model's own log-probability of the completion: is the probe only reading perplexity?"""
    return rows.surprise


def evaluate(name: str, rows: Rows, y: np.ndarray, assignment: np.ndarray) -> OutOfFold | None:
    """Out-of-fold predictions of one baseline for labels `y`; None where it has nothing to look at."""
    from interp import crossval

    features = BASELINES[name]
    if features is None:
        return crossval.constant(y, assignment)
    everything = np.ones(len(y), bool)
    if name not in LEARNED:
        x = features(rows, everything)
        if x is None:
            return None
        cell = _cached(rows, (name, assignment.tobytes()), lambda: _dense(x, assignment))
        return crossval.nested(lambda _fold: cell, y, assignment)

    def without(fold: int) -> Cell | None:
        key = (name, assignment.tobytes(), fold)
        learn = assignment != fold
        return _cached(rows, key, lambda: _sparse(features(rows, learn), learn, assignment))

    return crossval.nested(without, y, assignment)


def _cached(rows: Rows, key: Any, make: Callable[[], Any]) -> Any:
    if key not in rows.cache:
        rows.cache[key] = make()
    return rows.cache[key]


def _dense(x: Any, assignment: np.ndarray) -> Cell | None:
    import torch

    from interp import ridge

    return ridge.cell(torch.as_tensor(x).float(), ridge.Folds.of(assignment))


def _sparse(x: Any, learn: np.ndarray, assignment: np.ndarray) -> Cell | None:
    """Rows of unit norm, not standardised: a rare word must not weigh as much as a common one."""
    import torch

    from interp import ridge

    known = None if x is None else x[learn]
    if known is None or not (known.max(axis=0) - known.min(axis=0)).max() > 0:
        return None  # no words, or the same in every row
    folds = ridge.Folds.of(assignment)
    # Rows without a known word have norm 0; the mean is over the rows that may be learned from.
    x = x * (KERNEL_SCALE / known.multiply(known).sum(1).mean()) ** 0.5
    if x.shape[0] <= KERNEL_ROWS:
        return ridge.HatCell.of_kernel(torch.from_numpy((x @ x.T).toarray()).float(), folds)
    from sklearn.decomposition import TruncatedSVD

    reduction = TruncatedSVD(min(SVD_DIMENSIONS, x.shape[1]), random_state=0).fit(x[learn])
    return ridge.GramCell.of(torch.from_numpy(reduction.transform(x)).float(), folds)


#: `constant` has no features: it is the mean of the training rows.
BASELINES: dict[str, Features | None] = {
    "constant": None,
    "log_length": log_length,
    "surface": surface,
    "tfidf_prompt": tfidf_prompt,
    "tfidf_words": tfidf_words,
    "tfidf_characters": tfidf_characters,
    "embedding": embedding,
    "surprise": surprise,
}
#: Baselines whose features learn from text (a vocabulary and its weights): fitted without the held-out fold.
LEARNED = frozenset({"tfidf_prompt", "tfidf_words", "tfidf_characters"})
