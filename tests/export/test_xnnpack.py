"""What the lowering gives to XNNPACK beyond ExecuTorch's own choice: taken whole, and computed right for any length."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgerun import compare
from edgerun.export.lower import spooled_xnnpack
from edgerun.export.lower.executorch import lower
from tests.export.programs import partitions, portable_calls

TOKENS = (8, 32, 1, 5, 17, 32, 1)  # lengths of calls, in the order in which one program takes them
WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Lowered:
    path: pathlib.Path
    module: nn.Module

    def worst_relative_l2(self) -> float:
        """Over calls of all lengths, against the module itself."""
        from executorch.extension.pybindings.portable_lib import _load_for_executorch

        program = _load_for_executorch(str(self.path))
        inputs = [torch.randn(1, n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in TOKENS]
        return max(compare.relative_l2(program.run_method("forward", (x,))[0], self.module(x)) for x in inputs)


Lower = Callable[[Callable[[torch.Tensor], torch.Tensor]], Lowered]


class Function(nn.Module):
    """A linear layer and what follows it: work that XNNPACK has in any case."""

    def __init__(self, then: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.linear(x))


@pytest.fixture
def lowered(tmp_path: pathlib.Path) -> Lower:
    def build(then: Callable[[torch.Tensor], torch.Tensor]) -> Lowered:
        module = Function(then).eval().requires_grad_(False)
        shapes = ({1: torch.export.Dim("tokens", min=1, max=max(TOKENS))},)
        program = torch.export.export(module, (torch.randn(1, 8, WIDTH),), dynamic_shapes=shapes)
        lower(program, tmp_path / "program.pte", {})
        return Lowered(tmp_path / "program.pte", module)

    return build


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(1, x.shape[1], 2, 8).transpose(1, 2)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """The rotation of each head's halves, without its angles."""
    query = heads(x)
    return query * 0.5 + torch.cat((-query[..., 4:], query[..., :4]), -1) * 2.0


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, x), -1).cos()


def split(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.cat((gate.sigmoid() * up, up[..., 8:]), -1) + 1.0  # the last part is empty


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(x * 3.0, approximate="tanh") + 1.0


def reshapes(x: torch.Tensor) -> torch.Tensor:
    return (x.unsqueeze(1) * x.unsqueeze(1)).reshape(x.shape[1], 4, 4) + x.view(x.shape[1], 4, 4)


@pytest.mark.parametrize("then", [rotate, doubled, split, tanh_gelu, reshapes])
def test_is_one_partition_and_right_for_any_length(
    then: Callable[[torch.Tensor], torch.Tensor], lowered: Lower
) -> None:
    program = lowered(then)
    assert (partitions(program.path), portable_calls(program.path)) == (1, [])
    assert program.worst_relative_l2() <= compare.tolerance("op_fp32")


def activations(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * torch.softmax(x, -1)


def attention(x: torch.Tensor) -> torch.Tensor:
    normal = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
    return torch.bmm(torch.bmm(normal, x.transpose(1, 2)).softmax(-1), x)


def convolution(x: torch.Tensor) -> torch.Tensor:
    picture = x.view(1, x.shape[1], 4, 4).transpose(0, 1)
    return nn.functional.conv2d(nn.functional.pad(picture, (1, 1, 1, 1)), torch.ones(2, 1, 3, 3)) + 1.0


@pytest.mark.parametrize("then", [rotate, split, activations, attention, convolution])
def test_passes_left_out_change_no_byte(
    then: Callable[[torch.Tensor], torch.Tensor], lowered: Lower, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortened = lowered(then).path.read_bytes()
    monkeypatch.setattr(spooled_xnnpack, "needed_passes", contextlib.nullcontext)
    assert lowered(then).path.read_bytes() == shortened


def test_a_slice_of_the_open_dimension_stays_outside(lowered: Lower) -> None:
    program = lowered(lambda x: x[:, -1:])
    assert portable_calls(program.path) == ["aten::slice_copy"]
    assert program.worst_relative_l2() <= compare.tolerance("op_fp32")


def test_a_reshape_of_two_open_dimensions_stays_outside(lowered: Lower) -> None:
    program = lowered(lambda x: torch.matmul(x, x.transpose(1, 2)).unsqueeze(1))
    assert "aten::unsqueeze_copy" in portable_calls(program.path)
    assert program.worst_relative_l2() <= compare.tolerance("op_fp32")


def test_a_join_with_nothing(lowered: Lower) -> None:
    program = lowered(lambda x: torch.cat((x, x[:, :, :0]), -1))
    assert program.worst_relative_l2() <= compare.tolerance("op_fp32")


def test_a_slice_of_no_width_stays_outside(lowered: Lower) -> None:
    program = lowered(lambda x: x[:, :, 4:4].sum(-1, keepdim=True) + x)
    assert program.worst_relative_l2() <= compare.tolerance("op_fp32")


def test_an_input_is_returned_as_a_copy(tmp_path: pathlib.Path) -> None:
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    class Same(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((x,), -1)

    x = torch.randn(1, 8, WIDTH)
    lower(torch.export.export(Same(), (x,)), tmp_path / "program.pte", {})
    assert torch.equal(_load_for_executorch(str(tmp_path / "program.pte")).run_method("forward", (x,))[0], x)


class PartsOfOneTensor(nn.Module):
    """Weights that are views of a bigger tensor, as a split qkv is."""

    def __init__(self) -> None:
        super().__init__()
        joined = torch.randn(3 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.linear.weight = nn.Parameter(joined[2 * WIDTH :], False)
        self.register_buffer("factors", joined[WIDTH, :])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factors


def test_weights_that_are_parts_of_a_tensor(tmp_path: pathlib.Path) -> None:
    module = PartsOfOneTensor()
    tokens = torch.export.Dim("S", min=1, max=max(TOKENS))
    program = torch.export.export(module, (torch.randn(1, 8, WIDTH),), dynamic_shapes=({1: tokens},))
    lower(program, tmp_path / "parts.pte", {})
    assert Lowered(tmp_path / "parts.pte", module).worst_relative_l2() <= compare.tolerance("op_fp32")
