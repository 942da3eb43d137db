"""ExecuTorch: an ExportedProgram becomes a .pte, with matrix products and element-wise work in XNNPACK.

Activations are planned at the upper bound of the dynamic dimension, so the prefill slice sets their memory. The state
buffers are mutable buffers of the program: only their shapes are stored. Weights are copied to disk partition by
partition (spooled_xnnpack.py), so that lowering needs little memory beyond the model itself.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
import warnings
from typing import Any

import torch

from edgerun.errors import ExportError

TARGET = "executorch-xnnpack"


@dataclasses.dataclass(frozen=True)
class LoweredProgram:
    """What a written .pte needs."""

    operators: tuple[str, ...]  # edgerun's own ops that it calls, sorted
    planned_bytes: int  # memory that the runtime plans for it: state and activations
    arena_bytes: int  # most that XNNPACK takes beside that while it executes
    table_bytes: int  # that XNNPACK keeps from its first execution until it is unloaded


def lower(
    program: torch.export.ExportedProgram, path: pathlib.Path, constant_methods: dict[str, Any]
) -> LoweredProgram:
    """Write `program` to `path`; its graph is changed. `constant_methods` are functions of no argument of the .pte.

    Raises ExportError when the file does not reach the disk whole; OSError from writing is passed on.
    """
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    from edgerun.export.lower.spooled_xnnpack import SpoolingPartitioner, as_xnnpack, workspaces
    from edgerun.export.lower.xnnpack_rewrites import InferredReshapes, SlicesForSplits, spell_out_tanh_gelu
    from edgerun.export.lower.xnnpack_workspace import peak_bytes

    # Beside the program: the same disk takes both, and an aborted export removes the folder with the bundle's.
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent, prefix=".weights-") as spool:
        warnings.simplefilter("ignore")  # that state starts undefined is intended: input_pos 0 drops it
        spell_out_tanh_gelu(program)
        own_storage(program)
        edge = to_edge_transform_and_lower(
            program,
            transform_passes=[SlicesForSplits(), InferredReshapes()],
            partitioner=[SpoolingPartitioner(pathlib.Path(spool))],
            constant_methods=constant_methods,
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        partitions = workspaces(edge.exported_program().graph_module, pathlib.Path(spool))
        as_xnnpack(edge.exported_program().graph_module)
        lowered = edge.to_executorch(ExecutorchBackendConfig())
        with path.open("wb") as file:
            lowered.write_to_file(file)
            file.flush()
            os.fsync(file.fileno())
    if path.stat().st_size == 0:
        raise ExportError(f"{path} was not written: make room on the disk and export again")
    plan = next(plan for plan in lowered.executorch_program.execution_plan if plan.name == "forward")
    return LoweredProgram(
        operators=tuple(sorted({one.name for one in plan.operators if one.name.startswith("edgerun::")})),
        planned_bytes=sum(plan.non_const_buffer_sizes),
        arena_bytes=peak_bytes([one.arena_bytes for one in partitions]),
        table_bytes=sum(one.table_bytes for one in partitions),
    )


def own_storage(program: torch.export.ExportedProgram) -> None:
    """Copy every weight that is a part of a bigger tensor: the writer would store that one's first bytes for it."""
    for tensors in (program.state_dict, program.constants):
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() != tensor.nbytes:
                own = tensor.detach().clone(memory_format=torch.contiguous_format)
                tensors[name] = torch.nn.Parameter(own, False) if isinstance(tensor, torch.nn.Parameter) else own
