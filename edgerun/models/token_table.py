"""The token embedding and the tied head as two readers of one table, so that a program stores the table once."""

from __future__ import annotations

import torch
from torch import nn


class TokenTable(nn.Module):
    """The token embedding's rows: float32, float16, or int8 with one float32 scale a row."""

    table: torch.Tensor
    scales: torch.Tensor | None

    def __init__(self, table: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype, multiplier: float) -> None:
        """table [vocab, hidden]; scales [vocab] or None; rows come as `dtype`, times `multiplier`."""
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("scales", scales)
        self.dtype = dtype
        # Rounded to the activations' dtype, as transformers rounds it.
        self.multiplier = float(torch.tensor(multiplier, dtype=dtype))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [1, S] → [1, S, hidden]."""
        rows: torch.Tensor = torch.ops.edgerun.embedding_lookup(self.table, self.scales, tokens).to(self.dtype)
        return rows if self.multiplier == 1.0 else rows * self.multiplier


class TiedHead(nn.Module):
    """Logits against the token table itself."""

    def __init__(self, table: TokenTable) -> None:
        super().__init__()
        self._table = (table,)  # in a tuple: the table is registered once, as the embedding

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [1, S, hidden] → float32 [1, S, vocab]."""
        table = self._table[0]
        logits: torch.Tensor = torch.ops.edgerun.embedding_logits(hidden.float(), table.table, table.scales)
        return logits


def multiplier_of(embedding: nn.Embedding) -> float | None:
    """What a transformers embedding module multiplies its rows by; None when it does something unknown to them."""
    if type(embedding) is nn.Embedding:
        return 1.0
    scale = getattr(embedding, "scalar_embed_scale", None)
    return None if scale is None else float(scale)
