"""The gates of the block loading benchmark."""

from __future__ import annotations

from typing import Any

from bench.workloads import block_loading


def row(ratio: float, resident: int, *hidden: float) -> dict[str, Any]:
    candidates = [{"name": f"prefetch_{i}", "a_pass": {"hidden_share": share}} for i, share in enumerate(hidden)]
    return {"load_over_execute": ratio, "resident": resident, "candidates": candidates}


def test_one_even_row_without_resident_blocks_is_enough() -> None:
    assert block_loading.shortfalls([row(1.0, 0, 0.0, 0.8, 0.3), row(3.0, 0, 0.0, 0.2, 0.2)]) == []


def test_uneven_rows_and_resident_blocks_do_not_count() -> None:
    rows = [row(1.0, 0, 0.0, 0.69, 0.5), row(3.0, 0, 0.0, 0.9, 0.9), row(1.0, 6, 0.0, 0.9, 0.9)]
    assert block_loading.shortfalls(rows) == ["at most 0.69 is hidden where a load takes 0.5 to 2 executions, not 0.7"]


def test_rows_that_say_nothing_are_not_enough() -> None:
    (line,) = block_loading.shortfalls([row(3.0, 0, 0.0, 0.9, 0.9)])
    assert line.startswith("in no row")


def test_nothing_may_be_hidden_without_prefetch() -> None:
    (line,) = block_loading.shortfalls([row(1.0, 0, 0.1, 0.8, 0.8)])
    assert line.startswith("without prefetch 0.10 is hidden")
