"""Rewrites of a program that keep its values and let XNNPACK take more of it.

XNNPACK takes a reshape with one dimension that it infers, and none that is a symbol; torch.export writes the symbol of
the number of tokens. It takes slices but no splits, and has no GELU by tanh but everything that one is made of.
"""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import torch
from executorch.exir.dialects._ops import ops
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

_ATEN, _EDGE = torch.ops.aten, ops.edge.aten
_RESHAPES = (_EDGE.view_copy.default, _EDGE.unsqueeze_copy.default)
_TANH_GELU_CUBE = 0.044715


def spell_out_tanh_gelu(program: torch.export.ExportedProgram) -> None:
    """Write every GELU by tanh of an exported program as 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    graph = program.graph
    for node in graph.find_nodes(op="call_function", target=_ATEN.gelu.default):
        if node.kwargs.get("approximate") == "tanh":
            with graph.inserting_before(node):
                node.replace_all_uses_with(_tanh_gelu(graph, node))
            graph.erase_node(node)


class InferredReshapes(PassBase):
    """Every reshape of an edge program with one open dimension as a view that infers it; equal ones as one."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        known: dict[tuple[Node, tuple[int, ...]], Node] = {}
        for node in [one for one in graph.nodes if one.op == "call_function" and one.target in _RESHAPES]:
            shape = _with_inferred_size(node.meta["val"].shape)
            if shape is None:
                continue
            source = node.args[0]
            if (source, shape) not in known:
                with graph.inserting_before(node):
                    known[source, shape] = graph.call_function(_EDGE.view_copy.default, (source, list(shape)))
                known[source, shape].meta = dict(node.meta)
            node.replace_all_uses_with(known[source, shape])
            graph.erase_node(node)
        graph.eliminate_dead_code()
        graph_module.recompile()
        return PassResult(graph_module, bool(known))


class SlicesForSplits(PassBase):
    """Every split of an edge program as slices, and no copies of whole tensors (Phi-3 joins its heads with nothing)."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        for node in graph.find_nodes(op="call_function", target=_EDGE.split_with_sizes_copy.default):
            if all(isinstance(size, int) for size in node.args[1]):  # type: ignore[union-attr]
                _slice_instead(graph, node)
        for target in (_EDGE.alias_copy.default, _EDGE.cat.default):
            for node in graph.find_nodes(op="call_function", target=target):
                source: Any = node.args[0]
                if target is _EDGE.cat.default:
                    if len(source) > 1:
                        continue
                    (source,) = source
                if source.op == "call_function":  # an input or a buffer may be an output only as a copy
                    node.replace_all_uses_with(source)
        graph.eliminate_dead_code()
        graph_module.recompile()
        return PassResult(graph_module, True)


def _slice_instead(graph: Graph, split: Node) -> None:
    source, sizes, *dim = split.args
    ends = list(itertools.accumulate(sizes))  # type: ignore[arg-type]
    for part in list(split.users):
        assert part.target is operator.getitem
        index: Any = part.args[1]
        with graph.inserting_before(part):
            arguments = (source, *(dim or [0]), ends[index] - sizes[index], ends[index])  # type: ignore[index]
            piece = graph.call_function(_EDGE.slice_copy.Tensor, arguments)
        piece.meta = dict(part.meta)
        part.replace_all_uses_with(piece)


def _with_inferred_size(shape: torch.Size) -> tuple[int, ...] | None:
    """The shape with -1 for its open dimension; None when it has another number of them than one, or no elements."""
    sizes = tuple(size if isinstance(size, int) else -1 for size in shape)
    return sizes if sizes.count(-1) == 1 and 0 not in sizes else None


def _tanh_gelu(graph: Graph, gelu: Node) -> Node:
    x = gelu.args[0]

    def call(operator: torch._ops.OpOverload, *arguments: object) -> Node:
        node = graph.call_function(operator, arguments)  # type: ignore[arg-type]
        node.meta = dict(gelu.meta)  # all have its shape
        return node

    cube = call(_ATEN.mul.Tensor, call(_ATEN.mul.Tensor, x, x), x)
    inner = call(_ATEN.add.Tensor, x, call(_ATEN.mul.Tensor, cube, _TANH_GELU_CUBE))
    gate = call(_ATEN.tanh.default, call(_ATEN.mul.Tensor, inner, math.sqrt(2 / math.pi)))
    return call(_ATEN.mul.Tensor, call(_ATEN.mul.Tensor, x, 0.5), call(_ATEN.add.Tensor, gate, 1.0))
