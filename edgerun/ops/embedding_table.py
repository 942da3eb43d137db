"""The token table that embedding_lookup and embedding_logits share: its dtypes, its scales, its checks."""

from __future__ import annotations

import torch

from edgerun.errors import EdgerunError

# The numbers of TableType in csrc/ops/embedding_lookup/embedding_lookup.h.
TABLE_DTYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2}


def check_table(table: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Raises EdgerunError unless table is [vocab, hidden] float32, float16 or int8, the last with scales [vocab]."""
    if table.dim() != 2 or table.dtype not in TABLE_DTYPES:
        raise EdgerunError(
            f"the embedding table is {list(table.shape)} {table.dtype}; "
            "expected [vocab, hidden] in float32, float16 or int8"
        )
    if (table.dtype == torch.int8) != (scales is not None):
        raise EdgerunError(
            f"an embedding table of {table.dtype} came {'with' if scales is not None else 'without'} scales; "
            "int8 tables need one scale a row, others take none"
        )
    if scales is not None and (scales.dtype != torch.float32 or list(scales.shape) != [table.shape[0]]):
        raise EdgerunError(
            f"the table's scales are {list(scales.shape)} {scales.dtype}; expected [{table.shape[0]}] in float32"
        )


def dequantized(table: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The table [vocab, hidden] that both ops mean, in `dtype`."""
    check_table(table, scales)
    values = table.to(dtype)
    return values if scales is None else values * scales.to(dtype).unsqueeze(1)


def table_arguments(table: torch.Tensor, scales: torch.Tensor | None) -> tuple[int, int, int, int, int]:
    """A checked, contiguous table as the native module takes it: address, scales' address, type, vocab, hidden."""
    return (
        table.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        TABLE_DTYPES[table.dtype],
        table.shape[0],
        table.shape[1],
    )
