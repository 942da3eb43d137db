"""Random token tables for the embedding ops' tests."""

from __future__ import annotations

import torch

TABLE_DTYPES = (torch.float32, torch.float16, torch.int8)


def random_table(dtype: torch.dtype, vocab: int, hidden: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A table [vocab, hidden] of `dtype`, with scales [vocab] when it is int8."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        table = torch.randint(-128, 128, (vocab, hidden), generator=generator, dtype=torch.int8)
        return table, torch.rand(vocab, generator=generator) * 0.02 + 1e-3
    return torch.randn(vocab, hidden, generator=generator).to(dtype), None
