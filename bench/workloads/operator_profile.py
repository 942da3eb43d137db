"""Where the time of a text bundle goes: every operator's share of a prompt's slices, and of the tokens after it.

    edgerun export zoo:text -o text.edgerun
    python bench/workloads/operator_profile.py text.edgerun --length 8000

ExecuTorch's event tracer notes every instruction of the program, and XNNPACK every operator inside its partitions. A
profile is of one run of ExecuTorch's own Python module, with edgerun's ops loaded: that must give the tokens that
TextSession gives, whose time for the same work, not traced, is noted beside it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import pathlib
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, Literal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, ResultFile, Row
from edgerun.bundle import Bundle
from edgerun.errors import EdgerunError, ParityError
from edgerun.library_noise import quiet_libraries
from edgerun.sessions.text import TextSession

Group = Literal["attention", "products", "other"]

KINDS = ("prefill", "decode")
ROWS_PRINTED = 12
BETWEEN = "runtime, between instructions"
UNATTRIBUTED = "XNNPACK, outside its operators"  # its clock counts whole microseconds and drops the rest
_ATTENTION = ("edgerun::dhsa_attention",)
_PRODUCTS = ("edgerun::embedding_logits", "XNNPACK Fully Connected", "XNNPACK Batch Matrix Multiply")
_NUMBER = re.compile(r" #\d+$")  # XNNPACK numbers the operators of one type in a partition


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is profiled: the settings that a result file belongs to."""

    length: int  # tokens of the prompt, random
    new_tokens: int  # the first among them, which the prompt's last slice gives
    threads: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What the session gave and took for the same work, not traced."""

    prompt: list[int]
    tokens: list[int]
    prefill_ms: float
    decode_ms: float


class MethodCall:
    """One call of the program, by operator: how often, and nanoseconds; the parts add up to `execute_ns`."""

    def __init__(self, events: Sequence[Any], names: Sequence[str]) -> None:
        """events: ProfileEvents of one call; names: of the program's instructions."""
        self.count: collections.Counter[str] = collections.Counter()
        self.ns: collections.Counter[str] = collections.Counter()
        self.execute_ns = next(_ns(event) for event in events if event.name == "Method::execute")
        self.ns[BETWEEN] = self.execute_ns
        for event in events:
            if event.delegate_debug_id_str is not None:  # comes before its DELEGATE_CALL
                self._move(f"XNNPACK {_NUMBER.sub('', event.delegate_debug_id_str)}", UNATTRIBUTED, _ns(event))
            elif event.name == "DELEGATE_CALL":
                self._move(UNATTRIBUTED, BETWEEN, _ns(event))
            elif event.name == "OPERATOR_CALL":
                self._move(names[event.instruction_id], BETWEEN, _ns(event))

    def _move(self, name: str, out_of: str, ns: int) -> None:
        self.count[name] += 1
        self.ns[name] += ns
        self.ns[out_of] -= ns


def run(plan: Plan, bundles: Sequence[pathlib.Path], results: ResultFile) -> None:
    """Profile every bundle that the results lack. Raises ParityError when a traced program gives other tokens."""
    for path in bundles:
        bundle = Bundle.open(path)
        facts = describe(bundle, plan)
        known = [results.find({"kind": kind, **facts}) for kind in KINDS]
        rows = [row for row in known if row is not None]
        if len(rows) < len(KINDS):
            rows = list(measure(bundle, plan, facts))
            for row, before in zip(rows, known, strict=True):
                if before is None:
                    results.add(row)
        for row in rows:
            print("\n".join(lines(row)), flush=True)


def describe(bundle: Bundle, plan: Plan) -> dict[str, Any]:
    """What tells the rows of one bundle from another's. Raises EdgerunError when the run does not fit its context."""
    recipe, source = bundle.manifest["recipe"], bundle.manifest["source"]
    if plan.length + plan.new_tokens > recipe["max_context"]:
        raise EdgerunError(
            f"{plan.length} + {plan.new_tokens} tokens do not fit the context of {recipe['max_context']} of "
            f"{bundle.path.name}: lower --length, or export with a larger --max-context"
        )
    return {
        "architecture": source["architecture"],
        "source": source["sha256"][:16],
        "build": bundle.manifest["build"][:16],
        **{name: recipe[name] for name in ("attention", "quantize", "max_context", "prefill_slice")},
        "length": plan.length,
    }


def measure(bundle: Bundle, plan: Plan, facts: dict[str, Any]) -> tuple[Row, Row]:
    """The rows of prefill and of decode."""
    load = os.getloadavg()[0]
    session = session_run(bundle.path, plan)
    calls = traced_calls(bundle, plan, session)
    slices = len(calls) - (plan.new_tokens - 1)
    parts = ((calls[:slices], session.prefill_ms), (calls[slices:], session.decode_ms))
    prefill, decode = (
        {"kind": kind, **facts, "load_average_at_start": load, "session_ms": session_ms, **profile(part)}
        for kind, (part, session_ms) in zip(KINDS, parts, strict=True)
    )
    return prefill, decode


def session_run(bundle: pathlib.Path, plan: Plan) -> Run:
    """The prompt, and what a session generates after it. A token before warms up."""
    session = TextSession(bundle, threads=plan.threads, verify=False)
    generator = random.Random(0)
    prompt = [generator.randrange(session.vocab_size) for _ in range(plan.length)]
    session.generate(prompt[:1], max_new_tokens=0)
    session.reset()
    tokens = session.generate(prompt, max_new_tokens=plan.new_tokens, stop_ids=[]).tokens
    stats = session.stats
    prefill_ms = stats.prompt_eval_end_ms - stats.inference_start_ms
    return Run(prompt, tokens, prefill_ms, stats.inference_end_ms - stats.prompt_eval_end_ms)


def traced_calls(bundle: Bundle, plan: Plan, session: Run) -> list[MethodCall]:
    """The session's run again, traced: a call for every slice, and one for every token but the last."""
    import torch
    from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc
    from executorch.extension.pybindings import portable_lib

    program = bundle.path / bundle.manifest["programs"][0]["file"]
    step = bundle.manifest["recipe"]["prefill_slice"]
    fed = [session.prompt[i : i + step] for i in range(0, plan.length, step)] + [[one] for one in session.tokens[:-1]]
    if portable_lib._threadpool_get_thread_count() != plan.threads:
        portable_lib._unsafe_reset_threadpool(plan.threads)
    module = portable_lib._load_for_executorch(str(program), enable_etdump=True)

    def forward(tokens: list[int], input_pos: int) -> int:
        inputs = (torch.tensor([tokens]), torch.tensor([input_pos]))
        return int(module.forward(inputs, clone_outputs=False)[0].argmax())

    forward(session.prompt[:1], 0)  # warms up; position 0 drops it
    position, given = 0, []
    for tokens in fed:
        given.append(forward(tokens, position))
        position += len(tokens)
    if given[-plan.new_tokens :] != session.tokens:
        raise ParityError(
            f"{bundle.path.name}: the traced program gives other tokens than the session; nothing is kept"
        )
    with tempfile.TemporaryDirectory() as folder:
        dump = pathlib.Path(folder) / "events.etdump"
        module.write_etdump_result_to_file(str(dump))
        blocks = deserialize_from_etdump_flatcc(dump.read_bytes()).run_data
    names = instruction_names(program)
    events = [[event.profile_event for event in block.events or () if event.profile_event] for block in blocks]
    executed = [MethodCall(one, names) for one in events if any(event.name == "Method::execute" for event in one)]
    return executed[-len(fed) :]


def instruction_names(program: pathlib.Path) -> list[str]:
    """What each instruction of `forward` calls, of a kernel with its overload: the events have only its number."""
    from executorch.exir._serialize._program import _ExtendedHeader, _flatbuffer_to_program
    from executorch.exir.schema import DelegateCall, KernelCall

    with program.open("rb") as file:  # the weights after the plan are not read
        header = _ExtendedHeader.from_bytes(file.read(64)[8:])
        file.seek(0)
        plans = _flatbuffer_to_program(file.read(header.program_size)).execution_plan
    plan = next(one for one in plans if one.name == "forward")
    (chain,) = plan.chains
    names = []
    for instruction in chain.instructions:
        call = instruction.instr_args
        if isinstance(call, KernelCall):
            operator = plan.operators[call.op_index]
            names.append(".".join(filter(None, (operator.name, operator.overload))))
        else:
            names.append(plan.delegates[call.delegate_index].id if isinstance(call, DelegateCall) else "runtime")
    return names


def profile(calls: Sequence[MethodCall]) -> dict[str, Any]:
    """What operators took of `calls`, the most first, with their milliseconds in each call."""
    execute_ns = sum(call.execute_ns for call in calls)
    total: collections.Counter[str] = collections.Counter()
    for call in calls:
        total.update(call.ns)
    operators = [
        {
            "name": name,
            "group": group(name),
            "calls": sum(call.count[name] for call in calls),
            "total_ms": ns / 1e6,
            "share": ns / execute_ns,
            "ms": [round(call.ns[name] / 1e6, 6) for call in calls],
        }
        for name, ns in total.most_common()
    ]
    groups = {one: sum(ns for name, ns in total.items() if group(name) == one) for one in ("attention", "products")}
    groups["other"] = execute_ns - sum(groups.values())
    return {
        "method_calls": len(calls),
        "execute_ms": execute_ns / 1e6,
        "share_of_group": {name: ns / execute_ns for name, ns in groups.items()},
        "operators": operators,
    }


def group(name: str) -> Group:
    """What an operator's time is spent for."""
    if name.startswith(_ATTENTION):
        return "attention"
    return "products" if name.startswith(_PRODUCTS) else "other"


def lines(row: Row) -> list[str]:
    """The row as a table of what takes most, and the rest in one line."""
    operators = row["operators"]
    shown, rest = operators[:ROWS_PRINTED], operators[ROWS_PRINTED:]
    text = [
        f"\n{row['kind']}: {row['architecture']}, {row['attention']}, {row['quantize']}, prompt of {row['length']} "
        f"tokens, context {row['max_context']}, {row['method_calls']} calls",
        f"  {'operator':<62} {'calls':>7} {'total ms':>10} {'share':>7}",
    ]
    text += [f"  {one['name']:<62} {one['calls']:7d} {one['total_ms']:10.2f} {one['share']:7.1%}" for one in shown]
    if rest:
        calls, milliseconds, share = (sum(one[name] for one in rest) for name in ("calls", "total_ms", "share"))
        text.append(f"  {f'{len(rest)} more':<62} {calls:7d} {milliseconds:10.2f} {share:7.1%}")
    groups = ", ".join(f"{name} {share:.1%}" for name, share in row["share_of_group"].items())
    text.append(f"  {'total':<62} {'':7} {row['execute_ms']:10.2f}         {groups}")
    text.append(f"  {'the session, not traced':<62} {'':7} {row['session_ms']:10.2f}")
    return text


def _ns(event: Any) -> int:
    return int(event.end_time - event.start_time)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=pathlib.Path, metavar="BUNDLE", help="text bundles")
    parser.add_argument("--length", type=int, default=8000, help="tokens of the prompt, random")
    parser.add_argument("--new-tokens", type=int, default=9, help="the first among them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "operator_profile.json")
    parser.add_argument("--fresh", action="store_true", help="measure every row anew")
    values = parser.parse_args(arguments)
    if values.length < 1 or values.new_tokens < 2 or values.threads < 1:
        parser.error("--length and --threads must be at least 1, --new-tokens at least 2")
    quiet_libraries()
    plan = Plan(values.length, values.new_tokens, values.threads)
    command = " ".join(["python", "bench/workloads/operator_profile.py", *(arguments or sys.argv[1:])])
    results = ResultFile(values.output, command, dataclasses.asdict(plan), fresh=values.fresh)
    try:
        run(plan, values.bundles, results)
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print(f"\nwrote {values.output}")


if __name__ == "__main__":
    main()
