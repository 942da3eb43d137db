"""Block loading: how much of loading hides behind executing, and how well the formula for it holds.

    python bench/workloads/block_loading.py --work FOLDER

A chain of random programs (12 of 40 MB) runs again and again on one thread, its files evicted from the page cache
before every pass, which counts as the pass's time. For each number of tokens, which sets how long a block executes,
three candidates do the same work in turn: one block after another (`prefetch_0`), and with 1 and 2 blocks loaded ahead,
within a budget that keeps d blocks in memory. Before a row is timed, all must give the same answer bit for bit.
Reported are the hidden share h, of loads alone and with what unloading costs, and the milliseconds gained a pass
against the formula for them (streaming_formula.py), with l and e of one block as the row's `prefetch_0` has them.

Alpha, what loading and executing take from each other, is solved from the row without resident blocks (d = 0), which
therefore checks nothing of the formula. Rows with resident blocks take it from there: the formula predicts, and fails
where the prediction is off by more than 0.15 of a pass in turn.

The exit status is 1 unless that holds, h is at least 0.7 in a row whose load and execute differ by at most 2 times, and
h is below 0.1 in every row without prefetch; a table says which. Nothing is measured where the folder's files stay in
the page cache, as on tmpfs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shlex
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, Candidate, Effort, ResultFile, Row, measure
from bench.workloads.checks import Check, bounded, require
from bench.workloads.page_cache import cached_bytes, evict
from bench.workloads.streaming_formula import gain_ms, hidden_share, solve_alpha_ms
from edgerun import _native
from edgerun.errors import EdgerunError, ParityError

WIDTH = 1024
MAX_TOKENS = 512
PREFETCH = (0, 1, 2)
RATIOS = (1.0, 2.0, 0.5)  # of load to execute, roughly; the number of tokens is chosen for it
SPARE_BLOCKS = 0.5  # that a budget has room for: what activations take is measured, and not the same each time
HIDDEN_AT_LEAST, HIDDEN_IN_TURN_BELOW = 0.7, 0.1
FORMULA_WITHIN = 0.15  # of a pass in turn
CACHED_SHARE = 0.05  # of the files' bytes, more than which must not be left after evicting them


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: the settings that a result file belongs to."""

    blocks: int
    megabytes: int
    passes: int  # in one sample
    repeats: int


class _Block(nn.Module):
    """A feed-forward layer that is nearly all weights."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        hidden = megabytes * 1_000_000 // (2 * 4 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.down(torch.nn.functional.silu(self.up(x))))


def make_chain(plan: Plan, work: pathlib.Path) -> list[pathlib.Path]:
    """The programs, made in `work` when they are not there."""
    from edgerun.export.lower.executorch import lower

    paths = [work / f"block_{plan.megabytes}mb_{index}.pte" for index in range(plan.blocks)]
    rows = torch.export.Dim("rows", min=1, max=MAX_TOKENS)
    for index, path in enumerate(paths):
        if path.is_file():
            continue
        torch.manual_seed(index)
        module = _Block(plan.megabytes).eval().requires_grad_(False)
        print(f"making {path.name}", flush=True)
        partial = path.with_suffix(".partial")
        lower(torch.export.export(module, (torch.randn(8, WIDTH),), dynamic_shapes=({0: rows},)), partial, {})
        partial.replace(path)
    return paths


class Runner:
    """One candidate: the chain with so many blocks ahead. Every sample is some passes, and their sums."""

    def __init__(self, plan: Plan, paths: list[pathlib.Path], prefetch: int, budget: int, x: np.ndarray) -> None:
        self.plan, self.paths, self.x = plan, paths, x
        programs = [(path.stem, str(path), path.stat().st_size, ["x"], ["x"]) for path in paths]
        self.loader = _native.BlockLoader(programs, prefetch, budget, threads=1)
        self.samples: list[dict[str, Any]] = []
        self.loader.set("x", x)
        assumed = self.loader.activation_bytes
        self.loader.run(True)  # measures the blocks
        self.activation_bytes = max(assumed, self.loader.activation_bytes)
        self.answer = self.loader.get("x")
        self.facts: dict[str, Any] = {"prefetch_asked": prefetch, "budget_bytes": budget}

    def __call__(self) -> None:
        before = len(self.loader.passes())
        evict(self.paths)
        cached = cached_bytes(self.paths) / sum(path.stat().st_size for path in self.paths)
        if cached > CACHED_SHARE:
            raise EdgerunError(f"the page cache keeps {cached:.2f} of the files: give --work on a disk, not in memory")
        start = time.perf_counter()
        for _ in range(self.plan.passes):
            evict(self.paths)
            self.loader.set("x", self.x)
            self.loader.run(True)
        wall = (time.perf_counter() - start) * 1e3
        used = -1
        while used != self.loader.used_bytes:  # what is being loaded ahead must not disturb the next candidate
            used = self.loader.used_bytes
            time.sleep(0.2)
        passes = self.loader.passes()[before:]
        sums = {name: sum(one[f"{name}_ms"] for one in passes) for name in ("load", "unload", "execute")}
        load, unload, execute = sums.values()
        self.samples.append(
            {
                "load_ms": load / self.plan.passes,
                "unload_ms": unload / self.plan.passes,
                "execute_ms": execute / self.plan.passes,
                "wall_ms": wall / self.plan.passes,
                "loads": sum(one["loads"] for one in passes) / self.plan.passes,
                "hidden_share": hidden_share(load, execute, wall),
                "hidden_share_with_unload": hidden_share(load + unload, execute, wall),
                "cached_share_before": cached,
            }
        )
        middle = {name: statistics.median(one[name] for one in self.samples) for name in self.samples[0]}
        last = passes[-1]
        self.facts |= {
            "resident_blocks": last["resident_blocks"],
            "prefetch": last["prefetch"],
            "peak_bytes": max(one["peak_bytes"] for one in self.loader.passes()),
            "load_of_a_block_ms": (middle["load_ms"] + middle["unload_ms"]) / middle["loads"],
            "execute_of_a_block_ms": middle["execute_ms"] / self.plan.blocks,
            "a_pass": middle,
            "samples": self.samples,
        }


def budget_of(plan: Plan, costs: list[dict[str, Any]], activation: int, resident: int, prefetch: int) -> int:
    """Bytes that keep `resident` blocks and let the others stream with `prefetch` of them ahead."""
    loaded = max(one["loaded_bytes"] for one in costs)
    loading = max(one["loading_bytes"] for one in costs)
    return int((resident + SPARE_BLOCKS) * loaded + prefetch * (loaded + activation) + loading + activation)


def measure_row(plan: Plan, paths: list[pathlib.Path], key: Row, alpha_ms: dict[str, float]) -> Row:
    """All candidates of one number of tokens and of resident blocks. alpha_ms is filled where none are resident."""
    tokens, resident = key["tokens"], key["resident"]
    x = np.random.default_rng(0).normal(size=(tokens, WIDTH)).astype(np.float32)
    probe = Runner(plan, paths, 0, 1 << 40, x)
    costs, activation = probe.loader.blocks(), probe.activation_bytes
    del probe
    runners = {
        prefetch: Runner(plan, paths, prefetch, budget_of(plan, costs, activation, resident, prefetch), x)
        for prefetch in PREFETCH
    }
    for prefetch, runner in runners.items():
        if not (runner.answer == runners[0].answer).all():
            raise ParityError(f"prefetch {prefetch} changes the answer; nothing of this row was timed")
        runner()  # warms up
        runner.samples.clear()
        if runner.facts["resident_blocks"] != resident or runner.facts["prefetch"] != prefetch:
            kept = f"{runner.facts['resident_blocks']} blocks and loads {runner.facts['prefetch']} ahead"
            raise EdgerunError(f"the budget keeps {kept}; {resident} and {prefetch} were meant: give more --blocks")
    load = os.getloadavg()[0]
    candidates = [Candidate(f"prefetch_{prefetch}", runner, runner.facts) for prefetch, runner in runners.items()]
    measured = measure(candidates, Effort(repeats=plan.repeats, row_seconds=90))
    alone = measured[0]
    blocks, at = plan.blocks, str(tokens)
    l_ms, e_ms = alone["load_of_a_block_ms"], alone["execute_of_a_block_ms"]
    in_turn = blocks * (l_ms + e_ms)
    for one in measured[1:]:
        gained = in_turn - one["a_pass"]["wall_ms"]
        one["gained_ms"] = gained
        if resident == 0:
            alpha_ms[f"{at}/{one['name']}"] = solve_alpha_ms(blocks, resident, l_ms, e_ms, gained)
        one["alpha_ms"] = alpha_ms[f"{at}/{one['name']}"]
        if resident > 0:
            one["formula_ms"] = gain_ms(blocks, resident, l_ms, e_ms, one["alpha_ms"])
            one["formula_off_share"] = abs(gained - one["formula_ms"]) / in_turn
    a_pass = alone["a_pass"]
    ratio = a_pass["load_ms"] / a_pass["loads"] / e_ms
    shares = {"load_over_execute": ratio, "in_turn_ms": in_turn}
    return {**key, **shares, "load_average_at_start": load, "candidates": measured}


def choose_tokens(plan: Plan, paths: list[pathlib.Path]) -> list[int]:
    """Numbers of tokens at which loading takes about RATIOS times as long as executing."""
    x = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
    probe = Runner(plan, paths, 0, 1 << 40, x)
    runner = Runner(plan, paths, 0, budget_of(plan, probe.loader.blocks(), probe.activation_bytes, 0, 0), x)
    runner()
    even = 64 * runner.facts["load_of_a_block_ms"] / runner.facts["execute_of_a_block_ms"]
    return [min(MAX_TOKENS, max(8, round(even / ratio / 8) * 8)) for ratio in RATIOS]


def run(plan: Plan, work: pathlib.Path, results: ResultFile, tokens: list[int]) -> None:
    """Measure every row that the results lack. Raises ParityError when a candidate's answer differs."""
    paths = make_chain(plan, work)
    numbers = tokens or [row["tokens"] for row in results.rows if row["resident"] == 0] or choose_tokens(plan, paths)
    alpha_ms: dict[str, float] = {}
    for row in results.rows:
        if row["resident"] == 0:
            alpha_ms |= {f"{row['tokens']}/{one['name']}": one["alpha_ms"] for one in row["candidates"][1:]}
    for number in numbers:
        for resident in (0, plan.blocks // 2):  # in turn with the row that alpha is from
            key = {"kind": "block_loading", "tokens": number, "resident": resident}
            row = results.find(key)
            if row is None:
                row = measure_row(plan, paths, key, alpha_ms)
                results.add(row)
            print("\n".join(lines(row)), flush=True)


def lines(row: Row) -> list[str]:
    """The row as a table."""
    text = [
        f"\n{row['tokens']} tokens, {row['resident']} blocks resident: a load takes "
        f"{row['load_over_execute']:.2f} times an execution, one after another {row['in_turn_ms']:.0f} ms a pass"
    ]
    for one in row["candidates"]:
        formula = ""
        if "alpha_ms" in one:
            formula = f", gains {one['gained_ms']:6.1f} ms, alpha {one['alpha_ms']:6.1f}"
        if "formula_ms" in one:
            formula += f", formula {one['formula_ms']:6.1f}: off by {one['formula_off_share']:.2f} of a pass in turn"
        a_pass = one["a_pass"]
        text.append(
            f"  {one['name']}  l {one['load_of_a_block_ms']:6.1f}  e {one['execute_of_a_block_ms']:6.1f}  "
            f"pass {a_pass['wall_ms']:7.1f} ms  h {a_pass['hidden_share']:5.2f} "
            f"({a_pass['hidden_share_with_unload']:5.2f} with unloading)  "
            f"peak {one['peak_bytes'] / 2**20:4.0f} MiB{formula}"
        )
    return text


def checks(rows: list[Row]) -> list[Check]:
    """What must hold of the rows."""
    ahead: list[float] = []
    found: list[Check] = []
    for row in rows:
        name = f"{row['tokens']} tokens, {row['resident']} resident"
        for one in row["candidates"]:
            hidden = one["a_pass"]["hidden_share"]
            if one["name"] == "prefetch_0":
                found.append(bounded(f"{name}, prefetch_0: h", hidden, "<", HIDDEN_IN_TURN_BELOW))
                continue
            if row["resident"] > 0:
                off = one["formula_off_share"]
                found.append(bounded(f"{name}, {one['name']}: formula off by", off, "<=", FORMULA_WITHIN))
            elif 0.5 <= row["load_over_execute"] <= 2.0:
                ahead.append(hidden)
    best = bounded("h where a load takes 0.5 to 2 executions", max(ahead, default=None), ">=", HIDDEN_AT_LEAST)
    if not any(row["resident"] > 0 for row in rows):
        found.append(Check("rows with resident blocks", "none", "at least one", False))
    return [best, *found]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="a folder on a disk, for the programs")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--megabytes", type=int, default=40, help="of a block's weights")
    parser.add_argument("--passes", type=int, default=2, help="in one sample")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", nargs="+", type=int, default=[], help="instead of numbers that are chosen")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "block_loading.json")
    parser.add_argument("--fresh", action="store_true", help="measure every row anew")
    values = parser.parse_args(arguments)
    plan = Plan(values.blocks, values.megabytes, values.passes, values.repeats)
    values.work.mkdir(parents=True, exist_ok=True)
    said = shlex.join(arguments or sys.argv[1:]).replace(shlex.quote(str(values.work)), "FOLDER")
    command = f"python bench/workloads/block_loading.py {said}"
    results = ResultFile(values.output, command, dataclasses.asdict(plan), fresh=values.fresh)
    try:
        run(plan, values.work, results, values.tokens)
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print(f"\nwrote {values.output}")
    require(checks(results.rows))


if __name__ == "__main__":
    main()
