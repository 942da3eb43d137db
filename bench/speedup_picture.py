"""Draw the attention benchmark: speed against torch SDPA by sequence length, and against the realised density.

python bench/speedup_picture.py [RESULTS.json] [--head-dim 128] [--group 4]

Reads a result file of bench/ops/dhsa_attention.py, bench/results/dhsa_attention.json when none is given, and writes
speedup_by_length.svg and speedup_by_density.svg beside it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from bench.harness import RESULTS, Row
from bench.ops.dhsa_attention_summary import candidate, sparse_figures
from edgerun.errors import EdgerunError
from edgerun.line_chart import render
from edgerun.report import Axis, Estimate, Plot, Series, write_whole


def pictures(rows: list[Row], head_dim: int, group: int) -> dict[str, Plot]:
    """File name -> plot, for one head dimension and group. Raises EdgerunError when the rows hold none of them."""
    chosen = [row for row in rows if row["kind"] == "prefill" and (row["head_dim"], row["group"]) == (head_dim, group)]
    chosen = sorted((row for row in chosen if candidate(row, peer="torch")), key=lambda row: int(row["length"]))
    if not chosen:
        raise EdgerunError(f"no prefill row with torch SDPA of head size {head_dim}, group {group}: measure it first")
    by_length = [
        Series("dense", tuple((float(row["length"]), speed(row, role="dense")) for row in chosen)),
        *(line for budget in budgets(chosen) if (line := by_budget(chosen, budget)).points),
        Series("torch SDPA", tuple((float(row["length"]), Estimate(1.0)) for row in chosen), dashed=True),
    ]
    by_density = [
        Series(f"{row['length']:,} tokens", tuple(sorted(points(row), key=lambda point: point[0])))
        for row in chosen
        if len(points(row)) > 1
    ]
    heads = "no groups" if group == 1 else f"GQA {group}"
    note = f"8 query heads of {head_dim}, {heads}, fp32; bars: fastest and slowest runs."
    vertical = Axis("speed", "torch SDPA = 1", log=True)
    return {
        "speedup_by_length.svg": Plot(
            "Causal attention against torch SDPA",
            Axis("sequence", "tokens", log=True),
            vertical,
            tuple(by_length),
            note,
        ),
        "speedup_by_density.svg": Plot(
            "Sparse attention: speed by what is attended",
            Axis("realised density", "% of causal pairs", log=True),
            vertical,
            tuple(by_density),
            note,
        ),
    }


def budgets(rows: list[Row]) -> list[int]:
    """Budgets of any row, largest first."""
    return sorted({figures.budget for row in rows for figures in sparse_figures(row)}, reverse=True)


def by_budget(rows: list[Row], budget: int) -> Series:
    """Speed of one budget by length."""
    known = [row for row in rows if candidate(row, role="sparse", budget=budget)]
    name = f"budget {budget:,}"
    return Series(name, tuple((float(row["length"]), speed(row, role="sparse", budget=budget)) for row in known))


def points(row: Row) -> list[tuple[float, Estimate]]:
    """(density in percent, speed) of every budget of a row, and of dense attention."""
    found = [(100.0, speed(row, role="dense"))]
    for figures in sparse_figures(row):
        found.append((100 * figures.density, speed(row, role="sparse", budget=figures.budget)))
    return found


def speed(row: Row, **facts: Any) -> Estimate:
    """torch SDPA's median over each sample of a candidate: at the median, the slowest and the fastest."""
    base, one = candidate(row, peer="torch"), candidate(row, **facts)
    assert base is not None and one is not None
    median, wall = base["median_ms"], one["wall_ms"]
    return Estimate(median / statistics.median(wall), median / max(wall), median / min(wall))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="?", default=RESULTS / "dhsa_attention.json")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group", type=int, default=4)
    values = parser.parse_args(arguments)
    try:
        rows = json.loads(values.results.read_text(encoding="utf-8"))["rows"]
        for name, plot in pictures(rows, values.head_dim, values.group).items():
            write_whole(values.results.parent / name, render(plot) + "\n")
            print(f"wrote {values.results.parent / name}")
    except (EdgerunError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
