"""embedding_logits against float64 products: every table dtype and variant, odd sizes, threads, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from edgerun import compare
from edgerun.errors import EdgerunError
from edgerun.ops import embedding_logits
from edgerun.ops.embedding_table import dequantized
from edgerun.ops.native import native_module
from tests.ops.embedding_tables import TABLE_DTYPES, random_table

VARIANTS = native_module().embedding_logits_variants()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kernel variant of this CPU in turn."""
    native_module().embedding_logits_use_variant(request.param)
    yield request.param
    native_module().embedding_logits_use_variant(VARIANTS[0])


def random_hidden(rows: int, hidden: int) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows + hidden))


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
@pytest.mark.parametrize("hidden", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("vocab", [1, 2, 255, 257])
def test_logits_equal_the_float64_product(variant: str, dtype: torch.dtype, hidden: int, vocab: int) -> None:
    table, scales = random_table(dtype, vocab, hidden, seed=hidden)
    rows = random_hidden(2, hidden)
    out = embedding_logits.logits(rows, table, scales)
    assert out.dtype == torch.float32 and out.shape == (2, vocab)
    expected = embedding_logits.reference(rows, table, scales)
    # Against the size of the terms: a sum of one or two products may cancel to nearly nothing.
    terms = rows.double().abs() @ dequantized(table, scales).abs().T
    assert float((out.double() - expected).norm() / terms.norm()) <= compare.tolerance("op_fp32")


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_threads_do_not_change_a_bit(variant: str, dtype: torch.dtype) -> None:
    table, scales = random_table(dtype, vocab=1000, hidden=48, seed=2)
    rows = random_hidden(1, 48)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        serial = embedding_logits.logits(rows, table, scales)
        torch.set_num_threads(3)
        assert torch.equal(embedding_logits.logits(rows, table, scales), serial)
    finally:
        torch.set_num_threads(before)


def test_a_row_does_not_depend_on_its_neighbours(variant: str) -> None:
    table, scales = random_table(torch.int8, vocab=301, hidden=40, seed=4)
    rows = random_hidden(3, 40)
    together = embedding_logits.logits(rows, table, scales)
    assert torch.equal(together[1:2], embedding_logits.logits(rows[1:2], table, scales))
    assert torch.equal(together[:, 1:], embedding_logits.logits(rows, table[1:], scales[1:]))  # type: ignore[index]


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_every_value_of_a_narrow_table_is_exact(variant: str, dtype: torch.dtype) -> None:
    if dtype == torch.int8:
        table, scales = torch.arange(-128, 128).to(torch.int8), torch.ones(1)
    else:  # of float16 every finite value, subnormals among them
        table, scales = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).to(dtype), None
        table = table[table.isfinite()]
    one_hot = torch.zeros(1, 64)
    for at in (0, 17, 40, 63):  # a vector of either half, and the next step's
        one_hot.zero_()[0, at] = 1.0
        spread = torch.zeros(table.numel(), 64, dtype=dtype)
        spread[:, at] = table
        logits = embedding_logits.logits(one_hot, spread, None if scales is None else scales.expand(table.numel()))
        assert torch.equal(logits[0], table.float())


def test_a_variant_that_this_cpu_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no variant 'other' on this CPU"):
        native_module().embedding_logits_use_variant("other")


def test_leading_dimensions_are_kept() -> None:
    table, _ = random_table(torch.float32, vocab=9, hidden=8, seed=0)
    assert embedding_logits.logits(random_hidden(1, 8).reshape(1, 1, 8), table, None).shape == (1, 1, 9)
    assert embedding_logits.logits(torch.zeros(0, 8), table, None).shape == (0, 9)


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_decomposition_equals_the_op(dtype: torch.dtype) -> None:
    table, scales = random_table(dtype, vocab=23, hidden=20, seed=3)
    rows = random_hidden(2, 20)
    measured = embedding_logits.decomposition(rows, table, scales)
    assert compare.relative_l2(measured, embedding_logits.logits(rows, table, scales)) <= compare.tolerance(
        "op_against_op_fp32"
    )


def test_a_hidden_size_that_is_not_the_tables_is_refused() -> None:
    table, _ = random_table(torch.float32, vocab=5, hidden=8, seed=0)
    with pytest.raises(EdgerunError, match=r"hidden is \[1, 7\]"):
        embedding_logits.logits(torch.zeros(1, 7), table, None)


def test_half_precision_hidden_is_refused() -> None:
    table, _ = random_table(torch.float16, vocab=5, hidden=8, seed=0)
    with pytest.raises(EdgerunError, match="float16; expected"):
        embedding_logits.logits(torch.zeros(1, 8, dtype=torch.float16), table, None)
