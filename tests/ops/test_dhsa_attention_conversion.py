"""Two decomposed layers reach Core ML with every state written, and ONNX with the same numbers call after call."""

from __future__ import annotations

import collections
from pathlib import Path

import coremltools as ct
import numpy as np
import onnxruntime
import pytest
import torch

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


@pytest.mark.parametrize(
    ("tokens", "precision"),
    [
        (64, ct.precision.FLOAT32),
        pytest.param(1, ct.precision.FLOAT16, marks=pytest.mark.slow),
        pytest.param(64, ct.precision.FLOAT16, marks=pytest.mark.slow),
    ],
)
def test_core_ml_program_writes_every_state(tokens: int, precision: ct.precision) -> None:
    inputs = (example(tokens), torch.tensor([0], dtype=torch.int32))
    program = coreml_support.convert(torch.export.export(StatefulLayers().eval(), inputs), precision)
    main = program.functions["main"]
    counts = collections.Counter(operation.op_type for operation in main.operations)
    assert counts["coreml_update_state"] == counts["read_state"] == len(STATE_NAMES)
    assert not {"gather_along_axis", "gather_nd", "scatter_nd", "while_loop", "cond"} & set(counts)
    assert all(var.rank <= 5 for operation in main.operations for var in operation.outputs)


def test_onnx_file_agrees_with_the_reference_over_two_calls(tmp_path: Path) -> None:
    x, cut = example(300), 150
    state = new_state()
    exported = torch.export.export(FunctionalLayers().eval(), (x[:, :cut], torch.tensor([0]), *state))
    names = ["x", "input_pos", *STATE_NAMES]
    path = tmp_path / "layers.onnx"
    program = torch.onnx.export(exported, dynamo=True, verbose=False, input_names=names)
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
