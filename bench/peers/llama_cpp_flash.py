"""llama.cpp's flash attention on the CPU: ggml_flash_attn_ext in float16, else as llama_cpp.py."""

from __future__ import annotations

from bench.peers import llama_cpp
from bench.peers.interface import AttentionCase, Prepared

NAME = "llama.cpp flash, fp16 cache"
TOLERANCE = "peer_fp16_sums"  # the row of edgerun/compare.py


def prepare(case: AttentionCase, threads: int) -> Prepared:
    """With flash attention."""
    return llama_cpp.prepared(case, threads, flash=True)
