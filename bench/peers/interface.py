"""What every attention peer offers: the same prefill on the same tensors, laid out its own way before the clock runs.

A peer is a module here with `NAME`, `prepare(case, threads)` and, unless it is op_fp32, the name of its `TOLERANCE`.
What a runtime would hold in another layout (a cache, a transposed key) is laid out by `prepare`; what it must do on
every call is inside `run`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Protocol, cast

import torch

# Option name -> module; the order of the tables.
PEERS = {
    "torch": "torch_sdpa",
    "custom_sdpa": "executorch_custom_sdpa",
    "onnxruntime": "onnxruntime_gqa",
    "llama_cpp": "llama_cpp",
    "llama_cpp_flash": "llama_cpp_flash",
}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One sequence of random tokens. Random data says nothing of the quality of a selection, only of its time."""

    query: torch.Tensor  # [1, Hq, S, D]
    key: torch.Tensor  # [1, Hkv, S, D]
    value: torch.Tensor  # [1, Hkv, S, D]

    @staticmethod
    def make(length: int, head_dim: int, query_heads: int, kv_heads: int) -> AttentionCase:
        """The same tensors for the same sizes, float32."""
        generator = torch.Generator().manual_seed(1_000_003 * length + 1009 * head_dim + kv_heads)
        query = torch.randn(1, query_heads, length, head_dim, generator=generator)
        key, value = torch.randn(2, 1, kv_heads, length, head_dim, generator=generator)
        return AttentionCase(query, key, value)

    @property
    def length(self) -> int:
        """S, tokens."""
        return self.query.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.query.shape[3]

    @property
    def query_heads(self) -> int:
        """Hq."""
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.key.shape[1]

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.head_dim**-0.5)

    @property
    def causal_flops(self) -> int:
        """Multiplications and additions: 4 D for each of the S (S + 1) / 2 causal pairs of a query head."""
        return 2 * self.head_dim * self.query_heads * self.length * (self.length + 1)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A peer, ready: `run` is what is timed, `answer` turns what it returned into [1, S, Hq, D]."""

    run: Callable[[], object]
    answer: Callable[[object], torch.Tensor]


class Peer(Protocol):
    """A module of this folder."""

    NAME: str

    def prepare(self, case: AttentionCase, threads: int) -> Prepared:
        """Raises EdgerunError, with the way to install it, where the peer is not there."""
        ...


def open_peer(option: str) -> Peer:
    """The module behind an option name of PEERS."""
    return cast(Peer, importlib.import_module(f"bench.peers.{PEERS[option]}"))
