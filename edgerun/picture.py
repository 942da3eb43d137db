"""A picture as one SVG, drawn from a report's Picture: the PNG with axes and ticks, and a legend of its colours."""

from __future__ import annotations

import html
import math

from edgerun.drawing import (
    LINE_HEIGHT,
    axis_text,
    colour_bar,
    line,
    open_svg,
    paragraph,
    shades,
    text,
    text_width,
    tick_text,
    ticks,
    title_lines,
    wrapped,
)
from edgerun.report import Axis, Picture, format_number

WIDTH = 1040  # user units: a picture takes a page's whole width
_MARGIN, _LEFT, _RIGHT, _TOP = 24, 84, 24, 26
_BAR_WIDTH, _LEAST_BAR_WIDTH, _BAR_HEIGHT = 190.0, 80.0, 10
_ENTRY_HEIGHT = 56  # of a line of the legend
_LEVELS = 64  # shades of a bar
_STYLE = """
.chart .frame{fill:none;stroke:var(--soft);stroke-width:1}
"""


def render(picture: Picture) -> str:
    """The picture as a standalone `<svg>` element with the PNG inside."""
    room = WIDTH - _MARGIN - _RIGHT
    title, note = title_lines(picture.title, room), wrapped(picture.note, room)
    legend_top = _TOP + LINE_HEIGHT * (len(title) - 1) + 24
    legend, legend_height = _legend(picture, legend_top)
    top, width = legend_top + legend_height + 12, float(WIDTH - _LEFT - _RIGHT)
    height = width * min(0.75, max(0.3, 2 * picture.rows / picture.columns))
    bottom = top + height
    total = bottom + 48 + LINE_HEIGHT * len(note)
    x_ticks, y_ticks = (ticks(axis, (), from_zero=False)[0] for axis in (picture.x, picture.y))
    middle = (top + bottom) / 2
    turned = f'transform="rotate(-90 {_MARGIN + 8} {middle:.1f})"'
    box = f'x="{_LEFT}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
    parts = [
        open_svg(WIDTH, total, f"{picture.title}. {picture.alt}", _STYLE),
        *paragraph(_MARGIN, _TOP, title, "title"),
        *legend,
        f'<image {box} preserveAspectRatio="none" href="data:image/png;base64,{html.escape(picture.png)}">',
        f"<title>{html.escape(picture.alt)}</title></image>",
        f'<rect class="frame" {box}/>',
    ]
    for tick in x_ticks:
        at = _LEFT + width * _share(picture.x, tick)
        parts += [line("axis", at, bottom, at, bottom + 5), text(at, bottom + 19, tick_text(tick), "soft", "middle")]
    for tick in y_ticks:
        at = top + height * _share(picture.y, tick)
        parts += [line("axis", _LEFT - 5, at, _LEFT, at), text(_LEFT - 9, at + 4, tick_text(tick), "soft", "end")]
    parts += [
        text(_LEFT + width / 2, bottom + 38, axis_text(picture.x.label, picture.x.unit), "", "middle"),
        text(_MARGIN + 8, middle, axis_text(picture.y.label, picture.y.unit), "", "middle", turned),
        *paragraph(_MARGIN, bottom + 60, note, "soft"),
    ]
    return "\n".join([*parts, "</svg>"])


def _share(axis: Axis, value: float) -> float:
    assert axis.low is not None and axis.high is not None  # a picture was refused without them
    return (value - axis.low) / (axis.high - axis.low)


def _legend(picture: Picture, top: float) -> tuple[list[str], float]:
    """A bar of every ramp on the picture's scale, each under its name, and how high they are."""
    scale = picture.scale
    assert scale.low is not None and scale.high is not None
    parts = [text(_MARGIN, top, f"{axis_text(scale.label, scale.unit)}, logarithmic", "soft")]
    x, y = float(_MARGIN), top + 23
    for ramp in picture.ramps:
        start = scale.low if ramp.start is None else ramp.start
        share = math.log(start / scale.low) / math.log(scale.high / scale.low)
        bar = max(_LEAST_BAR_WIDTH, _BAR_WIDTH * (1 - share))  # a decade is as long in all bars that have room
        width = max(bar, text_width(ramp.name))
        if x + width > WIDTH - _RIGHT and x > _MARGIN:
            x, y = float(_MARGIN), y + _ENTRY_HEIGHT
        parts += [
            text(x, y, ramp.name),
            *colour_bar(x, y + 8, bar, _BAR_HEIGHT, shades(ramp.colours, _LEVELS)),
            text(x, y + 34, format_number(start), "soft"),
            text(x + bar, y + 34, format_number(scale.high), "soft", "end"),
        ]
        x += width + 28
    return parts, y + 37 - top
