"""Drawing primitives: valid charts, pictures with the right colours, JSON with the numbers drawn."""

import itertools
import json
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from interp import InterpError, figures
from interp.figures import Axis, Reference

CELLS = [
    {"layer": layer, "position": position, "r": (layer * 2 + column) / 10}
    for layer in range(4)
    for column, position in enumerate(("first", "mean"))
]
LINES = [
    {
        "layer": x,
        "r": 0.1 * x + shift,
        "low": 0.1 * x + shift - 0.07,
        "high": 0.1 * x + shift + 0.05,
        "name": name,
    }
    for name, shift in (("last", 0.011), ("mean", 0.123))
    for x in range(5)
]
BINS = [
    {"rating": x, "mean": 3 + 0.31 * x, "low": 2.5 + 0.31 * x, "high": 3.6 + 0.31 * x, "n": 40 + x} for x in range(1, 6)
]
LAYER, R = Axis("layer", "layer", (0, 4)), Axis("r", "held-out r", (-0.1, 0.8))


def heatmap(rows=CELLS, **options):
    return figures.heatmap(
        rows,
        x=Axis("layer", "layer"),
        y=Axis("position", "position"),
        value=Axis("r", "r", (0.0, 0.7)),
        **options,
    )


def lines(rows=LINES, **options):
    dashed = Reference(0.45, "baseline", (6, 3))
    given = {"x": LAYER, "y": R, "band": ("low", "high"), "series": "name", "references": [dashed], **options}
    return figures.lines_with_bands(rows, **given)


def scatter(rows=LINES, **options):
    return figures.scatter(rows, x=LAYER, y=R, identity=True, **options)


def intervals(rows=LINES[:5], **options):
    return figures.intervals(rows, x=R, whisker=("low", "high"), label="layer", reference=0, **options)


def binned(rows=BINS, **options):
    x, y = Axis("rating", "rating (1–5)", (0.5, 5.5)), Axis("mean", "mean prediction (points)", (1, 6))
    return figures.binned_means(rows, x=x, y=y, whisker=("low", "high"), count="n", identity=True, **options)


PRIMITIVES = {
    "heatmap": (heatmap, CELLS, ("r",)),
    "lines": (lines, LINES, ("r", "low", "high")),
    "scatter": (scatter, LINES, ("r",)),
    "intervals": (intervals, LINES[:5], ("r", "low", "high")),
    "binned": (binned, BINS, ("mean", "low", "high", "n")),
}


def pixels(png):
    """Decode an 8-bit RGBA PNG by the specification: [height, width, 4]."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour = struct.unpack(">IIBB", png[16:26])
    assert (depth, colour) == (8, 6)
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        data += png[at + 8 : at + 8 + length] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + length
    raw, stride, rows = zlib.decompress(data), 4 * width + 1, []
    above = bytearray(stride - 1)
    for start in range(0, height * stride, stride):
        above = unfiltered(raw[start], bytearray(raw[start + 1 : start + stride]), above)
        rows.append(above)
    return np.array(rows, np.uint8).reshape(height, width, 4)


def unfiltered(kind, line, above):
    """One row of a PNG with its filter undone (none, sub, up, average, Paeth)."""
    if kind in (0, 2):
        return line if kind == 0 else bytearray((np.array(line, np.uint8) + np.array(above, np.uint8)).tobytes())
    if kind == 1:
        return bytearray(np.array(line, np.uint8).reshape(-1, 4).cumsum(axis=0, dtype=np.uint8).tobytes())
    for i in range(len(line)):
        left, corner, up = (line[i - 4], above[i - 4], above[i]) if i >= 4 else (0, 0, above[i])
        p = left + up - corner
        a, b, c = abs(p - left), abs(p - up), abs(p - corner)
        paeth = left if a <= b and a <= c else up if b <= c else corner
        line[i] = (line[i] + ((left + up) // 2 if kind == 3 else paeth)) & 255
    return line


def saved(chart, path, facts=None):
    """(PNG bytes, JSON) of a chart written with `save`."""
    png, numbers = figures.save(chart, path, facts or {"command": "probe"})
    return png.read_bytes(), json.loads(numbers.read_text())


def colours(image):
    """How often each colour occurs: {"#RRGGBB": pixels}."""
    values, counts = np.unique(image[..., :3].reshape(-1, 3), axis=0, return_counts=True)
    return {"#{:02X}{:02X}{:02X}".format(*value): int(n) for value, n in zip(values.tolist(), counts, strict=True)}


def drawn(saved_json):
    """All rows of all data sets in a figure's JSON."""
    return [row for rows in saved_json["chart"]["datasets"].values() for row in rows]


@pytest.fixture
def small(monkeypatch):
    """Pictures at a third of the size, quicker to decode."""
    monkeypatch.setattr(figures, "PNG_SCALE", 1)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_picture_is_not_blank_and_json_holds_the_numbers(name, small, tmp_path):
    """Each primitive gives a white picture with something on it, and JSON with every number drawn."""
    draw, rows, fields = PRIMITIVES[name]
    png, numbers = saved(figures.style(draw(), title="A title"), tmp_path / name, {"command": "probe", "run": "x-1"})
    image = pixels(png)
    found = colours(image)
    assert image.shape[1] >= 150
    assert image.shape[0] >= 100
    assert max(found, key=found.__getitem__) == "#FFFFFF" or name == "heatmap"
    assert image[0, 0].tolist() == [255, 255, 255, 255]
    assert sum(found.values()) - found["#FFFFFF"] > 0.01 * sum(found.values())
    assert len(found) > 10
    assert (numbers["command"], numbers["run"]) == ("probe", "x-1")
    shown = drawn(numbers)
    for row in rows:
        assert any(all(other.get(field) == row[field] for field in fields) for other in shown)


def test_a_blank_picture_would_be_seen(small, tmp_path):
    """The check of blankness itself: a chart of nothing has one colour."""
    import altair as alt

    png, _ = saved(figures.style(alt.Chart(figures.table([{"x": 1}])).mark_point(opacity=0), title=""), tmp_path / "a")
    assert set(colours(pixels(png))) == {"#FFFFFF"}


def test_full_size_picture_has_three_pixels_to_one(tmp_path):
    """Pictures are three times the chart's size: a 3.3 inch column at about 380 dots per inch."""
    png, _ = saved(figures.style(heatmap(), title="A title"), tmp_path / "a")
    width, height = struct.unpack(">II", png[16:24])
    assert 1000 < width < 1500
    assert 300 < height < 900


def test_heatmap_colours_are_viridis_and_grey_where_missing(small, tmp_path):
    """The lowest value is viridis' first colour, the highest its last, and a missing one grey."""
    rows = [{**row, "r": None if row["r"] == 0.3 else row["r"]} for row in CELLS]
    found = colours(pixels(saved(figures.style(heatmap(rows), title=""), tmp_path / "a")[0]))
    cell = 0.8 * 67 * 45
    assert found["#440154"] > cell
    assert found["#FDE725"] > cell
    assert found[figures.FAINT] > cell
    whole = colours(pixels(saved(figures.style(heatmap(), title=""), tmp_path / "b")[0]))
    assert whole.get(figures.FAINT, 0) < cell / 10


def test_diverging_heatmap_is_centred_on_zero(small, tmp_path):
    """Zero is nearly white between orange and blue; a domain that would move it is refused."""
    rows = [{"a": k, "b": "y", "v": v} for k, v in enumerate((-1.0, 0.0, 1.0))]
    axes = {"x": Axis("a", "a"), "y": Axis("b", "b")}
    chart = figures.heatmap(rows, **axes, value=Axis("v", "v", (-1, 1)), diverging=True)
    image = pixels(saved(figures.style(chart, title=""), tmp_path / "a")[0]).astype(int)
    row = image[image.shape[0] // 2]
    shades = [tuple(c) for c in row[:, :3] if (row[:, :3] == c).all(axis=1).sum() > 80]
    low, middle, high = list(dict.fromkeys(s for s in shades if s != (255, 255, 255)))
    assert low[2] > low[0]
    assert min(middle) > 220
    assert high[0] > high[2]
    with pytest.raises(InterpError, match="expected \\(-a, a\\)"):
        figures.heatmap(rows, **axes, value=Axis("v", "v", (-1, 2)), diverging=True)


def test_marked_cell_is_outlined_and_named(small, tmp_path):
    """Marking a cell adds its black and white outline and its label, and nothing without it."""
    png, numbers = saved(figures.style(heatmap(marked=(2, "mean"), marked_label="chosen"), title=""), tmp_path / "a")
    assert {"layer": 2, "position": "mean", "label": "chosen"} in drawn(numbers)
    plain, other = saved(figures.style(heatmap(), title=""), tmp_path / "b")
    assert not any("label" in row for row in drawn(other))
    dark, before = ((pixels(picture)[..., :3] < 60).all(axis=2).sum() for picture in (png, plain))
    assert dark > before + 200


@pytest.mark.parametrize("name", PRIMITIVES)
@pytest.mark.parametrize("absent", [None, math.nan, np.float32("nan")])
def test_missing_values_are_never_zero(name, absent, tmp_path, monkeypatch):
    """None and NaN stay missing in the JSON, never a 0 or a NaN, and the other values stay as they were."""
    monkeypatch.setattr(figures, "PNG_SCALE", 1)
    draw, rows, fields = PRIMITIVES[name]
    values = [field for field in fields if field != "n"]
    tagged = [{**row, "tag": k} for k, row in enumerate(rows)]
    gone = [dict(row, **dict.fromkeys(values, absent)) if row["tag"] in (1, 2) else row for row in tagged]
    png, numbers = saved(figures.style(draw(gone), title=""), tmp_path / name)
    shown = [row for row in drawn(numbers) if "tag" in row]
    assert len(png) > 1000
    assert {row["tag"] for row in shown} >= set(range(len(rows))) - {1, 2}
    for row in shown:
        assert [row[v] for v in values] == [None if row["tag"] in (1, 2) else rows[row["tag"]][v] for v in values]


def test_a_line_is_interrupted_where_its_value_is_missing(small, tmp_path):
    """Line and band leave the columns around a missing value empty, and fill them otherwise."""

    def ink(rows, name):
        chart = figures.style(lines(rows, references=()), title="")
        image = pixels(saved(chart, tmp_path / name)[0]).astype(int)
        # White, the grey axes and the grey line at 0 have equal channels; blue ink does not.
        blue = (image[..., 2] - image[..., 0]) > 20
        used = np.flatnonzero(blue.any(axis=0))
        middle = used[0] + (255 * 2) // 4
        return blue[:, middle - 40 : middle + 40].sum()

    whole = [row for row in LINES if row["name"] == "mean"]
    gap = [{**row, "r": None, "low": None, "high": None} if row["layer"] == 2 else row for row in whole]
    assert ink(whole, "whole") > 80
    assert ink(gap, "gap") == 0


@pytest.mark.parametrize("name", PRIMITIVES)
def test_nothing_to_draw_is_no_error(name, tmp_path, monkeypatch):
    """A figure whose every value is missing still has its axes."""
    monkeypatch.setattr(figures, "PNG_SCALE", 1)
    draw, rows, fields = PRIMITIVES[name]
    empty = [{k: None if k in fields and k != "n" else v for k, v in row.items()} for row in rows]
    png, _ = saved(figures.style(draw(empty), title=""), tmp_path / name)
    assert len(png) > 1000


def test_line_breaks_at_a_gap_and_lone_points_are_dots(tmp_path):
    """A point both of whose neighbours are missing is drawn as a dot, others are not."""
    rows = [{**row, "r": None} if row["layer"] in (1, 3) and row["name"] == "last" else row for row in LINES]
    found = figures._lone(rows, "layer", "r", "name")
    assert [(row["name"], row["layer"]) for row in found] == [("last", 0), ("last", 2), ("last", 4)]
    assert figures._lone(LINES, "layer", "r", "name") == []


def test_edge_labels_name_every_series_and_reference(tmp_path):
    """Each line and reference is named beside the place where it ends, in the order of their heights."""
    spec = figures.specification(lines())
    found = {row["name"]: row for rows in spec["datasets"].values() for row in rows if "place" in row}
    assert {name: row["r"] for name, row in found.items()} == {
        "last": LINES[4]["r"],
        "mean": LINES[9]["r"],
        "baseline": 0.45,
    }
    assert found["last"]["place"] < found["baseline"]["place"] < found["mean"]["place"]
    one = figures.specification(lines(shown=["mean"]))
    assert {row["name"] for rows in one["datasets"].values() for row in rows if "place" in row} == {
        "mean",
        "baseline",
    }


def test_lines_without_a_domain_are_refused():
    """Labels need to know the axis; so does the line of identity."""
    with pytest.raises(InterpError, match="no domain of y"):
        lines(y=Axis("r", "r"))
    with pytest.raises(InterpError, match="without a domain"):
        figures.scatter(LINES, x=Axis("layer", "layer"), y=R, identity=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.01, 2))
def test_dodge_matches_scipys_isotonic_regression(values, gap):
    """Without walls, labels lie where isotonic regression of (value - room below) puts them."""
    order, room = np.argsort(values, kind="stable"), gap * np.arange(len(values))
    expected = isotonic_regression(np.asarray(values)[order] - room).x + room
    assert np.allclose(np.asarray(figures.dodge(values, gap, -1e6, 1e6))[order], expected, atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=10), st.floats(0.001, 0.1))
def test_dodge_keeps_room_order_and_walls(values, gap):
    """Labels stand a gap apart or more, in order, inside the walls; those far apart do not move."""
    placed = figures.dodge(values, gap, 0, 1)
    ranked = sorted(placed)
    assert all(b - a > gap - 1e-9 for a, b in itertools.pairwise(ranked))
    assert all(-1e-9 <= p <= 1 + 1e-9 for p in placed)
    pairs = [(v, p) for v, p in zip(values, placed, strict=True)]
    assert all((v < w) <= (p < q) for v, p in pairs for w, q in pairs)
    apart = [0.1, 0.9, 0.5]
    assert figures.dodge(apart, gap, 0, 1) == pytest.approx(apart)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | st.floats(-3, 3), max_size=10), st.sampled_from([0.05, 0.1, 1.0]))
def test_nice_domain_is_the_smallest_of_whole_steps(values, step):
    """All values are inside, both ends are whole steps, and a step less on either side would lose one."""
    low, high = figures.nice_domain([*values, math.nan], step=step, include=(0.0,))
    known = [v for v in values if v is not None] + [0.0]
    slack = 1e-8
    assert low - slack <= min(known)
    assert max(known) <= high + slack
    assert all(abs(end / step - round(end / step)) < 1e-6 for end in (low, high))
    assert min(known) < low + step + slack
    assert max(known) > high - step - slack or high - low == pytest.approx(step)


def test_nice_domain_does_not_round_a_step_up():
    """0.3 = 3 x 0.1 only nearly, and stays the end."""
    assert figures.nice_domain([0.1 + 0.2, None], step=0.1, include=(0,)) == (0.0, 0.3)
    assert figures.nice_domain([], step=0.5) == (0.0, 0.5)


@pytest.mark.parametrize("count", [1, 7, 8, 10, 31])
@pytest.mark.parametrize("sequential", [False, True])
def test_palette_colours_differ_and_can_be_seen_on_white(count, sequential):
    """As many different colours as asked for, none lighter than 3/4; sequential ones grow lighter."""
    found = figures.palette(count, sequential=sequential)
    assert len(set(found)) == len(found) == count
    light = [
        sum(w * int(c[i : i + 2], 16) / 255 for w, i in zip((0.21, 0.72, 0.07), (1, 3, 5), strict=True)) for c in found
    ]
    assert max(light) < 0.75
    if sequential or count > len(figures.CATEGORIES):
        assert light == sorted(light)


def test_style_wraps_long_titles():
    """No line of title or subtitle is longer than asked, and no word is lost."""
    title = "Where the rating can be read: mistralai/Mistral-7B-Instruct-v0.1 on ultrafeedback, all of it"
    chart = figures.style(heatmap(), title=title, subtitle=title, columns=40).to_dict()["title"]
    assert max(map(len, chart["subtitle"])) <= 40
    assert " ".join(chart["subtitle"]) == title
    assert len(chart["text"]) > 1


def test_charts_can_be_put_together_before_they_are_styled(tmp_path):
    """Primitives carry no theme of their own, so they can be concatenated; the house's font is set once."""
    import altair as alt

    _, numbers = saved(figures.style(alt.hconcat(heatmap(), intervals()), title="Two"), tmp_path / "two")
    assert numbers["chart"]["config"]["font"] == figures.FONT
    assert "config" not in figures.specification(heatmap())


def test_saving_twice_gives_the_same_bytes_whatever_the_theme(tmp_path):
    """The picture and its JSON depend on the chart alone."""
    import altair as alt

    first = [path.read_bytes() for path in figures.save(figures.style(lines(), title="a"), tmp_path / "a", {"run": 1})]
    with alt.theme.enable("dark"):
        again = [
            path.read_bytes() for path in figures.save(figures.style(lines(), title="a"), tmp_path / "b", {"run": 1})
        ]
    assert first == again


def test_a_name_may_hold_a_dot_and_folders_are_made(tmp_path):
    """The suffix is added, not exchanged."""
    paths = figures.save(figures.style(heatmap(), title="a"), tmp_path / "new" / "grid.v0.1", {})
    assert [path.name for path in paths] == ["grid.v0.1.png", "grid.v0.1.json"]
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize("where", ["drawing", "facts", "writing"])
def test_a_failure_leaves_what_was_there(where, tmp_path, monkeypatch):
    """A figure that cannot be drawn or written leaves the old files whole, and no temporary one."""
    chart = figures.style(heatmap(), title="a")
    old = [path.read_bytes() for path in figures.save(chart, tmp_path / "grid", {"run": "old"})]
    facts = {"run": math.nan if where == "facts" else "new"}
    if where == "drawing":
        chart = figures.style(scatter([{"layer": 1, "r": object()}]), title="a")
    if where == "writing":
        monkeypatch.setattr("interp.artifacts.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises((TypeError, ValueError, OSError)):
        figures.save(chart, tmp_path / "grid", facts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.json", "grid.png"]
    assert [(tmp_path / name).read_bytes() for name in ("grid.png", "grid.json")] == old


def test_importing_loads_no_drawing_library():
    """altair and vl-convert are loaded when something is drawn."""
    heavy = "('altair', 'vl_convert', 'pandas', 'torch')"
    code = f"import sys, interp.figures; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
