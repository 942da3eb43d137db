"""Draw the README's picture from committed samples: attention's time at 8,192 tokens against the budget.

python bench/readme_picture.py        reads bench/results/dhsa_attention_portable.json, writes attention_time.svg
"""

from __future__ import annotations

import json
import pathlib
import statistics

from edgerun.line_chart import render
from edgerun.report import Axis, Estimate, Plot, Series

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
ROW = "sparse, 8192 tokens, GQA 4"


def main() -> None:
    """Medians with bars from the fastest to the slowest sample."""
    samples = json.loads((RESULTS / "dhsa_attention_portable.json").read_text())["samples"]
    taken = {sample["candidate"]: sample["wall_ms"] for sample in samples if sample["row"] == ROW}
    dense = next(_estimate(wall) for name, wall in taken.items() if name.endswith("dense"))
    sparse = {int(name.rsplit(" ", 1)[1]): _estimate(wall) for name, wall in taken.items() if "budget" in name}
    budgets = sorted(sparse)
    lines = (
        Series("dense", tuple((float(budget), dense) for budget in budgets), dashed=True),
        Series("sparse", tuple((float(budget), sparse[budget]) for budget in budgets)),
    )
    note = "Median; bars from the fastest to the slowest run. fp32, two threads."
    title = "One attention layer over 8,192 tokens"
    plot = Plot(title, Axis("budget", "key tokens", log=True), Axis("time", "ms"), lines, note)
    (RESULTS / "attention_time.svg").write_text(render(plot) + "\n", encoding="utf-8")


def _estimate(wall_ms: list[float]) -> Estimate:
    return Estimate(statistics.median(wall_ms), min(wall_ms), max(wall_ms), n=len(wall_ms))


if __name__ == "__main__":
    main()
