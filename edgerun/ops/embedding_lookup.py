"""edgerun::embedding_lookup: rows of the token table, as float32.

    out[..., d] = scale(ids[...]) * table[ids[...], d]

Schema, fake, CPU implementation, reference and decomposition. csrc/ops/embedding_lookup/embedding_lookup.h is the
contract. The op exists beside torch's embedding because its table is also the head's (embedding_logits): a program
holds it once, and a delegate cannot take a copy.
"""

from __future__ import annotations

import torch

from edgerun.errors import EdgerunError
from edgerun.ops.embedding_table import check_table, dequantized, table_arguments
from edgerun.ops.native import native_module

_ARGUMENTS = "Tensor table, Tensor? scales, Tensor ids"
_LIBRARY = torch.library.Library("edgerun", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"embedding_lookup({_ARGUMENTS}) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"embedding_lookup.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")  # type: ignore[no-untyped-call]


def lookup(table: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """Rows of `table` [vocab, hidden] (float32, float16, or int8 with `scales` float32 [vocab]) as float32.

    ids: int64 of any shape, each in [0, vocab). Returns [*ids.shape, hidden].
    Raises EdgerunError for what does not fit.
    """
    result: torch.Tensor = torch.ops.edgerun.embedding_lookup(table, scales, ids)
    return result


def reference(table: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """The same in float64."""
    return dequantized(table, scales)[ids]


def decomposition(table: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """The same in plain torch operators, for targets without custom ops."""
    flat = ids.reshape(-1)
    rows = torch.index_select(table, 0, flat).to(torch.float32)
    if scales is not None:
        rows = rows * torch.index_select(scales, 0, flat).unsqueeze(1)
    return rows.reshape([*ids.shape, table.shape[1]])


def _fake(table: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    return table.new_empty([*ids.shape, table.shape[1]], dtype=torch.float32)


def _fake_out(
    table: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, *, out: torch.Tensor
) -> torch.Tensor:
    return out


def _implementation(table: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    return _implementation_out(table, scales, ids, out=_fake(table, scales, ids))


def _implementation_out(
    table: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, *, out: torch.Tensor
) -> torch.Tensor:
    check_table(table, scales)
    if ids.dtype != torch.int64:
        raise EdgerunError(f"token ids are {ids.dtype}; expected int64")
    shape = [*ids.shape, table.shape[1]]
    if list(out.shape) != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise EdgerunError(f"out is {list(out.shape)} {out.dtype}; expected contiguous {shape} in float32")
    table, ids = table.contiguous(), ids.contiguous()
    scales = None if scales is None else scales.contiguous()
    invalid = native_module().embedding_lookup(
        *table_arguments(table, scales), ids.data_ptr(), ids.numel(), out.data_ptr()
    )
    if invalid >= 0:
        raise EdgerunError(
            f"token id {int(ids.reshape(-1)[invalid])} is outside the vocabulary [0, {table.shape[0]}): "
            "use the tokenizer that belongs to this model"
        )
    return out


_LIBRARY.impl("embedding_lookup", _implementation, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("embedding_lookup.out", _implementation_out, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("edgerun::embedding_lookup", _fake, lib=_LIBRARY)
torch.library.register_fake("edgerun::embedding_lookup.out", _fake_out, lib=_LIBRARY)
