"""Two decomposed layers reach Core ML with every state written, and ONNX with the same numbers call after call."""

from __future__ import annotations

import collections
from pathlib import Path

import coremltools as ct
import numpy as np
import onnxruntime
import pytest
import torch
from coremltools.converters.mil.mil import Program

from edgerun import compare
from tests.ops import coreml_support
from tests.ops.decomposed_layers import (
    STATE_NAMES,
    FunctionalLayers,
    StatefulLayers,
    eager,
    example,
    new_state,
)


def to_core_ml(tokens: int, precision: ct.precision) -> Program:
    inputs = (example(tokens), torch.tensor([0], dtype=torch.int32))
    return coreml_support.convert(torch.export.export(StatefulLayers().eval(), inputs), precision)


def assert_is_a_plain_stateful_program(program: Program) -> None:
    operations = program.functions["main"].operations
    counts = collections.Counter(operation.op_type for operation in operations)
    assert counts["coreml_update_state"] == counts["read_state"] == len(STATE_NAMES)
    assert not {"gather_along_axis", "gather_nd", "scatter_nd", "while_loop", "cond"} & set(counts)
    assert all(var.rank <= 5 for operation in operations for var in operation.outputs)


def test_core_ml_program_writes_every_state_and_computes_the_reference_call_after_call() -> None:
    """Run op by op in numpy; its states are float16, as Core ML has them, its arithmetic is float32."""
    program = to_core_ml(64, ct.precision.FLOAT32)
    assert_is_a_plain_stateful_program(program)
    state = {name: tensor.numpy() for name, tensor in zip(STATE_NAMES, new_state(torch.float32), strict=True)}
    x = example(256)  # the last two slices are longer than the budget
    for first, expected in zip(range(0, 256, 64), eager(x, [64, 128, 192]), strict=True):
        inputs = {"x": x[:, first : first + 64].numpy(), "input_pos": np.array([first], dtype=np.int32)}
        (out,) = coreml_support.run(program, inputs, state)
        assert compare.relative_l2(out, expected) <= compare.tolerance("op_fp16")


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 64])
def test_core_ml_program_in_half_precision_writes_every_state(tokens: int) -> None:
    assert_is_a_plain_stateful_program(to_core_ml(tokens, ct.precision.FLOAT16))


def test_onnx_file_agrees_with_the_reference_over_two_calls(tmp_path: Path) -> None:
    x, cut = example(300), 150
    state = new_state()
    exported = torch.export.export(FunctionalLayers().eval(), (x[:, :cut], torch.tensor([0]), *state))
    names = ["x", "input_pos", *STATE_NAMES]
    path = tmp_path / "layers.onnx"
    program = torch.onnx.export(exported, dynamo=True, verbose=False, optimize=False, input_names=names)
    assert program is not None
    program.save(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    values = [tensor.numpy() for tensor in state]
    for first, expected in zip((0, cut), eager(x, [cut]), strict=True):
        piece = x[:, first : first + cut].contiguous().numpy()
        out, *values = session.run(None, dict(zip(names, [piece, np.array([first]), *values], strict=True)))
        assert compare.relative_l2(out, expected) <= compare.tolerance("op_against_op_fp32")
    assert 2 < values[0].sum() < len(values[0])  # some edges are cut and some are not, so chunks had several sizes
