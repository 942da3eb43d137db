"""XNNPACK lowering that keeps no copy of the weights in memory.

ExecuTorch's route copies every weight twice before it writes it: each partition is deep-copied for its backend, and all
the backend's bytes wait in memory for the writer. Here a partition's copy shares the weights (lowering never writes to
them), and a partition's bytes go to files in a spool folder as soon as they exist; the writer copies them from there.
The backend registers under a name of its own with ExecuTorch's extension points; `as_xnnpack` then gives every
partition the name that the runtime knows.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir._serialize._cord import CordBuffer, FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.program._program import _remove_invalid_ops_for_not_decompose
from torch.export.exported_program import ExportedProgram

from edgerun.export.lower.xnnpack_configs import partitioner_configs
from edgerun.export.lower.xnnpack_passes import needed_passes
from edgerun.export.lower.xnnpack_workspace import Workspace, recorded_graphs, workspace_of

_SPOOL = "edgerun_spool_folder"
_SMALL_BYTES = 1 << 16  # smaller buffers stay in memory: a file each would cost more than it frees


# Operators that stay whole, and which of their nodes do; None: all.
Kept = tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]


class SpoolingPartitioner(XnnpackPartitioner):  # type: ignore[misc]
    """Partitions as XnnpackPartitioner does; what the partitions hold goes to files in `folder`."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(configs=partitioner_configs())
        spool = CompileSpec(_SPOOL, str(folder).encode())
        self.delegation_spec = DelegationSpec(SpooledXnnpackBackend.__name__, [spool])
        self._taken: Kept | None = None

    def ops_to_not_decompose(self, ep: ExportedProgram) -> Kept:
        """Operators that XNNPACK takes whole. Without a check of single nodes where it takes each of them that the
        program has: ExecuTorch then decomposes the program once, not twice. It asks again at every stage of the same
        program, and an answer that changed on the way would leave nodes behind: one partitioner serves one program.
        """
        if self._taken is None:
            operators, is_taken = super().ops_to_not_decompose(ep)
            operators = _remove_invalid_ops_for_not_decompose(operators)
            nodes = [node for one in operators for node in ep.graph.find_nodes(op="call_function", target=one)]
            self._taken = (operators, None if all(map(is_taken, nodes)) else is_taken)
        return self._taken


class SpooledXnnpackBackend(BackendDetails):  # type: ignore[misc]
    """XnnpackBackend on a program that shares its weights, with its result in files."""

    @classmethod
    def copy_exported_program_for_preprocess(
        cls, edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> ExportedProgram:
        """A program whose graph may be changed freely and whose tensors are those of `edge_program`."""
        return ExportedProgram(
            root=copy.deepcopy(edge_program.graph_module),
            graph=copy.deepcopy(edge_program.graph),
            graph_signature=copy.deepcopy(edge_program.graph_signature),
            state_dict=dict(edge_program.state_dict),
            range_constraints=copy.deepcopy(edge_program.range_constraints),
            module_call_graph=copy.deepcopy(edge_program.module_call_graph),
            constants=dict(edge_program.constants),
            verifiers=[edge_program.verifier],
        )

    @staticmethod
    def preprocess(edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        """XNNPACK's own result, its buffers moved to the spool folder."""
        folder = pathlib.Path(next(spec.value for spec in compile_specs if spec.key == _SPOOL).decode())
        with needed_passes(), recorded_graphs() as graphs:
            result = XnnpackBackend.preprocess(edge_program, [])
        (graph,) = graphs
        _facts_path(folder, result.processed_bytes).write_text(json.dumps(dataclasses.asdict(workspace_of(graph))))
        store = result.data_store_output
        for index, buffer in enumerate(store.buffers):
            store.buffers[index] = _spooled(buffer, folder)
        return dataclasses.replace(
            result, data_store_output=NamedDataStoreOutput(store.buffers, store.pte_data, store.external_data)
        )


def workspaces(graph_module: torch.fx.GraphModule, folder: pathlib.Path) -> list[Workspace]:
    """Of the partitions of a lowered graph whose spool folder is `folder`, in the order in which they execute."""
    calls = graph_module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.executorch_call_delegate)
    modules = [getattr(graph_module, call.args[0].target) for call in calls]
    return [Workspace(**json.loads(_facts_path(folder, one.processed_bytes).read_text())) for one in modules]


def as_xnnpack(graph_module: torch.fx.GraphModule) -> None:
    """Rename every partition of a lowered graph to the backend that the runtime has, and let go of its weights."""
    for name, module in list(graph_module.named_children()):
        if isinstance(module, LoweredBackendModule) and module.backend_id == SpooledXnnpackBackend.__name__:
            renamed = LoweredBackendModule(
                edge_program=_without_weights(module.original_module),
                backend_id=XnnpackBackend.__name__,
                processed_bytes=module.processed_bytes,
                compile_specs=[],
                named_data_store_output=module.named_data_store_output,
            )
            renamed.meta = module.meta
            setattr(graph_module, name, renamed)


def _without_weights(program: ExportedProgram) -> ExportedProgram:
    """The program with tensors of the same shapes that take no memory: later stages read shapes alone."""
    for name, tensor in program.state_dict.items():
        shape_only = tensor.new_zeros(()).expand(tensor.shape)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        program.state_dict[name] = torch.nn.Parameter(shape_only, requires_grad=False) if is_parameter else shape_only
    return program


def _facts_path(folder: pathlib.Path, partition: bytes) -> pathlib.Path:
    return folder / f"{hashlib.sha256(partition).hexdigest()}.json"


def _spooled(buffer: CordBuffer, folder: pathlib.Path) -> CordBuffer:
    if not isinstance(buffer, bytes) or len(buffer) < _SMALL_BYTES:
        return buffer
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".weights", delete=False) as file:
        file.write(buffer)
    return FileBackedData(file.name, cleanup=True)
