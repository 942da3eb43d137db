"""embedding_lookup against float64 rows: every table dtype, odd widths, empty input, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from edgerun import compare
from edgerun.errors import EdgerunError
from edgerun.ops import embedding_lookup
from tests.ops.embedding_tables import TABLE_DTYPES, random_table


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 64])
def test_rows_equal_the_float64_rows(dtype: torch.dtype, hidden: int) -> None:
    table, scales = random_table(dtype, vocab=37, hidden=hidden, seed=hidden)
    ids = torch.tensor([[0, 36, 5, 5]])
    out = embedding_lookup.lookup(table, scales, ids)
    assert out.dtype == torch.float32 and out.shape == (1, 4, hidden)
    expected = embedding_lookup.reference(table, scales, ids)
    if dtype == torch.int8:
        assert compare.relative_l2(out, expected) <= compare.tolerance("op_fp32")
    else:
        assert torch.equal(out.double(), expected)


def test_every_half_is_converted_exactly() -> None:
    table = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).reshape(64, 1024)
    out = embedding_lookup.lookup(table, None, torch.arange(64))
    assert torch.equal(out.nan_to_num(nan=7.0), table.float().nan_to_num(nan=7.0))


def test_no_ids_give_no_rows() -> None:
    table, _ = random_table(torch.float32, vocab=5, hidden=8, seed=0)
    assert embedding_lookup.lookup(table, None, torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0, 8)


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_decomposition_equals_the_op(dtype: torch.dtype) -> None:
    table, scales = random_table(dtype, vocab=23, hidden=20, seed=3)
    ids = torch.tensor([[4, 22, 0]])
    assert torch.equal(embedding_lookup.decomposition(table, scales, ids), embedding_lookup.lookup(table, scales, ids))


def test_a_table_that_is_not_contiguous() -> None:
    table, _ = random_table(torch.float32, vocab=8, hidden=9, seed=1)
    ids = torch.tensor([3, 7])
    assert torch.equal(embedding_lookup.lookup(table.T.contiguous().T, None, ids), table[ids])


@pytest.mark.parametrize("token", [-1, 5])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    table, _ = random_table(torch.float32, vocab=5, hidden=8, seed=0)
    with pytest.raises(EdgerunError, match=rf"token id {token} is outside the vocabulary \[0, 5\)"):
        embedding_lookup.lookup(table, None, torch.tensor([[0, token]]))


def test_int8_without_scales_is_refused() -> None:
    table, _ = random_table(torch.int8, vocab=5, hidden=8, seed=0)
    with pytest.raises(EdgerunError, match="without scales"):
        embedding_lookup.lookup(table, None, torch.tensor([0]))


def test_a_dtype_that_no_table_has_is_refused() -> None:
    with pytest.raises(EdgerunError, match="bfloat16"):
        embedding_lookup.lookup(torch.zeros(4, 4, dtype=torch.bfloat16), None, torch.tensor([0]))


def test_the_op_exports_with_a_dynamic_length() -> None:
    class Lookup(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", random_table(torch.float32, vocab=5, hidden=8, seed=0)[0])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return embedding_lookup.lookup(self.table, None, ids)

    tokens = torch.export.Dim("tokens", min=1, max=16)
    program = torch.export.export(Lookup(), (torch.tensor([[1, 2]]),), dynamic_shapes=({1: tokens},))
    assert program.module()(torch.tensor([[1, 2, 3]])).shape == (1, 3, 8)
