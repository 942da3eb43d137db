"""edgerun::embedding_logits: the language model head that reads the token table (tied weights).

    out[..., v] = scale(v) * sum_d hidden[..., d] * table[v, d]

Schema, fake, CPU implementation, reference and decomposition. csrc/ops/embedding_logits/embedding_logits.h is the
contract.
"""

from __future__ import annotations

import torch

from edgerun.errors import EdgerunError
from edgerun.ops.embedding_table import check_table, dequantized, table_arguments
from edgerun.ops.native import native_module

_ARGUMENTS = "Tensor hidden, Tensor table, Tensor? scales"
_LIBRARY = torch.library.Library("edgerun", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"embedding_logits({_ARGUMENTS}) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"embedding_logits.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")  # type: ignore[no-untyped-call]


def logits(hidden: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Logits float32 [..., vocab] of `hidden` float32 [..., hidden] against `table` [vocab, hidden].

    The table is float32, float16, or int8 with `scales` float32 [vocab]. Raises EdgerunError for what does not fit.
    """
    result: torch.Tensor = torch.ops.edgerun.embedding_logits(hidden, table, scales)
    return result


def reference(hidden: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The same in float64."""
    return hidden.to(torch.float64) @ dequantized(table, scales).T


def decomposition(hidden: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The same in plain torch operators, for targets without custom ops."""
    product = torch.matmul(hidden, table.to(torch.float32).transpose(0, 1))
    return product if scales is None else product * scales


def _fake(hidden: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return hidden.new_empty([*hidden.shape[:-1], table.shape[0]], dtype=torch.float32)


def _fake_out(
    hidden: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None, *, out: torch.Tensor
) -> torch.Tensor:
    return out


def _implementation(hidden: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return _implementation_out(hidden, table, scales, out=_fake(hidden, table, scales))


def _implementation_out(
    hidden: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None, *, out: torch.Tensor
) -> torch.Tensor:
    check_table(table, scales)
    if hidden.dtype != torch.float32 or hidden.dim() == 0 or hidden.shape[-1] != table.shape[1]:
        raise EdgerunError(
            f"hidden is {list(hidden.shape)} {hidden.dtype}; expected [..., {table.shape[1]}] in float32"
        )
    shape = [*hidden.shape[:-1], table.shape[0]]
    if list(out.shape) != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise EdgerunError(f"out is {list(out.shape)} {out.dtype}; expected contiguous {shape} in float32")
    hidden, table = hidden.contiguous(), table.contiguous()
    scales = None if scales is None else scales.contiguous()
    rows = out.numel() // table.shape[0] if table.shape[0] else 0
    native_module().embedding_logits(
        *table_arguments(table, scales), hidden.data_ptr(), rows, out.data_ptr(), torch.get_num_threads()
    )
    return out


_LIBRARY.impl("embedding_logits", _implementation, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("embedding_logits.out", _implementation_out, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("edgerun::embedding_logits", _fake, lib=_LIBRARY)
torch.library.register_fake("edgerun::embedding_logits.out", _fake_out, lib=_LIBRARY)
