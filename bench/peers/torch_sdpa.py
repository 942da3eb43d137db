"""torch.nn.functional.scaled_dot_product_attention, float32: its flash kernel over MKL, the dense bar on x86."""

from __future__ import annotations

from typing import cast

import torch

from bench.peers.interface import AttentionCase, Prepared

NAME = "torch SDPA"


def prepare(case: AttentionCase, threads: int) -> Prepared:
    """Grouped heads the way torch offers them. Threads are torch's own setting for the process."""
    torch.set_num_threads(threads)

    def run() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            case.query, case.key, case.value, is_causal=True, enable_gqa=case.kv_heads != case.query_heads
        )

    return Prepared(run, lambda result: cast(torch.Tensor, result).transpose(1, 2))
