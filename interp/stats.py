"""Metrics, clustered bootstrap, paired comparisons.

A figure that does not exist (a correlation with a constant, pairs where there are none) is None, or NaN
inside an array; never 0. `groups` holds one integer code per row, equal for the completions of one prompt.

**Why correlations take the fold's intercept out.** An out-of-fold prediction holds the mean rating of the
rows that its fold was trained on. A held-out fold with a high mean leaves a training set with a low one, so
pooling raw predictions correlates ratings with minus themselves: on pure noise r is clearly negative, and the
constant baseline, which knows nothing, gets r < 0 too. With `prediction - centre`, `centre` being that
training mean, each prediction is a sum of training ratings whose weights add up to 0. On noise it is then
uncorrelated with the held-out rating and (exactly, where prompts have one size) with the overall mean, so the
expectation of the pooled covariance is 0. That of r, a ratio, is 0 only nearly: with few features the
predictions vary most in just those samples where the covariance is positive, which leaves about -.015 for one
feature on 960 rows of noise and nothing visible from some tens of features on. Errors (MAE, RMSE, R2) judge
what a user would be told, and keep the intercept.

**Intervals** are 95% percentile intervals over resampled prompts, given the fitted folds (Efron & Tibshirani
1993, ch. 13; Field & Welsh 2007 for clusters). Drawing prompts with replacement gives each an integer weight,
so a statistic made of sums over rows is, for all draws at once, one product of weights [draws, prompts] and
sums [prompts, k]. Spearman's rho is bootstrapped on ranks computed once on the full sample. An interval is
None where fewer than two prompts carry the figure, or fewer than half of the draws have it; other draws
without it are left out.
"""

import numpy as np

from interp import InterpError

ROUNDING = 1e-10  # differences below this share of the largest value are arithmetic, not signal
FLOAT32 = 3e-6  # the same for predictions, which come out of single precision

Estimate = tuple[float | None, list[float] | None]


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's r of x [n] and y [n]; None when either is constant or n < 3."""
    x, y = finite_vectors(x, y)
    return _or_none(pearson_columns(x, y)[0])


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rho of x [n] and y [n] (ties share their mean rank); None as for `pearson`."""
    x, y = finite_vectors(x, y)
    return _or_none(pearson_columns(_ranks(x), _ranks(y))[0]) if len(x) else None


def partial_pearson(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> float | None:
    """Pearson's r of x [n] and y [n] after linear regression of both on z, [n] or [n, k].

    None when z leaves nothing of either, or leaves fewer than 3 rows' worth of freedom (n - rank(z) < 3).
    """
    x, y, *controls = finite_vectors(x, y, *np.atleast_2d(np.asarray(z, dtype=float).T))
    if len(x) < 3:
        return None
    # Of one size first: least squares drops directions that are small beside the largest column's.
    spread = [_unit(_deviations(column)) for column in controls]
    design = np.column_stack([np.ones(len(x)), *spread])
    fit, _, rank, _ = np.linalg.lstsq(design, np.column_stack([x, y]), rcond=ROUNDING)
    if len(x) - (rank - 1) < 3:
        return None
    residuals = np.column_stack([x, y]) - design @ fit
    residuals = _flush(residuals, np.abs([x, y]).max(axis=1))
    return _or_none(_cosines(residuals[:, :1], residuals[:, 1:])[0])


def pearson_columns(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Pearson's r of each column of y and p, [n, T] each (either may be [n]) -> [T]; NaN where constant."""
    y, p = _table(y), _table(p)
    if len(y) < 3:
        return np.full(max(y.shape[1], p.shape[1]), np.nan)
    return _cosines(_deviations(y), _deviations(p))


def within_columns(y: np.ndarray, p: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Pearson's r of the within-prompt deviations, column by column: [n, T] each (either may be [n]) -> [T].

    NaN where a side does not vary within prompts, or where n - prompts < 2 (one pair is always r = +-1).
    """
    y, p = _table(y), _table(p)
    if len(y) - len(np.unique(groups)) < 2:
        return np.full(max(y.shape[1], p.shape[1]), np.nan)
    return _cosines(_flush(centre_within(y, groups), _size(y)), _flush(centre_within(p, groups), _size(p), FLOAT32))


def centre_within(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """x, [n] or [n, T], minus the mean of its prompt's rows; same shape."""
    x = np.asarray(x, dtype=float)
    codes, counts = prompt_codes(groups, len(x))
    means = (prompt_sums(x, codes).T / counts).T
    return x - means[codes]


def pair_accuracy(y: np.ndarray, p: np.ndarray, groups: np.ndarray, min_gap: float = 1.0) -> tuple[float | None, int]:
    """Within-prompt accuracy of p [n] for ratings y [n], and the number of pairs it rests on.

    Over pairs of completions of one prompt whose ratings differ by at least `min_gap` (up to rounding; equal
    ratings never make a pair): the share ordered rightly, a tie in p counting one half; per prompt, then the
    mean over the prompts that have such a pair.
    """
    y, p = finite_vectors(y, p)
    per_prompt, pairs = _prompt_accuracy(y, p, groups, min_gap)
    return (float(np.nanmean(per_prompt)), pairs) if pairs else (None, 0)


def metrics(
    y: np.ndarray,
    prediction: np.ndarray,
    groups: np.ndarray,
    centre: np.ndarray,
    *,
    draws: int = 2000,
    seed: int = 0,
    min_gap: float = 1.0,
) -> dict[str, float | int | list[float] | None]:
    """Every held-out metric of `prediction` [n] for ratings `y` [n], each `x` with its interval `x_ci`.

    Both in rating points. `centre` [n] is the mean rating of the rows that each row's prediction was trained
    on; pearson, spearman, slope (of y on the prediction), between and within use `prediction - centre`, the
    errors mae, rmse and r2 use `prediction` (the module's docstring says why). `between` counts every prompt
    once, `within` pools the deviations from the prompt's means. Correlations are None where
    `prediction - centre` is constant. Intervals: the module's docstring; `draws=0` leaves them out.
    Raises InterpError on rows that do not match, are not finite, or are none.
    """
    y, prediction, centre = finite_vectors(y, prediction, centre)
    if not len(y):
        raise InterpError("metrics: found 0 rows, expected at least one; check what was filtered out")
    codes, counts = prompt_codes(groups, len(y))
    weights = _with_sample(cluster_weights(groups, draws, seed))
    signal = _signal(prediction, centre)
    accuracies, pairs = _prompt_accuracy(y, prediction, groups, min_gap)
    everyone, several = len(counts), int((counts > 1).sum())
    r, slope = _regression(weights, y, signal, codes)
    estimates = {
        "pearson": _estimate(r, everyone),
        "spearman": _estimate(_regression(weights, _ranks(y), _ranks(signal), codes)[0], everyone),
        **{name: _estimate(v, everyone) for name, v in _errors(weights, y, prediction, codes).items()},
        "slope": _estimate(slope, everyone),
        "within_prompt_accuracy": _estimate(_mean_defined(weights, accuracies), _defined(accuracies)),
        "between": _estimate(_between(weights, y, signal, codes, counts), everyone),
        "within": _estimate(_within(weights, y, signal, groups), several),
    }
    flat = {key: v for name, pair in estimates.items() for key, v in zip((name, f"{name}_ci"), pair, strict=True)}
    return {**flat, "pairs": pairs}


def cluster_weights(groups: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How often each prompt (in the order of its code) is drawn in each resample: int32 [draws, prompts].

    The same groups, draws and seed give the same weights, which is what pairs two intervals.
    """
    count = len(np.unique(groups))
    rng = np.random.default_rng(seed)
    weights = np.empty((draws, count), dtype=np.int32)
    for row in weights:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    return weights


def pearson_intervals(
    y: np.ndarray, p: np.ndarray, groups: np.ndarray, draws: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(low [T], high [T]): the interval of Pearson's r of y [n] with each column of p [n, T]; NaN where none."""
    y, p = finite_vectors(y)[0], _table(p)
    codes, counts = prompt_codes(groups, len(y))
    weights = _with_sample(cluster_weights(groups, draws, seed)).astype(float)
    found = [_estimate(_regression(weights, y, column, codes)[0], len(counts))[1] for column in p.T]
    bounds = np.array([[np.nan, np.nan] if ci is None else ci for ci in found])
    return bounds[:, 0], bounds[:, 1]


def paired_pearson_difference(
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    groups: np.ndarray,
    centre_a: np.ndarray,
    centre_b: np.ndarray,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """r(y, a - centre_a) - r(y, b - centre_b) and its interval over the same resamples of prompts.

    All [n], as in `metrics`. (None, None) where either r does not exist.
    """
    y, a, b, centre_a, centre_b = finite_vectors(y, a, b, centre_a, centre_b)
    codes, counts = prompt_codes(groups, len(y))
    weights = _with_sample(cluster_weights(groups, draws, seed))
    r_a, r_b = (_regression(weights, y, _signal(*side), codes)[0] for side in ((a, centre_a), (b, centre_b)))
    return _estimate(r_a - r_b, len(counts))


def paired_accuracy_difference(
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    groups: np.ndarray,
    draws: int = 2000,
    seed: int = 0,
    min_gap: float = 1.0,
) -> Estimate:
    """Within-prompt accuracy of a [n] minus that of b [n], and its interval over the same resamples."""
    y, a, b = finite_vectors(y, a, b)
    weights = _with_sample(cluster_weights(groups, draws, seed))
    gain = np.subtract(*(_prompt_accuracy(y, side, groups, min_gap)[0] for side in (a, b)))
    return _estimate(_mean_defined(weights, gain), _defined(gain))


def finite_vectors(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays as float64 [n]; InterpError unless they are finite, have one dimension and one length."""
    vectors = [np.asarray(array, dtype=float) for array in arrays]
    shapes = {vector.shape for vector in vectors}
    if len(shapes) > 1 or vectors[0].ndim != 1:
        found = ", ".join(str(vector.shape) for vector in vectors)
        raise InterpError(f"stats: found arrays of shapes {found}, expected one value per row in each; align them")
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise InterpError("stats: found NaN or infinite values, expected finite ones; drop or mend these rows")
    return vectors


def _table(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=float)
    return x[:, None] if x.ndim == 1 else x


def prompt_codes(groups: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt codes 0 ... prompts - 1 [n], and rows per prompt [prompts]; InterpError unless n is `rows`."""
    if np.shape(groups) != (rows,):
        raise InterpError(
            f"stats: found groups of shape {np.shape(groups)}, expected one code for each of {rows} rows; align them"
        )
    _, codes, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return codes, counts


def prompt_sums(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Sums over each prompt's rows: [n, ...] -> [prompts, ...]; `codes` leave out no prompt."""
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    return np.add.reduceat(x[order], starts, axis=0)


def _size(x: np.ndarray) -> np.ndarray | float:
    return np.abs(x).max(axis=0, initial=0.0)


def _flush(x: np.ndarray, size: np.ndarray | float, share: float = ROUNDING) -> np.ndarray:
    """x with what is rounding beside `size` (of the numbers that x is a difference of) set to exactly 0."""
    return np.where(np.abs(x) <= share * size, 0.0, x)


def _deviations(x: np.ndarray) -> np.ndarray:
    return _flush(x - x.mean(axis=0), _size(x))


def _unit(x: np.ndarray) -> np.ndarray:
    """x with its largest absolute value, per column, made 1, so that squares neither over- nor underflow."""
    size = _size(x)
    return x / np.where(size > 0, size, 1.0)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each column of a and b, [n, T] each; NaN where either is 0."""
    a, b = _unit(a), _unit(b)
    norm = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    return _ratio(np.einsum("it,it->t", *np.broadcast_arrays(a, b)), norm, norm > 0).clip(-1, 1)


def _ratio(top: np.ndarray, bottom: np.ndarray, defined: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(defined), np.nan), where=defined)


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of x [n], ties sharing theirs; all equal where x is constant but for rounding."""
    from scipy.stats import rankdata

    return rankdata(_deviations(x))


def _signal(prediction: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """prediction - centre less its mean [n]; exactly 0 where it is constant but for rounding."""
    signal = prediction - centre
    return _flush(signal - signal.mean(), max(_size(prediction), _size(centre)))


def _pairs(codes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (left, right) of every pair of rows that share a prompt."""
    order, starts = np.argsort(codes, kind="stable"), np.cumsum(counts) - counts
    lefts, rights = [np.empty(0, dtype=int)], [np.empty(0, dtype=int)]
    for size in np.unique(counts[counts > 1]):
        first = starts[counts == size][:, None]
        left, right = np.triu_indices(size, 1)
        lefts.append(order[first + left].ravel())
        rights.append(order[first + right].ravel())
    return np.concatenate(lefts), np.concatenate(rights)


def _prompt_accuracy(y: np.ndarray, p: np.ndarray, groups: np.ndarray, min_gap: float) -> tuple[np.ndarray, int]:
    """Share of rightly ordered pairs of each prompt [prompts], NaN where it has no pair; number of pairs."""
    codes, counts = prompt_codes(groups, len(y))
    left, right = _pairs(codes, counts)
    # Ratings a whole step apart may differ by a hair less (4.1 - 3.1 < 1); a prediction that is the same for
    # all completions of a prompt may differ by a hair between rows of a matrix product.
    gap, lead = _flush(y[left] - y[right], _size(y)), _flush(p[left] - p[right], _size(p), FLOAT32)
    kept = (np.abs(gap) >= min_gap - ROUNDING * _size(y)) & (gap != 0)
    right_order = 0.5 + 0.5 * np.sign(gap[kept]) * np.sign(lead[kept])
    where = codes[left[kept]]
    total = np.bincount(where, minlength=len(counts))
    wins = np.bincount(where, weights=right_order, minlength=len(counts))
    return _ratio(wins, total, total > 0), int(kept.sum())


def _with_sample(weights: np.ndarray) -> np.ndarray:
    """The weights with the sample itself (every prompt once) as row 0: [1 + draws, prompts]."""
    return np.vstack([np.ones((1, weights.shape[1]), dtype=weights.dtype), weights])


def weighted(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """weights [draws, prompts] @ sums [prompts, k], some draws at a time: floats of all may not fit."""
    blocks = np.array_split(weights, 1 + weights.size // 2**24)
    return np.concatenate([block.astype(float, copy=False) @ sums for block in blocks])


def _moments(weights: np.ndarray, a: np.ndarray, b: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weighted covariance sum of a and b [n], and both sums of squares about the mean, [draws] each.

    The sample's mean goes out first: sums of squares of large numbers would cancel. What is left of a square
    after subtracting the mean's share is 0 in a resample where the variable is constant.
    """
    a, b = _deviations(a), _deviations(b)
    columns = np.column_stack([np.ones(len(a)), a, b, a * b, a * a, b * b])
    n, sum_a, sum_b, ab, aa, bb = weighted(weights, prompt_sums(columns, codes)).T
    var_a, var_b = _flush(aa - sum_a**2 / n, aa), _flush(bb - sum_b**2 / n, bb)
    return ab - sum_a * sum_b / n, var_a, var_b


def _regression(weights: np.ndarray, y: np.ndarray, x: np.ndarray, codes: np.ndarray) -> list[np.ndarray]:
    """r of y and x [n] and the slope of y on x for every row of weights, [draws] each; NaN where none."""
    if len(y) < 3:
        return [np.full(len(weights), np.nan)] * 2
    covariance, var_y, var_x = _moments(weights, y, x, codes)
    r = _ratio(covariance, np.sqrt(var_y) * np.sqrt(var_x), (var_y > 0) & (var_x > 0)).clip(-1, 1)
    return [r, _ratio(covariance, var_x, var_x > 0)]


def _between(weights: np.ndarray, y: np.ndarray, x: np.ndarray, codes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    mean_y, mean_x = (_flush(prompt_sums(v, codes) / counts, _size(v)) for v in (y, x))
    return _regression(weights, mean_y, mean_x, np.arange(len(counts)))[0]


def _within(weights: np.ndarray, y: np.ndarray, x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    codes, counts = prompt_codes(groups, len(y))
    if len(y) - len(counts) < 2:
        return np.full(len(weights), np.nan)
    own_y, own_x = (centre_within(v, groups) for v in (y, x))
    size = max(_size(y), _size(x))  # x has lost its intercept, which set the size of its rounding
    return _regression(weights, _flush(own_y, _size(y)), _flush(own_x, size, FLOAT32), codes)[0]


def _errors(weights: np.ndarray, y: np.ndarray, prediction: np.ndarray, codes: np.ndarray) -> dict[str, np.ndarray]:
    """MAE, RMSE (rating points) and R2 about the resample's own mean, [draws] each."""
    error = prediction - y
    columns = np.column_stack([np.ones(len(y)), np.abs(error), error**2])
    n, absolute, squared = weighted(weights, prompt_sums(columns, codes)).T
    _, total, _ = _moments(weights, y, y, codes)
    r2 = 1 - _ratio(squared, total, total > 0)
    return {"mae": absolute / n, "rmse": np.sqrt(squared / n), "r2": r2}


def _mean_defined(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weighted mean over the prompts that have a value, [prompts] with NaN -> [draws]."""
    has = np.isfinite(values)
    total, count = weighted(weights, np.column_stack([np.where(has, values, 0.0), has])).T
    return _ratio(total, count, count > 0)


def _defined(values: np.ndarray) -> int:
    return int(np.isfinite(values).sum())


def _estimate(values: np.ndarray, prompts: int) -> Estimate:
    """(value on the sample, interval) from a statistic's [1 + draws] values; `prompts`: how many carry it."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or prompts < 2 or 2 * len(drawn) < max(len(values) - 1, 1):
        return _or_none(values[0]), None
    return float(values[0]), [float(bound) for bound in np.percentile(drawn, [2.5, 97.5])]


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
