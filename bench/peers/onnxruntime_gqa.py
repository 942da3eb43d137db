"""onnxruntime's com.microsoft GroupQueryAttention, float32, as a model of one node: its flash-style CPU attention.

The cache is bound as both past and present, the way its generation library runs it, so that a call copies the new keys
and values into it and nothing else. Its threads do not spin between calls: they would take time from other candidates.
"""

from __future__ import annotations

import numpy as np
import torch

from bench.peers.interface import AttentionCase, Prepared
from edgerun.errors import EdgerunError

NAME = "onnxruntime GroupQueryAttention"
_INPUTS = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length")
_OUTPUTS = ("output", "present_key", "present_value")


def prepare(case: AttentionCase, threads: int) -> Prepared:
    """A session with every tensor bound. Raises EdgerunError where onnx or onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EdgerunError(f"{error}: `pip install -e '.[test]'` brings onnx and onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(_model(case), options, providers=["CPUExecutionProvider"])
    tokens, heads, kv_heads, depth = case.length, case.query_heads, case.kv_heads, case.head_dim
    packed = {
        "query": case.query.transpose(1, 2).reshape(1, tokens, heads * depth).contiguous(),
        "key": case.key.transpose(1, 2).reshape(1, tokens, kv_heads * depth).contiguous(),
        "value": case.value.transpose(1, 2).reshape(1, tokens, kv_heads * depth).contiguous(),
        "seqlens_k": torch.tensor([tokens - 1], dtype=torch.int32),
        "total_sequence_length": torch.tensor([tokens], dtype=torch.int32),
    }
    caches = {name: torch.zeros(1, kv_heads, tokens, depth) for name in ("key", "value")}
    out = torch.empty(1, tokens, heads * depth)
    binding = session.io_binding()
    for name in _INPUTS:
        bound = caches[name.removeprefix("past_")] if name.startswith("past_") else packed[name]
        kind = np.float32 if bound.is_floating_point() else np.int32
        binding.bind_input(name, "cpu", 0, kind, tuple(bound.shape), bound.data_ptr())
    for name, bound in zip(_OUTPUTS, (out, caches["key"], caches["value"]), strict=True):
        binding.bind_output(name, "cpu", 0, np.float32, tuple(bound.shape), bound.data_ptr())
    kept = (packed, caches, out)  # the binding holds addresses only

    def run() -> object:
        session.run_with_iobinding(binding)
        return kept

    return Prepared(run, lambda _: out.view(1, tokens, heads, depth))


def _model(case: AttentionCase) -> bytes:
    """The one-node model, serialised."""
    from onnx import TensorProto, helper

    node = helper.make_node(
        "GroupQueryAttention",
        list(_INPUTS),
        list(_OUTPUTS),
        domain="com.microsoft",
        num_heads=case.query_heads,
        kv_num_heads=case.kv_heads,
        scale=case.scale,
    )
    width, kv_width = case.query_heads * case.head_dim, case.kv_heads * case.head_dim
    cache = [1, case.kv_heads, case.length, case.head_dim]
    shapes: dict[str, tuple[int, list[int]]] = {
        "query": (TensorProto.FLOAT, [1, case.length, width]),
        "key": (TensorProto.FLOAT, [1, case.length, kv_width]),
        "value": (TensorProto.FLOAT, [1, case.length, kv_width]),
        "past_key": (TensorProto.FLOAT, cache),
        "past_value": (TensorProto.FLOAT, cache),
        "seqlens_k": (TensorProto.INT32, [1]),
        "total_sequence_length": (TensorProto.INT32, [1]),
        "output": (TensorProto.FLOAT, [1, case.length, width]),
        "present_key": (TensorProto.FLOAT, cache),
        "present_value": (TensorProto.FLOAT, cache),
    }
    infos = {name: helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in shapes.items()}
    inputs, outputs = ([infos[name] for name in names] for names in (_INPUTS, _OUTPUTS))
    graph = helper.make_graph([node], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    serialised: bytes = model.SerializeToString()
    return serialised
