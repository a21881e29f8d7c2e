"""Metrics and bootstrap against SciPy, brute-force loops, and data whose answer is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as scipy_stats

from interp import InterpError, stats

SIZES = [1, 2, 3, 4, 4, 4, 5, 2, 1, 3, 6, 4, 2, 3, 4]
POINTS = ["pearson", "spearman", "mae", "rmse", "r2", "slope", "within_prompt_accuracy", "between", "within"]


@pytest.fixture
def rated():
    """Ratings, predictions, prompts of many sizes and fold means, rows in a random order."""
    rng = np.random.default_rng(3)
    groups = rng.permutation(np.repeat(np.arange(len(SIZES)) * 7 + 2, SIZES))
    y = np.round(rng.normal(size=200)[groups] + rng.normal(6, 1.5, size=len(groups)), 1)
    fold = groups % 3
    centre = np.array([5.6, 6.1, 6.4])[fold]
    prediction = centre + np.round(0.5 * (y - 6) + rng.normal(size=len(groups)), 1)
    return y, prediction, groups, centre


def equal_prompts(prompts, size, rng, share=1.0):
    """Groups and ratings of prompts of one size, with a prompt effect of sd `share`."""
    groups = np.repeat(np.arange(prompts), size)
    return groups, share * rng.normal(size=prompts)[groups] + rng.normal(size=prompts * size)


def loop_accuracy(y, p, groups, min_gap=1.0):
    """Within-prompt accuracy of each prompt that has a pair, by the definition."""
    shares, pairs = {}, 0
    for code in np.unique(groups):
        rows = np.flatnonzero(groups == code)
        scores = []
        for i, j in itertools.combinations(rows, 2):
            if abs(y[i] - y[j]) >= min_gap - 1e-9 and y[i] != y[j]:
                scores.append(0.5 if p[i] == p[j] else float((y[i] > y[j]) == (p[i] > p[j])))
        if scores:
            shares[code], pairs = np.mean(scores), pairs + len(scores)
    return shares, pairs


def loop_figures(y, prediction, groups, centre, drawn):
    """Every metric of one resample (a list of prompts, with repeats) by SciPy on the repeated rows."""
    signal = prediction - centre
    rows = np.concatenate([np.flatnonzero(groups == code) for code in drawn])
    rank_y, rank_signal = scipy_stats.rankdata(y), scipy_stats.rankdata(signal)
    mean_of = {code: (y[groups == code].mean(), signal[groups == code].mean()) for code in np.unique(groups)}
    means = np.array([mean_of[code] for code in drawn])
    own = np.array([mean_of[code] for code in groups])
    error = prediction[rows] - y[rows]
    accuracies, _ = loop_accuracy(y, prediction, groups)
    return {
        "pearson": scipy_stats.pearsonr(y[rows], signal[rows])[0],
        "spearman": scipy_stats.pearsonr(rank_y[rows], rank_signal[rows])[0],
        "mae": np.abs(error).mean(),
        "rmse": np.sqrt((error**2).mean()),
        "r2": 1 - (error**2).sum() / ((y[rows] - y[rows].mean()) ** 2).sum(),
        "slope": scipy_stats.linregress(signal[rows], y[rows]).slope,
        "within_prompt_accuracy": np.mean([accuracies[code] for code in drawn if code in accuracies]),
        "between": scipy_stats.pearsonr(*means.T)[0],
        "within": scipy_stats.pearsonr((y - own[:, 0])[rows], (signal - own[:, 1])[rows])[0],
    }


def drawn_prompts(weights, groups):
    """The resamples that the weights stand for, as lists of prompt codes."""
    return [np.repeat(np.unique(groups), row) for row in weights]


# Correlations


def test_correlations_match_scipy():
    """Pearson and Spearman agree with SciPy, ties included."""
    rng = np.random.default_rng(0)
    x, y = np.round(rng.normal(size=(2, 60)), 1)
    assert stats.pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y)[0], abs=1e-12)
    assert stats.spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y)[0], abs=1e-12)


@pytest.mark.parametrize("r", [stats.pearson, stats.spearman])
def test_no_correlation_with_a_constant_or_of_two_rows(r):
    """A constant (rounding apart), two rows or no rows have no correlation; three rows have one."""
    x = np.array([1.0, 2.0, 4.0])
    assert r(x, np.full(3, 7.0)) is None
    assert r(np.array([0.3, 0.1 * 3, 0.1 + 0.2]), x) is None
    assert r(x[:2], x[:2]) is None
    assert r(x[:0], x[:0]) is None
    assert r(x, 2 * x) == pytest.approx(1)


@given(
    hnp.arrays(float, (2, 12), elements=st.integers(-20, 20)),
    st.sampled_from([1e-200, 1e-3, 1.0, 1e200]),
    st.integers(-5, 5),
)
@settings(max_examples=60, deadline=None)
def test_pearson_ignores_scale_and_shift(pair, scale, shift):
    """r is the same in other units, however small or large, and changes sign with one side."""
    x, y = pair
    r = stats.pearson(x, y)
    moved = stats.pearson(scale * (x + shift), y)
    assert (r is None) == (moved is None) == (np.ptp(x) == 0 or np.ptp(y) == 0)
    if r is not None:
        assert -1 <= r <= 1
        assert moved == pytest.approx(r, abs=1e-9)
        assert stats.pearson(-x, y) == pytest.approx(-r, abs=1e-9)


def test_partial_pearson_matches_the_formula_and_the_precision_matrix():
    """One control: the textbook formula; several: the inverse of the correlation matrix."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(80, 3)) * [1, 1e-6, 1e6]
    x, y = z @ [1, 1e6, 1e-6] + rng.normal(size=80), z @ [2, 0, 1e-6] + rng.normal(size=80)
    (xy, xz), yz = np.corrcoef([x, y, z[:, 0]])[0, 1:], np.corrcoef(y, z[:, 0])[0, 1]
    formula = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert stats.partial_pearson(x, y, z[:, 0]) == pytest.approx(formula, abs=1e-10)
    precision = np.linalg.inv(np.corrcoef(np.column_stack([x, y, z]).T))
    several = -precision[0, 1] / np.sqrt(precision[0, 0] * precision[1, 1])
    assert stats.partial_pearson(x, y, z) == pytest.approx(several, abs=1e-9)


def test_partial_pearson_of_what_the_control_explains_is_none():
    """Nothing is left of x = 2 z + 1, nor of three rows after one control; a constant changes nothing."""
    rng = np.random.default_rng(2)
    z, y = rng.normal(size=(2, 30))
    assert stats.partial_pearson(2 * z + 1, y, z) is None
    assert stats.partial_pearson(*rng.normal(size=(3, 3))) is None
    assert stats.partial_pearson(z, y, np.full(30, 4.0)) == pytest.approx(stats.pearson(z, y), abs=1e-12)


def test_columns_match_one_by_one():
    """Columnwise r equals SciPy's column by column; a constant column is NaN; one side may be a vector."""
    rng = np.random.default_rng(4)
    y, p = rng.normal(size=(2, 40, 6))
    p[:, 2] = 0.1
    groups = rng.integers(0, 9, 40)
    centred = [stats.centre_within(v, groups) for v in (y, p)]
    pooled, within = stats.pearson_columns(y, p), stats.within_columns(y, p, groups)
    assert np.isnan(pooled[2])
    assert np.isnan(within[2])
    for t in (0, 1, 3, 4, 5):
        assert pooled[t] == pytest.approx(scipy_stats.pearsonr(y[:, t], p[:, t])[0], abs=1e-12)
        assert within[t] == pytest.approx(scipy_stats.pearsonr(*(v[:, t] for v in centred))[0], abs=1e-12)
    np.testing.assert_allclose(stats.pearson_columns(y[:, 0], p)[3], stats.pearson(y[:, 0], p[:, 3]))
    np.testing.assert_allclose(
        stats.within_columns(y, p[:, 0], groups)[3], stats.within_columns(y[:, 3], p[:, 0], groups)[0]
    )


def test_within_columns_need_more_than_one_free_deviation():
    """Three rows in two prompts give r = +-1 by arithmetic, so NaN; a prediction per prompt has none."""
    y, p = np.array([1.0, 2.0, 5.0]), np.array([0.3, 0.1, 0.7])
    assert np.isnan(stats.within_columns(y, p, np.array([0, 0, 1]))).all()
    groups, ratings = equal_prompts(20, 4, np.random.default_rng(0))
    assert np.isnan(stats.within_columns(ratings, np.sqrt(groups + 0.1), groups)).all()


@given(hnp.arrays(float, (15, 2), elements=st.integers(-9, 9)), hnp.arrays(int, 15, elements=st.integers(0, 5)))
@settings(max_examples=50, deadline=None)
def test_centre_within_leaves_nothing_of_the_means(x, groups):
    """Deviations plus the prompt's mean give x back, and they add up to 0 in every prompt."""
    centred = stats.centre_within(x, groups)
    for code in np.unique(groups):
        rows = groups == code
        np.testing.assert_allclose(centred[rows], x[rows] - x[rows].mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(stats.centre_within(x[:, 1], groups), centred[:, 1])


# Within-prompt accuracy


@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=60, deadline=None)
def test_pair_accuracy_matches_the_definition(seed, min_gap):
    """Accuracy and number of pairs equal a loop over pairs, with tied ratings and predictions."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 8, 25)
    y, p = rng.integers(2, 20, 25) / 2, rng.integers(0, 6, 25) / 10
    shares, pairs = loop_accuracy(y, p, groups, min_gap)
    accuracy, found = stats.pair_accuracy(y, p, groups, min_gap)
    assert found == pairs
    assert accuracy == (pytest.approx(np.mean(list(shares.values()))) if pairs else None)
    if pairs:
        assert accuracy + stats.pair_accuracy(y, -p, groups, min_gap)[0] == pytest.approx(1)


def test_pair_accuracy_counts_each_prompt_once():
    """A prompt with six pairs weighs as much as a prompt with one."""
    y, groups = np.array([1.0, 2, 3, 4, 1, 2]), np.array([0, 0, 0, 0, 1, 1])
    assert stats.pair_accuracy(y, np.array([1.0, 2, 3, 4, 9, 8]), groups) == (0.5, 7)


def test_pair_accuracy_sees_through_rounding():
    """Ratings one step apart count though 4.1 - 3.1 < 1; predictions that differ by rounding are tied."""
    y, groups = np.array([4.1, 3.1]), np.array([5, 5])
    assert y[0] - y[1] < 1
    assert stats.pair_accuracy(y, np.array([1.0, 2.0]), groups) == (0.0, 1)
    assert stats.pair_accuracy(y, np.array([0.3, 0.1 + 0.2]), groups) == (0.5, 1)


def test_pair_accuracy_without_pairs_is_none():
    """Single completions, small differences, equal ratings at a gap of 0, or no rows: None, and no pair."""
    y, groups = np.array([4.0, 4.5, 9.0]), np.array([0, 0, 1])
    assert stats.pair_accuracy(y, y, groups) == (None, 0)
    assert stats.pair_accuracy(np.ones(3), y, np.zeros(3, int), min_gap=0.0) == (None, 0)
    assert stats.pair_accuracy(y[:0], y[:0], groups[:0]) == (None, 0)


# Metrics and their bootstrap


def test_metrics_match_scipy_and_loops(rated):
    """Every metric on the sample equals SciPy's or a loop's."""
    y, prediction, groups, centre = rated
    found = stats.metrics(*rated, draws=50)
    expected = loop_figures(*rated, np.unique(groups))
    assert {name: found[name] for name in POINTS} == pytest.approx(expected, abs=1e-10)
    assert found["pairs"] == loop_accuracy(y, prediction, groups)[1]
    assert found["spearman"] == pytest.approx(scipy_stats.spearmanr(y, prediction - centre)[0], abs=1e-12)
    assert set(found) == {*POINTS, *(f"{name}_ci" for name in POINTS), "pairs"}


def test_bootstrap_matches_a_loop_over_resamples(rated):
    """Each interval holds the percentiles of a loop over the same resamples, row by row, with SciPy."""
    draws = 60
    weights = stats.cluster_weights(rated[2], draws, seed=5)
    looped = [loop_figures(*rated, drawn) for drawn in drawn_prompts(weights, rated[2])]
    found = stats.metrics(*rated, draws=draws, seed=5)
    for name in POINTS:
        expected = np.percentile([figures[name] for figures in looped], [2.5, 97.5])
        np.testing.assert_allclose(found[f"{name}_ci"], expected, atol=1e-9, err_msg=name)
        assert found[f"{name}_ci"][0] < found[name] < found[f"{name}_ci"][1]


def test_paired_differences_match_a_loop_over_resamples(rated):
    """Differences of r and of accuracy, and their intervals, equal a loop over the same resamples."""
    y, a, groups, centre_a = rated
    centre_b = centre_a + 0.1 * (groups % 3)
    b = centre_b + np.round(0.2 * y + np.random.default_rng(9).normal(size=len(y)), 1)
    resamples = [
        np.unique(groups),
        *drawn_prompts(stats.cluster_weights(groups, 60, seed=2), groups),
    ]
    looped = {"pearson": [], "within_prompt_accuracy": []}
    for drawn in resamples:
        of_a, of_b = loop_figures(y, a, groups, centre_a, drawn), loop_figures(y, b, groups, centre_b, drawn)
        for name, differences in looped.items():
            differences.append(of_a[name] - of_b[name])
    found = {
        "pearson": stats.paired_pearson_difference(y, a, b, groups, centre_a, centre_b, draws=60, seed=2),
        "within_prompt_accuracy": stats.paired_accuracy_difference(y, a, b, groups, draws=60, seed=2),
    }
    for name, (difference, interval) in found.items():
        assert difference == pytest.approx(looped[name][0], abs=1e-10)
        np.testing.assert_allclose(interval, np.percentile(looped[name][1:], [2.5, 97.5]), atol=1e-9)


def test_pairing_narrows_the_interval():
    """Two nearly equal predictions differ by less, with certainty, than their own intervals would allow."""
    rng = np.random.default_rng(6)
    groups, y = equal_prompts(80, 4, rng)
    shared = y + 2 * rng.normal(size=len(y))
    a, b, centre = shared, shared + 0.1 * rng.normal(size=len(y)), np.zeros(len(y))
    difference, (low, high) = stats.paired_pearson_difference(y, a, b, groups, centre, centre, draws=300)
    alone = stats.metrics(y, a, groups, centre, draws=300)["pearson_ci"]
    assert low <= difference <= high
    assert high - low < (alone[1] - alone[0]) / 4
    assert stats.paired_pearson_difference(y, a, a, groups, centre, centre, draws=9) == (0.0, [0.0, 0.0])


def test_cluster_weights_draw_prompts_with_replacement():
    """Each resample holds as many prompts as there are, each drawn once on average with variance 1 - 1/G."""
    groups = np.repeat(np.arange(50) * 3, 2)
    weights = stats.cluster_weights(groups, 4000, seed=1)
    assert weights.shape == (4000, 50)
    assert np.issubdtype(weights.dtype, np.integer)
    assert (weights.sum(axis=1) == 50).all()
    assert np.abs(weights.mean(axis=0) - 1).max() < 5 / np.sqrt(4000)
    assert weights.var() == pytest.approx(1 - 1 / 50, abs=0.02)
    np.testing.assert_array_equal(weights, stats.cluster_weights(groups[::-1], 4000, seed=1))
    assert (weights != stats.cluster_weights(groups, 4000, seed=2)).any()


def test_interval_covers_and_treating_rows_as_independent_does_not():
    """The clustered interval of r on independent prompt-level noise holds 0 in about 95% of data sets."""
    rng = np.random.default_rng(7)
    held = {"prompts": 0, "rows": 0}
    for _ in range(200):
        groups, y = equal_prompts(50, 5, rng, share=2.0)
        p = 2.0 * rng.normal(size=50)[groups] + rng.normal(size=250)
        for name, clusters in (("prompts", groups), ("rows", np.arange(250))):
            low, high = stats.metrics(y, p, clusters, np.zeros(250), draws=200)["pearson_ci"]
            held[name] += low <= 0 <= high
    assert 0.88 <= held["prompts"] / 200 <= 0.99
    assert held["rows"] / 200 < 0.8


def test_order_of_rows_does_not_matter(rated):
    """Shuffled rows give the same figures and intervals, to rounding of the sums."""
    order = np.random.default_rng(8).permutation(len(rated[0]))
    found, shuffled = stats.metrics(*rated, draws=100), stats.metrics(*(v[order] for v in rated), draws=100)
    for key, value in found.items():
        np.testing.assert_allclose(shuffled[key], value, rtol=1e-10, atol=1e-12, err_msg=key)


def test_constant_baseline_has_errors_but_no_correlation(rated):
    """Predicting each fold's training mean: no correlation, accuracy one half by the tie rule, and errors."""
    y, _, groups, centre = rated
    noise = 1e-15 * np.random.default_rng(0).normal(size=len(y))
    found = stats.metrics(y, centre * (1 + noise), groups, centre, draws=50)
    for name in ("pearson", "spearman", "slope", "between", "within"):
        assert found[name] is None, name
        assert found[f"{name}_ci"] is None, name
    assert found["within_prompt_accuracy"] == 0.5
    assert found["within_prompt_accuracy_ci"] == [0.5, 0.5]
    assert found["mae"] == pytest.approx(np.abs(y - centre).mean())
    assert found["r2_ci"][0] < found["r2"] < 0.05
    nothing = stats.paired_pearson_difference(y, y, centre, groups, centre, centre, draws=20)
    assert nothing == (None, None)


def test_figures_that_do_not_exist_are_none():
    """Single completions: nothing within; one prompt or no draws: no interval; equal ratings: no R2."""
    y, p, zero = np.array([1.0, 3, 2, 5, 4]), np.array([1.0, 2, 3, 5, 5]), np.zeros(5)
    single = stats.metrics(y, p, np.arange(5), zero, draws=100)
    assert single["pairs"] == 0
    assert single["pearson_ci"] is not None
    for key in ("within_prompt_accuracy", "within_prompt_accuracy_ci", "within", "within_ci"):
        assert single[key] is None, key
    one = stats.metrics(y, p, np.zeros(5, int), zero, draws=100)
    assert one["pearson"] == pytest.approx(one["within"])
    assert one["between"] is None
    assert all(one[f"{name}_ci"] is None for name in POINTS)
    equal = stats.metrics(np.full(5, 6.0), p, np.array([0, 0, 1, 1, 1]), zero, draws=100)
    assert equal["r2"] is None
    assert equal["pearson"] is None
    assert equal["rmse"] is not None
    undrawn = stats.metrics(y, p, np.array([0, 0, 1, 1, 1]), zero, draws=0)
    assert undrawn["pearson"] is not None
    assert undrawn["pearson_ci"] is None


def test_one_free_deviation_has_no_within_prompt_r():
    """Three rows in two prompts: r within is +-1 by arithmetic, so there is none; two pairs have one."""
    y, p = np.array([1.0, 2.0, 5.0, 6.0]), np.array([0.3, 0.1, 0.7, 0.9])
    assert stats.metrics(y[:3], p[:3], np.array([0, 0, 1]), np.zeros(3), draws=9)["within"] is None
    assert stats.metrics(y, p, np.array([0, 0, 1, 1]), np.zeros(4), draws=9)["within"] == pytest.approx(0.0)


def test_draws_without_the_figure_are_left_out_and_most_without_it_means_no_interval():
    """Of three prompts, resamples where a side is constant have no r: a third is borne, 15/27 not."""
    y, groups, zero = np.array([5.1, 5.1, 6.4]), np.arange(3), np.zeros(3)
    borne = stats.metrics(y, np.array([0.1, 0.3, 0.7]), groups, zero, draws=500)
    assert all(np.isfinite(borne["pearson_ci"]))
    assert borne["pearson_ci"][0] > 0.9
    mostly = stats.metrics(y, np.array([0.1, 0.3, 0.1]), groups, zero, draws=500)
    assert mostly["pearson"] == pytest.approx(-0.5)
    assert mostly["pearson_ci"] is None


def test_only_prompts_with_pairs_carry_an_accuracy_interval():
    """With pairs in a single prompt, resampling cannot vary the accuracy, so it has no interval; two have."""
    y, p = np.array([1.0, 3, 5, 5, 2, 4]), np.array([2.0, 1, 3, 4, 1, 2])
    one = stats.metrics(y, p, np.array([0, 0, 1, 1, 2, 3]), np.zeros(6), draws=200)
    assert one["within_prompt_accuracy"] == 0.0
    assert one["within_prompt_accuracy_ci"] is None
    two = stats.metrics(y, p, np.array([0, 0, 1, 1, 2, 2]), np.zeros(6), draws=200)
    assert two["within_prompt_accuracy"] == 0.5
    assert two["within_prompt_accuracy_ci"] == [0.0, 1.0]


def ridge_out_of_fold(x, y, fold, penalty):
    """Out-of-fold ridge predictions with a bias, and the training mean behind each."""
    prediction, centre = np.empty(len(y)), np.empty(len(y))
    for held in np.unique(fold):
        train, test = fold != held, fold == held
        mean_x, mean_y = x[train].mean(axis=0), y[train].mean()
        gram = (x[train] - mean_x).T @ (x[train] - mean_x) + penalty * np.eye(x.shape[1])
        weight = np.linalg.solve(gram, (x[train] - mean_x).T @ (y[train] - mean_y))
        prediction[test], centre[test] = mean_y + (x[test] - mean_x) @ weight, mean_y
    return prediction, centre


def test_pooled_r_of_noise_is_zero_only_without_the_folds_intercept():
    """On noise raw pooled r is clearly negative, centred r averages 0; a planted effect shows in it."""
    rng = np.random.default_rng(10)
    raw, centred, planted = [], [], []  # the sd of one r is .13, so the mean's standard error .0065
    for _ in range(400):
        groups, y = equal_prompts(40, 3, rng)
        x, fold = rng.normal(size=(120, 60)), groups % 5
        prediction, centre = ridge_out_of_fold(x, y, fold, penalty=1000.0)
        raw.append(stats.metrics(y, prediction, groups, np.zeros(120), draws=0)["pearson"])
        centred.append(stats.metrics(y, prediction, groups, centre, draws=0)["pearson"])
        effect = y + x[:, 0]
        prediction, centre = ridge_out_of_fold(x, effect, fold, penalty=1000.0)
        planted.append(stats.metrics(effect, prediction, groups, centre, draws=0)["pearson"])
    assert np.mean(raw) < -0.1
    assert abs(np.mean(centred)) < 0.02
    assert np.mean(planted) > 0.2


# Bad input


def test_bad_rows_are_told_in_one_line(rated):
    """Rows that do not match, are not finite, or are none raise an error that says what was found."""
    y, prediction, groups, centre = rated
    with pytest.raises(InterpError, match="shapes"):
        stats.pearson(y, y[1:])
    with pytest.raises(InterpError, match="NaN"):
        stats.metrics(y, np.where(y > 6, np.nan, y), groups, centre)
    with pytest.raises(InterpError, match="groups of shape"):
        stats.metrics(y, prediction, groups[1:], centre)
    with pytest.raises(InterpError, match="0 rows"):
        stats.metrics(y[:0], y[:0], groups[:0], y[:0])
