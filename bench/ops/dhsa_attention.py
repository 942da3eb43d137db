"""Times the native dhsa_attention on this CPU: dense and sparse prefill against peers, decode, and growth with length.

Every candidate of a row proves its answer first; a wrong one ends the run before anything of its row is timed. Then all
run in turn. Rows go to the result file one by one, and the same command goes on after a stop.

    python bench/ops/dhsa_attention.py --grid reduced [--output bench/results/dhsa_attention_reduced.json]
    python bench/ops/dhsa_attention.py --grid full    [--output bench/results/dhsa_attention.json]
    python bench/ops/dhsa_attention.py --show bench/results/dhsa_attention.json

bench/README.md explains the rows and columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Before torch is imported: threads of OpenMP that wait busily would take time from the candidates after them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, Candidate, Effort, ResultFile, Row, measure
from bench.ops.dhsa_attention_cases import (
    Decode,
    Native,
    decode_pair,
    keeping_selections,
    native_candidate,
    prove_dense,
    prove_same,
    prove_sparse,
    with_variant,
)
from bench.ops.dhsa_attention_summary import row_lines, summary_lines
from bench.peers.interface import PEERS, AttentionCase, open_peer
from edgerun.compare import tolerance
from edgerun.errors import EdgerunError
from edgerun.library_noise import quiet_libraries
from edgerun.ops.dhsa_attention import Selector
from edgerun.ops.native import native_module

GEMM_SIZE = 2048  # a square product of this size is what "the GEMM rate" means
KINDS = ("prefill", "decode", "growth")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: the settings that a result file belongs to."""

    kinds: tuple[str, ...] = KINDS
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    head_dims: tuple[int, ...] = (64, 128, 256)
    groups: tuple[int, ...] = (4, 1)  # query heads per KV head
    query_heads: int = 8
    budgets: tuple[int, ...] = (2048, 1024, 512)
    peers: tuple[str, ...] = ("torch", "custom_sdpa", "onnxruntime")
    # Longest sequence that a peer is measured at; None: every length.
    custom_sdpa_length: int | None = 8192
    onnxruntime_length: int | None = None
    llama_cpp_length: int | None = 8192
    all_variants: bool = False
    decode_length: int = 32768  # cached tokens
    decode_repeats: int = 51
    growth_lengths: tuple[int, int] = (16384, 32768)
    kv_dtypes: tuple[str, ...] = ("fp32",)
    reselects: tuple[int, ...] = (4, 16)  # tokens of decode that one selection serves, besides 1
    threads: int = 2
    effort: Effort = dataclasses.field(default_factory=Effort)

    def peers_at(self, length: int) -> tuple[str, ...]:
        """The peers that are measured at this length."""
        limits = {
            "custom_sdpa": self.custom_sdpa_length,
            "onnxruntime": self.onnxruntime_length,
            "llama_cpp": self.llama_cpp_length,
            "llama_cpp_flash": self.llama_cpp_length,
        }
        return tuple(peer for peer in self.peers if length <= (limits.get(peer) or length))


GRIDS = {
    "full": Plan(kv_dtypes=("fp32", "fp16", "int8"), effort=Effort(repeats=7, row_seconds=60.0, least=2)),
    # At most ten minutes on two cores.
    "reduced": Plan(
        lengths=(2048, 8192, 32768),
        head_dims=(128,),
        onnxruntime_length=8192,
        effort=Effort(repeats=7, row_seconds=45.0, least=2),
    ),
}
_PER_GRID = {"full": "dhsa_attention.json", "reduced": "dhsa_attention_reduced.json"}


def run(plan: Plan, results: ResultFile, say: Callable[[str], None]) -> None:
    """Measure every row of the plan that the results lack. Raises ParityError for a candidate whose answer is wrong."""
    torch.set_num_threads(plan.threads)
    steps = {"prefill": prefill_rows, "decode": decode_rows, "growth": growth_rows}
    for kind in plan.kinds:
        for key, candidates_of in steps[kind](plan):
            row = results.find(key)
            if row is None:
                load = os.getloadavg()[0]
                effort = plan.effort
                if kind == "decode" or key.get("phase") == "decode":
                    effort = dataclasses.replace(
                        effort, repeats=plan.decode_repeats, least=min(plan.decode_repeats, 15)
                    )
                try:
                    candidates, facts = candidates_of()
                except EdgerunError as error:
                    if key.get("kv_dtype", "fp32") == "fp32" or not str(error).endswith("left out"):
                        raise
                    say(f"\n{error}")
                    continue
                row = {**key, **facts, "load_average_at_start": load, "candidates": measure(candidates, effort)}
                results.add(row)
            say("\n".join(row_lines(row)))


Rows = Iterator[tuple[dict[str, Any], Callable[[], tuple[list[Candidate], dict[str, Any]]]]]


def prefill_rows(plan: Plan) -> Rows:
    """One row per length, head dimension and group: peers and dense first, then every budget below the length."""
    for length in plan.lengths:
        for head_dim in plan.head_dims:
            for group in plan.groups:
                key = {"kind": "prefill", "length": length, "head_dim": head_dim, "group": group}
                yield key, functools.partial(prefill, plan, length, head_dim, group)


def prefill(plan: Plan, length: int, head_dim: int, group: int) -> tuple[list[Candidate], dict[str, Any]]:
    """The proven candidates of one prefill row; the first is torch SDPA where it is among the peers."""
    case = AttentionCase.make(length, head_dim, plan.query_heads, plan.query_heads // group)
    dense = Native.make(case, 0)
    dense_answer = dense.run()
    dense_error = prove_dense("edgerun dense", case, dense_answer)
    candidates = list(peer_candidates(plan, case, dense_answer))
    candidates.append(native_candidate("edgerun dense", dense))
    candidates[-1].facts |= {"variant": native_module().dhsa_variants()[0], "relative_l2": dense_error}
    if plan.all_variants:
        for variant in native_module().dhsa_variants()[1:]:
            other = native_candidate(f"edgerun dense, {variant}", dense, with_variant(variant, dense.run))
            answer = other.run()
            assert isinstance(answer, torch.Tensor)
            other.facts.update(role="variant", variant=variant, relative_l2=prove_dense(other.name, case, answer))
            candidates.append(other)
    del dense_answer
    for budget in plan.budgets:
        if budget < length:
            candidates += sparse_candidates(case, budget, plan.threads)
    candidates.append(gemm_candidate(min(GEMM_SIZE, length)))
    return candidates, {"causal_flops": case.causal_flops}


def peer_candidates(plan: Plan, case: AttentionCase, proven: torch.Tensor) -> Iterator[Candidate]:
    """Every peer that is measured at this length, each held against float64 and, as a whole, against our answer."""
    for option in plan.peers_at(case.length):
        peer = open_peer(option)
        prepared = peer.prepare(case, plan.threads)
        answer = prepared.answer(prepared.run())
        limit = getattr(peer, "TOLERANCE", "op_fp32")
        error = prove_dense(peer.NAME, case, answer, tolerance(limit))
        prove_same(peer.NAME, answer, proven, tolerance(limit))
        yield Candidate(peer.NAME, prepared.run, {"role": "peer", "peer": option, "relative_l2": error})


def sparse_candidates(case: AttentionCase, budget: int, threads: int) -> Iterator[Candidate]:
    """The op at one budget, its selection alone, and what of that is only the making of Python lists."""
    native = Native.make(case, budget)
    error = prove_sparse(f"edgerun budget {budget}", native, native.run())
    facts = {"budget": budget, "density": native.counters[0], "relative_l2": error}
    sparse = native_candidate(f"edgerun budget {budget}", native)
    sparse.facts |= facts
    yield sparse
    for role, selector in (("selection", Selector.CHUNK), ("selection_floor", Selector.RECENT)):
        name = f"{'selection' if role == 'selection' else 'lists alone'}, {budget}"
        candidate = Candidate(name, native.select(selector, threads), {"role": role, "budget": budget})
        candidate.run()
        yield candidate


def gemm_candidate(size: int) -> Candidate:
    """A square float32 product by torch: what the machine reaches when nothing but multiplication is asked for."""
    left, right = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    out = torch.empty(size, size)
    torch.mm(left, right, out=out)
    return Candidate("fp32 GEMM", lambda: torch.mm(left, right, out=out), {"role": "gemm", "flops": 2 * size**3})


def decode_rows(plan: Plan) -> Rows:
    """One row per head dimension, group and cache dtype: one token after many, dense against the first budget."""
    for head_dim in plan.head_dims:
        for group in plan.groups:
            for kv_dtype in plan.kv_dtypes:
                key = {"kind": "decode", "length": plan.decode_length, "head_dim": head_dim, "group": group}
                key |= {"budget": plan.budgets[0], "kv_dtype": kv_dtype}
                yield key, functools.partial(decode, plan, key)


def decode(plan: Plan, key: dict[str, Any]) -> tuple[list[Candidate], dict[str, Any]]:
    """Dense (the baseline) and sparse over one cache; beside another cache dtype, float32 is measured too."""
    case = decode_case(plan, key["length"], key["head_dim"], key["group"])
    kinds = ("fp32",) if key["kv_dtype"] == "fp32" else ("fp32", key["kv_dtype"])
    candidates: list[Candidate] = []
    for kv_dtype in kinds:
        dense, sparse = decode_pair(case, key["budget"], kv_dtype, plan.threads, max(plan.reselects, default=1))
        for role, one in (("dense", dense), ("sparse", sparse)):
            candidates.append(decode_candidate(f"edgerun {role}, {kv_dtype} cache", one, role, kv_dtype))
        for every in plan.reselects if kv_dtype == key["kv_dtype"] else ():
            one = keeping_selections(sparse, every, plan.threads)
            candidates.append(decode_candidate(f"  a selection every {every} tokens", one, "keeping", kv_dtype))
            candidates[-1].before = dense.run  # else the keys that `sparse` has just read would be warm
    return candidates, {}


def decode_candidate(name: str, one: Decode, role: str, kv_dtype: str) -> Candidate:
    """A proven candidate of a decode row."""
    facts = {"role": role, "kv_dtype": kv_dtype, "relative_l2": one.prove(name), "cache_bytes": one.cache_bytes}
    facts |= {"reselect": one.options.reselect} if role == "keeping" else {}
    return Candidate(name, one.run, facts, one.options.reselect)


def decode_case(plan: Plan, cached: int, head_dim: int, group: int) -> AttentionCase:
    """Tokens for one call after `cached` tokens."""
    return AttentionCase.make(cached + 1, head_dim, plan.query_heads, plan.query_heads // group)


def growth_rows(plan: Plan) -> Rows:
    """Prefill and decode at the first budget, at one length and at twice that, in turn."""
    for head_dim in plan.head_dims:
        for group in plan.groups:
            for phase in ("prefill", "decode"):
                key: dict[str, Any] = {"kind": "growth", "phase": phase, "head_dim": head_dim, "group": group}
                key |= {"lengths": list(plan.growth_lengths), "budget": plan.budgets[0]}
                yield key, functools.partial(growth, plan, key)


def growth(plan: Plan, key: dict[str, Any]) -> tuple[list[Candidate], dict[str, Any]]:
    """The longer sequence first: it is the baseline, so a ratio is how many times longer it takes."""
    candidates = []
    for length in sorted(key["lengths"], reverse=True):
        name = f"edgerun budget {key['budget']}, {length} tokens"
        if key["phase"] == "decode":
            case = decode_case(plan, length, key["head_dim"], key["group"])
            sparse = decode_pair(case, key["budget"], "fp32", plan.threads)[1]
            candidates.append(decode_candidate(name, sparse, "sparse", "fp32"))
        else:
            case = AttentionCase.make(length, key["head_dim"], plan.query_heads, plan.query_heads // key["group"])
            native = Native.make(case, key["budget"])
            error = prove_sparse(name, native, native.run())
            candidates.append(native_candidate(name, native))
            candidates[-1].facts |= {"density": native.counters[0], "relative_l2": error}
        candidates[-1].facts["length"] = length
    return candidates, {}


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Plan]:
    """The command line, and the plan that it asks for: the grid's own, with what is given put in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=tuple(GRIDS), default="reduced")
    parser.add_argument("--output", type=pathlib.Path, help="the result file; by default the grid's in bench/results")
    parser.add_argument("--fresh", action="store_true", help="measure every row anew")
    parser.add_argument("--show", type=pathlib.Path, help="print a result file and measure nothing")
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS))
    parser.add_argument(
        "--kv-dtypes", nargs="+", help="cache dtypes of decode; what the op lacks is named and left out"
    )
    for name in ("lengths", "head-dims", "groups", "budgets", "reselects"):
        parser.add_argument(f"--{name}", nargs="+", type=int)
    parser.add_argument("--growth-lengths", nargs=2, type=int)
    for name in ("query-heads", "decode-length", "decode-repeats", "threads"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("custom-sdpa-length", "onnxruntime-length", "llama-cpp-length"):
        parser.add_argument(f"--{name}", type=int, help="longest sequence for this peer; 0: every length")
    parser.add_argument("--all-variants", action="store_true", default=None, help="every kernel variant of this CPU")
    parser.add_argument("--repeats", type=int, help="most rounds of a row")
    parser.add_argument("--row-seconds", type=float, help="after this long a row gets no further round")
    parser.add_argument("--least", type=int, help="fewest rounds of a row")
    values = parser.parse_args(arguments)
    given = {name: value for name, value in vars(values).items() if value is not None}
    plan = GRIDS[values.grid]
    fields = {field.name for field in dataclasses.fields(Plan)} & set(given)
    changed: dict[str, Any] = {
        name: tuple(given[name]) if isinstance(given[name], list) else given[name] for name in fields
    }
    efforts = {field.name: given[field.name] for field in dataclasses.fields(Effort) if field.name in given}
    return values, dataclasses.replace(plan, **changed, effort=dataclasses.replace(plan.effort, **efforts))


def main(arguments: list[str] | None = None) -> None:
    values, plan = parse(sys.argv[1:] if arguments is None else arguments)
    if values.show is not None:
        rows: list[Row] = json.loads(values.show.read_text(encoding="utf-8"))["rows"]
        print("\n".join([*(line for row in rows for line in row_lines(row)), *summary_lines(rows)]))
        return
    quiet_libraries()
    output = values.output or RESULTS / _PER_GRID[values.grid]
    command = " ".join(["python", "bench/ops/dhsa_attention.py", *(sys.argv[1:] if arguments is None else arguments)])
    results = ResultFile(output, command, dataclasses.asdict(plan), fresh=values.fresh)
    load = os.getloadavg()[0]
    print(f"{plan.query_heads} query heads, float32, {plan.threads} threads; load average {load:.1f}", flush=True)
    if results.continued:
        print(f"{len(results.rows)} rows are in {output} already; --fresh measures them anew")
    try:
        run(plan, results, lambda text: print(text, flush=True))
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print("\n".join(summary_lines(results.rows)))
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
