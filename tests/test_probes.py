"""The layer x position sweep against scikit-learn's searches, its nulls on noise, planted directions, saved probes."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats as scipy_stats
from sklearn.linear_model import Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.preprocessing import StandardScaler

from interp import InterpError, nulls, probes, stats
from interp.activations import Activations
from interp.artifacts import save_json, save_tensors
from interp.crossval import centre_of
from interp.probes import NULL_FREEDOM, Choice, Permutations, Probe
from interp.ridge import LAMBDAS, Folds


@dataclasses.dataclass(frozen=True)
class InMemory(Activations):
    """Activations that are arrays by (layer, position), handed out after a random delay (seconds)."""

    tensors: dict[tuple[int, str], torch.Tensor]
    delay: float

    def cells(self, layer, names):
        for name in names:
            time.sleep(self.delay * np.random.default_rng().random())
            yield name, self.tensors[layer, name]


def recording(cells, delay=0.0):
    tensors = {key: torch.from_numpy(np.asarray(x)) for key, x in cells.items()}
    rows, d_model = next(iter(tensors.values())).shape
    layers, names = ({key[i]: None for key in cells} for i in (0, 1))
    return InMemory(Path(), "resid", tuple(layers), tuple(names), rows, d_model, 30, (), tensors, delay)


def prompts(count, each, rng, share=0.5, columns=None):
    """Values that completions of a prompt share to this part of their variance: [row] or [row, columns]."""
    size = () if columns is None else (columns,)
    groups = np.repeat(np.arange(count), each)
    own = np.sqrt(1 - share) * rng.normal(size=(count * each, *size))
    return np.sqrt(share) * rng.normal(size=(count, *size))[groups] + own


def rows_of(count, each, rng):
    """Prompt codes and five folds by prompt."""
    groups = np.repeat(np.arange(count), each)
    return groups, (rng.permutation(count) % 5)[groups]


LAYERS, POSITIONS = (0, 4, 9), ("last", "mean")


@pytest.fixture(scope="module")
def small():
    """Six cells of which three hold some of the rating, two targets, folds of unequal size."""
    rng = np.random.default_rng(1)
    n, d = 75, 20
    assignment = rng.choice(5, n, p=[0.3, 0.25, 0.2, 0.15, 0.1])
    targets = rng.normal(0.2, 0.3, size=(n, 2))
    cells = {}
    for i, layer in enumerate(LAYERS):
        for position in POSITIONS:
            x = rng.normal(size=(n, d)) * np.logspace(0, 2, d) + 10
            x[:, 0] += i * targets[:, 0]
            x[:, 1] -= 10 * targets[:, 1] if position == "mean" else 0
            cells[layer, position] = x
    return cells, targets, assignment


def sweep(cells, targets, assignment, layers=LAYERS, positions=POSITIONS, delay=0.0, **options):
    return probes.sweep(recording(cells, delay), targets, assignment, layers=layers, positions=positions, **options)


def searched(x, y, assignment):
    """The out-of-fold squared error of each lambda on all of x, by scikit-learn (one lambda per column)."""
    columns = np.repeat(y[:, None], len(LAMBDAS), axis=1)
    ridge: Any = Ridge(alpha=np.array(LAMBDAS))  # pyright: ignore[reportArgumentType] - one per column is allowed
    prediction = cross_val_predict(ridge, x, columns, cv=PredefinedSplit(assignment))
    return ((prediction - columns) ** 2).mean(axis=0)


def brute_search(cells, y, assignment):
    """Headline predictions, each cell's own, the choices of the outer folds, and the choice on all rows."""
    scaled = {key: StandardScaler().fit_transform(x) for key, x in cells.items()}
    headline, own, choices = np.empty(len(y)), {key: np.empty(len(y)) for key in cells}, []
    for a in range(5):
        train = assignment != a
        errors = {}
        for key, x in scaled.items():
            found = searched(x[train], y[train], assignment[train])
            errors |= {(key, penalty): error for penalty, error in zip(LAMBDAS, found, strict=True)}
            model = Ridge(alpha=LAMBDAS[int(np.argmin(found))]).fit(x[train], y[train])
            own[key][~train] = model.predict(x[~train])
        key, penalty = min(errors, key=errors.__getitem__)
        headline[~train] = Ridge(alpha=penalty).fit(scaled[key][train], y[train]).predict(scaled[key][~train])
        choices.append(Choice(a, key[0], key[1], penalty))
    everywhere = {
        (key, penalty): error
        for key, x in scaled.items()
        for penalty, error in zip(LAMBDAS, searched(x, y, assignment), strict=True)
    }
    key, penalty = min(everywhere, key=everywhere.__getitem__)
    return headline, own, choices, Choice(None, key[0], key[1], penalty)


def test_sweep_matches_a_brute_force_search_with_sklearn(small):
    """Each outer fold's cell and lambda, the headline, each cell's own r and the final choice, for both targets."""
    cells, targets, assignment = small
    grid, _, _ = sweep(cells, targets, assignment)
    chosen = set()
    for t in range(2):
        headline, own, choices, best = brute_search(cells, targets[:, t], assignment)
        assert grid.choices[t] == tuple(choices)
        chosen |= {(choice.layer, choice.position) for choice in choices}
        np.testing.assert_allclose(grid.heldout[:, t], headline, atol=1e-4 * targets.std())
        if t == 0:
            assert grid.best == best
            centre = centre_of(targets[:, 0], assignment)
            for i, layer in enumerate(LAYERS):
                for j, position in enumerate(POSITIONS):
                    expected = own[layer, position]
                    np.testing.assert_allclose(grid.cell_prediction[i, j], expected, atol=1e-4 * targets.std())
                    r = scipy_stats.pearsonr(expected - centre, targets[:, 0])[0]
                    assert grid.pearson[i, j] == pytest.approx(r, abs=1e-4)
    assert len(chosen) > 1


def test_targets_do_not_touch_each_other(small):
    """Ten targets at once are chosen for and predicted as one at a time."""
    cells, targets, assignment = small
    rng = np.random.default_rng(2)
    many = np.column_stack([targets, rng.permuted(np.tile(targets[:, :1], (1, 8)), axis=0)])
    together, _, _ = sweep(cells, many, assignment)
    for t in (0, 1, 7):
        alone, _, _ = sweep(cells, many[:, [t]], assignment)
        assert alone.choices[0] == together.choices[t]
        np.testing.assert_allclose(alone.heldout[:, 0], together.heldout[:, t], atol=1e-5)


def test_choices_do_not_depend_on_the_order_of_the_workers(small):
    """One worker or four that finish in any order choose the same; of identical cells the first always wins."""
    cells, targets, assignment = small
    doubled = {(2 * layer + twin, name): x for (layer, name), x in cells.items() for twin in (0, 1)}
    layers = tuple(sorted({layer for layer, _ in doubled}))
    threads = torch.get_num_threads()
    grids = []
    try:
        for count in (1, 4, 4, 4):
            torch.set_num_threads(count)
            delay = 0.0 if count == 1 else 0.02
            grids.append(sweep(doubled, targets, assignment, layers=layers, delay=delay)[0])
    finally:
        torch.set_num_threads(threads)
    for grid in grids[1:]:
        assert grid.choices == grids[0].choices
        assert grid.best == grids[0].best
        np.testing.assert_allclose(grid.heldout, grids[0].heldout, atol=1e-6)
    assert all(choice.layer % 2 == 0 for grid in grids for choices in grid.choices for choice in choices)


def test_held_out_ratings_reach_neither_predictions_nor_choices(small):
    """New ratings in fold 1 leave its choice and predictions as they were, and change those of other folds."""
    cells, targets, assignment = small
    held = assignment == 1
    changed = np.where(held[:, None], targets[::-1] + 0.5, targets)
    before, after = (sweep(cells, y, assignment)[0] for y in (targets, changed))
    np.testing.assert_allclose(before.heldout[held], after.heldout[held], atol=1e-5)
    assert [c[1] for c in before.choices] == [c[1] for c in after.choices]
    assert np.abs(before.heldout - after.heldout)[~held].max() > 0.05


def test_spread_repeats_the_choice_with_other_folds_on_fewer_layers(small):
    """Each further fold assignment gives what a sweep over those layers with those folds gives."""
    cells, targets, assignment = small
    others = [np.random.default_rng(s).permutation(len(assignment)) % 5 for s in (3, 4)]
    _, spread, _ = sweep(cells, targets, assignment, spread=others, spread_layers=[0, 9])
    assert len(spread) == 3
    for folds, found in zip([assignment, *others], spread, strict=True):
        expected, _, _ = sweep(cells, targets[:, :1], folds, layers=(0, 9))
        np.testing.assert_allclose(found, expected.heldout[:, 0], atol=1e-5)


def test_progress_and_table_name_every_cell(small):
    """`progress` is called once per cell with its r, and `to_frame` has a line for each."""
    cells, targets, assignment = small
    seen = {}
    grid, _, share = sweep(
        cells, targets, assignment, progress=lambda layer, position, r: seen.update({(layer, position): r})
    )
    assert set(seen) == set(cells)
    assert share == 0
    table = grid.to_frame()
    for line in table.to_dict("records"):
        assert seen[line["layer"], line["position"]] == pytest.approx(line["pearson"])
    assert len(table) == len(cells)
    facts = {"layer": 4, "position": "mean", "lambda": 10.0}
    assert Choice(2, 4, "mean", 10.0).to_dict() == {"fold": 2, **facts}
    assert Choice(None, 4, "mean", 10.0).to_dict() == facts


def test_out_of_fold_holds_the_inner_predictions_of_the_chosen_cells(small):
    """Inner predictions come from each fold's choice, refitted by scikit-learn without both folds."""
    cells, targets, assignment = small
    y = targets[:, 0]
    grid, _, _ = sweep(cells, targets, assignment)
    found = probes.out_of_fold(recording(cells), grid, y, assignment)
    np.testing.assert_array_equal(found.prediction, grid.heldout[:, 0])
    np.testing.assert_allclose(found.centre, [y[assignment != fold].mean() for fold in assignment])
    np.testing.assert_array_equal(np.isnan(found.inner), np.arange(5)[:, None] == assignment)
    for choice in grid.choices[0]:
        x = StandardScaler().fit_transform(cells[choice.layer, choice.position])
        for b in set(range(5)) - {choice.fold}:
            train = (assignment != choice.fold) & (assignment != b)
            expected = Ridge(alpha=choice.penalty).fit(x[train], y[train]).predict(x[assignment == b])
            np.testing.assert_allclose(found.inner[choice.fold, assignment == b], expected, atol=1e-4 * y.std())


def test_sweep_reads_recordings_from_disk(small, tmp_path):
    """Shards with rows out of order, as `record` writes them, give what the arrays give."""
    cells, targets, assignment = small
    n = len(assignment)
    order = np.random.default_rng(5).permutation(n)
    shards = [{"name": str(i), "rows": rows.tolist()} for i, rows in enumerate(np.array_split(order, 3))]
    for shard in shards:
        values = {
            f"layer.{layer}": torch.from_numpy(np.stack([cells[layer, p][shard["rows"]] for p in POSITIONS])).float()
            for layer in LAYERS
        }
        save_tensors(tmp_path / f"shard-{shard['name']}.safetensors", values)
    facts = {"site": "resid", "layers": LAYERS, "positions": POSITIONS, "rows": n, "d_model": 20, "n_layers": 9}
    save_json(tmp_path / "manifest.json", {**facts, "shards": shards})
    stored = Activations.open(tmp_path)
    found, _, _ = probes.sweep(stored, targets, assignment, layers=LAYERS, positions=POSITIONS)
    expected, _, _ = sweep(cells, targets, assignment)
    assert found.choices == expected.choices
    np.testing.assert_allclose(found.heldout, expected.heldout, atol=1e-6)
    probe = probes.refit(stored, Choice(None, 9, "mean", 100.0), targets[:, 0], (1, 10), {})
    assert probe.hook_name == "blocks.8.hook_resid_post"


# Nulls


@pytest.mark.parametrize("block", [probes.NULL_BLOCK, 150], ids=["one block", "blocks of two"])
def test_null_matches_refits_on_permuted_ratings(small, block, monkeypatch):
    """Each cell's r on real and permuted ratings, pooled and within prompts, at one label-free lambda, by refits."""
    monkeypatch.setattr(probes, "NULL_BLOCK", block)
    cells, targets, _ = small
    rng = np.random.default_rng(6)
    groups = np.repeat(np.arange(25), 3)
    assignment = groups % 5
    y = targets[:, 0]
    across, within = nulls.permute_across(y, groups, 4, rng), nulls.permute_within(y, groups, 4, rng)
    grid, _, share = sweep(cells, targets, assignment, permutations=Permutations(across, within, groups))
    assert grid.null is not None
    assert 0 < share < 1
    for number, (layer, position) in enumerate((la, p) for la in LAYERS for p in POSITIONS):
        z = StandardScaler().fit_transform(cells[layer, position])
        squared = np.linalg.svd(z, compute_uv=False) ** 2
        low, high = 1e-3, 1e9
        while high / low > 1 + 1e-12:
            middle = np.sqrt(low * high)
            freedom = (squared / (squared + middle)).sum()
            low, high = (middle, high) if freedom > NULL_FREEDOM * len(y) else (low, middle)

        def refitted(labels, z=z, penalty=low):
            prediction = cross_val_predict(Ridge(alpha=penalty), z, labels, cv=PredefinedSplit(assignment))
            return prediction - centre_of(labels, assignment)

        for found, labels in [(grid.null.observed[number], y), *zip(grid.null.across[number], across.T, strict=True)]:
            assert found == pytest.approx(scipy_stats.pearsonr(refitted(labels), labels)[0], abs=1e-4)
        inside = [(grid.null.observed_within[number], y), *zip(grid.null.within[number], within.T, strict=True)]
        for found, labels in inside:
            own = [stats.centre_within(v, groups) for v in (refitted(labels), labels)]
            assert found == pytest.approx(scipy_stats.pearsonr(*own)[0], abs=1e-4)


@pytest.mark.parametrize(("d", "layers"), [(64, 6), (250, 3)], ids=["grams", "hat matrix"])
def test_nested_r_of_noise_is_zero_and_of_a_planted_rating_is_not(d, layers):
    """50 ratings without a rating in the activations: mean nested r within .02 of 0; a planted one is found.

    Layers x 4 positions whose activations share half of their variance; 960 rows, those of a prompt share half of
    theirs. The sd of one nested r is .055, so the mean's standard error is .008.
    """
    rng = np.random.default_rng(d)
    _, assignment = rows_of(240, 4, rng)
    noise = 0.3 + 0.3 * prompts(240, 4, rng, columns=50)
    shared = prompts(240, 4, rng, columns=d)
    planted = 0.3 + 0.1 * shared[:, :10].sum(axis=1) + 0.3 * prompts(240, 4, rng)
    positions = ("first", "d5", "last", "mean")
    cells = {
        (layer, p): (np.sqrt(0.5) * shared + np.sqrt(0.5) * prompts(240, 4, rng, columns=d)).astype(np.float32)
        for layer in range(layers)
        for p in positions
    }
    targets = np.column_stack([planted, noise])
    grid, _, _ = sweep(cells, targets, assignment, layers=range(layers), positions=positions)
    centre = Folds.of(assignment).training_mean(torch.from_numpy(targets)).numpy()
    r = stats.pearson_columns(targets, grid.heldout - centre)
    assert r[0] > 0.3
    assert abs(r[1:].mean()) < 0.02
    assert r[1:].std() < 0.08


def noise_cells(rng, d=24):
    cells = {(layer, p): prompts(24, 3, rng, columns=d) for layer in (0, 1) for p in POSITIONS}
    return cells, *rows_of(24, 3, rng)


def p_values(effect, data_sets, seed):
    """max-T p [data set, null A or B] of sweeps over four cells, one of which holds `effect` times the rating."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(data_sets):
        cells, groups, assignment = noise_cells(rng)
        y = 0.3 * prompts(24, 3, rng)
        cells[1, "mean"][:, 0] += effect * y
        draws = [permute(y, groups, 79, rng) for permute in (nulls.permute_across, nulls.permute_within)]
        grid, _, _ = sweep(
            cells, y[:, None], assignment, layers=(0, 1), permutations=Permutations(draws[0], draws[1], groups)
        )
        null = grid.null
        assert null is not None
        pairs = ((null.observed, null.across), (null.observed_within, null.within))
        found.append([nulls.max_t_p(*pair)[0] for pair in pairs])
    return np.array(found, float)


def test_corrected_p_is_uniform_on_noise_and_small_for_a_planted_direction():
    """Under nulls A and B the best cell's p is uniform over noise (Kolmogorov-Smirnov), near its floor if planted."""
    noise = p_values(0.0, 70, seed=7)
    for p in noise.T:
        assert scipy_stats.kstest(p, "uniform").pvalue > 0.02
    assert p_values(20.0, 4, seed=8).max() <= 2 / 80


def test_nested_p_is_uniform_on_noise_and_small_for_a_planted_direction():
    """The rank of the headline among headlines of permuted ratings: all 20 ranks equally likely; first when planted."""
    rng = np.random.default_rng(9)
    ranks = []
    for _ in range(2):
        cells, groups, assignment = noise_cells(rng)
        ratings = 0.3 * prompts(24, 3, rng, columns=50)
        planted = ratings[:, 0]
        cells[0, "last"][:, 0] += 20 * planted
        permuted = [np.column_stack([y[:, None], nulls.permute_across(y, groups, 19, rng)]) for y in ratings.T]
        targets = np.column_stack(permuted)
        grid, _, _ = sweep(cells, targets, assignment, layers=(0, 1))
        centre = Folds.of(assignment).training_mean(torch.from_numpy(targets)).numpy()
        r = stats.pearson_columns(targets, grid.heldout - centre).reshape(50, 20)
        assert np.isfinite(r).all()
        above = (r[:, 1:] >= r[:, :1]).sum(axis=1)
        assert above[0] == 0
        assert r[0, 0] > 0.5
        ranks += list(above[1:])
    counts = np.bincount(ranks, minlength=20).reshape(5, 4).sum(axis=1)
    assert scipy_stats.chisquare(counts).pvalue > 0.02


def test_a_cell_without_variation_is_no_cell(small):
    """Constant activations have NaN everywhere and are never chosen; alone they are refused."""
    rng = np.random.default_rng(10)
    groups = np.repeat(np.arange(25), 3)
    assignment, y = groups % 5, rng.normal(0.3, 0.2, size=75)
    flat = {key: np.full((75, 20), 0.1, np.float32) for key in small[0]}
    flat[4, "mean"] = rng.normal(size=(75, 20)).astype(np.float32)
    draws = [permute(y, groups, 20, rng) for permute in (nulls.permute_across, nulls.permute_within)]
    grid, _, _ = sweep(flat, y[:, None], assignment, permutations=Permutations(draws[0], draws[1], groups))
    only = np.zeros((3, 2), bool)
    only[1, 1] = True
    np.testing.assert_array_equal(np.isfinite(grid.pearson), only)
    np.testing.assert_array_equal(np.isfinite(grid.cell_prediction).all(axis=2), only)
    assert grid.null is not None
    for array in (grid.null.across, grid.null.within, grid.null.observed[:, None], grid.null.observed_within[:, None]):
        np.testing.assert_array_equal(np.isfinite(array).all(axis=1), only.ravel())
    assert {(c.layer, c.position) for c in (*grid.choices[0], grid.best)} == {(4, "mean")}
    with pytest.raises(InterpError, match="same in every row"):
        sweep(flat, y[:, None], assignment, layers=(0, 9))


def test_activations_of_the_prompt_have_no_r_within_prompts():
    """Equal activations for all completions of a prompt: no within-prompt r, on real or permuted ratings."""
    rng = np.random.default_rng(11)
    groups, assignment = rows_of(30, 4, rng)
    y = 0.5 + 0.3 * prompts(30, 4, rng)
    cells = {(0, "prompt_end"): rng.normal(size=(30, 200))[groups], (0, "last"): rng.normal(size=(120, 200))}
    draws = [permute(y, groups, 30, rng) for permute in (nulls.permute_across, nulls.permute_within)]
    options = {
        "layers": (0,),
        "positions": ("prompt_end", "last"),
        "permutations": Permutations(draws[0], draws[1], groups),
    }
    grid, _, _ = sweep(cells, y[:, None], assignment, **options)
    assert grid.null is not None
    assert np.isnan(grid.null.within[0]).all()
    assert np.isnan(grid.null.observed_within[0])
    assert np.isfinite(grid.null.across[0]).all()
    assert np.isfinite(grid.null.within[1]).all()
    figures = stats.metrics(y, grid.cell_prediction[0, 0], groups, centre_of(y, assignment), draws=10)
    assert figures["within"] is None
    assert figures["within_prompt_accuracy"] in (0.5, None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_ratings_and_activations_that_are_not_finite_are_refused(small, bad):
    """One line that says which."""
    cells, targets, assignment = small
    broken = targets.copy()
    broken[3, 1] = bad
    with pytest.raises(InterpError, match="ratings hold NaN"):
        sweep(cells, broken, assignment)
    x = cells[4, "mean"].copy()
    x[7, 2] = bad
    with pytest.raises(InterpError, match="layer 4 at mean"):
        sweep({**cells, (4, "mean"): x}, targets, assignment)


def test_correlate_matches_scipy_and_is_nan_for_constants():
    """Column by column."""
    rng = np.random.default_rng(12)
    a, b = torch.from_numpy(rng.normal(size=(30, 4))), torch.from_numpy(rng.normal(size=(30, 4)))
    a[:, 2] = 0
    found = probes.correlate(a, b)
    for t in (0, 1, 3):
        assert found[t].item() == pytest.approx(scipy_stats.pearsonr(a[:, t], b[:, t])[0])
    assert torch.isnan(found[2])


# Directions


def anisotropic(rng, count, each, d):
    """Activations [row, d] like a residual stream's, and a direction that reads them where they vary.

    Correlated features whose principal axes differ tenfold in sd, two dimensions 40 times larger than the others,
    large means. A direction can only be recovered where the activations vary, so the planted one is drawn from
    their covariance (its square root times white noise).
    """
    axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
    spread = np.logspace(0, -1, d)
    size = np.where(np.arange(d) < 2, 40.0, 1.0)
    x = (prompts(count, each, rng, columns=d) * spread) @ axes.T * size + 5 * size * rng.normal(size=d)
    return x, axes @ (spread * rng.normal(size=d)) / size


def cosine(probe, direction):
    return abs(float(np.dot(probe.unit.numpy(), direction)) / np.linalg.norm(direction))


def test_a_planted_direction_is_recovered_and_a_shuffled_one_is_not():
    """One cell's activations along a direction make half of the rating's variance; 50 rows for each feature.

    The sweep finds the cell, and the refit has a cosine above 0.9 with the direction in raw units. Ratings
    shuffled across prompts give no cell, no significance and no such cosine.
    """
    rng = np.random.default_rng(13)
    groups, assignment = rows_of(600, 4, rng)
    cells, directions = {}, {}
    for layer in (3, 4, 5):
        for position in POSITIONS:
            cells[layer, position], directions[layer, position] = anisotropic(rng, 600, 4, 48)
    signal = cells[4, "mean"] @ directions[4, "mean"]
    signal = (signal - signal.mean()) / signal.std()
    y = 0.3 + 0.2 * (signal + prompts(600, 4, rng))
    shuffled = nulls.permute_across(y, groups, 1, rng)[:, 0]
    found = {}
    for name, ratings in (("planted", y), ("shuffled", shuffled)):
        draws = [permute(ratings, groups, 99, rng) for permute in (nulls.permute_across, nulls.permute_within)]
        options = {"layers": (3, 4, 5), "permutations": Permutations(draws[0], draws[1], groups)}
        grid, _, _ = sweep(cells, ratings[:, None], assignment, **options)
        assert grid.null is not None
        p = nulls.max_t_p(grid.null.observed, grid.null.across)[0]
        there = dataclasses.replace(grid.best, layer=4, position="mean")
        probe = probes.refit(recording(cells), there, ratings, (1, 10), {})
        found[name] = (grid.best, p, cosine(probe, directions[4, "mean"]))
    best, p, recovered = found["planted"]
    assert (best.layer, best.position) == (4, "mean")
    assert p == 0.01
    assert recovered > 0.9
    _, p, recovered = found["shuffled"]
    assert p > 0.05
    assert recovered < 0.5


def test_refit_matches_scaled_ridge_and_describes_its_projection(small):
    """`rating` of raw activations is scikit-learn's prediction in the scale's points; sd and norm against NumPy."""
    cells, targets, _ = small
    x, y = cells[9, "mean"], targets[:, 0]
    probe = probes.refit(recording(cells), Choice(None, 9, "mean", 100.0), y, (1, 5), {"model": "m"})
    scaler = StandardScaler().fit(x)
    expected = Ridge(alpha=100.0).fit(scaler.transform(x), y).predict(scaler.transform(x))
    np.testing.assert_allclose(probe.rating(torch.from_numpy(x)).numpy(), 3 + 2 * expected, atol=1e-4)
    assert probe.rating(torch.from_numpy(x).reshape(25, 3, 20)).shape == (25, 3)
    assert probe.rating(torch.from_numpy(x[0]).bfloat16()).ndim == 0
    unit = probe.direction.double().numpy() / np.linalg.norm(probe.direction.double().numpy())
    assert probe.projection_sd == pytest.approx(np.std(x @ unit), rel=1e-5)
    assert probe.residual_norm == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-5)
    assert float(probe.unit.norm()) == pytest.approx(1)
    facts = (probe.layer, probe.position, probe.site, probe.hook_name, probe.scale, probe.estimator, probe.penalty)
    assert facts == (9, "mean", "resid", "blocks.9.hook_resid_pre", (1, 5), "ridge", 100.0)
    assert probe.provenance == {"model": "m"}


def test_labels_in_other_units_scale_the_probe_and_keep_its_direction(small):
    """Labels times 3 minus 1: direction times 3, bias moved with them, the same unit direction."""
    cells, targets, _ = small
    choice, y = Choice(None, 9, "last", 100.0), targets[:, 0]
    one, three = (probes.refit(recording(cells), choice, labels, (-1, 1), {}) for labels in (y, 3 * y - 1))
    torch.testing.assert_close(three.direction, 3 * one.direction)
    torch.testing.assert_close(three.unit, one.unit)
    assert three.bias == pytest.approx(3 * one.bias - 1)
    assert three.projection_sd == pytest.approx(one.projection_sd)
    x = torch.from_numpy(cells[9, "last"])
    torch.testing.assert_close(three.rating(x), 3 * one.rating(x) - 1, rtol=0, atol=1e-5)


def a_probe(**changes):
    facts = {
        "direction": torch.linspace(-1, 2, 7),
        "bias": -0.125,
        "layer": 3,
        "position": "d10",
        "site": "attn_out",
        "hook_name": "blocks.3.hook_attn_out",
        "scale": (1.0, 10.0),
        "estimator": "ridge",
        "penalty": 316.22776601683796,
        "projection_sd": 0.7,
        "residual_norm": 12.5,
        "provenance": {"model": "möbius", "versions": {"torch": "2"}, "ci": [0.1, None]},
    }
    return Probe(**{**facts, **changes})


def test_a_saved_probe_is_loaded_whole(tmp_path):
    """Every field comes back as it was, the direction to the bit."""
    probe = a_probe()
    loaded = Probe.load(probe.save(tmp_path / "deep" / "probe.safetensors"))
    assert torch.equal(loaded.direction, probe.direction)
    for field in dataclasses.fields(Probe):
        if field.name != "direction":
            assert getattr(loaded, field.name) == getattr(probe, field.name), field.name
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.rating(x), probe.rating(x))


@pytest.mark.parametrize(
    ("scale", "low", "middle", "high"), [((1, 10), 1, 5.5, 10), ((0, 4), 0, 2, 4), ((-1, 1), -1, 0, 1)]
)
def test_ratings_map_labels_to_the_scale(scale, low, middle, high):
    """Labels -1, 0 and 1 are the scale's ends and middle; beyond them the map goes on."""
    probe = a_probe(scale=scale, direction=torch.tensor([2.0]), bias=-1.0)
    found = probe.rating(torch.tensor([[0.0], [0.5], [1.0], [1.5]]))
    torch.testing.assert_close(found, torch.tensor([low, middle, high, 2 * high - middle], dtype=torch.float64))


@pytest.mark.parametrize(
    "direction", [[1.0, float("nan")], [float("inf"), 0.0], [0.0, 0.0]], ids=["nan", "inf", "zero"]
)
def test_a_direction_that_is_none_is_refused(direction):
    """NaN, infinity and the zero vector are no directions."""
    with pytest.raises(InterpError, match="direction"):
        a_probe(direction=torch.tensor(direction))


def test_missing_damaged_and_foreign_probe_files_are_named(tmp_path):
    """One line with the file's name for a file that is missing, cut short, of another kind, or lacks a field."""
    path = tmp_path / "probe.safetensors"
    with pytest.raises(InterpError, match=r"probe\.safetensors"):
        Probe.load(path)
    a_probe().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InterpError, match=r"probe\.safetensors"):
        Probe.load(path)
    facts = {k: v for k, v in vars(a_probe()).items() if k != "direction"}
    foreign = [
        ({"weight": torch.ones(3)}, None),
        ({"direction": torch.ones(3)}, None),
        ({"direction": torch.ones(3)}, {**facts, "kind": "lens"}),
        ({"direction": torch.ones(3)}, {"kind": "probe", "layer": 3}),
        ({"direction": torch.ones(3)}, {**facts, "kind": "probe", "colour": "red"}),
        ({"vector": torch.ones(3)}, {**facts, "kind": "probe"}),
    ]
    for tensors, header in foreign:
        save_file(tensors, path, metadata=None if header is None else {"facts": json.dumps(header)})
        with pytest.raises(InterpError, match=r"probe\.safetensors is no probe file"):
            Probe.load(path)
