"""Drawing primitives and house style: Altair charts that fit a paper's column, saved as picture + JSON.

Knows no result types. Every primitive takes `rows`, a sequence of mappings, and the names of the fields to draw
(plain identifiers); None and NaN stand for a figure that does not exist and are never drawn as 0. Primitives
return bare charts that can be layered and concatenated; `style` comes last and adds title and theme.

A column is 3.3 inches, drawn at about 420 px: 12 px is 6.8 points in print. Colours: Okabe & Ito (2008) for
categories, viridis for amounts, blue-orange centred on 0 where the sign matters. Liberation Sans is shipped
inside vl-convert, so that a picture is the same on every machine.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp import InterpError
from interp.artifacts import atomic, save_json

if TYPE_CHECKING:
    import altair as alt

Rows = Sequence[Mapping[str, Any]]
Domain = tuple[float, float]

FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
#: Okabe & Ito's colours without yellow, which cannot be read on white.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, MUTED, FAINT = "#222222", "#555555", "#D9D9D9"
CATEGORIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
#: viridis from its dark end up to where a thin line is still seen on white.
SEQUENCE = ("#440154", "#482878", "#3E4A89", "#31688E", "#26828E", "#1F9E89", "#35B779", "#6DCD59")
TEXT, LINE_HEIGHT, PNG_SCALE = 12, 13, 3


@dataclass(frozen=True)
class Reference:
    """A horizontal line at `value`, in the figure's units, labelled directly; `dash` is (ink, gap) in px."""

    value: float
    label: str
    dash: tuple[int, int]


def style(chart: alt.TopLevelMixin, *, title: str, subtitle: str = "", columns: int = 66, offset: int = 8) -> Any:
    """The finished chart: title and subtitle (wrapped at `columns` characters) and the house's theme."""
    import altair as alt

    heading = alt.TitleParams(
        text=textwrap.wrap(title, columns - 10) or [""],
        subtitle=textwrap.wrap(subtitle, columns),
        anchor="start",
        frame="bounds",
        offset=offset,
    )
    sizes = {"labelFontSize": TEXT, "titleFontSize": TEXT, "titleFontWeight": "normal", "labelColor": INK, "titleColor": INK}
    named: Any = chart
    return named.properties(title=heading, background="white", padding=6).configure(
        font=FONT,
        view={"stroke": None},
        axis={**sizes, "grid": False, "domainColor": MUTED, "tickColor": MUTED, "titlePadding": 6},
        legend=sizes,
        title={"fontSize": 13, "subtitleFontSize": TEXT, "subtitleColor": MUTED, "subtitlePadding": 4, "color": INK},
    )


def table(rows: Rows) -> alt.Data:
    """`rows` as chart data: numpy values made plain, NaN and infinities None."""
    import altair as alt

    return alt.Data(values=[{name: _plain(value) for name, value in row.items()} for row in rows])


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with(rows: Rows, *fields: str) -> list[Mapping[str, Any]]:
    """The rows in which all these fields exist."""
    return [row for row in rows if all(_plain(row.get(field)) is not None for field in fields)]


def distinct(rows: Rows, field: str) -> list[Any]:
    """Values of a field in order of appearance."""
    return list(dict.fromkeys(_plain(row[field]) for row in rows))


def nice_domain(values: Collection[float | None], *, step: float, include: Collection[float] = ()) -> Domain:
    """The smallest range of whole steps that holds `include` and all values that exist."""
    known = [v for v in (*values, *include) if v is not None and math.isfinite(v)] or [0.0]
    # A value that lies on a step must not open another one because of rounding.
    low, high = math.floor(min(known) / step + 1e-9), math.ceil(max(known) / step - 1e-9)
    return round(low * step, 10), round(max(high, low + 1) * step, 10)


def palette(count: int, *, sequential: bool = False) -> list[str]:
    """`count` colours; in the order of viridis where `sequential`, or where there are more than categories."""
    if count <= len(CATEGORIES) and not sequential:
        return list(CATEGORIES[:count])
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in SEQUENCE])
    at = np.linspace(0, len(stops) - 1, count)
    mixed = np.column_stack([np.interp(at, np.arange(len(stops)), channel) for channel in stops.T])
    return ["#{:02X}{:02X}{:02X}".format(*map(round, colour)) for colour in mixed.tolist()]


def dodge(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
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
    x: str,
    y: str,
    value: str,
    x_title: str,
    y_title: str,
    value_title: str,
    domain: Domain,
    x_ticks: Sequence[Any] | None = None,
    diverging: bool = False,
    marked: tuple[Any, Any] | None = None,
    marked_label: str = "",
    width: int = 280,
    row_height: int = 15,
) -> alt.LayerChart:
    """Cells of fields x and y (in order of appearance) coloured by `value` over `domain`; missing ones are grey.

    `marked` (x, y) is outlined, and `marked_label` stands above its column. `diverging` needs a domain
    symmetric about 0 (InterpError otherwise), so that white means 0.
    """
    import altair as alt

    if diverging and not math.isclose(domain[0], -domain[1]):
        raise InterpError(f"heatmap: found diverging colours over {domain}, expected a domain symmetric about 0")
    columns, lines = distinct(rows, x), distinct(rows, y)
    width, height = min(width, max(90, 40 * len(columns))), max(90, row_height * len(lines))
    across = alt.X(x, type="ordinal", title=x_title).scale(domain=columns, padding=0)
    across = across.axis(values=columns if x_ticks is None else list(x_ticks), labelAngle=0, domain=False)
    down = alt.Y(y, type="ordinal", title=y_title).scale(domain=lines, padding=0).axis(domain=False)
    scheme = alt.SchemeParams(name="blueorange" if diverging else "viridis")
    colour = alt.Color(value, type="quantitative", title=value_title).scale(domain=domain, scheme=scheme)
    colour = colour.legend(gradientLength=height, gradientThickness=12, tickCount=6, titleLimit=height)
    known = _with(rows, value)
    layers = [
        alt.Chart(table([row for row in rows if row not in known])).mark_rect(color=FAINT).encode(x=across, y=down),
        alt.Chart(table(known)).mark_rect().encode(x=across, y=down, color=colour),
    ]
    if marked is not None:
        cell = alt.Chart(table([{x: marked[0], y: marked[1], "label": marked_label}])).encode(x=across, y=down)
        layers += _mark(cell, columns.index(marked[0]) / max(1, len(columns) - 1))
    return alt.layer(*layers).properties(width=width, height=height)


def _mark(cell: alt.Chart, place: float) -> list[alt.Chart]:
    """An outline of white inside black, seen on any colour, and a label turned towards the figure's middle."""
    import altair as alt

    align = "left" if place < 0.3 else "right" if place > 0.7 else "center"
    label = cell.mark_text(align=align, baseline="bottom", fontSize=TEXT, color=INK)
    return [
        cell.mark_rect(fillOpacity=0, stroke="black", strokeWidth=3.5),
        cell.mark_rect(fillOpacity=0, stroke="white", strokeWidth=1.5),
        label.encode(y=alt.value(-5), text="label:N"),
    ]


def lines_with_bands(
    rows: Rows,
    *,
    x: str,
    y: str,
    low: str,
    high: str,
    series: str,
    x_title: str,
    y_title: str,
    y_domain: Domain,
    references: Sequence[Reference] = (),
    labelled: Collection[str] | None = None,
    sequential: bool = False,
    title: str = "",
    width: int = 280,
    height: int = 130,
) -> alt.LayerChart:
    """A line of y over x for each series with its band from low to high, and horizontal references.

    Series (`labelled`: only these) and references are named at the right edge, where labels make room for one
    another. `sequential`: the series are ordered, and so are their colours. A line breaks where y is missing;
    a point without neighbours is a dot.
    """
    import altair as alt

    names, xs = distinct(rows, series), [row[x] for row in rows]
    across = alt.X(x, type="quantitative", title=x_title).scale(domain=(min(xs), max(xs)), nice=False)
    across = across.axis(format="d", tickMinStep=1)
    up = alt.Y(y, type="quantitative", title=y_title).scale(domain=y_domain, nice=False).axis(tickCount=5)
    hue = alt.Color(series, type="nominal", legend=None)
    hue = hue.scale(domain=names, range=palette(len(names), sequential=sequential))
    base = alt.Chart(table(rows)).encode(x=across, y=up, color=hue)
    band = alt.Chart(table(_with(rows, low, high))).encode(
        x=across, y=alt.Y(low, type="quantitative").title(y_title), y2=high, color=hue
    )
    dots = alt.Chart(table(_lone(rows, x, y, series))).mark_point(filled=True, size=24, opacity=1)
    ends = {name: _with([row for row in rows if row[series] == name], y) for name in names}
    lines = [(name, found[-1][y]) for name, found in ends.items() if found and (labelled is None or name in labelled)]
    gap = LINE_HEIGHT * (y_domain[1] - y_domain[0]) / height
    places = dodge([v for _, v in lines] + [r.value for r in references], gap, *y_domain)
    named = [{series: name, "end": end, "place": p} for (name, end), p in zip(lines, places, strict=False)]
    ruled = [{"label": r.label, "end": r.value, "place": p} for r, p in zip(references, places[len(lines) :], strict=True)]
    return alt.layer(
        band.mark_area(opacity=0.15, line=False),
        *[alt.Chart(table([{"end": r.value}])).mark_rule(strokeDash=r.dash, color=INK).encode(y="end:Q") for r in references],
        base.mark_line(strokeWidth=1.6),
        dots.encode(x=across, y=up, color=hue),
        *_edge_labels(named, series, width, color=hue),
        *_edge_labels(ruled, "label", width, color=alt.value(INK)),
    ).properties(width=width, height=height, title=alt.TitleParams(title, anchor="start", fontSize=TEXT, offset=4))


def _lone(rows: Rows, x: str, y: str, series: str) -> list[Mapping[str, Any]]:
    """Points that a line does not show: both neighbours in their series are missing."""
    found: list[Mapping[str, Any]] = []
    for name in distinct(rows, series):
        line = sorted((row for row in rows if row[series] == name), key=lambda row: row[x])
        known = [False, *(bool(_with([row], y)) for row in line), False]
        found += [row for i, row in enumerate(line) if known[i + 1] and not (known[i] or known[i + 2])]
    return found


def _edge_labels(labels: Rows, text: str, width: int, *, color: Any) -> list[alt.Chart]:
    """Labels right of the panel at `place`, each with a leader from `end` on the panel's edge."""
    import altair as alt

    base = alt.Chart(table(labels)).encode(color=color)
    leader = base.mark_rule(strokeWidth=0.8, opacity=0.7).encode(x=alt.value(width + 1), x2=alt.value(width + 9))
    label = base.mark_text(align="left", baseline="middle", fontSize=TEXT)
    return [
        leader.encode(y="end:Q", y2="place:Q"),
        label.encode(x=alt.value(width + 11), y="place:Q", text=alt.Text(text, type="nominal")),
    ]


def scatter(
    rows: Rows,
    *,
    x: str,
    y: str,
    x_title: str,
    y_title: str,
    x_domain: Domain,
    y_domain: Domain,
    identity: bool = False,
    width: int = 350,
    height: int = 320,
) -> alt.LayerChart:
    """Transparent points of y against x, and the line of identity as far as both domains hold it."""
    import altair as alt

    across = alt.X(x, type="quantitative", title=x_title).scale(domain=x_domain, nice=False)
    up = alt.Y(y, type="quantitative", title=y_title).scale(domain=y_domain, nice=False)
    points = alt.Chart(table(_with(rows, x, y))).mark_point(filled=True, size=22, opacity=0.35, color=BLUE)
    drawn = [_identity(x_domain, y_domain, x, y)] if identity else []
    return alt.layer(*drawn, points.encode(x=across, y=up)).properties(width=width, height=height)


def _identity(x_domain: Domain, y_domain: Domain, x: str, y: str) -> alt.Chart:
    import altair as alt

    ends = [max(x_domain[0], y_domain[0]), min(x_domain[1], y_domain[1])]
    line = alt.Chart(table([{x: end, y: end} for end in ends])).mark_line(strokeDash=(5, 4), strokeWidth=1, color=MUTED)
    return line.encode(x=alt.X(x, type="quantitative"), y=alt.Y(y, type="quantitative"))


def intervals(
    rows: Rows,
    *,
    value: str,
    low: str,
    high: str,
    label: str,
    x_title: str,
    domain: Domain,
    colour: str | None = None,
    reference: float | None = None,
    labels: bool = True,
    title: str = "",
    width: int = 150,
    row_height: int = 19,
) -> alt.LayerChart:
    """A dot at `value` and a whisker from low to high for each label, from the top in order of appearance.

    A label without a value keeps its empty row; `colour` names a field of hex colours; `reference` is a
    vertical dashed line; `labels=False` leaves the names to the panel on the left.
    """
    import altair as alt

    names = distinct(rows, label)
    down = alt.Y(label, type="nominal", title=None).scale(domain=names).axis(
        labels=labels, ticks=False, domain=False, grid=True, gridColor="#EEEEEE", labelLimit=220, labelPadding=6
    )
    across = alt.X(value, type="quantitative", title=x_title).scale(domain=domain, nice=False).axis(tickCount=5)
    hue = alt.value(BLUE) if colour is None else alt.Color(colour, type="nominal", scale=None)
    ends = alt.Chart(table(_with(rows, low, high))).mark_rule(strokeWidth=1.6)
    dots = alt.Chart(table(_with(rows, value))).mark_point(filled=True, size=55, opacity=1)
    rule = alt.Chart(table([] if reference is None else [{"at": reference}])).mark_rule(strokeDash=(4, 3), color=MUTED)
    return alt.layer(
        rule.encode(x="at:Q"),
        ends.encode(y=down, x=alt.X(low, type="quantitative", title=x_title), x2=high, color=hue),
        dots.encode(y=down, x=across, color=hue),
    ).properties(
        width=width,
        height=row_height * len(names),
        title=alt.TitleParams(title, anchor="start", frame="group", fontSize=TEXT, offset=4),
    )


def binned_means(
    rows: Rows,
    *,
    x: str,
    mean: str,
    low: str,
    high: str,
    count: str,
    x_title: str,
    y_title: str,
    x_domain: Domain,
    y_domain: Domain,
    identity: bool = False,
    width: int = 350,
    height: int = 280,
) -> alt.LayerChart:
    """The mean of each bin with its interval, and above the panel how many rows it rests on."""
    import altair as alt

    known = _with(rows, mean)
    across = alt.X(x, type="quantitative", title=x_title).scale(domain=x_domain, nice=False)
    across = across.axis(values=distinct(rows, x), format="~g")
    up = alt.Y(mean, type="quantitative", title=y_title).scale(domain=y_domain, nice=False)
    whiskers = alt.Chart(table(_with(rows, low, high))).mark_rule(strokeWidth=1.6, color=BLUE)
    points = alt.Chart(table(known)).encode(x=across, y=up)
    counts = alt.Chart(table([{x: x_domain[0], "n": "n ="}, *({x: row[x], "n": f"{row[count]}"} for row in rows)]))
    return alt.layer(
        *([_identity(x_domain, y_domain, x, mean)] if identity else []),
        points.mark_line(color=BLUE, strokeWidth=1, opacity=0.5),
        whiskers.encode(x=across, y=alt.Y(low, type="quantitative", title=y_title), y2=high),
        points.mark_point(filled=True, size=60, opacity=1, color=BLUE),
        counts.mark_text(baseline="bottom", fontSize=TEXT - 1, color=MUTED).encode(x=across, y=alt.value(-3), text="n:N"),
    ).properties(width=width, height=height)


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

    picture = io.BytesIO()
    drawn: Any = chart
    with alt.theme.enable("none"):
        drawn.save(picture, format="png", scale_factor=PNG_SCALE)
    # Not with_suffix: a name may hold a dot.
    png, facts_path = (path.with_name(f"{path.name}.{kind}") for kind in ("png", "json"))
    with atomic(png) as temporary:
        temporary.write_bytes(picture.getvalue())
    return [png, save_json(facts_path, {**facts, "chart": specification(chart)})]
