"""Report: what every verb measured, in one schema, written as text, JSON or a self-contained HTML page.

A report is facts, tables, plots, checks and the time of each step, with the machine and the command that made it.
A unit stands in its column or axis; what is not known is None ("null" in JSON, a dash in print), never 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import types
import typing
from collections.abc import Sequence
from typing import Any

from edgerun.errors import EdgerunError

SCHEMA_VERSION = 1
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
    """A plot's axis. log: base-2 scale, for lengths; low and high: the range, None for what the points need."""

    label: str
    unit: str = ""
    log: bool = False
    low: float | None = None
    high: float | None = None


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
    """One run of one verb. kind: the verb; facts: (name, value) pairs about what was worked on."""

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

    @property
    def passed(self) -> bool:
        """Whether every check passed; True where there is none."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the schema's version; `from_json` gives the same report back."""
        return {"schema_version": SCHEMA_VERSION, **_plain(self)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Report:
        """The report that `to_json` wrote. Raises EdgerunError for another schema or a damaged report."""
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise EdgerunError(
                f"report schema {version!r}; this edgerun reads {SCHEMA_VERSION}: use the one that wrote it"
            )
        try:
            report = _decode(Report, {key: value for key, value in values.items() if key != "schema_version"})
        except (KeyError, TypeError, ValueError) as error:
            raise EdgerunError(f"this is not an edgerun report: {error}; write it again with --json") from error
        return typing.cast(Report, report)


def to_text(report: Report, *, colour: bool = False) -> str:
    """The report for a terminal: facts, tables with units, checks, and the time of each step."""
    bold, green, red, dim, plain = ("\033[1m", "\033[32m", "\033[31m", "\033[2m", "\033[0m") if colour else ("",) * 5
    blocks = [f"{bold}{report.title}{plain}"]
    if report.facts:
        width = max(len(name) for name, _ in report.facts)
        blocks.append("\n".join(f"  {name.ljust(width)}  {format_cell(value)}" for name, value in report.facts))
    for table in report.tables:
        heading = f"{bold}{table.title}{plain}\n" if table.title else ""
        note = f"\n{dim}  {table.note}{plain}" if table.note else ""
        blocks.append(heading + _text_table(table) + note)
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


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such number; what is not finite was not measured
    return value


def _decode(kind: Any, value: Any) -> Any:
    """`value` of plain JSON as `kind`: a dataclass, tuple, dict, union or plain type. Raises TypeError, ValueError."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise TypeError(f"{kind.__name__} is {value!r}, not an object")
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise TypeError(f"{kind.__name__} has no field {unknown[0]!r}")
        return kind(**{name: _decode(hints[name], item) for name, item in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is not a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item) for item in value)
        return tuple(_decode(item_kind, item) for item_kind, item in zip(arguments, value, strict=True))
    if origin is dict:
        return {key: _decode(arguments[1], item) for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        if isinstance(value, dict):
            return _decode(Estimate, value)
        for option in arguments:
            if isinstance(option, type) and type(value) is option:
                return value
        return _decode(float, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
