"""Mean prediction by rating: against resamples put together row by row."""

import numpy as np
import pytest

from interp import stats
from interp.analyses.findings import mean_by_rating


def made(prompts, signal=1.0, seed=0):
    """(scores in halves, predictions, prompt codes) of four completions a prompt."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(prompts), 4)
    scores = rng.integers(2, 21, len(groups)) / 2
    return scores, 5 + 0.4 * signal * (scores - 5) + rng.normal(size=len(groups)), groups


def test_mean_by_rating_matches_brute_force():
    """Means, counts and intervals equal those of resamples put together row by row; halves round upwards."""
    (scores, prediction, groups), draws = made(12), 60
    weights = stats.cluster_weights(groups, draws, 3)
    rounded = np.array([int(s + 0.5) for s in scores])
    found = mean_by_rating(scores, prediction, groups, draws=draws, seed=3)
    assert [f["rating"] for f in found] == sorted(set(rounded.tolist()))
    for row in found:
        mine = rounded == row["rating"]
        means = []
        for weight in weights:
            sample = np.repeat(prediction[mine], weight[groups[mine]])
            means += [sample.mean()] if len(sample) else []
        assert row["n"] == mine.sum()
        assert row["mean"] == pytest.approx(prediction[mine].mean())
        if len(set(groups[mine])) > 1 and 2 * len(means) >= draws:
            assert row["mean_ci"] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())
        else:
            assert row["mean_ci"] is None
    assert any(row["mean_ci"] for row in found)


def test_mean_by_rating_has_no_interval_for_one_prompt():
    """A rating that only one prompt carries has a mean and no interval."""
    _, prediction, groups = made(10)
    one, many = mean_by_rating(np.array([1.0] * 4 + [5.0] * 36), prediction, groups)
    assert (one["n"], one["mean_ci"]) == (4, None)
    assert many["mean_ci"][0] < many["mean"] < many["mean_ci"][1]


def test_mean_by_rating_shows_a_planted_slope_and_none_on_noise():
    """Predictions that follow the rating rise with it; on noise the intervals hold the overall mean."""
    planted = mean_by_rating(*made(150))
    assert planted[0]["mean_ci"][1] < planted[4]["mean_ci"][0] < planted[4]["mean_ci"][1] < planted[-1]["mean_ci"][0]
    scores, noise, groups = made(150, signal=0.0)
    inside = [row["mean_ci"][0] < noise.mean() < row["mean_ci"][1] for row in mean_by_rating(scores, noise, groups)]
    assert sum(inside) >= len(inside) - 2
