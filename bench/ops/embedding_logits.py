"""Times the tied head's product on this CPU: every kernel variant, one hidden vector, against reading the table.

    python bench/ops/embedding_logits.py [--output bench/results/embedding_logits.json]

The default table has Llama 3.2 1B's shape. Every variant proves its answer first. `read` adds up the table's bytes as
integers with torch: what this machine's memory gives; `torch`, where the table is float32, is its product.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable

# Before torch is imported: threads of OpenMP that wait busily would take time from the candidates after them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, Candidate, Effort, ResultFile, Row, measure, prove
from edgerun.compare import relative_l2, tolerance
from edgerun.errors import EdgerunError
from edgerun.ops import embedding_logits
from edgerun.ops.native import native_module

DTYPES = {"int8": torch.int8, "fp16": torch.float16, "fp32": torch.float32}
PROVED_ROWS = 4096  # of the table, at each end, against float64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: the settings that a result file belongs to."""

    vocab: int
    hidden: int
    threads: int
    repeats: int


def run(plan: Plan, results: ResultFile) -> None:
    """Measure every dtype that the results lack. Raises ParityError for a variant whose answer is wrong."""
    torch.set_num_threads(plan.threads)
    for name, dtype in DTYPES.items():
        row = results.find({"kind": "logits", "dtype": name})
        if row is None:
            load = os.getloadavg()[0]
            candidates, table_bytes = candidates_of(plan, dtype)
            facts = {"kind": "logits", "dtype": name, "table_bytes": table_bytes, "load_average_at_start": load}
            row = {**facts, "candidates": measure(candidates, Effort(plan.repeats, least=min(plan.repeats, 15)))}
            results.add(row)
        print("\n".join(lines(row)), flush=True)


def candidates_of(plan: Plan, dtype: torch.dtype) -> tuple[list[Candidate], int]:
    """The proven variants, "portable" first, then what they are held against; and the bytes of the table."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, plan.hidden, generator=generator)
    shape, scales = (plan.vocab, plan.hidden), None
    if dtype == torch.int8:
        table = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        scales = torch.rand(plan.vocab, generator=generator) * 0.02 + 1e-3
    else:
        table = torch.randn(shape, generator=generator).to(dtype)
    candidates = [
        Candidate(name, variant(name, hidden, table, scales))
        for name in reversed(native_module().embedding_logits_variants())
    ]
    for candidate in candidates:
        prove_ends(candidate, hidden, table, scales)
    words = table.view(-1).view(torch.int64)
    candidates.append(Candidate("read", lambda: words.sum()))
    if dtype == torch.float32:
        candidates.append(Candidate("torch", lambda: hidden @ table.T))
    for candidate in candidates:
        candidate.run()
    return candidates, table.nbytes


def variant(
    name: str, hidden: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None
) -> Callable[[], torch.Tensor]:
    """The op by one kernel variant."""

    def multiply() -> torch.Tensor:
        native_module().embedding_logits_use_variant(name)
        return embedding_logits.logits(hidden, table, scales)

    return multiply


def prove_ends(candidate: Candidate, hidden: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Hold the first and last rows' logits against float64."""
    logits = candidate.run()
    assert isinstance(logits, torch.Tensor)
    for part in (slice(PROVED_ROWS), slice(-PROVED_ROWS, None)):
        expected = embedding_logits.reference(hidden, table[part], None if scales is None else scales[part])
        prove(candidate.name, relative_l2(logits[:, part], expected), tolerance("op_fp32"))


def lines(row: Row) -> list[str]:
    """The row as a table."""
    text = [f"\n{row['dtype']}, {row['table_bytes'] / 1e6:.0f} MB"]
    for one in row["candidates"]:
        rate = row["table_bytes"] / one["median_ms"] / 1e6
        text.append(
            f"  {one['name']:<10} {one['median_ms']:8.2f} ms, {rate:5.1f} GB/s, x{one['speed_by_median']:.2f}, "
            f"CPU {one['cpu_median_ms']:8.2f} ms"
        )
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "embedding_logits.json")
    parser.add_argument("--fresh", action="store_true", help="measure every row anew")
    values = parser.parse_args(arguments)
    plan = Plan(values.vocab, values.hidden, values.threads, values.repeats)
    command = " ".join(["python", "bench/ops/embedding_logits.py", *(arguments or sys.argv[1:])])
    results = ResultFile(values.output, command, dataclasses.asdict(plan), fresh=values.fresh)
    try:
        run(plan, results)
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print(f"\nwrote {values.output}")


if __name__ == "__main__":
    main()
