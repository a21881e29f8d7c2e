"""A set of rated completions, and what can be done with one: labels, folds, roles, balance, a summary."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from interp import InterpError
from interp.columns import check_scale
from interp.stats import spearman

if TYPE_CHECKING:
    import datasets

REQUIRED = ("prompt_id", "prompt", "completion", "score")
ROLES = (("dpo", 40), ("probe", 80), ("test", 100))  # name, upper bound of the hash in per cent


@dataclass(frozen=True, eq=False)
class RatedSet:
    """Rated completions of prompts, in the source's order."""

    name: str
    #: prompt_id, prompt, completion, score (in the set's scale), messages (the turns before the
    #: completion) where the source has them, and the source's other columns.
    rows: "datasets.Dataset"
    scale: tuple[float, float]  # lowest and highest rating
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> rows left out
    notes: tuple[str, ...] = ()  # what was assumed for the caller, one line each

    def __post_init__(self) -> None:
        missing = [c for c in REQUIRED if c not in self.rows.column_names]
        if missing:
            raise InterpError(f"{self.name}: no column {', '.join(missing)}, a rated set needs {', '.join(REQUIRED)}")
        check_scale(self.scale)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def scores(self) -> np.ndarray:
        """Ratings [row], in the set's scale."""
        return np.array(self.rows["score"], dtype=np.float64)

    @cached_property
    def groups(self) -> np.ndarray:
        """Code of each row's prompt [row]: 0, 1, ... in order of first appearance."""
        codes: dict[str, int] = {}
        return np.array([codes.setdefault(i, len(codes)) for i in self.rows["prompt_id"]], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over scale and, row by row in order, prompt (all its turns), completion and score."""
        digest = hashlib.sha256(repr(tuple(map(float, self.scale))).encode())
        turns = self.rows["messages"] if "messages" in self.rows.column_names else [None] * len(self)
        texts = (self.rows["prompt"], turns, self.rows["completion"], self.scores.tolist())
        for row in zip(*texts, strict=True):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def labels(self) -> np.ndarray:
        """Ratings mapped linearly from the scale to [-1, 1]: what probes are trained on [row]."""
        low, high = self.scale
        return (2 * self.scores - low - high) / (high - low)

    def rating(self, labels: np.ndarray) -> np.ndarray:
        """The inverse of `labels`: values in [-1, 1] (or predictions beyond) in rating points."""
        low, high = self.scale
        return (np.asarray(labels, dtype=np.float64) * (high - low) + low + high) / 2

    def select(self, indices: Iterable[int], note: str | None = None) -> "RatedSet":
        """The rows at `indices`, in that order."""
        rows = self.rows.select([int(i) for i in indices])
        return replace(self, rows=rows, notes=(*self.notes, note) if note else self.notes)


def label_check(rated: RatedSet) -> list[int]:
    """Rows with the highest rating although the mean of their aspects is at most 2: suspects.

    UltraFeedback once rated 2,628 completions 10 that should have been 1 (mended upstream on
    2023-12-29; copies may still carry it). Without an `aspects` column nothing is suspected.
    """
    if "aspects" not in rated.rows.column_names:
        return []
    top = np.flatnonzero(rated.scores == rated.scale[1])
    suspects = []
    for row, aspects in zip(top.tolist(), rated.rows.select(top)["aspects"], strict=True):
        marks = [v for v in aspects.values() if v is not None] if isinstance(aspects, dict) else []
        if marks and np.mean(marks) <= 2:
            suspects.append(row)
    return suspects


def mend_labels(rated: RatedSet, mend: bool) -> RatedSet:
    """The rows of `label_check` set to the lowest rating, or left with a note. Raises InterpError."""
    if mend and "aspects" not in rated.rows.column_names:
        raise InterpError(f"{rated.name}: no column aspects, which fix_labels needs; leave it out")
    suspects = label_check(rated)
    if not suspects:
        return rated
    low, high = rated.scale
    found = f"label check: {len(suspects)} rows rated {high:g} although their aspects average 2 or less"
    if not mend:
        return replace(rated, notes=(*rated.notes, f"{found}; kept as published"))
    scores = rated.scores.copy()
    scores[suspects] = low
    order = rated.rows.column_names
    rows = rated.rows.remove_columns("score").add_column("score", scores.tolist()).select_columns(order)
    return replace(rated, rows=rows, notes=(*rated.notes, f"{found}; set to {low:g}"))


def take(rated: RatedSet, rows: int, seed: int = 0) -> RatedSet:
    """Whole prompts, drawn in an order fixed by `seed` until `rows` rows are reached, in file order."""
    sizes = np.bincount(rated.groups)
    order = np.random.default_rng(seed).permutation(len(sizes))
    prompts = order[: np.searchsorted(np.cumsum(sizes[order]), rows) + 1]
    kept = np.flatnonzero(np.isin(rated.groups, prompts))
    note = f"{len(kept)} of {len(rated)} rows: {len(prompts)} whole prompts drawn with seed {seed}"
    return rated.select(kept, note)


def rounded(scores: np.ndarray) -> np.ndarray:
    """Ratings [row] to the nearest whole number, halves upwards (rint would send 8.5 to 8 and 7.5 to 8)."""
    return np.floor(np.asarray(scores) + 0.5).astype(np.int64)


def balance(rated: RatedSet, seed: int = 0, rows: int | None = None) -> RatedSet:
    """Equally many rows of every rounded rating that occurs, drawn by `seed`.

    At most `rows` in all, but never less than one of each rating.
    """
    ratings = rounded(rated.scores)
    values, counts = np.unique(ratings, return_counts=True)
    each = int(counts.min() if rows is None else max(1, min(counts.min(), rows // len(values))))
    rng = np.random.default_rng(seed)
    kept = np.sort(np.concatenate([rng.choice(np.flatnonzero(ratings == v), each, replace=False) for v in values]))
    low, high = math.ceil(rated.scale[0]), math.floor(rated.scale[1])
    absent = sorted(set(range(low, high + 1)) - set(values.tolist())) if high - low <= 100 else []
    lacking = f"; no row is rated {', '.join(map(str, absent))}" if absent else ""
    note = f"balanced: {each} rows of each of {len(values)} ratings, drawn one by one with seed {seed}{lacking}"
    return rated.select(kept, note)


def winner_loser(rated: RatedSet) -> np.ndarray:
    """+1 for the one best-rated completion of a prompt, -1 for the one worst-rated, else 0 [row]."""
    labels = np.zeros(len(rated), dtype=np.int64)
    order = np.argsort(rated.groups, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(rated.groups))[:-1]):
        scores = rated.scores[rows]
        for sign, extreme in ((1, scores.max()), (-1, scores.min())):
            if np.sum(scores == extreme) == 1 < len(rows):
                labels[rows[scores == extreme]] = sign
    return labels


def folds(groups: np.ndarray, k: int = 5, seed: int = 0) -> np.ndarray:
    """Fold 0 ... k-1 of each row [row]; rows of one group share a fold.

    Groups are shuffled by `seed`, then dealt, largest first, to the fold with the fewest rows, so that
    folds differ by no more rows than the largest group has. Raises InterpError for fewer groups than k.
    """
    _, codes, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if k < 2 or len(sizes) < k:
        raise InterpError(f"{len(sizes)} prompts for {k} folds, expected at least 2 folds and a prompt for each")
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold, load_of = np.empty(len(sizes), dtype=np.int64), np.zeros(k, dtype=np.int64)
    for group in order:
        fold[group] = load_of.argmin()
        load_of[fold[group]] += sizes[group]
    return fold[codes]


def roles(prompt_ids: Iterable[str]) -> np.ndarray:
    """Role of each prompt_id [row]: "dpo", "probe" or "test" (40, 40 and 20%), by a hash of the id alone.

    A prompt has the same role in every set and order, so that what trains DPO never scores a probe.
    """
    drawn = (int(hashlib.sha256(f"role {i}".encode()).hexdigest(), 16) % 100 for i in prompt_ids)
    return np.array([next(name for name, bound in ROLES if share < bound) for share in drawn], dtype="<U5")


def duplicates(rated: RatedSet) -> int:
    """Rows whose prompt and completion (case and white space aside) stood in an earlier row."""
    texts = (" ".join(text.lower().split()) for text in rated.rows["completion"])
    return len(rated) - len(set(zip(rated.rows["prompt_id"], texts, strict=True)))


def summary(rated: RatedSet) -> dict:
    """What the set holds, ready for JSON: sizes, ratings, lengths, duplicates, skipped rows, notes."""
    texts, sizes = list(rated.rows["completion"]), np.bincount(rated.groups)
    means = np.bincount(rated.groups, rated.scores) / sizes
    words, characters = np.array([len(t.split()) for t in texts]), np.array([len(t) for t in texts])
    low, high = math.ceil(rated.scale[0]), math.floor(rated.scale[1])
    ratings = dict.fromkeys(map(str, range(low, high + 1)), 0) if high - low <= 20 else {}
    kinds = [c for c in ("flaw", "topic", "voice", "part") if c in rated.rows.column_names]
    return {
        "name": rated.name,
        "rows": len(rated),
        "prompts": len(sizes),
        "completions_per_prompt": _histogram(sizes),
        "scale": list(rated.scale),
        "ratings": ratings | _histogram(rounded(rated.scores)),
        "score": {"mean": float(rated.scores.mean()), "sd": _sd(rated.scores), "sd_prompt_means": _sd(means)},
        "words": _quantiles(words),
        "characters": _quantiles(characters),
        "length_rating_spearman": spearman(words, rated.scores),
        "duplicates": duplicates(rated),
        "skipped": dict(rated.skipped),
        "counts": {kind: _histogram(np.array([str(v) for v in rated.rows[kind]])) for kind in kinds},
        "fingerprint": rated.fingerprint,
        "notes": list(rated.notes),
    }


def _histogram(values: np.ndarray) -> dict[str, int]:
    found, counts = np.unique(values, return_counts=True)
    return {str(value): int(count) for value, count in zip(found, counts, strict=True)}


def _sd(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _quantiles(values: np.ndarray) -> dict[str, float]:
    cuts = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    return dict(zip(("min", "q25", "median", "q75", "max"), map(float, cuts), strict=True))
