"""Times the native dhsa_attention on this CPU: dense against torch SDPA, and sparse against itself dense.

Proves the answer of every candidate first, then runs all candidates of a row in turn, so that whatever else the machine
does falls on all of them. Per row: median, minimum and spread of wall time, CPU time, and ratios of medians and minima
against the row's baseline in the same run.

    python bench/ops/dhsa_attention.py [--threads 2] [--repeats 9] [--output bench/results/dhsa_attention_portable.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from edgerun.compare import relative_l2, tolerance
from edgerun.machine import this_machine
from edgerun.ops import dhsa_attention as op
from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState
from edgerun.ops.native import native_module

QUERY_HEADS, HEAD_DIM = 8, 128
DENSE_LENGTHS = (1024, 2048, 4096)
SPARSE_LENGTH = 8192
BUDGETS = (512, 1024, 2048)


@dataclasses.dataclass
class Samples:
    """One candidate of one row: what was run, and every measurement of it."""

    row: str
    candidate: str
    wall_ms: list[float]
    cpu_ms: list[float]
    density: float | None = None  # realised: attended pairs / causal pairs


@dataclasses.dataclass(frozen=True)
class Case:
    """One sequence of random tokens on `kv_heads` KV heads. Random data says nothing of the quality of a selection."""

    length: int
    kv_heads: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @staticmethod
    def make(length: int, kv_heads: int) -> Case:
        generator = torch.Generator().manual_seed(length + kv_heads)
        query = torch.randn(1, QUERY_HEADS, length, HEAD_DIM, generator=generator)
        key, value = torch.randn(2, 1, kv_heads, length, HEAD_DIM, generator=generator)
        return Case(length, kv_heads, query, key, value)

    def torch_dense(self) -> torch.Tensor:
        """[1, Hq, S, D], grouped heads the way torch offers."""
        return torch.nn.functional.scaled_dot_product_attention(
            self.query, self.key, self.value, is_causal=True, enable_gqa=self.kv_heads != QUERY_HEADS
        )

    def native(self, options: AttentionOptions) -> tuple[Callable[[], torch.Tensor], Callable[[], float]]:
        """A call of the native op on an empty cache, and the realised density of its last run."""
        state = AttentionState.allocate(self.kv_heads, HEAD_DIM, self.length, options)
        start = torch.tensor([0])
        density = [0.0]

        def run() -> torch.Tensor:
            with op.count_attention() as counters:
                result = op.attend(self.query, self.key, self.value, state, start, options)
            density[0] = counters.density or 0.0
            return result

        return run, lambda: density[0]


def with_variant(name: str, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def chosen() -> torch.Tensor:
        native_module().dhsa_use_variant(name)
        return run()

    return chosen


def prove(name: str, measured: torch.Tensor, expected: torch.Tensor) -> None:
    error = relative_l2(measured.numpy(), expected.numpy())
    if error > tolerance("op_fp32"):
        sys.exit(f"{name}: relative L2 error {error:.2e} is above {tolerance('op_fp32'):.2e}; nothing was timed")


def measure(row: str, candidates: dict[str, Callable[[], torch.Tensor]], repeats: int) -> list[Samples]:
    """Runs all candidates `repeats` times in turn after one round that is not counted."""
    samples = {name: Samples(row, name, [], []) for name in candidates}
    for repeat in range(repeats + 1):
        for name, run in candidates.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if repeat > 0:
                samples[name].wall_ms.append((time.perf_counter() - wall) * 1e3)
                samples[name].cpu_ms.append((time.process_time() - cpu) * 1e3)
    return list(samples.values())


def dense_rows(repeats: int) -> Iterator[list[Samples]]:
    """torch SDPA first (the baseline), then every kernel variant of this CPU."""
    for kv_heads in (QUERY_HEADS, QUERY_HEADS // 4):
        for length in DENSE_LENGTHS:
            case = Case.make(length, kv_heads)
            run, _ = case.native(AttentionOptions(scale=HEAD_DIM**-0.5))
            candidates: dict[str, Callable[[], torch.Tensor]] = {"torch SDPA": case.torch_dense}
            for name in native_module().dhsa_variants():
                candidates[name] = with_variant(name, run)
                prove(name, candidates[name](), case.torch_dense().transpose(1, 2))
            yield measure(f"dense, {length} tokens, GQA {QUERY_HEADS // kv_heads}", candidates, repeats)


def sparse_rows(repeats: int) -> Iterator[list[Samples]]:
    """Native dense first (the baseline), then budgets, all with the fastest variant; selection included."""
    best = native_module().dhsa_variants()[0]
    native_module().dhsa_use_variant(best)
    for kv_heads in (QUERY_HEADS, QUERY_HEADS // 4):
        case = Case.make(SPARSE_LENGTH, kv_heads)
        candidates = {f"{best} dense": case.native(AttentionOptions(scale=HEAD_DIM**-0.5))[0]}
        densities = {}
        for budget in BUDGETS:
            options = AttentionOptions(scale=HEAD_DIM**-0.5, budget=budget, finds_boundaries=True)
            name = f"{best} budget {budget}"
            candidates[name], densities[name] = case.native(options)
            prove_sparse(name, case, candidates[name](), options)
        rows = measure(f"sparse, {SPARSE_LENGTH} tokens, GQA {QUERY_HEADS // kv_heads}", candidates, repeats)
        for samples in rows:
            samples.density = densities[samples.candidate]() if samples.candidate in densities else None
        yield rows


def prove_sparse(name: str, case: Case, measured: torch.Tensor, options: AttentionOptions) -> None:
    """The last tile of the first KV head against float64 over the list that the op selected for it."""
    state = AttentionState.allocate(case.kv_heads, HEAD_DIM, case.length, options)
    op.attend(case.query, case.key, case.value, state, torch.tensor([0]), options)
    blocks = torch.tensor(op.native_lists(case.query, state, 0, options)[0][-1])
    tokens = (blocks[:, None] * 16 + torch.arange(16)).flatten()
    rows = torch.arange(case.length - options.tile, case.length)
    key, value = case.key[0, 0, tokens].double(), case.value[0, 0, tokens].double()
    scores = options.scale * case.query[0, 0, rows].double() @ key.T
    scores = scores.masked_fill(tokens[None, :] > rows[:, None], float("-inf"))
    prove(name, measured[0, rows, 0], scores.softmax(-1) @ value)


def table(rows: list[Samples]) -> Iterator[str]:
    """One line per candidate; the first of a row is its baseline."""
    base = rows[0]
    yield f"\n{base.row}"
    for samples in rows:
        median, spread = statistics.median(samples.wall_ms), statistics.pstdev(samples.wall_ms)
        ratio = statistics.median(base.wall_ms) / median
        ratio_minimum = min(base.wall_ms) / min(samples.wall_ms)
        ratio_cpu = min(base.cpu_ms) / min(samples.cpu_ms)
        density = "" if samples.density is None else f"   density {samples.density:.3f}"
        yield (
            f"  {samples.candidate:<20} {median:8.1f} ms ± {spread:6.1f}, minimum {min(samples.wall_ms):8.1f}   "
            f"speed x{ratio:5.2f} (minima x{ratio_minimum:5.2f}, CPU x{ratio_cpu:5.2f}){density}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write raw samples as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    print(f"{QUERY_HEADS} query heads x {HEAD_DIM}, float32, {arguments.threads} threads; load average {load:.1f}")
    results: list[Samples] = []
    for rows in (*dense_rows(arguments.repeats), *sparse_rows(arguments.repeats)):
        print("\n".join(table(rows)), flush=True)
        results += rows
    if arguments.output is not None:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        report = {
            "command": " ".join(["python", *sys.argv]),
            "commit": commit,
            "machine": dataclasses.asdict(this_machine()),
            "threads": arguments.threads,
            "load_average_at_start": load,
            "note": "candidates of a row ran in turn; where the load average exceeds the threads, other work shared "
            "the cores, so compare ratios, not milliseconds",
            "samples": [dataclasses.asdict(samples) for samples in results],
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
