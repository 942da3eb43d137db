"""Report: what every verb measured, in one schema, written as text, JSON or a self-contained HTML page.

A report is a verdict, facts, tables, plots, heat maps, pictures, clips, checks and the time of each step, with the
machine and the command that made it.
A unit stands in its column or axis; what is not known is None ("null" in JSON, a dash in print), never 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import typing
from collections.abc import Sequence
from typing import Any

from edgerun.errors import EdgerunError
from edgerun.report_json import decode, plain

SCHEMA_VERSION = 3
# 1 lacks the verdict, heat maps, pictures and an axis' base, 2 the clips: what it does not have is left at its default.
_READABLE = (1, 2, 3)
_UNKNOWN = "–"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A measured value with what is known of its spread: an interval (low, high), a standard deviation, a count."""

    value: float
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    n: int | None = None


Cell = str | bool | int | float | Estimate | None


@dataclasses.dataclass(frozen=True)
class Column:
    """A table's column. unit: of its numbers, as "s" or "%"; digits: decimals in print, None for as many as needed."""

    name: str
    unit: str = ""
    digits: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under columns; note: one line on how to read it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Axis:
    """A plot's axis. low and high: the range, None for what the points need.

    log: a logarithmic scale; base: 2 has ticks at powers of two, for lengths, and 10 at 1, 2, 5, 10, …, for shares.
    """

    label: str
    unit: str = ""
    log: bool = False
    low: float | None = None
    high: float | None = None
    base: int = 2


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a plot: points (x, estimate) by ascending x. dashed: a reference that the others are held against."""

    name: str
    points: tuple[tuple[float, Estimate], ...]
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Plot:
    """Lines over one x axis; note: one line under the plot, with n where it is not in the estimates."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Categories:
    """A heat map's axis. ticks: a label for every column from the left, or for every row from the top."""

    label: str
    unit: str
    ticks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """A value for every pair of two categories, as colour and number.

    values: rows from the top, None for what was not measured; unit: of the values; low and high: the colour scale's
    ends; digits: decimals in print, None for as many as the scale needs; group: maps that share a group's name stand
    side by side on one colour scale. Raises ValueError when the values do not fit the axes, or low is not below high.
    """

    title: str
    x: Categories
    y: Categories
    values: tuple[tuple[float | None, ...], ...]  # [rows, columns]
    unit: str
    low: float
    high: float
    note: str = ""
    group: str = ""
    digits: int | None = None

    def __post_init__(self) -> None:
        rows, columns = len(self.y.ticks), len(self.x.ticks)
        widths = sorted({len(row) for row in self.values})
        if not rows or not columns:
            raise ValueError(f"heat map {self.title!r} has no value: leave it out")
        if len(self.values) != rows or widths != [columns]:
            raise ValueError(
                f"heat map {self.title!r} has {len(self.values)} rows of {widths} values for {rows} and {columns} ticks"
            )
        if not self.low < self.high:
            raise ValueError(f"heat map {self.title!r} has a scale from {self.low} to {self.high}: low must be lower")


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Colours of one kind of a picture's pixels, as "#rrggbb" from the scale's low end to its high end.

    start: the lowest value that a pixel of this kind has; None for the scale's low end.
    """

    name: str
    colours: tuple[str, ...]
    start: float | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """A matrix too large for a heat map, as an image whose pixels mean what `ramps` say on the logarithmic `scale`.

    x, y and scale have a low and a high; y.low is the top edge. png: base64; rows and columns: of the matrix;
    alt: what the image shows, for who cannot see it. Raises ValueError for a range that is missing or cannot be drawn.
    """

    title: str
    x: Axis
    y: Axis
    rows: int
    columns: int
    png: str
    alt: str
    scale: Axis
    ramps: tuple[Ramp, ...]
    note: str = ""

    def __post_init__(self) -> None:
        for axis in (self.x, self.y, self.scale):
            if axis.low is None or axis.high is None or not axis.low < axis.high:
                raise ValueError(f"picture {self.title!r}: {axis.label!r} needs a low and a higher high")
        if self.scale.low is not None and self.scale.low <= 0:
            raise ValueError(f"picture {self.title!r}: a logarithmic scale cannot begin at {self.scale.low}")


@dataclasses.dataclass(frozen=True)
class MovingPicture:
    """A clip that plays in the page, and a sheet of its frames.

    webp: the animation, png: the sheet, both base64; frames, height and width: of the clip, the latter two in pixels;
    fps: frames per second; alt: what the clip shows; group: clips that share a group's name stand side by side.
    """

    title: str
    webp: str
    png: str
    frames: int
    height: int
    width: int
    fps: float
    alt: str
    note: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Check:
    """One gate: a value held against a limit of edgerun/compare.py. least: the value must be at least the limit."""

    name: str
    measured: float | None
    limit: float
    least: bool
    passed: bool
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage of the work and the wall time it took, in seconds."""

    name: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where the report was made. features: the CPU's vector extensions; versions: of what takes part."""

    system: str
    machine: str
    cpu: str
    cores: int
    memory_bytes: int | None
    features: tuple[str, ...]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Report:
    """One run of one verb. kind: the verb; facts: (name, value) pairs about what was worked on.

    verdict: what came out, in one sentence; every writer puts it first.
    """

    kind: str
    title: str
    created_utc: str
    command: str
    edgerun_version: str
    machine: Machine
    facts: tuple[tuple[str, Cell], ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    checks: tuple[Check, ...] = ()
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()
    verdict: str = ""
    heat_maps: tuple[HeatMap, ...] = ()
    pictures: tuple[Picture, ...] = ()
    clips: tuple[MovingPicture, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed; True where there is none."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the schema's version; `from_json` gives the same report back."""
        return {"schema_version": SCHEMA_VERSION, **plain(self)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Report:
        """The report that `to_json` wrote. Raises EdgerunError for another schema or a damaged report."""
        version = values.get("schema_version")
        if version not in _READABLE:
            known = ", ".join(map(str, _READABLE))
            raise EdgerunError(f"report schema {version!r}; this edgerun reads {known}: use the one that wrote it")
        try:
            report = decode(Report, {key: value for key, value in values.items() if key != "schema_version"})
        except (KeyError, TypeError, ValueError) as error:
            raise EdgerunError(f"this is not an edgerun report: {error}; write it again with --json") from error
        return typing.cast(Report, report)


def to_text(report: Report, *, colour: bool = False) -> str:
    """The report for a terminal: verdict, facts, tables with units, heat maps as tables, checks, each step's time."""
    bold, green, red, dim, plain = ("\033[1m", "\033[32m", "\033[31m", "\033[2m", "\033[0m") if colour else ("",) * 5
    blocks = [f"{bold}{report.title}{plain}"]
    if report.verdict:
        blocks.append(f"{bold}{report.verdict}{plain}")
    if report.facts:
        width = max(len(name) for name, _ in report.facts)
        blocks.append("\n".join(f"  {name.ljust(width)}  {format_cell(value)}" for name, value in report.facts))
    for table in (*report.tables, *map(heat_map_table, report.heat_maps)):
        heading = f"{bold}{table.title}{plain}\n" if table.title else ""
        note = f"\n{dim}  {table.note}{plain}" if table.note else ""
        blocks.append(heading + _text_table(table) + note)
    blocks += [
        f"{bold}{picture.title}{plain} (a picture, on the HTML page): {picture.alt}" for picture in report.pictures
    ]
    if report.clips:
        names = (f"{clip.group}: {clip.title}" if clip.group else clip.title for clip in report.clips)
        blocks.append(f"{bold}Clips{plain} (on the HTML page)\n" + "\n".join(f"  {name}" for name in names))
    if report.checks:
        lines = []
        for check in report.checks:
            mark = f"{green}pass{plain}" if check.passed else f"{red}FAIL{plain}"
            lines.append(f"  {mark}  {check.name}: {describe_check(check)}")
        blocks.append(f"{bold}Checks{plain}\n" + "\n".join(lines))
    if report.steps:
        width = max(len(step.name) for step in report.steps)
        lines = [f"  {step.name.ljust(width)}  {step.seconds:8.1f} s" for step in report.steps]
        total = sum(step.seconds for step in report.steps)
        blocks.append(f"{bold}Time{plain}\n" + "\n".join(lines) + f"\n  {'total'.ljust(width)}  {total:8.1f} s")
    blocks.extend(f"{dim}{note}{plain}" for note in report.notes)
    return "\n\n".join(blocks) + "\n"


def describe_check(check: Check) -> str:
    """A check's value beside its limit: "0.00012 nats, at most 0.002"."""
    relation = "at least" if check.least else "at most"
    detail = f"; {check.detail}" if check.detail else ""
    return f"{format_number(check.measured)} ({relation} {format_number(check.limit)}){detail}"


def format_number(value: float | None, digits: int | None = None) -> str:
    """A number for people: fixed decimals when asked, else about four significant digits; a dash for None."""
    if value is None:
        return _UNKNOWN
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf" if value < 0 else _UNKNOWN
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:.2e}" if value != 0 and not 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def format_cell(cell: Cell, digits: int | None = None) -> str:
    """A cell for people: yes and no, numbers with their spread, a dash for what is not known."""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    if not isinstance(cell, Estimate):
        return format_number(cell, digits)
    text = format_number(cell.value, digits)
    if cell.sd is not None:
        text += f" ± {format_number(cell.sd, digits)}"
    if cell.low is not None and cell.high is not None:
        text += f" [{format_number(cell.low, digits)}, {format_number(cell.high, digits)}]"
    return text


def heat_map_digits(heat_map: HeatMap) -> int:
    """Decimals of a heat map's numbers: its own, else as many as tell a hundredth of its scale."""
    if heat_map.digits is not None:
        return heat_map.digits
    return max(0, 2 - math.floor(math.log10(heat_map.high - heat_map.low) + 1e-9))


def heat_map_table(heat_map: HeatMap) -> Table:
    """A heat map's numbers as a table: a row's tick, then its values."""
    y, x = (f"{axis.label}, {axis.unit}" if axis.unit else axis.label for axis in (heat_map.y, heat_map.x))
    digits = heat_map_digits(heat_map)
    columns = (Column(f"{y} ↓ {x} →"), *(Column(tick, digits=digits) for tick in heat_map.x.ticks))
    rows = tuple((tick, *row) for tick, row in zip(heat_map.y.ticks, heat_map.values, strict=True))
    title = f"{heat_map.group}: {heat_map.title}" if heat_map.group else heat_map.title
    title += f" ({heat_map.unit})" if heat_map.unit else ""
    return Table(title, columns, rows, heat_map.note)


def column_heading(column: Column) -> str:
    """A column's name with its unit: "prefill, s"."""
    return f"{column.name}, {column.unit}" if column.unit else column.name


def is_text_column(table: Table, index: int) -> bool:
    """Whether a column holds text, which aligns left; numbers align right."""
    return all(isinstance(row[index], str | bool) for row in table.rows)


def write_json(report: Report, path: pathlib.Path) -> None:
    """Write the report as JSON, whole or not at all. Raises OSError when the place cannot be written."""
    write_whole(path, json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a text file beside its name and move it there, so that no reader meets half of it. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _text_table(table: Table) -> str:
    headings = [column_heading(column) for column in table.columns]
    cells = [
        [format_cell(cell, column.digits) for cell, column in zip(row, table.columns, strict=True)]
        for row in table.rows
    ]
    widths = [max(len(row[i]) for row in [headings, *cells]) for i in range(len(headings))]
    left = [is_text_column(table, i) for i in range(len(headings))]

    def line(values: Sequence[str]) -> str:
        padded = (v.ljust(w) if is_left else v.rjust(w) for v, w, is_left in zip(values, widths, left, strict=True))
        return ("  " + "  ".join(padded)).rstrip()

    rule = "  " + "  ".join("─" * width for width in widths)
    return "\n".join([line(headings), rule, *(line(row) for row in cells)])
