"""The gates of the block loading benchmark, and, marked slow, a small run of it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from bench.workloads import block_loading
from bench.workloads.streaming_formula import gain_ms, hidden_share, means_of_a_block, solve_alpha_ms


def row(ratio: float, resident: int, *hidden: float, off: float = 0.0) -> dict[str, Any]:
    candidates = [{"name": f"prefetch_{i}", "a_pass": {"hidden_share": share}} for i, share in enumerate(hidden)]
    for candidate in candidates if resident > 0 else []:
        candidate["formula_off_share"] = off
    return {"tokens": 64, "load_over_execute": ratio, "resident": resident, "candidates": candidates}


def failed(*rows: dict[str, Any]) -> list[str]:
    return [f"{check.name} {check.found}" for check in block_loading.checks(list(rows)) if not check.holds]


GOOD = (row(1.0, 0, 0.0, 0.8, 0.3), row(1.0, 6, 0.0, 0.2, 0.2))


def test_one_even_row_without_resident_blocks_is_enough() -> None:
    assert failed(*GOOD, row(3.0, 0, 0.0, 0.2, 0.2)) == []


def test_uneven_rows_and_resident_blocks_do_not_count() -> None:
    rows = [row(1.0, 0, 0.0, 0.69, 0.5), row(3.0, 0, 0.0, 0.9, 0.9), row(1.0, 6, 0.0, 0.9, 0.9)]
    assert failed(*rows) == ["h where a load takes 0.5 to 2 executions 0.69"]


def test_rows_that_say_nothing_are_not_enough() -> None:
    assert failed(row(3.0, 0, 0.0, 0.9, 0.9), GOOD[1]) == ["h where a load takes 0.5 to 2 executions not known"]
    assert failed(GOOD[0]) == ["rows with resident blocks none"]


def test_nothing_may_be_hidden_without_prefetch() -> None:
    assert failed(row(1.0, 0, 0.1, 0.8, 0.8), GOOD[1]) == ["64 tokens, 0 resident, prefetch_0: h 0.10"]


def test_the_formula_must_predict_rows_with_resident_blocks() -> None:
    assert failed(GOOD[0], row(1.0, 6, 0.0, 0.2, 0.2, off=0.15)) == []
    assert failed(GOOD[0], row(1.0, 6, 0.0, 0.2, 0.2, off=0.16)) == [
        f"64 tokens, 6 resident, prefetch_{ahead}: formula off by 0.16" for ahead in (1, 2)
    ]


def test_the_formula_by_hand() -> None:
    """10 blocks of which 4 stay, l = 30 and e = 20 ms: 200 ms are hidden, 40 not loaded, alpha counts for 6 of 10."""
    assert gain_ms(10, 4, 30, 20, alpha_ms=50) == 200 + 40 - 30
    assert solve_alpha_ms(10, 4, 30, 20, gained_ms=210) == pytest.approx(50)
    assert solve_alpha_ms(10, 10, 30, 20, gained_ms=290) == 0
    assert means_of_a_block(
        [
            {"load_ms": 40, "unload_ms": 20, "loads": 2, "execute_ms": 90, "executions": 3},
            {"load_ms": 10, "unload_ms": 0, "loads": 1, "execute_ms": 30, "executions": 3},
        ]
    ) == (20, 20)


def test_hidden_share_by_hand() -> None:
    """In turn nothing; with the shorter one wholly beside the longer, all of it."""
    assert hidden_share(300, 200, 500) == 0
    assert hidden_share(300, 200, 300) == 1
    assert hidden_share(0, 200, 200) is None


@pytest.mark.slow
def test_a_small_run_holds(tmp_path: pathlib.Path) -> None:
    """Through the shell: the exit status says that something is hidden, and that the formula predicts."""
    output = tmp_path / "rows.json"
    command = [sys.executable, block_loading.__file__, "--work", str(tmp_path), "--output", str(output)]
    done = subprocess.run(
        [*command, "--blocks", "10", "--megabytes", "24", "--repeats", "5"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    rows = json.loads(output.read_text())["rows"]
    assert [one["resident"] for one in rows] == [0, 5, 0, 5, 0, 5]
    assert all(one["a_pass"]["cached_share_before"] <= 0.05 for one_row in rows for one in one_row["candidates"])
