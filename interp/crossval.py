"""Nested cross-validated predictions: one form for the probe, every baseline, and their stacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from interp.ridge import LAMBDAS, Cell, Folds


@dataclass(frozen=True)
class OutOfFold:
    """Out-of-fold predictions in label units, with all that stacking needs.

    `prediction[i]` was made without row i's fold, everything chosen without it. `centre[i]` is the mean label of
    the rows it was trained on. `inner[a, i]` predicts row i without fold a and without i's own fold (NaN in fold a).
    """

    prediction: Float[np.ndarray, " row"]
    centre: Float[np.ndarray, " row"]
    inner: Float[np.ndarray, "fold row"]


def centre_of(y: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """For each row the mean of `y` outside its fold."""
    return Folds.of(assignment).training_mean(torch.from_numpy(y)[:, None])[:, 0].numpy()


def constant(y: np.ndarray, assignment: np.ndarray) -> OutOfFold:
    """The mean of the training rows."""
    centre = centre_of(y, assignment)
    k = int(assignment.max()) + 1
    inner = np.full((k, len(y)), np.nan)
    for a in range(k):
        for b in range(k):
            if b != a:
                inner[a, assignment == b] = y[(assignment != a) & (assignment != b)].mean()
    return OutOfFold(centre, centre, inner)


def nested(cell_without: Callable[[int], Cell | None], y: np.ndarray, assignment: np.ndarray) -> OutOfFold:
    """Ridge with lambda chosen inside each outer fold; `cell_without(a)` gives the features to use for fold a.

    Features that learn from text alone (a vocabulary) are fitted without fold a; the others ignore `a`. Where
    there are no features that vary (None), the mean of the training rows stands.
    """
    target = torch.from_numpy(y).float()[:, None]
    k = int(assignment.max()) + 1
    base = constant(y, assignment)
    prediction, inner = base.prediction.copy(), base.inner.copy()
    last = None
    for a in range(k):
        cell = cell_without(a)
        if cell is None:
            continue
        if cell is not last:
            last, result = cell, cell.nested(target)
        best = int(result.inner_mse[a, :, 0].argmin())
        held = assignment == a
        prediction[held] = result.outer[best, :, 0].double().cpu().numpy()[held]
        inner[a] = cell.inner(target, LAMBDAS[best], a)[:, 0].double().cpu().numpy()
    return OutOfFold(prediction, base.centre, inner)


def stack(parts: Sequence[OutOfFold], y: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Out-of-fold predictions [row] of a non-negative combination of `parts`, fitted inside the training folds.

    Breiman (1996), "Stacked regressions": non-negative least squares on cross-validated predictions. The
    predictions' intercepts (the means of their training rows) go out first: they run against the ratings of the
    rows left out, and would push the weights of weak parts to 0 (`stats` says why).
    """
    from scipy.optimize import nnls

    base = constant(y, assignment)
    prediction = np.empty(len(y))
    for a in range(int(assignment.max()) + 1):
        train, held = assignment != a, assignment == a
        design = np.stack([p.inner[a, train] - base.inner[a, train] for p in parts], 1)
        weights, _ = nnls(design, y[train] - base.inner[a, train])
        prediction[held] = (
            base.centre[held] + np.stack([p.prediction[held] - p.centre[held] for p in parts], 1) @ weights
        )
    return prediction
