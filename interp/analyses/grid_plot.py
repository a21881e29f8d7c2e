"""The figures of `probe`: the grid, r by layer, predictions against ratings, probe against baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp import figures
from interp.figures import Axis, Number

if TYPE_CHECKING:
    import altair as alt

    from interp.analyses.grid import GridResult

LAYER = "layer (residual stream entering block l)"
R = "held-out Pearson r"
BOUNDS = ("low", "high")
MOST_DOTS = 5000  # in a scatter; more only make it slow and dark
MOST_COUNTS = 12  # above the bins; more would overlap
NAMES = {
    "log_length": "log length",
    "surface": "surface features",
    "tfidf_prompt": "TF-IDF prompt",
    "tfidf_words": "TF-IDF words",
    "tfidf_characters": "TF-IDF characters",
    "embedding": "token embeddings",
    "stack": "all baselines",
    "stack_and_probe": "all baselines + probe",
}
TENTHS = tuple(f"d{k}" for k in range(1, 11))
#: Panels of r by layer; positions that are not named here (integers) get panels of four lines.
PANELS = {
    "end of the prompt and first token": ("prompt_end", "first"),
    "tenths of the completion (later ones lighter)": TENTHS,
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


def grid(facts: dict[str, Any]) -> alt.TopLevelMixin:
    """Each cell's own held-out r by layer and position; the cell chosen on all rows is marked."""
    cells = list(_cells(facts))
    best = facts["best"]["layer"], facts["best"]["position"]
    at_best = next(c["r"] for c in cells if (c["layer"], c["position"]) == best)
    values = [c["r"] for c in cells]
    chart = figures.heatmap(
        cells,
        x=Axis("layer", _layer_title(facts)),
        y=Axis("position", "position"),
        # With 0 and .2 always on the scale, noise around 0 looks like noise.
        value=Axis("r", "held-out r", figures.nice_domain(values, step=0.05, include=(0, 0.2))),
        x_ticks=_ticks(facts["layers"]),
        marked=best,
        marked_label=f"chosen: layer {best[0]}, position {best[1]}, r = {_number(at_best)}",
    )
    held = facts["heldout"]
    nested = f"cell chosen in training folds: r\u00a0=\u00a0{_estimate(held['pearson'], held['pearson_ci'])}"
    missing = "; grey: no estimate" if None in values else ""
    return figures.style(
        chart,
        title=f"Where the rating can be read: {_subject(facts)}",
        subtitle=f"{_size(facts)}; {nested}{missing}",
    )


def layers(facts: dict[str, Any]) -> alt.TopLevelMixin:
    """r by layer for each position with its 95% band, against the best baseline and all of them together."""
    import altair as alt

    if len(facts["layers"]) == 1:
        return _one_layer(facts)
    cells, references = list(_cells(facts)), _references(facts)
    drawn = [c[key] for c in cells for key in ("r", *BOUNDS)]
    domain = figures.nice_domain(drawn, step=0.1, include=(0, *(r.value for r in references)))
    ends, panels = (min(facts["layers"]), max(facts["layers"])), _panels(facts["positions"])
    charts = [
        figures.lines_with_bands(
            [c for c in cells if c["position"] in names],
            x=Axis("layer", _layer_title(facts) if title == list(panels)[-1] else "", ends),
            y=Axis("r", "held-out r", domain),
            band=BOUNDS,
            series="position",
            references=references,
            sequential=names[0] in TENTHS,
            # Ten bands and names on one another show nothing: the first and last tenth stand for them.
            shown=(names[0], names[-1]) if len(names) > 4 else None,
            title=title,
            height=115 if len(panels) > 1 else 200,
        )
        for title, names in panels.items()
    ]
    return figures.style(
        alt.vconcat(*charts, spacing=8).resolve_scale(color="independent"),
        title=f"Held-out r by layer: {_subject(facts)}",
        subtitle=f"{_size(facts)}; bands: 95% intervals over prompts",
    )


def _one_layer(facts: dict[str, Any]) -> alt.TopLevelMixin:
    """The same where one layer makes no line: a dot and whisker for each position and reference."""
    rows = [{**cell, "colour": figures.BLUE} for cell in _cells(facts)]
    for name in _reference_names(facts):
        values = facts["baselines"][name]
        bounds = _bounds(values["pearson_ci"])
        rows.append({"position": NAMES.get(name, name), "r": values["pearson"], **bounds, "colour": figures.MUTED})
    drawn = [row[key] for row in rows for key in ("r", *BOUNDS)]
    chart = figures.intervals(
        rows,
        x=Axis("r", R, figures.nice_domain(drawn, step=0.1, include=(0,))),
        whisker=BOUNDS,
        label="position",
        colour="colour",
        reference=0,
        width=270,
    )
    return figures.style(
        chart,
        title=f"Held-out r at layer {facts['layers'][0]}: {_subject(facts)}",
        subtitle=f"{_size(facts)}; bars: 95% intervals over prompts; grey: text baselines",
    )


def scatter(result: GridResult) -> alt.TopLevelMixin:
    """Held-out prediction against rating, a dot per row; the few ratings of a set are jittered to be seen.

    Of more than `MOST_DOTS` rows as many are drawn, chosen at random.
    """
    facts, rng = result.facts, np.random.default_rng(0)
    scores, prediction = (np.asarray(result.rows[name], float) for name in ("score", "prediction"))
    step, n = _step(scores), len(scores)
    shown = np.sort(rng.permutation(n)[:MOST_DOTS])
    at = scores + step * rng.uniform(-0.35, 0.35, n)
    points = [{"rating": scores[i], "at": at[i], "prediction": prediction[i]} for i in shown]
    x_domain, y_domain = _rating_domains(facts, [p["prediction"] for p in points])
    chart = figures.scatter(
        points,
        x=Axis("at", _rating(facts), x_domain),
        y=Axis("prediction", "held-out prediction (rating points)", y_domain),
        identity=True,
    )
    held = facts["heldout"]
    r = f"r\u00a0=\u00a0{_estimate(held['pearson'], held['pearson_ci'])}"
    notes = "; ratings are jittered" if step else ""
    notes += f"; {MOST_DOTS:,} rows drawn" if n > MOST_DOTS else ""
    return figures.style(
        chart,
        title=f"Held-out prediction against rating: {_subject(facts)}",
        subtitle=f"{r}; {_size(facts)}; dashed: prediction\u00a0=\u00a0rating{notes}",
    )


def by_rating(result: GridResult) -> alt.TopLevelMixin:
    """Mean held-out prediction by rounded rating with 95% intervals over prompts."""
    facts = result.facts
    bins = [{**found, **_bounds(found["mean_ci"])} for found in facts["by_rating"]]
    x_domain, y_domain = _rating_domains(facts, [b[key] for b in bins for key in ("mean", *BOUNDS)])
    chart = figures.binned_means(
        bins,
        x=Axis("rating", f"{_rating(facts)}, rounded", x_domain),
        y=Axis("mean", "mean held-out prediction (rating points)", y_domain),
        whisker=BOUNDS,
        count="n" if len(bins) <= MOST_COUNTS else None,
        identity=True,
    )
    prompts = f"{facts['prompts']:,} prompts"
    return figures.style(
        chart,
        title=f"Mean held-out prediction by rating: {_subject(facts)}",
        subtitle=f"bars: 95% intervals over {prompts}; dashed: prediction\u00a0=\u00a0rating",
    )


def baselines(facts: dict[str, Any]) -> alt.TopLevelMixin:
    """r and within-prompt accuracy of the probe, each baseline, their stack, and the stack with the probe."""
    import altair as alt

    rows = _compared(facts)
    panels = [("pearson", R, 0.0)]
    if any(row["accuracy"] is not None for row in rows):
        panels.append(("accuracy", "within-prompt accuracy", 0.5))
    charts = [
        figures.intervals(
            rows,
            x=Axis(name, title, figures.nice_domain(_all(rows, name), step=0.1, include=(chance,))),
            whisker=(f"{name}_low", f"{name}_high"),
            label="name",
            colour="colour",
            reference=chance,
            labels=name == "pearson",
        )
        for name, title, chance in panels
    ]
    gain = _estimate(facts["added_value"]["pearson"], facts["added_value"]["pearson_ci"], sign="+")
    return figures.style(
        alt.hconcat(*charts, spacing=14),
        title=f"The probe against text baselines: {_subject(facts)}",
        subtitle=f"{_size(facts)}; bars: 95% intervals over prompts; dashed: chance. "
        f"Added by the probe to all baselines: r {gain}",
    )


def _subject(facts: dict[str, Any]) -> str:
    return f"{facts['model']} on {Path(facts['data']).name}"


def _size(facts: dict[str, Any]) -> str:
    return f"{facts['rows']:,} rows, {facts['prompts']:,} prompts"


def _layer_title(facts: dict[str, Any]) -> str:
    return LAYER if facts["site"] == "resid" else f"layer (block l's {facts['site']})"


def _rating(facts: dict[str, Any]) -> str:
    low, high = facts["scale"]
    return f"rating ({low:g}–{high:g})"


def _number(value: Number | None, sign: str = "") -> str:
    return "none" if value is None else f"{value:{sign}.2f}".replace("-", "−")


def _estimate(value: Number | None, ci: Sequence[Number] | None, sign: str = "") -> str:
    """Value and interval as in 0.51 [0.46, 0.55], with spaces that do not break."""
    between = f"\u00a0[{_number(ci[0], sign)},\u00a0{_number(ci[1], sign)}]" if ci is not None else ""
    return _number(value, sign) + between


def _bounds(ci: Sequence[Number | None] | None, prefix: str = "") -> dict[str, Number | None]:
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
    panels = {title: [p for p in positions if p in names] for title, names in PANELS.items()}
    known = {name for names in panels.values() for name in names}
    tokens = [p for p in positions if p not in known]
    for four in (tokens[i : i + 4] for i in range(0, len(tokens), 4)):
        panels[f"completion token {', '.join(four)}"] = four
    return {title: names for title, names in panels.items() if names}


def _reference_names(facts: dict[str, Any]) -> list[str]:
    """The best baseline and the stack of all, where they have an r."""
    table = facts["baselines"]
    chosen = [facts["best_baseline"], "stack"]
    return [name for name in chosen if name is not None and table[name]["pearson"] is not None]


def _references(facts: dict[str, Any]) -> list[figures.Reference]:
    dashes = {"stack": (1.5, 2.5)}
    return [
        figures.Reference(facts["baselines"][name]["pearson"], NAMES.get(name, name), dashes.get(name, (6, 3)))
        for name in _reference_names(facts)
    ]


def _step(scores: np.ndarray) -> float:
    """The distance of neighbouring ratings where they are few and even (1, or .5), else 0."""
    apart = np.diff(np.unique(scores))
    return float(apart.min()) if len(apart) and len(apart) <= 20 else 0.0


def _rating_domains(facts: dict[str, Any], drawn: Sequence[Number | None]) -> tuple[figures.Domain, figures.Domain]:
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


def _all(rows: Sequence[dict[str, Any]], name: str) -> list[Number | None]:
    return [row[key] for row in rows for key in (name, f"{name}_low", f"{name}_high")]
