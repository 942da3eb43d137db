"""What stands in a written .pte: its delegates, and the kernels that it calls beside them; and what it gives."""

from __future__ import annotations

import pathlib

import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import ExecutionPlan, KernelCall

from edgerun._library import load_op_library
from edgerun.bundle import Bundle

_NOT_COUNTED = ("edgerun::", "executorch_prim::", "aten::sym_size")  # ours, and what handles shapes alone


def partitions(path: pathlib.Path) -> int:
    """Number of parts that a delegate runs."""
    return len(_plan(path).delegates)


def portable_calls(path: pathlib.Path) -> list[str]:
    """Names of the kernels of others that a call runs on tensors outside the delegates, in order."""
    plan = _plan(path)
    calls = [one.instr_args for chain in plan.chains for one in chain.instructions]
    names = [plan.operators[call.op_index].name for call in calls if isinstance(call, KernelCall)]
    return [name for name in names if not name.startswith(_NOT_COUNTED)]


def run_chain(bundle: Bundle, chain: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`values` with what the programs of a video bundle's chain make of them."""
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    load_op_library()
    programs = {program["name"]: program for program in bundle.manifest["programs"]}
    for name in bundle.manifest["chains"][chain]:
        program = programs[name]
        loaded = _load_for_executorch(str(bundle.path / program["file"]))
        results = loaded.forward([values[one["name"]].contiguous() for one in program["inputs"]])
        values = values | dict(zip((one["name"] for one in program["outputs"]), results, strict=True))
    return values


def _plan(path: pathlib.Path) -> ExecutionPlan:
    program = deserialize_pte_binary(path.read_bytes()).program
    return next(plan for plan in program.execution_plan if plan.name == "forward")
