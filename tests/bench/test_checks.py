"""Checks of a benchmark: bounds, the table, and the exit status."""

from __future__ import annotations

import pytest

from bench.workloads.checks import Check, bounded, require, table


@pytest.mark.parametrize(
    ("relation", "value", "holds"),
    [
        ("<=", 1.0, True),
        ("<=", 1.01, False),
        ("<", 0.99, True),
        ("<", 1.0, False),
        (">=", 1.0, True),
        (">=", 0.9, False),
    ],
)
def test_bounds(relation: str, value: float, holds: bool) -> None:
    assert bounded("a", value, relation, 1.0).holds == holds  # type: ignore[arg-type]


def test_what_is_not_known_does_not_hold() -> None:
    for value in (None, float("nan")):
        for relation in ("<=", "<", ">="):
            assert not bounded("a", value, relation, 1.0).holds  # type: ignore[arg-type]
    assert bounded("a", None, "<", 1.0).found == "not known"


def test_the_table_has_a_line_for_each() -> None:
    lines = table([bounded("long name", 2.0, "<=", 1.0), Check("b", "x", "x", True)]).splitlines()
    assert lines == ["long name  2.00  at most 1.00  DOES NOT HOLD", "b          x     x             holds"]


def test_the_exit_names_what_does_not_hold(capsys: pytest.CaptureFixture[str]) -> None:
    require([Check("good", "x", "x", True)])
    with pytest.raises(SystemExit) as ended:
        require([Check("good", "x", "x", True), bounded("h", 0.2, "<", 0.1)])
    assert ended.value.code == "1 of 2 checks do not hold:\n  h: 0.20, not below 0.10"
    assert capsys.readouterr().out.count("good") == 2
