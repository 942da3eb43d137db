"""A line chart as one SVG, drawn from a report's Plot: axes with units, grid, legend, error bars, light and dark.

Our own because it is all the drawing that reports need: no plotting package, fonts or scripts come along.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Iterable, Sequence

from edgerun.report import Axis, Plot, Series, format_number

WIDTH, HEIGHT = 580, 390  # user units; the SVG scales to the width it is given
_LEFT, _RIGHT, _BOTTOM = 68, 24, 62
_TITLE, _LEGEND_LINE = 44, 22
_DODGE = 3.0  # between the error bars of lines that share an x
_TEXT_WIDTH = 6.6  # mean advance of a 12.5-unit sans-serif letter

STYLE = """
.chart{font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;--ink:#1f2328;--soft:#57606a;
--grid:#e3e6ea;--paper:#fff;--c0:#1f6feb;--c1:#d1570b;--c2:#1a7f37;--c3:#a5359a;--c4:#6e7781;--c5:#9a6700}
@media (prefers-color-scheme:dark){.chart{--ink:#e6edf3;--soft:#9aa4af;--grid:#30363d;--paper:#0d1117;--c0:#58a6ff;
--c1:#f0883e;--c2:#56d364;--c3:#e29ad6;--c4:#9aa4af;--c5:#d8b04a}}
.chart text{fill:var(--ink)}.chart .soft{fill:var(--soft)}.chart .title{font-size:15px;font-weight:600}
.chart .grid{stroke:var(--grid);stroke-width:1}.chart .axis{stroke:var(--soft);stroke-width:1}
.chart .line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.chart .bar{stroke-width:1.4;opacity:.75}
.chart .mark{stroke:var(--paper);stroke-width:1.2}
"""


@dataclasses.dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (self._move(value) - self._move(self.low)) / (self._move(self.high) - self._move(self.low))
        return self.start + share * (self.end - self.start)

    def _move(self, value: float) -> float:
        return math.log2(value) if self.log else value


def names_of(plots: Iterable[Plot]) -> tuple[str, ...]:
    """The names of all series, each once, in the order in which they come."""
    return tuple(dict.fromkeys(series.name for plot in plots for series in plot.series))


def render(plot: Plot, names: Sequence[str] = ()) -> str:
    """The plot as a standalone `<svg>` element that may stand in a page or in a file of its own.

    names: of the series of all plots that are seen together, so that a name has one colour in all of them.
    Raises ValueError when there is no point, or a log axis meets a value that is not above 0.
    """
    order = list(dict.fromkeys((*names, *names_of([plot]))))
    looks = [order.index(series.name) for series in plot.series]
    entries, legend_lines = _legend(plot.series, looks)
    top = _TITLE + _LEGEND_LINE * legend_lines + 6
    xs = [x for series in plot.series for x, _ in series.points]
    ys = [v for series in plot.series for _, y in series.points for v in (y.value, y.low, y.high) if v is not None]
    if not xs:
        raise ValueError(f"plot {plot.title!r} has no point: leave it out")
    x_ticks, x_low, x_high = _ticks(plot.x, xs, from_zero=False)
    y_ticks, y_low, y_high = _ticks(plot.y, ys, from_zero=True)
    x_scale = _Scale(x_low, x_high, plot.x.log, _LEFT, WIDTH - _RIGHT)
    y_scale = _Scale(y_low, y_high, plot.y.log, HEIGHT - _BOTTOM, top)
    parts = [
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(plot.title)}"><style>{STYLE}</style>',
        _text(_LEFT - 44, 24, plot.title, "title"),
        *entries,
        *_axes(plot, x_scale, y_scale, x_ticks, y_ticks),
    ]
    has_bars = any(y.low is not None for series in plot.series for _, y in series.points)
    for index, series in enumerate(plot.series):
        shift = _DODGE * (index - (len(plot.series) - 1) / 2) if has_bars else 0.0
        parts += _series(series, looks[index], shift, x_scale, y_scale)
    if plot.note:
        parts.append(_text(_LEFT - 44, HEIGHT - 8, plot.note, "soft"))
    return "\n".join([*parts, "</svg>"])


def _axes(plot: Plot, x_scale: _Scale, y_scale: _Scale, x_ticks: list[float], y_ticks: list[float]) -> list[str]:
    parts = []
    for tick in y_ticks:
        y = y_scale(tick)
        parts.append(_line("grid", x_scale.start, y, x_scale.end, y))
        parts.append(_text(x_scale.start - 8, y + 4, _tick_text(tick), "soft", "end"))
    for tick in x_ticks:
        x = x_scale(tick)
        parts.append(_line("grid", x, y_scale.start, x, y_scale.end))
        parts.append(_text(x, y_scale.start + 18, _tick_text(tick), "soft", "middle"))
    parts.append(_line("axis", x_scale.start, y_scale.start, x_scale.end, y_scale.start))
    parts.append(_line("axis", x_scale.start, y_scale.start, x_scale.start, y_scale.end))
    parts.append(_text((x_scale.start + x_scale.end) / 2, y_scale.start + 37, _axis_text(plot.x), "", "middle"))
    middle = (y_scale.start + y_scale.end) / 2
    turned = f'transform="rotate(-90 {_LEFT - 50} {middle:.1f})"'
    parts.append(_text(_LEFT - 50, middle, _axis_text(plot.y), "", "middle", turned))
    return parts


def _series(series: Series, look: int, shift: float, x_scale: _Scale, y_scale: _Scale) -> list[str]:
    colour = f"var(--c{look % 6})"
    path = " ".join(f"{x_scale(x) + shift:.1f},{y_scale(y.value):.1f}" for x, y in series.points)
    dash = ' stroke-dasharray="6 5"' if series.dashed else ""
    parts = [f'<polyline class="line" style="stroke:{colour}"{dash} points="{path}"/>']
    for x, y in series.points:
        px, py = x_scale(x) + shift, y_scale(y.value)
        if y.low is not None and y.high is not None:
            low, high = y_scale(y.low), y_scale(y.high)
            style = f'class="bar" style="stroke:{colour}"'
            parts.append(
                f'<path {style} d="M{px:.1f} {low:.1f}V{high:.1f}M{px - 4:.1f} {low:.1f}h8M{px - 4:.1f} {high:.1f}h8"/>'
            )
        count = f", n = {y.n}" if y.n is not None else ""
        title = html.escape(f"{series.name}: {format_number(x)} → {format_number(y.value)}{count}")
        parts.append(f'<g class="mark" style="fill:{colour}"><title>{title}</title>{_MARKS[look % 4](px, py)}</g>')
    return parts


def _legend(series: tuple[Series, ...], looks: list[int]) -> tuple[list[str], int]:
    """Legend entries, wrapped into lines, and how many lines they take."""
    parts = []
    x, line = float(_LEFT - 44), 0
    for entry, look in zip(series, looks, strict=True):
        name = entry.name + _counts(entry)
        width = 46 + len(name) * _TEXT_WIDTH
        if x + width > WIDTH - _RIGHT and x > _LEFT:
            x, line = float(_LEFT - 44), line + 1
        y = _TITLE + line * _LEGEND_LINE
        colour = f"var(--c{look % 6})"
        dash = ' stroke-dasharray="6 5"' if entry.dashed else ""
        parts.append(f'<path class="line" style="stroke:{colour}"{dash} d="M{x:.1f} {y}h22"/>')
        parts.append(f'<g class="mark" style="fill:{colour}">{_MARKS[look % 4](x + 11, y)}</g>')
        parts.append(_text(x + 29, y + 4, name))
        x += width
    return parts, line + 1


def _counts(series: Series) -> str:
    counts = {y.n for _, y in series.points if y.n is not None}
    if not counts:
        return ""
    return f" (n = {min(counts)})" if len(counts) == 1 else f" (n = {min(counts)}–{max(counts)})"


def _ticks(axis: Axis, values: list[float], *, from_zero: bool) -> tuple[list[float], float, float]:
    """Tick positions and the range they span: powers of two on a log axis, else about five round steps."""
    low = axis.low if axis.low is not None else min(values)
    high = axis.high if axis.high is not None else max(values)
    if axis.log:
        if low <= 0:
            raise ValueError(f"a log axis cannot show {low}: give positive values")
        first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
        last = max(last, first + 1)
        every = max(1, math.ceil((last - first) / 8))
        return [2.0**power for power in range(first, last + 1, every)], 2.0**first, 2.0**last
    if from_zero and axis.low is None:
        low = min(low, 0.0)
    if high <= low:
        high = low + 1.0
    raw = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * magnitude >= raw * 0.999)
    first = math.floor(low / step + 1e-9) if axis.low is None else math.ceil(low / step - 1e-9)
    last = math.ceil(high / step - 1e-9) if axis.high is None else math.floor(high / step + 1e-9)
    ticks = [step * i for i in range(first, last + 1)]
    return ticks, min(low, ticks[0]), max(high, ticks[-1])


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == round(value) else f"{value:.3g}"


def _axis_text(axis: Axis) -> str:
    return f"{axis.label} ({axis.unit})" if axis.unit else axis.label


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _text(x: float, y: float, value: str, kind: str = "", anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}" {extra}>{html.escape(value)}</text>'


def _circle(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6"/>'


def _square(x: float, y: float) -> str:
    return f'<rect x="{x - 4.2:.1f}" y="{y - 4.2:.1f}" width="8.4" height="8.4"/>'


def _triangle(x: float, y: float) -> str:
    return f'<path d="M{x:.1f} {y - 5.4:.1f}l5.2 9.4h-10.4z"/>'


def _diamond(x: float, y: float) -> str:
    return f'<path d="M{x:.1f} {y - 5.8:.1f}l5.8 5.8l-5.8 5.8l-5.8 -5.8z"/>'


_MARKS: tuple[Callable[[float, float], str], ...] = (_circle, _square, _triangle, _diamond)
