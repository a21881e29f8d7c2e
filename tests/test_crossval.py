"""Nested out-of-fold predictions and their stacks against scikit-learn, SciPy and loops."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.preprocessing import StandardScaler

from interp import crossval, ridge, stats
from interp.crossval import OutOfFold
from interp.ridge import LAMBDAS, Folds


def data(n=150, d=40, seed=0, equal=False):
    """Features with a planted signal, labels, five folds of equal or unequal size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = 0.3 + 0.2 * (x @ rng.normal(size=d) / np.sqrt(d)) + 0.2 * rng.normal(size=n)
    sizes = None if equal else [0.3, 0.25, 0.2, 0.15, 0.1]
    assignment = rng.permutation(n) % 5 if equal else rng.choice(5, n, p=sizes)
    return x, y, assignment


def r_of(y, signal):
    return float(stats.pearson_columns(y, signal)[0])


def nested(x, y, assignment):
    cell = ridge.cell(torch.from_numpy(x).float(), Folds.of(assignment))
    return crossval.nested(lambda _fold: cell, y, assignment)


@pytest.mark.parametrize("d", [12, 60, 250])
def test_nested_matches_grid_search(d):
    """Each fold predicted by scikit-learn's grid search inside the others: predictions to 1e-4 of the labels' sd.

    Folds are of equal size, because a grid search averages its splits unweighted. d = 12 takes the Gram engine.
    """
    x, y, assignment = data(d=d, equal=True)
    scaled = StandardScaler().fit_transform(x)
    found = nested(x, y, assignment)
    for a in range(5):
        train = assignment != a
        split = PredefinedSplit(assignment[train])
        search = GridSearchCV(Ridge(), {"alpha": list(LAMBDAS)}, cv=split, scoring="neg_mean_squared_error")
        search.fit(scaled[train], y[train])
        expected = search.predict(scaled[~train])
        np.testing.assert_allclose(found.prediction[~train], expected, atol=1e-4 * y.std())
        best = Ridge(alpha=search.best_params_["alpha"])
        for b in set(range(5)) - {a}:
            inside, held = train & (assignment != b), assignment == b
            expected = best.fit(scaled[inside], y[inside]).predict(scaled[held])
            np.testing.assert_allclose(found.inner[a, held], expected, atol=1e-4 * y.std())
        assert np.isnan(found.inner[a, assignment == a]).all()
    assert r_of(y, found.prediction - found.centre) > 0.3


def test_unequal_folds_weigh_rows_equally():
    """With folds of unequal size lambda minimises the mean squared error over rows, not over folds."""
    x, y, assignment = data(n=70, d=90, seed=3)
    scaled = StandardScaler().fit_transform(x)
    found = nested(x, y, assignment)
    for a in range(5):
        train = assignment != a
        errors = []
        for penalty in LAMBDAS:
            squared = []
            for b in set(range(5)) - {a}:
                inside, held = train & (assignment != b), assignment == b
                squared += list(
                    (Ridge(alpha=penalty).fit(scaled[inside], y[inside]).predict(scaled[held]) - y[held]) ** 2
                )
            errors.append(np.mean(squared))
        best = Ridge(alpha=LAMBDAS[int(np.argmin(errors))]).fit(scaled[train], y[train])
        np.testing.assert_allclose(found.prediction[~train], best.predict(scaled[~train]), atol=1e-4 * y.std())


def test_centre_and_constant_are_training_means():
    """`centre`, the constant's predictions and its inner ones, against loops over rows."""
    _, y, assignment = data(n=40)
    found = crossval.constant(y, assignment)
    expected = [y[assignment != fold].mean() for fold in assignment]
    np.testing.assert_allclose(crossval.centre_of(y, assignment), expected, rtol=1e-12)
    np.testing.assert_allclose(found.centre, expected, rtol=1e-12)
    np.testing.assert_array_equal(found.prediction, found.centre)
    for a in range(5):
        for i, fold in enumerate(assignment):
            if fold == a:
                assert np.isnan(found.inner[a, i])
            else:
                assert found.inner[a, i] == pytest.approx(y[(assignment != a) & (assignment != fold)].mean())


def test_no_features_give_the_constant_exactly():
    """Where nothing varies the predictions are the training means to the bit, so that no r comes out of rounding."""
    x, y, assignment = data()
    constant = crossval.constant(y, assignment)
    found = nested(np.full_like(x, 0.1), y, assignment)
    np.testing.assert_array_equal(found.prediction, constant.prediction)
    np.testing.assert_array_equal(found.inner, constant.inner)
    groups = np.arange(len(y)) // 2
    assert stats.metrics(y, found.prediction, groups, found.centre, draws=10)["pearson"] is None
    cell = ridge.cell(torch.from_numpy(x).float(), Folds.of(assignment))
    mixed = crossval.nested(lambda fold: cell if fold == 3 else None, y, assignment)
    held = assignment == 3
    np.testing.assert_array_equal(mixed.prediction[~held], constant.prediction[~held])
    np.testing.assert_array_equal(mixed.prediction[held], nested(x, y, assignment).prediction[held])


def test_features_may_differ_by_fold():
    """Fold a's predictions and inner predictions come from `cell_without(a)` alone."""
    x, y, assignment = data()
    other = np.random.default_rng(1).normal(size=x.shape)
    cells = [ridge.cell(torch.from_numpy(v).float(), Folds.of(assignment)) for v in (x, other)]
    found = crossval.nested(lambda fold: cells[fold == 2], y, assignment)
    parts = [nested(v, y, assignment) for v in (x, other)]
    for a in range(5):
        held = assignment == a
        np.testing.assert_array_equal(found.prediction[held], parts[a == 2].prediction[held])
        np.testing.assert_array_equal(found.inner[a], parts[a == 2].inner[a])


def test_held_out_labels_reach_neither_predictions_nor_inner_predictions():
    """New labels in fold 1 leave its predictions, centre and inner predictions; they change those of the others."""
    x, y, assignment = data(d=100)
    held = assignment == 1
    changed = np.where(held, -y, y)
    before, after = nested(x, y, assignment), nested(x, changed, assignment)
    np.testing.assert_allclose(before.prediction[held], after.prediction[held], atol=1e-5)
    np.testing.assert_allclose(before.inner[1][~held], after.inner[1][~held], atol=1e-5)
    np.testing.assert_allclose(before.centre[held], after.centre[held])
    assert np.abs(before.prediction - after.prediction)[~held].max() > 0.05
    assert np.abs(before.inner[2] - after.inner[2])[assignment != 2].max() > 0.05


# Scaling by all rows


def scaled_in_fold(x, y, assignment):
    """Nested ridge with features scaled by the training rows alone: predictions [lambda, row], lambda of each row."""

    def fit(train, held):
        scaler = StandardScaler().fit(x[train])
        z = np.asarray(scaler.transform(x[train]))
        values, axes = np.linalg.eigh(z.T @ z)
        scores = axes.T @ (z.T @ (y[train] - y[train].mean()))
        weights = axes @ (scores[:, None] / (values[:, None] + np.array(LAMBDAS)))
        return [(scaler.transform(x[rows]) @ weights + y[train].mean()).T for rows in held]

    outer, errors = np.empty((len(LAMBDAS), len(y))), np.zeros((5, len(LAMBDAS)))
    for a in range(5):
        (outer[:, assignment == a],) = fit(assignment != a, [assignment == a])
        for b in range(a):
            held = [assignment == a, assignment == b]
            for_a, for_b = fit(~(held[0] | held[1]), held)
            errors[a] += ((for_b - y[held[1]]) ** 2).sum(axis=1)
            errors[b] += ((for_a - y[held[0]]) ** 2).sum(axis=1)
    return outer, errors.argmin(axis=1)[assignment]


def residual_like(kind, rng, groups, d):
    """Correlated features with shared prompts; with large means and huge dimensions, or with heavy tails."""
    mix = rng.normal(size=(d, d)) * np.logspace(0, -1.5, d)
    x = (0.8 * rng.normal(size=(len(groups), d)) + 0.6 * rng.normal(size=(groups.max() + 1, d))[groups]) @ mix
    if kind == "huge dimensions":
        x += 20 * rng.normal(size=d)
        # Some rows sit on a token with massive activations (here a tenth of them), as residual streams do.
        x[:, :4] = 200 * x[:, :4] + 5000 + 3000 * (rng.random((len(groups), 1)) < 0.1) * rng.normal(size=4)
    if kind == "heavy tails":
        x = rng.standard_t(4, size=x.shape) @ mix + np.exp(0.6 * rng.normal(size=x.shape))
    return x


@pytest.mark.parametrize("kind", ["correlated", "huge dimensions", "heavy tails"])
def test_scaling_by_all_rows_moves_no_r(kind):
    """On 900 rows no r is .003 from that of features scaled in each fold, at any lambda and at the chosen ones.

    At the chosen ones this needs both to choose the same: where two lambdas are equally good to a part in a
    thousand, scaling may tip the balance as any change of data may, and on these sets it does not.
    """
    for seed, d in ((0, 60), (1, 60), (2, 120)):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(225), 4)
        assignment = (rng.permutation(225) % 5)[groups]
        x = residual_like(kind, rng, groups, d)
        y = StandardScaler().fit_transform(x) @ rng.normal(size=d)
        y = 0.3 + 0.2 * (y / y.std() + rng.normal(size=900) + 0.5 * rng.normal(size=225)[groups])
        cell = ridge.cell(torch.from_numpy(x).float(), Folds.of(assignment))
        assert cell is not None
        outer, chosen = scaled_in_fold(x, y, assignment)
        pairs = [
            (cell.outer(torch.from_numpy(y).float()[:, None], LAMBDAS[i])[:, 0].numpy(), outer[i]) for i in range(8)
        ]
        pairs.append((nested(x, y, assignment).prediction, np.take_along_axis(outer, chosen[None], 0)[0]))
        centre = crossval.centre_of(y, assignment)
        found = np.array([[r_of(y, p - centre) for p in pair] for pair in pairs])
        assert np.abs(found[:, 0] - found[:, 1]).max() < 0.003
        assert found[-1].min() > 0.4


# Stacks


def parts_of(y, assignment, strengths, seed=0):
    """Nested parts whose features hold the labels at these strengths (0: noise)."""
    rng = np.random.default_rng(seed)
    found = []
    for strength in strengths:
        x = rng.normal(size=(len(y), 15))
        x[:, 0] += strength * (y - y.mean()) / y.std()
        found.append(nested(x, y, assignment))
    return found


@pytest.fixture(scope="module")
def stacked():
    """Labels, folds and parts: a constant, two noisy readings of the labels, pure noise."""
    rng = np.random.default_rng(5)
    y, assignment = rng.normal(0.2, 0.4, size=200), rng.choice(5, 200, p=[0.3, 0.25, 0.2, 0.15, 0.1])
    return y, assignment, [crossval.constant(y, assignment), *parts_of(y, assignment, [0.5, 0.8, 0])]


def by_loops(parts, y, assignment):
    """The stack by another solver of bounded least squares; every prediction and rating less its own training mean."""
    prediction = np.empty(len(y))
    for a in range(5):
        train, held = assignment != a, assignment == a
        inside = np.array([y[train & (assignment != fold)].mean() for fold in assignment[train]])
        design = np.column_stack([p.inner[a, train] - inside for p in parts])
        weights = lsq_linear(design, y[train] - inside, bounds=(0, np.inf), tol=1e-12).x
        mean = y[train].mean()
        prediction[held] = mean + np.column_stack([p.prediction[held] - mean for p in parts]) @ weights
    return prediction


def test_stack_matches_bounded_least_squares(stacked):
    """Against another solver; the stack is better than either part that reads the labels."""
    y, assignment, parts = stacked
    found = crossval.stack(parts, y, assignment)
    np.testing.assert_allclose(found, by_loops(parts, y, assignment), atol=1e-6)
    for alone in (1, 2):
        r = [r_of(y, p - parts[0].centre) for p in (found, crossval.stack([parts[alone]], y, assignment))]
        assert r[0] > r[1]


def test_stack_weights_are_not_negative():
    """A part that reads the labels backwards gets weight 0 instead of being turned round."""
    rng = np.random.default_rng(6)
    y, assignment = rng.normal(size=200), rng.integers(5, size=200)
    (part,) = parts_of(y, assignment, [1.0])
    backwards = OutOfFold(2 * part.centre - part.prediction, part.centre, -part.inner)
    found = crossval.stack([backwards], y, assignment)
    np.testing.assert_allclose(found, part.centre, atol=1e-12)
    assert r_of(y, crossval.stack([part], y, assignment) - part.centre) > 0.5


def test_stack_never_uses_held_out_labels(stacked):
    """With the parts as given, new labels in fold 2 do not change its stacked predictions, and do change others."""
    y, assignment, parts = stacked
    held = assignment == 2
    before = crossval.stack(parts, y, assignment)
    after = crossval.stack(parts, np.where(held, -5 * y, y), assignment)
    np.testing.assert_allclose(before[held], after[held], atol=1e-12)
    assert np.abs(before - after)[~held].max() > 0.01


def test_a_useless_part_changes_little_and_a_planted_one_raises_r():
    """Over 5 sets: noise moves the stack's r by a hundredth at most on average, an independent reading adds 0.1."""
    useless, useful = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        y, assignment = rng.normal(size=240), rng.permutation(240) % 5
        first, second, noise = parts_of(y, assignment, [0.5, 0.5, 0.0], seed)
        scores = [
            r_of(y, crossval.stack(parts, y, assignment) - first.centre)
            for parts in ([first], [first, noise], [first, second])
        ]
        useless.append(scores[1] - scores[0])
        useful.append(scores[2] - scores[0])
    assert abs(np.mean(useless)) < 0.01
    assert max(np.abs(useless)) < 0.05
    assert np.mean(useful) > 0.1
    assert min(useful) > 0
