"""A heat map as one SVG, drawn from a report's HeatMap: coloured cells with their numbers, ticks, the colour scale.

The colours are viridis (van der Walt and Smith, 2015) without its darkest end: their order is seen in print and with
any colour vision, and every cell stands out from a light and from a dark page. What was not measured is grey and
crossed out.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from edgerun.drawing import (
    LETTER,
    LINE_HEIGHT,
    axis_text,
    blend,
    colour_bar,
    open_svg,
    paragraph,
    shades,
    text,
    text_width,
    title_lines,
    wrapped,
)
from edgerun.report import HeatMap, format_number, heat_map_digits

WIDTH = 580  # user units, as a line chart's: both stand side by side
_MARGIN, _RIGHT, _TOP = 24, 24, 24
_LEGEND_WIDTH, _LEGEND_HEIGHT = 150, 10
_GAP = 1.5  # between cells
_SMALLEST = 8.5  # font size below which no number is printed
_MOST_NUMBERS = 24  # columns or rows above which no number is printed
_TURN = 40  # degrees by which column ticks turn where they would touch
_DARK, _LIGHT = "#10151b", "#ffffff"
_STOPS = ("#46307e", "#3d4d8a", "#30698e", "#25848e", "#1f9e89", "#44bf70", "#85d54a", "#c8e020", "#fde725")
_STYLE = """
.chart .cell{font-size:var(--size);dominant-baseline:central}.chart .dark{fill:#10151b}.chart .light{fill:#fff}
.chart .blank{fill:var(--blank)}.chart .cross{stroke:var(--soft);stroke-width:1;opacity:.55}
"""


def scales_of(heat_maps: Iterable[HeatMap]) -> dict[str, tuple[float, float]]:
    """The colour scale of each named group: it spans the scales of all its maps.

    Raises ValueError when the maps of a group have different units.
    """
    scales: dict[str, tuple[float, float]] = {}
    units: dict[str, str] = {}
    for heat_map in heat_maps:
        if not (name := heat_map.group):
            continue
        unit = units.setdefault(name, heat_map.unit)
        if unit != heat_map.unit:
            raise ValueError(
                f"heat maps of group {name!r} are in {unit!r} and {heat_map.unit!r}: one scale has one unit"
            )
        low, high = scales.get(name, (heat_map.low, heat_map.high))
        scales[name] = (min(low, heat_map.low), max(high, heat_map.high))
    return scales


def colour_of(share: float) -> str:
    """The colour of a place on the scale, 0 its low and 1 its high end; beyond them, the end's."""
    return blend(_STOPS, share)


def render(heat_map: HeatMap, scale: tuple[float, float] | None = None) -> str:
    """The map as a standalone `<svg>` element. scale: low and high of the colours, None for the map's own."""
    low, high = scale or (heat_map.low, heat_map.high)
    room = WIDTH - _MARGIN - _RIGHT
    title, note = title_lines(heat_map.title, room), wrapped(heat_map.note, room)
    legend_top = _TOP + LINE_HEIGHT * len(title) - 4
    top = legend_top + 46
    left = _MARGIN + 22 + max(text_width(tick) for tick in heat_map.y.ticks) + 8
    cell_width = (WIDTH - _RIGHT - left) / len(heat_map.x.ticks)
    cell_height = min(44.0, max(13.0, 320 / len(heat_map.y.ticks)))
    bottom = top + cell_height * len(heat_map.y.ticks)
    x_ticks, ticks_height = _x_ticks(heat_map.x.ticks, left, cell_width, bottom)
    label_y = bottom + ticks_height + 19
    height = label_y + 12 + LINE_HEIGHT * len(note)
    middle = (top + bottom) / 2
    turned = f'transform="rotate(-90 {_MARGIN + 8} {middle:.1f})"'
    return "\n".join(
        [
            open_svg(WIDTH, height, heat_map.title, _STYLE),
            *paragraph(_MARGIN, _TOP, title, "title"),
            *_legend(heat_map, low, high, legend_top),
            *_cells(heat_map, (low, high), left, top, cell_width, cell_height),
            *_y_ticks(heat_map.y.ticks, left, top, cell_height),
            *x_ticks,
            text(_MARGIN + 8, middle, axis_text(heat_map.y.label, heat_map.y.unit), "", "middle", turned),
            text((left + WIDTH - _RIGHT) / 2, label_y, axis_text(heat_map.x.label, heat_map.x.unit), "", "middle"),
            *paragraph(_MARGIN, label_y + 23, note, "soft"),
            "</svg>",
        ]
    )


def _cells(
    heat_map: HeatMap, scale: tuple[float, float], left: float, top: float, width: float, height: float
) -> list[str]:
    digits = heat_map_digits(heat_map)
    numbers = [[format_number(value, digits) for value in row] for row in heat_map.values]
    size = _letter_size(numbers, width, height)
    parts = [f'<g style="--size:{size:.1f}px">']
    for i, row in enumerate(heat_map.values):
        for j, value in enumerate(row):
            x, y = left + j * width, top + i * height
            box = f'x="{x:.2f}" y="{y:.2f}" width="{width - _GAP:.2f}" height="{height - _GAP:.2f}"'
            place = f"{heat_map.y.label} {heat_map.y.ticks[i]}, {heat_map.x.label} {heat_map.x.ticks[j]}"
            if value is None or math.isnan(value):
                x2, y2 = x + width - _GAP, y + height - _GAP
                parts.append(f'<rect class="blank" {box}>{_title(f"{place}: not measured")}</rect>')
                parts.append(f'<path class="cross" d="M{x:.1f} {y2:.1f}L{x2:.1f} {y:.1f}"/>')
                continue
            share = (value - scale[0]) / (scale[1] - scale[0])
            colour = colour_of(share)
            hover = _title(f"{place}: {numbers[i][j]} {heat_map.unit}".rstrip())
            parts.append(f'<rect {box} fill="{colour}">{hover}</rect>')
            if size:
                centre = (x + (width - _GAP) / 2, y + (height - _GAP) / 2)
                parts.append(text(*centre, numbers[i][j], f"cell {_ink_on(colour)}", "middle"))
    return [*parts, "</g>"]


def _letter_size(numbers: Sequence[Sequence[str]], width: float, height: float) -> float:
    """The font size with which every number fits its cell; 0 where that would be too small to read."""
    if max(len(numbers), len(numbers[0])) > _MOST_NUMBERS:
        return 0.0
    widest = max(text_width(number, 1.0) for row in numbers for number in row)
    size = min(LETTER, (width - _GAP - 3) / widest, (height - _GAP) * 0.8)
    return size if size >= _SMALLEST else 0.0


def _y_ticks(labels: Sequence[str], left: float, top: float, height: float) -> list[str]:
    places = range(0, len(labels), max(1, math.ceil((LETTER + 1) / height)))
    return [text(left - 8, top + (i + 0.5) * height + 4, labels[i], "soft", "end") for i in places]


def _x_ticks(labels: Sequence[str], left: float, width: float, bottom: float) -> tuple[list[str], float]:
    """Ticks below the columns and their height: level where they fit, turned where not, thinned where too many."""
    widest = max(text_width(label) for label in labels)
    if widest + 6 <= width or width < LETTER + 4:
        every = max(1, math.ceil((widest + 6) / width))
        places = range(0, len(labels), every)
        return [text(left + (i + 0.5) * width, bottom + 17, labels[i], "soft", "middle") for i in places], 17
    parts = []
    for i, label in enumerate(labels):
        x, y = left + (i + 0.5) * width + 4, bottom + 13
        parts.append(text(x, y, label, "soft", "end", f'transform="rotate(-{_TURN} {x:.1f} {y:.1f})"'))
    return parts, 13 + widest * math.sin(math.radians(_TURN))


def _legend(heat_map: HeatMap, low: float, high: float, top: float) -> list[str]:
    """The scale's colours between its ends, its unit, and what a cell without colour means, if there is one."""
    digits = heat_map_digits(heat_map)
    x, y = _MARGIN + 0.0, top + 8
    parts = [text(x, y + 9, first := format_number(low, digits), "soft")]
    x += text_width(first) + 6
    parts += colour_bar(x, y, _LEGEND_WIDTH, _LEGEND_HEIGHT, shades(_STOPS, 50))
    x += _LEGEND_WIDTH + 6
    parts.append(text(x, y + 9, last := f"{format_number(high, digits)} {heat_map.unit}".strip(), "soft"))
    x += text_width(last) + 24
    if any(value is None for row in heat_map.values for value in row):
        parts.append(f'<rect class="blank" x="{x:.1f}" y="{y - 2}" width="18" height="14"/>')
        parts.append(f'<path class="cross" d="M{x:.1f} {y + 12}L{x + 18:.1f} {y - 2}"/>')
        parts.append(text(x + 25, y + 9, "not measured", "soft"))
    return parts


def _ink_on(colour: str) -> str:
    """The class of the ink, dark or light, that has more contrast on a colour."""
    ground = _luminance(colour)
    dark, light = _luminance(_DARK), _luminance(_LIGHT)
    return "dark" if (ground + 0.05) / (dark + 0.05) > (light + 0.05) / (ground + 0.05) else "light"


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (v / 255 for v in bytes.fromhex(colour[1:]))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _title(value: str) -> str:
    return f"<title>{html.escape(value)}</title>"
