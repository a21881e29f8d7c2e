"""The figures of a probe run: every shape of grid, every number drawn, intervals against brute force."""

import copy
import json

import numpy as np
import pytest
import torch

from interp import figures
from interp.analyses import grid_plot
from interp.analyses.findings import mean_by_rating
from interp.analyses.grid import GridResult
from interp.positions import POSITIONS
from interp.probes import Probe

ALL, FEW = tuple(POSITIONS), ("prompt_end", "first", "last", "mean")
METRICS = ("pearson", "within_prompt_accuracy")
BASELINES = {
    "constant": (None, 0.5),
    "log_length": (-0.04, 0.52),
    "surface": (0.27, 0.66),
    "tfidf_prompt": (0.11, 0.49),
    "embedding": (0.26, 0.69),
    "mine": (0.21, 0.6),
    "stack": (0.31, 0.67),
    "stack_and_probe": (0.42, 0.7),
}


def measured(pearson, accuracy, half=0.06):
    """The two metrics that are drawn, with their intervals."""
    values = dict(zip(METRICS, (pearson, accuracy), strict=True))
    return values | {f"{k}_ci": None if v is None else [v - half, v + half] for k, v in values.items()}


def run(layers=range(6), positions=FEW, missing=(), prompts=30, signal=1.0, seed=0, **facts):
    """A made-up run: `missing` cells (layer, position) have no r; `signal` scales the predictions."""
    layers, positions, rng = list(layers), list(positions), np.random.default_rng(seed)
    r = np.round(rng.uniform(-0.05, 0.5, (len(layers), len(positions))), 4).tolist()
    for i, j in missing:
        r[i][j] = None
    bounds = [[[None, None] if v is None else [v - 0.06, v + 0.05] for v in row] for row in r]
    groups = np.repeat(np.arange(prompts), 4)
    score = rng.integers(2, 21, len(groups)) / 2
    prediction = 5 + 0.4 * signal * (score - 5) + rng.normal(size=len(groups))
    known = {
        "command": "probe",
        "model": "smollm2",
        "data": "pocketfeedback",
        "rows": len(score),
        "prompts": prompts,
        "scale": [1.0, 10.0],
        "layers": layers,
        "positions": positions,
        "site": "resid",
        "best": {"layer": layers[len(layers) // 2], "position": positions[-1], "lambda": 100.0},
        "heldout": measured(0.38, 0.68),
        "baselines": {name: measured(*pair) for name, pair in BASELINES.items()},
        "best_baseline": "surface",
        "added_value": {"pearson": 0.11, "pearson_ci": [0.02, 0.2]},
        "grid": {"pearson": r, "pearson_ci": bounds},
        "by_rating": mean_by_rating(score, prediction, groups),
    }
    rows = {"prompt_id": [f"p{g}" for g in groups], "score": score.tolist(), "fold": (groups % 5).tolist()}
    direction = torch.ones(2)
    probe = Probe(direction, 0.0, 0, "mean", "resid", "hook", (1.0, 10.0), "ridge", 1.0, 1.0, 1.0)
    return GridResult({**known, **facts}, {**rows, "prediction": prediction.tolist()}, probe)


def drawn(chart):
    """All rows of all data sets of a chart."""
    return [row for rows in figures.specification(chart)["datasets"].values() for row in rows]


def texts(chart):
    """Title, subtitle and axis titles of a chart, as one string."""
    return json.dumps(figures.specification(chart), ensure_ascii=False).replace("\u00a0", " ").replace('", "', " ")


def axis_titles(spec):
    """All titles of channels, wherever they stand in a specification."""
    if isinstance(spec, list):
        return [title for part in spec for title in axis_titles(part)]
    if not isinstance(spec, dict):
        return []
    mine = [spec["title"]] if isinstance(spec.get("title"), str) and "field" in spec else []
    return mine + [title for name, part in spec.items() if name != "datasets" for title in axis_titles(part)]


def by_name(chart):
    """The rows of the comparison with baselines, from the top: {name: row}."""
    return {row["name"]: row for row in drawn(chart) if "name" in row}


FULL = {"layers": range(31), "positions": ALL}
SHAPES = {
    "full": (FULL, 31 * 16),
    "one cell": ({"layers": [20], "positions": ["mean"]}, 1),
    "one layer": ({"layers": [20], "positions": ALL}, 16),
    "one position": ({"layers": range(31), "positions": ["mean"]}, 31),
    "some layers, some tokens": ({"layers": [0, 8, 16, 17], "positions": ["5", "-1", "d3", "end"]}, 16),
    "many tokens": ({"layers": [0, 1], "positions": [str(k) for k in range(9)]}, 18),
    "gaps": ({"missing": [(0, 0), (1, 3), (2, 3), (4, 3)]}, 24),
    "nothing known": ({"layers": [0, 4], "positions": ["mean"], "missing": [(0, 0), (1, 0)]}, 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_grid_is_drawn_whole(shape, tmp_path, monkeypatch):
    """Pictures of any grid are saved; heatmap and lines hold each cell's r and interval."""
    monkeypatch.setattr(figures, "PNG_SCALE", 1)
    options, cells = SHAPES[shape]
    facts = run(**options).facts
    r, ci = facts["grid"]["pearson"], facts["grid"]["pearson_ci"]
    places = [(i, j) for i in range(len(facts["layers"])) for j in range(len(facts["positions"]))]
    expected = {(facts["layers"][i], facts["positions"][j]): (r[i][j], *ci[i][j]) for i, j in places}
    assert len(expected) == cells
    for name, chart in (("grid", grid_plot.grid(facts)), ("layers", grid_plot.layers(facts))):
        png, numbers = figures.save(chart, tmp_path / name, {"command": "probe", "run": "x"})
        assert png.stat().st_size > 3000
        saved = json.loads(numbers.read_text())
        rows = [row for found in saved["chart"]["datasets"].values() for row in found]
        shown = [row for row in rows if "layer" in row and "r" in row]
        found = {(row["layer"], row["position"]): (row["r"], row["low"], row["high"]) for row in shown}
        assert found == expected


def test_plot_gives_the_five_figures_in_order():
    """The names are those of the report."""
    assert list(grid_plot.plot(run())) == ["grid", "layers", "scatter", "by_rating", "baselines"]


def test_full_size_pictures_fit_a_column(tmp_path):
    """At three pixels to one, every figure of a full run is 1,100 to 1,450 pixels wide and not blank."""
    for name, chart in grid_plot.plot(run(**FULL)).items():
        png = figures.save(chart, tmp_path / name, {})[0].read_bytes()
        width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
        assert 1100 < width < 1450, name
        assert 800 < height < 2300, name
        assert len(png) > 40_000


def test_the_chosen_cell_is_marked_with_its_own_r():
    """The label names the run's choice, be it the brightest cell or not, and the nested r stands above."""
    result = run(layers=range(8), positions=["last", "mean"])
    r = result.facts["grid"]["pearson"][4][1]
    (label,) = [row for row in drawn(grid_plot.grid(result.facts)) if "label" in row]
    assert label == {
        "layer": 4,
        "position": "mean",
        "label": f"chosen: layer 4, position mean, r = {r:.2f}".replace("-", "−"),
    }
    assert "r = 0.38 [0.32, 0.44]" in texts(grid_plot.grid(result.facts))


def test_missing_cells_are_explained():
    """A grid with grey cells says what grey is; one without does not."""
    assert "grey: no estimate" in texts(grid_plot.grid(run(missing=[(1, 1)]).facts))
    assert "grey" not in texts(grid_plot.grid(run().facts))


def test_positions_stand_in_the_order_of_the_run():
    """Rows of the heatmap follow facts["positions"], not the alphabet."""
    spec = figures.specification(grid_plot.grid(run(**FULL).facts))
    assert spec["layer"][0]["encoding"]["y"]["scale"]["domain"] == list(ALL)
    assert spec["layer"][0]["encoding"]["x"]["axis"]["values"] == [0, 5, 10, 15, 20, 25, 30]


def test_noise_does_not_fill_the_colour_scale():
    """A grid of r near 0 keeps 0.2 on its scale, so that it looks like nothing; a real one goes beyond."""
    result = run()
    result.facts["grid"]["pearson"] = np.random.default_rng(0).uniform(-0.03, 0.03, (6, 4)).tolist()
    scales = [
        figures.specification(grid_plot.grid(facts))["layer"][1]["encoding"]["color"]["scale"]["domain"]
        for facts in (result.facts, run().facts)
    ]
    assert scales[0] == [-0.05, 0.2]
    assert scales[1][1] > 0.4


@pytest.mark.parametrize("layers", [range(6), [20]])
def test_references_are_the_best_baseline_and_the_stack(layers):
    """Both are drawn at their r and named; without any baseline that has an r there are none."""
    result = run(layers, ["last"])
    rows = drawn(grid_plot.layers(result.facts))
    named = {row["position"]: row["r"] for row in rows if row.get("position") in ("surface features", "all baselines")}
    assert named == {"surface features": 0.27, "all baselines": 0.31}
    bare = run(layers, ["last"], best_baseline=None, baselines={"stack": measured(None, 0.5)})
    assert not {row.get("position") for row in drawn(grid_plot.layers(bare.facts))} - set(ALL) - {None}


def test_comparison_is_sorted_and_the_probe_stands_out():
    """The highest r first, those without one last; probe, text baselines and controls differ in colour."""
    facts = run(controls={"random_weights": measured(0.29, 0.6)}).facts
    rows = by_name(grid_plot.baselines(facts))
    known = {
        "surface": "surface features",
        "embedding": "token embeddings",
        "mine": "mine",
        "constant": "constant",
    }
    assert set(known.values()) < set(rows)
    chart = figures.specification(grid_plot.baselines(facts))
    order = chart["hconcat"][0]["layer"][2]["encoding"]["y"]["scale"]["domain"]
    assert order == sorted(rows, key=lambda n: -2 if rows[n]["pearson"] is None else rows[n]["pearson"], reverse=True)
    assert order[:2] == ["all baselines + probe", "probe"]
    assert order[-1] == "constant"
    accent = {name for name, row in rows.items() if row["colour"] == figures.VERMILLION}
    assert accent == {"probe", "all baselines + probe"}
    assert rows["probe, random weights"]["colour"] == figures.BLUE
    assert "+0.11 [+0.02, +0.20]" in texts(grid_plot.baselines(facts))
    assert "probe, random weights" not in by_name(grid_plot.baselines(run().facts))


def test_comparison_without_pairs_has_one_panel():
    """Where no prompt has two completions there is no accuracy, and no empty panel for it."""
    table = {name: measured(pair[0], None) for name, pair in BASELINES.items()}
    alone = run(baselines=table, heldout=measured(0.38, None))
    assert len(figures.specification(grid_plot.baselines(alone.facts))["hconcat"]) == 1
    assert len(figures.specification(grid_plot.baselines(run().facts))["hconcat"]) == 2


def test_a_run_that_found_nothing_is_drawn():
    """Constant predictions (no r anywhere, no interval) still give five figures."""
    nothing = measured(None, None)
    empty = {"pearson": None, "pearson_ci": None}
    shape = {"layers": [0, 4], "positions": ["mean"], "missing": [(0, 0), (1, 0)]}
    table = dict.fromkeys(("constant", "stack", "stack_and_probe"), nothing)
    result = run(**shape, heldout=nothing, baselines=table, best_baseline=None, added_value=empty)
    for chart in grid_plot.plot(result).values():
        figures.specification(chart)
    assert "r = none" in texts(grid_plot.grid(result.facts))


def test_scatter_shows_each_row_where_it_belongs():
    """Every row's prediction is drawn, moved sideways by less than half the way to the next rating."""
    result = run()
    points = [row for row in drawn(grid_plot.scatter(result)) if "rating" in row]
    assert [p["prediction"] for p in points] == result.rows["prediction"]
    assert [p["rating"] for p in points] == result.rows["score"]
    moved = np.array([p["at"] - p["rating"] for p in points])
    assert 0 < np.abs(moved).max() < 0.25
    assert "jittered" in texts(grid_plot.scatter(result))


def test_scatter_leaves_fractional_ratings_where_they_are():
    """Ratings that are all different need no jitter."""
    result = run()
    result.rows["score"] = np.random.default_rng(1).uniform(1, 10, len(result.rows["score"])).tolist()
    points = [row for row in drawn(grid_plot.scatter(result)) if "rating" in row]
    assert all(p["at"] == p["rating"] for p in points)
    assert "jittered" not in texts(grid_plot.scatter(result))


def test_scatter_of_very_many_rows_draws_some_and_says_so(monkeypatch):
    """Beyond the limit a random choice is drawn, and its size is told."""
    monkeypatch.setattr(grid_plot, "MOST_DOTS", 50)
    points = [row for row in drawn(grid_plot.scatter(run())) if "rating" in row]
    assert len({(p["at"], p["prediction"]) for p in points}) == 50
    assert "50 rows drawn" in texts(grid_plot.scatter(run()))


def test_plot_changes_nothing():
    """Drawing leaves the result as it was, and draws the same again."""
    result = run(layers=[0, 1], positions=["last", "mean"], missing=[(0, 0)])
    facts, rows = copy.deepcopy(result.facts), copy.deepcopy(result.rows)
    first, again = ([figures.specification(c) for c in grid_plot.plot(result).values()] for _ in range(2))
    assert (result.facts, result.rows) == (facts, rows)
    assert first == again


def test_axes_are_named_with_their_units():
    """Every figure names its axes as the method does."""
    charts = grid_plot.plot(run(positions=["mean"]))
    wanted = {
        "grid": ("layer (residual stream entering block l)", "position", "held-out r"),
        "layers": ("layer (residual stream entering block l)", "held-out r"),
        "scatter": ("rating (1–10)", "held-out prediction (rating points)"),
        "by_rating": ("rating (1–10), rounded", "mean held-out prediction (rating points)"),
        "baselines": ("held-out Pearson r", "within-prompt accuracy"),
    }
    for name, titles in wanted.items():
        assert set(titles) <= set(axis_titles(figures.specification(charts[name])))
    other = figures.specification(grid_plot.grid(run(site="attn_out").facts))
    assert "layer (block l's attn_out)" in axis_titles(other)
