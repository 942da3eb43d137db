"""What XNNPACK is asked to take: what ExecuTorch offers it, without what it would compute as something else, and with
what XNNPACK does for any number of tokens though ExecuTorch 1.5 offers it for fixed shapes alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from executorch.backends.xnnpack.operators.node_visitor import _node_visitor_dict, register_node_visitor
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import CatConfig, GeluConfig, SliceCopyConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import XNNPartitionerConfig
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNGraph
from executorch.backends.xnnpack.utils.utils import PERM_NCHW_TO_NHWC
from torch.export.exported_program import ExportedProgram


class ExactGeluConfig(GeluConfig):  # type: ignore[misc]
    """GELU where it is the exact one. ExecuTorch 1.5 drops `approximate="tanh"` (Gemma) and lowers the exact GELU."""

    def check_constraints(self, node: torch.fx.Node, ep: ExportedProgram) -> bool:
        """Whether XNNPACK computes what `node` asks for."""
        return node.kwargs.get("approximate", "none") == "none" and bool(super().check_constraints(node, ep))


class OpenSliceConfig(SliceCopyConfig):  # type: ignore[misc]
    """Also slices of tensors with open dimensions, as rotary embeddings take of each head's halves."""

    def check_constraints(self, node: torch.fx.Node, ep: ExportedProgram) -> bool:
        """Whether `node` cuts a dimension of known size at known places, in steps of 1."""
        if super().check_constraints(node, ep):
            return True
        source, dim, *range_and_stride = cast(tuple[Any, ...], node.args)
        shape = node.meta["val"].shape
        if all(isinstance(one, int) for one in shape) or shape[dim] == 0:
            return False  # as ExecuTorch decided; and 0 would be "up to the end"
        known = (source.meta["val"].shape[dim], shape[dim], *range_and_stride[:2])
        open_elsewhere = all(isinstance(one, int) for one in known) and range_and_stride[2:] in ([], [1])
        return open_elsewhere and bool(self.check_common_constraints(node, ep))


_SliceVisitor: type = _node_visitor_dict["aten.slice_copy.Tensor"]  # its module does not keep the name


class OpenSliceVisitor(_SliceVisitor):  # type: ignore[misc, valid-type]
    """Writes a slice as ExecuTorch's own visitor does, with 0, "up to the end", for the size of an open dimension."""

    def define_node(
        self, node: torch.fx.Node, xnn_graph: XNNGraph, vals_to_ids: dict[torch.fx.Node, int], debug_handle: int
    ) -> None:
        """Append the slice to the graph."""
        super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
        shape: list[Any] = list(node.meta["val"].shape)
        if "XNN_NHWC_NODE" in node.meta:
            shape = [shape[i] for i in PERM_NCHW_TO_NHWC]
        written = xnn_graph.xnodes[-1].xnode_union
        written.sizes = [
            size if isinstance(known, int) else 0 for size, known in zip(written.sizes, shape, strict=True)
        ]


register_node_visitor(OpenSliceVisitor)  # in place of ExecuTorch's own: a slice of known shape is written as before


class RepeatedCatConfig(CatConfig):  # type: ignore[misc]
    """Also a tensor joined to itself, as rotary embeddings do with their angles. ExecuTorch counts distinct tensors."""

    def check_constraints(self, node: torch.fx.Node, ep: ExportedProgram) -> bool:
        """Whether two tensors or more are joined, equal or not."""
        return len(cast(list[Any], node.args[0])) >= 2 and bool(self.check_common_constraints(node, ep))


_CHANGED = {CatConfig: RepeatedCatConfig, GeluConfig: ExactGeluConfig, SliceCopyConfig: OpenSliceConfig}


def partitioner_configs() -> list[type[XNNPartitionerConfig]]:
    """ExecuTorch's configurations, some in the form above."""
    return [_CHANGED.get(config, config) for config in ALL_PARTITIONER_CONFIGS]
