"""Permuted ratings that keep what belongs to the prompt, and the p-value of the best of many cells.

`groups` holds one integer code per row, equal for the completions of one prompt. Null A (`permute_across`)
breaks every link between texts and ratings; null B (`permute_within`) keeps what a prompt's mean rating tells.
"""

import numpy as np

from interp import InterpError
from interp.stats import ROUNDING, finite_vectors, prompt_codes, prompt_sums

MIN_BLOCKS = 10  # a prompt size with fewer prompts than this has too few blocks to exchange


def permute_across(y: np.ndarray, groups: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Null A: ratings y [n] permuted across prompts -> [n, draws], keeping the ratings of a prompt together.

    Prompts of equal size exchange whole blocks of ratings, and rows are shuffled inside each block. Sizes
    with fewer than 10 prompts exchange prompt means across all of those prompts and shuffle the deviations
    within. For many rows call it with fewer draws at a time: the memory is about four results.
    """
    (y,) = finite_vectors(y)
    codes, counts = prompt_codes(groups, len(y))
    sharing = np.bincount(counts)[counts]  # for each prompt: how many prompts have its size
    exchanged = np.empty((len(y), draws))
    by_prompt, starts = np.argsort(codes, kind="stable"), np.cumsum(counts) - counts
    for size in np.unique(counts[sharing >= MIN_BLOCKS]):
        rows = by_prompt[starts[counts == size][:, None] + np.arange(size)]
        taken = rows[_permutations(len(rows), draws, rng)]  # prompt draw row-of-block
        exchanged[rows] = y[taken].transpose(0, 2, 1)
    few = np.flatnonzero(sharing < MIN_BLOCKS)
    if len(few):
        means = prompt_sums(y, codes) / counts
        moved = np.zeros((len(counts), draws))
        moved[few] = means[few][_permutations(len(few), draws, rng)]
        rows = np.flatnonzero(sharing[codes] < MIN_BLOCKS)
        exchanged[rows] = (y - means[codes])[rows, None] + moved[codes[rows]]
    return _shuffle_within(exchanged, codes, rng)


def permute_within(y: np.ndarray, groups: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Null B: ratings y [n] shuffled among the rows of each prompt -> [n, draws]."""
    (y,) = finite_vectors(y)
    return _shuffle_within(np.broadcast_to(y[:, None], (len(y), draws)), prompt_codes(groups, len(y))[0], rng)


def max_t_p(observed: np.ndarray, null: np.ndarray) -> tuple[float | None, np.ndarray]:
    """p of the best of many cells, corrected for having looked at all, and z [cells] = r / sd_null(cell).

    `observed` [cells] is each cell's r on the real labels, `null` [cells, draws] on permuted ones, computed
    alike. The statistic is the maximum of z over cells, and p the share of draws (the real labels counted as
    one more) whose maximum reaches it: (1 + #{null maximum >= observed maximum}) / (1 + draws). Cells with a
    NaN, or whose null does not vary, are left out (z is NaN); p is None when none is left.
    Raises InterpError below 2 draws or where the shapes differ.
    Source: Westfall & Young (1993), Resampling-Based Multiple Testing; the 1 +: Phipson & Smyth (2010).
    """
    observed, null = np.asarray(observed, dtype=float), np.asarray(null, dtype=float)
    if null.ndim != 2 or null.shape[0] != len(observed) or null.shape[1] < 2:
        raise InterpError(
            f"max_t_p: found a null of shape {null.shape} for {len(observed)} cells, "
            "expected [cells, draws] with at least 2 draws; raise the number of draws"
        )
    usable = np.isfinite(observed) & np.isfinite(null).all(axis=1)
    usable[usable] = np.ptp(null[usable], axis=1) > ROUNDING * np.abs(null[usable]).max(axis=1)
    z = np.full(len(observed), np.nan)
    if not usable.any():
        return None, z
    sd = null[usable].std(axis=1, ddof=1)
    z[usable] = observed[usable] / sd
    best, peaks = z[usable].max(), (null[usable] / sd[:, None]).max(axis=0)
    # A permutation that returns the real labels must count as reaching them, whatever the order of its sums.
    reached = int((peaks >= best - ROUNDING * abs(best)).sum())
    return (1 + reached) / (1 + null.shape[1]), z


def control_ratings(groups: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The control task: one random rating per prompt for all its rows [n], drawn from the prompts' means.

    Drawn with replacement. What a probe scores on it, with rows of one prompt on both sides of a split, it owes
    to recognising the prompt: Hewitt & Liang (2019). Folds by prompt make it unpredictable for any probe.
    """
    (y,) = finite_vectors(y)
    codes, counts = prompt_codes(groups, len(y))
    return rng.choice(prompt_sums(y, codes) / counts, size=len(counts))[codes]


def _permutations(count: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Random orders of 0 ... count - 1, one per column: [count, draws]."""
    return np.argsort(rng.random((count, draws)), axis=0)


def _shuffle_within(values: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each column of values [n, draws] with the rows of each prompt in a random order."""
    # Sorting by code plus a random fraction shuffles every prompt at once; a fraction below 1/2 cannot round
    # up into the next code.
    order = np.argsort(codes[:, None] + rng.random(values.shape) / 2, axis=0)
    shuffled = np.empty(values.shape)
    shuffled[np.argsort(codes, kind="stable")] = np.take_along_axis(values, order, axis=0)
    return shuffled
