"""Line charts as SVG text: colours by class, which the page's style sets; values under the pointer by CSS alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Literal

from nrt_fast.html_report.text import MINUS

WIDTH, HEIGHT = 400, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 26
MAX_POINTS = 300  # of a line
MAX_COLUMNS = 60  # that answer the pointer
NUM_TICKS = 4


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: in the legend.
        x, y: of its points; a y that is not finite, or not above 0 on a logarithmic scale, breaks the line.
        low, high: of a band around it; empty without one.
        faint: thin y behind the line, or empty.
        color, dash: numbers that the style knows.
        marks: draw the points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    faint: Sequence[float] = ()
    color: int = 0
    dash: int = 0
    marks: bool = False


@dataclass(frozen=True)
class Chart:
    """What one chart shows.

    Attributes:
        title, text: what is drawn, and how to read it.
        unit: of the vertical axis.
        scale: share: from 0 to 1, in per cent.
        shaded: (first, last) steps of an alarm.
    """

    title: str
    text: str
    unit: str
    lines: list[Line]
    scale: Literal["linear", "log", "share"] = "linear"
    shaded: list[tuple[float, float]] = field(default_factory=list)


def smooth(x: Sequence[float], y: Sequence[float], window: int, label: str, log: bool = False, **style) -> Line:
    """A line of moving means with a band of one standard deviation over the window; of logarithms on such a scale."""
    values = [math.log(v) if log and v > 0 else math.nan if log else v for v in y]
    parts = [[v for v in values[max(0, i - window + 1) : i + 1] if math.isfinite(v)] for i in range(len(values))]
    means = [fmean(part) if part else math.nan for part in parts]
    stds = [pstdev(part) if part else math.nan for part in parts]
    back = math.exp if log else float
    low, high = ([back(m + sign * s) for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
    return Line(label, *thinned(x, map(back, means), low, high, y), **style)


def thinned(*columns: Iterable[float]) -> list[list[float]]:
    """The same columns with at most MAX_POINTS rows, each the mean of its neighbours."""
    columns = [list(column) for column in columns]
    size = max(1, math.ceil(len(columns[0]) / MAX_POINTS))
    return [[fmean(column[i : i + size]) for i in range(0, len(column), size)] for column in columns]


def draw(chart: Chart, number: int) -> str:
    """The chart as a figure with its title, text and legend; ``number`` makes its ids its own."""
    log = chart.scale == "log"
    drawn = [v for line in chart.lines for part in (line.y, line.low, line.high, line.faint) for v in part]
    drawn = [v for v in drawn if math.isfinite(v) and (v > 0 or not log)]
    x_low, x_high = _span([v for line in chart.lines for v in line.x])
    y_low, y_high = _limits(drawn, chart.scale)
    scale = math.log if log else float
    low, high = scale(y_low), scale(y_high)

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        if not math.isfinite(y) or (log and y <= 0):
            return math.nan
        return TOP + (high - scale(y)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    body = [_axes(chart, at_x, at_y, (x_low, x_high), (y_low, y_high))]
    for first, last in chart.shaded:
        left, right = at_x(max(x_low, first - 0.5)), at_x(min(x_high, last + 0.5))
        body.append(f'<rect class="alarm" x="{left:.1f}" y="{TOP}" width="{max(1, right - left):.1f}"'
                    f' height="{HEIGHT - TOP - BOTTOM}"/>')  # fmt: skip
    body += [_band(line, at_x, at_y) for line in chart.lines if line.low]
    body += [_path(line, line.faint, "faint", at_x, at_y) for line in chart.lines if line.faint]
    body += [_path(line, line.y, "line", at_x, at_y) for line in chart.lines]
    body += [_marks(line, at_x, at_y) for line in chart.lines if line.marks]
    body += _columns(chart, at_x, at_y)
    title, text = escape(chart.title), escape(chart.text)
    return (
        f'<figure class="chart"><figcaption><h3 id="c{number}">{title}</h3><p id="d{number}">{text}</p>'
        f"{_legend(chart)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="c{number}" aria-describedby="d{number}">'
        f"{''.join(body)}</svg></figure>"
    )


def _span(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _limits(values: list[float], scale: str) -> tuple[float, float]:
    """Of the vertical axis, with a little air."""
    if scale == "share":
        return 0.0, 1.0
    if not values:
        return (1.0, 10.0) if scale == "log" else (0.0, 1.0)
    low, high = min(values), max(values)
    if scale == "log":
        return low / 1.3, high * 1.3
    if 0 < low < 0.5 * high:
        low = 0.0
    if high < 0 and high > 0.5 * low:
        high = 0.0
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    air = 0.05 * (high - low)
    return low - air * (low != 0), high + air * (high != 0)


def _axes(chart: Chart, at_x, at_y, x_limits: tuple[float, float], y_limits: tuple[float, float]) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<text class="unit" x="0" y="11">{escape(chart.unit)}</text>']
    for tick in log_ticks(*y_limits) if chart.scale == "log" else ticks(*y_limits):
        y, zero = at_y(tick), ' class="zero"' if tick == 0 else ""
        parts.append(f'<path{zero} d="M{LEFT} {y:.1f}H{right}"/><text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">'
                     f"{escape(told(tick, chart.scale))}</text>")  # fmt: skip
    for tick in ticks(*x_limits):
        parts.append(f'<text class="x" x="{at_x(tick):.1f}" y="{bottom + 15}">{tick:,g}</text>')
    parts.append(f'<text class="x end" x="{right}" y="{HEIGHT - 1}">step</text>')
    return f'<g class="axes">{"".join(parts)}</g>'


def ticks(low: float, high: float) -> list[float]:
    """Some round numbers from low to high."""
    raw = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, a few of them; with their double and fivefold where there are not enough."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // (NUM_TICKS + 1))
    factors = (1,) if high > 100 * low else (1, 2, 5)
    found = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in found if low <= tick <= high]


def told(value: float, scale: str = "linear") -> str:
    """A number, as short as can be."""
    if scale == "share":
        return f"{value:.0%}" if value in (0, 1) or abs(value) >= 0.1 else f"{value:.1%}"
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}".replace("-", MINUS)
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", MINUS)


def _runs(line: Line, values: Sequence[float], at_x, at_y) -> Iterable[list[str]]:
    """Unbroken pieces of a line, as "x y"."""
    piece: list[str] = []
    for x, y in zip(line.x, map(at_y, values), strict=True):
        if math.isfinite(y):
            piece.append(f"{at_x(x):.1f} {y:.1f}")
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _path(line: Line, values: Sequence[float], kind: str, at_x, at_y) -> str:
    d = "".join(f"M{'L'.join(piece)}" for piece in _runs(line, values, at_x, at_y))
    return f'<path class="{kind} s{line.color} d{line.dash}" d="{d}"/>'


def _band(line: Line, at_x, at_y) -> str:
    pieces = zip(_runs(line, line.high, at_x, at_y), _runs(line, line.low, at_x, at_y), strict=True)
    d = "".join(f"M{'L'.join([*high, *reversed(low)])}Z" for high, low in pieces)
    return f'<path class="band f{line.color}" d="{d}"/>'


def _marks(line: Line, at_x, at_y) -> str:
    dots = ((at_x(x), at_y(y)) for x, y in zip(line.x, line.y, strict=True))
    return "".join(f'<circle class="f{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>'
                   for x, y in dots if math.isfinite(y))  # fmt: skip


def _columns(chart: Chart, at_x, at_y) -> list[str]:
    """Strips that show their values while the pointer is on them, and say them in full after a moment."""
    steps = sorted({x for line in chart.lines for x in line.x})
    per_column = max(1, math.ceil(len(steps) / MAX_COLUMNS))
    steps = steps[per_column - 1 :: per_column] or steps[-1:]
    edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(steps)), math.inf]
    columns = []
    for step, (first, last) in zip(steps, pairwise(edges), strict=True):
        left, right = (LEFT if math.isinf(first) else at_x(first)), (WIDTH - RIGHT if math.isinf(last) else at_x(last))
        found = [(line, _nearest(line, step, first, last)) for line in chart.lines]
        found = [(line, i) for line, i in found if i is not None and math.isfinite(at_y(line.y[i]))]
        dots = "".join(f'<circle class="f{line.color}" cx="{at_x(line.x[i]):.1f}" cy="{at_y(line.y[i]):.1f}" r="3"/>'
                       for line, i in found)  # fmt: skip
        values = " ".join(f'<tspan class="f{line.color}">{told(line.y[i], chart.scale)}</tspan>' for line, i in found)
        title = "\n".join([f"step {step:,.0f}", *(_in_full(line, i, chart.scale) for line, i in found)])
        columns.append(
            f'<g class="at"><rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"/>'
            f'{dots}<text x="{WIDTH - RIGHT}" y="11">step {step:,.0f}: {values}</text>'
            f"<title>{escape(title)}</title></g>"
        )
    return columns


def _nearest(line: Line, step: float, first: float, last: float) -> int | None:
    """The point of a line that is nearest to a step, of those between two."""
    inside = [index for index, x in enumerate(line.x) if first < x <= last]
    return min(inside, key=lambda index: abs(line.x[index] - step), default=None)


def _in_full(line: Line, index: int, scale: str) -> str:
    band = f" ({told(line.low[index], scale)} to {told(line.high[index], scale)})" if line.low else ""
    return f"{line.label}: {told(line.y[index], scale)}{band}"


def _legend(chart: Chart) -> str:
    if len(chart.lines) < 2:
        return ""
    keys = "".join(
        f'<li><svg viewBox="0 0 22 8" aria-hidden="true"><path class="line s{line.color} d{line.dash}" d="M1 4H21"/>'
        f"</svg>{escape(line.label)}</li>"
        for line in chart.lines
    )
    return f'<ul class="legend">{keys}</ul>'
