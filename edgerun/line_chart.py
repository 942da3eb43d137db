"""A line chart as one SVG, drawn from a report's Plot: axes with units, grid, legend, error bars, light and dark.

A series is told by its colour and by its mark, so that nine of them can be told apart without colour too.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Iterable, Sequence

from edgerun.drawing import (
    LINE_HEIGHT,
    axis_text,
    line,
    open_svg,
    paragraph,
    text,
    text_width,
    tick_text,
    ticks,
    title_lines,
    wrapped,
)
from edgerun.report import Estimate, Plot, Series, format_number

WIDTH, HEIGHT = 580, 390  # user units; the SVG scales to the width it is given, and is higher for a long legend
_LEFT, _RIGHT, _BOTTOM, _MARGIN = 68, 24, 66, 24
_TITLE, _LEGEND_LINE = 44, 22
_FREE_LEGEND_LINES = 2  # that fit into HEIGHT; what more are needed make the chart higher
_DODGE = 3.0  # least distance between error bars of lines that share an x

_STYLE = """
.chart{--c0:#1f6feb;--c1:#d1570b;--c2:#1a7f37;--c3:#a5359a;--c4:#6e7781;--c5:#009aa6;--c6:#26247b;--c7:#8b1a2b;--c8:#a673d6}
@media (prefers-color-scheme:dark){.chart{--c0:#58a6ff;--c1:#f0883e;--c2:#56d364;--c3:#e29ad6;--c4:#9aa4af;--c5:#8ff0ea;
--c6:#4a6fe3;--c7:#d6455d;--c8:#f6e58d}}
.chart .line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.chart .bar{stroke-width:1.4;opacity:.75}
.chart .mark{stroke:var(--paper);stroke-width:1.2}
"""
_COLOURS = 9


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

    names: of the series of all plots that are seen together, so that a name has one colour and mark in all of them.
    Raises ValueError when there is no point, or a log axis meets a value that is not above 0.
    """
    xs = [x for series in plot.series for x, _ in series.points]
    ys = [v for series in plot.series for _, y in series.points for v in (y.value, y.low, y.high) if v is not None]
    if not xs:
        raise ValueError(f"plot {plot.title!r} has no point: leave it out")
    order = list(dict.fromkeys((*names, *names_of([plot]))))
    looks = [order.index(series.name) for series in plot.series]
    room = WIDTH - _MARGIN - _RIGHT
    title, note = title_lines(plot.title, room), wrapped(plot.note, room)
    above = LINE_HEIGHT * (len(title) - 1)
    entries, legend_lines = _legend(plot.series, looks, _TITLE + above)
    more_notes = LINE_HEIGHT * max(0, len(note) - 1)
    height = HEIGHT + above + _LEGEND_LINE * max(0, legend_lines - _FREE_LEGEND_LINES) + more_notes
    x_ticks, x_low, x_high = ticks(plot.x, xs, from_zero=False)
    y_ticks, y_low, y_high = ticks(plot.y, ys, from_zero=True)
    x_scale = _Scale(x_low, x_high, plot.x.log, _LEFT, WIDTH - _RIGHT)
    top = _TITLE + above + _LEGEND_LINE * legend_lines + 6
    y_scale = _Scale(y_low, y_high, plot.y.log, height - _BOTTOM - more_notes, top)
    parts = [
        open_svg(WIDTH, height, plot.title, _STYLE),
        *paragraph(_MARGIN, 24, title, "title"),
        *entries,
        *_axes(plot, x_scale, y_scale, x_ticks, y_ticks),
    ]
    for series, look, positions in zip(plot.series, looks, _dodged(plot.series, x_scale), strict=True):
        parts += _series(series, look, positions, y_scale)
    parts += paragraph(_MARGIN, height - 8 - more_notes, note, "soft")
    return "\n".join([*parts, "</svg>"])


def _axes(plot: Plot, x_scale: _Scale, y_scale: _Scale, x_ticks: list[float], y_ticks: list[float]) -> list[str]:
    parts = []
    for tick in y_ticks:
        y = y_scale(tick)
        parts.append(line("grid", x_scale.start, y, x_scale.end, y))
        parts.append(text(x_scale.start - 8, y + 4, tick_text(tick), "soft", "end"))
    for tick in x_ticks:
        x = x_scale(tick)
        parts.append(line("grid", x, y_scale.start, x, y_scale.end))
        parts.append(text(x, y_scale.start + 18, tick_text(tick), "soft", "middle"))
    parts.append(line("axis", x_scale.start, y_scale.start, x_scale.end, y_scale.start))
    parts.append(line("axis", x_scale.start, y_scale.start, x_scale.start, y_scale.end))
    label = axis_text(plot.x.label, plot.x.unit)
    parts.append(text((x_scale.start + x_scale.end) / 2, y_scale.start + 37, label, "", "middle"))
    middle = (y_scale.start + y_scale.end) / 2
    turned = f'transform="rotate(-90 {_LEFT - 50} {middle:.1f})"'
    parts.append(text(_LEFT - 50, middle, axis_text(plot.y.label, plot.y.unit), "", "middle", turned))
    return parts


def _dodged(series: Sequence[Series], x_scale: _Scale) -> list[list[float]]:
    """Where each point is drawn. Points with error bars move as little as gives every bar _DODGE to the next.

    Pool adjacent violators: bars that would be too close form a block, which stays where its points are in the mean.
    """
    drawn = [[x_scale(x) for x, _ in entry.points] for entry in series]
    bars = sorted((drawn[i][j], i, j) for i, s in enumerate(series) for j, (_, y) in enumerate(s.points) if _has_bar(y))
    blocks: list[tuple[float, int]] = []  # where the block's first bar would stand if the bars had no width; its bars
    for rank, (x, _, _) in enumerate(bars):
        mean, count = x - rank * _DODGE, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        blocks.append((mean, count))
    starts = [mean for mean, count in blocks for _ in range(count)]
    for rank, ((_, i, j), start) in enumerate(zip(bars, starts, strict=True)):
        drawn[i][j] = start + rank * _DODGE
    return drawn


def _has_bar(estimate: Estimate) -> bool:
    return estimate.low is not None and estimate.high is not None


def _series(series: Series, look: int, positions: Sequence[float], y_scale: _Scale) -> list[str]:
    colour = _colour(look)
    heights = [y_scale(y.value) for _, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(positions, heights, strict=True))
    dash = ' stroke-dasharray="6 5"' if series.dashed else ""
    parts = [f'<polyline class="line" style="stroke:{colour}"{dash} points="{path}"/>']
    for (x, y), px, py in zip(series.points, positions, heights, strict=True):
        if y.low is not None and y.high is not None:
            low, high = y_scale(y.low), y_scale(y.high)
            style = f'class="bar" style="stroke:{colour}"'
            parts.append(
                f'<path {style} d="M{px:.1f} {low:.1f}V{high:.1f}M{px - 4:.1f} {low:.1f}h8M{px - 4:.1f} {high:.1f}h8"/>'
            )
        count = f", n = {y.n}" if y.n is not None else ""
        title = html.escape(f"{series.name}: {format_number(x)} → {format_number(y.value)}{count}")
        parts.append(f'<g class="mark" style="fill:{colour}"><title>{title}</title>{_mark(look, px, py)}</g>')
    return parts


def _legend(series: tuple[Series, ...], looks: list[int], top: float) -> tuple[list[str], int]:
    """Legend entries, wrapped into lines, and how many lines they take."""
    parts = []
    x, row = float(_MARGIN), 0
    for entry, look in zip(series, looks, strict=True):
        name = entry.name + _counts(entry)
        width = 29 + text_width(name)
        if x + width > WIDTH - _RIGHT and x > _MARGIN:
            x, row = float(_MARGIN), row + 1
        y = top + row * _LEGEND_LINE
        dash = ' stroke-dasharray="6 5"' if entry.dashed else ""
        parts.append(f'<path class="line" style="stroke:{_colour(look)}"{dash} d="M{x:.1f} {y}h22"/>')
        parts.append(f'<g class="mark" style="fill:{_colour(look)}">{_mark(look, x + 11, y)}</g>')
        parts.append(text(x + 29, y + 4, name))
        x += width + 16
    return parts, row + 1


def _counts(series: Series) -> str:
    counts = {y.n for _, y in series.points if y.n is not None}
    if not counts:
        return ""
    return f" (n = {min(counts)})" if len(counts) == 1 else f" (n = {min(counts)}–{max(counts)})"


def _colour(look: int) -> str:
    return f"var(--c{look % _COLOURS})"


def _mark(look: int, x: float, y: float) -> str:
    return _MARKS[look % len(_MARKS)](x, y)


def _circle(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6"/>'


def _square(x: float, y: float) -> str:
    return f'<rect x="{x - 4.2:.1f}" y="{y - 4.2:.1f}" width="8.4" height="8.4"/>'


def _outline(steps: str, dx: float, dy: float) -> Callable[[float, float], str]:
    """A closed outline that begins at (dx, dy) from the point."""
    return lambda x, y: f'<path d="M{x + dx:.1f} {y + dy:.1f}{steps}z"/>'


def _star(x: float, y: float) -> str:
    corners = ((6.4 if i % 2 == 0 else 2.7, math.pi * (i / 5 - 0.5)) for i in range(10))
    points = " ".join(f"{x + r * math.cos(angle):.1f},{y + r * math.sin(angle):.1f}" for r, angle in corners)
    return f'<polygon points="{points}"/>'


# Ten, with nine colours: ninety looks before one comes again.
_MARKS: tuple[Callable[[float, float], str], ...] = (
    _circle,
    _square,
    _outline("l5.2 9.4h-10.4", 0, -5.4),  # triangle
    _outline("l5.8 5.8l-5.8 5.8l-5.8 -5.8", 0, -5.8),  # diamond
    _outline("l5.2 -9.4h-10.4", 0, 5.4),  # triangle on its tip
    _outline("h3.6v3.8h3.8v3.6h-3.8v3.8h-3.6v-3.8h-3.8v-3.6h3.8", -1.8, -5.6),  # cross
    _star,
    _outline("l2.6 -2.6l3 3l3 -3l2.6 2.6l-3 3l3 3l-2.6 2.6l-3 -3l-3 3l-2.6 -2.6l3 -3", -5.6, -3),  # saltire
    _outline("h5.6v10h-5.6", -2.8, -5),  # upright bar
    _outline("h10v5.6h-10", -5, -2.8),  # lying bar
)
