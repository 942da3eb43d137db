"""What stands in a written .pte: its delegates, and the kernels that it calls beside them."""

from __future__ import annotations

import pathlib

from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import ExecutionPlan, KernelCall

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


def _plan(path: pathlib.Path) -> ExecutionPlan:
    program = deserialize_pte_binary(path.read_bytes()).program
    return next(plan for plan in program.execution_plan if plan.name == "forward")
