"""Ridge with nested cross-validation against scikit-learn refits in explicit loops."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from interp import ridge
from interp.ridge import LAMBDAS, Folds, GramCell, HatCell, Scaler

ENGINES = pytest.mark.parametrize("engine", [HatCell, GramCell])
#: Largest error of a prediction, in sd of the labels: float64 shows that the algebra is exact, float32 is what runs.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}


def features(kind, rng):
    """Designs [row, feature] that are large, wide, tiny or degenerate."""
    tall, wide = rng.normal(size=(90, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(40, 100))
    low_rank = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 20))
    return {
        "more rows than features": 5 + 3 * tall,
        "more features than rows": wide @ np.diag(np.logspace(0, 2, 100)),
        "one feature": rng.normal(size=(41, 1)),
        "fewer than two rows a fold": rng.normal(size=(9, 4)),
        "a constant feature": np.column_stack([np.full(90, 0.1), tall]),
        "every feature twice": np.hstack([tall, tall]),
        "rank 3, tall": low_rank,
        "rank 3, wide": np.hstack([low_rank] * 4),
        "rows that are equal": np.repeat(rng.normal(size=(20, 30)), 3, axis=0),
    }[kind]


KINDS = [
    "more rows than features",
    "more features than rows",
    "one feature",
    "fewer than two rows a fold",
    "a constant feature",
    "every feature twice",
    "rank 3, tall",
    "rank 3, wide",
    "rows that are equal",
]


def problem(kind, seed=0):
    """Features, three label vectors on a large offset, and five folds of unequal size."""
    rng = np.random.default_rng(seed)
    x = features(kind, rng)
    n = len(x)
    y = x[:, :1] * [0.2, -0.5, 0.0] + rng.normal(size=(n, 3)) * [1.0, 0.1, 3.0] + [4.0, 0.0, -1.0]
    assignment = rng.permutation(np.concatenate([np.arange(5), rng.choice(5, n - 5, p=[0.3, 0.25, 0.2, 0.15, 0.1])]))
    return x, y, assignment


def predict(x, y, train, held, penalty):
    return Ridge(alpha=penalty).fit(x[train], y[train]).predict(x[held]).reshape(held.sum(), -1)


def brute_force(x, y, assignment, penalties=LAMBDAS):
    """Outer predictions [lambda, row, target], inner ones [fold, lambda, row, target] and inner MSE, by refits."""
    k, scaled = assignment.max() + 1, StandardScaler().fit_transform(x)
    outer = np.empty((len(penalties), *y.shape))
    inner = np.full((k, len(penalties), *y.shape), np.nan)
    for i, penalty in enumerate(penalties):
        for a in range(k):
            outer[i, assignment == a] = predict(scaled, y, assignment != a, assignment == a, penalty)
        for a, b in combinations(range(k), 2):
            train = (assignment != a) & (assignment != b)
            inner[a, i, assignment == b] = predict(scaled, y, train, assignment == b, penalty)
            inner[b, i, assignment == a] = predict(scaled, y, train, assignment == a, penalty)
    return outer, inner, np.nanmean((inner - y) ** 2, axis=2)


def cell_of(engine, x, assignment, dtype):
    x = torch.from_numpy(x).to(dtype)
    return engine.of(Scaler.of(x)(x), Folds.of(assignment))


@ENGINES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nested_cv_matches_brute_force_sklearn(kind, dtype, engine):
    """Outer and inner predictions, inner errors and the chosen lambdas equal refits on the same scaled features."""
    x, y, assignment = problem(kind)
    outer, inner, mse = brute_force(x, y, assignment)
    cell, labels = cell_of(engine, x, assignment, dtype), torch.from_numpy(y).to(dtype)
    found = cell.nested(labels)
    tolerance, sd = TOLERANCE[dtype], y.std(axis=0)
    np.testing.assert_allclose(found.outer.numpy() / sd, outer / sd, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.inner_mse.numpy(), mse, rtol=4 * tolerance)
    near = np.sort(mse, axis=1)
    clear = near[:, 1] > near[:, 0] * (1 + 10 * tolerance)
    assert clear.mean() > 0.3  # elsewhere two lambdas are equally good to within the arithmetic
    np.testing.assert_array_equal(found.inner_mse.numpy().argmin(1)[clear], mse.argmin(1)[clear])
    for a, i in ((0, 0), (3, 5), (4, 7)):
        one = cell.outer(labels, LAMBDAS[i]).numpy()
        np.testing.assert_allclose(one / sd, outer[i] / sd, rtol=0, atol=tolerance)
        inside = cell.inner(labels, LAMBDAS[i], a).numpy()
        np.testing.assert_array_equal(np.isnan(inside[:, 0]), assignment == a)
        np.testing.assert_allclose(inside / sd, inner[a, i] / sd, rtol=0, atol=tolerance)


@ENGINES
def test_float32_is_within_a_ten_thousandth_of_what_the_features_predict(engine):
    """On anisotropic features with large means, errors are below 1e-4 of the predictions' own sd about their mean."""
    rng = np.random.default_rng(1)
    for n, d in ((300, 60), (150, 500)):
        spread = rng.normal(size=(d, d)) * np.logspace(0, -2, d)
        x = rng.normal(size=(n, d)) @ spread + 50 * rng.normal(size=d)
        y = x @ rng.normal(size=(d, 1)) / np.sqrt(d)
        y = 0.4 + 0.3 * (y - y.mean()) / y.std() + 0.3 * rng.normal(size=(n, 1))
        assignment = rng.permutation(n) % 5
        outer, _, mse = brute_force(x, y, assignment, LAMBDAS[::3])
        x32, y32 = torch.from_numpy(x).float(), torch.from_numpy(y).float()
        found = engine.of(Scaler.of(x32)(x32), Folds.of(assignment)).nested(y32, LAMBDAS[::3])
        error = np.abs(found.outer.numpy() - outer).max(axis=(1, 2))
        signal = (outer[:, :, 0] - Folds.of(assignment).training_mean(torch.from_numpy(y)).numpy()[:, 0]).std(axis=1)
        assert (error / signal).max() < 1e-4
        assert np.abs(found.inner_mse.numpy() / mse - 1).max() < 1e-4


@given(st.integers(0, 10**6), st.integers(3, 6), st.integers(1, 12), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_any_folds_match_brute_force(seed, k, d, extra):
    """Folds of any size down to one row, any number of them from three on, both engines."""
    rng = np.random.default_rng(seed)
    assignment = rng.permutation(np.concatenate([np.arange(k), rng.integers(k, size=extra)]))
    x, y = rng.normal(size=(k + extra, d)), rng.normal(size=(k + extra, 2))
    outer, _, mse = brute_force(x, y, assignment, LAMBDAS[:2])
    for engine in (HatCell, GramCell):
        found = cell_of(engine, x, assignment, torch.float64).nested(torch.from_numpy(y), LAMBDAS[:2])
        np.testing.assert_allclose(found.outer.numpy(), outer, atol=1e-8)
        np.testing.assert_allclose(found.inner_mse.numpy(), mse, rtol=1e-7)


def test_chosen_takes_each_fold_s_own_lambda():
    """For every target the rows of a fold come from the lambda with that fold's least inner error."""
    x, y, assignment = problem("more features than rows")
    folds = Folds.of(assignment)
    found = cell_of(HatCell, x, assignment, torch.float64).nested(torch.from_numpy(y))
    expected = [
        [found.outer[found.inner_mse[a, :, t].argmin(), i, t] for t in range(3)] for i, a in enumerate(assignment)
    ]
    torch.testing.assert_close(found.chosen(folds), torch.tensor(expected), rtol=0, atol=0)
    assert len(np.unique(found.inner_mse.argmin(1).numpy())) > 1


@ENGINES
@pytest.mark.parametrize("kind", ["more rows than features", "more features than rows"])
def test_many_label_vectors_equal_one_at_a_time(kind, engine):
    """The labels of one call do not touch each other, be they few (solver) or more than a fold has rows (inverse)."""
    x, y, assignment = problem(kind)
    labels = torch.from_numpy(np.random.default_rng(2).permuted(np.tile(y[:, :1], (1, 60)), axis=0))
    cell = cell_of(engine, x, assignment, torch.float64)
    together, nested = cell.outer(labels, 100.0), cell.nested(labels[:, :4])
    for t in (0, 3, 59):
        torch.testing.assert_close(together[:, [t]], cell.outer(labels[:, [t]], 100.0), rtol=0, atol=1e-10)
    for t in (0, 3):
        alone = cell.nested(labels[:, [t]])
        torch.testing.assert_close(nested.outer[:, :, [t]], alone.outer, rtol=0, atol=1e-10)
        torch.testing.assert_close(nested.inner_mse[:, :, [t]], alone.inner_mse, rtol=1e-10, atol=0)


@ENGINES
def test_refold_equals_a_new_decomposition(engine):
    """A decomposition laid out for other folds, also more of them, predicts as one made for them."""
    x, y, assignment = problem("more features than rows")
    others = np.random.default_rng(3).permutation(np.arange(len(x)) % 7)
    again = cell_of(engine, x, assignment, torch.float64).refold(Folds.of(others))
    fresh = cell_of(engine, x, others, torch.float64)
    labels = torch.from_numpy(y)
    torch.testing.assert_close(again.nested(labels).outer, fresh.nested(labels).outer, rtol=0, atol=1e-10)
    assert not torch.allclose(
        fresh.outer(labels, 100.0), cell_of(engine, x, assignment, torch.float64).outer(labels, 100.0)
    )


def test_a_linear_kernel_equals_its_features():
    """`of_kernel` centres x x^T and gives what `of` gives on centred features."""
    x, y, assignment = problem("more features than rows")
    x = x / x.std() + 1
    folds, labels = Folds.of(assignment), torch.from_numpy(y).float()
    raw = torch.from_numpy(x).float()
    kernel = HatCell.of_kernel(raw @ raw.T, folds).nested(labels)
    linear = HatCell.of(raw - raw.mean(0), folds).nested(labels)
    sd = labels.std(0)
    torch.testing.assert_close(kernel.outer / sd, linear.outer / sd, rtol=0, atol=1e-4)
    torch.testing.assert_close(kernel.inner_mse, linear.inner_mse, rtol=1e-4, atol=0)


def test_identical_rows_get_identical_predictions():
    """Rows with the same features differ by less than a millionth of the labels' size, whatever their labels."""
    x, y, assignment = problem("rows that are equal")
    prompts = np.repeat(np.arange(20), 3)
    assignment = assignment[::3][prompts]
    labels = torch.from_numpy(y).float()
    for engine in (HatCell, GramCell):
        found = cell_of(engine, x, assignment, torch.float32).nested(labels).outer.reshape(8, 20, 3, 3)
        assert ((found.amax(2) - found.amin(2)) / labels.abs().amax(0)).max() < 1e-6


@ENGINES
def test_held_out_labels_do_not_reach_their_predictions(engine):
    """New labels in fold 2 leave its outer predictions and its inner errors as they were, and change the others'."""
    x, y, assignment = problem("more rows than features")
    held = assignment == 2
    changed = np.where(held[:, None], y[::-1] + 2, y)
    cell = cell_of(engine, x, assignment, torch.float64)
    before, after = (cell.nested(torch.from_numpy(labels)) for labels in (y, changed))
    torch.testing.assert_close(before.outer[:, held], after.outer[:, held], rtol=0, atol=1e-10)
    torch.testing.assert_close(before.inner_mse[2], after.inner_mse[2], rtol=1e-10, atol=0)
    assert (before.outer[:, ~held] - after.outer[:, ~held]).abs().max() > 0.1
    assert ((before.inner_mse / after.inner_mse)[[0, 1, 3, 4]] - 1).abs().max() > 0.1


def degrees_of_freedom(x, penalty):
    """tr(H) - 1 of ridge on the scaled features, through the hat matrix."""
    z = StandardScaler().fit_transform(x)
    return np.trace(z @ np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T))


@ENGINES
@pytest.mark.parametrize("kind", ["more rows than features", "more features than rows", "every feature twice"])
def test_penalty_for_gives_the_degrees_of_freedom_asked_for(kind, engine):
    """The hat matrix at that lambda has the trace, and labels have no part in it."""
    x, _, assignment = problem(kind)
    cell = cell_of(engine, x, assignment, torch.float32)
    for freedom in (0.5, 3.0, 9.0):
        assert degrees_of_freedom(x, cell.penalty_for(freedom)) == pytest.approx(freedom, rel=1e-3)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "one feature"])
@pytest.mark.parametrize("penalty", [LAMBDAS[0], LAMBDAS[4]])
def test_fit_matches_scaled_ridge_in_raw_units(kind, penalty):
    """Weights and bias, applied to raw features, predict as StandardScaler + Ridge does."""
    x, y, _ = problem(kind)
    weights, bias = ridge.fit(torch.from_numpy(x), torch.from_numpy(y), penalty)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(x, y)
    np.testing.assert_allclose((torch.from_numpy(x) @ weights + bias).numpy(), expected.predict(x), atol=1e-8)
    new = x[::-1] * 1.5 - 0.3 * x
    np.testing.assert_allclose((torch.from_numpy(new) @ weights + bias).numpy(), expected.predict(new), atol=1e-8)


def test_scale_and_shift_of_features_change_no_prediction():
    """Features in other units and with other offsets: the same fit on all rows and the same held-out predictions."""
    x, y, assignment = problem("more rows than features")
    rng = np.random.default_rng(4)
    moved = x * np.exp(rng.normal(size=12) * 3) + 10 * rng.normal(size=12)
    fits = [ridge.fit(torch.from_numpy(v), torch.from_numpy(y), 300.0) for v in (x, moved)]
    plain, shifted = (torch.from_numpy(v) @ w + b for v, (w, b) in zip((x, moved), fits, strict=True))
    torch.testing.assert_close(plain, shifted, rtol=0, atol=1e-8)
    cells = [cell_of(HatCell, v, assignment, torch.float64) for v in (x, moved)]
    torch.testing.assert_close(*(c.outer(torch.from_numpy(y), 300.0) for c in cells), rtol=0, atol=1e-8)
    more = ridge.fit(torch.from_numpy(x), torch.from_numpy(3 * y - 7), 300.0)
    torch.testing.assert_close(more[0], 3 * fits[0][0])
    torch.testing.assert_close(more[1], 3 * fits[0][1] - 7)


def test_scaler_leaves_constant_features_at_zero():
    """Constant features, in float32 far from 0 too, become 0 and get weight 0; the others have mean 0 and sd 1."""
    rng = np.random.default_rng(5)
    x = torch.from_numpy(
        np.column_stack([np.full(777, 1234.567), rng.normal(100, 0.5, 777), np.zeros(777), np.full(777, 0.1)])
    )
    scaled = Scaler.of(x.float())(x.float())
    assert not scaled[:, [0, 2, 3]].any()
    assert scaled[:, 1].mean().abs() < 1e-4
    assert scaled[:, 1].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    flicker = x.float()[:, :1].repeat(1, 2)
    flicker[::2, 0] = torch.nextafter(flicker[::2, 0], torch.tensor(torch.inf))  # equal but for the last bit
    assert not Scaler.of(flicker)(flicker).any()
    weights, bias = ridge.fit(x.float(), x[:, 1:2], 1.0)
    assert weights[[0, 2, 3], 0].tolist() == [0, 0, 0]
    assert torch.isfinite(bias).all()
    assert weights[1, 0] > 0.9


def test_the_smaller_engine_is_chosen_and_nothing_is_decomposed_where_nothing_varies():
    """Fold Grams for many rows, the hat matrix else, None for constant features."""
    rng = np.random.default_rng(6)
    folds = Folds.of(np.arange(100) % 5)
    tall, wide = (torch.from_numpy(rng.normal(size=(100, d))).float() for d in (20, 60))
    assert isinstance(ridge.cell(tall, folds), GramCell)
    assert isinstance(ridge.cell(wide, folds), HatCell)
    assert ridge.cell(torch.full((100, 20), 0.3), folds) is None


def test_folds_lay_out_rows_and_lift_them_back():
    """`lay` puts each fold's rows in its block, zeros elsewhere; `lift` undoes it; `pairs` are all pairs."""
    rng = np.random.default_rng(7)
    assignment = rng.permutation(np.repeat(np.arange(4), [1, 5, 3, 7]))
    folds, values = Folds.of(assignment), torch.from_numpy(rng.normal(size=(16, 2)))
    laid = folds.lay(values)
    assert laid.shape == (4, 7, 2)
    for a in range(4):
        rows = np.flatnonzero(assignment == a)
        assert folds.rows(a).tolist() == rows.tolist()
        torch.testing.assert_close(laid[a, : len(rows)], values[rows])
        assert not laid[a, len(rows) :].any()
    torch.testing.assert_close(folds.lift(laid), values)
    assert folds.pairs == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_training_mean_is_the_mean_of_the_other_folds():
    """Against a loop over rows."""
    rng = np.random.default_rng(8)
    assignment, y = rng.permutation(np.repeat(np.arange(3), [2, 9, 4])), rng.normal(3, 1, size=(15, 2))
    expected = np.array([y[assignment != fold].mean(axis=0) for fold in assignment])
    np.testing.assert_allclose(Folds.of(assignment).training_mean(torch.from_numpy(y)).numpy(), expected)
