"""How much memory XNNPACK needs to execute a partition, read from the graph that it is given.

An executing partition has one arena, shared with the other partitions of a program, for the values between its
operators and for what an operator packs on the way. XNNPACK lays the values out by size, the largest first, each into
the smallest gap that its life leaves, and lets an element-wise operator write over an input that nothing else reads.
Sizes are those of the largest shapes; a smaller call takes as much, or less. An arena that must grow is allocated
before the old one is freed. Convolutions over more than a pixel keep tables of pointers from the first execution until
they are unloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

_PADDING_BYTES = 128  # after every value; also what its size is a multiple of
_POINTER_BYTES = 8
_TILE = 64  # rows or columns of the largest kernel: what is packed is a multiple of it
_WINDOWS = (schema.XNNNodeConv, schema.XNNPooling2D, schema.XNNArgMaxPooling2d)
_OVER_INPUT = (schema.XNNNode1x1, schema.XNNNode2x1, schema.XNNStaticReshape, schema.XNNELU, schema.XNNLeakyReLU)
_OF_ITS_OWN = (schema.XNNGlobalAvgPooling2d, schema.XNNBatchMatrixMultiply, schema.XNNConvert)
_ELEMENT_BYTES = {"fp16": 2.0, "bf16": 2.0, "qint8": 1.0, "quint8": 1.0, "qdint8": 1.0, "qduint8": 1.0, "qpint8": 1.0}


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What a partition needs in memory beside its weights, in bytes."""

    arena_bytes: int
    table_bytes: int


@dataclasses.dataclass
class _Slot:
    """A place in the arena: its size, and the first and last operator of its life."""

    size: int
    first: int
    last: int
    offset: int = 0


@contextlib.contextmanager
def recorded_graphs() -> Iterator[list[schema.XNNGraph]]:
    """The graphs that XNNPACK's preprocessing inside serialises; it gives none of them away."""
    own, graphs = xnnpack_preprocess.serialize_xnnpack_binary, []

    def record(graph: schema.XNNGraph, *more: Any) -> Any:
        graphs.append(graph)
        return own(graph, *more)

    xnnpack_preprocess.serialize_xnnpack_binary = record
    try:
        yield graphs
    finally:
        xnnpack_preprocess.serialize_xnnpack_binary = own


def workspace_of(graph: schema.XNNGraph) -> Workspace:
    """Arena and tables of a partition."""
    values = {value.id_out: value for value in map(_tensor, graph.xvalues)}
    nodes = [node.xnode_union for node in graph.xnodes]
    slots = _slots(graph, values, nodes)
    slots += [_Slot(size, i, i) for i, node in enumerate(nodes) if (size := _packed_bytes(node, values)) > 0]
    return Workspace(_arena_bytes(slots), sum(_table_bytes(node, values) for node in nodes))


def peak_bytes(arenas: Sequence[int]) -> int:
    """Most bytes of an arena that partitions of these sizes use one after another, while it grows."""
    peak = held = 0
    for arena in arenas:
        if arena > held:
            peak, held = max(peak, held + arena), arena
    return peak


def _slots(graph: schema.XNNGraph, values: dict[int, Any], nodes: Sequence[Any]) -> list[_Slot]:
    """Of the values that are neither weights nor given or taken from outside."""
    outside = {*graph.input_ids, *graph.output_ids}
    slots: dict[int, _Slot] = {}
    readers: dict[int, int] = {}
    for index, node in enumerate(nodes):
        inputs, outputs = _inputs(node), _outputs(node)
        for id_ in inputs:
            readers[id_] = readers.get(id_, 0) + 1
        for id_ in (*inputs, *outputs):
            if id_ in values and id_ not in outside and values[id_].constant_buffer_idx == 0:
                slots.setdefault(id_, _Slot(_value_bytes(values[id_]), index, index)).last = index
    for node in nodes:
        (output, *_) = _outputs(node)
        if not isinstance(node, _OVER_INPUT) or isinstance(node, _OF_ITS_OWN) or readers.get(output) != 1:
            continue
        for id_ in _inputs(node):
            if output in slots and id_ in slots and readers[id_] == 1 and slots[id_].size == slots[output].size:
                slots[id_].last = max(slots[id_].last, slots[output].last)
                slots[output] = slots[id_]
                break
    return list({id(slot): slot for slot in slots.values()}.values())


def _arena_bytes(slots: list[_Slot]) -> int:
    placed: list[_Slot] = []
    for slot in sorted(slots, key=lambda one: -one.size):
        end, gap = 0, math.inf
        for other in sorted((one for one in placed if _overlap(one, slot)), key=lambda one: one.offset):
            if slot.size <= other.offset - end < gap:
                slot.offset, gap = end, other.offset - end
            end = max(end, other.offset + other.size)
        slot.offset = end if gap == math.inf else slot.offset
        placed.append(slot)
    return max((slot.offset + slot.size for slot in slots), default=0)


def _overlap(one: _Slot, other: _Slot) -> bool:
    return one.first <= other.last and other.first <= one.last


def _packed_bytes(node: Any, values: dict[int, Any]) -> int:
    """What an operator packs while it executes: the second factor of a product, in tiles, with a bias."""
    if isinstance(node, schema.XNNBatchMatrixMultiply):
        factor = node.input2_id
    elif isinstance(node, schema.XNNFullyConnected):
        factor = node.filter_id
    else:
        return 0
    if values[factor].constant_buffer_idx != 0:
        return 0  # packed when it is loaded
    *batch, rows, columns = values[factor].dims
    return _rounded(math.prod(batch) * 4 * max((rows + 1) * _tiled(columns), (columns + 1) * _tiled(rows)))


def _table_bytes(node: Any, values: dict[int, Any]) -> int:
    """A pointer for every pixel that an output pixel is made of."""
    if not isinstance(node, _WINDOWS):
        return 0
    if isinstance(node, schema.XNNNodeConv):
        window, step = node.kernel_height * node.kernel_width, (node.subsampling_height, node.subsampling_width)
    else:
        window, step = node.pooling_height * node.pooling_width, (1, 1)
    padding = (node.padding_top, node.padding_right, node.padding_bottom, node.padding_left)
    if window == 1 and step == (1, 1) and not any(padding):
        return 0
    _, height, width, _ = values[_outputs(node)[0]].dims
    return _rounded(_POINTER_BYTES * window * _tiled(height * width))


def _tensor(value: schema.XValue) -> Any:
    return getattr(value.xvalue_union, "tensor_value", value.xvalue_union)


def _value_bytes(value: Any) -> int:
    kind = value.datatype.name.removeprefix("xnn_datatype_")
    rows = math.prod(value.dims[:-1]) if kind.startswith("qd") else 0  # each with its scale, zero point and sum
    return _rounded(int(math.prod(value.dims) * _ELEMENT_BYTES.get(kind, 4.0)) + 16 * rows + _PADDING_BYTES)


def _inputs(node: Any) -> list[int]:
    return [value for name, value in vars(node).items() if name.endswith("_id") and not name.startswith("output")]


def _outputs(node: Any) -> list[int]:
    return [value for name, value in vars(node).items() if name.endswith("_id") and name.startswith("output")]


def _tiled(size: int) -> int:
    return -(-size // _TILE) * _TILE


def _rounded(size: int) -> int:
    return -(-size // _PADDING_BYTES) * _PADDING_BYTES
