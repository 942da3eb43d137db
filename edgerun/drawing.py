"""What the drawings of a report share: SVG text and lines, notes that wrap, axis ticks, and one look, light and dark.

Our own because it is all the drawing that reports need: no plotting package, fonts or scripts come along.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from edgerun.report import Axis

LETTER = 12.5  # font size of a drawing in user units, where it says nothing else
LINE_HEIGHT = 17
STYLE = """
.chart{font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
font-variant-numeric:tabular-nums;--ink:#1f2328;--soft:#57606a;--grid:#e3e6ea;--paper:#fff;--blank:#eaedf0}
@media (prefers-color-scheme:dark){.chart{--ink:#e6edf3;--soft:#9aa4af;--grid:#30363d;--paper:#0d1117;--blank:#21262d}}
.chart text{fill:var(--ink)}.chart .soft{fill:var(--soft)}.chart .title{font-size:15px;font-weight:600}
.chart .grid{stroke:var(--grid);stroke-width:1}.chart .axis{stroke:var(--soft);stroke-width:1}
"""
# Mean advances in ems, of a wide sans-serif (DejaVu Sans): what fits in it fits in the others.
_NARROW, _WIDE, _UPPER, _OTHER = 0.36, 0.92, 0.70, 0.61


def open_svg(width: float, height: float, label: str, style: str = "") -> str:
    """The opening tag, with the look that every drawing has and what `style` adds to it."""
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{html.escape(label)}"><style>{STYLE}{style}</style>'
    )


def text(x: float, y: float, value: str, kind: str = "", anchor: str = "start", extra: str = "") -> str:
    """Text whose baseline is at y. kind: its CSS classes; extra: further attributes, as they are."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}" {extra}>{html.escape(value)}</text>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line of a CSS class."""
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def colour_bar(x: float, y: float, width: float, height: float, colours: Sequence[str]) -> list[str]:
    """A bar of colours from left to right."""
    piece = width / len(colours)
    # Crisp and a little wider than their places: no page shows through between two of them.
    boxes = (f'<rect x="{x + i * piece:.2f}" y="{y:.1f}" width="{piece + 0.5:.2f}"' for i in range(len(colours)))
    rest = f'height="{height}" shape-rendering="crispEdges"'
    return [f'{box} {rest} fill="{colour}"/>' for box, colour in zip(boxes, colours, strict=True)]


def blend(colours: Sequence[str], share: float) -> str:
    """The colour at a share of the way through "#rrggbb" stops of equal distance; beyond them, the end's."""
    place = min(1.0, max(0.0, share)) * (len(colours) - 1)
    before = min(int(place), len(colours) - 2)
    ends = (bytes.fromhex(colours[before + i][1:]) for i in (0, 1))
    return "#" + "".join(f"{round(a + (b - a) * (place - before)):02x}" for a, b in zip(*ends, strict=True))


def shades(colours: Sequence[str], count: int, start: float = 0.0) -> list[str]:
    """That many colours through the stops; up to `start`, a share of the way, all are the first one."""
    return [blend(colours, (i / (count - 1) - start) / (1 - start)) for i in range(count)]


def text_width(value: str, size: float = LETTER) -> float:
    """About how wide a text is in user units; rather too wide than too narrow."""
    ems = 0.0
    for letter in value:
        if letter in "iIjlrtf.,:;'|!()[]/ ":
            ems += _NARROW
        elif letter in "mwMW@%—→":
            ems += _WIDE
        else:
            ems += _UPPER if letter.isupper() else _OTHER
    return ems * size


def wrapped(value: str, width: float, size: float = LETTER) -> list[str]:
    """A text in lines of at most `width`, broken at spaces; no line for an empty text."""
    lines: list[str] = []
    for word in value.split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def title_lines(value: str, width: float) -> list[str]:
    """A drawing's title in lines of at most `width`: its letters are larger, and bold ones are wider."""
    return wrapped(value, width, 15 * 1.15)


def paragraph(x: float, y: float, lines: Sequence[str], kind: str, height: float = LINE_HEIGHT) -> list[str]:
    """Lines of text, the first with its baseline at y."""
    return [text(x, y + i * height, value, kind) for i, value in enumerate(lines)]


def axis_text(axis_label: str, unit: str) -> str:
    """An axis' name with its unit: "budget (tokens)"."""
    return f"{axis_label} ({unit})" if unit else axis_label


def tick_text(value: float) -> str:
    """A tick's number: no decimals where none are needed."""
    return f"{value:,.0f}" if abs(value) >= 10 or value == round(value) else f"{value:.3g}"


def ticks(axis: Axis, values: Sequence[float], *, from_zero: bool) -> tuple[list[float], float, float]:
    """Tick positions and the range they span: an axis' powers where it is logarithmic, else about five round steps.

    Raises ValueError when a log axis meets a value that is not above 0, or has a base other than 2 and 10.
    """
    low = axis.low if axis.low is not None else min(values)
    high = axis.high if axis.high is not None else max(values)
    if axis.log:
        if low <= 0:
            raise ValueError(f"a log axis cannot show {low}: give positive values")
        if axis.base not in (2, 10):
            raise ValueError(f"axis {axis.label!r} has base {axis.base}: it may be 2 or 10")
        return _binary_ticks(low, high) if axis.base == 2 else _decimal_ticks(low, high)
    if from_zero and axis.low is None:
        low = min(low, 0.0)
    if high <= low:
        high = low + 1.0
    raw = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * magnitude >= raw * 0.999)
    first = math.floor(low / step + 1e-9) if axis.low is None else math.ceil(low / step - 1e-9)
    last = math.ceil(high / step - 1e-9) if axis.high is None else math.floor(high / step + 1e-9)
    found = [step * i for i in range(first, last + 1)]
    return found, min(low, found[0]), max(high, found[-1])


def _binary_ticks(low: float, high: float) -> tuple[list[float], float, float]:
    first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 8))
    return [2.0**power for power in range(first, last + 1, every)], 2.0**first, 2.0**last


def _decimal_ticks(low: float, high: float) -> tuple[list[float], float, float]:
    """1, 2 and 5 times the powers of ten around the range; only the powers where that is more than four decades."""
    steps = (1.0, 2.0, 5.0) if high / low <= 1e4 else (1.0,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    # Through text: 5 times 10 to the power -3 is not the nearest number to 0.005.
    grid = [float(f"{step:g}e{power}") for power in powers for step in steps]
    first = max(i for i, tick in enumerate(grid) if tick <= low * (1 + 1e-9))
    last = max(first + 1, min(i for i, tick in enumerate(grid) if tick >= high * (1 - 1e-9)))
    found = grid[first : last + 1]
    return found, found[0], found[-1]
