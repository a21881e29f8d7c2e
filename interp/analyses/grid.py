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
from interp.analyses.findings import (
    FOLDS,
    SPREAD_SEEDS,
    Labels,
    Nulls,
    Trained,
    finding,
    findings,
    null_facts,
    selectivity,
    spread_layers,
)
from interp.artifacts import content_key, versions

if TYPE_CHECKING:
    import torch

    from interp.chat import Encoded, Encoder
    from interp.data import RatedSet
    from interp.models import Subject
    from interp.probes import Probe, ProbeGrid

#: Below this many prompts a run says that its figures are rough.
FEW_PROMPTS = 60

#: Raised whenever a figure is computed otherwise than before, so that no old result is read for a new one.
RESULTS = 2


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
        facts["max_length"] = min(self.max_length, subject.context)
        return content_key(
            command="probe", results=RESULTS, data=rated.fingerprint, encoder=encoder.key, **model, **facts
        )


#: Where progress goes: (stage, done, total).
Progress = Callable[[str, int, int], None]


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """For callers that do not watch."""


@dataclass(frozen=True)
class GridResult:
    """A finished run: `facts` is the JSON object of the contract, `rows` a table with a line per rated row.

    `rows` columns: prompt_id, score, fold, and out-of-fold predictions in rating points: `prediction` (the probe),
    one per baseline, stack, stack_and_probe; `centre` is the mean rating that a row's predictions were trained on.
    `probe` is the choice refitted on all rows.
    """

    facts: dict[str, Any]
    rows: dict[str, list[Any]]
    probe: Probe

    def to_frame(self) -> Any:
        """`rows` as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows)


def encode(
    rated: RatedSet, encoder: Encoder, settings: Settings, max_length: int
) -> tuple[RatedSet, list[Encoded], dict[str, int]]:
    """(rows that can be used, their tokens, reasons and counts of those that cannot)."""
    before = rated.rows["messages"] if "messages" in rated.rows.column_names else [None] * len(rated)
    rows = zip(rated.rows["prompt"], rated.rows["completion"], before, strict=True)
    encoded, kept, skipped = encoder.encode_all((chat.messages_of(*r) for r in rows), max_length)
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
    kept, encoded, skipped = encode(rated, encoder, settings, min(settings.max_length, subject.context))
    assignment = data.folds(kept.groups, FOLDS, settings.seed)
    labels = Labels(kept, kept.labels(), kept.groups, assignment)
    if np.ptp(labels.y) == 0:
        raise InterpError(f"every rating in {rated.name} is {kept.scores[0]:g}: there is nothing to predict")
    clock.lap("encode")
    activations, embedding = _record(subject, encoded, layers, settings, options, progress)
    clock.lap("record")
    rows = baselines.Rows(
        kept.rows["prompt"], kept.rows["completion"], embedding.cell(0, "mean").float(), embedding.surprise
    )
    texts = _baselines(rows, labels, progress)
    clock.lap("baselines")
    drawn = Nulls.draw(labels, settings.seed, settings.draws, settings.nested_draws)
    grid, spread, null_share = _sweep(activations, subject.device, labels, drawn, layers, settings, progress)
    clock.lap("fit")
    clock.move(null_share, "fit", "null")
    controls = _controls(subject, encoded, labels, layers, settings, options, progress) if settings.controls else {}
    if controls:
        clock.lap("controls")
    found, columns = findings(activations, labels, grid, spread, texts, settings.seed)
    tests = {**null_facts(labels, grid, drawn), **selectivity(activations, grid, labels, settings.seed)}
    clock.lap("metrics")
    facts = {
        **_circumstances(subject, rated, kept, encoded, skipped, settings, layers),
        "best": grid.best.to_dict(),
        "choices": [c.to_dict() for c in grid.choices[0]],
        **found,
        "null": tests,
        **controls,
        "assumptions": [*subject.notes, *encoder.notes, *rated.notes, *few_prompts(kept)],
        "seconds": clock.seconds(),
    }
    facts["finding"] = finding(facts)
    probe = probes.refit(
        activations, grid.best, labels.y, kept.scale, _provenance(subject, kept, encoder, settings, facts)
    )
    return GridResult(facts, _table(labels, columns), probe)


def few_prompts(rated: RatedSet) -> list[str]:
    """A warning where there are too few prompts for the intervals to be trusted."""
    prompts = len(np.unique(rated.groups))
    few = f"only {prompts} prompts: r is biased downwards and intervals, given the fitted folds, are too narrow"
    return [few] if prompts < FEW_PROMPTS else []


def _circumstances(
    subject: Subject,
    rated: RatedSet,
    kept: RatedSet,
    encoded: Sequence[Encoded],
    skipped: dict[str, int],
    settings: Settings,
    layers: Sequence[int],
) -> dict[str, Any]:
    """What was run on what."""
    return {
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
        "versions": versions(),
    }


def _record(
    subject: Subject,
    encoded: Sequence[Encoded],
    layers: Sequence[int],
    settings: Settings,
    options: dict[str, Any],
    progress: Progress,
) -> tuple[Activations, Activations]:
    """(activations of the grid, recording with layer 0 `mean` and the surprise): one pass for the residual stream."""
    options = {**options, "progress": lambda done, total: progress("record", done, total)}
    if settings.site == "resid":
        wanted, names = sorted({0, *layers}), tuple(dict.fromkeys([*settings.positions, "mean"]))
        recording = record(subject, encoded, layers=wanted, positions=names, surprise=True, **options)
        return recording, recording
    grid = record(subject, encoded, layers=layers, positions=settings.positions, site=settings.site, **options)
    return grid, record(subject, encoded, layers=[0], positions=("mean",), surprise=True, **options)


def _baselines(rows: baselines.Rows, labels: Labels, progress: Progress) -> dict[str, Trained]:
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
        rows.cache.clear()
    progress("baselines", len(baselines.BASELINES), len(baselines.BASELINES))
    return found


def _sweep(
    activations: Activations,
    device: torch.device,
    labels: Labels,
    drawn: Nulls,
    layers: Sequence[int],
    settings: Settings,
    progress: Progress,
) -> tuple[ProbeGrid, list[np.ndarray], float]:
    """The sweep with its nulls; the targets after the first are the nested null's labels."""
    cells = itertools.count(1)
    total = len(layers) * len(settings.positions)
    return probes.sweep(
        activations,
        np.column_stack([labels.y, drawn.nested]),
        labels.assignment,
        layers=layers,
        positions=settings.positions,
        permutations=drawn.permutations,
        spread=[data.folds(labels.groups, FOLDS, settings.seed + s) for s in range(1, SPREAD_SEEDS)],
        spread_layers=spread_layers(layers),
        device=device,
        progress=lambda *_: progress("fit", next(cells), total),
    )


def _controls(
    subject: Subject,
    encoded: Sequence[Encoded],
    labels: Labels,
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
    names = settings.positions
    grid, _, _ = probes.sweep(
        recording, labels.y[:, None], labels.assignment, layers=chosen, positions=names, device=subject.device
    )
    centre = crossval.centre_of(labels.y, labels.assignment)
    found = labels.metrics(grid.heldout[:, 0], centre)
    return {"controls": {"random_weights": {**found, "layers": chosen, "best": grid.best.to_dict()}}}


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


def _table(labels: Labels, columns: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    """A line per row: identity, rating, fold, and every out-of-fold prediction in rating points."""
    rated = labels.rated
    identity = {"prompt_id": rated.rows["prompt_id"], "score": rated.scores, "fold": labels.assignment}
    values = {**identity, **{name: rated.rating(column) for name, column in columns.items()}}
    return {name: np.asarray(column).tolist() for name, column in values.items()}


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
        total = time.perf_counter() - self.began
        return {**{k: round(v, 2) for k, v in self.laps.items()}, "total": round(total, 2)}
