"""Ridge regression with exact grouped cross-validation: many problems from few decompositions.

One cell (features X of n rows) needs one decomposition. From it come, without a refit, the predictions for
every left-out fold and every pair of left-out folds (nested selection), at every lambda and for any number of
label vectors at once.

With H the hat matrix of all rows (unpenalised intercept included), S the left-out rows and T the others,
    prediction_S = (I - H_SS)^-1 H_ST y_T,
exactly what a refit without S would give on the same features (leave-one-out for a block; Cook & Weisberg 1982).
Where rows far outnumber features, Gram matrices per fold are the smaller problem, and give the same numbers.

Features are centred and scaled by their mean and standard deviation over all rows: label-free, and equal in every
fold, which is what lets the folds share a decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Eight penalties, scikit-learn's `alpha` on standardised features.
LAMBDAS: tuple[float, ...] = tuple(float(x) for x in np.logspace(1.5, 5, 8))

#: Prefer fold Grams once n exceeds this multiple of d: 15 eigendecompositions then cost less than n x n blocks.
GRAM_RATIO = 4.0


@dataclass(frozen=True)
class Folds:
    """Rows laid out fold by fold with equal padding, so that all folds' blocks are one batched product.

    `slots` [fold, slot] is a row number or -1. The nested folds of outer fold a are the other folds.
    """

    slots: Int[Tensor, "fold slot"]
    n: int

    @classmethod
    def of(cls, assignment: np.ndarray, device: torch.device | str = "cpu") -> Folds:
        """Folds from an assignment [n] of rows to 0..k-1."""
        members = [np.flatnonzero(assignment == k) for k in range(int(assignment.max()) + 1)]
        slots = np.full((len(members), max(map(len, members))), -1)
        for k, rows in enumerate(members):
            slots[k, : len(rows)] = rows
        return cls(torch.from_numpy(slots).to(device), len(assignment))

    @property
    def k(self) -> int:
        return self.slots.shape[0]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(self.k), 2))

    def rows(self, fold: int) -> Int[Tensor, " row"]:
        """The rows of one fold."""
        slots = self.slots[fold]
        return slots[slots >= 0]

    def lay(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "fold slot column"]:
        """Rows to [fold, slot]; padding is zero."""
        laid = values[self.slots.clamp(min=0)]
        laid[self.slots < 0] = 0
        return laid

    def training_mean(self, y: Float[Tensor, "row target"]) -> Float[Tensor, "row target"]:
        """For each row the mean label of the rows outside its fold: the intercept of its prediction."""
        out = torch.empty_like(y)
        for a in range(self.k):
            rows = self.rows(a)
            out[rows] = (y.sum(0) - y[rows].sum(0)) / (self.n - len(rows))
        return out

    def lift(self, laid: Float[Tensor, "fold slot column"]) -> Float[Tensor, "row column"]:
        """The inverse of `lay`."""
        live = self.slots >= 0
        out = laid.new_empty(self.n, laid.shape[-1])
        out[self.slots[live]] = laid[live]
        return out


@dataclass(frozen=True)
class Scaler:
    """Label-free standardisation: `(x - mean) / scale`; a constant feature is centred and left at zero."""

    mean: Float[Tensor, " feature"]
    scale: Float[Tensor, " feature"]

    @classmethod
    def of(cls, x: Float[Tensor, "row feature"]) -> Scaler:
        mean, std = x.mean(0), x.std(0, correction=0)
        # Below a float's resolution of the mean a "variation" is rounding: it must not be blown up to sd 1.
        flat = std <= 1e-6 * mean.abs().clamp(min=1e-12)
        return cls(mean, torch.where(flat, torch.inf, std))

    def __call__(self, x: Float[Tensor, "row feature"]) -> Float[Tensor, "row feature"]:
        return (x - self.mean) / self.scale


@dataclass(frozen=True)
class Nested:
    """Cross-validated predictions of one cell for T label vectors at L lambdas.

    `outer[l]` predicts each row from the other folds. `inner_mse[a, l]` is the mean squared error inside the
    training rows of outer fold a (each predicted without its own fold), the score that selection minimises.
    """

    outer: Float[Tensor, "lambda row target"]
    inner_mse: Float[Tensor, "fold lambda target"]

    def chosen(self, folds: Folds) -> Float[Tensor, "row target"]:
        """Out-of-fold predictions with each fold's own lambda, the one of least inner error."""
        which = self.inner_mse.argmin(1)
        out = torch.empty_like(self.outer[0])
        for a in range(folds.k):
            rows = folds.rows(a)
            index = which[a].expand(1, len(rows), -1)
            out[rows] = self.outer[:, rows].gather(0, index)[0]
        return out


@dataclass(frozen=True)
class HatCell:
    """Eigenbasis of one cell's kernel: left singular vectors per fold, and squared singular values.

    The last column of `basis` is the intercept, 1/sqrt(n), with its shrinkage fixed at 1.
    """

    basis: Float[Tensor, "fold slot rank"]
    squared: Float[Tensor, " rank-1"]
    folds: Folds

    @classmethod
    def of(cls, x: Float[Tensor, "row feature"], folds: Folds) -> HatCell:
        """Decompose standardised features through whichever Gram matrix is smaller."""
        # The Gram squares the condition number: float64 there costs little and keeps float32 blocks accurate.
        if x.shape[1] <= x.shape[0]:
            squared, v = torch.linalg.eigh(_gram(x.T))
            return cls._keep(squared, lambda kept: x @ (v[:, kept] / squared[kept].sqrt()).to(x.dtype), folds)
        squared, u = torch.linalg.eigh(_gram(x))
        return cls._keep(squared, lambda kept: u[:, kept].to(x.dtype), folds)

    @classmethod
    def of_kernel(cls, kernel: Float[Tensor, "row row"], folds: Folds) -> HatCell:
        """Decompose a linear kernel; it is centred here."""
        kernel = kernel.double()
        squared, u = torch.linalg.eigh(kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean())
        return cls._keep(squared, lambda kept: u[:, kept].float(), folds)

    @classmethod
    def _keep(cls, squared: Tensor, basis: Callable[[Tensor], Tensor], folds: Folds) -> HatCell:
        kept = squared > squared[-1].clamp(min=1e-30) * 1e-9
        u = basis(kept)
        ones = u.new_full((folds.n, 1), folds.n**-0.5)
        return cls(folds.lay(torch.cat([u, ones], 1)), squared[kept].to(u.dtype), folds)

    def refold(self, folds: Folds) -> HatCell:
        """The same decomposition for other folds."""
        return replace(self, basis=folds.lay(self.folds.lift(self.basis)), folds=folds)

    def shrinkage(self, penalty: float) -> Float[Tensor, " rank"]:
        kept = self.squared / (self.squared + penalty)
        return torch.cat([kept, kept.new_ones(1)])

    def penalty_for(self, freedom: float) -> float:
        """The lambda with this many effective degrees of freedom, tr(H) - 1 (label-free)."""
        return _penalty_for(self.squared, freedom)

    def outer(self, y: Float[Tensor, "row target"], penalty: float) -> Float[Tensor, "row target"]:
        """Out-of-fold predictions at one lambda."""
        mean = y.mean(0)
        return self.folds.lift(_LeftOut.of(self, self.folds.lay(y - mean), penalty).single()) + mean

    def nested(self, y: Float[Tensor, "row target"], penalties: Sequence[float] = LAMBDAS) -> Nested:
        """Predictions for every left-out fold and inner errors for every pair, at every lambda."""
        folds, mean = self.folds, y.mean(0)
        laid = folds.lay(y - mean)
        first, second = (list(i) for i in zip(*folds.pairs, strict=True))
        trained = folds.n - (folds.slots >= 0).sum(1, keepdim=True)
        outer, inner = [], []
        for penalty in penalties:
            left = _LeftOut.of(self, laid, penalty)
            outer.append(folds.lift(left.single()) + mean)
            for_first, for_second = left.pair(first, second)
            of_first, of_second = (
                (laid[part] - found).square().sum(1) for part, found in ((first, for_first), (second, for_second))
            )
            # With a and b left out, b's errors are inner errors of outer fold a, and the reverse.
            total = y.new_zeros(folds.k, y.shape[1])
            total.index_add_(0, torch.tensor(first, device=y.device), of_second)
            total.index_add_(0, torch.tensor(second, device=y.device), of_first)
            inner.append(total / trained)
        return Nested(torch.stack(outer), torch.stack(inner, 1))

    def inner(self, y: Float[Tensor, "row target"], penalty: float, fold: int) -> Float[Tensor, "row target"]:
        """Predictions inside outer fold `fold`'s training rows, each without its own fold; held-out rows are NaN."""
        mean = y.mean(0)
        laid = self.folds.lay(y - mean)
        others = [b for b in range(self.folds.k) if b != fold]
        out = torch.full_like(laid, torch.nan)
        out[others] = _LeftOut.of(self, laid, penalty).pair([fold] * len(others), others)[1]
        return self.folds.lift(out) + mean


@dataclass(frozen=True)
class _LeftOut:
    """Predictions for left-out folds at one lambda: (I - H_SS)^-1 H_ST y_T for one fold, Schur complements for two.

    The left-out labels do not enter, and `labels` have mean 0: float32's rounding is relative to what the
    features predict, not to the labels.
    """

    weighted: Float[Tensor, "fold slot rank"]
    labels: Float[Tensor, "fold slot target"]
    given: Float[Tensor, "fold slot target"]
    block: Float[Tensor, "fold slot slot"]
    root: Float[Tensor, "fold slot slot"]

    @classmethod
    def of(cls, cell: HatCell, labels: Tensor, penalty: float) -> _LeftOut:
        weighted = cell.basis * cell.shrinkage(penalty).sqrt()
        scores = weighted.mT @ labels
        block = torch.eye(weighted.shape[1], dtype=weighted.dtype, device=weighted.device) - weighted @ weighted.mT
        return cls(weighted, labels, weighted @ (scores.sum(0) - scores), block, torch.linalg.cholesky(block))

    def single(self) -> Float[Tensor, "fold slot target"]:
        if self.given.shape[-1] > self.root.shape[-1]:
            # For many label vectors one inverse and a product take a quarter of the solver's time.
            return torch.cholesky_inverse(self.root) @ self.given
        return torch.cholesky_solve(self.given, self.root)

    def pair(self, first: list[int], second: list[int]) -> tuple[Tensor, Tensor]:
        """Predictions [pair, slot, target] for the first and for the second fold, both left out together."""
        root, shared = self.root[first], self.weighted[first] @ self.weighted[second].mT
        to_first = self.given[first] - shared @ self.labels[second]
        to_second = self.given[second] - shared.mT @ self.labels[first]
        cross = torch.linalg.solve_triangular(root, -shared, upper=False)
        schur = torch.linalg.cholesky(torch.baddbmm(self.block[second], cross.mT, cross, alpha=-1))
        half = torch.linalg.solve_triangular(root, to_first, upper=False)
        for_second = torch.cholesky_solve(to_second - cross.mT @ half, schur)
        for_first = torch.linalg.solve_triangular(root.mT, half - cross @ for_second, upper=True)
        return for_first, for_second


@dataclass(frozen=True)
class GramCell:
    """Gram matrices and sums per fold: for rows that far outnumber features. Same numbers as HatCell."""

    x: Float[Tensor, "row feature"]
    grams: Float[Tensor, "fold feature feature"]
    sums: Float[Tensor, "fold feature"]
    folds: Folds

    @classmethod
    def of(cls, x: Float[Tensor, "row feature"], folds: Folds) -> GramCell:
        parts = [x[folds.rows(a)] for a in range(folds.k)]
        return cls(x, torch.stack([_gram(p.T) for p in parts]), torch.stack([p.sum(0) for p in parts]), folds)

    def refold(self, folds: Folds) -> GramCell:
        """The same features for other folds."""
        return GramCell.of(self.x, folds)

    def _fit(self, left_out: tuple[int, ...], y: Tensor, penalties: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """(weights [feature, target], intercept [target]) at each lambda, trained without these folds."""
        kept = [a for a in range(self.folds.k) if a not in left_out]
        rows = torch.cat([self.folds.rows(a) for a in kept])
        mean, target = self.sums[kept].sum(0) / len(rows), y[rows].mean(0)
        squared, v = torch.linalg.eigh(self.grams[kept].sum(0) - len(rows) * torch.outer(mean, mean).double())
        squared, v = squared.clamp(min=0).to(y.dtype), v.to(y.dtype)
        scores = v.T @ (self.x[rows].T @ (y[rows] - target))
        for penalty in penalties:
            weights = v @ (scores / (squared + penalty)[:, None])
            yield weights, target - mean @ weights

    def penalty_for(self, freedom: float) -> float:
        """As HatCell's."""
        mean = self.sums.sum(0) / self.folds.n
        whole = self.grams.sum(0) - self.folds.n * torch.outer(mean, mean).double()
        return _penalty_for(torch.linalg.eigvalsh(whole).clamp(min=0), freedom)

    def outer(self, y: Float[Tensor, "row target"], penalty: float) -> Float[Tensor, "row target"]:
        """Out-of-fold predictions at one lambda."""
        out = torch.empty_like(y)
        for a in range(self.folds.k):
            rows = self.folds.rows(a)
            ((weights, intercept),) = self._fit((a,), y, (penalty,))
            out[rows] = self.x[rows] @ weights + intercept
        return out

    def nested(self, y: Float[Tensor, "row target"], penalties: Sequence[float] = LAMBDAS) -> Nested:
        """Predictions for every left-out fold and inner errors for every pair, at every lambda."""
        k = self.folds.k
        outer = y.new_empty(len(penalties), *y.shape)
        inner = y.new_zeros(k, len(penalties), y.shape[1])
        for a in range(k):
            rows = self.folds.rows(a)
            for i, (weights, intercept) in enumerate(self._fit((a,), y, penalties)):
                outer[i, rows] = self.x[rows] @ weights + intercept
        for pair in self.folds.pairs:
            for i, (weights, intercept) in enumerate(self._fit(pair, y, penalties)):
                for a, b in (pair, pair[::-1]):
                    rows = self.folds.rows(b)
                    error = y[rows] - self.x[rows] @ weights - intercept
                    inner[a, i] += error.square().sum(0) / (self.folds.n - len(self.folds.rows(a)))
        return Nested(outer, inner)

    def inner(self, y: Float[Tensor, "row target"], penalty: float, fold: int) -> Float[Tensor, "row target"]:
        """As HatCell's."""
        out = torch.full_like(y, torch.nan)
        for b in range(self.folds.k):
            if b != fold:
                rows = self.folds.rows(b)
                ((weights, intercept),) = self._fit((fold, b), y, (penalty,))
                out[rows] = self.x[rows] @ weights + intercept
        return out


Cell = HatCell | GramCell


def cell(x: Float[Tensor, "row feature"], folds: Folds) -> Cell | None:
    """Decompose raw features: standardised, by whichever engine does less work. None where no feature varies."""
    scaler = Scaler.of(x)
    if scaler.scale.isinf().all():
        return None
    scaled = scaler(x)
    return GramCell.of(scaled, folds) if x.shape[0] > GRAM_RATIO * x.shape[1] else HatCell.of(scaled, folds)


def fit(
    x: Float[Tensor, "row feature"], y: Float[Tensor, "row target"], penalty: float
) -> tuple[Float[Tensor, "feature target"], Float[Tensor, " target"]]:
    """Ridge on all rows with in-sample standardisation: (weights, bias) in raw feature units, float64."""
    x, y = x.double(), y.double()
    scaler = Scaler.of(x)
    scaled, target = scaler(x), y.mean(0)
    n, d = x.shape
    if d <= n:
        ridge = scaled.T @ scaled + penalty * torch.eye(d, dtype=x.dtype, device=x.device)
        weights = torch.linalg.solve(ridge, scaled.T @ (y - target))
    else:
        ridge = scaled @ scaled.T + penalty * torch.eye(n, dtype=x.dtype, device=x.device)
        weights = scaled.T @ torch.linalg.solve(ridge, y - target)
    weights = weights / scaler.scale[:, None]
    return weights, target - scaler.mean @ weights


def _penalty_for(squared: Tensor, freedom: float) -> float:
    low, high = 1e-3, 1e12
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if (squared / (squared + middle)).sum() > freedom else (low, middle)
    return middle


def _gram(x: Tensor) -> Tensor:
    return (x @ x.mT).double()
