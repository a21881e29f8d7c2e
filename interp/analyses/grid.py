"""At which layers and positions can a completion's rating be read, how well, and how much better than from text?"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from interp import InterpError, baselines, chat, crossval, data, probes, stats
from interp import positions as pos
from interp.activations import Activations, check_layers, record
from interp.artifacts import content_key, versions
from interp.nulls import control_ratings, max_t_p, permute_across, permute_within

if TYPE_CHECKING:
    from interp.chat import Encoded, Encoder
    from interp.data import RatedSet
    from interp.models import Subject
    from interp.probes import Probe, ProbeGrid

#: The fold-seed spread repeats the nested selection with every k-th layer on offer (label-free, a third of the cost).
SPREAD_STRIDE, SPREAD_SEEDS = 4, 3
FOLDS = 5


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides model and data; all of it enters the content key."""

    layers: tuple[int, ...] | None = None
    positions: tuple[str, ...] = tuple(pos.POSITIONS)
    site: str = "resid"
    max_length: int = 1024
    seed: int = 0
    draws: int = 1000
    nested_draws: int = 0
    controls: bool = False

    def key(self, subject: Subject, rated: RatedSet, encoder: Encoder) -> str:
        """The content key of this run."""
        facts = {k: getattr(self, k) for k in self.__dataclass_fields__}
        model = {"model": subject.fingerprint, "dtype": str(subject.dtype), "device": subject.device.type}
        return content_key(command="probe", data=rated.fingerprint, encoder=encoder.key, **model, **facts)


#: Where progress goes: (stage, done, total).
Progress = Callable[[str, int, int], None]


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """For callers that do not watch."""


@dataclass(frozen=True)
class GridResult:
    """A finished run: `facts` is the JSON object of the contract, `rows` a table with a line per rated row.

    `rows` columns: prompt_id, row (its number in the set), score, fold, prediction, and one per baseline
    (out-of-fold, rating points). `probe` is the choice refitted on all rows.
    """

    facts: dict[str, Any]
    rows: dict[str, list[Any]]
    probe: Probe

    def to_frame(self) -> Any:
        """`rows` as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows)


@dataclass(frozen=True)
class _Labels:
    """Ratings of the kept rows in label units, their prompts and folds."""

    rated: RatedSet
    y: np.ndarray
    groups: np.ndarray
    assignment: np.ndarray

    def metrics(self, prediction: np.ndarray, centre: np.ndarray, draws: int = 2000) -> dict[str, Any]:
        """`stats.metrics` in rating points."""
        rating = self.rated.rating
        return stats.metrics(self.rated.scores, rating(prediction), self.groups, rating(centre), draws=draws)


def encode(rated: RatedSet, encoder: Encoder, settings: Settings) -> tuple[RatedSet, list[Encoded], dict[str, int]]:
    """(rows that can be used, their tokens, reasons and counts of those that cannot)."""
    before = rated.rows["messages"] if "messages" in rated.rows.column_names else [None] * len(rated)
    rows = zip(rated.rows["prompt"], rated.rows["completion"], before, strict=True)
    encoded, kept, skipped = encoder.encode_all((chat.messages_of(*r) for r in rows), settings.max_length)
    usable = [i for i, row in enumerate(encoded) if pos.has(row, settings.positions)]
    if len(usable) < len(encoded):
        skipped["shorter than the position asked for"] += len(encoded) - len(usable)
    if not usable:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise InterpError(f"no row of {rated.name} can be used ({reasons})")
    chosen = rated.select([kept[i] for i in usable]) if len(usable) < len(rated) else rated
    return chosen, [encoded[i] for i in usable], {**rated.skipped, **skipped}


def compute(
    subject: Subject,
    rated: RatedSet,
    encoder: Encoder,
    settings: Settings,
    *,
    workspace_dir: str | os.PathLike[str] | None = None,
    batch_tokens: int | None = None,
    progress: Progress = no_progress,
) -> GridResult:
    """Run the whole experiment: encode, record in one pass, fit every cell, baselines, nulls.

    Raises InterpError for settings or data that cannot be used (unknown layer, fewer prompts than folds ...).
    """
    options: dict[str, Any] = {"workspace_dir": workspace_dir, "batch_tokens": batch_tokens}
    clock = _Clock()
    layers = check_layers(settings.layers, subject, settings.site)
    kept, encoded, skipped = encode(rated, encoder, settings)
    assignment = data.folds(kept.groups, FOLDS, settings.seed)
    labels = _Labels(kept, kept.labels(), kept.groups, assignment)
    if np.ptp(labels.y) == 0:
        raise InterpError(f"every rating in {rated.name} is {kept.scores[0]:g}: there is nothing to predict")
    clock.lap("encode")
    activations, embedding = _record(subject, encoded, layers, settings, options, progress)
    clock.lap("record")
    rows = baselines.Rows(kept.rows["prompt"], kept.rows["completion"], embedding.cell(0, "mean").float(), embedding.surprise)
    texts = _baselines(rows, labels, progress)
    clock.lap("baselines")
    nulls = _Nulls.draw(labels, settings)
    grid, spread, null_share = _sweep(activations, labels, nulls, layers, settings, progress)
    clock.lap("fit")
    clock.move(null_share, "fit", "null")
    controls = _controls(subject, encoded, labels, layers, settings, options, progress) if settings.controls else {}
    if controls:
        clock.lap("controls")
    facts = {
        "command": "probe",
        "model": subject.name,
        "data": rated.name,
        "seed": settings.seed,
        "rows": len(kept),
        "skipped": skipped,
        "prompts": len(np.unique(kept.groups)),
        "tokens": sum(row.length for row in encoded),
        "scale": list(kept.scale),
        "layers": list(layers),
        "positions": list(settings.positions),
        "site": settings.site,
        "estimator": "ridge",
        "best": grid.best.to_dict(),
        "choices": [c.to_dict() for c in grid.choices[0]],
        **_findings(activations, labels, grid, spread, texts, settings.seed),
        "null": _null(labels, grid, nulls),
        **controls,
        "assumptions": [*subject.notes, *encoder.notes, *rated.notes],
        "versions": versions(),
        "seconds": clock.seconds(),
    }
    facts["finding"] = finding(facts)
    probe = probes.refit(activations, grid.best, labels.y, kept.scale, _provenance(subject, kept, encoder, settings, facts))
    return GridResult(facts, _table(kept, labels, grid, texts), probe)


def _record(
    subject: Subject, encoded: Sequence[Encoded], layers: Sequence[int], settings: Settings, options: dict[str, Any], progress: Progress
) -> tuple[Activations, Activations]:
    """(activations of the grid, recording with layer 0 `mean` and the surprise): one pass for the residual stream."""
    options = {**options, "progress": lambda done, total: progress("record", done, total)}
    if settings.site == "resid":
        wanted, names = sorted({0, *layers}), tuple(dict.fromkeys([*settings.positions, "mean"]))
        recording = record(subject, encoded, layers=wanted, positions=names, surprise=True, **options)
        return recording, recording
    grid = record(subject, encoded, layers=layers, positions=settings.positions, site=settings.site, **options)
    return grid, record(subject, encoded, layers=[0], positions=("mean",), surprise=True, **options)


def _baselines(rows: baselines.Rows, labels: _Labels, progress: Progress) -> dict[str, tuple[crossval.OutOfFold, crossval.OutOfFold]]:
    """Each baseline trained on the ratings and on the within-prompt deviations of the ratings."""
    deviations = stats.centre_within(labels.y, labels.groups)
    found = {}
    for number, name in enumerate(baselines.BASELINES):
        progress("baselines", number, len(baselines.BASELINES))
        plain = baselines.evaluate(name, rows, labels.y, labels.assignment)
        if plain is not None:
            within = baselines.evaluate(name, rows, deviations, labels.assignment)
            assert within is not None
            found[name] = (plain, within)
    progress("baselines", len(baselines.BASELINES), len(baselines.BASELINES))
    return found


@dataclass(frozen=True)
class _Nulls:
    """Labels that hold no rating: permuted for each cell's null, a control task, and permuted for the nested null."""

    permutations: probes.Permutations
    control: np.ndarray
    nested: np.ndarray

    @classmethod
    def draw(cls, labels: _Labels, settings: Settings) -> _Nulls:
        rng = np.random.default_rng([settings.seed, 1])
        y, groups = labels.y, labels.groups
        across = permute_across(y, groups, settings.draws, rng)
        within = permute_within(y, groups, settings.draws, rng)
        control = control_ratings(groups, y, rng)
        nested = permute_across(y, groups, settings.nested_draws, rng) if settings.nested_draws else None
        return cls(probes.Permutations(across, within, groups), control, np.empty((len(y), 0)) if nested is None else nested)


def _sweep(
    activations: Activations, labels: _Labels, nulls: _Nulls, layers: Sequence[int], settings: Settings, progress: Progress
) -> tuple[ProbeGrid, list[np.ndarray], float]:
    """The sweep with its nulls; target 1 is the control task, further targets the nested null's labels."""
    cells = itertools.count(1)
    total = len(layers) * len(settings.positions)
    return probes.sweep(
        activations,
        np.column_stack([labels.y, nulls.control, nulls.nested]),
        labels.assignment,
        layers=layers,
        positions=settings.positions,
        permutations=nulls.permutations,
        spread=[data.folds(labels.groups, FOLDS, settings.seed + s) for s in range(1, SPREAD_SEEDS)],
        spread_layers=spread_layers(layers),
        progress=lambda *_: progress("fit", next(cells), total),
    )


def spread_layers(layers: Sequence[int]) -> list[int]:
    """Every fourth layer, or all where there are few."""
    return list(layers[::SPREAD_STRIDE]) if len(layers) > 2 * SPREAD_STRIDE else list(layers)


def _findings(
    activations: Activations,
    labels: _Labels,
    grid: ProbeGrid,
    spread: list[np.ndarray],
    texts: dict[str, tuple[crossval.OutOfFold, crossval.OutOfFold]],
    seed: int,
) -> dict[str, Any]:
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
    return {
        "heldout": heldout,
        "baselines": table,
        "best_baseline": max(single, key=lambda name: single[name]) if single else None,
        "added_value": _estimate("pearson", added),
        "within_prompt_gain": _within_gain(labels, probe.prediction, texts),
        "grid": {
            "pearson": _lists(grid.pearson),
            "pearson_ci": [
                [[_number(a), _number(b)] for a, b in zip(*pair, strict=True)]
                for pair in zip(low.reshape(shape), high.reshape(shape), strict=True)
            ],
        },
    }


def _columns(cells: np.ndarray) -> np.ndarray:
    """[layer, position, row] to [row, cell]."""
    return cells.reshape(-1, cells.shape[-1]).T.astype(float)


def _estimate(name: str, found: tuple[float | None, list[float] | None]) -> dict[str, Any]:
    return {name: found[0], f"{name}_ci": found[1]}


def _within_gain(
    labels: _Labels, prediction: np.ndarray, texts: dict[str, tuple[crossval.OutOfFold, crossval.OutOfFold]]
) -> dict[str, Any]:
    """The probe's within-prompt accuracy minus that of the best baseline trained on within-prompt ratings."""
    scores, groups = labels.rated.scores, labels.groups
    accuracy = {name: stats.pair_accuracy(scores, pair[1].prediction, groups)[0] for name, pair in texts.items()}
    known = {name: a for name, a in accuracy.items() if a is not None}
    if not known:
        return {"baseline": None, "baseline_accuracy": None, "accuracy": None, "accuracy_ci": None}
    best = max(known, key=lambda name: known[name])
    gain = stats.paired_accuracy_difference(scores, prediction, texts[best][1].prediction, groups)
    return {"baseline": best, "baseline_accuracy": known[best], **_estimate("accuracy", gain)}


def _null(labels: _Labels, grid: ProbeGrid, nulls: _Nulls) -> dict[str, Any]:
    """The p-values, and what the same selection finds on the control task's random ratings."""
    assert grid.null is not None

    def heldout_r(target: np.ndarray, prediction: np.ndarray) -> float | None:
        return stats.pearson(target, prediction - crossval.centre_of(target, labels.assignment))

    observed, control = heldout_r(labels.y, grid.heldout[:, 0]), heldout_r(nulls.control, grid.heldout[:, 1])
    nested_p, draws = None, nulls.nested.shape[1]
    if draws and observed is not None:
        found = [heldout_r(nulls.nested[:, d], grid.heldout[:, 2 + d]) for d in range(draws)]
        nested_p = (1 + sum(r is not None and r >= observed for r in found)) / (1 + draws)
    return {
        "draws": grid.null.across.shape[1],
        "corrected_p": max_t_p(grid.null.observed, grid.null.across)[0],
        "within_corrected_p": max_t_p(grid.null.observed_within, grid.null.within)[0],
        "nested_p": nested_p,
        "nested_draws": draws,
        "control_pearson": control,
        "selectivity": None if observed is None or control is None else observed - control,
    }


def _controls(
    subject: Subject,
    encoded: Sequence[Encoded],
    labels: _Labels,
    layers: Sequence[int],
    settings: Settings,
    options: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """The same sweep on the same architecture with random weights, every fourth layer on offer."""
    random = subject.random_weights(settings.seed)
    chosen = spread_layers(layers)
    options = {**options, "progress": lambda done, total: progress("controls", done, total)}
    recording = record(random, encoded, layers=chosen, positions=settings.positions, site=settings.site, **options)
    grid, _, _ = probes.sweep(recording, labels.y[:, None], labels.assignment, layers=chosen, positions=settings.positions)
    centre = crossval.centre_of(labels.y, labels.assignment)
    found = labels.metrics(grid.heldout[:, 0], centre)
    return {"controls": {"random_weights": {**found, "layers": chosen, "best": grid.best.to_dict()}}}


def finding(facts: dict[str, Any]) -> str:
    """One plain sentence: what was found, and how sure it is."""
    held, null, added = facts["heldout"], facts["null"], facts["added_value"]
    where = f"layer {facts['best']['layer']}, position {facts['best']['position']}"
    if held["pearson"] is None or held["pearson_ci"] is None or null["corrected_p"] is None:
        return "The probe's predictions do not vary: nothing about the rating was found."
    r = f"held-out r = {held['pearson']:.2f} [{held['pearson_ci'][0]:.2f}, {held['pearson_ci'][1]:.2f}]"
    p = f"p {_p(null['corrected_p'], null['draws'])} corrected over {len(facts['layers']) * len(facts['positions'])} cells"
    if not (null["corrected_p"] < 0.01 and held["pearson_ci"][0] > 0):
        return f"No evidence that the rating can be read from the residual stream: {r}, {p}."
    base = facts["baselines"]["stack"]["pearson"]
    text = f"The rating can be read ({where}): {r}, {p}"
    if added["pearson_ci"] is None or base is None:
        return text + "; whether it adds to text baselines could not be estimated."
    gain = f"{added['pearson']:+.2f} [{added['pearson_ci'][0]:+.2f}, {added['pearson_ci'][1]:+.2f}]"
    if added["pearson_ci"][0] > 0:
        return text + f"; it adds {gain} to the r = {base:.2f} of all text and surprise baselines together."
    return text + f"; but text and surprise baselines together reach r = {base:.2f}, and it adds nothing certain ({gain})."


def _p(value: float, draws: int) -> str:
    return f"< {2 / (draws + 1):.3f}" if value <= 1.5 / (draws + 1) else f"= {value:.3f}"


def _provenance(
    subject: Subject, kept: RatedSet, encoder: Encoder, settings: Settings, facts: dict[str, Any]
) -> dict[str, Any]:
    return {
        "model": subject.name,
        "model_fingerprint": subject.fingerprint,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "data": kept.name,
        "data_fingerprint": kept.fingerprint,
        "rows": len(kept),
        "system": encoder.system,
        "template": encoder.template,
        "seed": settings.seed,
        "heldout_pearson": facts["heldout"]["pearson"],
        "heldout_pearson_ci": facts["heldout"]["pearson_ci"],
        "versions": facts["versions"],
    }


def _table(
    kept: RatedSet, labels: _Labels, grid: ProbeGrid, texts: dict[str, tuple[crossval.OutOfFold, crossval.OutOfFold]]
) -> dict[str, list[Any]]:
    rating = kept.rating
    columns: dict[str, Any] = {
        "prompt_id": kept.rows["prompt_id"],
        "score": kept.scores,
        "fold": labels.assignment,
        "prediction": rating(grid.heldout[:, 0]),
        **{name: rating(pair[0].prediction) for name, pair in texts.items()},
    }
    return {name: np.asarray(values).tolist() for name, values in columns.items()}


def _lists(values: np.ndarray) -> list[list[float | None]]:
    return [[_number(v) for v in row] for row in values]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass
class _Clock:
    """Wall seconds of the stages."""

    began: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str) -> None:
        self.laps[name] = time.perf_counter() - self.began - sum(self.laps.values())

    def move(self, share: float, source: str, target: str) -> None:
        self.laps[target] = share * self.laps[source]
        self.laps[source] -= self.laps[target]

    def seconds(self) -> dict[str, float]:
        return {**{k: round(v, 2) for k, v in self.laps.items()}, "total": round(sum(self.laps.values()), 2)}
