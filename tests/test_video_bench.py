"""`edgerun bench` of a video bundle: its table of programs, from runs that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from edgerun.commands import video_bench
from edgerun.report import Table, column_heading


def block(name: str, loads: int, load_ms: float, executions: int, wait_ms: float) -> dict[str, Any]:
    times = {"load_ms": load_ms, "unload_ms": 1.0, "execute_ms": 30.0, "wait_ms": wait_ms}
    return {"name": name, "loads": loads, "executions": executions, "loaded_bytes": 3 << 20, **times}


def run_of(*blocks: dict[str, Any]) -> dict[str, Any]:
    stages = {name: {"chain": {"blocks": []}} for name in ("encode", "decode")}
    return {"stages": stages | {"denoise": {"chain": {"blocks": list(blocks)}}}}


def programs(*runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A row for each program, by the columns' headings."""
    table: Table = video_bench._blocks(runs)
    headings = [column_heading(column) for column in table.columns]
    assert "wait: before an execution" in table.note and "overlap: of the time of its loads" in table.note
    return {str(row[1]): dict(zip(headings, row, strict=True)) for row in table.rows}


@pytest.mark.parametrize(
    ("wait_ms", "each_wait_ms", "overlap_percent"),
    [
        (0.0, 0.0, 100.0),  # loaded behind others
        (50.0, 5.0, 75.0),
        (200.0, 20.0, 0.0),  # one after another
        (260.0, 26.0, 0.0),  # and the load had to wait for room
    ],
)
def test_waits_and_overlap_of_a_program_that_streams(
    wait_ms: float, each_wait_ms: float, overlap_percent: float
) -> None:
    row = programs(run_of(block("pair", 10, 200.0, 10, wait_ms)))["pair"]
    assert (row["loads"], row["each load, ms"], row["each execution, ms"]) == (10, 20.0, 3.0)
    assert row["each wait, ms"] == pytest.approx(each_wait_ms)
    assert row["overlap, %"] == pytest.approx(overlap_percent)


def test_a_resident_program_waits_once() -> None:
    row = programs(run_of(block("head", 1, 20.0, 10, 20.0)))["head"]
    assert (row["each load, ms"], row["each wait, ms"], row["overlap, %"]) == (20.0, 2.0, 0.0)


def test_what_did_not_run_is_not_known() -> None:
    row = programs(run_of(block("tail", 0, 0.0, 0, 0.0)))["tail"]
    assert row["each load, ms"] is row["each wait, ms"] is row["overlap, %"] is None


def test_medians_over_runs() -> None:
    runs = [run_of(block("pair", 10, 200.0, 10, wait_ms)) for wait_ms in (0.0, 20.0, 200.0)]
    row = programs(*runs)["pair"]
    assert row["each wait, ms"] == pytest.approx(2.0) and row["overlap, %"] == pytest.approx(90.0)
