"""What a finished sweep shows: held-out metrics, baselines and added value, nulls, and the sentence that sums it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp import crossval, data, probes, ridge, stats
from interp.crossval import OutOfFold
from interp.nulls import control_ratings, max_t_p, permute_across, permute_within

if TYPE_CHECKING:
    from interp.activations import Activations
    from interp.data import RatedSet
    from interp.probes import ProbeGrid

FOLDS = 5
#: The fold-seed spread repeats the nested selection with every k-th layer on offer (label-free, a third of the cost).
SPREAD_STRIDE, SPREAD_SEEDS = 4, 3

#: Draws of the control task.
CONTROLS = 20

#: A baseline's predictions when trained on the ratings, and when trained on their deviations from the prompt's mean.
Trained = tuple[OutOfFold, OutOfFold]


@dataclass(frozen=True)
class Labels:
    """Ratings of the kept rows in label units, their prompts and folds."""

    rated: RatedSet
    y: np.ndarray
    groups: np.ndarray
    assignment: np.ndarray

    def metrics(self, prediction: np.ndarray, centre: np.ndarray, draws: int = 2000) -> dict[str, Any]:
        """`stats.metrics` in rating points."""
        rating = self.rated.rating
        return stats.metrics(self.rated.scores, rating(prediction), self.groups, rating(centre), draws=draws)


@dataclass(frozen=True)
class Nulls:
    """Labels that hold no rating: permuted for each cell's null, and permuted for the nested null."""

    permutations: probes.Permutations
    nested: np.ndarray

    @classmethod
    def draw(cls, labels: Labels, seed: int, draws: int, nested_draws: int) -> Nulls:
        """`draws` labels of each kind of null, `nested_draws` for the nested one."""
        rng = np.random.default_rng([seed, 1])
        y, groups = labels.y, labels.groups
        across = permute_across(y, groups, draws, rng)
        within = permute_within(y, groups, draws, rng)
        nested = permute_across(y, groups, nested_draws, rng) if nested_draws else np.empty((len(y), 0))
        return cls(probes.Permutations(across, within, groups), nested)


def spread_layers(layers: Sequence[int]) -> list[int]:
    """Every fourth layer, or all where there are few."""
    return list(layers[::SPREAD_STRIDE]) if len(layers) > 2 * SPREAD_STRIDE else list(layers)


def findings(
    activations: Activations,
    labels: Labels,
    grid: ProbeGrid,
    spread: list[np.ndarray],
    texts: dict[str, Trained],
    seed: int,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Held-out metrics, every baseline's, what the probe adds to their stack, and the grid with its intervals.

    `spread` holds the held-out predictions for each fold seed. The second result are the rows' predictions by
    name, in label units, and `centre`, the mean label of the rows that each was trained on.
    """
    y, groups, assignment = labels.y, labels.groups, labels.assignment
    probe = probes.out_of_fold(activations, grid, y, assignment)
    heldout = labels.metrics(probe.prediction, probe.centre)
    centres = [crossval.centre_of(y, data.folds(groups, FOLDS, seed + s)) for s in range(SPREAD_SEEDS)]
    heldout["fold_seed_spread"] = {
        "pearson": [stats.pearson(y, p - c) for p, c in zip(spread, centres, strict=True)],
        "layers": spread_layers(grid.layers),
    }
    plain = {name: pair[0] for name, pair in texts.items()}
    stacked = crossval.stack(list(plain.values()), y, assignment)
    together = crossval.stack([*plain.values(), probe], y, assignment)
    table = {name: labels.metrics(part.prediction, part.centre) for name, part in plain.items()}
    table["stack"] = labels.metrics(stacked, probe.centre)
    table["stack_and_probe"] = labels.metrics(together, probe.centre)
    added = stats.paired_pearson_difference(y, together, stacked, groups, probe.centre, probe.centre)
    single = {name: table[name]["pearson"] for name in plain if table[name]["pearson"] is not None}
    low, high = stats.pearson_intervals(y, _columns(grid.cell_prediction) - probe.centre[:, None], groups)
    shape = grid.pearson.shape
    columns = {"centre": probe.centre, "prediction": probe.prediction, "stack": stacked, "stack_and_probe": together}
    columns |= {name: part.prediction for name, part in plain.items()}
    facts = {
        "heldout": heldout,
        "baselines": table,
        "best_baseline": max(single, key=lambda name: single[name]) if single else None,
        "added_value": _estimate("pearson", added),
        "by_rating": mean_by_rating(labels.rated.scores, labels.rated.rating(probe.prediction), groups),
        "within_prompt_gain": _within_gain(labels, probe.prediction, texts),
        "grid": {
            "pearson": _lists(grid.pearson),
            "pearson_ci": [
                [[_number(a), _number(b)] for a, b in zip(*pair, strict=True)]
                for pair in zip(low.reshape(shape), high.reshape(shape), strict=True)
            ],
        },
    }
    return facts, columns


def mean_by_rating(
    scores: np.ndarray, prediction: np.ndarray, groups: np.ndarray, draws: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean held-out prediction of each rounded rating (E8), its 95% interval over resampled prompts, and n.

    `mean_ci` is None where fewer than two prompts have the rating or fewer than half of the draws do.
    """
    values, bins = np.unique(data.rounded(scores), return_inverse=True)
    codes = np.unique(groups, return_inverse=True)[1]
    sums, counts = (np.zeros((codes.max() + 1, len(values))) for _ in range(2))
    np.add.at(sums, (codes, bins), prediction)
    np.add.at(counts, (codes, bins), 1)
    drawn = stats.weighted(stats.cluster_weights(codes, draws, seed), np.hstack([sums, counts]))
    found = []
    for k, rating in enumerate(values.tolist()):
        total, number = drawn[:, k], drawn[:, len(values) + k]
        usable, n = number > 0, int(counts[:, k].sum())
        enough = np.count_nonzero(counts[:, k]) > 1 and 2 * usable.sum() >= max(draws, 1)
        ci = np.percentile(total[usable] / number[usable], [2.5, 97.5]).tolist() if enough else None
        found.append({"rating": rating, "n": n, "mean": float(sums[:, k].sum() / n), "mean_ci": ci})
    return found


def _columns(cells: np.ndarray) -> np.ndarray:
    """[layer, position, row] to [row, cell]."""
    return cells.reshape(-1, cells.shape[-1]).T.astype(float)


def _estimate(name: str, found: tuple[float | None, list[float] | None]) -> dict[str, Any]:
    return {name: found[0], f"{name}_ci": found[1]}


def _within_gain(labels: Labels, prediction: np.ndarray, texts: dict[str, Trained]) -> dict[str, Any]:
    """The probe's within-prompt accuracy minus that of the best baseline trained on within-prompt ratings."""
    scores, groups = labels.rated.scores, labels.groups
    accuracy = {name: stats.pair_accuracy(scores, pair[1].prediction, groups)[0] for name, pair in texts.items()}
    known = {name: a for name, a in accuracy.items() if a is not None}
    if not known:
        return {"baseline": None, "baseline_accuracy": None, "accuracy": None, "accuracy_ci": None}
    best = max(known, key=lambda name: known[name])
    gain = stats.paired_accuracy_difference(scores, prediction, texts[best][1].prediction, groups)
    return {"baseline": best, "baseline_accuracy": known[best], **_estimate("accuracy", gain)}


def null_facts(labels: Labels, grid: ProbeGrid, drawn: Nulls) -> dict[str, Any]:
    """The p-values of the best cell (corrected over cells), within prompts, and of the whole nested selection."""
    assert grid.null is not None

    def heldout_r(target: np.ndarray, prediction: np.ndarray) -> float | None:
        return stats.pearson(target, prediction - crossval.centre_of(target, labels.assignment))

    observed = heldout_r(labels.y, grid.heldout[:, 0])
    nested_p, draws = None, drawn.nested.shape[1]
    if draws and observed is not None:
        found = [heldout_r(drawn.nested[:, d], grid.heldout[:, 1 + d]) for d in range(draws)]
        nested_p = (1 + sum(r is not None and r >= observed for r in found)) / (1 + draws)
    return {
        "draws": grid.null.across.shape[1],
        "corrected_p": max_t_p(grid.null.observed, grid.null.across)[0],
        "within_corrected_p": max_t_p(grid.null.observed_within, grid.null.within)[0],
        "nested_p": nested_p,
        "nested_draws": draws,
    }


def selectivity(activations: Activations, grid: ProbeGrid, labels: Labels, seed: int) -> dict[str, float | None]:
    """The control task at the cell chosen on all rows: r on random ratings per prompt against r on the ratings.

    On folds of rows, not of prompts: a probe that recognises prompts can then score on the control task, and
    selectivity is what the ratings have beyond it. `control_pearson` is the mean over draws.
    """
    rng = np.random.default_rng([seed, 2])
    assignment = rng.permutation(len(labels.y)) % FOLDS
    draws = [control_ratings(labels.groups, labels.y, rng) for _ in range(CONTROLS)]
    folds, targets = ridge.Folds.of(assignment), torch.from_numpy(np.column_stack([labels.y, *draws])).float()
    cell = ridge.cell(activations.cell(grid.best.layer, grid.best.position).float(), folds)
    if cell is None:
        return {"control_pearson": None, "rating_pearson_row_folds": None, "selectivity": None}
    signal = cell.nested(targets).chosen(folds) - folds.training_mean(targets)
    real, *control = stats.pearson_columns(targets.double().numpy(), signal.double().numpy()).tolist()
    mean = float(np.nanmean(control)) if np.isfinite(control).any() else None
    known = mean is not None and np.isfinite(real)
    return {
        "control_pearson": mean,
        "rating_pearson_row_folds": _number(real),
        "selectivity": real - mean if known else None,
    }


def finding(facts: dict[str, Any]) -> str:
    """One plain sentence: what was found, and how sure it is."""
    held, null, added = facts["heldout"], facts["null"], facts["added_value"]
    where = f"layer {facts['best']['layer']}, position {facts['best']['position']}"
    if held["pearson"] is None or held["pearson_ci"] is None or null["corrected_p"] is None:
        return "The probe's predictions do not vary: nothing about the rating was found."
    r = f"held-out r = {held['pearson']:.2f} [{held['pearson_ci'][0]:.2f}, {held['pearson_ci'][1]:.2f}]"
    p = f"p {_p(null['corrected_p'], null['draws'])} corrected over {len(facts['layers']) * len(facts['positions'])} cells"
    if not (null["corrected_p"] < 0.01 and held["pearson_ci"][0] > 0):
        needed = "evidence needs a corrected p below 0.01 and an interval above 0"
        return f"No evidence that the rating can be read from the residual stream: {r}, {p} ({needed})."
    base = facts["baselines"]["stack"]["pearson"]
    text = f"The rating can be read ({where}): {r}, {p}"
    if added["pearson_ci"] is None or base is None:
        return text + "; whether it adds to text baselines could not be estimated."
    gain = f"{added['pearson']:+.2f} [{added['pearson_ci'][0]:+.2f}, {added['pearson_ci'][1]:+.2f}]"
    if added["pearson_ci"][0] > 0:
        return text + f"; it adds {gain} to the r = {base:.2f} of all text and surprise baselines together."
    return (
        text + f"; but text and surprise baselines together reach r = {base:.2f}, and it adds nothing certain ({gain})."
    )


def _p(value: float, draws: int) -> str:
    return f"< {2 / (draws + 1):.3f}" if value <= 1.5 / (draws + 1) else f"= {value:.3f}"


def _lists(values: np.ndarray) -> list[list[float | None]]:
    return [[_number(v) for v in row] for row in values]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
