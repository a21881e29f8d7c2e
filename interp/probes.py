"""The layer x position sweep, and the Probe that comes out of it.

Every cell of the grid is decomposed once (`ridge.py`); from that come its own out-of-fold r, its part in the
nested choice of layer, position and lambda, and its null distribution.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp import InterpError, ridge
from interp.activations import Activations
from interp.artifacts import load_tensors, save_tensors
from interp.crossval import OutOfFold, centre_of
from interp.ridge import LAMBDAS, Cell, Folds
from interp.stats import FLOAT32

#: Effective degrees of freedom of the null's one label-free lambda, as a share of the rows.
NULL_FREEDOM = 0.05
#: Permuted labels are worked on in blocks of at most this many numbers.
NULL_BLOCK = 1 << 22


@dataclass(frozen=True)
class Probe:
    """A direction in the residual stream that reads a rating: `rating = scale(x @ direction + bias)`.

    `direction` [d_model] and `bias` are in raw residual units and predict labels in [-1, 1]; `rating` maps
    these linearly to `scale`. `projection_sd` is the sd of the projection on the unit direction over the rows
    it was fitted on, `residual_norm` the mean norm there (both in residual units).
    """

    direction: Float[Tensor, " d_model"]
    bias: float
    layer: int
    position: str
    site: str
    hook_name: str
    scale: tuple[float, float]
    estimator: str
    penalty: float
    projection_sd: float
    residual_norm: float
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.direction.ndim != 1 or not torch.isfinite(self.direction).all() or not self.direction.any():
            raise InterpError("a probe's direction must be a finite vector [d_model] that is not zero")

    def rating(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, ...]:
        """Predicted ratings of residual vectors at this probe's layer, in the scale's points."""
        low, high = self.scale
        value = x.double() @ self.direction.double() + self.bias
        return (value + 1) / 2 * (high - low) + low

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        """The direction with norm 1."""
        return self.direction / self.direction.norm()

    def save(self, path: Path) -> Path:
        """Write the probe as safetensors; everything but the direction stands in its header."""
        facts = {k: v for k, v in self.__dict__.items() if k != "direction"}
        return save_tensors(path, {"direction": self.direction.float()}, {"kind": "probe", **facts})

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read a probe. InterpError for a missing, damaged or foreign file."""
        tensors, facts = load_tensors(path)
        expected = {"kind", *cls.__dataclass_fields__} - {"direction"}
        if facts.pop("kind", None) != "probe" or {"kind", *facts} != expected or "direction" not in tensors:
            raise InterpError(f"{path} is no probe file; `python cli.py probe` writes them as probe.safetensors")
        facts["scale"] = tuple(facts["scale"])
        return cls(tensors["direction"], **facts)


@dataclass(frozen=True)
class Choice:
    """A cell and penalty chosen inside the training rows of one outer fold (or, with fold None, on all rows)."""

    fold: int | None
    layer: int
    position: str
    penalty: float

    def to_dict(self) -> dict[str, Any]:
        facts = {"layer": self.layer, "position": self.position, "lambda": self.penalty}
        return facts if self.fold is None else {"fold": self.fold, **facts}


@dataclass(frozen=True)
class Null:
    """Permuted labels [row, draw] and what each cell's r on them was."""

    across: Float[np.ndarray, "cell draw"]
    within: Float[np.ndarray, "cell draw"]
    observed: Float[np.ndarray, " cell"]
    observed_within: Float[np.ndarray, " cell"]


@dataclass(frozen=True)
class ProbeGrid:
    """A finished sweep. Arrays over cells are `[layer][position]`; predictions are in label units ([-1, 1]).

    `pearson` is each cell's own out-of-fold r with lambda chosen inside; it and `cell_prediction` are NaN where a
    cell's activations are the same in every row (a template's token at layer 0). `heldout` predicts each row of each
    target with everything (cell and lambda) chosen without its fold; `choices[t]` lists what was chosen, `best`
    the choice on all rows. Target 0 is the rating itself.
    """

    layers: tuple[int, ...]
    positions: tuple[str, ...]
    pearson: Float[np.ndarray, "layer position"]
    cell_prediction: Float[np.ndarray, "layer position row"]
    heldout: Float[np.ndarray, "row target"]
    choices: tuple[tuple[Choice, ...], ...]
    best: Choice
    null: Null | None

    def to_frame(self) -> Any:
        """One line a cell: layer, position, pearson (a pandas DataFrame)."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"layer": layer, "position": position, "pearson": self.pearson[i, j]}
                for i, layer in enumerate(self.layers)
                for j, position in enumerate(self.positions)
            ]
        )


class _Selection:
    """The running nested choice over cells: the smallest inner error for each outer fold and target."""

    def __init__(self, folds: Folds, rows: int, targets: int) -> None:
        self.folds = folds
        self.score = np.full((folds.k, targets), np.inf)
        self.cell = np.full((folds.k, targets), -1)
        self.penalty = np.zeros((folds.k, targets))
        self.prediction = np.zeros((rows, targets))
        self.lock = threading.Lock()

    def offer(self, number: int, result: ridge.Nested) -> None:
        score, which = (t.double().cpu().numpy() for t in result.inner_mse.min(1))
        which = which.astype(int)
        with self.lock:
            # Ties go to the smaller cell number, so that the order of the workers does not matter.
            better = (score < self.score) | ((score == self.score) & (number < self.cell))
            for a, t in np.argwhere(better).tolist():
                rows = self.folds.rows(a)
                self.prediction[rows.cpu(), t] = result.outer[which[a, t], rows, t].double().cpu().numpy()
            self.score[better], self.cell[better] = score[better], number
            self.penalty[better] = np.array(LAMBDAS)[which][better]


def correlate(a: Float[Tensor, "row column"], b: Float[Tensor, "row column"]) -> Float[Tensor, " column"]:
    """Pearson's r column by column; NaN for a constant column."""
    a, b = a - a.mean(0), b - b.mean(0)
    norm = (a.square().sum(0) * b.square().sum(0)).sqrt()
    return torch.where(norm > 0, (a * b).sum(0) / norm, torch.nan)


class _Within:
    """Deviations from the prompt's mean, for many columns at once; 0 where they are rounding beside `size`.

    Before the completion starts a prompt's rows are equal but for rounding, and rounding has a correlation too.
    `size` is that of the labels: predictions less their training mean are small, their rounding is not.
    """

    def __init__(self, groups: np.ndarray, size: float, device: torch.device) -> None:
        self.codes = torch.from_numpy(groups).to(device)
        self.counts = torch.bincount(self.codes)[:, None].float()
        self.rounding = FLOAT32 * size

    def __call__(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
        sums = values.new_zeros(len(self.counts), values.shape[1]).index_add_(0, self.codes, values)
        deviations = values - (sums / self.counts)[self.codes]
        return torch.where(deviations.abs() > self.rounding, deviations, 0)


@dataclass(frozen=True)
class Permutations:
    """Labels permuted across prompts (null A) and within prompts (null B), [row, draw] each."""

    across: Float[np.ndarray, "row draw"]
    within: Float[np.ndarray, "row draw"]
    groups: np.ndarray


def sweep(
    activations: Activations,
    targets: Float[np.ndarray, "row target"],
    assignment: np.ndarray,
    *,
    layers: Sequence[int],
    positions: Sequence[str],
    permutations: Permutations | None = None,
    spread: Sequence[np.ndarray] = (),
    spread_layers: Sequence[int] = (),
    device: str | torch.device = "cpu",
    progress: Callable[[int, str, float], None] | None = None,
) -> tuple[ProbeGrid, list[np.ndarray], float]:
    """Fit ridge in every cell with nested prompt-grouped cross-validation.

    `targets[:, 0]` are the labels; further columns (permuted labels for the nested null) go
    through the same selection. `assignment` [row] gives each row's fold. `permutations` adds the null of every
    cell. `spread` are further fold assignments; for each (and first for `assignment`) the second result holds
    the held-out predictions when only `spread_layers` are offered. The third is the share of the time that the
    null took. `device` does the linear algebra. `progress(layer, position, r)` is called for each cell.
    """
    if not np.isfinite(targets).all():
        raise InterpError("ratings hold NaN or infinity; every row needs a finite score")
    state = _Sweep(activations, targets, assignment, tuple(layers), tuple(positions), permutations, device, progress)
    state.add_spread(spread, spread_layers)
    state.run()
    return state.grid(), [s.prediction[:, 0] for s in state.spread], state.null_seconds / max(state.seconds, 1e-9)


class _Sweep:
    def __init__(self, activations, targets, assignment, layers, positions, permutations, device, progress) -> None:
        self.activations, self.layers, self.positions = activations, layers, positions
        self.progress, self.permutations = progress, permutations
        # mps has no float64, which the decompositions need.
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.folds = Folds.of(assignment, self.device)
        self.y = torch.from_numpy(targets).float().to(self.device)
        self.centre = torch.from_numpy(centre_of(targets[:, 0], assignment)).float().to(self.device)
        rows, cells = len(assignment), (len(layers), len(positions))
        self.selection = _Selection(self.folds, rows, targets.shape[1])
        self.pearson = np.full(cells, np.nan)
        self.cell_prediction = np.full((*cells, rows), np.nan, np.float32)
        self.overall = np.full((*cells, len(LAMBDAS)), np.inf)
        self.seconds = self.null_seconds = 0.0
        self.spread: list[_Selection] = []
        self.spread_layers: frozenset[int] = frozenset()
        if permutations is not None:
            self._prepare_null(permutations, len(layers) * len(positions))

    def add_spread(self, assignments: Sequence[np.ndarray], layers: Sequence[int]) -> None:
        if assignments:
            every = [self.folds, *(Folds.of(a, self.device) for a in assignments)]
            self.spread = [_Selection(folds, folds.n, 1) for folds in every]
            self.spread_layers = frozenset(layers)

    def _prepare_null(self, permutations: Permutations, cells: int) -> None:
        """Permuted labels in blocks of columns (the real labels first), so that a block's work fits the device."""
        self.deviation = _Within(permutations.groups, float(self.y[:, 0].abs().max()), self.device)
        width = max(1, NULL_BLOCK // self.folds.n)
        self.blocks = [
            (across, torch.from_numpy(part).float())
            for across, labels in ((True, permutations.across), (False, permutations.within))
            for part in np.array_split(labels, range(width, labels.shape[1], width), axis=1)
        ]
        self.null_r = np.full((cells, 1 + permutations.across.shape[1]), np.nan)
        self.null_within_r = np.full((cells, 1 + permutations.within.shape[1]), np.nan)

    def run(self) -> None:
        cores = torch.get_num_threads()
        workers = 1 if self.device.type == "cuda" else min(cores, len(self.layers))
        threads = max(1, cores // workers)
        # LAPACK on one cell gains little from a second thread; a second cell gains all of it.
        pool = ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(threads))
        try:
            for future in [pool.submit(self._layer, i) for i in range(len(self.layers))]:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)  # a worker's setting is inherited by every thread that comes later
        if (self.selection.cell < 0).any():
            raise InterpError(
                "the activations are the same in every row at each layer and position asked for; choose others"
            )

    def _layer(self, i: int) -> None:
        with torch.inference_mode():
            for j, (position, x) in enumerate(self.activations.cells(self.layers[i], self.positions)):
                x = x.to(self.device).float()
                if not torch.isfinite(x).all():
                    raise InterpError(
                        f"activations of layer {self.layers[i]} at {position} hold NaN or infinity; record them again "
                        "in float32 (--dtype float32)"
                    )
                if (cell := ridge.cell(x, self.folds)) is not None:
                    self._cell(i, j, cell)
                if self.progress:
                    self.progress(self.layers[i], position, float(self.pearson[i, j]))

    def _cell(self, i: int, j: int, cell: Cell) -> None:
        began = time.perf_counter()
        number = i * len(self.positions) + j
        result = cell.nested(self.y)
        self.selection.offer(number, result)
        own = result.chosen(self.folds)[:, 0]
        self.cell_prediction[i, j] = own.cpu().numpy()
        self.pearson[i, j] = correlate((own - self.centre)[:, None], self.y[:, :1]).item()
        self.overall[i, j] = (result.outer[:, :, 0] - self.y[:, 0]).square().mean(1).cpu().numpy()
        if self.permutations is not None:
            before = time.perf_counter()
            self._null(number, cell)
            self.null_seconds += time.perf_counter() - before
        if self.layers[i] in self.spread_layers:
            first = ridge.Nested(result.outer[:, :, :1], result.inner_mse[:, :, :1])
            self.spread[0].offer(number, first)
            for selection in self.spread[1:]:
                selection.offer(number, cell.refold(selection.folds).nested(self.y[:, :1]))
        self.seconds += time.perf_counter() - began

    def _null(self, number: int, cell: Cell) -> None:
        """The cell's r on real and permuted labels at one label-free lambda, computed alike."""
        penalty = cell.penalty_for(min(NULL_FREEDOM * self.folds.n, 0.5 * self.activations.d_model))
        found: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for across, labels in self.blocks:
            first = [] if found[across] else [self.y[:, :1]]
            y = torch.cat([*first, labels.to(self.device)], 1)
            prediction = cell.outer(y, penalty) - self.folds.training_mean(y)
            if not across:
                prediction, y = self.deviation(prediction), self.deviation(y)
            found[across].append(correlate(prediction, y).cpu().numpy())
        self.null_r[number] = np.concatenate(found[True])
        self.null_within_r[number] = np.concatenate(found[False])

    def grid(self) -> ProbeGrid:
        shape = (len(self.layers), len(self.positions))

        def choice(fold: int | None, number: int, penalty: float) -> Choice:
            i, j = np.unravel_index(number, shape)
            return Choice(fold, self.layers[i], self.positions[j], float(penalty))

        chosen = self.selection
        choices = tuple(
            tuple(choice(a, chosen.cell[a, t], chosen.penalty[a, t]) for a in range(self.folds.k))
            for t in range(self.y.shape[1])
        )
        i, j, k = np.unravel_index(int(self.overall.argmin()), self.overall.shape)
        best = choice(None, int(i * shape[1] + j), LAMBDAS[k])
        null = None
        if self.permutations is not None:
            null = Null(self.null_r[:, 1:], self.null_within_r[:, 1:], self.null_r[:, 0], self.null_within_r[:, 0])
        return ProbeGrid(
            self.layers, self.positions, self.pearson, self.cell_prediction, chosen.prediction, choices, best, null
        )


def out_of_fold(
    activations: Activations, grid: ProbeGrid, y: Float[np.ndarray, " row"], assignment: np.ndarray
) -> OutOfFold:
    """The sweep's headline in the form that stacks need: its inner predictions are made again for the chosen cells."""
    folds = Folds.of(assignment)
    inner = np.empty((folds.k, len(y)))
    target = torch.from_numpy(y).float()[:, None]
    for choice in grid.choices[0]:
        assert choice.fold is not None
        cell = ridge.cell(activations.cell(choice.layer, choice.position).float(), folds)
        assert cell is not None
        inner[choice.fold] = cell.inner(target, choice.penalty, choice.fold)[:, 0].double().numpy()
    return OutOfFold(grid.heldout[:, 0], centre_of(y, assignment), inner)


def refit(
    activations: Activations,
    choice: Choice,
    y: Float[np.ndarray, " row"],
    scale: tuple[float, float],
    provenance: dict[str, Any],
) -> Probe:
    """The probe of this cell and penalty, fitted on all rows. `y` are labels in [-1, 1]."""
    x = activations.cell(choice.layer, choice.position).double()
    weights, bias = ridge.fit(x, torch.from_numpy(y)[:, None], choice.penalty)
    direction = weights[:, 0]
    return Probe(
        direction=direction.float(),
        bias=float(bias[0]),
        layer=choice.layer,
        position=choice.position,
        site=activations.site,
        hook_name=activations.hook_name(choice.layer),
        scale=scale,
        estimator="ridge",
        penalty=choice.penalty,
        projection_sd=float((x @ (direction / direction.norm())).std(correction=0)),
        residual_norm=float(x.norm(dim=1).mean()),
        provenance=provenance,
    )
