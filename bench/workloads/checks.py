"""What must hold of a benchmark's rows: a table, and an exit status that names what does not."""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Literal

_RELATIONS = {"<=": (operator.le, "at most"), "<": (operator.lt, "below"), ">=": (operator.ge, "at least")}


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that must hold: what was found, and what is wanted."""

    name: str
    found: str
    wanted: str
    holds: bool


def bounded(
    name: str,
    value: float | None,
    relation: Literal["<=", "<", ">="],
    limit: float,
    show: Callable[[float], str] = "{:.2f}".format,
) -> Check:
    """value (None: not known, which does not hold) against its limit."""
    holds, words = _RELATIONS[relation]
    found = "not known" if value is None else show(value)
    return Check(name, found, f"{words} {show(limit)}", value is not None and bool(holds(value, limit)))


def table(checks: Sequence[Check]) -> str:
    """A line for each."""
    columns = [[getattr(check, name) for check in checks] for name in ("name", "found", "wanted")]
    widths = [max(map(len, column), default=0) for column in columns]
    rows = zip(*columns, checks, strict=True)
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True))
        + ("  holds" if check.holds else "  DOES NOT HOLD")
        for *texts, check in rows
    )


def require(checks: Sequence[Check]) -> None:
    """Print the table; ends the program with status 1 and the names of those that do not hold, where there are some."""
    print(f"\n{table(checks)}", flush=True)
    if failed := [check for check in checks if not check.holds]:
        named = "\n".join(f"  {check.name}: {check.found}, not {check.wanted}" for check in failed)
        sys.exit(f"{len(failed)} of {len(checks)} checks do not hold:\n{named}")
