"""The op in an ExecuTorch program: written state stays in place, and layers that share the boundaries stay in order."""

from __future__ import annotations

import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.schema import KernelCall, Tensor
from torch import nn

from edgerun.errors import EdgerunError
from edgerun.ops import dhsa_attention as op
from edgerun.recipe import DhsaOptions
from edgerun.techniques.dhsa import LayerAttention, layer_options
from tests.ops.attention_cases import make_case, small_options

HEADS, KV_HEADS, HEAD_DIM, MAX_CONTEXT = 4, 2, 8, 512


class Layers(nn.Module):
    """A dense, a windowed and two sparse layers, the state of each in buffers, the boundaries in one for all."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [LayerAttention(0.25), LayerAttention(0.25, window=32), LayerAttention(0.25), LayerAttention(0.25)]
        self.options = layer_options(DhsaOptions(budget=256, dense_layers=1, pooling="moments", reselect=4), kinds)
        self.register_buffer("boundaries", torch.zeros(MAX_CONTEXT // 16 + 1, dtype=torch.uint8))
        self.register_buffer("no_boundaries", torch.zeros(0, dtype=torch.uint8))
        for index, options in enumerate(self.options):
            state = op.AttentionState.allocate(KV_HEADS, HEAD_DIM, MAX_CONTEXT, options)
            for name in ("key_cache", "value_cache", "summaries", "selection"):
                self.register_buffer(f"{name}_{index}", getattr(state, name))

    def state(self, index: int) -> op.AttentionState:
        caches = [getattr(self, f"{name}_{index}") for name in ("key_cache", "value_cache", "summaries")]
        boundaries = self.boundaries if self.options[index].budget else self.no_boundaries
        return op.AttentionState(*caches, boundaries, getattr(self, f"selection_{index}"))

    def forward(self, x: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        for index, options in enumerate(self.options):
            query = x.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
            key, value = query[:, :KV_HEADS] * 0.5, query[:, KV_HEADS:] * 2.0
            x = x + op.attend(query, key, value, self.state(index), input_pos, options).flatten(2)
        return x[:, -1]


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("tokens", min=1, max=64)
    inputs = (torch.randn(1, 8, HEADS * HEAD_DIM), torch.tensor([0]))
    return torch.export.export(Layers().eval(), inputs, dynamic_shapes={"x": {1: tokens}, "input_pos": None})


def test_program_writes_its_buffers_in_place_and_in_order(exported: torch.export.ExportedProgram) -> None:
    lowered = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    plan = lowered.to_executorch().executorch_program.execution_plan[0]
    names = [f"{operator.name}.{operator.overload}" for operator in plan.operators]
    calls = [i.instr_args for i in plan.chains[0].instructions if isinstance(i.instr_args, KernelCall)]
    layers = [call.args for call in calls if names[call.op_index] == "edgerun::dhsa_attention.out"]
    assert len(layers) == 4
    assert not any(names[call.op_index].startswith("aten::copy") for call in calls)  # written in place
    states = [layer[3:6] for layer in layers]
    assert len({value for state in states for value in state}) == 12
    assert len({layer[7] for layer in layers}) == 4
    assert layers[2][6] == layers[3][6] != layers[0][6] == layers[1][6]
    finds_boundaries = [plan.values[layer[18]].val.bool_val for layer in layers]
    assert finds_boundaries == [False, False, True, False]
    sizes = [[plan.values[value].val for value in layer[3:8]] for layer in layers]
    assert all(isinstance(value, Tensor) for state in sizes for value in state)
    assert [list(value.sizes) for value in sizes[2]] == [[2, 32, 8, 16], [2, 32, 16, 8], [2, 32, 2, 8], [33], [2, 20]]


def test_export_keeps_the_number_of_tokens_open(exported: torch.export.ExportedProgram) -> None:
    results = [n.meta["val"].shape for n in exported.graph.nodes if "dhsa_attention" in n.name and "val" in n.meta]
    assert results and all(not isinstance(shape[1], int) for shape in results)


def test_schema_declares_what_the_op_writes_and_the_fake_its_shape() -> None:
    case = make_case(small_options(), 200)
    state = case.new_state()
    tensors = (*state.tensors(), torch.tensor([0]))
    arguments = (*case.rows(0, 200), *tensors, *case.options.arguments())
    overload = torch.ops.edgerun.dhsa_attention.default
    torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


def test_out_overload_fills_what_it_is_given() -> None:
    case = make_case(small_options(), 200)
    state, other = case.new_state(), case.new_state()
    expected = op.attend(*case.rows(0, 200), state, torch.tensor([0]), case.options)
    out = torch.empty_like(expected)
    tensors = (*other.tensors(), torch.tensor([0]))
    arguments = (*case.rows(0, 200), *tensors, *case.options.arguments())
    result = torch.ops.edgerun.dhsa_attention.out(*arguments, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("wrong", [{"size": (1, 3, HEADS, HEAD_DIM)}, {"dtype": torch.float16}])
def test_out_overload_refuses_another_shape_or_dtype(wrong: dict) -> None:
    case = make_case(small_options(), 200)
    state = case.new_state()
    size = op.attend(*case.rows(0, 200), state, torch.tensor([0]), case.options).shape
    out = torch.empty(**({"size": size} | wrong))
    tensors = (*state.tensors(), torch.tensor([0]))
    with pytest.raises(EdgerunError, match=r"out is .*; expected"):
        torch.ops.edgerun.dhsa_attention.out(*case.rows(0, 200), *tensors, *case.options.arguments(), out=out)
