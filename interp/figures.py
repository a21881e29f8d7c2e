"""Drawing primitives and house style: Altair charts that fit a paper's column, saved as picture + JSON.

Knows no result types. Every primitive takes `rows`, a sequence of mappings, and names of their fields (plain
identifiers); None and NaN stand for a figure that does not exist and are never drawn as 0. Primitives return
bare charts that can be layered and concatenated; `style` comes last and adds title and theme.

A column is 3.3 inches, drawn at about 420 px: 12 px is 6.8 points in print. Colours: Okabe & Ito (2008) for
categories, viridis for amounts, blue-orange centred on 0 where the sign matters. Liberation Sans is shipped
inside vl-convert, so that a picture is the same on every machine.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from interp import InterpError
from interp.artifacts import atomic, save_json

if TYPE_CHECKING:
    import altair as alt

Rows = Sequence[Mapping[str, Any]]
Number = float | int
Domain = tuple[Number, Number]
Bounds = tuple[str, str]  # the fields of an interval's low and high end

FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
#: Okabe & Ito's colours without yellow, which cannot be read on white.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
INK, MUTED, FAINT = "#222222", "#555555", "#D9D9D9"
CATEGORIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
#: viridis from its dark end up to where a thin line is still seen on white.
SEQUENCE = ("#440154", "#482878", "#3E4A89", "#31688E", "#26828E", "#1F9E89", "#35B779", "#6DCD59")
TEXT, LINE_HEIGHT, PNG_SCALE = 12, 13, 3


@dataclass(frozen=True)
class Axis:
    """A field to draw, its axis title with the unit, and the range shown (None: what the values need)."""

    field: str
    title: str
    domain: Domain | None = None

    def x(self, **axis: Any) -> alt.X:
        """The horizontal channel, with these properties of its axis."""
        import altair as alt

        return alt.X(self.field, type="quantitative", title=self.title).scale(self._scale()).axis(**axis)

    def y(self, **axis: Any) -> alt.Y:
        """The vertical channel, with these properties of its axis."""
        import altair as alt

        return alt.Y(self.field, type="quantitative", title=self.title).scale(self._scale()).axis(**axis)

    def _scale(self) -> alt.Scale:
        import altair as alt

        return alt.Scale(domain=self.domain or alt.Undefined, nice=False, zero=False)


@dataclass(frozen=True)
class Reference:
    """A horizontal line at `value`, in the figure's units, labelled directly; `dash` is (ink, gap) in px."""

    value: Number
    label: str
    dash: tuple[Number, Number]


def style(chart: alt.TopLevelMixin, *, title: str, subtitle: str = "", columns: int = 76) -> Any:
    """The finished chart: title and subtitle (wrapped at `columns` characters) and the house's theme."""
    import altair as alt

    heading = alt.TitleParams(
        text=textwrap.wrap(title, columns - 14) or [""],
        subtitle=textwrap.wrap(subtitle, columns),
        anchor="start",
        frame="bounds",
        offset=8,
    )
    sizes = {
        "labelFontSize": TEXT,
        "titleFontSize": TEXT,
        "titleFontWeight": "normal",
        "labelColor": INK,
        "titleColor": INK,
    }
    return (
        cast("Any", chart)
        .properties(title=heading, background="white", padding=6)
        .configure(
            font=FONT,
            view={"stroke": None},
            axis={
                **sizes,
                "grid": False,
                "labelFlush": False,
                "domainColor": MUTED,
                "tickColor": MUTED,
                "titlePadding": 6,
            },
            legend=sizes,
            title={
                "fontSize": 13,
                "subtitleFontSize": TEXT,
                "subtitleColor": MUTED,
                "subtitlePadding": 4,
                "color": INK,
            },
        )
    )


def table(rows: Rows) -> alt.InlineData:
    """`rows` as chart data: numpy values made plain, NaN and infinities None."""
    import altair as alt

    return alt.InlineData(values=[{name: _plain(value) for name, value in row.items()} for row in rows])


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with(rows: Rows, *fields: str) -> list[Mapping[str, Any]]:
    """The rows in which all these fields exist."""
    return [row for row in rows if all(_plain(row.get(field)) is not None for field in fields)]


def _of(channel: Any, field: str) -> Any:
    """The same channel, axis and scale for another field: layers that share a scale must agree on it."""
    other = channel.copy()
    other.shorthand = field
    return other


def _heading(title: str) -> alt.TitleParams:
    """A panel's title."""
    import altair as alt

    return alt.TitleParams(title, anchor="start", frame="group", fontSize=TEXT, fontWeight="normal", offset=5)


def distinct(rows: Rows, field: str) -> list[Any]:
    """Values of a field in order of appearance."""
    return list(dict.fromkeys(_plain(row[field]) for row in rows))


def nice_domain(values: Collection[Number | None], *, step: Number, include: Collection[Number] = ()) -> Domain:
    """The smallest range of whole steps that holds `include` and all values that exist."""
    known = [v for v in (*values, *include) if v is not None and math.isfinite(v)] or [0.0]
    # A value that lies on a step must not open another one because of rounding.
    low, high = math.floor(min(known) / step + 1e-9), math.ceil(max(known) / step - 1e-9)
    return round(low * step, 10), round(max(high, low + 1) * step, 10)


def palette(count: int, *, sequential: bool = False) -> list[str]:
    """`count` colours: categories, or viridis in order where `sequential` or where they are too many."""
    if count <= len(CATEGORIES) and not sequential:
        return list(CATEGORIES[:count])
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in SEQUENCE])
    at = np.linspace(0, len(stops) - 1, count)
    mixed = np.column_stack([np.interp(at, np.arange(len(stops)), channel) for channel in stops.T])
    return ["#{:02X}{:02X}{:02X}".format(*map(round, colour)) for colour in mixed.tolist()]


def dodge(values: Sequence[Number], gap: Number, low: Number, high: Number) -> list[float]:
    """Places for labels near `values` [n], in their order, at least `gap` apart and inside [low, high].

    The least-squares solution: isotonic regression of the sorted values less the room below each. Labels
    for which there is no room start at `low` and run over `high`.
    """
    if not values:
        return []
    order, room = np.argsort(values, kind="stable"), gap * np.arange(len(values))
    wanted, n = np.asarray(values, float)[order] - room, len(values)
    fitted = [max(min(wanted[j : k + 1].mean() for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    placed = np.empty(n)
    placed[order] = np.maximum(np.minimum(fitted, high - room[-1]), low) + room
    return placed.tolist()


def heatmap(
    rows: Rows,
    *,
    x: Axis,
    y: Axis,
    value: Axis,
    x_ticks: Sequence[Any] | None = None,
    diverging: bool = False,
    marked: tuple[Any, Any] | None = None,
    marked_label: str = "",
    width: int = 270,
    row_height: int = 15,
) -> alt.LayerChart:
    """Cells of categories x and y, in order of appearance, coloured by `value`; missing ones are grey.

    The cell at `marked` (x, y) is outlined, and `marked_label` stands above its column. `diverging` needs a
    domain of `value` that is symmetric about 0 (InterpError otherwise), so that white means 0.
    """
    import altair as alt

    if diverging and (value.domain is None or not math.isclose(value.domain[0], -value.domain[1])):
        raise InterpError(f"heatmap: found diverging colours over {value.domain}, expected (-a, a)")
    columns, lines = distinct(rows, x.field), distinct(rows, y.field)
    # Whole pixels a column, or the picture's own grid of pixels shows as seams between cells.
    width = max(1, width // len(columns)) * len(columns)
    height = max(row_height, 90 // len(lines)) * len(lines)
    across = alt.X(x.field, type="ordinal", title=x.title).scale(domain=columns, padding=0)
    across = across.axis(values=columns if x_ticks is None else list(x_ticks), labelAngle=0, domain=False)
    down = alt.Y(y.field, type="ordinal", title=y.title).scale(domain=lines, padding=0).axis(domain=False)
    scheme = alt.SchemeParams(name="blueorange" if diverging else "viridis")
    colour = alt.Color(value.field, type="quantitative", title=value.title)
    colour = colour.scale(alt.Scale(domain=value.domain or alt.Undefined, scheme=scheme))
    colour = colour.legend(gradientLength=height - 18, gradientThickness=12, tickCount=6)
    layers = [
        alt.Chart(table(rows)).mark_rect(color=FAINT).encode(x=across, y=down),
        alt.Chart(table(_with(rows, value.field))).mark_rect().encode(x=across, y=down, color=colour),
    ]
    if marked is not None:
        data = table([{x.field: marked[0], y.field: marked[1], "label": marked_label}])
        place = (columns.index(marked[0]) + 0.5) / len(columns)
        layers += _mark(alt.Chart(data).encode(x=across, y=down), place)
    return alt.LayerChart(layer=layers).properties(width=width, height=height)


def _mark(cell: alt.Chart, place: float) -> list[alt.Chart]:
    """An outline of white inside black, seen on any colour; a label that runs towards the figure's middle."""
    align = "left" if place < 0.3 else "right" if place > 0.7 else "center"
    label = cell.mark_text(align=align, baseline="bottom", fontSize=TEXT, color=INK)
    return [
        cell.mark_rect(fillOpacity=0, stroke="black", strokeWidth=3.5),
        cell.mark_rect(fillOpacity=0, stroke="white", strokeWidth=1.5),
        label.encode(y={"value": -5}, text="label:N"),
    ]


def lines_with_bands(
    rows: Rows,
    *,
    x: Axis,
    y: Axis,
    band: Bounds,
    series: str,
    references: Sequence[Reference] = (),
    shown: Collection[str] | None = None,
    sequential: bool = False,
    title: str = "",
    width: int = 255,
    height: int = 115,
) -> alt.LayerChart:
    """A line of y over x for each series, its band, and horizontal references; y needs a domain.

    Series and references are named at the right edge, where labels make room for one another. `shown`: only
    these series get a band and a name (where there are many). `sequential`: the series are ordered, and so
    are their colours. Where x has no title its ticks have no labels: a panel below has them. A line breaks
    where y is missing; a point without neighbours is a dot with a whisker.
    """
    import altair as alt

    if y.domain is None:
        raise InterpError("lines_with_bands: found no domain of y, expected one: labels need it to make room")
    names = distinct(rows, series)
    across, up = x.x(format="d", tickMinStep=1, labels=bool(x.title)), y.y(tickCount=5)
    hue = alt.Color(series, type="nominal", legend=None)
    hue = hue.scale(domain=names, range=palette(len(names), sequential=sequential))
    picked = [row for row in rows if shown is None or row[series] in shown]
    ends = [{series: name, y.field: end} for name, end in _ends(picked, x.field, y.field, series)]
    ruled = [{series: reference.label, y.field: reference.value} for reference in references]
    gap = LINE_HEIGHT * (y.domain[1] - y.domain[0]) / height
    places = dodge([row[y.field] for row in (*ends, *ruled)], gap, *y.domain)
    named = [{**row, "place": place} for row, place in zip((*ends, *ruled), places, strict=True)]
    areas = alt.Chart(table(picked)).mark_area(opacity=0.15, line=False)
    lone = alt.Chart(table(_lone(rows, x.field, y.field, series))).encode(x=across, color=hue)
    layers = [
        *_rules(references, up, y.field),
        areas.encode(x=across, y=_of(up, band[0]), y2=band[1], color=hue),
        alt.Chart(table(rows)).mark_line(strokeWidth=1.6).encode(x=across, y=up, color=hue),
        lone.mark_point(filled=True, size=24, opacity=1).encode(y=up),
        lone.mark_rule(opacity=0.4).encode(y=_of(up, band[0]), y2=band[1]),
        *_edge_labels(named[: len(ends)], up, series, width, hue),
        *_edge_labels(named[len(ends) :], up, series, width, alt.value(INK)),
    ]
    return alt.LayerChart(layer=layers).properties(width=width, height=height, title=_heading(title))


def _rules(references: Sequence[Reference], up: alt.Y, y: str) -> list[alt.Chart]:
    """The references, and a faint line at 0."""
    import altair as alt

    lines = [(Reference(0, "", (1, 0)), FAINT), *((reference, INK) for reference in references)]
    charts = [alt.Chart(table([{y: line.value}])) for line, _ in lines]
    return [
        chart.mark_rule(strokeDash=line.dash, color=colour, clip=True).encode(y=up)
        for chart, (line, colour) in zip(charts, lines, strict=True)
    ]


def _ends(rows: Rows, x: str, y: str, series: str) -> list[tuple[str, Number]]:
    """(series, its last y that exists) of the series that have any."""
    known = sorted(_with(rows, y), key=lambda row: row[x])
    last = {row[series]: row[y] for row in known}
    return [(name, last[name]) for name in distinct(rows, series) if name in last]


def _lone(rows: Rows, x: str, y: str, series: str) -> list[Mapping[str, Any]]:
    """Points that a line does not show: both neighbours in their series are missing."""
    found: list[Mapping[str, Any]] = []
    for name in distinct(rows, series):
        line = sorted((row for row in rows if row[series] == name), key=lambda row: row[x])
        known = [False, *(bool(_with([row], y)) for row in line), False]
        found += [row for i, row in enumerate(line) if known[i + 1] and not (known[i] or known[i + 2])]
    return found


def _edge_labels(labels: Rows, up: alt.Y, series: str, width: int, colour: Any) -> list[alt.Chart]:
    """Labels right of the panel at `place`, each with a leader from where its line ends."""
    import altair as alt

    base = alt.Chart(table(labels)).encode(color=colour)
    leader = base.mark_rule(strokeWidth=0.8).encode(x=alt.value(width + 1), x2=alt.value(width + 9), y=up)
    label = base.mark_text(align="left", baseline="middle", fontSize=TEXT).encode(x=alt.value(width + 11))
    return [
        leader.encode(y2="place"),
        label.encode(y=_of(up, "place"), text=alt.Text(series, type="nominal")),
    ]


def scatter(
    rows: Rows, *, x: Axis, y: Axis, identity: bool = False, width: int = 350, height: int = 320
) -> alt.LayerChart:
    """Transparent points of y against x, and the line of identity (which needs both domains)."""
    import altair as alt

    points = alt.Chart(table(_with(rows, x.field, y.field)))
    points = points.mark_point(filled=True, size=22, opacity=0.35, color=BLUE).encode(x=x.x(), y=y.y())
    layers = [*([_identity(x, y)] if identity else []), points]
    return alt.LayerChart(layer=layers).properties(width=width, height=height)


def _identity(x: Axis, y: Axis) -> alt.Chart:
    """y = x, as far as both domains hold it."""
    import altair as alt

    if x.domain is None or y.domain is None:
        raise InterpError("identity line: found an axis without a domain, expected both")
    ends = [max(x.domain[0], y.domain[0]), min(x.domain[1], y.domain[1])]
    line = alt.Chart(table([{x.field: end, y.field: end} for end in ends]))
    return line.mark_line(strokeDash=(5, 4), strokeWidth=1, color=MUTED).encode(x=x.x(), y=y.y())


def intervals(
    rows: Rows,
    *,
    x: Axis,
    whisker: Bounds,
    label: str,
    colour: str | None = None,
    reference: Number | None = None,
    labels: bool = True,
    title: str = "",
    width: int = 140,
    row_height: int = 19,
) -> alt.LayerChart:
    """A dot at x and its whisker for each label, from the top in order of appearance.

    A label without a value keeps its empty row; `colour` names a field of hex colours; `reference` is a
    vertical dashed line; `labels=False` leaves the names to the panel on the left.
    """
    import altair as alt

    names = distinct(rows, label)
    down = alt.Y(label, type="nominal", title=None).scale(domain=names)
    lines = {"grid": True, "gridColor": "#EEEEEE", "ticks": False, "domain": False}
    down = down.axis(alt.Axis(labels=labels, labelLimit=220, labelPadding=6, **lines))
    across = x.x(tickCount=4)
    hue = alt.value(BLUE) if colour is None else alt.Color(colour, type="nominal", scale=None)
    rule = alt.Chart(table([] if reference is None else [{"at": reference}]))
    ends = alt.Chart(table(_with(rows, x.field, *whisker))).mark_rule(strokeWidth=1.6)
    dots = alt.Chart(table(_with(rows, x.field))).mark_point(filled=True, size=55, opacity=1)
    layers = [
        rule.mark_rule(strokeDash=(4, 3), color=MUTED).encode(x=_of(across, "at")),
        ends.encode(y=down, x=_of(across, whisker[0]), x2=whisker[1], color=hue),
        dots.encode(y=down, x=across, color=hue),
    ]
    size = {"width": width, "height": row_height * len(names)}
    return alt.LayerChart(layer=layers).properties(title=_heading(title), **size)


def binned_means(
    rows: Rows,
    *,
    x: Axis,
    y: Axis,
    whisker: Bounds,
    count: str | None = None,
    identity: bool = False,
    width: int = 350,
    height: int = 280,
) -> alt.LayerChart:
    """The mean y of each bin x with its interval; above the panel `count`, the rows that it rests on."""
    import altair as alt

    across, up = x.x(tickMinStep=1), y.y()
    points = alt.Chart(table(_with(rows, y.field))).encode(x=across, y=up)
    whiskers = alt.Chart(table(_with(rows, y.field, *whisker))).mark_rule(strokeWidth=1.6, color=BLUE)
    text: dict[str, Any] = {"fontSize": TEXT - 1, "color": MUTED}
    number = alt.Chart(table(rows if count else [])).mark_text(**text)
    head = alt.Chart(table([{}] if count else [])).mark_text(align="right", text="n =", **text)
    layers = [
        *([_identity(x, y)] if identity else []),
        points.mark_line(color=BLUE, strokeWidth=1, opacity=0.5),
        whiskers.encode(x=across, y=_of(up, whisker[0]), y2=whisker[1]),
        points.mark_point(filled=True, size=60, opacity=1, color=BLUE),
        number.encode(x=across, y=alt.value(-12), text=alt.Text(count or "", type="nominal")),
        head.encode(x=alt.value(-6), y=alt.value(-12)),
    ]
    return alt.LayerChart(layer=layers).properties(width=width, height=height)


def specification(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The chart's Vega-Lite JSON with the numbers drawn, whatever theme is switched on in this process."""
    import altair as alt

    with alt.theme.enable("none"):
        return chart.to_dict()


def save(chart: alt.TopLevelMixin, path: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write `path`.png and `path`.json ({**facts, "chart": Vega-Lite}); returns both paths.

    Each file appears whole or not at all, and neither where drawing fails; equal charts give equal bytes.
    `facts` says how to draw the picture again (command, run). Needs no network.
    """
    import altair as alt
    import vl_convert

    drawn, version = specification(chart), ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    picture = vl_convert.vegalite_to_png(drawn, vl_version=version, scale=PNG_SCALE, allowed_base_urls=[])
    # Not with_suffix: a name may hold a dot. The JSON goes first: facts that are no JSON leave no picture.
    png, numbers = (path.with_name(f"{path.name}.{kind}") for kind in ("png", "json"))
    save_json(numbers, {**facts, "chart": drawn})
    with atomic(png) as temporary:
        temporary.write_bytes(picture)
    return [png, numbers]
