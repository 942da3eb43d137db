"""rms_norm against float64: both dtypes, odd sizes, with and without a weight, threads, slices, what it refuses,
and the op inside an exported program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

from edgerun import _library, compare
from edgerun.errors import EdgerunError
from edgerun.ops import rms_norm

EPS = 1e-5
DTYPES = (torch.float32, torch.float16)
TOLERANCES = {torch.float32: "op_fp32", torch.float16: "op_fp16"}


def random_rows(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> torch.Tensor:
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def random_weight(size: int) -> torch.Tensor:
    return 1.0 + 0.3 * torch.randn(size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 64, 100, 257, 2048])
def test_rows_equal_the_float64_rows(size: int, weighted: bool, dtype: torch.dtype) -> None:
    x, weight = random_rows(2, 3, size, dtype=dtype), random_weight(size) if weighted else None
    out = rms_norm.normalize(x, weight, EPS)
    assert out.dtype == dtype and out.shape == x.shape
    assert compare.relative_l2(out, rms_norm.reference(x, weight, EPS)) <= compare.tolerance(TOLERANCES[dtype])


@pytest.mark.parametrize("spread", [1e-12, 1e-3, 1e15])
def test_rows_of_any_size_of_values(spread: float) -> None:
    x, weight = random_rows(4, 48, spread=spread), random_weight(48)
    assert compare.relative_l2(
        rms_norm.normalize(x, weight, EPS), rms_norm.reference(x, weight, EPS)
    ) <= compare.tolerance("op_fp32")


def test_squares_beyond_half_precision() -> None:
    x = random_rows(4, 48, dtype=torch.float16, spread=3e3)
    measured = rms_norm.normalize(x, None, EPS)
    assert compare.relative_l2(measured, rms_norm.reference(x, None, EPS)) <= compare.tolerance("op_fp16")


def test_zeros_stay_zeros() -> None:
    assert torch.equal(rms_norm.normalize(torch.zeros(2, 20), random_weight(20), EPS), torch.zeros(2, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(700, 48), (40, 2048), (3, 40_000)])
def test_threads_do_not_change_a_bit(rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = random_rows(rows, size, dtype=dtype), random_weight(size)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        serial = rms_norm.normalize(x, weight, EPS)
        torch.set_num_threads(3)
        assert torch.equal(rms_norm.normalize(x, weight, EPS), serial)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_do_not_change_a_bit(dtype: torch.dtype) -> None:
    x, weight = random_rows(700, 50, dtype=dtype), random_weight(50)
    together = rms_norm.normalize(x, weight, EPS)
    parts = [rms_norm.normalize(part, weight, EPS) for part in x.split([1, 16, 399, 284])]
    assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_no_elements_give_none(shape: tuple[int, ...]) -> None:
    assert rms_norm.normalize(torch.zeros(shape), None, EPS).shape == shape


def test_rows_that_are_not_contiguous() -> None:
    x, weight = random_rows(24, 5), random_weight(48)[::2]
    assert not weight.is_contiguous() and not x.T.is_contiguous()
    expected = rms_norm.normalize(x.T.contiguous(), weight.contiguous(), EPS)
    assert torch.equal(rms_norm.normalize(x.T, weight, EPS), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_decomposition_equals_the_op(weighted: bool, dtype: torch.dtype) -> None:
    x, weight = random_rows(5, 40, dtype=dtype), random_weight(40) if weighted else None
    measured = rms_norm.decomposition(x, weight, EPS)
    assert measured.dtype == dtype
    limit = compare.tolerance("op_against_op_fp32" if dtype == torch.float32 else "op_fp16")
    assert compare.relative_l2(measured, rms_norm.normalize(x, weight, EPS)) <= limit


@pytest.mark.parametrize(
    ("x", "weight", "eps", "words"),
    [
        (torch.zeros(2, 8, dtype=torch.bfloat16), None, EPS, "bfloat16; expected"),
        (torch.zeros(()), None, EPS, r"x is \[\]"),
        (torch.zeros(2, 8), torch.ones(7), EPS, r"the weight is \[7\] torch.float32; expected \[8\]"),
        (torch.zeros(2, 8), torch.ones(8, dtype=torch.float16), EPS, "float16; expected"),
        (torch.zeros(2, 8), None, -1e-6, "eps is -1e-06"),
        (torch.zeros(2, 8), None, float("nan"), "eps is nan"),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, weight: torch.Tensor | None, eps: float, words: str) -> None:
    with pytest.raises(EdgerunError, match=words):
        rms_norm.normalize(x, weight, eps)


def test_an_out_of_another_shape_is_refused() -> None:
    with pytest.raises(EdgerunError, match=r"out is \[2, 9\]"):
        torch.ops.edgerun.rms_norm.out(torch.zeros(2, 8), None, EPS, out=torch.zeros(2, 9))


class Norms(torch.nn.Module):
    """The op with and without a weight, as a module of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", random_weight(48))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm.normalize(x, self.weight, EPS), rms_norm.normalize(x, None, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_executorch_gives_the_bits_of_the_torch_op(dtype: torch.dtype, tmp_path: Path) -> None:
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    shapes = ({1: torch.export.Dim("tokens", min=1, max=600)},)
    exported = torch.export.export(Norms(), (random_rows(1, 8, 48, dtype=dtype),), dynamic_shapes=shapes)
    lowered = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    with (tmp_path / "norms.pte").open("wb") as file:
        lowered.to_executorch().write_to_file(file)
    _library.load_op_library()
    module = _load_for_executorch(str(tmp_path / "norms.pte"))
    for tokens in (600, 1, 17):
        x = random_rows(1, tokens, 48, dtype=dtype)
        for measured, expected in zip(module.run_method("forward", (x,)), Norms()(x), strict=True):
            assert torch.equal(measured, expected)
