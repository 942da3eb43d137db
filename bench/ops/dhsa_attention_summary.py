"""What the attention benchmark's rows say: a table per row, and figures over the whole grid. Reads results alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from bench.harness import Row, geometric_mean


@dataclasses.dataclass(frozen=True)
class SparseFigures:
    """One budget of one prefill row. Times are medians; `minima` says the same of the fastest samples."""

    length: int
    head_dim: int
    group: int
    budget: int
    density: float  # realised, attended pairs / causal pairs
    efficiency: float  # dense time x density / sparse time
    efficiency_minima: float
    selection_share: float  # of the sparse time
    speed_against_dense: float
    speed_against_torch: float | None
    speed_against_torch_minima: float | None


def candidate(row: Row, **values: Any) -> dict[str, Any] | None:
    """The row's candidate with these facts."""
    return next((one for one in row["candidates"] if all(one.get(k) == v for k, v in values.items())), None)


def sparse_figures(row: Row) -> list[SparseFigures]:
    """One per budget of a prefill row."""
    dense, torch = candidate(row, role="dense"), candidate(row, peer="torch")
    figures = []
    for one in row["candidates"]:
        if one.get("role") != "sparse" or dense is None:
            continue
        selection = candidate(row, role="selection", budget=one["budget"])
        floor = candidate(row, role="selection_floor", budget=one["budget"])
        spent = 0.0 if selection is None or floor is None else max(0.0, selection["median_ms"] - floor["median_ms"])
        figures.append(
            SparseFigures(
                length=row["length"],
                head_dim=row["head_dim"],
                group=row["group"],
                budget=one["budget"],
                density=one["density"],
                efficiency=dense["median_ms"] * one["density"] / one["median_ms"],
                efficiency_minima=dense["minimum_ms"] * one["density"] / one["minimum_ms"],
                selection_share=spent / one["median_ms"],
                speed_against_dense=dense["median_ms"] / one["median_ms"],
                speed_against_torch=None if torch is None else torch["median_ms"] / one["median_ms"],
                speed_against_torch_minima=None if torch is None else torch["minimum_ms"] / one["minimum_ms"],
            )
        )
    return figures


def dense_speed(row: Row, peer: str, measure: str = "median_ms") -> float | None:
    """How many times faster edgerun's dense attention is than a peer; None where either was not measured."""
    dense, other = candidate(row, role="dense"), candidate(row, peer=peer)
    return None if dense is None or other is None else float(other[measure] / dense[measure])


def gemm_share(row: Row) -> float | None:
    """Dense attention's rate (causal operations per second) over the GEMM rate of the same row, by medians."""
    dense, gemm = candidate(row, role="dense"), candidate(row, role="gemm")
    if dense is None or gemm is None:
        return None
    return float(row["causal_flops"] / dense["median_ms"] / (gemm["flops"] / gemm["median_ms"]))


def row_lines(row: Row) -> Iterator[str]:
    """The row as a table: one line per candidate, ratios against its first."""
    sizes = f"D {row['head_dim']}, GQA {row['group']}"
    if row["kind"] == "growth":
        yield f"\ngrowth of {row['phase']}, {sizes}, budget {row['budget']}"
    else:
        extra = f", budget {row['budget']}, {row['kv_dtype']} cache" if row["kind"] == "decode" else ""
        load = f"load average {row['load_average_at_start']:.1f}"
        yield f"\n{row['kind']}, {row['length']} tokens, {sizes}{extra}; {load}"
    for one in row["candidates"]:
        times = f"{one['median_ms']:9.2f} ms ± {one['spread_ms']:7.2f}, minimum {one['minimum_ms']:9.2f}"
        ratios = f"x{one['speed_by_median']:6.2f} (minima x{one['speed_by_minimum']:6.2f})"
        yield f"  {one['name']:<32} {times}   {ratios}{_extra(row, one)}"
    for figures in sparse_figures(row) if row["kind"] == "prefill" else []:
        yield (
            f"  budget {figures.budget:>4}: density {figures.density:.3f}, efficiency {figures.efficiency:.3f} "
            f"(minima {figures.efficiency_minima:.3f}), selection {100 * figures.selection_share:.1f} % of the time"
        )


def _extra(row: Row, one: dict[str, Any]) -> str:
    if one.get("role") == "gemm":
        return f"   {one['flops'] / one['median_ms'] / 1e6:.0f} GFLOP/s"
    if row["kind"] == "prefill" and one.get("role") in ("peer", "dense", "variant"):
        text = f"   {row['causal_flops'] / one['median_ms'] / 1e6:.0f} GFLOP/s"
        share = gemm_share(row) if one["role"] == "dense" else None
        return text if share is None else f"{text}, {100 * share:.0f} % of GEMM"
    if "cache_bytes" in one:
        return f"   cache {one['cache_bytes'] / 2**20:.1f} MiB"
    return ""


def summary_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Geometric means and extremes over the grid: the figures that are quoted."""
    prefill = [row for row in rows if row["kind"] == "prefill"]
    if prefill:
        yield "\ndense, edgerun against"
        peers = dict.fromkeys(one["peer"] for row in prefill for one in row["candidates"] if "peer" in one)
        for peer in peers:
            yield f"  {peer:<16} {_spread([(dense_speed(row, peer), row) for row in prefill])}"
            minima = [dense_speed(row, peer, "minimum_ms") for row in prefill]
            mean = geometric_mean(value for value in minima if value is not None)
            yield f"  {'':<16} by minima: geometric mean x{mean or 0:.2f}"
        yield f"  {'share of GEMM':<16} {_spread([(gemm_share(row), row) for row in prefill])}"
        yield from _sparse_lines([figures for row in prefill for figures in sparse_figures(row)])
    for row in rows:
        if row["kind"] == "decode":
            yield from _decode_lines(row)
        elif row["kind"] == "growth":
            long, short = row["candidates"][:2]
            yield (
                f"growth of {row['phase']}, D {row['head_dim']}, GQA {row['group']}: {short['length']} -> "
                f"{long['length']} tokens x{long['median_ms'] / short['median_ms']:.2f} "
                f"(minima x{long['minimum_ms'] / short['minimum_ms']:.2f})"
            )


def _spread(values: list[tuple[float | None, Row]]) -> str:
    known = [(value, row) for value, row in values if value is not None]
    if not known:
        return "not measured"
    low, row = min(known, key=lambda pair: pair[0])
    where = f"{row['length']} tokens, D {row['head_dim']}, GQA {row['group']}"
    return (
        f"geometric mean {geometric_mean(value for value, _ in known) or 0:.2f}, lowest {low:.2f} ({where}), "
        f"highest {max(value for value, _ in known):.2f}, {len(known)} cases"
    )


def _sparse_lines(figures: list[SparseFigures]) -> Iterator[str]:
    for budget in sorted({one.budget for one in figures}, reverse=True):
        for group in sorted({one.group for one in figures}, reverse=True):
            yield f"sparse, budget {budget}, GQA {group}: by length, mean over head dimensions"
            for length in sorted({one.length for one in figures}):
                some = [one for one in figures if (one.budget, one.group, one.length) == (budget, group, length)]
                if not some:
                    continue
                torch = geometric_mean(one.speed_against_torch for one in some if one.speed_against_torch is not None)
                density = geometric_mean(one.density for one in some) or 0
                efficiency = geometric_mean(one.efficiency for one in some) or 0
                against = "–" if torch is None else f"x{torch:.2f}"
                yield (
                    f"  {length:>6}: density {density:.3f}, efficiency {efficiency:.3f} (lowest "
                    f"{min(one.efficiency for one in some):.3f}), selection at most "
                    f"{100 * max(one.selection_share for one in some):.1f} %, against torch SDPA {against}"
                )


def _decode_lines(row: Row) -> Iterator[str]:
    kv_dtype = row["kv_dtype"]
    dense, sparse = (candidate(row, role=role, kv_dtype=kv_dtype) for role in ("dense", "sparse"))
    full = candidate(row, role="sparse", kv_dtype="fp32")
    if dense is None or sparse is None or full is None:
        return
    line = (
        f"decode after {row['length']} tokens, D {row['head_dim']}, GQA {row['group']}, {kv_dtype} cache: "
        f"x{dense['median_ms'] / sparse['median_ms']:.2f} against dense "
        f"(minima x{dense['minimum_ms'] / sparse['minimum_ms']:.2f})"
    )
    if kv_dtype != "fp32":
        line += (
            f"; {sparse['cache_bytes'] / full['cache_bytes']:.3f} of fp32's bytes, "
            f"{sparse['median_ms'] / full['median_ms']:.2f} of its time"
        )
    kept = [one for one in row["candidates"] if one.get("role") == "keeping"]
    for one in kept:
        line += f"; x{dense['median_ms'] / one['median_ms']:.2f} selecting every {one['reselect']} tokens"
    yield line
