"""The figures of `probe`: the grid, r by layer, predictions against ratings, the probe against its baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp import data, figures, stats

if TYPE_CHECKING:
    import altair as alt

    from interp.analyses.grid import GridResult

LAYER = "layer (residual stream entering block l)"
R = "held-out Pearson r"
NAMES = {
    "log_length": "log length",
    "surface": "surface features",
    "tfidf_prompt": "TF-IDF of prompt",
    "tfidf_words": "TF-IDF words",
    "tfidf_characters": "TF-IDF characters",
    "embedding": "token embeddings",
    "stack": "all baselines",
    "stack_and_probe": "all baselines + probe",
}
TENTHS = tuple(f"d{k}" for k in range(1, 11))
#: Panels of r by layer; positions that are not named here (integers) get one of their own.
PANELS = {
    "prompt end and first token": ("prompt_end", "first"),
    "tenths of the completion": TENTHS,
    "end of the completion": ("last", "turn_end", "end"),
    "mean over the completion": ("mean",),
}


def plot(result: GridResult) -> dict[str, alt.TopLevelMixin]:
    """The run's figures by name, in the order of the report."""
    return {
        "grid": grid(result.facts),
        "layers": layers(result.facts),
        "scatter": scatter(result),
        "by_rating": by_rating(result),
        "baselines": baselines(result.facts),
    }


def mean_by_rating(result: GridResult, draws: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Mean held-out prediction of each rounded rating with its 95% interval over resampled prompts, and n.

    Halves are rounded upwards (`data.rounded`). `low` and `high` are None where fewer than two prompts have
    the rating or fewer than half of the draws do, as in `stats`.
    """
    ratings = data.rounded(np.asarray(result.rows["score"]))
    prediction = np.asarray(result.rows["prediction"], float)
    prompts, codes = np.unique(result.rows["prompt_id"], return_inverse=True)
    weights = stats.cluster_weights(codes, draws, seed)
    found = []
    for rating in np.unique(ratings):
        rows = ratings == rating
        total = np.bincount(codes[rows], prediction[rows], len(prompts))
        count = np.bincount(codes[rows], minlength=len(prompts))
        drawn = weights @ count
        usable = drawn > 0
        ci = None
        if np.count_nonzero(count) >= 2 and 2 * usable.sum() >= draws:
            ci = np.percentile((weights @ total)[usable] / drawn[usable], [2.5, 97.5]).tolist()
        mean = float(prediction[rows].mean())
        found.append({"rating": int(rating), "mean": mean, **_bounds(ci), "n": int(rows.sum())})
    return found


def grid(facts: dict[str, Any]) -> alt.TopLevelMixin:
    """Each cell's own held-out r by layer and position; the cell chosen on all rows is marked."""
    cells = list(_cells(facts))
    best = facts["best"]["layer"], facts["best"]["position"]
    at_best = next(c["r"] for c in cells if (c["layer"], c["position"]) == best)
    values = [c["r"] for c in cells]
    chart = figures.heatmap(
        cells,
        x="layer",
        y="position",
        value="r",
        x_title=_layer_title(facts),
        y_title="position",
        value_title="held-out r",
        # 0 is always on the scale and .2 is never its brightest colour's worth of noise.
        domain=figures.nice_domain(values, step=0.05, include=(0, 0.2)),
        x_ticks=_ticks(facts["layers"]),
        marked=best,
        marked_label=f"chosen: layer {best[0]}, {best[1]}, r = {_number(at_best)}",
    )
    missing = "; grey: no estimate" if None in values else ""
    title = f"Where the rating can be read: {facts['model']} on {facts['data']}"
    return figures.style(chart, title=title, subtitle=f"{_size(facts)}{missing}", offset=24)


def layers(facts: dict[str, Any]) -> alt.TopLevelMixin:
    """r by layer for each position with its 95% band, against the best baseline and all of them together."""
    import altair as alt

    cells, references = list(_cells(facts)), _references(facts)
    drawn = [c[key] for c in cells for key in ("r", "low", "high")]
    domain = figures.nice_domain(drawn, step=0.1, include=(0, *(r.value for r in references)))
    panels = _panels(facts["positions"])
    charts = [
        figures.lines_with_bands(
            [c for c in cells if c["position"] in names],
            x="layer",
            y="r",
            low="low",
            high="high",
            series="position",
            x_title=_layer_title(facts) if title == list(panels)[-1] else "",
            y_title="held-out r",
            y_domain=domain,
            references=references,
            sequential=names[0] in TENTHS,
            title=title,
        )
        for title, names in panels.items()
    ]
    return figures.style(
        alt.vconcat(*charts, spacing=8).resolve_scale(color="independent"),
        title=f"Held-out r by layer: {_subject(facts)}",
        subtitle=f"{_size(facts)}; bands: 95% intervals over prompts",
    )


def scatter(result: GridResult) -> alt.TopLevelMixin:
    """Held-out prediction against rating, a dot per row; whole ratings are spread sideways to be seen."""
    facts, rows = result.facts, result.rows
    scores = np.asarray(rows["score"], float)
    step = _step(scores)
    shift = np.random.default_rng(0).uniform(-0.35, 0.35, len(scores)) * step
    points = [
        {"rating": score, "at": score + by, "prediction": prediction}
        for score, by, prediction in zip(scores, shift, rows["prediction"], strict=True)
    ]
    x_domain, y_domain = _rating_domains(facts, [p["prediction"] for p in points])
    chart = figures.scatter(
        points,
        x="at",
        y="prediction",
        x_title=_rating(facts),
        y_title="held-out prediction (rating points)",
        x_domain=x_domain,
        y_domain=y_domain,
        identity=True,
    )
    held = facts["heldout"]
    r = f"r = {_estimate(held['pearson'], held['pearson_ci'])}"
    spread = "; ratings spread sideways" if step else ""
    return figures.style(
        chart,
        title=f"Held-out prediction against rating: {_subject(facts)}",
        subtitle=f"{r}; {_size(facts)}; dashed: prediction = rating{spread}",
    )


def by_rating(result: GridResult) -> alt.TopLevelMixin:
    """Mean held-out prediction by rounded rating with 95% intervals over prompts."""
    facts, bins = result.facts, mean_by_rating(result)
    x_domain, y_domain = _rating_domains(facts, [b[key] for b in bins for key in ("mean", "low", "high")])
    chart = figures.binned_means(
        bins,
        x="rating",
        mean="mean",
        low="low",
        high="high",
        count="n",
        x_title=f"{_rating(facts)}, rounded",
        y_title="mean held-out prediction (rating points)",
        x_domain=x_domain,
        y_domain=y_domain,
        identity=True,
    )
    return figures.style(
        chart,
        title=f"Mean held-out prediction by rating: {_subject(facts)}",
        subtitle="bars: 95% intervals over prompts; n: rows; dashed: prediction = rating",
        offset=22,
    )


def baselines(facts: dict[str, Any]) -> alt.TopLevelMixin:
    """r and within-prompt accuracy of the probe, each baseline, their stack, and the stack with the probe."""
    import altair as alt

    rows = _compared(facts)
    shared: dict[str, Any] = {"label": "name", "colour": "colour"}
    r = figures.intervals(
        rows,
        value="pearson",
        low="pearson_low",
        high="pearson_high",
        x_title=R,
        domain=figures.nice_domain(_all(rows, "pearson"), step=0.1, include=(0,)),
        reference=0,
        **shared,
    )
    charts = [r]
    if any(row["accuracy"] is not None for row in rows):
        accuracy = figures.intervals(
            rows,
            value="accuracy",
            low="accuracy_low",
            high="accuracy_high",
            x_title="within-prompt accuracy",
            domain=figures.nice_domain(_all(rows, "accuracy"), step=0.1, include=(0.5,)),
            reference=0.5,
            labels=False,
            **shared,
        )
        charts.append(accuracy)
    added = facts["added_value"]
    return figures.style(
        alt.hconcat(*charts, spacing=14),
        title=f"The probe against text baselines: {_subject(facts)}",
        subtitle=f"{_size(facts)}; bars: 95% intervals over prompts; dashed: chance. "
        f"The probe adds {_estimate(added['pearson'], added['pearson_ci'], sign='+')} to the r of all baselines.",
    )


def _subject(facts: dict[str, Any]) -> str:
    return f"{facts['model']} on {facts['data']}"


def _size(facts: dict[str, Any]) -> str:
    return f"{facts['rows']:,} rows, {facts['prompts']:,} prompts"


def _layer_title(facts: dict[str, Any]) -> str:
    return LAYER if facts["site"] == "resid" else f"layer (block l's {facts['site']})"


def _rating(facts: dict[str, Any]) -> str:
    low, high = facts["scale"]
    return f"rating ({low:g}–{high:g})"


def _number(value: float | None, sign: str = "") -> str:
    return "none" if value is None else f"{value:{sign}.2f}".replace("-", "−")


def _estimate(value: float | None, ci: Sequence[float] | None, sign: str = "") -> str:
    """"0.51 [0.46, 0.55]"."""
    between = f" [{_number(ci[0], sign)}, {_number(ci[1], sign)}]" if ci is not None else ""
    return _number(value, sign) + between


def _bounds(ci: Sequence[float] | None, prefix: str = "") -> dict[str, float | None]:
    low, high = (None, None) if ci is None else ci
    return {f"{prefix}low": low, f"{prefix}high": high}


def _cells(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every cell of the grid as a row: layer, position, r, low, high."""
    found = facts["grid"]
    for i, layer in enumerate(facts["layers"]):
        for j, position in enumerate(facts["positions"]):
            ci = found["pearson_ci"][i][j]
            yield {"layer": layer, "position": position, "r": found["pearson"][i][j], **_bounds(ci)}


def _ticks(layers: Sequence[int]) -> list[int]:
    """Every fifth layer where there are many."""
    few = len(layers) <= 12
    return [layer for layer in layers if few or layer % 5 == 0]


def _panels(positions: Sequence[str]) -> dict[str, list[str]]:
    """Panel titles and the positions of this run that stand in each."""
    known = {name for names in PANELS.values() for name in names}
    wanted = {**PANELS, "completion tokens": [p for p in positions if p not in known]}
    panels = {title: [p for p in positions if p in names] for title, names in wanted.items()}
    return {title: names for title, names in panels.items() if names}


def _references(facts: dict[str, Any]) -> list[figures.Reference]:
    """The best baseline and the stack of all, where they have an r."""
    table, best = facts["baselines"], facts["best_baseline"]
    chosen = [(best, (6, 3)), ("stack", (1.5, 2.5))]
    return [
        figures.Reference(table[name]["pearson"], NAMES.get(name, name), dash)
        for name, dash in chosen
        if name is not None and table[name]["pearson"] is not None
    ]


def _step(scores: np.ndarray) -> float:
    """The distance of neighbouring ratings where they are few and even (1, or .5), else 0."""
    apart = np.diff(np.unique(scores))
    return float(apart.min()) if len(apart) and len(apart) <= 20 else 0.0


def _rating_domains(facts: dict[str, Any], drawn: Sequence[float | None]) -> tuple[figures.Domain, figures.Domain]:
    """The scale with a margin for x; for y the scale, and whatever is predicted beyond it."""
    low, high = facts["scale"]
    return (low - 0.5, high + 0.5), figures.nice_domain(drawn, step=1, include=(low, high))


def _compared(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per predictor, the highest r first; those that hold the probe are in the accent colour."""
    table = {NAMES.get(name, name): (values, figures.MUTED) for name, values in facts["baselines"].items()}
    table["probe"] = (facts["heldout"], figures.VERMILLION)
    if "stack_and_probe" in facts["baselines"]:
        table[NAMES["stack_and_probe"]] = (facts["baselines"]["stack_and_probe"], figures.VERMILLION)
    for name, values in facts.get("controls", {}).items():
        table[f"probe, {name.replace('_', ' ')}"] = (values, figures.BLUE)
    rows = [
        {
            "name": name,
            "colour": colour,
            "pearson": values["pearson"],
            **_bounds(values["pearson_ci"], "pearson_"),
            "accuracy": values["within_prompt_accuracy"],
            **_bounds(values["within_prompt_accuracy_ci"], "accuracy_"),
        }
        for name, (values, colour) in table.items()
    ]
    return sorted(rows, key=lambda row: -np.inf if row["pearson"] is None else row["pearson"], reverse=True)


def _all(rows: Sequence[dict[str, Any]], name: str) -> list[float | None]:
    return [row[key] for row in rows for key in (name, f"{name}_low", f"{name}_high")]
