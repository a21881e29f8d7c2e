"""Permutation nulls and corrected p-values against brute-force loops and data whose answer is known."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from interp import InterpError, nulls, stats


def equal_prompts(prompts, size, rng, share=1.0):
    """Groups and ratings of prompts of one size, with a prompt effect of sd `share`."""
    groups = np.repeat(np.arange(prompts), size)
    return groups, share * rng.normal(size=prompts)[groups] + rng.normal(size=prompts * size)


def blocks(column, groups):
    """The multiset of prompts' multisets of ratings."""
    return sorted(tuple(sorted(np.round(column[groups == code], 9))) for code in np.unique(groups))


def test_permute_across_exchanges_whole_blocks_of_equal_size():
    """Ten or more prompts of a size: the same blocks on other prompts, rows shuffled inside."""
    rng = np.random.default_rng(11)
    groups = rng.permutation(np.concatenate([np.repeat(np.arange(10), 3), np.repeat(np.arange(10, 22), 2)]))
    y = rng.normal(size=len(groups))
    permuted = nulls.permute_across(y, groups, 300, rng)
    assert permuted.shape == (len(y), 300)
    for column in permuted.T:
        assert blocks(column, groups) == blocks(y, groups)
    row = np.flatnonzero(groups == 0)[0]
    seen = np.isclose(permuted[row][:, None], y[None, :]).mean(axis=0)
    # Each of the 30 ratings in threes lands on this row with probability 1/30; sd of the share .0104.
    threes = groups < 10
    assert (seen[threes] > 0).all()
    assert np.abs(seen[threes] - 1 / 30).max() < 0.045
    assert (seen[~threes] == 0).all()


def test_permute_across_exchanges_means_among_rare_sizes():
    """Nine prompts of a size are too few for blocks: means move across rare sizes, deviations stay."""
    rng = np.random.default_rng(12)
    sizes = [3] * 9 + [2] * 4 + [1] + [4] * 10
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    y = rng.normal(size=len(groups))
    rare = np.flatnonzero(np.array(sizes) != 4)
    means = np.array([y[groups == code].mean() for code in range(len(sizes))])
    first_to = set()
    for column in nulls.permute_across(y, groups, 200, rng).T:
        moved = np.array([column[groups == code].mean() for code in rare])
        np.testing.assert_allclose(np.sort(moved), np.sort(means[rare]), atol=1e-12)
        first_to.add(int(rare[np.abs(moved - means[0]).argmin()]))
        for code, mean in zip(rare, moved, strict=True):
            deviations = np.sort(column[groups == code] - mean)
            np.testing.assert_allclose(deviations, np.sort(y[groups == code] - means[code]), atol=1e-12)
        fours = np.isin(groups, np.arange(14, 24))
        assert blocks(column[fours], groups[fours]) == blocks(y[fours], groups[fours])
    assert first_to == set(rare.tolist())


def test_permute_within_shuffles_each_prompt_uniformly():
    """Every draw keeps each prompt's ratings; the six orders of three rows are equally frequent."""
    rng = np.random.default_rng(13)
    groups = rng.permutation(np.repeat(np.arange(7) * 5, [1, 2, 3, 3, 4, 5, 6]))
    y = rng.normal(size=len(groups))
    permuted = nulls.permute_within(y, groups, 3000, rng)
    for code in np.unique(groups):
        rows = groups == code
        expected = np.broadcast_to(np.sort(y[rows])[:, None], (rows.sum(), 3000))
        np.testing.assert_array_equal(np.sort(permuted[rows], axis=0), expected)
    orders = permuted[groups == 10].argsort(axis=0).T @ [9, 3, 1]
    counts = np.unique(orders, return_counts=True)[1]
    assert len(counts) == 6
    assert scipy_stats.chisquare(counts).pvalue > 1e-3


def p_values(permute, statistic, rng, effect=0.0, data_sets=200):
    """max-T p of 8 cells on data with prompt effects in ratings and cells, `effect` planted in one."""
    found = []
    for _ in range(data_sets):
        groups, y = equal_prompts(30, 3, rng, share=1.5)
        cells = np.column_stack([equal_prompts(30, 3, rng, share=1.5)[1] for _ in range(8)])
        cells[:, 3] += effect * y
        permuted = permute(y, groups, 99, rng)
        null = np.stack([statistic(permuted, cell, groups) for cell in cells.T])
        found.append(nulls.max_t_p(statistic(y, cells, groups), null)[0])
    return np.array(found)


def pooled(y, p, groups):
    return stats.pearson_columns(y, p)


def shuffle_rows(y, groups, draws, rng):
    """The wrong null: rows exchanged as if completions of a prompt were independent."""
    return rng.permuted(np.tile(y[:, None], (1, draws)), axis=0)


@pytest.mark.parametrize(
    ("permute", "statistic"), [(nulls.permute_across, pooled), (nulls.permute_within, stats.within_columns)]
)
def test_corrected_p_is_uniform_on_noise_and_small_on_a_planted_effect(permute, statistic):
    """Nulls A and B: p of the best of 8 cells is uniform on noise, near its floor for a planted effect."""
    rng = np.random.default_rng(14)
    noise = p_values(permute, statistic, rng)
    assert scipy_stats.kstest(noise, "uniform").pvalue > 0.01
    assert p_values(permute, statistic, rng, effect=1.0, data_sets=20).max() <= 0.02


def test_shuffling_rows_freely_is_caught():
    """The same uniformity test rejects the null that ignores prompts, so it is able to fail."""
    noise = p_values(shuffle_rows, pooled, np.random.default_rng(15))
    assert scipy_stats.kstest(noise, "uniform").pvalue < 1e-6
    assert (noise < 0.05).mean() > 0.15


def test_max_t_matches_a_loop_and_ignores_cells_without_a_null():
    """p and z equal a loop over draws; NaN cells and cells whose null never moves do not count."""
    rng = np.random.default_rng(16)
    null = rng.normal(size=(6, 199)) * np.array([0.1, 0.2, 0.3, 0.1, 0.1, 0.1])[:, None]
    observed = np.array([0.15, 0.5, 0.3, np.nan, 0.9, 0.9])
    null[3, :], null[4, 7], null[5, :] = np.nan, np.nan, 0.05
    p, z = nulls.max_t_p(observed, null)
    sds = [np.std(null[cell], ddof=1) for cell in range(3)]
    best = max(observed[cell] / sds[cell] for cell in range(3))
    reached = sum(max(null[cell, t] / sds[cell] for cell in range(3)) >= best for t in range(199))
    assert 0 < reached < 199
    assert p == (1 + reached) / 200
    np.testing.assert_allclose(z, [*(observed[:3] / sds), np.nan, np.nan, np.nan])
    nothing, z = nulls.max_t_p(observed[3:], null[3:])
    assert nothing is None
    assert np.isnan(z).all()


def test_max_t_counts_permutations_that_return_the_real_labels():
    """Draws that equal the observed r up to rounding reach it, and p is never 0."""
    null = np.array([[0.3 + 1e-17, 0.1 + 0.2, 0.3 - 5e-17, 0.1]])
    assert nulls.max_t_p(np.array([0.1 + 0.2]), null)[0] == 4 / 5
    assert nulls.max_t_p(np.array([0.9]), null)[0] == 1 / 5


def test_control_ratings_are_one_random_mean_per_prompt():
    """Rows of a prompt share one rating; ratings are prompt means, and unrelated to the prompt's own."""
    rng = np.random.default_rng(17)
    groups, y = equal_prompts(400, 3, rng, share=3.0)
    order = rng.permutation(len(y))
    groups, y = groups[order], y[order]
    control = nulls.control_ratings(groups, y, rng)
    means = y - stats.centre_within(y, groups)
    assert np.abs(stats.centre_within(control, groups)).max() < 1e-12
    assert np.abs(control[:, None] - means[None, :]).min(axis=1).max() < 1e-12
    first = np.unique(groups, return_index=True)[1]
    assert np.abs(np.corrcoef(control[first], means[first])[0, 1]) < 0.2
    assert control[first].std() == pytest.approx(means.std(), rel=0.15)


def test_bad_input_is_told_in_one_line():
    """Too few draws, rows that do not match, and NaN raise an error that says what was found."""
    rng = np.random.default_rng(18)
    groups, y = equal_prompts(10, 3, rng)
    with pytest.raises(InterpError, match="at least 2 draws"):
        nulls.max_t_p(np.zeros(3), np.zeros((3, 1)))
    for permute in (nulls.permute_across, nulls.permute_within):
        with pytest.raises(InterpError, match="groups of shape"):
            permute(y, groups[1:], 5, rng)
        with pytest.raises(InterpError, match="NaN"):
            permute(np.where(y > 0, np.nan, y), groups, 5, rng)
